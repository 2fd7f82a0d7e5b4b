"""The cache: latent vectors and rotary keys in pages, shared between sequences.

    page     page_size consecutive tokens of one sequence, all layers
    slot     page * page_size + offset: the place of one token, kv[layer, slot] = latent | key

    free ──allocate──> held by one ──name──> held by any number, found by its name
      ^                                          │ the last holder releases it
      └──────── evicted, oldest first ──── held by none, still found

A page's name is a digest of all tokens up to its end (``Sequence.page_name``), so walking a
prompt's names is walking a radix tree. A named page is *pending* until its keys are computed:
whoever finds it waits instead of computing it again.
"""

# Shapes: Y = layers, L = latent, R = rope, slots as above.

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from swarm_sdk.model_backend.model.config import TextConfig


class PageTable:
    """Who holds which page; knows nothing of tensors."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages: int = num_pages
        self.page_size: int = page_size
        self.clear()

    def clear(self) -> None:
        """Forget all pages; no sequence may hold one."""
        self._free = list(range(self.num_pages - 1, -1, -1))
        self._num_holders = [0] * self.num_pages
        self._name_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._pending: set[int] = set()
        self._unheld: OrderedDict[int, None] = OrderedDict()
        """Named pages that nobody holds, the least recently used first."""

    @property
    def num_available(self) -> int:
        """Pages that ``allocate`` can give: free ones and those that can be evicted."""
        return len(self._free) + len(self._unheld)

    def find(self, name: bytes) -> int | None:
        """Return the page of this name."""
        return self._page_of.get(name)

    def is_pending(self, page: int) -> bool:
        """Tell whether the page is named but not yet computed."""
        return page in self._pending

    def is_held(self, page: int) -> bool:
        """Tell whether a sequence holds the page."""
        return self._num_holders[page] > 0

    def allocate(self) -> int:
        """Give an unnamed page to one holder; there must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._unheld.popitem(last=False)
            self._forget(page)
        self._num_holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """Add a holder to a named page."""
        self._unheld.pop(page, None)
        self._num_holders[page] += 1

    def name(self, page: int, name: bytes, *, is_pending: bool) -> None:
        """Make the page findable, unless it or another one has the name already."""
        if name not in self._page_of:
            self._page_of[name] = page
            self._name_of[page] = name
            if is_pending:
                self._pending.add(page)

    def mark_computed(self, page: int) -> None:
        """Let sequences that wait for the page have it."""
        self._pending.discard(page)

    def release(self, pages: Sequence[int]) -> None:
        """Take one holder away from each page of a sequence, given from its first page on.

        Later pages become older: without them the earlier ones still serve, never the reverse.
        A page that is still pending will not be computed, so it loses its name.
        """
        for page in reversed(pages):
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            if page in self._pending:
                self._forget(page)
            if page in self._name_of:
                self._unheld[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        del self._page_of[self._name_of.pop(page)]
        self._pending.discard(page)


def kv_pool(config: TextConfig, num_slots: int, like: Tensor) -> Tensor:
    """Return storage [Y, slots, L + R] in the dtype and on the device of ``like``."""
    width = config.kv_lora_rank + config.qk_rope_head_dim
    shape = (config.num_hidden_layers, num_slots, width)
    return torch.zeros(shape, dtype=like.dtype, device=like.device)


def bytes_per_token(config: TextConfig, dtype: torch.dtype) -> int:
    """Memory of one token: ``layers * (L + R)`` numbers.

    >>> from swarm_sdk.model_backend.model.config import nano
    >>> bytes_per_token(nano().text_config, torch.float32)
    4480
    """
    width = config.kv_lora_rank + config.qk_rope_head_dim
    return config.num_hidden_layers * width * dtype.itemsize
