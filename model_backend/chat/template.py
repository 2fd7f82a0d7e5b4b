"""Messages as token ids, by the rules of K2.5's chat template.

    <|im_system|>tool_declare<|im_middle|>TYPESCRIPT<|im_end|>           open(tools)
    <|im_system|>system<|im_middle|>TEXT<|im_end|>                       render(message)
    <|im_user|>user<|im_middle|>TEXT<|im_end|>
    <|im_assistant|>assistant<|im_middle|><think>                        generation_prompt()
        REASONING</think>CONTENT[<|tool_calls_section_begin|>…]<|im_end|>    the model's turn
    <|im_system|>tool<|im_middle|>## Return of functions.NAME:IDX⏎TEXT<|im_end|>

No token stands between turns, none before the first. Special tokens are written as ids; all text
goes through ``Tokenizer.encode``, which yields no special id: whatever a user, a tool or a
document spells, the structure is ours. Text between two special ids is encoded in one piece, as
the tokenizer would encode the rendered string.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat import parse
from swarm_sdk.model_backend.chat.typescript import declare_tools

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
    from swarm_sdk.types import Image, Message, ToolSpec

# A part of a turn: a special id, or text between two of them.
Part = int | str


class ChatFormat:
    """The chat format of one tokenizer, in one of its modes."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool = True,
        has_vision: bool = False,
        num_image_tokens: Callable[[Image], int] | None = None,
    ) -> None:
        """Choose the mode.

        Without ``thinking`` the generation prompt closes the reasoning at once (instant mode).
        With ``has_vision`` a picture takes ``num_image_tokens(image)`` media tokens; without it
        the model is told its name only.

        Raises:
            ConfigError: ``has_vision`` without ``num_image_tokens``.
        """
        if has_vision and num_image_tokens is None:
            raise ConfigError("a chat format with vision needs num_image_tokens; pass the function")
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.has_vision = has_vision
        self._num_image_tokens = num_image_tokens

    @property
    def instant(self) -> ChatFormat:
        """The same without reasoning: what a turn that a grammar holds to JSON begins with."""
        return ChatFormat(
            self.tokenizer,
            thinking=False,
            has_vision=self.has_vision,
            num_image_tokens=self._num_image_tokens,
        )

    @property
    def end_of_turn_id(self) -> int:
        """The id that ends every turn: ``<|im_end|>``."""
        return self.tokenizer.special.im_end

    def open(self, tools: Sequence[ToolSpec]) -> list[int]:
        """Render the turn that declares ``tools``; empty where there are none.

        Raises:
            ConfigError: a tool's schema refers to a definition that it does not hold.
        """
        if not tools:
            return []
        special = self.tokenizer.special
        return self._encode(
            [
                special.im_system,
                "tool_declare",
                special.im_middle,
                declare_tools(tools),
                special.im_end,
            ]
        )

    def render(self, message: Message) -> list[int]:
        """Render one whole turn of any role; an assistant's with its reasoning."""
        if message.role == "assistant":
            return self.generation_prompt() + self.render_turn(message)
        special = self.tokenizer.special
        opener = special.im_user if message.role == "user" else special.im_system
        header = f"## Return of {message.tool_call_id}\n" if message.role == "tool" else ""
        images = [part for image in message.images for part in self._image(image)]
        return self._encode(
            [
                opener,
                message.role,
                special.im_middle,
                header,
                *images,
                message.content,
                special.im_end,
            ]
        )

    def generation_prompt(self) -> list[int]:
        """Render what stands before the model's turn: the role, and ``<think>`` open or closed."""
        special = self.tokenizer.special
        closing = [] if self.thinking else [special.think_end]
        return self._encode(
            [
                special.im_assistant,
                "assistant",
                special.im_middle,
                special.think_begin,
                *closing,
            ]
        )

    def render_turn(self, message: Message) -> list[int]:
        """Render the ids that a model would sample after the generation prompt to say ``message``.

        In instant mode the reasoning is not said. Arguments are written as ``raw_arguments`` has
        them, or as JSON where it is empty.
        """
        special = self.tokenizer.special
        reasoning: list[Part] = [message.reasoning, special.think_end] if self.thinking else []
        return self._encode(
            [*reasoning, message.content, *self._tool_section(message), special.im_end]
        )

    def parse_turn(
        self, ids: Sequence[int], *, first_call_index: int, tools: Sequence[ToolSpec]
    ) -> Message:
        """Read the assistant message in the sampled ``ids``; any sequence gives one.

        Calls that cannot be run carry an ``error``. Calls are numbered from ``first_call_index``.
        A turn cut before ``<|im_end|>`` is read as far as it goes.
        """
        return parse.parse_turn(
            self.tokenizer,
            ids,
            thinking=self.thinking,
            first_call_index=first_call_index,
            tools=tools,
        )

    def render_dialogue(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolSpec] = (),
        *,
        preserve_thinking: bool,
        add_generation_prompt: bool = False,
    ) -> list[int]:
        """Render a whole dialogue at once, as a chat server renders it.

        The stock K2.5 template (``preserve_thinking=False``) empties the reasoning of every
        assistant message up to the last one without tool calls, so a final answer rewrites the
        turns before it: the ids of a longer dialogue do not start with those of the shorter one.
        ``TokenDialogue`` never rewrites; it equals ``preserve_thinking=True``.
        """
        last_answer = max(
            (
                at
                for at, message in enumerate(messages)
                if message.role == "assistant" and not message.tool_calls
            ),
            default=-1,
        )
        ids = self.open(tools)
        for at, message in enumerate(messages):
            is_kept = preserve_thinking or at > last_answer
            ids += self.render(message) if is_kept else self._render_without_reasoning(message)
        return ids + (self.generation_prompt() if add_generation_prompt else [])

    def _render_without_reasoning(self, message: Message) -> list[int]:
        if message.role != "assistant":
            return self.render(message)
        return self.instant.render(message)

    def _tool_section(self, message: Message) -> list[Part]:
        if not message.tool_calls:
            return []
        special = self.tokenizer.special
        parts: list[Part] = [special.tool_calls_section_begin]
        for call in message.tool_calls:
            arguments = call.raw_arguments or json.dumps(dict(call.arguments), ensure_ascii=False)
            parts += [special.tool_call_begin, call.id]
            parts += [special.tool_call_argument_begin, arguments, special.tool_call_end]
        return [*parts, special.tool_calls_section_end]

    def _image(self, image: Image) -> list[Part]:
        if self._num_image_tokens is None or not self.has_vision:
            return [f"{image.in_words}\n"]
        special = self.tokenizer.special
        pads = [special.media_pad] * self._num_image_tokens(image)
        return [
            special.media_begin,
            "image",
            special.media_content,
            *pads,
            special.media_end,
            "\n",
        ]

    def _encode(self, parts: Iterable[Part]) -> list[int]:
        ids: list[int] = []
        text = ""
        for part in parts:
            if isinstance(part, str):
                text += part
                continue
            ids += self.tokenizer.encode(text)
            ids.append(part)
            text = ""
        return ids + self.tokenizer.encode(text)
