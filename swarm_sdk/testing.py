"""Test doubles that ship with the package: no model weights, no processes.

>>> from swarm_sdk import Swarm
>>> from swarm_sdk.testing import ScriptedModel
>>> swarm = Swarm(ScriptedModel(lambda messages, tools: "42"), runs=getfixture("tmp_path"))
>>> swarm.run_sync("What is 6 x 7?").output
'42'
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from swarm_sdk.errors import ConfigError
from swarm_sdk.tools.sandbox.protocol import CellResult
from swarm_sdk.types import Generation, Image, Message, Sampling, ToolCall, ToolSpec, Turn

if TYPE_CHECKING:
    from swarm_sdk.model_backend.chat.template import ChatFormat

Said = Message | str
Policy = Callable[[Sequence[Message], Sequence[ToolSpec]], "Said | Awaitable[Said]"]


def call(tool: str, /, **arguments: Any) -> ToolCall:
    """A tool call for a scripted message; its id is given by the dialogue."""
    return ToolCall("", tool, arguments, json.dumps(arguments))


def calls(*made: ToolCall, content: str = "") -> Message:
    """A scripted message that makes tool calls."""
    return Message("assistant", content, tool_calls=made)


class _Format(Protocol):
    """What a scripted dialogue needs of a chat format."""

    def open(self, tools: Sequence[ToolSpec]) -> Sequence[int]: ...
    def render(self, message: Message) -> Sequence[int]: ...
    def generation_prompt(self) -> Sequence[int]: ...
    def render_turn(self, message: Message) -> Sequence[int]: ...


class ByteFormat:
    """A chat format whose ids are UTF-8 bytes, and 256 at the end of each message."""

    def open(self, tools: Sequence[ToolSpec]) -> Sequence[int]:
        """The names of the tools."""
        return (*" ".join(tool.name for tool in tools).encode(), 256)

    def render(self, message: Message) -> Sequence[int]:
        """Role and content."""
        return (*f"{message.role}: {message.content}".encode(), 256)

    def generation_prompt(self) -> Sequence[int]:
        """The assistant's role."""
        return b"assistant: "

    def render_turn(self, message: Message) -> Sequence[int]:
        """Content and calls."""
        text = message.content
        for made in message.tool_calls:
            text += f"\n{made.id}({made.raw_arguments})"
        return (*text.encode(), 256)


class ScriptedModel:
    """A model whose turns a Python function writes.

    Args:
        policy: given the dialogue so far and the tools, returns the next message (a text, a
            ``Message``, or an awaitable of one). An exception it raises is the model's failure.
        start: for policies with a memory: given what a new dialogue begins with, returns its own
            policy. Exactly one of ``policy`` and ``start`` is given.
        name: what records call it.
        chat_format: how its turns become token ids; UTF-8 bytes unless given.
    """

    is_replayable = True

    def __init__(
        self,
        policy: Policy | None = None,
        *,
        start: Callable[[Sequence[Message]], Policy] | None = None,
        name: str = "scripted",
        chat_format: ChatFormat | None = None,
    ) -> None:
        if (policy is None) == (start is None):
            raise ConfigError("give a scripted model either a policy or a start, not both")
        self.name = name
        self.start: Callable[[Sequence[Message]], Policy] = start or (lambda _: policy)  # type: ignore[assignment,return-value]
        self.chat_format: _Format = chat_format or ByteFormat()

    def dialogue(self, tools: Sequence[ToolSpec], *, first_call_index: int = 0) -> ScriptedDialogue:
        """Open a conversation."""
        return ScriptedDialogue(self, tools, first_call_index)

    async def aclose(self) -> None:
        """Nothing to close."""


class ScriptedDialogue:
    """One conversation with a ``ScriptedModel``."""

    def __init__(
        self, model: ScriptedModel, tools: Sequence[ToolSpec], first_call_index: int = 0
    ) -> None:
        self._model = model
        self._tools = tuple(tools)
        self._messages: list[Message] = []
        self._policy: Policy | None = None
        self._num_ids = 0
        self._num_calls = first_call_index

    @property
    def num_prompt_tokens(self) -> int:
        """Ids that the next call sees."""
        return self._num_ids + len(self._model.chat_format.generation_prompt())

    def observe(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Append what the agent sees."""
        fmt = self._model.chat_format
        ids = [] if self._messages else list(fmt.open(self._tools))
        for message in messages:
            ids += fmt.render(message)
            self._num_calls += len(message.tool_calls)
        self._messages += messages
        self._num_ids += len(ids)
        return tuple(ids)

    async def sample(self, sampling: Sampling) -> Turn:
        """Ask the policy."""
        if self._policy is None:
            self._policy = self._model.start(tuple(self._messages))
        said = self._policy(tuple(self._messages), self._tools)
        if isinstance(said, str | Message):
            await asyncio.sleep(0)
        else:
            said = await said
        message = Message("assistant", said) if isinstance(said, str) else said
        if message.tool_calls:
            made = self._numbered(message.tool_calls)
            message = Message(
                "assistant", message.content, message.images, message.reasoning, tool_calls=made
            )
        prompt_ids = tuple(self._model.chat_format.generation_prompt())
        token_ids = tuple(self._model.chat_format.render_turn(message))
        is_cut = len(token_ids) > sampling.max_tokens
        if is_cut:
            token_ids = token_ids[: sampling.max_tokens]
        generation = Generation(
            token_ids=token_ids,
            logprobs=(0.0,) * len(token_ids),
            finish_reason="length" if is_cut else "stop",
            num_prompt_tokens=self._num_ids + len(prompt_ids),
            num_completion_tokens=len(token_ids),
        )
        self._messages.append(message)
        self._num_ids += len(prompt_ids) + len(generation.token_ids)
        return Turn(message, generation, prompt_ids)

    def replay(self, turn: Turn) -> None:
        """Append a turn that was said before; the policy is not asked."""
        self._messages.append(turn.message)
        self._num_calls += len(turn.message.tool_calls)
        self._num_ids += len(turn.prompt_ids) + len(turn.generation.token_ids)

    def _numbered(self, made: Sequence[ToolCall]) -> tuple[ToolCall, ...]:
        numbered = tuple(
            ToolCall(
                f"functions.{one.name}:{self._num_calls + index}",
                one.name,
                one.arguments,
                one.raw_arguments or json.dumps(dict(one.arguments)),
                one.error,
            )
            for index, one in enumerate(made)
        )
        self._num_calls += len(made)
        return numbered


class FakeSandbox:
    """A sandbox that answers from a function instead of running code."""

    def __init__(self, answer: Callable[[str], str] = lambda _: "") -> None:
        self._answer = answer
        self.cells: list[str] = []
        """The code that was run, in order."""

    async def run(self, code: str, *, timeout_s: float) -> CellResult:
        """Record the cell and answer."""
        del timeout_s
        self.cells.append(code)
        images: tuple[Image, ...] = ()
        return CellResult(
            status="ok", text=self._answer(code), images=images, num_dropped_chars=0, wall_s=0.0
        )

    async def aclose(self) -> None:
        """Nothing to close."""
