"""What a cell says, capped and in its order, on its way out of the kernel.

print ──> Stream ──> Meter ─ first 64 Ki characters ──> Outlet ──> client
             │             ─ then the last 16 Ki ─────> held, sent when the cell shows
             │                                          something else or ends
             │             ─ between ────────────────> counted
             │             ─ past the limit ─────────> OutputLimit in the cell
what programs and libraries write to descriptors 1 and 2

A message leaves in the thread that sends it. What is printed waits until its cell shows something
else or ends, at most FLUSH_S: one thread beside the cell's sees to that, and reads the descriptors.
"""

from __future__ import annotations

import codecs
import contextlib
import contextvars
import io
import itertools
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import zmq
from jupyter_client.session import extract_header

MAX_HEAD = 2**16
MAX_TAIL = 2**14
FLUSH_S = 0.2
"""Longest time that what a running cell prints is held back, to be sent together."""
CUT_TYPE = "application/x-swarm-cut"
_PIPE_BYTES = 2**16
_MORE = int(zmq.SNDMORE)
_send_frame = zmq.backend.Socket.send


class OutputLimit(BaseException):
    """Raised inside a cell that printed more than it may; no ``except Exception`` stops it."""


class Meter:
    """Counts the characters of one cell over all streams."""

    def __init__(self) -> None:
        self.max_chars: int = 2**24
        self.tell_cut: Callable[[int], None] = lambda _: None
        self.num_shown: int = 0
        """Pictures and values shown."""
        self._lock = threading.RLock()
        self.begin()

    def begin(self) -> None:
        """Forget the last cell."""
        with self._lock:
            self._num_chars = 0
            self._num_cut = 0
            self._tail: list[tuple[Any, str]] = []
            self._num_tail = 0
            self.num_shown = 0

    @property
    def is_over(self) -> bool:
        """Whether the cell printed more than it may."""
        return self._num_chars > self.max_chars

    def take(self, stream: Any, text: str) -> str:
        """What of ``text`` is sent at once; the rest is held or counted."""
        with self._lock:
            room = max(0, MAX_HEAD - self._num_chars)
            self._num_chars += len(text)
            rest = text[room:]
            if rest:
                if len(rest) > MAX_TAIL:
                    self._num_cut += len(rest) - MAX_TAIL
                    rest = rest[-MAX_TAIL:]
                self._tail.append((stream, rest))
                self._num_tail += len(rest)
                while self._num_tail - len(self._tail[0][1]) >= MAX_TAIL:
                    dropped = len(self._tail.pop(0)[1])
                    self._num_cut += dropped
                    self._num_tail -= dropped
            return text[:room]

    def release(self) -> None:
        """Send what is held, after the count of what is not."""
        with self._lock:
            tail, cut = self._tail, self._num_cut
            self._tail, self._num_tail, self._num_cut = [], 0, 0
        if cut:
            self.tell_cut(cut)
        for stream, text in tail:
            stream.write_uncounted(text)


METER = Meter()


class Outlet:
    """Where all that a kernel publishes leaves it; for its library, socket and thread in one."""

    def __init__(self) -> None:
        self.session: Any = None
        self.socket: Any = None
        self._lock = threading.RLock()  # held while frames leave, and while texts are taken
        self._waiting: deque[tuple[str, Mapping[str, Any], str]] = deque()
        self._is_awaited = False
        self._bell = -1

    def open(self, session: Any, socket: Any) -> None:
        """Send through ``socket`` from now on, and begin to read descriptors 1 and 2."""
        self.session, self.socket = session, socket
        bell, self._bell = os.pipe()
        for stream in STREAMS:
            stream.open()
        threading.Thread(target=self._serve, args=(bell,), name="Outlet", daemon=True).start()

    def send_multipart(self, frames: Sequence[bytes], **_options: Any) -> None:
        """Send one message, whole: whatever a signal raises, it raises before or after it."""
        if self.socket is None:  # in the fork-server
            return
        flags = [_MORE] * (len(frames) - 1) + [0]
        with self._lock:
            deque(map(_send_frame, itertools.repeat(self.socket), frames, flags), maxlen=0)
            self._welcome()

    def say(self, name: str, parent: Mapping[str, Any], text: str) -> None:
        """Send ``text`` of a stream with the next flush."""
        if self.socket is None:
            return
        self._waiting.append((name, parent, text))
        if not self._is_awaited:
            self._is_awaited = True
            os.write(self._bell, b"\0")

    def flush(self) -> None:
        """Send what was said so far."""
        with self._lock:
            self._is_awaited = False
            while waiting := tuple(self._waiting):
                texts: dict[tuple[str, int], list[str]] = {}
                parents = {id(parent): parent for _, parent, _ in waiting}
                for name, parent, text in waiting:
                    texts.setdefault((name, id(parent)), []).append(text)
                for (name, number), parts in texts.items():
                    told, ident = {"name": name, "text": "".join(parts)}, f"stream.{name}".encode()
                    self.session.send(self, "stream", told, parents[number], ident)
                for _ in waiting:
                    self._waiting.popleft()

    def _welcome(self) -> None:
        """Greet who subscribed; the socket tells of an event once, to whoever looks first."""
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            told = self.socket.recv()
            if told[:1] == b"\x01":
                subscription = told[1:].decode(errors="replace")
                message = self.session.msg("iopub_welcome", {"subscription": subscription})
                frames = self.session.serialize(message, told[1:] or None)
                self.send_multipart(frames)

    def _serve(self, bell: int) -> None:
        """Flush what waited for FLUSH_S, take what is written to descriptors, greet."""
        readers: dict[int, Callable[[], object]] = {
            bell: lambda: os.read(bell, _PIPE_BYTES),
            self.socket.get(zmq.FD): self._greet,
        }
        readers |= {stream.pipe: stream.take for stream in STREAMS}
        poll = select.poll()
        for descriptor in readers:
            poll.register(descriptor, select.POLLIN)
        due_s: float | None = None
        while readers:
            wait_ms = None if due_s is None else max(0.0, (due_s - time.monotonic()) * 1e3)
            for descriptor, event in poll.poll(wait_ms):
                if event & select.POLLIN:
                    readers[descriptor]()
                else:  # a cell closed it
                    poll.unregister(descriptor)
                    del readers[descriptor]
                if descriptor == bell and due_s is None:
                    due_s = time.monotonic() + FLUSH_S
            if due_s is not None and time.monotonic() >= due_s:
                due_s = None
                self.flush()

    def _greet(self) -> None:
        with self._lock:
            self._welcome()


class Stream(io.TextIOBase):
    """``sys.stdout`` or ``sys.stderr`` of a kernel, and what is written to its descriptor."""

    encoding = "UTF-8"

    def __init__(self, name: str, descriptor: int) -> None:
        self.name: str = name
        self.pipe: int = -1
        self._descriptor = descriptor
        self._owner = os.getpid()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lock = threading.Lock()
        self._latest: Mapping[str, Any] = {}
        self._parent: contextvars.ContextVar[Mapping[str, Any]] = contextvars.ContextVar("parent")

    def open(self) -> None:
        """Take the place of the process's descriptor."""
        self._owner = os.getpid()
        self.pipe, end = os.pipe()
        os.set_blocking(self.pipe, False)
        os.dup2(end, self._descriptor)
        os.close(end)

    def set_parent(self, parent: Any) -> None:
        """Tell which request output belongs to from now on."""
        self._latest = extract_header(parent)
        self._parent.set(self._latest)

    def fileno(self) -> int:
        """Where programs write."""
        return self._descriptor

    def isatty(self) -> bool:
        """Nobody watches it."""
        return False

    def writable(self) -> bool:
        """Whether it can be written to."""
        return True

    def close(self) -> None:
        """Stay open: later cells print to it."""

    def write(self, string: str) -> int:
        """Write, within the cell's allowance."""
        if not isinstance(string, str):
            raise TypeError(f"write() argument must be str, not {type(string).__name__}")
        text = sendable(string)
        if os.getpid() != self._owner:  # a fork: its parent reads the descriptor
            os.write(self._descriptor, text.encode())
            return len(string)
        now = METER.take(self, text)
        if METER.is_over and threading.current_thread() is threading.main_thread():
            raise OutputLimit(f"the cell printed more than {METER.max_chars} characters")
        self.write_uncounted(now)
        return len(string)

    def write_uncounted(self, text: str) -> None:
        """Write what was counted before."""
        if text:
            OUTLET.say(self.name, self._parent.get(self._latest), text)

    def flush(self) -> None:
        """Send what waits."""
        if os.getpid() == self._owner:
            OUTLET.flush()

    def take(self) -> None:
        """Take in what was written to the descriptor so far."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while data := os.read(self.pipe, _PIPE_BYTES):
                text = METER.take(self, self._decoder.decode(data))
                if text:
                    OUTLET.say(self.name, self._latest, text)
                if len(data) < _PIPE_BYTES:
                    break


OUTLET = Outlet()
STREAMS = (Stream("stdout", 1), Stream("stderr", 2))


def clipped(text: str, max_chars: int = MAX_HEAD) -> str:
    """Head and tail of a text that is longer than ``max_chars``."""
    text = sendable(text)
    if len(text) <= max_chars:
        return text
    half = max_chars // 2
    return f"{text[:half]}\n[{len(text) - 2 * half} characters cut]\n{text[-half:]}"


def sendable(text: str) -> str:
    """``text`` as UTF-8 can hold it: a message with half a surrogate pair would be lost whole."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
