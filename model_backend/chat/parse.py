"""Token ids that a model sampled, read as an assistant message.

    REASONING </think> CONTENT <|tool_calls_section_begin|>
        <|tool_call_begin|> functions.NAME:IDX <|tool_call_argument_begin|> {…} <|tool_call_end|> …
    <|tool_calls_section_end|> <|im_end|>

Reading is total: any sequence of ids gives a message. A call that cannot be run is kept with an
``error`` that tells the model what to do; the rest of the turn stands. Only special *ids* are
structure; the same names spelled out in ordinary characters are text, with one exception that
real outputs need: a section token in the singular (``<|tool_call_section_begin|>``, not in the
vocabulary) right beside a call.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from swarm_sdk.model_backend.chat.schema import check_arguments, parse_arguments
from swarm_sdk.types import Message, ToolCall

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
    from swarm_sdk.types import ToolSpec

# A turn cut into runs of text and the special ids that structure it.
Piece = str | int

_SINGULAR_BEGIN = re.compile(r"<\|tool_call_section_begin\|>\s*\Z")
_SINGULAR_END = re.compile(r"\A\s*<\|tool_call_section_end\|>")
_CALL_ID = re.compile(r"functions\.([\w.\-]{1,64}):[0-9]+", re.ASCII)
_NAME_IN_BAD_ID = re.compile(r"(?:functions\.)?([\w.\-]{1,64}?)(?::.*)?", re.ASCII | re.DOTALL)


@dataclass(slots=True)
class _RawCall:
    """A call as it was written; filled while reading."""

    id_text: str = ""
    arguments_text: str | None = None
    """``None`` until the token that opens the arguments."""
    has_begin: bool = True
    has_end: bool = False


def parse_turn(
    tokenizer: Tokenizer,
    ids: Sequence[int],
    *,
    thinking: bool,
    first_call_index: int,
    tools: Sequence[ToolSpec],
) -> Message:
    """Read the assistant message in ``ids``, which follow the generation prompt.

    ``thinking`` says whether that prompt left ``<think>`` open. Reasoning ends at ``</think>``;
    without one, at the first tool call; without that too, the turn is all reasoning. Calls are
    numbered from ``first_call_index``, whatever number the model wrote.
    """
    special = tokenizer.special
    pieces = _pieces(tokenizer, ids, thinking=thinking)
    reasoning = ""
    if thinking:
        ends = [special.think_end] if special.think_end in pieces else _openers(tokenizer)
        cut = next((at for at, piece in enumerate(pieces) if piece in ends), len(pieces))
        reasoning = "".join(_spell(tokenizer, piece) for piece in pieces[:cut])
        pieces = pieces[cut + 1 :] if special.think_end in pieces else pieces[cut:]
    content, raw_calls = _read_calls(tokenizer, pieces)
    specs = {tool.name: tool for tool in tools}
    return Message(
        role="assistant",
        content=content,
        reasoning=reasoning,
        tool_calls=tuple(
            _to_call(raw, index, specs) for index, raw in enumerate(raw_calls, first_call_index)
        ),
    )


def _openers(tokenizer: Tokenizer) -> list[int]:
    return [tokenizer.special.tool_calls_section_begin, tokenizer.special.tool_call_begin]


def _spell(tokenizer: Tokenizer, piece: Piece) -> str:
    return piece if isinstance(piece, str) else tokenizer.decode([piece])


def _pieces(tokenizer: Tokenizer, ids: Sequence[int], *, thinking: bool) -> list[Piece]:
    """Cut ``ids`` (up to the end of the turn) at the structural ids; everything else is text."""
    special = tokenizer.special
    structural = {
        special.tool_calls_section_begin,
        special.tool_calls_section_end,
        special.tool_call_begin,
        special.tool_call_argument_begin,
        special.tool_call_end,
    }
    if thinking:
        structural.add(special.think_end)

    def cut() -> Iterator[Piece]:
        text_ids: list[int] = []
        for token_id in ids:
            if token_id == special.im_end:
                break
            if token_id not in structural:
                text_ids.append(token_id)
                continue
            if text_ids:
                yield tokenizer.decode(text_ids)
                text_ids = []
            if token_id == special.think_end:
                structural.discard(token_id)  # a second one is text
            yield token_id
        if text_ids:
            yield tokenizer.decode(text_ids)

    return _with_plural_sections(tokenizer, list(cut()))


def _with_plural_sections(tokenizer: Tokenizer, pieces: list[Piece]) -> list[Piece]:
    """Read the singular spelling of a section token beside a call as the token it stands for."""
    special = tokenizer.special
    result: list[Piece] = []
    for at, piece in enumerate(pieces):
        if not isinstance(piece, str):
            result.append(piece)
            continue
        text, begins, ends = piece, 0, 0
        if at > 0 and pieces[at - 1] == special.tool_call_end:
            text, ends = _SINGULAR_END.subn("", text)
        if at + 1 < len(pieces) and pieces[at + 1] == special.tool_call_begin:
            text, begins = _SINGULAR_BEGIN.subn("", text)
        result += [special.tool_calls_section_end] * ends
        result += [text] if text else []
        result += [special.tool_calls_section_begin] * begins
    return result


def _read_calls(tokenizer: Tokenizer, pieces: Sequence[Piece]) -> tuple[str, list[_RawCall]]:
    """Content and calls as written. Text inside a section but outside a call is a broken call."""
    special = tokenizer.special
    content: list[str] = []
    calls: list[_RawCall] = []
    current: _RawCall | None = None
    is_in_section = False
    num_calls_before_section = 0

    def close_section() -> None:
        if is_in_section and len(calls) == num_calls_before_section:
            calls.append(_RawCall(has_begin=False, has_end=True))

    for piece in pieces:
        if isinstance(piece, str):
            if current is None and is_in_section and piece.strip():
                current = _RawCall(has_begin=False)
                calls.append(current)
            if current is None:
                content += [] if is_in_section else [piece]
            elif current.arguments_text is None:
                current.id_text += piece
            else:
                current.arguments_text += piece
        elif piece == special.tool_call_begin:
            current = _RawCall()
            calls.append(current)
        elif piece == special.tool_call_argument_begin:
            if current is None and is_in_section:
                current = _RawCall(has_begin=False)
                calls.append(current)
            if current is not None and current.arguments_text is None:
                current.arguments_text = ""
        elif piece == special.tool_call_end:
            if current is not None:
                current.has_end = True
            current = None
        else:
            close_section()
            current = None
            is_in_section = piece == special.tool_calls_section_begin
            num_calls_before_section = len(calls)
    close_section()
    return "".join(content), calls


def _to_call(raw: _RawCall, index: int, specs: Mapping[str, ToolSpec]) -> ToolCall:
    id_text = raw.id_text.strip()
    match = _CALL_ID.fullmatch(id_text)
    salvaged = match or _NAME_IN_BAD_ID.fullmatch(id_text)
    name = salvaged.group(1) if salvaged else "invalid"
    arguments_text = raw.arguments_text or ""
    arguments: dict[str, Any] = {}
    error = _form_error(raw, is_id_good=match is not None)
    if error is None and name not in specs:
        known = ", ".join(specs) or "none"
        error = f"there is no tool named {name!r}; the tools are: {known}"
    if error is None:
        arguments, problem = parse_arguments(arguments_text)
        if problem is not None:
            error = f"the arguments of {name} {problem}; call it again with one JSON object"
        else:
            problem = check_arguments(arguments, specs[name].parameters)
            if problem is not None:
                error = f"{problem} in this call of {name}; call it again with the right arguments"
    return ToolCall(
        id=f"functions.{name}:{index}",
        name=name,
        arguments={} if error else arguments,
        raw_arguments=arguments_text,
        error=error,
    )


def _form_error(raw: _RawCall, *, is_id_good: bool) -> str | None:
    form = "write the id functions.NAME:NUMBER, then the arguments as one JSON object"
    if not raw.has_begin:
        return f"the tool section holds something that is no tool call; {form}"
    if not raw.has_end:
        return "the tool call was cut off before its end token; write the whole call again"
    if raw.arguments_text is None:
        return f"the tool call has no arguments; {form}"
    if not is_id_good:
        return f"the id of the tool call is not of the form functions.NAME:NUMBER; {form}"
    return None
