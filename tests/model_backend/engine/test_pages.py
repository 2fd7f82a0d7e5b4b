"""Pages: whatever sequences do, each page is free, held or kept, and in one state only."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from swarm_sdk.model_backend.engine.pages import PageTable, bytes_per_token, kv_pool
from swarm_sdk.model_backend.model.config import nano, tiny

NUM_PAGES = 6


class Sequences(RuleBasedStateMachine):
    """Sequences as the scheduler treats them: share what is cached, take, compute, give back."""

    def __init__(self):
        super().__init__()
        self.table = PageTable(NUM_PAGES, page_size=4)
        self.held = []
        """Of each sequence: its pages and, of each page, the name or ``None``."""
        self.content = {}
        """What was computed under each name: the page that a later sequence must be given."""

    @rule(document=st.integers(0, 3), num_full=st.integers(0, 3), is_partial=st.booleans())
    def admit(self, document, num_full, is_partial):
        names = [f"{document}.{index}".encode() for index in range(num_full)]
        pages = []
        for name in names:
            page = self.table.find(name)
            if page is None or self.table.is_pending(page):
                break
            assert self.content[name] == page
            pages.append(page)
        num_shared = len(pages)
        num_new = num_full - num_shared + is_partial
        revived = sum(not self.table.is_held(page) for page in pages)
        if num_new + revived > self.table.num_available:
            return
        for page in pages:
            self.table.hold(page)
        for _ in range(num_new):
            page = self.table.allocate()
            assert all(page not in others for others, _ in self.held), "held twice"
            assert page not in pages
            self.content = {n: p for n, p in self.content.items() if p != page}
            pages.append(page)
        for index in range(num_shared, num_full):
            self.table.name(pages[index], names[index], is_pending=True)
        self.held.append((pages, [*names, *([None] if is_partial else [])]))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def compute(self, data):
        pages, names = data.draw(st.sampled_from(self.held))
        for page, name in zip(pages, names, strict=True):
            if name is not None:
                self.table.name(page, name, is_pending=False)
                self.table.mark_computed(page)
                if self.table.find(name) == page:
                    self.content[name] = page

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        pages, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.table.release(pages)

    @precondition(lambda self: not self.held)
    @rule()
    def clear(self):
        self.table.clear()
        self.content = {}

    @invariant()
    def no_page_is_lost(self):
        held = {page for pages, _ in self.held for page in pages}
        assert self.table.num_available == NUM_PAGES - len(held)
        assert [self.table.is_held(page) for page in range(NUM_PAGES)] == [
            page in held for page in range(NUM_PAGES)
        ]

    @invariant()
    def what_was_computed_is_found_until_it_is_evicted(self):
        for name, page in self.content.items():
            assert self.table.find(name) == page
            assert not self.table.is_pending(page)

    @invariant()
    def a_pending_page_has_someone_who_computes_it(self):
        for page in range(NUM_PAGES):
            assert not self.table.is_pending(page) or self.table.is_held(page)


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_least_recently_used_page_is_evicted_first_and_the_end_before_the_start():
    table = PageTable(3, page_size=4)
    pages = [table.allocate() for _ in range(3)]
    for page, name in zip(pages, (b"a", b"ab", b"abc"), strict=True):
        table.name(page, name, is_pending=False)
    table.release(pages)
    for gone, left in ((b"abc", (b"a", b"ab")), (b"ab", (b"a",)), (b"a", ())):
        table.allocate()
        assert table.find(gone) is None
        assert all(table.find(name) is not None for name in left)


def test_a_pending_page_that_is_given_back_is_forgotten():
    table = PageTable(1, page_size=4)
    page = table.allocate()
    table.name(page, b"a", is_pending=True)
    table.release([page])
    assert table.find(b"a") is None
    assert table.allocate() == page


@pytest.mark.parametrize("config", [tiny(), nano()])
def test_a_pool_takes_the_bytes_that_are_counted_for_its_tokens(config):
    pool = kv_pool(config.text_config, 32, torch.zeros(1, dtype=torch.float32))
    assert pool.nbytes == 32 * bytes_per_token(config.text_config, torch.float32)
