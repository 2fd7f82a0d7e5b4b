"""What an episode tells while it runs: typed events of the whole tree, tagged with agent paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarm_sdk.types import Message, ToolCall, ToolOutput, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentQueued:
    """A sub-agent waits for one of the places of ``max_parallel``."""

    path: str
    name: str
    num_waiting: int
    """Sub-agents that wait, this one included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentStarted:
    """An agent begins; ``main`` is the orchestrator."""

    path: str
    name: str
    prompt: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """An agent's model is asked for a turn."""

    path: str
    stage: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """An agent's model has spoken."""

    path: str
    stage: int
    message: Message
    usage: Usage
    is_replayed: bool = False
    """Whether the turn was read from the record of an earlier process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolStarted:
    """A tool call begins."""

    path: str
    call: ToolCall


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolFinished:
    """A tool call has its result; ``error`` names what went wrong."""

    path: str
    call: ToolCall
    output: ToolOutput
    error: str | None
    is_replayed: bool = False
    """Whether the result was read from the record of an earlier process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextReset:
    """An agent's context was begun anew because it grew too long."""

    path: str
    stage: int
    strategy: str
    num_dropped_messages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFinished:
    """An agent has ended; ``status`` as in ``AgentOutcome``."""

    path: str
    status: str
    output: str
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsDropped:
    """A consumer of ``run_stream`` was too slow: this many events are missing here."""

    count: int


Event = (
    AgentQueued
    | AgentStarted
    | StepStarted
    | StepFinished
    | ToolStarted
    | ToolFinished
    | ContextReset
    | AgentFinished
    | EventsDropped
)
Emit = Callable[[Event], None]
