"""How many calls sample at one server, for the whole process: grown slowly, cut at once.

    every answer          limit += 1 / limit                 (about one more each round of calls)
    429, 503              limit  = max(1, limit * 0.5)       once a round: at most once for the
                          and nothing starts before Retry-After       calls that were in flight

This is TCP's additive increase and multiplicative decrease. Calls wait in the order in which they
came. Without overload the limit never binds, and passing it costs a comparison. Calls that control
the server pass by: one that lets a paused server go on must not wait for those that it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from contextlib import suppress
from typing import ClassVar
from weakref import WeakKeyDictionary

FIRST_LIMIT = 4_096.0
"""Calls in flight before the first word of an overload: above what one process sends."""
SHRINK = 0.5
LONGEST_PAUSE_S = 30.0
"""What a server may ask of all calls at most; the call that it told so waits as long as it said."""


class Pace:
    """The calls of this process that sample at one server."""

    _known: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Pace]]] = (
        WeakKeyDictionary()
    )
    """By event loop, since futures belong to one; a process has one, save in scripts and tests."""

    def __init__(self, first_limit: float = FIRST_LIMIT) -> None:
        self.limit: float = first_limit
        """How many calls may be in flight."""
        self.num_in_flight: int = 0
        self.num_cuts: int = 0
        """How often the limit was cut."""
        self._first_limit = first_limit
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._cut_at_s = -1.0
        self._paused_until_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def of(cls, server: str) -> Pace:
        """The pace of a server, the same for all clients of the running event loop."""
        paces = cls._known.setdefault(asyncio.get_running_loop(), {})
        return paces.setdefault(server, cls())

    @property
    def num_waiting(self) -> int:
        """Calls that wait for their turn."""
        return len(self._waiting)

    async def enter(self) -> float:
        """Wait for a place; returns when the call began, for ``overloaded``."""
        now_s = time.monotonic()
        if self._waiting or self.num_in_flight >= self.limit or now_s < self._paused_until_s:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            self._admit()
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self.leave()  # it had got the place already
                else:
                    with suppress(ValueError):  # passed over already, for it was cancelled
                        self._waiting.remove(turn)
                raise
            return time.monotonic()
        self.num_in_flight += 1
        return now_s

    def leave(self) -> None:
        """Give the place back."""
        self.num_in_flight -= 1
        if self._waiting:
            self._admit()

    def answered(self) -> None:
        """Grow after an answer."""
        if self.limit < self._first_limit:
            self.limit = min(self._first_limit, self.limit + 1 / self.limit)

    def overloaded(self, began_s: float, retry_after_s: float) -> None:
        """Shrink after an overload that met a call which began at ``began_s``."""
        now_s = time.monotonic()
        pause_s = min(retry_after_s, LONGEST_PAUSE_S)
        self._paused_until_s = max(self._paused_until_s, now_s + pause_s)
        if began_s < self._cut_at_s:
            return  # this call was on its way when the limit was cut
        self.limit = max(1.0, min(self.limit, float(self.num_in_flight)) * SHRINK)
        self._cut_at_s = now_s
        self.num_cuts += 1

    def _admit(self) -> None:
        wait_s = self._paused_until_s - time.monotonic()
        if wait_s > 0:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._after_pause)
            return
        while self._waiting and self.num_in_flight < max(1.0, self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.num_in_flight += 1
                turn.set_result(None)

    def _after_pause(self) -> None:
        self._timer = None
        self._admit()
