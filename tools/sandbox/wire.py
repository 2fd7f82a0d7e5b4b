"""Jupyter's messages to one kernel and from it; whatever a kernel says is data from a stranger.

    Wire.send ──> DEALER (shell)                         SUB (iopub), DEALER ──> Wire.heard_*

A message counts if its frames are complete, signed and JSON objects of the right shape; all others
are dropped. The key is in the kernel, so the signature shows only that the kernel sent it. Sockets
never reconnect: a kernel that puts another socket in the place of its own gains nothing. ZeroMQ
cuts a peer off that sends a larger frame than MAX_FRAME_BYTES.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_FRAME_BYTES = 12 * 2**20
_MAX_WAITING = 200
_DELIMITER = b"<IDS|MSG>"


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
    signed = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        signed.update(part)
    return signed.hexdigest().encode()


class Wire:
    """The sockets to one kernel.

    Args:
        address: what its sockets' names begin with: ``ipc://FOLDER/s``.
        key: that messages are signed with.
    """

    def __init__(self, address: str, key: bytes) -> None:
        import zmq
        import zmq.asyncio

        context = zmq.asyncio.Context.instance()
        self._key = key
        self._shell = context.socket(zmq.DEALER)
        self._iopub = context.socket(zmq.SUB)
        for socket in (self._shell, self._iopub):
            socket.linger = 0
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            socket.setsockopt(zmq.RCVHWM, _MAX_WAITING)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._iopub.setsockopt(zmq.SUBSCRIBE, b"")
        for socket, port in ((self._shell, 1), (self._iopub, 2)):
            socket.connect(f"{address}-{port}")

    async def send(self, kind: str, content: Mapping[str, Any]) -> str:
        """Send a request; its id. To a kernel that is gone nothing is sent, and none answers."""
        import zmq

        number, frames = packed(kind, content, self._key)
        with contextlib.suppress(zmq.Again):
            await self._shell.send_multipart(frames, flags=zmq.DONTWAIT)
        return number

    async def heard_shell(self) -> Heard | None:
        """The next reply; ``None`` for what is no message."""
        return unpacked(await self._shell.recv_multipart(), self._key)

    async def heard_iopub(self) -> Heard | None:
        """The next output or status; ``None`` for what is no message."""
        return unpacked(await self._iopub.recv_multipart(), self._key)

    def close(self) -> None:
        """Close the sockets; what waits in them is dropped."""
        self._shell.close(linger=0)
        self._iopub.close(linger=0)
