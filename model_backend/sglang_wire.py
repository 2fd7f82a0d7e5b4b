"""What SGLang's native ``/generate`` says, read into our records.

    {output_ids, meta_info: {output_token_logprobs, finish_reason, weight_version(s),
                             routed_experts, *_tokens}}          ──> Generation
    each event of a stream, which repeats all that came before   ──> Piece

Read alike from SGLang 0.5.11 and 0.5.23. Only the later one tells ``weight_versions`` (spans), and
only it heeds ``routed_experts_start_len``; the earlier sends all positions, so they are cut here.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

from swarm_sdk.errors import ModelError
from swarm_sdk.types import FinishReason, Generation, RoutedExperts

if TYPE_CHECKING:
    from collections.abc import Sequence

_FINISH_REASONS: Final[dict[str, FinishReason]] = {
    "stop": "stop",
    "length": "length",
    "abort": "abort",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """What of a model is needed to read which experts it chose."""

    num_layers: int
    """All decoder layers, with a mixture or without."""
    num_chosen: int
    """Experts a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens that a stream brought since the piece before."""

    first: int
    """Index of the first of them among the sampled tokens. Not where the last piece ended, but 0,
    where the call began anew on another server: what came before is void."""
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    weight_version: int


def version_of(told: Any) -> int:
    """SGLang names weights by any string (``default`` at the start); ours are numbers from 0."""
    return int(told) if isinstance(told, str) and told.isdecimal() else 0


def generation_of(
    answer: Any, *, shape: ExpertsShape | None = None, experts_from: int = 0
) -> Generation:
    """Read an answer of ``/generate``.

    With a ``shape`` the experts of the positions from ``experts_from`` on are read as well.

    Raises:
        ModelError: the answer is not SGLang's, or a token in it has no log-probability.
    """
    try:
        info = answer["meta_info"]
        finish = info["finish_reason"]
        pairs = [(logprob, token_id) for logprob, token_id, *_ in info["output_token_logprobs"]]
        token_ids = tuple(token_id for _, token_id in pairs)
        if finish["type"] == "abort":  # one that was ended in the queue is not counted
            info = {"prompt_tokens": 0, "cached_tokens": 0, **info}
        num_prompt, num_completion = info["prompt_tokens"], info["completion_tokens"]
        generation = Generation(
            token_ids=token_ids,
            logprobs=tuple(logprob for logprob, _ in pairs),
            finish_reason=_FINISH_REASONS[finish["type"]],
            weight_version=version_of(info.get("weight_version")),
            version_spans=_spans(info.get("weight_versions") or (), len(token_ids)),
            num_prompt_tokens=num_prompt,
            num_cached_tokens=info["cached_tokens"],
            num_completion_tokens=num_completion,
            routed_experts=_experts(
                info.get("routed_experts"), shape, experts_from, num_prompt + num_completion - 1
            ),
        )
        output_ids, matched = tuple(answer["output_ids"]), finish.get("matched")
        if finish["type"] == "abort":  # a streamed one may repeat its last id alone
            output_ids = token_ids
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"the SGLang server sent an answer without {error}") from error
    if output_ids != token_ids:
        raise ModelError("the SGLang server sent token ids and log-probabilities that differ")
    if isinstance(matched, int) and token_ids[-1:] != (matched,):
        raise ModelError(f"the SGLang server left the stop token {matched} out of its answer")
    return generation


def joined(last: Any, pieces: Sequence[Piece]) -> Any:
    """The last event of a stream as its answer, whether it repeats the ones before it or not."""
    info = last["meta_info"]
    if len(info["output_token_logprobs"]) == info["completion_tokens"]:
        return last
    ids = [token_id for piece in pieces for token_id in piece.token_ids]
    logprobs = [logprob for piece in pieces for logprob in piece.logprobs]
    pairs = list(zip(logprobs, ids, strict=True))
    return {**last, "output_ids": ids, "meta_info": {**info, "output_token_logprobs": pairs}}


def piece_of(answer: Any, num_known: int) -> Piece:
    """What an event of a stream adds to the ``num_known`` tokens before it.

    Raises:
        ModelError: the event is not SGLang's.
    """
    try:
        info = answer["meta_info"]
        num_new = info["completion_tokens"] - num_known
        fresh = info["output_token_logprobs"][-num_new:] if num_new else []
        piece = Piece(
            first=num_known,
            token_ids=tuple(token_id for _, token_id, *_ in fresh),
            logprobs=tuple(logprob for logprob, *_ in fresh),
            weight_version=version_of(info.get("weight_version")),
        )
        own_ids = answer["output_ids"]
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"the SGLang server sent an event without {error}") from error
    if len(own_ids) == num_new and tuple(own_ids) != piece.token_ids:
        raise ModelError("the SGLang server sent token ids and log-probabilities that differ")
    return piece


def spans_of(pieces: Sequence[Piece]) -> tuple[tuple[int, int], ...]:
    """(version, tokens) of a stream's pieces, in order; empty where there is one version."""
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        num = len(piece.token_ids)
        if spans and spans[-1][0] == piece.weight_version:
            spans[-1] = (piece.weight_version, spans[-1][1] + num)
        elif num:
            spans.append((piece.weight_version, num))
    return tuple(spans) if len(spans) > 1 else ()


def _spans(told: Sequence[Any], num_tokens: int) -> tuple[tuple[int, int], ...]:
    if len(told) < 2:
        return ()
    starts = [*(span["start"] for span in told), num_tokens]
    return tuple(
        (version_of(span["version"]), end - start)
        for span, (start, end) in zip(told, pairwise(starts), strict=True)
        if end > start
    )


def _experts(
    told: str | None, shape: ExpertsShape | None, experts_from: int, num_positions: int
) -> RoutedExperts | None:
    """Base64 of int32 [positions, layers, chosen] as uint16; all positions, or those asked for."""
    if told is None or shape is None:
        return None
    try:
        wide = base64.b64decode(told, validate=True)
    except binascii.Error as error:
        raise ModelError("the SGLang server sent experts that are not base64") from error
    row_bytes = 4 * shape.num_layers * shape.num_chosen
    num_rows, rest = divmod(len(wide), row_bytes)
    if num_rows == num_positions:
        wide = wide[experts_from * row_bytes :]
    elif rest or num_rows != num_positions - experts_from:
        raise ModelError(
            f"the SGLang server sent experts for {num_rows} positions where "
            f"{num_positions - experts_from} were asked for; does it serve another model?"
        )
    if any(wide[2::4]) or any(wide[3::4]):
        raise ModelError("the SGLang server sent the number of an expert above 65535")
    narrow = bytearray(len(wide) // 2)
    narrow[0::2], narrow[1::2] = wide[0::4], wide[1::4]
    return RoutedExperts(
        data=bytes(narrow), num_layers=shape.num_layers, num_chosen=shape.num_chosen
    )
