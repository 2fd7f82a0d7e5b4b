"""What the agents of one episode share, and how each of them ends."""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import anyio
from pydantic import TypeAdapter

from swarm_sdk.errors import BudgetExceeded
from swarm_sdk.runtime.budget import AgentMeter, Scope
from swarm_sdk.runtime.context import ContextStrategy
from swarm_sdk.runtime.deadlines import Deadlines
from swarm_sdk.runtime.events import Emit
from swarm_sdk.runtime.hooks import AgentInfo, Hooks
from swarm_sdk.runtime.replay import RecordedAgent, Replay
from swarm_sdk.runtime.stage_graph import Node, StageGraph
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.spans import EpisodeSpans
from swarm_sdk.types import Image, Model, Sampling, Tool, Usage

AgentStatus = Literal["done", "truncated", "out_of_budget", "overflow", "failed", "cancelled"]
ResourceT = TypeVar("ResourceT")


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutcome:
    """How an agent ended."""

    path: str
    name: str
    status: AgentStatus
    """done: it gave its final message; truncated: the message was cut at the token limit;
    out_of_budget, overflow (of the context), failed, cancelled: ``error`` says why and ``output``
    is the last it said."""
    output: str
    error: str | None = None
    parsed: Any = None
    """The final message as the agent's ``output_type``; ``None`` without one."""
    steps: int = 0
    critical_steps: int = 0
    usage: Usage = field(default_factory=Usage)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """An agent about to run."""

    path: str
    name: str
    instructions: str
    """The system prompt; empty for none."""
    prompt: str
    model: Model
    tools: Mapping[str, Tool]
    sampling: Sampling
    meter: AgentMeter
    output: TypeAdapter[Any] | None = None
    """What the final message must parse as; ``None`` takes any text."""
    parent: Node | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds single agents and calls, beside the budget."""

    max_parallel: int = 100
    """Sub-agents alive at one time in an episode; more wait their turn."""
    tool_timeout_s: float | None = 600.0
    """Seconds of one tool call; sub-agents have budgets instead. ``None`` waits for ever."""
    max_tool_chars: int = 200_000
    """Characters of one tool result that the model sees: its head and its tail."""
    max_report_chars: int | None = None
    """Characters of a sub-agent's report that its parent sees; the rest can be read page by page
    with ``read_report``. ``None`` is no cap, and no such tool."""
    max_repairs: int = 2
    """Turns in which a final message that does not fit the output type may be mended."""


class Gate:
    """Where agents wait between two turns while their episodes are paused."""

    def __init__(self) -> None:
        self._reopened: anyio.Event | None = None
        self._idle: anyio.Event | None = None
        self.num_inside: int = 0
        """Model calls that run now."""

    @property
    def is_open(self) -> bool:
        """Whether model calls may start."""
        return self._reopened is None

    async def opened(self) -> None:
        """Wait until model calls may start; who goes on counts itself in ``num_inside``."""
        while self._reopened is not None:
            await self._reopened.wait()

    def leave(self) -> None:
        """Count a model call as ended."""
        self.num_inside -= 1
        if self.num_inside == 0 and self._idle is not None:
            self._idle.set()
            self._idle = None

    async def close(self) -> None:
        """Let no further model call start; returns when none is running any more."""
        if self._reopened is None:
            self._reopened = anyio.Event()
        if self.num_inside:
            self._idle = self._idle or anyio.Event()
            await self._idle.wait()

    def open(self) -> None:
        """Let model calls start again."""
        if self._reopened is not None:
            self._reopened.set()
            self._reopened = None


@dataclass(slots=True, kw_only=True)
class EpisodeState:
    """What all agents of one episode share."""

    episode_id: str
    ledger: Ledger
    spans: EpisodeSpans
    scope: Scope
    """The episode's budget."""
    limits: Limits
    emit: Emit | None
    """``None`` where nobody listens."""
    seed: int | None
    """Every turn derives its own seed from it; ``None`` draws fresh ones."""
    gate: Gate
    hooks: Sequence[Hooks] = ()
    context: ContextStrategy | None = None
    deps: Any = None
    files: tuple[Image, ...] = ()
    fail_fast: bool = False
    """Whether the first sub-agent that ends without a report ends the episode."""
    replay: Replay | None = None
    """The record of an earlier process, where the episode is resumed."""
    graph: StageGraph = field(default_factory=StageGraph)
    usage: Usage = field(default_factory=Usage)
    outcomes: dict[str, AgentOutcome] = field(default_factory=dict)
    """Agents that ended, by path."""
    deadlines: Deadlines = field(init=False)
    """The time limit of tool calls."""
    host: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    """The app's task, in which the orchestrator runs; it may have been cancelled before."""
    num_alive: int = 0
    """Sub-agents that run now."""
    max_alive: int = 0
    """The most sub-agents that ran at one time."""

    def __post_init__(self) -> None:
        """The limit of tool calls is that of ``limits``."""
        self.deadlines = Deadlines(self.limits.tool_timeout_s)

    def out_of_time(self, path: str, exceeded: BudgetExceeded) -> AgentOutcome:
        """Keep and record that a wall-clock limit, not a cancelled episode, ended an agent."""
        outcome = replace(
            self.outcomes.get(path) or unstarted(path),
            status="out_of_budget",
            error=str(exceeded),
        )
        self.outcomes[path] = outcome
        self.ledger.end_agent(
            self.episode_id,
            path,
            status=outcome.status,
            output=outcome.output,
            error=outcome.error,
            ended_ns=time.time_ns(),
        )
        return outcome


class AgentResources:
    """What one agent holds while it lives; closed when it ends, also on cancellation."""

    __slots__ = ("_held", "_locks", "_stack")

    def __init__(self) -> None:
        self._stack: AsyncExitStack | None = None
        self._held: dict[str, Any] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def get(
        self, key: str, start: Callable[[], AbstractAsyncContextManager[ResourceT]]
    ) -> ResourceT:
        """The resource ``key``, started on first use even if several calls ask at once."""
        async with self._locks.setdefault(key, anyio.Lock()):
            if key not in self._held:
                self._stack = self._stack or AsyncExitStack()
                self._held[key] = await self._stack.enter_async_context(start())
        held: ResourceT = self._held[key]
        return held

    async def aclose(self) -> None:
        """Give everything back."""
        if self._stack is not None:
            with anyio.CancelScope(shield=True):
                await self._stack.aclose()


@dataclass(slots=True)
class LivingAgent:
    """An agent while it runs: what its turns and its tool calls need."""

    state: EpisodeState
    spec: AgentSpec
    info: AgentInfo
    recorded: RecordedAgent | None
    """What an earlier process did of it, where the episode is resumed."""
    resources: AgentResources = field(default_factory=AgentResources)
    task: asyncio.Task[Any] | None = field(default_factory=asyncio.current_task)
    """In which its turns run."""

    def stop_if_cancelled(self) -> None:
        """Let no call start in a task that was cancelled, though a call kept that to itself.

        Raises:
            asyncio.CancelledError: it was. Where a scope of anyio is cancelled the next ``await``
                raises it.
        """
        if (
            self.task is not None
            and self.task.cancelling()
            and self.task is not self.state.host
            and not is_scope_cancelled()
        ):
            raise asyncio.CancelledError


def seed_of(text: str) -> int:
    """A seed of 32 bits, the same for the same text in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def is_scope_cancelled() -> bool:
    """Whether a scope of anyio around the current task is cancelled."""
    return anyio.current_effective_deadline() == -math.inf


def unstarted(path: str) -> AgentOutcome:
    """The outcome of an agent that was cancelled before it began."""
    return AgentOutcome(
        path=path,
        name=path.rpartition("/")[2],
        status="cancelled",
        output="",
        error="it never started",
    )
