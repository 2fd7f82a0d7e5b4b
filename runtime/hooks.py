"""Hooks: code of the app around model calls, tool calls, spawns and joins.

    class Audit(Hooks):
        async def tool_call(self, agent, call, proceed):
            print(agent.path, call.name)
            return await proceed(call)

Hooks nest in the order in which they are given: the first one is the outermost. What a hook raises
counts as a failure of the call it surrounds; ``ToolError`` is read by the model.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from swarm_sdk.types import Sampling, ToolCall, ToolOutput, Turn

if TYPE_CHECKING:
    from swarm_sdk.runtime.state import AgentOutcome


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """Which agent a hook is called for."""

    episode_id: str
    path: str
    name: str
    deps: Any


ValueT = TypeVar("ValueT")
OutcomeT = TypeVar("OutcomeT")


def inside(
    method: Callable[
        [AgentInfo, ValueT, Callable[[ValueT], Awaitable[OutcomeT]]], Awaitable[OutcomeT]
    ],
    agent: AgentInfo,
    proceed: Callable[[ValueT], Awaitable[OutcomeT]],
) -> Callable[[ValueT], Awaitable[OutcomeT]]:
    """``proceed`` inside one hook's method."""
    return lambda value: method(agent, value, proceed)


class Hooks:
    """Override what is needed; each method's default does nothing of its own."""

    async def model_call(
        self,
        agent: AgentInfo,
        sampling: Sampling,
        proceed: Callable[[Sampling], Awaitable[Turn]],
    ) -> Turn:
        """Around one model call; must return the turn that ``proceed`` gave."""
        del agent
        return await proceed(sampling)

    async def tool_call(
        self,
        agent: AgentInfo,
        call: ToolCall,
        proceed: Callable[[ToolCall], Awaitable[ToolOutput]],
    ) -> ToolOutput:
        """Around one tool call, ``create_subagent`` and ``assign_task`` included."""
        del agent
        return await proceed(call)

    async def spawn(self, agent: AgentInfo, child_path: str, prompt: str) -> None:
        """Before a sub-agent starts; ``ToolError`` refuses it. ``agent`` is its parent."""
        del agent, child_path, prompt

    async def join(self, agent: AgentInfo, outcome: AgentOutcome) -> None:
        """After a sub-agent ended, before its parent reads the report."""
        del agent, outcome
