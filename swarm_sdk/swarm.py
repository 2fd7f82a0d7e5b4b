"""``Swarm``: a model, tools and roles; a task in, a result with its cost and its trace out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import anyio
from opentelemetry import trace

from swarm_sdk import prompts
from swarm_sdk.config import (
    Role,
    check_model_string,
    default_sampling,
    make_task,
    open_model,
)
from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.runtime.episode import EpisodeSettings, Result, check_names, run_episode
from swarm_sdk.runtime.events import Event
from swarm_sdk.runtime.spawn import SubagentConfig
from swarm_sdk.tools.function import FunctionTool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.schema import TRACER_NAME
from swarm_sdk.types import Image, Model, Sampling, Task, Tool

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider


class Swarm:
    """An orchestrator that may create sub-agents, and what they can do.

    Args:
        model: ``"nano"``, ``"path:DIRECTORY"``, ``"sglang:http://host:port"``,
            ``"openai:http://host/v1#model"`` or a ``Model``.
        tools: ``Tool`` objects or typed Python functions; all agents can call them.
        roles: sub-agents declared by the app, next to those that the model creates.
        instructions: the orchestrator's system prompt.
        budget: limits of each episode.
        sampling: how turns are drawn; the default depends on the model.
        max_parallel: sub-agents alive at one time in an episode; more wait their turn.
        can_spawn: whether the orchestrator may create sub-agents and assign tasks.
        runs: the run directory, where the ledger lies.
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
        sampling: Sampling | None = None,
        max_parallel: int = 100,
        can_spawn: bool = True,
        runs: Path | str = ".swarm",
        seed: int | None = None,
        api_key: str | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        for given in (model, *(role.model for role in roles)):
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
        self._instructions = _with_roles(instructions, roles)
        self._budget = budget or Budget()
        self._sampling = sampling or default_sampling(model)
        self._max_parallel = max_parallel
        self._can_spawn = can_spawn
        self._runs = Path(runs)
        self._seed = seed
        self._api_key = api_key
        self._tracer = trace.get_tracer(TRACER_NAME, tracer_provider=tracer_provider)
        self._opened: dict[str, Model] = {}
        self._ledger: Ledger | None = None

    async def __aenter__(self) -> Swarm:
        """Open the model, so that the first task does not wait for it."""
        self._resolve(self._model)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Close what the swarm opened."""
        await self.aclose()

    async def run(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> Result:
        """Run one task to its end.

        Args:
            task: what to do.
            files: pictures (paths or ``Image``) that tools find under their names.
            on_event: called with every event of the whole tree, in order.

        Raises:
            ConfigError: the task or a file is wrong, or the model cannot be opened.
            LedgerError: the record cannot be written.
        """
        made = make_task(task, files)
        settings = self._settings()
        if self._ledger is None:
            self._ledger = Ledger(self._runs)
        return await run_episode(
            made, settings, self._ledger, self._tracer, on_event or (lambda _: None)
        )

    def run_sync(
        self,
        task: str | Task,
        *,
        files: Sequence[Image | Path | str] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> Result:
        """As ``run``, for scripts: runs an event loop of its own and closes the swarm after it."""

        async def run_and_close() -> Result:
            try:
                return await self.run(task, files=files, on_event=on_event)
            finally:
                await self.aclose()

        return anyio.run(run_and_close)

    async def run_stream(
        self, task: str | Task, *, files: Sequence[Image | Path | str] = ()
    ) -> AsyncIterator[Event | Result]:
        """As ``run``, but yields the events of the whole tree and then the result.

        Leaving the iterator early (``aclosing`` makes that prompt) cancels the episode.
        """
        send, receive = anyio.create_memory_object_stream[Event | Result](float("inf"))

        async def produce() -> None:
            with send:
                send.send_nowait(await self.run(task, files=files, on_event=send.send_nowait))

        async with anyio.create_task_group() as group:
            group.start_soon(produce, name="run_stream")
            with receive:
                async for event in receive:
                    yield event

    async def aclose(self) -> None:
        """Close the ledger and the models that the swarm opened; ``run`` opens them again."""
        opened, self._opened = self._opened, {}
        for model in opened.values():
            await model.aclose()
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None

    def _resolve(self, model: str | Model) -> Model:
        if not isinstance(model, str):
            return model
        if model not in self._opened:
            self._opened[model] = open_model(model, api_key=self._api_key)
        return self._opened[model]

    def _settings(self) -> EpisodeSettings:
        model = self._resolve(self._model)
        declared = {
            role.name: SubagentConfig(
                name=role.name,
                instructions=role.instructions,
                model=self._resolve(role.model) if role.model is not None else model,
                tools=self._tools if role.tools is None else _as_tools(role.tools),
                sampling=self._sampling,
                max_steps=self._role_steps(role),
            )
            for role in self._roles
        }
        return EpisodeSettings(
            model=model,
            instructions=self._instructions,
            tools=self._tools,
            declared=declared,
            sampling=self._sampling,
            budget=self._budget,
            max_parallel=self._max_parallel,
            can_spawn=self._can_spawn,
            seed=self._seed,
        )

    def _role_steps(self, role: Role) -> int:
        if role.budget is None or role.budget.steps is None:
            return self._budget.sub_steps
        return role.budget.steps


def _as_tools(tools: Sequence[Tool | Callable[..., Any]]) -> dict[str, Tool]:
    return check_names([tool if _is_tool(tool) else FunctionTool(tool) for tool in tools])


def _is_tool(tool: Tool | Callable[..., Any]) -> TypeGuard[Tool]:
    return hasattr(tool, "spec")


def _with_roles(instructions: str, roles: Sequence[Role]) -> str:
    """The system prompt, followed by the sub-agents that stand ready."""
    if not roles:
        return instructions
    lines = [f"- {role.name}: {role.description or role.instructions}" for role in roles]
    return "\n".join([instructions, "", "Sub-agents that stand ready for assign_task:", *lines])
