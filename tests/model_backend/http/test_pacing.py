"""Calls in flight shrink with an overload and grow again, for the whole process."""

import time

import anyio
import anyio.lowlevel
import pytest
from aiohttp import web

from swarm_sdk.errors import ModelError
from swarm_sdk.model_backend.http import Retry, ServerClient
from swarm_sdk.model_backend.pacing import Pace


def test_an_overload_halves_what_is_in_flight_once_for_the_calls_of_one_round():
    async def main():
        pace = Pace(first_limit=64)
        began = [await pace.enter() for _ in range(40)]
        for one in began:
            pace.overloaded(one, 0.0)
        assert (pace.limit, pace.num_cuts) == (20, 1)
        for _ in began:
            pace.leave()
        late = await pace.enter()
        pace.overloaded(late, 0.0)
        assert (pace.limit, pace.num_cuts) == (1, 2)
        pace.leave()
        for _ in range(10_000):
            pace.answered()
        assert pace.limit == 64

    anyio.run(main)


def test_calls_wait_in_order_and_a_cancelled_one_leaves_the_queue():
    async def main():
        pace = Pace(first_limit=1)
        order = []

        async def one(name, scope=None):
            if scope is not None:
                with scope:
                    await pace.enter()
                    pace.leave()
                    order.append(f"{name} ran")
                return
            await pace.enter()
            order.append(name)
            await anyio.sleep(0.01)
            pace.leave()

        scope = anyio.CancelScope()
        async with anyio.create_task_group() as group:
            group.start_soon(one, "a")
            await anyio.lowlevel.checkpoint()
            group.start_soon(one, "b", scope)
            group.start_soon(one, "c")
            group.start_soon(one, "d")
            await anyio.sleep(0.002)
            assert pace.num_waiting == 3
            scope.cancel()
        assert order == ["a", "c", "d"]
        assert (pace.num_in_flight, pace.num_waiting) == (0, 0)

    anyio.run(main)


def test_nothing_starts_before_retry_after_is_over():
    async def main():
        pace = Pace()
        began = await pace.enter()
        pace.overloaded(began, 0.1)
        pace.leave()
        started = time.monotonic()
        await pace.enter()
        assert time.monotonic() - started >= 0.09
        pace.leave()

    anyio.run(main)


@pytest.mark.parametrize("status", [429, 503])
def test_a_server_that_takes_ten_at_a_time_gets_all_calls_through(status):
    in_flight = most = num_refused = 0

    async def answer(request):
        nonlocal in_flight, most, num_refused
        in_flight += 1
        most = max(most, in_flight)
        try:
            if in_flight > 10:
                num_refused += 1
                return web.json_response({}, status=status)
            await anyio.sleep(0.01)
            return web.json_response({"ok": True})
        finally:
            in_flight -= 1

    async def main():
        app = web.Application()
        app.router.add_post("/x", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        clients = [ServerClient(url), ServerClient(url)]
        retry = Retry(attempts=20, first_wait_s=0.01, longest_wait_s=0.05)
        answers = []

        async def call(client):
            answers.append(await retry.run(lambda: client.post("/x", {}, is_paced=True)))

        async with anyio.create_task_group() as group:
            for index in range(300):
                group.start_soon(call, clients[index % 2])
        pace = Pace.of(url)
        assert pace.num_cuts > 0
        assert pace.limit < 64
        for client in clients:
            await client.aclose()
        await runner.cleanup()
        return answers

    answers = anyio.run(main)
    assert len(answers) == 300
    assert most > 10
    # 290 at first sight and half of that each round; without a pace some 4,000.
    assert num_refused < 1000


def test_a_failed_call_gives_its_place_back():
    async def main():
        client = ServerClient("http://127.0.0.1:9")
        with pytest.raises(ModelError):
            await client.post("/x", {}, is_paced=True)
        assert Pace.of("http://127.0.0.1:9").num_in_flight == 0
        await client.aclose()

    anyio.run(main)


@pytest.mark.anyio
async def test_a_call_that_controls_the_server_waits_for_no_place_and_takes_none(wire):
    goes_on = anyio.Event()

    async def sample(request):
        if goes_on.is_set():
            return web.json_response({"ok": True})
        if len(server.bodies) == 1:
            return web.json_response({}, status=503, headers={"Retry-After": "600"})
        await goes_on.wait()
        return web.json_response({"ok": True})

    async with wire.serving(sample) as server:
        client = ServerClient(server.base_url)
        pace = Pace.of(server.base_url)

        async def call():
            await client.post("/generate", {}, is_paced=True)

        with pytest.raises(ModelError):
            await call()
        pace._paused_until_s = 0.0
        server.asked.clear()
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(call)
            with anyio.fail_after(2):
                await server.asked.wait()
                assert (pace.num_in_flight, pace.num_waiting) == (1, 2)
                server.steps = [wire.replies({}, status=503)]
                with pytest.raises(ModelError, match="503"):
                    await client.command("/abort_request", {})
                server.steps = [wire.replies({})]
                await client.post("/abort_request", {})
            assert (pace.num_in_flight, pace.num_waiting, pace.num_cuts) == (1, 2, 1)
            server.steps = [sample]
            goes_on.set()
        await client.aclose()
