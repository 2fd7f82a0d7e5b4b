"""One task from its prompt to its result.

begin_episode ─> run_agent(main) ─> end_episode ─> Result
                    └─ create_subagent / assign_task ─> run_agent(main/NAME.K) …
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
from opentelemetry import trace

from swarm_sdk.errors import BudgetExceeded, ConfigError, LedgerError
from swarm_sdk.runtime.agent_loop import (
    AgentOutcome,
    AgentSpec,
    AgentStatus,
    EpisodeState,
    run_agent,
)
from swarm_sdk.runtime.budget import AgentMeter, Budget, BudgetMeter
from swarm_sdk.runtime.events import Emit
from swarm_sdk.runtime.spawn import Spawner, SubagentConfig
from swarm_sdk.runtime.stage_graph import StageGraph
from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.traces.record import media_of, now_ns
from swarm_sdk.types import Model, Sampling, Task, Tool, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRef:
    """Where an episode is on record: ``swarm trace show EPISODE --runs DIRECTORY``."""

    directory: Path
    episode_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What an episode gives back, however it ended."""

    output: str
    """The orchestrator's final message; its last words where ``status`` is not ``done``."""
    status: AgentStatus
    error: str | None
    """Why ``status`` is not ``done``."""
    critical_steps: int
    """Longest chain of steps (report, section 3.2)."""
    total_steps: int
    usage: Usage
    wall_s: float
    max_parallel: int
    """The most sub-agents that were alive at one time."""
    created: tuple[str, ...]
    """Names of the sub-agents that the model created."""
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
    declared: Mapping[str, SubagentConfig]
    """Roles that the app declared."""
    sampling: Sampling
    budget: Budget
    max_parallel: int
    """Sub-agents alive at one time; more wait their turn."""
    can_spawn: bool
    seed: int | None


async def run_episode(
    task: Task, settings: EpisodeSettings, ledger: Ledger, tracer: trace.Tracer, emit: Emit
) -> Result:
    """Run one task; everything that happens is on record when this returns.

    Raises:
        ConfigError: the task is empty or two of its files share a name.
        LedgerError: the record cannot be written.
    """
    _check_task(task)
    started_ns, started_s = now_ns(), time.perf_counter()
    alive = _AliveCounter(emit)
    state = EpisodeState(
        episode_id=f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}",
        ledger=ledger,
        tracer=tracer,
        meter=BudgetMeter(settings.budget),
        graph=StageGraph(),
        emit=alive,
        seed=settings.seed,
    )
    meter = AgentMeter(settings.budget.main_steps)
    spawner = Spawner(
        state,
        parent_path="main",
        parent_meter=meter,
        declared=settings.declared,
        invent=lambda name, system_prompt: SubagentConfig(
            name=name,
            instructions=system_prompt,
            model=settings.model,
            tools=settings.tools,
            sampling=settings.sampling,
            max_steps=settings.budget.sub_steps,
        ),
        files=task.files,
        slots=anyio.CapacityLimiter(settings.max_parallel),
    )
    tools = dict(settings.tools)
    if settings.can_spawn:
        tools |= {tool.spec.name: tool for tool in spawner.tools}
    spec = AgentSpec(
        path="main",
        name="main",
        instructions=settings.instructions,
        prompt=_prompt(task),
        model=settings.model,
        tools=tools,
        sampling=settings.sampling,
        meter=meter,
        files=task.files,
    )
    ledger.put_media(task.files)
    ledger.begin_episode(
        EpisodeRecord(
            id=state.episode_id,
            task={"prompt": task.prompt, "files": media_of(task.files)},
            model=settings.model.name,
            settings={
                "instructions": settings.instructions,
                "tools": sorted(tools),
                "roles": sorted(settings.declared),
                "seed": settings.seed,
                "max_parallel": settings.max_parallel,
            },
            started_ns=started_ns,
        )
    )
    outcome: AgentOutcome | None = None
    try:
        outcome = await _run_within_wall_time(state, spec)
    except* LedgerError as failures:
        raise _first(failures) from failures
    finally:
        outcome = outcome or state.outcomes.get("main") or _unstarted(spec)
        result = Result(
            output=outcome.output,
            status=outcome.status,
            error=outcome.error,
            critical_steps=state.graph.critical_steps(),
            total_steps=state.graph.total_steps,
            usage=state.usage,
            wall_s=time.perf_counter() - started_s,
            max_parallel=alive.most,
            created=tuple(spawner.created),
            agents=(outcome, *(a for p, a in state.outcomes.items() if p != "main")),
            episode_id=state.episode_id,
            trace=TraceRef(directory=ledger.directory, episode_id=state.episode_id),
        )
        ledger.end_episode(
            state.episode_id,
            status=result.status,
            output=result.output,
            summary=summary(result),
            ended_ns=now_ns(),
        )
    return result


def summary(result: Result) -> dict[str, Any]:
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
        "error": result.error,
    }


async def _run_within_wall_time(state: EpisodeState, spec: AgentSpec) -> AgentOutcome:
    wall_s = state.meter.budget.wall_s
    attributes = {
        schema.OPERATION: schema.INVOKE_WORKFLOW,
        schema.EPISODE_ID: state.episode_id,
        schema.REQUEST_MODEL: spec.model.name,
    }
    name = f"{schema.INVOKE_WORKFLOW} swarm"
    with state.tracer.start_as_current_span(name, attributes=attributes) as span:
        with anyio.move_on_after(wall_s) as scope:
            await run_agent(state, spec)
        outcome = state.outcomes.get("main") or _unstarted(spec)
        if scope.cancelled_caught:
            exceeded = BudgetExceeded("seconds", used=wall_s or 0, allowed=wall_s or 0)
            outcome = replace(outcome, status="out_of_budget", error=str(exceeded))
            state.ledger.end_agent(
                state.episode_id,
                "main",
                status=outcome.status,
                output=outcome.output,
                ended_ns=now_ns(),
            )
        span.set_attribute(schema.CRITICAL_STEPS, state.graph.critical_steps())
        span.set_attribute(schema.TOTAL_STEPS, state.graph.total_steps)
        span.set_attribute(schema.AGENT_STATUS, outcome.status)
    return outcome


def _first(failures: BaseExceptionGroup[LedgerError]) -> LedgerError:
    """One of several failures of the record: they all say the same."""
    first = failures.exceptions[0]
    return _first(first) if isinstance(first, BaseExceptionGroup) else first


def _unstarted(spec: AgentSpec) -> AgentOutcome:
    return AgentOutcome(
        path=spec.path, name=spec.name, status="cancelled", output="", error="it never started"
    )


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


class _AliveCounter:
    """Passes events on and counts how many sub-agents live at one time."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._alive: set[str] = set()
        self.most = 0

    def __call__(self, event: Any) -> None:
        kind = type(event).__name__
        if kind == "AgentStarted" and event.path != "main":
            self._alive.add(event.path)
            self.most = max(self.most, len(self._alive))
        elif kind == "AgentFinished":
            self._alive.discard(event.path)
        self._emit(event)


def result_to_json(result: Result) -> dict[str, Any]:
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
        if name in by_name or name in ("create_subagent", "assign_task"):
            raise ConfigError(f"two tools are named '{name}'; rename one of them")
        try:
            json.dumps(tool.spec.parameters)
        except TypeError as error:
            raise ConfigError(f"the schema of tool '{name}' is not JSON: {error}") from error
        by_name[name] = tool
    return by_name
