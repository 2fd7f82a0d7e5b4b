"""Drift: where the text on record would be tokenised otherwise than it was. Counted, never mended.

    none        a turn whose message, rendered again, gives the very ids that were sampled
    retokenised the same text from other ids: the model spelt it in another way
    cut         the turn ended without its end token (length)
    reread      the ids hold text that the message does not: a parser dropped or changed something
    tokenizer   observed messages give other ids than those on record: another tokenizer or format
    lost        a picture that was observed is no longer on record: nothing can be rendered

Training uses the ids on record whatever this says; it shows what training from text would lose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from swarm_sdk.errors import LedgerError
from swarm_sdk.traces.ledger import Ledger, StepRecord
from swarm_sdk.types import Message


class Renderer(Protocol):
    """What drift needs of a chat format."""

    @property
    def end_of_turn_id(self) -> int:
        """The id that ends every turn."""
        ...

    def render(self, message: Message) -> Sequence[int]:
        """Render one whole turn of any role."""
        ...

    def render_turn(self, message: Message) -> Sequence[int]:
        """Render the ids that a model would sample to say ``message``."""
        ...

    def generation_prompt(self) -> Sequence[int]:
        """Render what stands before the model's turn."""
        ...


def count_drift(
    ledger: Ledger,
    episode_id: str,
    renderer: Renderer,
    decode: Callable[[Sequence[int]], str],
    agent_path: str = "main",
    *,
    max_turns: int | None = None,
) -> Counter[str]:
    """How many turns of an agent drift, by cause; the turns without are ``none``.

    ``decode`` gives the text of ids, special ones spelt out. ``max_turns`` looks at the first ones
    only: a foreign tokenizer shows in the first.
    """
    counts: Counter[str] = Counter()
    results: dict[str, dict[str, Any]] = {}
    for step in ledger.steps(episode_id, agent_path):
        if step.kind == "tool":
            told = {"content": step.body["content"], "images": step.body["images"]}
            results[step.body["call_id"]] = told
        elif step.token_ids:
            if counts.total() == max_turns:
                break
            counts[_of_turn(ledger, step, results, renderer, decode)] += 1
    return counts


def _of_turn(
    ledger: Ledger,
    step: StepRecord,
    results: dict[str, dict[str, Any]],
    renderer: Renderer,
    decode: Callable[[Sequence[int]], str],
) -> str:
    observed: list[int] = []
    for stored in step.body["observed"]:
        if "content" not in stored:
            stored = {**stored, **results[stored["tool_call_id"]]}  # noqa: PLW2901
        try:
            observed += renderer.render(ledger.message(stored))
        except LedgerError:
            return "lost"
    observed += renderer.generation_prompt()
    on_record = list(step.prompt_ids)
    if on_record[max(0, len(on_record) - len(observed)) :] != observed:
        return "tokenizer"
    rendered = list(renderer.render_turn(ledger.message(step.body["message"])))
    sampled = list(step.token_ids)
    if rendered == sampled:
        return "none"
    if sampled[-1] != renderer.end_of_turn_id:
        return "cut"
    return "retokenised" if decode(rendered) == decode(sampled) else "reread"
