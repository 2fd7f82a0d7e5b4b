"""One time limit for many calls, at the cost of a dictionary entry each.

All calls have the same limit, so the first to begin is the first to be over: one timer serves
them all, and a call that ends in time never touches it.
"""

from __future__ import annotations

import asyncio


class TimedCall:
    """A call that may run for a limited time, in the task that began it."""

    __slots__ = ("_num_cancels", "_task", "deadline_s", "is_expired")

    def __init__(self, deadline_s: float) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._num_cancels = task.cancelling()
        self.deadline_s: float = deadline_s
        self.is_expired: bool = False

    def expire(self) -> None:
        """Cancel the call."""
        self.is_expired = True
        self._task.cancel()

    def is_only_cause(self) -> bool:
        """Take back the cancellation by ``expire``; whether nobody else cancelled the task."""
        return self._task.uncancel() <= self._num_cancels


class Deadlines:
    """The calls that run now, the first to begin first."""

    def __init__(self, limit_s: float | None) -> None:
        """``limit_s`` is the time of each call; ``None`` sets no limit."""
        self.limit_s: float | None = limit_s
        self._running: dict[TimedCall, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> TimedCall | None:
        """Limit a call of the current task from now on; ``None`` without a limit."""
        if self.limit_s is None:
            return None
        loop = asyncio.get_running_loop()
        call = TimedCall(loop.time() + self.limit_s)
        self._running[call] = None
        if self._timer is None:
            self._timer = loop.call_at(call.deadline_s, self._expire)
        return call

    def end(self, call: TimedCall) -> None:
        """The call is over, however it ended."""
        self._running.pop(call, None)

    def _expire(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        now_s = loop.time()
        for call in tuple(self._running):
            if call.deadline_s > now_s:
                self._timer = loop.call_at(call.deadline_s, self._expire)
                return
            del self._running[call]
            call.expire()

    def close(self) -> None:
        """Stop the timer; calls that still run have no limit any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
