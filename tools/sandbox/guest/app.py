"""The kernel itself: IPython behind Jupyter's protocol, made fit for hostile cells.

    build, warm (once, before forks) ─> prepare: key, folders, sockets ─> start
                                                                           │ a cell
       take new files ─> run, output capped ─> repair what it broke ─> reply, with the variables

Whatever the reply says is for the reader's comfort. Nothing that must hold is decided here.
"""

from __future__ import annotations

import _posixsubprocess
import asyncio
import base64
import builtins
import contextvars
import functools
import logging
import operator
import os
import random
import secrets
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
import zmq
from ipykernel.compiler import XCachingCompiler
from ipykernel.displayhook import ZMQShellDisplayHook
from ipykernel.zmqshell import ZMQDisplayPublisher, ZMQInteractiveShell
from IPython.core.profiledir import ProfileDir
from traitlets import Type, default
from traitlets.config import Config
from zmq.eventloop.zmqstream import ZMQStream

from swarm_sdk.tools.sandbox.guest.output import (
    CUT_TYPE,
    METER,
    OUTLET,
    STREAMS,
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
_PICTURES = ("image/png", "image/jpeg")
_HELPERS = (binarize, count_components, crop, sample_frames, zoom)
_BACKEND = "matplotlib_inline.backend_inline"
_BUILTINS = {name: value for name, value in vars(builtins).items() if name not in ("_", "input")}
_WARM_CELLS = (
    *("1 + 1", "print(1)", "x = [1]", "1 / 0", "await __import__('asyncio').sleep(0)") * 10,
    *("import matplotlib.pyplot as plt; plt.plot([1, 2])", "plt.imshow([[1, 2]])") * 2,
)


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
    scratch: str = ""

    def init_profile_dir(self, profile_dir: Any) -> None:
        """There is none until something asks for it."""

    @default("profile_dir")
    def _own_folder(self) -> ProfileDir:
        return ProfileDir(location=f"{self.scratch}/.ipython")

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
        SHELF.take_inputs(self.home)
        reply = await super().do_execute(code, *args, **options)
        for stream in STREAMS:
            stream.take()
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
        sys.stdout, sys.stderr = STREAMS
        shell: Any = self.shell
        for owner in (shell, shell.displayhook, shell.display_pub):
            for name in list(vars(owner)):
                if callable(getattr(type(owner), name, None)):
                    del vars(owner)[name]
        if not all(map(operator.is_, map(vars(builtins).get, _BUILTINS), _BUILTINS.values())):
            for name, value in _BUILTINS.items():
                setattr(builtins, name, value)


class _NoThread:
    """Stands where ipykernel keeps the thread that hands requests to subshells."""

    parent_thread: threading.Thread = threading.main_thread()

    def __bool__(self) -> bool:
        return False


class GuestApp(ipykernel.kernelapp.IPKernelApp):
    """A kernel in two steps: what all kernels share is built before the fork, the rest after it."""

    kernel_class: Any = Type(GuestKernel)
    shell: Any

    def build(self) -> None:
        """Build all that needs no socket and tells nothing apart: memory that stays shared."""
        self.log.setLevel(logging.CRITICAL)  # here: upstream caps the handler, and formats all
        logging.getLogger("tornado").addHandler(logging.NullHandler())
        self.init_crash_handler()
        self.init_pdb()
        self.patch_io()
        self.session.username = "agent"
        self.kernel: Any = GuestKernel.instance(
            parent=self,
            session=self.session,
            shell_channel_thread=_NoThread(),
            iopub_thread=OUTLET,
            iopub_socket=OUTLET,
            log=self.log,
            ident="guest",
        )
        self.init_shell()
        self.init_extensions()

    def give(self) -> None:
        """Put what each session begins with into its namespace."""
        given: dict[str, Any] = {helper.__name__: helper for helper in _HELPERS}
        given |= {"images": SHELF.images, "shown": SHELF.shown}
        self.shell.push(given, interactive=False)
        self.init_code()

    async def run_warm(self) -> None:
        """Run cells of some kinds as a client's requests; nothing is sent."""
        for code in _WARM_CELLS:
            request = self.session.msg("execute_request", {"code": code, "stop_on_error": False})
            frames = map(zmq.Frame, self.session.serialize(request, b"warm"))
            await self.kernel.shell_main(None, list(frames))

    def _run_startup_files(self) -> None:
        """There are none: what a cell left in IPython's folder must not run before the kernel."""

    def open(self, told: Mapping[str, Any]) -> None:
        """Bind the sockets; ours are two, and those of any other Jupyter client five."""
        info = told["info"]
        app: Any = self
        session: Any = self.session
        session.pid = os.getpid()
        session.session = secrets.token_hex(16)
        session.key = info["key"].encode()
        app.context = context = zmq.Context()

        def bound(kind: int, name: str) -> Any:
            socket: Any = context.socket(kind)
            socket.linger = 1000
            socket.sndhwm = MAX_UNSENT  # past this many, messages for a busy client are dropped
            if kind == zmq.ROUTER:
                socket.router_handover = 1  # a client that comes back takes its name along
            socket.bind(f"ipc://{info['ip']}-{info[name]}")
            return socket

        kernel = self.kernel
        kernel.shell_stream = ZMQStream(bound(zmq.ROUTER, "shell_port"))
        if told.get("is_for_any_client"):
            kernel.control_stream = ZMQStream(bound(zmq.ROUTER, "control_port"))
            kernel.stdin_socket = bound(zmq.ROUTER, "stdin_port")
            app.transport, app.ip, app.hb_port = "ipc", info["ip"], info["hb_port"]
            self.init_heartbeat()
        OUTLET.open(session, bound(zmq.XPUB, "iopub_port"))
        sys.stdout, sys.stderr = STREAMS
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # between cells an interrupt means nothing
        kernel.shell.scratch = told["scratch"]


def prepare(told: Mapping[str, Any]) -> Any:
    """Make a kernel as ``told``: its sockets, key, folders, seed and limits; not yet started."""
    SHELF.configure(inputs=told["inputs"], scratch=told["scratch"], max_pixels=told["max_pixels"])
    METER.max_chars = told["max_output_chars"]
    seed(told["seed"])
    app = build()
    GuestKernel.home = told["home"]
    app.open(told)
    return app


def build() -> Any:
    """Build what can be before the fork: most of a kernel's start, and memory that stays shared."""
    if GuestApp.initialized():
        return GuestApp.instance()
    shell: Any = GuestShell.instance(config=_config(), user_ns={}, compiler_class=XCachingCompiler)
    METER.tell_cut = lambda count: shell.display_pub.publish({CUT_TYPE: {"dropped": count}})
    if _BACKEND in sys.modules:
        sys.modules[_BACKEND].configure_inline_support(shell, f"module://{_BACKEND}")
        sys.modules["matplotlib"].interactive(b=True)  # figures show at the end of their cell
    shell.display_formatter.active_types = ["text/plain", *_PICTURES]  # no other form is sent
    _attribute_threads()
    _note_children()
    app = GuestApp.instance(config=_config())
    app.build()
    shell.kernel = app.kernel
    app.give()
    return app


def warm(folder: str) -> None:
    """Run cells before the fork, and forget them: what the first ones fill is shared, too.

    Args:
        folder: for their files.
    """
    app = build()
    streams, handler = (sys.stdout, sys.stderr), signal.getsignal(signal.SIGINT)
    SHELF.configure(inputs=folder, scratch=folder, max_pixels=2**20)
    sys.stdout, sys.stderr = STREAMS
    try:
        asyncio.run(app.run_warm())
    finally:
        sys.stdout, sys.stderr = streams
        signal.signal(signal.SIGINT, handler)
    app.session.digest_history.clear()
    app.kernel.set_parent([], {})
    SHELF.shown.set([])
    app.shell.reset()
    app.give()


def _config() -> Any:
    config = Config()
    config.HistoryManager.enabled = False
    config.HistoryManager.hist_file = ":memory:"
    config.InteractiveShell.colors = "NoColor"
    config.InteractiveShell.xmode = "Plain"
    config.IPKernelApp.log_level = "CRITICAL"
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
    try:
        if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            return  # none of those that there are has ended
    except ChildProcessError:
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
