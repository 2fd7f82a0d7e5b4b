"""Dialogues over token ids: what was sampled is what the next call sees.

    ids = [tools] [observed] [prompt + sampled] [observed] [prompt + sampled] …

A ``TokenDialogue`` only ever appends. The ids that a model sampled are never decoded and encoded
again, so the ids of a call are the ids that training sees. All reasoning is kept, where the stock
template of K2.5 drops it once a final answer was given (``ChatFormat.render_dialogue`` renders
that way): dropping would rewrite ids that are already on record and in the cache.

A turn that ended without ``<|im_end|>`` (cut by length, or aborted) gets it from the next step.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError, ContextOverflow
from swarm_sdk.types import Turn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.model_backend.chat.template import ChatFormat
    from swarm_sdk.types import Engine, Image, Message, Sampling, ToolSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenModel:
    """A ``Model`` over an engine that takes and gives token ids."""

    name: str
    engine: Engine
    chat_format: ChatFormat
    context_tokens: int
    """How many tokens the engine's context holds, prompt and completion together."""
    has_grammar: bool = False
    """Whether the engine can hold a turn to ``Sampling.json_schema``; such a turn has no reasoning,
    for the grammar begins with its first token. Without it the schema is not passed on."""

    @property
    def is_replayable(self) -> bool:
        """Always: the episodes hold the exact ids and log-probabilities."""
        return True

    def dialogue(self, tools: Sequence[ToolSpec], *, first_call_index: int = 0) -> TokenDialogue:
        """Open a conversation in which ``tools`` can be called."""
        return TokenDialogue(self, tools, first_call_index)

    async def aclose(self) -> None:
        """Close the engine."""
        await self.engine.aclose()


class TokenDialogue:
    """One conversation as one growing list of token ids."""

    def __init__(
        self, model: TokenModel, tools: Sequence[ToolSpec], first_call_index: int = 0
    ) -> None:
        self._model = model
        self._format = model.chat_format
        self._tools = tuple(tools)
        self._ids: list[int] = []
        self._num_calls = first_call_index
        self._images: list[Image] = []
        self._routing_key = uuid.uuid4().hex
        self._num_with_experts = 0
        """Positions whose experts the turns so far told."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All ids so far, in order."""
        return tuple(self._ids)

    @property
    def num_calls(self) -> int:
        """Tool calls so far; the next call gets this number."""
        return self._num_calls

    @property
    def num_prompt_tokens(self) -> int:
        """Ids that the next call sends."""
        return len(self._ids) + len(self._lead()) + len(self._format.generation_prompt())

    def observe(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Append messages of any role; returns the ids added.

        The first ids also declare the tools; the ids after an unfinished turn also end it.
        """
        added = self._lead()
        for message in messages:
            added += self._format.render(message)
            self._num_calls += len(message.tool_calls)
            if self._format.has_vision:
                self._images += message.images
        self._ids += added
        return tuple(added)

    async def sample(self, sampling: Sampling) -> Turn:
        """Draw the model's next turn and append it; on an error nothing is appended.

        ``max_tokens`` is cut to the room that is left in the context.

        Raises:
            ContextOverflow: there is no room for a single token.
            ModelError: as the engine raises it.
        """
        json_schema = sampling.json_schema if self._model.has_grammar else ""
        chat_format = self._format.instant if json_schema else self._format
        prompt = self._lead() + chat_format.generation_prompt()
        context = self._ids + prompt
        room = self._model.context_tokens - len(context)
        if room <= 0:
            raise ContextOverflow(
                num_prompt_tokens=len(context), limit_tokens=self._model.context_tokens
            )
        stop_ids = dict.fromkeys((*sampling.stop_token_ids, self._format.end_of_turn_id))
        generation = await self._model.engine.generate(
            context,
            replace(
                sampling,
                max_tokens=min(sampling.max_tokens, room),
                stop_token_ids=tuple(stop_ids),
                json_schema=json_schema,
                routing_key=sampling.routing_key or self._routing_key,
                experts_from=self._num_with_experts,
            ),
            tuple(self._images),
        )
        message = chat_format.parse_turn(
            generation.token_ids, first_call_index=self._num_calls, tools=self._tools
        )
        self._ids = [*context, *generation.token_ids]
        if generation.routed_experts is not None:
            self._num_with_experts += len(generation.routed_experts)
        self._num_calls += len(message.tool_calls)
        return Turn(message=message, generation=generation, prompt_ids=tuple(prompt))

    def replay(self, turn: Turn) -> None:
        """Append a recorded turn: the ids that were sampled then, none made anew.

        Raises:
            ConfigError: the turn was begun with other ids than this format gives.
        """
        lead = self._lead()
        formats = [self._format, *([self._format.instant] if self._model.has_grammar else [])]
        if turn.prompt_ids not in [tuple(lead + one.generation_prompt()) for one in formats]:
            raise ConfigError(
                "a recorded turn does not fit this chat format; resume with the model that ran it"
            )
        self._ids += [*turn.prompt_ids, *turn.generation.token_ids]
        if turn.generation.routed_experts is not None:
            self._num_with_experts += len(turn.generation.routed_experts)
        self._num_calls += len(turn.message.tool_calls)

    def _lead(self) -> list[int]:
        """Return what precedes the next turn: the tools at the start, an end that is missing."""
        if not self._ids:
            return self._format.open(self._tools)
        end = self._format.end_of_turn_id
        return [] if self._ids[-1] == end else [end]
