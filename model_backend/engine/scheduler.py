"""Which tokens the next step computes.

    waiting ──admit: find shared pages, take new ones──> running ──> finished
       ^                                                    │
       └───────────── preempt: give all pages back ─────────┘

Each step takes one token of every decoding sequence first, then fills a budget of
``prefill_chunk_tokens`` with prompt tokens, oldest sequence first: a long prompt is computed over
several steps and never holds up those that decode. When pages run out, the youngest sequence
gives its pages back and starts again later; its ids stay as they were sampled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from concurrent.futures import Future

    from swarm_sdk.model_backend.engine.pages import PageTable
    from swarm_sdk.model_backend.engine.sequence import Sequence
    from swarm_sdk.types import FinishReason, Generation


@dataclass(slots=True, eq=False)
class Chunk:
    """The next ``num_tokens`` uncomputed tokens of a sequence."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    """Whether the chunk reaches the sequence's last id, so that the next one is sampled."""

    @property
    def next_id(self) -> int:
        """The first of the tokens."""
        return self.sequence.ids[self.sequence.num_computed_tokens]

    @property
    def ids(self) -> list[int]:
        """The tokens."""
        start = self.sequence.num_computed_tokens
        return self.sequence.ids[start : start + self.num_tokens]


class Scheduler:
    """Queues of sequences and the pages they hold."""

    def __init__(self, table: PageTable, *, max_running: int, prefill_chunk_tokens: int) -> None:
        self.table = table
        self.max_running = max_running
        self.prefill_chunk_tokens = prefill_chunk_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission: the last one is the first to be preempted."""
        self._has_cancelled = False
        """Noted by their futures, so that no step has to ask each of them."""
        self.num_preemptions: int = 0
        self.num_computed_prompt_tokens: int = 0

    @property
    def has_work(self) -> bool:
        """Whether there is a sequence that may run."""
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.waiting.append(sequence)
        sequence.future.add_done_callback(self._note_end)

    def schedule(self) -> list[Chunk]:
        """Choose the chunks of the next step, those of one token first."""
        self._drop_cancelled()
        self._grow()
        decodes = [Chunk(seq, 1, samples=True) for seq in self.running if seq.num_to_compute == 1]
        prefills: list[Chunk] = []
        budget = self.prefill_chunk_tokens
        for sequence in self._unfinished_prompts():
            num_tokens = min(sequence.num_to_compute, budget)
            is_last = num_tokens == sequence.num_to_compute
            chunk = Chunk(sequence, num_tokens, samples=is_last)
            (prefills if num_tokens > 1 else decodes).append(chunk)
            budget -= num_tokens
            if budget <= 0:
                break
        return decodes + prefills

    def postprocess(
        self, chunks: list[Chunk], sampled: list[tuple[int, float]]
    ) -> list[tuple[Sequence, FinishReason]]:
        """Take the results of a step; ``sampled`` belongs to the chunks that sample, in order.

        Returns the sequences that ended.
        """
        finished: list[tuple[Sequence, FinishReason]] = []
        results = iter(sampled)
        for chunk in chunks:
            sequence = chunk.sequence
            self._advance(sequence, chunk.num_tokens)
            if chunk.samples:
                reason = sequence.append(*next(results))
                if reason is not None:
                    finished.append((sequence, reason))
        for sequence, _ in finished:
            self.remove(sequence)
        return finished

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, waiting or running, and give back what it holds."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.table.release(sequence.pages)
            sequence.pages = []
            sequence.num_computed_tokens = 0
        else:
            self.waiting.remove(sequence)

    def preempt_all(self) -> None:
        """Take the pages of all running sequences; they start again before those that wait."""
        for sequence in reversed(list(self.running)):
            self.remove(sequence)
            self.waiting.appendleft(sequence)

    def _note_end(self, future: Future[Generation]) -> None:
        """Called by any thread when a request has its result, or nobody waits for it any more."""
        if future.cancelled():
            self._has_cancelled = True

    def _drop_cancelled(self) -> None:
        if not self._has_cancelled:
            return
        self._has_cancelled = False  # before looking: who cancels after is seen next time
        for sequence in [seq for seq in (*self.running, *self.waiting) if seq.future.cancelled()]:
            self.remove(sequence)

    def _grow(self) -> None:
        """Give every running sequence the pages of its uncomputed ids, oldest first."""
        short = [seq for seq in self.running if self._num_missing_pages(seq) > 0]
        for sequence in short:
            while sequence in self.running and self._num_missing_pages(sequence) > 0:
                if self.table.num_available:
                    sequence.pages.append(self.table.allocate())
                else:
                    self._preempt(self.running[-1])

    def _preempt(self, sequence: Sequence) -> None:
        self.num_preemptions += 1
        self.remove(sequence)
        self.waiting.appendleft(sequence)

    def _unfinished_prompts(self) -> Iterator[Sequence]:
        """Yield running sequences with more than one token to compute, then newly admitted ones."""
        yield from [seq for seq in self.running if seq.num_to_compute > 1]
        for sequence in list(self.waiting):
            if len(self.running) >= self.max_running:
                return
            shared = self._shared_pages(sequence)
            if shared is None:
                continue
            if not self._has_room(sequence, shared):
                return
            self._admit(sequence, shared)
            yield sequence

    def _shared_pages(self, sequence: Sequence) -> list[int] | None:
        """Return the cached pages that begin the sequence, or ``None`` if one is being computed.

        The last id is always computed: it gives the next one.
        """
        pages: list[int] = []
        for index in range((len(sequence.ids) - 1) // self.table.page_size):
            page = self.table.find(sequence.page_name(index, self.table.page_size))
            if page is None:
                break
            if self.table.is_pending(page):
                return None
            pages.append(page)
        return pages

    def _has_room(self, sequence: Sequence, shared: list[int]) -> bool:
        """Whether the pages suffice, with one spare page for each running sequence."""
        needed = self._num_missing_pages(sequence) - len(shared)
        num_revived = sum(not self.table.is_held(page) for page in shared)
        return needed + num_revived + len(self.running) <= self.table.num_available

    def _admit(self, sequence: Sequence, shared: list[int]) -> None:
        table = self.table
        for page in shared:
            table.hold(page)
        sequence.pages = list(shared)
        sequence.num_computed_tokens = len(shared) * table.page_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        while self._num_missing_pages(sequence) > 0:
            sequence.pages.append(table.allocate())
        for index in range(len(shared), len(sequence.ids) // table.page_size):
            name = sequence.page_name(index, table.page_size)
            table.name(sequence.pages[index], name, is_pending=True)
        self.waiting.remove(sequence)
        self.running.append(sequence)

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        """Count tokens as computed; pages that they fill can be shared from now on."""
        table, start = self.table, sequence.num_computed_tokens
        if start < sequence.num_prompt_tokens:
            num_of_prompt = sequence.num_prompt_tokens - start
            self.num_computed_prompt_tokens += min(num_tokens, num_of_prompt)
        sequence.num_computed_tokens = end = start + num_tokens
        for index in range(start // table.page_size, end // table.page_size):
            page = sequence.pages[index]
            table.name(page, sequence.page_name(index, table.page_size), is_pending=False)
            table.mark_computed(page)

    def _num_missing_pages(self, sequence: Sequence) -> int:
        return -(-len(sequence.ids) // self.table.page_size) - len(sequence.pages)
