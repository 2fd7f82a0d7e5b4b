"""One task from its prompt to its result.

begin_episode ─> run_agent(main) ─> end_episode ─> Result
                    └─ create_subagent / assign_task ─> run_agent(main/NAME.K) …

``resume_episode`` takes the same way with the record of an earlier process (``replay.py``).
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic

import anyio
from opentelemetry import trace
from pydantic import TypeAdapter
from typing_extensions import TypeVar

from swarm_sdk.errors import BudgetExceeded, ConfigError, SubagentError
from swarm_sdk.runtime.agent_loop import run_agent
from swarm_sdk.runtime.budget import FREE, AgentMeter, Budget, Scope
from swarm_sdk.runtime.collector import relaxed_collector
from swarm_sdk.runtime.context import ContextStrategy
from swarm_sdk.runtime.events import Emit
from swarm_sdk.runtime.hooks import Hooks
from swarm_sdk.runtime.places import Places
from swarm_sdk.runtime.replay import Replay, ReplayMismatch, read_replay
from swarm_sdk.runtime.spawn import NAMES, Family, Spawner, SubagentConfig
from swarm_sdk.runtime.state import (
    AgentOutcome,
    AgentSpec,
    AgentStatus,
    EpisodeState,
    Gate,
    Limits,
    unstarted,
)
from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.traces.record import media_of, now_ns
from swarm_sdk.traces.spans import EpisodeSpans
from swarm_sdk.types import Model, Price, Sampling, Task, Tool, Usage

OutputT = TypeVar("OutputT", default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRef:
    """Where an episode is on record: ``swarm trace show EPISODE --runs DIRECTORY``."""

    directory: Path
    episode_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Generic[OutputT]):
    """What an episode gives back, however it ended."""

    output: str
    """The orchestrator's final message; its last words where ``status`` is not ``done``, or the
    reports of its sub-agents where it said nothing."""
    parsed: OutputT | None
    """The final message as ``output_type``; ``None`` without one, or if it does not fit."""
    status: AgentStatus
    error: str | None
    """Why ``status`` is not ``done``."""
    critical_steps: int
    """Longest chain of steps (report, section 3.2)."""
    total_steps: int
    usage: Usage
    cost_usd: float
    """At the prices given to the swarm."""
    wall_s: float
    """Of this process; earlier ones of a resumed episode are not counted."""
    max_parallel: int
    """The most sub-agents that were alive at one time."""
    created: tuple[str, ...]
    """Names of the sub-agents that the orchestrator created."""
    agents: tuple[AgentOutcome, ...]
    """Every agent that ran, the orchestrator first."""
    episode_id: str
    trace: TraceRef

    @property
    def subagents(self) -> tuple[AgentOutcome, ...]:
        """The sub-agents that ran."""
        return tuple(agent for agent in self.agents if agent.path != "main")

    @property
    def num_failed(self) -> int:
        """Sub-agents that ended without a final message."""
        return sum(agent.status != "done" for agent in self.subagents)


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeSettings:
    """How episodes are run."""

    model: Model
    instructions: str
    tools: Mapping[str, Tool]
    sampling: Sampling
    declared: Mapping[str, SubagentConfig] = field(default_factory=dict)
    """Roles that the app declared."""
    budget: Budget = field(default_factory=Budget)
    outer: Scope | None = None
    """The scope around all episodes: the swarm's own budget."""
    limits: Limits = field(default_factory=Limits)
    price: Price = FREE
    can_spawn: bool = True
    subagent_model: Model | None = None
    """What sub-agents that the orchestrator creates run on; ``None`` is ``model``."""
    seed: int | None = None
    hooks: Sequence[Hooks] = ()
    context: ContextStrategy | None = None
    fail_fast: bool = False
    output: TypeAdapter[Any] | None = None
    """What the final message must parse as."""
    deps: Any = None
    gate: Gate = field(default_factory=Gate)
    launch: Mapping[str, Any] = field(default_factory=dict)
    """Kept with the record: what the command line needs to resume."""


async def run_episode(
    task: Task,
    settings: EpisodeSettings,
    ledger: Ledger,
    tracer: trace.Tracer,
    emit: Emit | None = None,
) -> Result[Any]:
    """Run one task; everything that happened is committed when this returns.

    Raises:
        ConfigError: the task is empty or two of its files share a name.
        LedgerError: the record cannot be written.
    """
    _check_task(task)
    episode_id = f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
    ledger.put_media(task.files)
    ledger.begin_episode(
        EpisodeRecord(
            id=episode_id,
            task={"prompt": task.prompt, "files": media_of(task.files)},
            model=settings.model.name,
            settings={
                "instructions": settings.instructions,
                "tools": sorted(settings.tools),
                "roles": sorted(settings.declared),
                "seed": settings.seed,
                "can_spawn": settings.can_spawn,
                "sampling": {
                    "temperature": settings.sampling.temperature,
                    "top_p": settings.sampling.top_p,
                },
                "max_parallel": settings.limits.max_parallel,
                "launch": dict(settings.launch),
            },
            started_ns=now_ns(),
        )
    )
    return await _Episode(episode_id, task, settings, ledger, tracer, emit, None).run()


async def resume_episode(
    episode_id: str,
    settings: EpisodeSettings,
    ledger: Ledger,
    tracer: trace.Tracer,
    emit: Emit | None = None,
) -> Result[Any]:
    """Go on with an episode that was killed or cancelled, from its last commit.

    No turn on record is asked for again and no tool call with a result on record runs again. A
    call that may have been running is made again with ``RunContext.is_retry``.

    Raises:
        ConfigError: the episode has ended, or the settings are not those of its first run.
        EpisodeBusy: another process runs it.
        LedgerError: there is no such episode, or the record cannot be read or written.
    """
    episode_id = ledger.episode(episode_id).id
    ledger.claim(episode_id)
    try:
        replay = read_replay(ledger, episode_id)
        record = replay.episode
        for what, now, then in (
            ("model", settings.model.name, record.model),
            ("tools", sorted(settings.tools), record.settings["tools"]),
            ("roles", sorted(settings.declared), record.settings["roles"]),
            ("seed", settings.seed, record.settings["seed"]),
        ):
            if now != then:
                raise ConfigError(
                    f"episode {episode_id} was run with {what} {then!r} and cannot go on with "
                    f"{now!r}; resume it with the settings of its first run"
                )
        files = tuple(ledger.media(*image) for image in record.task["files"])
        task = Task(record.task["prompt"], files)
    except BaseException:
        ledger.release(episode_id)
        raise
    return await _Episode(episode_id, task, settings, ledger, tracer, emit, replay).run()


class _Episode:
    """One run of an episode, from the first agent to the result."""

    def __init__(
        self,
        episode_id: str,
        task: Task,
        settings: EpisodeSettings,
        ledger: Ledger,
        tracer: trace.Tracer,
        emit: Emit | None,
        replay: Replay | None,
    ) -> None:
        self.settings = settings
        self.tracer = tracer
        scope = Scope(settings.budget, settings.outer)
        self.state = EpisodeState(
            episode_id=episode_id,
            ledger=ledger,
            spans=EpisodeSpans(tracer, trace.INVALID_SPAN),
            scope=scope,
            limits=settings.limits,
            emit=emit,
            seed=settings.seed,
            gate=settings.gate,
            hooks=settings.hooks,
            context=settings.context,
            deps=settings.deps,
            files=task.files,
            fail_fast=settings.fail_fast,
            replay=replay,
        )
        if replay is not None:
            _preload(scope, replay, settings)
        if settings.outer is not None:
            settings.outer.episodes.add(episode_id)
        meter = AgentMeter(scope, settings.budget.main_steps, price=settings.price)
        num_levels = settings.budget.depth if settings.can_spawn else 0
        family = Family(
            state=self.state,
            declared=settings.declared,
            invent=self._invent,
            slots=[Places(settings.limits.max_parallel) for _ in range(num_levels)],
        )
        self.spawner = Spawner(family, "main", "main", meter)
        tools = dict(settings.tools)
        if num_levels:
            tools |= {tool.spec.name: tool for tool in self.spawner.tools}
        self.spec = AgentSpec(
            path="main",
            name="main",
            instructions=settings.instructions,
            prompt=_prompt(task),
            model=settings.model,
            tools=tools,
            sampling=settings.sampling,
            meter=meter,
            output=settings.output,
        )

    def _invent(self, name: str, system_prompt: str) -> SubagentConfig:
        settings = self.settings
        return SubagentConfig(
            name=name,
            instructions=system_prompt,
            model=settings.subagent_model or settings.model,
            tools=settings.tools,
            sampling=settings.sampling,
            max_steps=settings.budget.sub_steps,
            price=settings.price,
        )

    async def run(self) -> Result[Any]:
        """Run the orchestrator; the record tells how the episode ended, whatever happens."""
        state, started_s = self.state, time.perf_counter()
        try:
            with relaxed_collector():
                await self._run_within_wall_time()
        except ReplayMismatch:
            state.ledger.release(state.episode_id)
            raise
        except BaseException:
            self._end(started_s)
            raise
        finally:
            state.deadlines.close()
        return self._end(started_s)

    def _end(self, started_s: float) -> Result[Any]:
        """The result, recorded."""
        state = self.state
        outcome = state.outcomes.get("main") or unstarted("main")
        order = dict.fromkeys([*state.graph.lengths, *state.outcomes])
        others = tuple(state.outcomes[p] for p in order if p in state.outcomes and p != "main")
        result: Result[Any] = Result(
            output=outcome.output or _reports(others),
            parsed=outcome.parsed,
            status=outcome.status,
            error=outcome.error,
            critical_steps=state.graph.critical_steps(),
            total_steps=state.graph.total_steps,
            usage=state.usage,
            cost_usd=state.scope.cost_usd,
            wall_s=time.perf_counter() - started_s,
            max_parallel=state.max_alive,
            created=tuple(self.spawner.created),
            agents=(outcome, *others),
            episode_id=state.episode_id,
            trace=TraceRef(directory=state.ledger.directory, episode_id=state.episode_id),
        )
        state.ledger.end_episode(
            state.episode_id,
            status=result.status,
            output=result.output,
            error=result.error,
            summary=summary(result),
            ended_ns=now_ns(),
        )
        return result

    async def _run_within_wall_time(self) -> None:
        state = self.state
        attributes = {
            schema.OPERATION: schema.INVOKE_WORKFLOW,
            schema.EPISODE_ID: state.episode_id,
            schema.REQUEST_MODEL: self.spec.model.name,
        }
        name = f"{schema.INVOKE_WORKFLOW} swarm"
        with self.tracer.start_as_current_span(name, attributes=attributes) as span:
            state.spans = EpisodeSpans(self.tracer, span)
            with anyio.move_on_after(state.scope.remaining_s()) as limit:
                await _run_agent(state, self.spec)
            if limit.cancelled_caught:
                allowed = min(
                    s.budget.wall_s for s in state.scope.scopes if s.budget.wall_s is not None
                )
                state.out_of_time("main", BudgetExceeded("seconds", used=allowed, allowed=allowed))
            if span.is_recording():
                span.set_attribute(schema.CRITICAL_STEPS, state.graph.critical_steps())
                span.set_attribute(schema.TOTAL_STEPS, state.graph.total_steps)
                outcome = state.outcomes.get("main") or unstarted("main")
                span.set_attribute(schema.AGENT_STATUS, outcome.status)


async def _run_agent(state: EpisodeState, spec: AgentSpec) -> None:
    """Run the orchestrator; with ``fail_fast`` a lost sub-agent is in its outcome already."""
    try:
        await run_agent(state, spec)
    except SubagentError:
        return


def _preload(scope: Scope, replay: Replay, settings: EpisodeSettings) -> None:
    """Count what the record tells in the episode's budget and in those around it."""
    prices = {config.name: config.price for config in settings.declared.values()}
    usd, total, steps = 0.0, Usage(), 0
    for agent in replay.agents.values():
        total += agent.usage
        usd += prices.get(agent.record.name, settings.price).of(agent.usage)
        steps += len(agent.turns)
    num_subagents = sum(path != "main" for path in replay.agents)
    for each in scope.scopes:
        if replay.episode.id in each.episodes:
            continue  # it ran in this process before, and was counted then
        each.preload(
            steps=steps,
            usage=total,
            usd=usd,
            agents=num_subagents,
            wall_s=replay.wall_s if each is scope else 0.0,
        )


def _reports(agents: Sequence[AgentOutcome]) -> str:
    """The best partial answer of an orchestrator that said nothing: what it was told."""
    return "\n\n".join(f"{a.path}: {a.output}" for a in agents if a.status == "done" and a.output)


def summary(result: Result[Any]) -> dict[str, Any]:
    """The figures of a result, JSON-ready."""
    return {
        "critical_steps": result.critical_steps,
        "total_steps": result.total_steps,
        "subagents": len(result.subagents),
        "subagents_failed": result.num_failed,
        "max_parallel": result.max_parallel,
        "created": list(result.created),
        "wall_s": round(result.wall_s, 3),
        "calls": result.usage.num_calls,
        "prompt_tokens": result.usage.num_prompt_tokens,
        "cached_tokens": result.usage.num_cached_tokens,
        "completion_tokens": result.usage.num_completion_tokens,
        "cost_usd": round(result.cost_usd, 6),
        "error": result.error,
    }


def _check_task(task: Task) -> None:
    if not task.prompt.strip():
        raise ConfigError("the task is empty; say what the swarm should do")
    names = [image.name for image in task.files]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ConfigError(f"two files of the task are named {', '.join(doubles)}; rename one")


def _prompt(task: Task) -> str:
    """The user's message: the task, and the names under which tools find its files."""
    if not task.files:
        return task.prompt
    return f"{task.prompt}\n\nFiles: {', '.join(image.name for image in task.files)}"


def result_to_json(result: Result[Any]) -> dict[str, Any]:
    """A result as one JSON object: what ``--json`` prints."""
    return {
        "output": result.output,
        "status": result.status,
        "episode_id": result.episode_id,
        "trace": str(result.trace.directory),
        **summary(result),
        "agents": [
            {
                "path": agent.path,
                "status": agent.status,
                "steps": agent.steps,
                "critical_steps": agent.critical_steps,
                "completion_tokens": agent.usage.num_completion_tokens,
                "error": agent.error,
            }
            for agent in result.agents
        ],
    }


def check_names(tools: Sequence[Tool]) -> dict[str, Tool]:
    """Tools by name.

    Raises:
        ConfigError: two tools share a name, or one takes a name of the orchestrator's own tools.
    """
    by_name: dict[str, Tool] = {}
    for tool in tools:
        name = tool.spec.name
        if name in by_name or name in NAMES:
            raise ConfigError(f"two tools are named '{name}'; rename one of them")
        try:
            json.dumps(tool.spec.parameters)
        except TypeError as error:
            raise ConfigError(f"the schema of tool '{name}' is not JSON: {error}") from error
        by_name[name] = tool
    return by_name
