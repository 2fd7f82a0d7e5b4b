"""The transport against raw servers: every way in which a response can come, and not come."""

import asyncio
import random

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.model_backend.http import ServerClient
from swarm_sdk.model_backend.transport import BrokenConnection, Connection, Pool

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"ok":1}'


class RawServer:
    """Sends bytes as they are told: one list of pieces a request; ``None`` closes."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.num_connections = 0

    async def serve(self, reader, writer):
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
                self.requests.append((head, await reader.readexactly(length)))
                pieces = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                for piece in pieces:
                    if piece is None:
                        return
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


def ask(server, num_calls=1, path="/x", **how):
    async def main():
        running = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        port = running.sockets[0].getsockname()[1]
        client = ServerClient(f"http://127.0.0.1:{port}", **how)
        try:
            with anyio.fail_after(10):
                return [await client.post(path, {"n": index}) for index in range(num_calls)]
        finally:
            await client.aclose()
            running.close()
            await asyncio.sleep(0.01)

    return anyio.run(main)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "pieces",
    [
        [OK],
        [OK[:9], OK[9:30], OK[30:]],
        [bytes([byte]) for byte in OK],
        [CHUNKED + b'3\r\n{"o\r\n5\r\nk":1}\r\n0\r\n\r\n'],
        [CHUNKED, b'3\r\n{"o\r\n', b'5\r\nk":1}\r\n', b"0\r\nX-Sum: 1\r\n\r\n"],
        [b'HTTP/1.1 200 OK\r\n\r\n{"ok"', b":1}", None],
        [b'HTTP/1.0 200 OK\r\n\r\n{"ok":1}', None],
        [b"HTTP/1.1 100 Continue\r\n\r\n", OK],
        [b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 8\r\n\r\n{"ok":1}', None],
    ],
)
def test_a_response_is_read_in_every_form_and_in_any_pieces(pieces):
    assert ask(RawServer(pieces), num_calls=3) == [{"ok": 1}] * 3


@pytest.mark.parametrize(
    "pieces",
    [
        [None],
        [OK[:-1], None],
        [OK[:20], None],
        [CHUNKED + b'3\r\n{"o\r\n', None],
        [b"no HTTP at all\r\n\r\n"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"],
    ],
)
def test_a_response_that_is_cut_or_no_http_is_a_broken_connection(pieces):
    with pytest.raises(ModelError, match="broke before the answer was complete") as caught:
        ask(RawServer(pieces))
    assert caught.value.retryable


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 5))
def test_any_bytes_at_all_end_the_call(noise, seed):
    cuts = random.Random(seed)
    pieces = [noise[i : i + cuts.randint(1, 99)] for i in range(0, len(noise), 99)] or [b""]
    try:
        ask(RawServer([*pieces, None]))
    except ModelError:
        return


def test_a_connection_that_the_server_closed_while_it_was_kept_costs_no_call():
    server = RawServer([OK, None])
    assert ask(server, num_calls=4) == [{"ok": 1}] * 4
    assert server.num_connections == 4


def test_kept_connections_are_used_again():
    server = RawServer([OK])
    assert len(ask(server, num_calls=5)) == 5
    assert server.num_connections == 1


def test_what_a_server_sends_unasked_never_answers_a_later_call():
    server = RawServer([OK + OK], [b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"ok":2}'])
    assert ask(server, num_calls=2) == [{"ok": 1}, {"ok": 2}]
    assert server.num_connections == 2


def test_a_request_says_where_to_and_who_asks():
    server = RawServer([OK])
    ask(server, path="/v1/ü x", api_key="secret")
    head, body = server.requests[0]
    assert head.startswith(b"POST /v1/%C3%BC%20x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nAuthorization: Bearer secret\r\n" in head
    assert body == b'{"n":0}'


@pytest.mark.parametrize("key", ["a\r\nX-Evil: 1", "schlüssel", "a\x00b"])
def test_a_key_that_would_break_the_header_is_refused(key):
    with pytest.raises(ConfigError, match="no HTTP header"):
        ServerClient("http://h", api_key=key)


def test_a_redirect_is_an_error_that_says_so():
    moved = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /y\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(ModelError, match="answered 307: Temporary Redirect"):
        ask(RawServer([moved]))


def test_closing_the_pool_ends_the_calls_that_run():
    async def main():
        running = await asyncio.start_server(RawServer([b""]).serve, "127.0.0.1", 0)
        pool = Pool("127.0.0.1", running.sockets[0].getsockname()[1], tls=None)
        call = asyncio.ensure_future(
            pool.request(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        )
        await asyncio.sleep(0.05)
        pool.close()
        with pytest.raises(BrokenConnection):
            await call
        running.close()

    anyio.run(main)


def test_a_connection_that_was_never_made_takes_no_request():
    async def main():
        with pytest.raises(BrokenConnection):
            await Connection().request(b"")

    anyio.run(main)
