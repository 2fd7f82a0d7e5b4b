"""What an episode tells while it runs: typed events of the whole tree, tagged with agent paths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swarm_sdk.types import Message, ToolCall, ToolOutput, Usage


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


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentFinished:
    """An agent has ended; ``status`` as in ``AgentOutcome``."""

    path: str
    status: str
    output: str
    steps: int


Event = AgentStarted | StepStarted | StepFinished | ToolStarted | ToolFinished | AgentFinished
Emit = Callable[[Event], None]
