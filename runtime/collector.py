"""Python's cycle collector, asked less often while episodes run.

An episode of thousands of agents is a large heap that lives; at the default threshold it is walked
again for every 700 new objects: a third of the time of an episode with 5,000 sub-agents. While any
episode of the process runs, the threshold is ``THRESHOLD`` instead; an app that has set a higher
one, or turned the collector off, is left alone.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLD = 100_000
"""New objects that may be cyclic garbage: some 10 MiB. At 20,000 the collector took 17 % of an
episode with 5,000 sub-agents, here 7 %."""

_guard = threading.Lock()
_num_running = 0
_before: tuple[int, int, int] | None = None


@contextmanager
def relaxed_collector() -> Iterator[None]:
    """Raise the threshold inside; the last to leave puts it back as it was."""
    global _num_running, _before  # noqa: PLW0603 - the collector is the process's own
    with _guard:
        _num_running += 1
        if _num_running == 1 and 0 < gc.get_threshold()[0] < THRESHOLD:
            _before = gc.get_threshold()
            gc.set_threshold(THRESHOLD, 20, _before[2] or 10)
    try:
        yield
    finally:
        with _guard:
            _num_running -= 1
            if _num_running == 0 and _before is not None:
                gc.set_threshold(*_before)
                _before = None
