"""What to do when an agent's context grows too long (report, appendix E.6).

    HideToolResults   keep every message, but only the newest tool results' text
    DiscardAll        drop all but the system prompt and the task
    Compact           what a function of the app makes of it

A strategy rewrites the messages; the agent goes on in a new dialogue. The record tells that the
context was begun anew, so that training sees what the model saw. Without a strategy an overflow
ends the agent with status ``overflow``. The thresholds are ours: the report gives none.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from swarm_sdk.errors import ConfigError
from swarm_sdk.types import Message

HIDDEN = "(hidden: this result is no longer shown)"


class ContextStrategy(Protocol):
    """Rewrites the messages of a context that is too long."""

    @property
    def name(self) -> str:
        """What the record calls it."""
        ...

    @property
    def threshold_tokens(self) -> int:
        """The context length from which it is asked."""
        ...

    async def __call__(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The messages to go on with; the same ones where nothing can be dropped."""
        ...


@dataclass(frozen=True, slots=True)
class HideToolResults:
    """Keep only the text of the newest ``keep_rounds`` rounds of tool results."""

    threshold_tokens: int
    keep_rounds: int = 1
    name: str = "hide_tool_results"

    def __post_init__(self) -> None:
        _check(self.threshold_tokens, self.keep_rounds)

    async def __call__(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Hide the older results."""
        rounds = [i for i, message in enumerate(messages) if message.tool_calls]
        if len(rounds) <= self.keep_rounds:
            return messages
        first_kept = rounds[-self.keep_rounds] if self.keep_rounds else len(messages)
        return [
            replace(message, content=HIDDEN, images=())
            if message.role == "tool" and index < first_kept
            else message
            for index, message in enumerate(messages)
        ]


@dataclass(frozen=True, slots=True)
class DiscardAll:
    """Drop everything but what the agent began with."""

    threshold_tokens: int
    name: str = "discard_all"

    def __post_init__(self) -> None:
        _check(self.threshold_tokens)

    async def __call__(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The system prompt and the task."""
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
        return messages[:first]


@dataclass(frozen=True, slots=True)
class Compact:
    """Whatever ``function`` makes of the messages; it may ask a model of its own."""

    threshold_tokens: int
    function: Callable[[Sequence[Message]], Sequence[Message] | Awaitable[Sequence[Message]]]
    name: str = "compact"

    def __post_init__(self) -> None:
        _check(self.threshold_tokens)

    async def __call__(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Call the function.

        Raises:
            ConfigError: it gave no messages, or its last one is the assistant's.
        """
        made = self.function(messages)
        compacted = tuple(await made if inspect.isawaitable(made) else made)
        if not compacted or compacted[-1].role == "assistant":
            raise ConfigError(
                "a compacted context must end with a message that the model can answer: a user's "
                "or a tool's"
            )
        return compacted


def _check(threshold_tokens: int, keep_rounds: int = 0) -> None:
    if threshold_tokens < 1 or keep_rounds < 0:
        raise ConfigError(
            f"a context strategy needs threshold_tokens >= 1 and keep_rounds >= 0, got "
            f"{threshold_tokens} and {keep_rounds}"
        )
