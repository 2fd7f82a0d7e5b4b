"""``Swarm``: a model, tools and roles; a task in, a result with its cost and its trace out."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, overload

import anyio
from opentelemetry import trace
from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

from swarm_sdk import prompts
from swarm_sdk.config import (
    Role,
    check_model_string,
    default_sampling,
    make_task,
    open_model,
)
from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.budget import FREE, Budget, Scope
from swarm_sdk.runtime.episode import (
    EpisodeSettings,
    Result,
    check_names,
    resume_episode,
    run_episode,
)
from swarm_sdk.runtime.events import Event, EventsDropped
from swarm_sdk.runtime.rollouts import RolloutManager
from swarm_sdk.runtime.spawn import SubagentConfig
from swarm_sdk.runtime.state import Gate, Limits
from swarm_sdk.runtime.streaming import stream
from swarm_sdk.tools.function import FunctionTool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.schema import TRACER_NAME
from swarm_sdk.types import Image, Model, Price, Sampling, Task, Tool

if TYPE_CHECKING:
    from collections.abc import Mapping

    from opentelemetry.trace import TracerProvider

    from swarm_sdk.runtime.context import ContextStrategy
    from swarm_sdk.runtime.hooks import Hooks

ParsedT = TypeVar("ParsedT")
MAX_WAITING_EVENTS = 65_536
"""Events that a consumer of ``run_stream`` may be behind; the oldest are dropped then."""


class Swarm:
    """An orchestrator that may create sub-agents, and what they can do.

    Args:
        model: ``"nano"``, ``"path:DIRECTORY"``, ``"sglang:http://host:port"``,
            ``"openai:http://host/v1#model"`` or a ``Model``.
        tools: ``Tool`` objects or typed Python functions; all agents can call them.
        roles: sub-agents declared by the app, next to those that the model creates.
        instructions: the orchestrator's system prompt.
        budget: limits of each episode.
        total_budget: limits of all episodes of this swarm together; ``wall_s`` counts from now.
        price: of the model's tokens, for ``cost_usd``; roles may have their own.
        limits: bounds of single agents and calls: tool seconds, characters that a model sees.
        sampling: how turns are drawn; the default depends on the model.
        max_parallel: sub-agents alive at one time in an episode; more wait their turn.
        subagent_model: what the sub-agents that the orchestrator creates run on; its own model
            unless given. Frozen sub-agents of training are this (report, section 3.1).
        can_spawn: whether the orchestrator may create sub-agents and assign tasks.
        fail_fast: end an episode with its first sub-agent that ends without a report; by default
            the orchestrator reads why, and the siblings go on.
        hooks: code around model calls, tool calls, spawns and joins; the first is the outermost.
        context: what to do when a context grows too long; an overflow ends the agent without it.
        runs: the run directory, where the ledger lies.
        durable: commits survive a power failure; slower, for each waits for the disk.
        seed: makes every turn's randomness repeatable.
        api_key: for servers that ask for one.
        tracer_provider: where spans go; the global OpenTelemetry provider unless given.

    Raises:
        ConfigError: a setting is wrong; nothing has been started then.
    """

    def __init__(
        self,
        model: str | Model = "nano",
        *,
        tools: Sequence[Tool | Callable[..., Any]] = (),
        roles: Sequence[Role] = (),
        instructions: str = prompts.MAIN,
        budget: Budget | None = None,
        total_budget: Budget | None = None,
        price: Price | None = None,
        limits: Limits | None = None,
        sampling: Sampling | None = None,
        max_parallel: int = 100,
        subagent_model: str | Model | None = None,
        can_spawn: bool = True,
        fail_fast: bool = False,
        hooks: Sequence[Hooks] = (),
        context: ContextStrategy | None = None,
        runs: Path | str = ".swarm",
        durable: bool = False,
        seed: int | None = None,
        api_key: str | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        for given in (model, subagent_model, *(role.model for role in roles)):
            if isinstance(given, str):
                check_model_string(given)
        if max_parallel < 1:
            raise ConfigError(f"max_parallel must be at least 1, got {max_parallel}")
        names = [role.name for role in roles]
        doubles = sorted({name for name in names if names.count(name) > 1})
        if doubles:
            raise ConfigError(f"two roles are named '{doubles[0]}'; rename one of them")
        self._model = model
        self._tools = _as_tools(tools)
        self._roles = tuple(roles)
        self._role_tools = [
            self._tools if role.tools is None else _as_tools(role.tools) for role in roles
        ]
        self._role_outputs = [_adapter(role.output_type) for role in roles]
        self._instructions = _with_roles(instructions, roles)
        self._budget = budget or Budget()
        self._total = Scope(total_budget, name="swarm's") if total_budget is not None else None
        self._price = price
        self._check_prices(total_budget)
        self._limits = replace(limits or Limits(), max_parallel=max_parallel)
        self._sampling = sampling or default_sampling(model)
        self._subagent_model = subagent_model
        self._can_spawn = can_spawn
        self._fail_fast = fail_fast
        self._hooks = tuple(hooks)
        self._context = context
        self._runs = Path(runs)
        self._durable = durable
        self._seed = seed
        self._api_key = api_key
        self.tracer: trace.Tracer = trace.get_tracer(TRACER_NAME, tracer_provider=tracer_provider)
        self._opened: dict[str, Model] = {}
        self._ledger: Ledger | None = None

    async def __aenter__(self) -> Swarm:
        """Open the model, so that the first task does not wait for it."""
        self._resolve(self._model)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close what the swarm opened."""
        await self.aclose()

    @overload
    async def run(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = ...,
        output_type: None = ...,
        deps: Any = ...,
        on_event: Callable[[Event], None] | None = ...,
        launch: Mapping[str, Any] | None = ...,
    ) -> Result[None]: ...

    @overload
    async def run(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = ...,
        output_type: type[ParsedT],
        deps: Any = ...,
        on_event: Callable[[Event], None] | None = ...,
        launch: Mapping[str, Any] | None = ...,
    ) -> Result[ParsedT]: ...

    async def run(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = (),
        output_type: type[Any] | None = None,
        deps: Any = None,
        on_event: Callable[[Event], None] | None = None,
        launch: Mapping[str, Any] | None = None,
    ) -> Result[Any]:
        """Run one task to its end.

        Args:
            task: what to do.
            files: pictures (paths or ``Image``) that tools find under their names.
            output_type: what the final message must be, as JSON: a pydantic model or any type
                that pydantic knows. ``Result.parsed`` holds it.
            deps: what tools and hooks get with each call (``RunContext.deps``).
            on_event: called with every event of the whole tree, in order.
            launch: JSON that is kept with the record, for who resumes it.

        Raises:
            ConfigError: the task or a file is wrong, or the model cannot be opened.
            LedgerError: the record cannot be written.
        """
        made = make_task(task, files)
        settings = self.settings(output_type=output_type, deps=deps, launch=launch)
        return await run_episode(made, settings, self.open_ledger(), self.tracer, on_event)

    @overload
    def run_sync(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = ...,
        output_type: None = ...,
        deps: Any = ...,
        on_event: Callable[[Event], None] | None = ...,
    ) -> Result[None]: ...

    @overload
    def run_sync(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = ...,
        output_type: type[ParsedT],
        deps: Any = ...,
        on_event: Callable[[Event], None] | None = ...,
    ) -> Result[ParsedT]: ...

    def run_sync(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = (),
        output_type: type[Any] | None = None,
        deps: Any = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Result[Any]:
        """As ``run``, for scripts: runs an event loop of its own and closes the swarm after it."""

        async def run_and_close() -> Result[Any]:
            try:
                return await self.run(
                    task, files=files, output_type=output_type, deps=deps, on_event=on_event
                )
            finally:
                await self.aclose()

        return anyio.run(run_and_close)

    async def run_stream(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = (),
        output_type: type[Any] | None = None,
        deps: Any = None,
    ) -> AsyncIterator[Event | Result[Any]]:
        """As ``run``, but yields the events of the whole tree and then the result.

        A consumer that is slow never slows the episode down: when it is ``MAX_WAITING_EVENTS``
        behind, the oldest events are dropped and ``EventsDropped`` tells how many. Leaving the
        iterator early (``aclosing`` makes that prompt) cancels the episode.
        """
        waiting: deque[Event | Result[Any]] = deque()
        has_news = asyncio.Event()
        num_dropped = 0

        def put(event: Event | Result[Any]) -> None:
            nonlocal num_dropped
            if len(waiting) >= MAX_WAITING_EVENTS:
                waiting.popleft()
                num_dropped += 1
            waiting.append(event)
            has_news.set()

        def next_event() -> Event | Result[Any] | None:
            nonlocal num_dropped
            if num_dropped:
                count, num_dropped = num_dropped, 0
                return EventsDropped(count=count)
            return waiting.popleft() if waiting else None

        async def produce() -> None:
            put(await self.run(task, files=files, output_type=output_type, deps=deps, on_event=put))

        told: AsyncGenerator[Event | Result[Any], None] = stream(
            produce, next_event, has_news, "run_stream"
        )
        async with aclosing(told):
            async for event in told:
                yield event

    async def resume(
        self,
        episode_id: str,
        *,
        output_type: type[Any] | None = None,
        deps: Any = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> Result[Any]:
        """Go on with an episode of ``runs`` that was killed or cancelled, from its last commit.

        The swarm must be made as for the first run. No turn on record is asked for again, and no
        tool call with a result on record runs again; a call that may have been running is made
        again with ``RunContext.is_retry``.

        Raises:
            ConfigError: the episode has ended, or the swarm is not that of its first run.
            EpisodeBusy: another process runs it.
            LedgerError: there is no such episode, or the record cannot be read or written.
        """
        settings = self.settings(output_type=output_type, deps=deps)
        return await resume_episode(episode_id, settings, self.open_ledger(), self.tracer, on_event)

    def rollouts(self, *, max_episodes: int = 256) -> RolloutManager:
        """A manager that runs this swarm on the tasks of environments, for evals and training.

        Raises:
            ConfigError: ``max_episodes`` is below 1, or the model cannot be opened.
            LedgerError: the ledger cannot be opened.
        """
        return RolloutManager(
            self.settings(), self.open_ledger(), self.tracer, max_episodes=max_episodes
        )

    async def aclose(self) -> None:
        """Close the ledger and the models that the swarm opened; ``run`` opens them again."""
        opened, self._opened = self._opened, {}
        for model in opened.values():
            await model.aclose()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def open_ledger(self) -> Ledger:
        """The ledger of ``runs``, opened with the first use.

        Raises:
            LedgerError: it cannot be opened.
        """
        if self._ledger is None:
            self._ledger = Ledger(self._runs, durable=self._durable)
        return self._ledger

    def settings(
        self,
        *,
        output_type: type[Any] | None = None,
        deps: Any = None,
        gate: Gate | None = None,
        launch: Mapping[str, Any] | None = None,
    ) -> EpisodeSettings:
        """What the runtime needs to run episodes of this swarm; opens the models.

        Raises:
            ConfigError: a model cannot be opened, or ``output_type`` has no JSON schema.
        """
        model = self._resolve(self._model)
        price = self._price or FREE
        return EpisodeSettings(
            model=model,
            instructions=self._instructions,
            tools=self._tools,
            declared={
                role.name: SubagentConfig(
                    name=role.name,
                    instructions=role.instructions,
                    model=self._resolve(role.model) if role.model is not None else model,
                    tools=tools,
                    sampling=self._sampling,
                    max_steps=self._budget.sub_steps,
                    price=role.price or price,
                    budget=role.budget,
                    output=output,
                )
                for role, tools, output in zip(
                    self._roles, self._role_tools, self._role_outputs, strict=True
                )
            },
            sampling=self._sampling,
            budget=self._budget,
            outer=self._total,
            limits=self._limits,
            price=price,
            can_spawn=self._can_spawn,
            subagent_model=None
            if self._subagent_model is None
            else self._resolve(self._subagent_model),
            seed=self._seed,
            hooks=self._hooks,
            context=self._context,
            fail_fast=self._fail_fast,
            output=_adapter(output_type),
            deps=deps,
            gate=gate or Gate(),
            launch=launch or {},
        )

    def _resolve(self, model: str | Model) -> Model:
        if not isinstance(model, str):
            return model
        if model not in self._opened:
            self._opened[model] = open_model(model, api_key=self._api_key)
        return self._opened[model]

    def _check_prices(self, total_budget: Budget | None) -> None:
        budgets = [self._budget, total_budget, *(role.budget for role in self._roles)]
        if self._price is None and any(b is not None and b.cost_usd is not None for b in budgets):
            raise ConfigError(
                "a budget limits cost_usd, but no price is given; pass price=Price(…)"
            )


def _as_tools(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    return check_names([tool if _is_tool(tool) else FunctionTool(tool) for tool in tools])


def _is_tool(tool: Tool | Callable[..., Any]) -> TypeGuard[Tool]:
    return hasattr(tool, "spec")


def _adapter(output_type: type[Any] | None) -> TypeAdapter[Any] | None:
    if output_type is None:
        return None
    try:
        adapter = TypeAdapter(output_type)
        adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError) as error:
        raise ConfigError(
            f"a model cannot answer with a {output_type!r}: {error.message}; use a pydantic model"
        ) from error
    return adapter


def _with_roles(instructions: str, roles: Sequence[Role]) -> str:
    """The system prompt, followed by the sub-agents that stand ready."""
    if not roles:
        return instructions
    lines = [f"- {role.name}: {role.description or role.instructions}" for role in roles]
    return "\n".join([instructions, "", "Sub-agents that stand ready for assign_task:", *lines])
