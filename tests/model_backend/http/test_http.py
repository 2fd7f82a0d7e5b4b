"""Faults of a real server on the loopback: what is tried again, and what the error says."""

import asyncio
import json
import socket
import struct
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import anyio
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.http import Retry, ServerClient, context_overflow
from swarm_sdk.model_backend.pacing import Pace

QUICK = Retry(attempts=4, first_wait_s=0.01, longest_wait_s=0.02)
PATH = "/v1/chat/completions"


async def post(server, retry=QUICK, **settings):
    client = ServerClient(server.base_url, **settings)
    try:
        return await retry.run(lambda: client.post(PATH, {"n": 1}))
    finally:
        await client.aclose()


async def reset(request: web.Request) -> web.StreamResponse:
    """Close the connection with RST, unread data and all."""
    raw = request.transport.get_extra_info("socket")
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    request.transport.abort()
    return web.Response()


async def cut_body(request: web.Request) -> web.StreamResponse:
    """Promise 1000 bytes, send 13."""
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"choices": [')
    request.transport.close()
    return response


async def half_json(request: web.Request) -> web.StreamResponse:
    return web.Response(body=b'{"choices": [')


async def hang(request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(60)
    raise AssertionError("nobody cancelled")


@pytest.mark.anyio
@pytest.mark.parametrize("fault", [reset, cut_body, half_json])
async def test_a_broken_answer_is_asked_for_again(wire, fault):
    async with wire.serving(fault, fault, wire.replies({"ok": 1})) as server:
        assert await post(server) == {"ok": 1}
    assert len(server.bodies) == 3


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (reset, "broke before the answer was complete"),
        (cut_body, "broke before the answer was complete"),
        (half_json, "sent an answer that is not JSON"),
    ],
)
async def test_a_broken_answer_is_retryable_and_says_what_broke(wire, fault, sentence):
    async with wire.serving(fault) as server:
        with pytest.raises(ModelError, match=sentence) as caught:
            await post(server)
    assert caught.value.retryable
    assert len(server.bodies) == 4


@pytest.mark.anyio
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_passing_status_is_tried_until_the_tries_are_used_up(wire, status):
    async with wire.serving(wire.replies({"detail": "busy"}, status=status)) as server:
        with pytest.raises(ModelError, match=f"answered {status}: busy") as caught:
            await post(server)
    assert (caught.value.status, caught.value.retryable) == (status, True)
    assert len(server.bodies) == 4


@pytest.mark.anyio
@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 501])
async def test_a_lasting_status_is_not_tried_again(wire, status):
    body = {"error": {"message": "wrong\n  key"}}
    async with wire.serving(wire.replies(body, status=status)) as server:
        with pytest.raises(ModelError, match=f"answered {status}: wrong key$") as caught:
            await post(server)
    assert (caught.value.status, caught.value.retryable) == (status, False)
    assert len(server.bodies) == 1


@pytest.mark.anyio
async def test_a_spent_quota_is_not_tried_again(wire):
    body = {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}
    async with wire.serving(wire.replies(body, status=429)) as server:
        with pytest.raises(ModelError, match="quota"):
            await post(server)
    assert len(server.bodies) == 1


@pytest.mark.anyio
async def test_retry_after_is_waited_for(wire):
    busy = wire.replies({}, status=429, Retry_After="0.4")
    async with wire.serving(busy, wire.replies({"ok": 1})) as server:
        start_s = anyio.current_time()
        assert await post(server) == {"ok": 1}
        assert anyio.current_time() - start_s >= 0.4


@pytest.mark.anyio
async def test_a_retry_after_beyond_the_total_time_gives_up_at_once(wire):
    at = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    async with wire.serving(wire.replies({}, status=503, Retry_After=at)) as server:
        start_s = anyio.current_time()
        with pytest.raises(ModelError, match="answered 503: Service Unavailable"):
            await post(server, Retry(total_s=5.0))
        assert anyio.current_time() - start_s < 2
    assert len(server.bodies) == 1


@pytest.mark.anyio
async def test_a_server_that_is_not_there_is_named(wire):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        client = ServerClient(url)
        with pytest.raises(ModelError, match=f"no server answers at {url}; start it") as caught:
            await client.post(PATH, {})
        await client.aclose()
    assert caught.value.retryable


@pytest.mark.anyio
async def test_a_silent_server_is_given_up_after_the_timeout(wire):
    async with wire.serving(hang) as server:
        with pytest.raises(ModelError, match=r"gave no answer within 0\.1 s") as caught:
            await post(server, Retry(attempts=1), timeout_s=0.1)
    assert caught.value.retryable


@pytest.mark.anyio
async def test_the_server_sees_the_disconnect_of_a_cancelled_call(wire):
    async with wire.serving(hang) as server:
        with anyio.move_on_after(0.2) as scope:
            await post(server)
        assert scope.cancelled_caught
        with anyio.fail_after(2):
            await server.disconnected.wait()


@pytest.mark.anyio
async def test_calls_one_after_another_share_a_connection(wire):
    async with wire.serving(wire.replies({})) as server:
        client = ServerClient(server.base_url)
        for _ in range(3):
            await client.post(PATH, {})
        await client.aclose()
    assert len(server.remotes) == 1


@pytest.mark.anyio
async def test_closing_sends_neither_what_runs_again_nor_what_waits_for_its_turn(wire):
    async with wire.serving(wire.replies({}), hang) as server:
        client = ServerClient(server.base_url)
        await client.post(PATH, {})  # so that the next goes over a connection that was kept
        Pace.of(server.base_url).limit = 1.0
        num_ended = 0

        async def call() -> None:
            nonlocal num_ended
            with pytest.raises(ModelError, match="broke before the answer was complete"):
                await client.post(PATH, {}, is_paced=True)
            num_ended += 1

        with anyio.fail_after(2):
            async with anyio.create_task_group() as tasks:
                server.asked.clear()
                for _ in range(2):
                    tasks.start_soon(call)
                await server.asked.wait()
                await client.aclose()
    assert num_ended == 2
    assert len(server.bodies) == 2


@pytest.mark.anyio
async def test_the_limit_of_connections_holds(wire):
    running = most = 0

    async def count(request: web.Request) -> web.StreamResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return web.json_response({})

    async with wire.serving(count) as server:
        client = ServerClient(server.base_url, max_connections=2)
        async with anyio.create_task_group() as tasks:
            for _ in range(6):
                tasks.start_soon(client.post, PATH, {})
        await client.aclose()
    assert most == 2


def test_a_client_outlives_its_event_loop(wire):
    client = ServerClient("http://127.0.0.1:1")

    async def one_loop() -> None:
        async with wire.serving(wire.replies({"ok": 1})) as server:
            client.base_url = server.base_url
            assert await client.post(PATH, {}) == {"ok": 1}
            await client.aclose()

    anyio.run(one_loop)
    anyio.run(one_loop)


@pytest.mark.parametrize(
    ("settings", "url"),
    [({"timeout_s": 0.0}, "http://h"), ({"max_connections": -1}, "http://h"), ({}, "h:80")],
)
def test_wrong_settings_are_refused_at_once(settings, url):
    with pytest.raises(ConfigError):
        ServerClient(url, **settings)
    with pytest.raises(ConfigError):
        Retry(attempts=0)


OVERFLOWS = """\
The input ({p} tokens) is longer than the model's context length ({m} tokens).
Input length ({p} tokens) exceeds the maximum allowed length ({m} tokens). Use a shorter input or \
enable --allow-auto-truncate.
Requested token count exceeds the model's maximum context length of {m} tokens. You requested a \
total of 99999999 tokens: {p} tokens from the input messages and 5 tokens for the completion.
This model's maximum context length is {m} tokens. However, your messages resulted in {p} tokens. \
Please reduce the length of the messages.
This model's maximum context length is {m} tokens. However, you requested 99999999 tokens ({p} in \
the messages, 5 in the completion).
max_tokens is too large: 5. This model's maximum context length is {m} tokens and your request has \
{p} input tokens.
Invalid request: Your request exceeded model token limit: {m} (requested: {p})
{{"error": {{"message": "too long for the context", "n_prompt_tokens": {p}, "n_ctx": {m}}}}}
""".splitlines()


@given(st.sampled_from(OVERFLOWS), st.integers(1, 10**7), st.integers(1, 10**7))
def test_the_numbers_of_an_overflow_are_read_from_every_known_wording(text, prompt, limit):
    found = context_overflow(text.format(p=prompt, m=limit))
    assert isinstance(found, ContextOverflow)
    assert (found.num_prompt_tokens, found.limit_tokens) == (prompt, limit)


@given(st.text())
def test_other_messages_are_no_overflow(text):
    assert context_overflow(json.dumps({"error": f"no such model: {text}"})) is None
