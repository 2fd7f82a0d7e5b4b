"""The fork-server: imports everything once and forks itself for each kernel.

    python -m swarm_sdk.tools.sandbox.zygote '{"socket": …, "base": …, "level": 3, …}'

    start ─> own user, mount and pid namespaces (L2 and up) ─> imports ─> a throw-away kernel tells
          what else it imported ─> import that too ─> run cells, forget them ─> freeze
          ─> one line of JSON on stdout ─> serve

    a connection, one request, one answer (JSON and descriptors)
      fork    -> pidfd, a socket that tells when the kernel is ready, its folder
      canary  -> the same, for a process that tries what must fail
      status  -> how a process ended          forget -> delete its folder

One thread, no event loop, no zmq context here, so that a fork is a whole copy. Executed with a
scrubbed environment (``/proc/self/environ`` of a fork shows that of its parent). Ends with its
standard input; at L2 and up it is pid 1 of a namespace, so that all kernels end with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swarm_sdk.tools.sandbox import isolation, linux
from swarm_sdk.tools.sandbox.canary import sing
from swarm_sdk.tools.sandbox.files import clear_folder, restore_folder
from swarm_sdk.tools.sandbox.isolation import Plan

_STACK = (
    "numpy",
    "PIL.Image",
    "PIL.PngImagePlugin",
    "PIL.JpegImagePlugin",
    "PIL.ImageDraw",
    "scipy.ndimage",
    "skimage.filters",
    "skimage.measure",
    "skimage.morphology",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "matplotlib.backends.backend_agg",
    "cv2",
)
_MESSAGE_BYTES = 2**18
_PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "hb_port": 4, "control_port": 5}


class Zygote:
    """Serves requests until standard input ends."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.base: str = settings["base"]
        self.wanted: int = settings["level"]
        self.is_bare: bool = settings.get("is_bare", False)
        self.has_namespaces: bool = False
        self.is_nested: bool = False
        self.reason: str = ""
        self._children: dict[int, str] = {}
        self._ended: dict[str, int] = {}
        self._own_pids = -1
        self._has_root = False
        self._number = 0
        self._is_open = all(map(_is_open, isolation.system_folders()))
        Path(self.base, "root").mkdir(exist_ok=True)
        Path(self.base, "stores").mkdir(exist_ok=True)

    # -- the namespaces that all kernels lie in ----------------------------------------------------

    def enter(self) -> None:
        """Enter namespaces of our own; returns in the process that serves."""
        if self.wanted < 2:
            linux.adopt_orphans()
            return
        try:
            self._leave()
            linux.mount(None, "/", None, linux.MS_REC | linux.MS_PRIVATE)
        except OSError as error:
            self.reason = str(error)
            linux.adopt_orphans()
            return
        self.has_namespaces = True
        pid = os.fork()
        if pid:
            for signal_number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(signal_number, lambda *_: os.kill(pid, signal.SIGKILL))
            os.close(0)
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        linux.die_with_parent(signal.SIGKILL)
        self._own_pids = os.open("/proc/thread-self/ns/pid_for_children", os.O_RDONLY)

    def _leave(self) -> None:
        kinds = linux.CLONE_NEWPID | linux.CLONE_NEWNS
        if os.geteuid() == 0:
            try:
                linux.unshare(kinds, "pid and mount namespaces")
            except OSError:  # root of a container: try as a user without rights does
                pass
            else:
                return
        user_id, group_id = os.getuid(), os.getgid()
        linux.unshare(kinds | linux.CLONE_NEWUSER, "user namespace")
        isolation.become(user_id, group_id, user_id)
        self.is_nested = True

    # -- imports -----------------------------------------------------------------------------------

    def load(self) -> int:
        """Import what kernels use; how many modules the trial kernel still had to import."""
        # A debugger costs each kernel 150 ms; ipykernel goes without one that cannot be imported.
        sys.modules["debugpy"] = None  # type: ignore[assignment]
        importlib.import_module("ipykernel.debugger")
        del sys.modules["debugpy"]
        from swarm_sdk.tools.sandbox.guest import app

        for name in _STACK:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        if "cv2" in sys.modules:
            sys.modules["cv2"].setNumThreads(1)
        app.build()
        found = self._trial(app)
        for name in found:
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module(name)
        with tempfile.TemporaryDirectory(dir=self.base) as folder:
            app.warm(folder)
        return len(found)

    def _trial(self, app: Any) -> list[str]:
        """Start a kernel in a child, run a cell, and return the modules that it imported."""
        read_end, write_end = os.pipe()
        folder = tempfile.mkdtemp(dir=self.base)
        pid = os.fork()
        if pid == 0:
            try:
                before = set(sys.modules)
                os.chdir(folder)
                kernel = app.prepare(
                    {
                        "info": {"key": "trial", "signature_scheme": "hmac-sha256",
                                 "transport": "ipc", "ip": f"{folder}/s", **_PORTS},
                        "home": folder, "inputs": folder, "scratch": folder, "seed": 1,
                        "max_pixels": 10**6, "max_output_chars": 10**6,
                    }
                )  # fmt: skip
                for code in (_WARM_CELL, "1 / 0", "1 +"):
                    kernel.shell.run_cell(code)
                found = [name for name in sys.modules if name not in before]
                os.write(write_end, json.dumps(found).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        with open(read_end, "rb") as stream:
            told = stream.read()
        os.waitpid(pid, 0)
        shutil.rmtree(folder, ignore_errors=True)
        names: list[str] = json.loads(told or b"[]")
        return [name for name in names if "debugpy" not in name and "pydev" not in name]

    # -- serving -----------------------------------------------------------------------------------

    def serve(self, path: str) -> None:
        """Answer requests until standard input ends."""
        if len(os.listdir("/proc/self/task")) != 1:
            raise RuntimeError("the zygote has threads, which a fork would lose")
        server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        server.bind(path)
        server.listen(128)
        Path(path).chmod(0o600)
        gc.collect()
        gc.disable()
        gc.freeze()
        told = {
            "has_namespaces": self.has_namespaces,
            "reason": self.reason,
            "has_keepers": not self.has_namespaces,
        }
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()
        selector = selectors.DefaultSelector()
        selector.register(server, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select(1.0):
                if key.fileobj == 0:
                    if not os.read(0, 64):
                        self._end_all()
                        return
                    continue
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(5)
                    try:
                        self._answer(connection)
                    except OSError:
                        continue  # the asker is gone
            self._reap()

    def _answer(self, connection: socket.socket) -> None:
        request = json.loads(connection.recv(_MESSAGE_BYTES))
        descriptors: list[int] = []
        try:
            if request["op"] in ("fork", "canary"):
                descriptors = self._fork(request, connection)
                told: dict[str, Any] = {}
            elif request["op"] == "status":
                self._reap()
                told = {"status": self._ended.get(request["id"])}
            else:
                self._forget(request["id"])
                told = {}
        except OSError as error:
            told = {"error": str(error)}
        socket.send_fds(connection, [json.dumps(told).encode()], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)

    def _fork(self, request: dict[str, Any], connection: socket.socket) -> list[int]:
        plan = self._plan(request)
        if plan.level >= 2 and not self._has_root:
            isolation.build_base(plan.root)
            self._has_root = True
        ours, theirs = socket.socketpair()
        if self.has_namespaces:
            linux.unshare(linux.CLONE_NEWPID, "pid namespace")
        pid = -1
        try:
            pid = os.fork()
        finally:
            if self.has_namespaces and pid:
                linux.setns(self._own_pids, linux.CLONE_NEWPID)
        if pid == 0:
            connection.close()
            ours.close()
            if plan.level < 2:
                _keep(theirs)
            _child(request, plan, theirs)
        theirs.close()
        self._children[pid] = request["id"]
        folder = os.open(plan.store, os.O_RDONLY | os.O_DIRECTORY)
        return [os.pidfd_open(pid), ours.detach(), folder]

    def _plan(self, request: Mapping[str, Any]) -> Plan:
        level = request["level"]
        store = f"{self.base}/stores/{request['id']}"
        user_id = None
        if os.geteuid() == 0 and not self.is_nested and (level >= 2 or (level and self._is_open)):
            self._number = (self._number + 1) % 2**16
            user_id = request["first_user_id"] + self._number
        if not os.path.isdir(store):
            os.mkdir(store, 0o755)
            if level >= 2:
                limits = f"size={request['disk_mb']}m,nr_inodes={request['num_files']},mode=755"
                flags = linux.MS_NOSUID | linux.MS_NODEV
                linux.mount("tmpfs", store, "tmpfs", flags, limits)
            for name in ("home", "tmp", "shm", "run"):
                os.mkdir(f"{store}/{name}", 0o700)
        for name in ("home", "tmp", "shm", "run"):
            restore_folder(f"{store}/{name}")
            if user_id is not None:
                _give(f"{store}/{name}", user_id)
        clear_folder(f"{store}/run")
        return Plan(
            level=level,
            root=f"{self.base}/root",
            store=store,
            inputs=request["inputs"],
            mounts=tuple(request["mounts"]),
            cgroups=tuple(request["cgroups"]),
            user_id=user_id,
            is_nested=self.is_nested,
            memory_mb=request["memory_mb"],
            file_mb=request["disk_mb"],
            num_processes=request["num_processes"],
            cpu_s=request["cpu_s"],
            has_proxy=request["has_proxy"],
        )

    def _forget(self, name: str) -> None:
        self._ended.pop(name, None)
        store = f"{self.base}/stores/{name}"
        if os.path.isdir(store):
            if os.path.ismount(store):
                linux.unmount(store)
            shutil.rmtree(store, ignore_errors=True)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            if pid in self._children:
                self._ended[self._children.pop(pid)] = os.waitstatus_to_exitcode(status)
            if not self.has_namespaces:
                self._end_strays()

    def _end_strays(self) -> None:
        """Kill what a keeper left behind: our children that we did not fork."""
        children = Path("/proc/thread-self/children").read_text().split()
        for pid in map(int, children):
            if pid not in self._children:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _end_all(self) -> None:
        if self.has_namespaces:
            return  # we are pid 1: the system ends all the others with us
        for pid in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 3
        while self._children and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.005)
        shutil.rmtree(f"{self.base}/stores", ignore_errors=True)


_WARM_CELL = """
print("warm")
try:
    import matplotlib.pyplot as _plt
    _plt.plot([1, 2]); _plt.show(); _plt.close("all")
except ImportError:
    pass
try:
    from PIL import Image as _Image
    display(_Image.new("RGB", (8, 8)))
except ImportError:
    pass
import subprocess, multiprocessing, tempfile, concurrent.futures
1 + 1
"""


def _is_open(path: str) -> bool:
    """Whether users other than the owner can get to ``path``: else Python is lost to them."""
    return all(os.stat(one).st_mode & 0o1 for one in (path, *map(str, Path(path).parents)))


def _give(path: str, user_id: int) -> None:
    os.chown(path, user_id, user_id, follow_symlinks=False)
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            os.chown(f"{folder}/{name}", user_id, user_id, follow_symlinks=False)


def _keep(channel: socket.socket) -> None:
    """Below L2: stay as the kernel's parent and take all its descendants down with it.

    Returns in the child, which becomes the kernel.
    """
    os.setsid()
    linux.adopt_orphans()
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        linux.die_with_parent(signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        os.setsid()
        return
    channel.close()
    status = 0

    def end(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def interrupt(*_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, interrupt)
    while True:
        ended, raw = os.waitpid(-1, 0)
        if ended == pid:
            status = os.waitstatus_to_exitcode(raw)
            break
    _end_children()
    os._exit(status if status >= 0 else 128 - status)


def _end_children() -> None:
    """Kill all that is left below, again and again until nothing is."""
    while True:
        for child in Path("/proc/thread-self/children").read_text().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _child(request: Mapping[str, Any], plan: Plan, channel: socket.socket) -> None:
    """Become the kernel, or the canary; never returns."""
    try:
        gc.enable()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        if plan.level >= 2:
            os.setsid()
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        listener = isolation.isolate(plan)
        kept = {channel.fileno()} | ({listener.fileno()} if listener is not None else set())
        _close_all_but(kept)
        if request["op"] == "canary":
            if plan.level == 1:
                isolation.close_network()
            channel.sendall(json.dumps(sing(request)).encode())
            os._exit(0)
        _become_kernel(request, plan, channel, listener)
    except BaseException as error:  # noqa: BLE001 - the boundary: told to the parent, then we end
        where = traceback.format_exc()[-1500:]
        with contextlib.suppress(OSError):
            channel.sendall(json.dumps({"error": str(error), "trace": where}).encode())
    finally:
        os._exit(1)


def _close_all_but(kept: set[int]) -> None:
    start = 3
    for descriptor in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(start, descriptor)
        start = descriptor + 1


def _become_kernel(
    request: Mapping[str, Any], plan: Plan, channel: socket.socket, listener: socket.socket | None
) -> None:
    from swarm_sdk.tools.sandbox.guest import app

    scratch = "/tmp" if plan.level >= 2 else f"{plan.store}/tmp"  # noqa: S108 - the sandbox's own
    kept = app.environment(
        home=plan.home,
        scratch=scratch,
        has_proxy=plan.has_proxy,
        proxy_port=isolation.PROXY_PORT,
    )
    foreign = {"", *os.environ.get("PYTHONPATH", "").split(":")}
    sys.path[:] = [place for place in sys.path if place not in foreign]
    os.environ.clear()
    os.environ.update(kept)
    tempfile.tempdir = None
    # Drawn here: what passes through the server can be read in the memory of all later kernels.
    key = secrets.token_hex(16)
    info = {"ip": f"{plan.socket_folder}/s", "transport": "ipc", **_PORTS}
    info |= {"key": key, "signature_scheme": "hmac-sha256"}
    kernel = app.prepare(
        {
            "info": info,
            "home": plan.home,
            "inputs": plan.input_folder,
            "scratch": scratch,
            "seed": request["seed"],
            "max_pixels": request["max_pixels"],
            "max_output_chars": request["max_output_chars"],
            "is_for_any_client": request["is_for_any_client"],
        }
    )
    if plan.level == 1:
        isolation.close_network()
    sys.path.insert(0, "")  # the sandbox's own modules: none of them is imported before this
    descriptors = [listener.fileno()] if listener is not None else []
    socket.send_fds(channel, [json.dumps({"key": key}).encode()], descriptors)
    channel.close()
    if listener is not None:
        listener.close()
    kernel.start()
    os._exit(0)


def main() -> None:
    """Run as told by the only argument."""
    settings = json.loads(sys.argv[1])
    sys.argv[1:] = []
    zygote = Zygote(settings)
    zygote.enter()
    if not zygote.is_bare:
        zygote.load()
    zygote.serve(settings["socket"])


if __name__ == "__main__":
    main()
