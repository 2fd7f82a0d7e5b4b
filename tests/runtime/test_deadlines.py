"""One timer for many calls that have the same time limit."""

import asyncio

import anyio
import pytest

from swarm_sdk.runtime.deadlines import Deadlines


async def within(deadlines: Deadlines, seconds: float) -> str:
    timed = deadlines.begin()
    assert timed is not None
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        if timed.is_expired and timed.is_only_cause():
            return "late"
        raise
    finally:
        deadlines.end(timed)
    return "in time"


def test_calls_that_take_too_long_are_stopped_and_the_others_are_not() -> None:
    async def main() -> list[str]:
        deadlines = Deadlines(0.05)
        late = asyncio.create_task(within(deadlines, 30.0))
        await asyncio.sleep(0.03)
        later = asyncio.create_task(within(deadlines, 30.0))
        quick = asyncio.create_task(within(deadlines, 0.001))
        return await asyncio.gather(late, later, quick)

    assert anyio.run(main) == ["late", "late", "in time"]


def test_a_call_that_somebody_else_cancels_too_is_cancelled() -> None:
    async def main() -> None:
        deadlines = Deadlines(0.01)
        timed = deadlines.begin()
        assert timed is not None
        task = asyncio.current_task()
        assert task is not None
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(30.0)
        task.cancel()
        assert timed.is_expired
        assert not timed.is_only_cause()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.sleep(0)
        task.uncancel()

    anyio.run(main)


def test_without_a_limit_nothing_is_timed_and_a_closed_timer_stops_nothing() -> None:
    async def main() -> str:
        assert Deadlines(None).begin() is None
        deadlines = Deadlines(0.01)
        running = asyncio.create_task(within(deadlines, 0.05))
        await asyncio.sleep(0)
        deadlines.close()
        deadlines.close()
        return await running

    assert anyio.run(main) == "in time"
