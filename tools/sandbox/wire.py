"""Jupyter's messages to one kernel and from it; whatever a kernel says is data from a stranger.

    Wire.send ──> DEALER (shell)     a Unix socket each     DEALER ──> Wire.reply
                                   (ZMTP 3.0, see _Peer)     SUB ──> Wire.output   (iopub)

A message counts if its frames are complete, signed and JSON objects of the right shape; all others
are dropped. The key is in the kernel, so the signature shows only that the kernel sent it. Sockets
never reconnect: a kernel that puts another socket in the place of its own gains nothing.

The transport is our own and not libzmq because of what a hostile peer can do to that: it bounds the
size of a frame, but takes in a message that never ends until memory does. Here a message may have
MAX_MESSAGE_BYTES and MAX_FRAMES, and what is not asked for waits in the kernel.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_MESSAGE_BYTES = 12 * 2**20
"""Bytes of one message; who sends more is cut off."""
MAX_FRAMES = 64
_MAX_WAITING_BYTES = 2 * MAX_MESSAGE_BYTES
_DELIMITER = b"<IDS|MSG>"
_GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4


@dataclass(frozen=True, slots=True)
class Heard:
    """One message of a kernel."""

    kind: str
    parent: str
    """Id of the request that it belongs to."""
    content: Mapping[str, Any]
    metadata: Mapping[str, Any]
    num_bytes: int


def packed(kind: str, content: Mapping[str, Any], key: bytes) -> tuple[str, list[bytes]]:
    """The id and the frames of a request."""
    number = secrets.token_hex(16)
    header = {
        "msg_id": number,
        "session": "swarm",
        "username": "swarm",
        "date": datetime.now(UTC).isoformat(),
        "msg_type": kind,
        "version": "5.3",
    }
    parts = [
        json.dumps(part).encode("utf-8", "surrogatepass") for part in (header, {}, {}, content)
    ]
    return number, [_DELIMITER, _signature(parts, key), *parts]


def unpacked(frames: Sequence[bytes], key: bytes) -> Heard | None:
    """The message in ``frames``; ``None`` where they are not one.

    Never raises, whatever the bytes are.
    """
    try:
        start = list(frames).index(_DELIMITER)
        signature, *parts = frames[start + 1 : start + 6]
        if len(parts) != 4 or not hmac.compare_digest(signature, _signature(parts, key)):
            return None
        header, parent, metadata, content = map(json.loads, parts)
        if not all(isinstance(part, dict) for part in (header, parent, metadata, content)):
            return None
        return Heard(
            str(header.get("msg_type", "")),
            str(parent.get("msg_id", "")),
            content,
            metadata,
            sum(map(len, frames)),
        )
    except (ValueError, RecursionError):  # ValueError: no delimiter, no JSON, no UTF-8
        return None


def _signature(parts: Sequence[bytes], key: bytes) -> bytes:
    return hmac.digest(key, b"".join(parts), "sha256").hex().encode()


class Wire:
    """The sockets to one kernel; made by ``connect``."""

    def __init__(self, shell: _Peer, iopub: _Peer, key: bytes, news: asyncio.Event) -> None:
        self._key = key
        self._shell = shell
        self._iopub = iopub
        self._news = news

    @staticmethod
    async def connect(address: str, key: bytes) -> Wire:
        """Connect to a kernel that has its sockets.

        Args:
            address: what its sockets' names begin with: ``FOLDER/s``.
            key: that messages are signed with.

        Raises:
            OSError: there is no such socket.
        """
        news = asyncio.Event()
        shell = await _Peer.connect(f"{address}-1", "DEALER", news.set)
        try:
            iopub = await _Peer.connect(f"{address}-2", "SUB", news.set)
        except OSError:
            shell.close()
            raise
        iopub.send([b"\x01"])  # subscribe to everything
        return Wire(shell, iopub, key, news)

    def send(self, kind: str, content: Mapping[str, Any]) -> str:
        """Send a request; its id. To a kernel that is gone nothing is sent, and none answers."""
        number, frames = packed(kind, content, self._key)
        self._shell.send(frames)
        return number

    def reply(self) -> Heard | None:
        """The next reply that has come, if one has."""
        return self._next(self._shell)

    def output(self) -> Heard | None:
        """The next output or status that has come, if one has."""
        return self._next(self._iopub)

    def _next(self, peer: _Peer) -> Heard | None:
        while (frames := peer.take()) is not None:
            heard = unpacked(frames, self._key)
            if heard is not None:
                return heard
        return None

    async def news(self) -> None:
        """Wait until something has come since the last time, an end of the other end included."""
        await self._news.wait()
        self._news.clear()

    def wake(self) -> None:
        """End a wait for news."""
        self._news.set()

    def close(self) -> None:
        """Close the sockets; what waits in them is dropped."""
        self._shell.close()
        self._iopub.close()


class _Peer(asyncio.Protocol):
    """One end of ZMTP 3.0 (rfc.zeromq.org/spec/23) without security, as far as a client needs it.

        greeting (64 bytes)   READY   then frames:  flags, length (1 or 8 bytes), body

    Messages wait for the other's first command, which is its READY; later ones are skipped. Who
    breaks the rules, or the bounds, is cut off, and from then on silent.
    """

    def __init__(self, tell: Callable[[], object]) -> None:
        self._tell = tell
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._has_greeted = False
        self._unsent: list[bytes] | None = []
        """Messages until the other end is ready, then ``None``."""
        self._frames: list[bytes] = []
        self._num_bytes = 0
        """Of the message that is coming in."""
        self._waiting: deque[list[bytes]] = deque()
        self._num_waiting_bytes = 0

    @staticmethod
    async def connect(path: str, kind: str, tell: Callable[[], object]) -> _Peer:
        """Connect, and say what kind of socket this is; ``tell`` is called with each message."""
        loop = asyncio.get_running_loop()
        transport, peer = await loop.create_unix_connection(lambda: _Peer(tell), path)
        properties = b"".join(
            bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
            for name, value in ((b"Socket-Type", kind.encode()), (b"Identity", b""))
        )
        transport.write(_GREETING + _framed(b"\x05READY" + properties, _COMMAND))
        return peer

    def send(self, frames: Sequence[bytes]) -> None:
        """Send a message, if the other end is still there."""
        *firsts, last = frames
        data = b"".join([*(_framed(one, _MORE) for one in firsts), _framed(last, 0)])
        if self._unsent is not None:
            self._unsent.append(data)
        elif self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def take(self) -> list[bytes] | None:
        """The frames of the next message, if one has come."""
        if not self._waiting:
            return None
        frames = self._waiting.popleft()
        self._num_waiting_bytes -= _size(frames)
        if self._transport is not None and self._num_waiting_bytes < _MAX_WAITING_BYTES:
            self._transport.resume_reading()
        return frames

    def close(self) -> None:
        """Close without another word."""
        if self._transport is not None:
            self._transport.abort()

    # -- what asyncio calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        self._tell()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        place = 0
        while (end := self._take(place)) > place:
            place = end
        del self._buffer[:place]
        if end < 0:
            self.close()

    def _take(self, place: int) -> int:
        """Take in what begins at ``place``, and say where it ends.

        ``place`` itself if more must come first, -1 where the rules are broken.
        """
        held = self._buffer
        if not self._has_greeted:
            if len(held) < len(_GREETING):
                return place
            self._has_greeted = held[0] == _GREETING[0] and held[9] & 1 == 1 and held[10] >= 3
            return len(_GREETING) if self._has_greeted else -1
        if len(held) < place + 2:
            return place
        flags = held[place]
        start = place + (9 if flags & _LONG else 2)
        if len(held) < start:
            return place
        size = int.from_bytes(held[place + 1 : start], "big")
        if self._num_bytes + size > MAX_MESSAGE_BYTES or len(self._frames) >= MAX_FRAMES:
            return -1
        if len(held) < start + size:
            return place
        if flags & _COMMAND:
            self._be_ready()
        else:
            self._frames.append(bytes(held[start : start + size]))
            self._num_bytes += size
            if not flags & _MORE:
                self._complete()
        return start + size

    def _be_ready(self) -> None:
        unsent, self._unsent = self._unsent, None
        if unsent and self._transport is not None:
            self._transport.write(b"".join(unsent))

    def _complete(self) -> None:
        frames, self._frames, self._num_bytes = self._frames, [], 0
        self._waiting.append(frames)
        self._tell()
        self._num_waiting_bytes += _size(frames)
        if self._transport is not None and self._num_waiting_bytes >= _MAX_WAITING_BYTES:
            self._transport.pause_reading()


def _framed(body: bytes, flags: int) -> bytes:
    if len(body) < 2**8:
        return bytes([flags, len(body)]) + body
    return bytes([flags | _LONG]) + len(body).to_bytes(8, "big") + body


def _size(frames: Sequence[bytes]) -> int:
    """Bytes that a message holds here; an empty frame costs something, too."""
    return sum(map(len, frames)) + 64 * len(frames)
