"""The kernel itself: IPython behind Jupyter's protocol, made fit for hostile cells.

    configure(…) ─> GuestApp.initialize ─> ready ─> start
                                                      │ a cell
       take new files ─> run, output capped ─> repair what it broke ─> reply, with the variables

Whatever the reply says is for the reader's comfort. Nothing that must hold is decided here.
"""

from __future__ import annotations

import _posixsubprocess
import base64
import builtins
import contextvars
import functools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import ipykernel.ipkernel
import ipykernel.kernelapp
from ipykernel.compiler import XCachingCompiler
from ipykernel.displayhook import ZMQShellDisplayHook
from ipykernel.zmqshell import ZMQDisplayPublisher, ZMQInteractiveShell
from traitlets import Type
from traitlets.config import Config

from swarm_sdk.tools.sandbox.guest.output import (
    CUT_TYPE,
    METER,
    CappedStream,
    OutputLimit,
    clipped,
)
from swarm_sdk.tools.sandbox.guest.pictures import SHELF
from swarm_sdk.tools.sandbox.guest.vision import (
    binarize,
    count_components,
    crop,
    sample_frames,
    zoom,
)

MAX_SHOWN = 64
MAX_UNSENT = 2**17
"""Messages on their way to a client; what they hold counts as memory of the sandbox."""
MAX_VARIABLES = 64
MAX_TRACEBACK_CHARS = 20_000
_PORTS = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")
_PICTURES = ("image/png", "image/jpeg")
_HELPERS = (binarize, count_components, crop, sample_frames, zoom)
_BACKEND = "matplotlib_inline.backend_inline"
_BUILTINS = dict(vars(builtins))


def _sent(data: Mapping[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """What of a value's forms leaves the kernel: text, capped, and pictures, prepared."""
    found: dict[str, Any] = {}
    if CUT_TYPE in data:
        return dict(data)
    METER.release()
    METER.num_shown += 1
    if METER.num_shown > MAX_SHOWN:
        return {}
    for kind in _PICTURES:
        if kind in data and "image/png" not in found:
            try:
                raw = data[kind]
                encoded, told = SHELF.prepared(
                    raw if isinstance(raw, bytes) else base64.b64decode(raw)
                )
            except ValueError as error:
                found["text/plain"] = f"[a picture was left out: {error}]"
                return found
            found["image/png"] = encoded
            metadata["swarm"] = told
    text = data.get("text/plain")
    if isinstance(text, str):
        found["text/plain"] = clipped(text)
    return found


class GuestPublisher(ZMQDisplayPublisher):
    """``display``."""

    def publish(self, data: Any, metadata: Any = None, **options: Any) -> None:  # type: ignore[override]
        """Send what may be sent."""
        told = dict(metadata or {})
        found = _sent(data, told)
        if found:
            super().publish(found, told, **options)


class GuestDisplayHook(ZMQShellDisplayHook):
    """The value of a cell's last line."""

    def write_format_data(self, format_dict: Any, md_dict: Any = None) -> None:
        """Send what may be sent."""
        told = dict(md_dict or {})
        super().write_format_data(_sent(format_dict, told), told)


class GuestShell(ZMQInteractiveShell):
    """IPython with short tracebacks."""

    displayhook_class: Any = Type(GuestDisplayHook)
    display_pub_class: Any = Type(GuestPublisher)

    def _showtraceback(self, etype: Any, evalue: Any, stb: list[str]) -> None:
        METER.release()
        trace = "\n".join(map(str, stb))
        super()._showtraceback(etype, clipped(str(evalue)), [trace[-MAX_TRACEBACK_CHARS:]])


class GuestKernel(ipykernel.ipkernel.IPythonKernel):
    """Runs cells one by one, and leaves the session fit for the next."""

    shell_class: Any = Type(GuestShell)
    _execute_sleep = 0
    home: str = "."
    _awaited: Any = None

    @property
    def _supports_kernel_subshells(self) -> bool:
        return False

    async def do_execute(self, code: str, *args: Any, **options: Any) -> Any:
        """Run one cell."""
        METER.begin()
        self._say_begun()
        SHELF.take_inputs(self.home)
        reply = await super().do_execute(code, *args, **options)
        METER.release()
        reply["swarm"] = {
            "variables": self._variables(),
            "is_over_limit": METER.is_over,
            "num_hidden": max(0, METER.num_shown - MAX_SHOWN),
        }
        self._repair()
        _reap_orphans()
        if "traceback" in reply:
            reply["traceback"] = []  # the error message on iopub has it
            reply["evalue"] = clipped(str(reply["evalue"]))
        return reply

    def _say_begun(self) -> None:
        """Let what was said so far go out: a cell may hold the interpreter's lock for minutes."""
        handed_over = threading.Event()
        iopub: Any = self.iopub_thread
        iopub.schedule(handed_over.set)
        handed_over.wait(1)

    def pre_handler_hook(self) -> None:
        """Between its messages the kernel is deaf to interrupts; from here on it is not."""
        signal.signal(signal.SIGINT, self._on_interrupt)

    def post_handler_hook(self) -> None:
        """See ``pre_handler_hook``."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    @contextmanager
    def _cancel_on_sigint(self, future: Any) -> Iterator[None]:
        """An ``await`` at the top of a cell runs while this lasts."""
        self._awaited = future
        try:
            yield
        finally:
            self._awaited = None

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        """Raise in the cell's code; where that waits in the event loop, cancel it there."""
        while frame is not None and frame.f_code.co_name not in ("run_code", "_run_once"):
            frame = frame.f_back
        if self._awaited is not None and frame is not None and frame.f_code.co_name == "_run_once":
            loop: Any = self.io_loop
            loop.asyncio_loop.call_soon_threadsafe(self._awaited.cancel)
            return
        signal.default_int_handler(number, frame)

    def _variables(self) -> list[str]:
        shell: Any = self.shell
        hidden = shell.user_ns_hidden
        names = [
            name[:80]
            for name, value in list(shell.user_ns.items())
            if isinstance(name, str)
            and not name.startswith("_")
            and name not in hidden
            and type(value).__name__ != "module"
        ]
        return names[-MAX_VARIABLES:]

    def _repair(self) -> None:
        """Undo what a cell did to the session by accident: streams, hooks, builtins."""
        for name, stream in _STREAMS.items():
            if getattr(sys, name) is not stream or stream.closed:
                stream.pub_thread = stream.pub_thread or _APP[0].iopub_thread
                setattr(sys, name, stream)
        shell: Any = self.shell
        for owner in (shell, shell.displayhook, shell.display_pub):
            for name in list(vars(owner)):
                if callable(getattr(type(owner), name, None)):
                    del vars(owner)[name]
        for name, value in _BUILTINS.items():
            if getattr(builtins, name, None) is not value and name not in ("_", "input"):
                setattr(builtins, name, value)


_STREAMS: dict[str, Any] = {}
_APP: list[Any] = []


class _NoThread:
    """Stands where ipykernel keeps the thread that hands requests to subshells."""

    parent_thread: threading.Thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


class GuestApp(ipykernel.kernelapp.IPKernelApp):
    """A kernel whose sockets and settings were given, not read from a file."""

    kernel_class: Any = Type(GuestKernel)
    has_heartbeat: bool = False

    def parse_command_line(self, argv: Any = None) -> None:
        """There is none."""

    def load_config_file(self, *_: Any, **__: Any) -> None:
        """There is none."""

    def _bind_socket(self, s: Any, port: int) -> Any:
        """Let messages wait for a client that is busy: past this many they would be dropped."""
        s.sndhwm = MAX_UNSENT
        return super()._bind_socket(s, port)

    def init_signal(self) -> None:
        """Between cells an interrupt means nothing."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def init_control(self, context: Any) -> None:
        """Read requests in the main thread: none runs beside a cell, and a hop less each way."""
        super().init_control(context)
        self.shell_channel_thread: Any = _NoThread()

    def init_heartbeat(self) -> None:
        """For clients that listen to one; ours watches the process and saves two threads."""
        if self.has_heartbeat:
            super().init_heartbeat()

    def init_blackhole(self) -> None:
        """Keep the streams."""

    def init_poller(self) -> None:
        """The parent is the zygote, which outlives us or takes us along."""

    def _run_startup_files(self) -> None:
        """There are none: what a cell left in IPython's folder must not run before the kernel."""

    def init_connection_file(self) -> None:
        """There is none."""

    def write_connection_file(self, **_: Any) -> None:
        """There is none."""

    def log_connection_info(self) -> None:
        """There is nobody to read it."""

    def init_io(self) -> None:
        """Keep the streams to restore them."""
        super().init_io()
        _STREAMS.update(stdout=sys.stdout, stderr=sys.stderr)


def prepare(told: Mapping[str, Any]) -> Any:
    """Build the kernel as ``told``: its sockets, key, folders, seed and limits; not yet started."""
    info = told["info"]
    SHELF.configure(inputs=told["inputs"], scratch=told["scratch"], max_pixels=told["max_pixels"])
    METER.max_chars = told["max_output_chars"]
    seed(told["seed"])
    build_shell()
    config = _config()
    config.Session.key = info["key"].encode()
    config.Session.signature_scheme = info["signature_scheme"]
    app = GuestApp.instance(
        config=config,
        transport=info["transport"],
        ip=info["ip"],
        **{port: info[port] for port in _PORTS},
    )
    _APP[:] = [app]
    GuestKernel.home = told["home"]
    GuestApp.has_heartbeat = told.get("has_heartbeat", False)
    app.initialize([])
    shell: Any = app.shell
    shell.kernel = app.kernel
    shell.profile_dir = app.profile_dir
    return app


def build_shell() -> None:
    """Build the shell before the fork: half of a kernel's start, and memory that stays shared."""
    if GuestShell.initialized():
        return
    shell: Any = GuestShell.instance(config=_config(), user_ns={}, compiler_class=XCachingCompiler)
    METER.tell_cut = lambda count: shell.display_pub.publish({CUT_TYPE: {"dropped": count}})
    if _BACKEND in sys.modules:
        sys.modules[_BACKEND].configure_inline_support(shell, f"module://{_BACKEND}")
        sys.modules["matplotlib"].interactive(b=True)  # figures show at the end of their cell
    _attribute_threads()
    _note_children()
    given: dict[str, Any] = {helper.__name__: helper for helper in _HELPERS}
    given |= {"images": SHELF.images, "shown": SHELF.shown}
    shell.push(given, interactive=False)


def _config() -> Any:
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    config.InteractiveShell.xmode = "Plain"
    config.IPKernelApp.log_level = "CRITICAL"
    config.IPKernelApp.outstream_class = f"{CappedStream.__module__}.CappedStream"
    config.InteractiveShellApp.exec_PYTHONSTARTUP = False
    return config


def _attribute_threads() -> None:
    """Let what a thread prints belong to the cell that started it, however late it comes."""
    start = threading.Thread.start

    def start_in_context(thread: threading.Thread) -> None:
        context, run = contextvars.copy_context(), thread.run
        thread.run = lambda: context.run(run)  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = start_in_context  # type: ignore[assignment, method-assign]


_CHILDREN: set[int] = set()
"""Processes that this one started itself."""


def _note_children() -> None:
    """Keep the numbers of processes that cells start, in whatever way Python has for it."""

    def noting(start: Any) -> Any:
        @functools.wraps(start)
        def start_and_note(*args: Any, **options: Any) -> Any:
            found = start(*args, **options)
            _CHILDREN.add(found[0] if isinstance(found, tuple) else found)
            return found

        return start_and_note

    for owner, names in (
        (os, ("fork", "forkpty", "posix_spawn", "posix_spawnp")),
        (subprocess, ("_fork_exec",)),
        (_posixsubprocess, ("fork_exec",)),
    ):
        for name in names:
            if hasattr(owner, name):
                setattr(owner, name, noting(getattr(owner, name)))


def _reap_orphans() -> None:
    """Take leave of the ended children of ended children, which pid 1 of a namespace inherits.

    Each counts against the cap on processes until then. Those that a cell started itself are its
    own to wait for.
    """
    if os.getpid() != 1:
        return
    with open("/proc/thread-self/children", encoding="ascii") as stream:
        children = set(map(int, stream.read().split()))
    for pid in children - _CHILDREN:
        with suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def seed(number: int) -> None:
    """Draw differently from the processes that were forked before and after."""
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def environment(*, home: str, scratch: str, has_proxy: bool, proxy_port: int) -> dict[str, str]:
    """All that a kernel's environment holds."""
    found = {
        "PATH": os.environ.get("PATH", "/usr/local/bin:/usr/bin:/bin"),
        "HOME": home,
        "USER": "agent",
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "TMPDIR": scratch,
        "IPYTHONDIR": f"{scratch}/.ipython",
        "MPLCONFIGDIR": f"{scratch}/.matplotlib",
        "MPLBACKEND": f"module://{_BACKEND}",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    for name in ("TZ", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH"):
        if name in os.environ:
            found[name] = os.environ[name]
    if has_proxy:
        proxy = f"http://127.0.0.1:{proxy_port}"
        found |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy)
    return found


__all__ = ["GuestApp", "OutputLimit", "environment", "prepare", "seed"]
