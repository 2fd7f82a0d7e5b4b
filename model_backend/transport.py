"""HTTP/1.1 to one server, as little of it as JSON calls need: request, response, kept connections.

    Pool.request ──> a kept connection, or a new one ──> bytes out ──> httptools parses what comes
                                                                            back ──> Response

A call waits for nothing but the server: it is one write and one future. A connection that the
server had closed while it was kept is found out by its first call, which is then made once more on
a new one. Redirects, cookies, proxies and compressed bodies are not followed, kept, used or asked
for: a model server has none.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import httptools

CONNECT_S = 10.0
"""Seconds to open a connection, TLS included."""
OK, SWITCHING, NO_CONTENT, NOT_MODIFIED = 200, 101, 204, 304
OnBody = Callable[[bytes], None]


class BrokenConnection(Exception):
    """Raised if a connection ends, or sends what is no HTTP, before a response is complete."""


class CannotConnect(Exception):
    """Raised if no connection could be opened; the cause says why."""


@dataclass(slots=True)
class Response:
    """One complete response."""

    status: int
    reason: str
    headers: dict[str, str]
    """Names in lower case; of several with one name the last."""
    body: bytes


class Connection(asyncio.Protocol):
    """One connection, with one request at a time."""

    def __init__(self) -> None:
        self.is_open: bool = False
        self.is_used: bool = False
        """Whether it has carried a response already."""
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[Response] | None = None
        self._on_body: OnBody | None = None
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self._reason = b""
        self._has_head = False
        self._has_bytes = False

    async def request(self, content: bytes, on_body: OnBody | None = None) -> Response:
        """Send a whole request and wait for its response.

        The parts of a body whose status is 200 go to ``on_body``, if given, as they come; the
        response's own is empty then.

        Raises:
            BrokenConnection: it ended first; ``args[1]`` tells whether any byte had come back.
        """
        if self._transport is None or not self.is_open:
            raise BrokenConnection("closed", False)  # noqa: FBT003 - as in _fail
        self._on_body = on_body
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(content)
        try:
            response = await self._answer
        except BaseException:
            self.abort()  # cancelled, or broken: what would come belongs to nobody
            raise
        finally:
            self._answer = self._on_body = None
        self.is_used = True
        return response

    def abort(self) -> None:
        """Close at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()

    # -- what the event loop tells --

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.is_open = True

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self._answer is None:  # nobody asked: the server breaks the protocol
            self.abort()
            return
        self._has_bytes = True
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"no HTTP: {error}")
        if not self.is_open and self._transport is not None:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the call that waits, if any; a body without a length ends with the connection."""
        self.is_open = False
        is_until_close = (
            exc is None
            and self._has_head
            and "content-length" not in self._headers
            and "chunked" not in self._headers.get("transfer-encoding", "")
        )
        if is_until_close:
            self._complete()
        else:
            self._fail(str(exc or "closed by the server"))

    # -- what the parser tells --

    def on_message_begin(self) -> None:
        """Give the connection up if this message answers nobody: the next call would get it."""
        if self._answer is None or self._answer.done():
            self.is_open = False

    def on_status(self, status: bytes) -> None:
        """Keep the reason phrase, which may come in parts."""
        self._reason += status

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """Note that the head is there; an interim response (1xx) is followed by the real one."""
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        """Keep a part of the body, or pass it on."""
        if self._on_body is not None and self._parser.get_status_code() == OK:
            self._on_body(body)
        else:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """Hand the response over."""
        if self._parser.get_status_code() < 200 and self._parser.get_status_code() != SWITCHING:
            self._headers, self._body, self._reason, self._has_head = {}, [], b"", False
            return
        if not self._parser.should_keep_alive():
            self.is_open = False
        self._complete()

    def _complete(self) -> None:
        answer = self._answer
        if answer is None or answer.done():
            return
        body = self._body
        response = Response(
            self._parser.get_status_code(),
            self._reason.decode("latin-1"),
            self._headers,
            body[0] if len(body) == 1 else b"".join(body),
        )
        self._begin()
        answer.set_result(response)

    def _fail(self, why: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(BrokenConnection(why, self._has_bytes))
        self.abort()


class Pool:
    """The connections of one event loop to one server."""

    def __init__(
        self, host: str, port: int, *, tls: ssl.SSLContext | None, max_connections: int = 0
    ) -> None:
        """Connect to nothing yet; ``max_connections`` = 0 sets no bound."""
        self._host, self._port, self._tls = host, port, tls
        self._kept: deque[Connection] = deque()
        self._busy: set[Connection] = set()
        self._is_closed = False
        self._places = asyncio.Semaphore(max_connections) if max_connections else None

    async def request(self, content: bytes, on_body: OnBody | None = None) -> Response:
        """Send a whole request and wait for its response; ``on_body`` as ``Connection.request``.

        Raises:
            CannotConnect: the server does not answer at its address.
            BrokenConnection: the response did not come to its end, or the pool is closed.
        """
        if self._places is None:
            return await self._request(content, on_body)
        async with self._places:
            return await self._request(content, on_body)

    async def _request(self, content: bytes, on_body: OnBody | None) -> Response:
        while True:
            connection = self._take() or await self._connect()
            if self._is_closed:
                connection.abort()
                raise BrokenConnection("closed", False)  # noqa: FBT003 - as Connection._fail
            self._busy.add(connection)
            try:
                response = await connection.request(content, on_body)
            except BrokenConnection as error:
                has_bytes = error.args[1]
                if connection.is_used and not has_bytes:
                    continue  # the server had closed it while it was kept
                raise
            finally:
                self._busy.discard(connection)
            if connection.is_open:
                self._kept.append(connection)
            return response

    def _take(self) -> Connection | None:
        while self._kept:
            connection = self._kept.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await loop.create_connection(
                    Connection,
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._tls is not None else None,
                )
        except OSError as error:  # refused, no such host, a certificate, out of time
            raise CannotConnect(str(error)) from error
        return connection

    def close(self) -> None:
        """Close all connections; calls that run fail, and none is made any more."""
        self._is_closed = True
        for connection in (*self._kept, *self._busy):
            connection.abort()
        self._kept.clear()
