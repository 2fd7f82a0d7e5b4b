"""The only way out of a sandbox: a proxy that this process owns.

    code ──> 127.0.0.1:3128 of its own network ──> our socket ─ host on the list? ─ no ──> 403
                                                              └─ yes, a public address ──> there

The socket was made inside the sandbox's network namespace and handed to us, so that nothing of the
machine's network is reachable but through these lines. CONNECT, and plain HTTP with absolute
addresses. Names are resolved here; an address that is not public is refused unless the list holds
the address itself, so that a listed name cannot be pointed at the machine's own services.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from swarm_sdk.errors import ConfigError

CONNECT_S = 10.0
IDLE_S = 60.0
MAX_HEAD_BYTES = 2**14
MAX_CONNECTIONS = 32
MAX_BYTES = 256 * 2**20
"""Bytes that one connection may carry."""
_PORTS = (80, 443)


class _Refused(Exception):
    """The answer that the code gets."""


class Proxy:
    """Serves one sandbox.

    Args:
        hosts: ``name``, ``*.name``, an address, or one of these with ``:port``; ports 80 and 443
            where none is given.

    Raises:
        ConfigError: an entry is no host.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        self._rules = [_rule(host) for host in hosts]
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.num_refused: int = 0

    async def serve(self, listener: socket.socket) -> None:
        """Take connections from ``listener`` until ``aclose``."""
        listener.setblocking(False)  # noqa: FBT003
        self._server = await asyncio.start_server(
            self._connected, sock=listener.dup(), limit=MAX_HEAD_BYTES
        )

    async def aclose(self) -> None:
        """Cut all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def allows(self, host: str, port: int) -> bool:
        """Whether the list holds it."""
        return any(_matches(rule, host.lower().rstrip("."), port) for rule in self._rules)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if len(self._tasks) > MAX_CONNECTIONS:
                raise _Refused("429 Too Many Connections")
            await self._serve_one(reader, writer)
        except _Refused as refusal:
            self.num_refused += 1
            with contextlib.suppress(OSError):
                writer.write(f"HTTP/1.1 {refusal}\r\nContent-Length: 0\r\n\r\n".encode())
                await writer.drain()
        except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            pass  # the other end went away, or sent what is no request
        except asyncio.LimitOverrunError:
            pass  # a head that does not end
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), IDLE_S)
        first, _, rest = head.decode("latin-1").partition("\r\n")
        method, target, version = first.split(" ")
        if method == "CONNECT":
            host, _, port_text = target.rpartition(":")
            host = host.strip("[]")
            there_reader, there = await self._open(host, int(port_text))
            writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            url = urlsplit(target)
            if url.scheme != "http" or not url.hostname:
                raise _Refused("400 Bad Request")
            there_reader, there = await self._open(url.hostname, url.port or 80)
            path = url.path or "/"
            query = f"?{url.query}" if url.query else ""
            kept = [
                line
                for line in rest.split("\r\n")
                if line and not line.lower().startswith(("proxy-", "connection:", "host:"))
            ]
            # The host that was allowed, not one of the code's choice at the same address.
            own = [f"Host: {url.netloc.rpartition('@')[2]}", "Connection: close", "", ""]
            lines = [f"{method} {path}{query} {version}", *kept, *own]
            there.write("\r\n".join(lines).encode("latin-1"))
        try:
            await asyncio.gather(_pump(reader, there), _pump(there_reader, writer))
        finally:
            there.close()

    async def _open(
        self, host: str, port: int
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if not self.allows(host, port):
            raise _Refused("403 Host Not On The List Of The Sandbox")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            raise _Refused("502 Host Not Found") from None
        for *_, address in found:
            numeric = str(address[0])
            if not _is_address(host) and not ipaddress.ip_address(numeric).is_global:
                continue
            with contextlib.suppress(OSError, TimeoutError):
                return await asyncio.wait_for(asyncio.open_connection(numeric, port), CONNECT_S)
        raise _Refused("502 Host Not Reachable At A Public Address")


def _rule(text: str) -> tuple[str, int | None]:
    host, _, port = text.rpartition(":") if text.count(":") == 1 else (text, "", "")
    name = host.lower().strip("[]")
    plain = name.removeprefix("*.")
    is_name = bool(plain) and all(part.replace("-", "a").isalnum() for part in plain.split("."))
    if not (is_name or _is_address(name)) or (port and not port.isdigit()):
        raise ConfigError(
            f"'{text}' is no host that a sandbox could reach; give 'name' or 'name:port'"
        )
    return name, int(port) if port else None


def _matches(rule: tuple[str, int | None], host: str, port: int) -> bool:
    name, only = rule
    if (port not in _PORTS) if only is None else (port != only):
        return False
    return host.endswith(name[1:]) if name.startswith("*.") else host == name


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    num_bytes = 0
    while data := await asyncio.wait_for(reader.read(2**16), IDLE_S):
        num_bytes += len(data)
        if num_bytes > MAX_BYTES:
            break
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()
