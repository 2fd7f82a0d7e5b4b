"""Places: never more inside than there are, in order, and none is lost by a cancel."""

import random

import anyio
import anyio.lowlevel
import pytest

from swarm_sdk.runtime.places import Places


@pytest.mark.parametrize("seed", range(20))
def test_places_hold_and_none_is_lost_whoever_is_cancelled(seed: int) -> None:
    rng = random.Random(seed)
    inside = most = num_done = 0

    async def main() -> None:
        nonlocal inside, most, num_done
        places = Places(3)

        async def one(limit_s: float) -> None:
            nonlocal inside, most, num_done
            with anyio.move_on_after(limit_s):
                async with places:
                    inside += 1
                    most = max(most, inside)
                    try:
                        await anyio.sleep(rng.uniform(0, 0.004))
                    finally:
                        inside -= 1
                num_done += 1

        async with anyio.create_task_group() as group:
            for _ in range(60):
                group.start_soon(one, rng.choice((0.0, 0.002, 0.01, 5)))
        assert (inside, places.num_waiting, places.is_free) == (0, 0, True)
        for _ in range(3):
            await places.__aenter__()
        assert not places.is_free

    anyio.run(main)
    assert 0 < num_done <= 60
    assert most == 3


def test_who_waits_longest_is_next() -> None:
    order: list[int] = []

    async def main() -> None:
        places = Places(1)

        async def one(index: int) -> None:
            async with places:
                order.append(index)
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            for index in range(10):
                group.start_soon(one, index)

    anyio.run(main)
    assert order == list(range(10))
