"""What a cell says, capped before it leaves the kernel.

print ──> CappedStream ──> Meter ─ first 64 Ki characters ──> sent
                                 ─ then the last 16 Ki ─────> held, sent when the cell shows
                                                              something else or ends
                                 ─ between ────────────────> counted
                                 ─ past the limit ─────────> OutputLimit in the cell
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

from ipykernel.iostream import OutStream

MAX_HEAD = 2**16
MAX_TAIL = 2**14
CUT_TYPE = "application/x-swarm-cut"


class OutputLimit(BaseException):
    """Raised inside a cell that printed more than it may; no ``except Exception`` stops it."""


class Meter:
    """Counts the characters of one cell over all streams."""

    def __init__(self) -> None:
        self.max_chars: int = 2**24
        self.tell_cut: Callable[[int], None] = lambda _: None
        self.num_shown: int = 0
        """Pictures and values shown."""
        self._lock = threading.RLock()
        self.begin()

    def begin(self) -> None:
        """Forget the last cell."""
        with self._lock:
            self._num_chars = 0
            self._num_cut = 0
            self._tail: list[tuple[Any, str]] = []
            self._num_tail = 0
            self.num_shown = 0

    @property
    def is_over(self) -> bool:
        """Whether the cell printed more than it may."""
        return self._num_chars > self.max_chars

    def take(self, stream: Any, text: str) -> str:
        """What of ``text`` is sent at once; the rest is held or counted."""
        with self._lock:
            room = max(0, MAX_HEAD - self._num_chars)
            self._num_chars += len(text)
            rest = text[room:]
            if rest:
                if len(rest) > MAX_TAIL:
                    self._num_cut += len(rest) - MAX_TAIL
                    rest = rest[-MAX_TAIL:]
                self._tail.append((stream, rest))
                self._num_tail += len(rest)
                while self._num_tail - len(self._tail[0][1]) >= MAX_TAIL:
                    dropped = len(self._tail.pop(0)[1])
                    self._num_cut += dropped
                    self._num_tail -= dropped
            return text[:room]

    def release(self) -> None:
        """Send what is held, after the count of what is not."""
        with self._lock:
            tail, cut = self._tail, self._num_cut
            self._tail, self._num_tail, self._num_cut = [], 0, 0
        if cut:
            self.tell_cut(cut)
        for stream, text in tail:
            stream.write_uncounted(text)


METER = Meter()


class CappedStream(OutStream):
    """``sys.stdout`` and ``sys.stderr`` of a sandboxed kernel."""

    def write(self, string: str) -> int | None:  # type: ignore[override]
        """Write, within the cell's allowance."""
        if isinstance(string, str) and os.getpid() == self._master_pid:
            string = sendable(string)
            now = METER.take(self, string)
            if METER.is_over and threading.current_thread() is threading.main_thread():
                raise OutputLimit(f"the cell printed more than {METER.max_chars} characters")
            if not now and string:
                return len(string)
            super().write(now)
            return len(string)
        return super().write(string)

    def flush(self) -> None:
        """Send what waits; where nothing does, cost nothing (a flush wakes another thread)."""
        if self._buffers or os.getpid() != self._master_pid:
            super().flush()

    def write_uncounted(self, text: str) -> None:
        """Write what was counted before."""
        super().write(text)


def clipped(text: str, max_chars: int = MAX_HEAD) -> str:
    """Head and tail of a text that is longer than ``max_chars``."""
    text = sendable(text)
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters cut]\n{text[-half:]}"


def sendable(text: str) -> str:
    """``text`` as UTF-8 can hold it: a message with half a surrogate pair would be lost whole."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
