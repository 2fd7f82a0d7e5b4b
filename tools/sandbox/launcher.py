"""The parent's side of the fork-server: one for each set of imports, shared by the whole process.

    shared_zygote() ──> Zygote ─ launch ──> KernelProcess      a pidfd, a folder, an end
        │ on first use: start the server, sing the canary at each level from the top
        └ Zygote.isolation   what this machine gives, and why no more

Requests are connections of their own, so that any thread and any event loop can make them. The
server ends when our end of its standard input closes: with ``close``, at exit, or with us.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import json
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox import linux
from swarm_sdk.tools.sandbox.cgroups import Cgroup, Cgroups
from swarm_sdk.tools.sandbox.levels import Isolation, SandboxSettings

FIRST_USER_ID = 0x53570000
"""Kernels of root get users from here on, one each, that no system gives to anybody."""
START_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 20.0
END_TIMEOUT_S = 5.0
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH")
_MESSAGE_BYTES = 2**18
_MAX_SOCKET_PATH = 100


class KernelProcess:
    """One process of the zygote, alive or not; known by a descriptor that no other can get."""

    def __init__(
        self,
        zygote: Zygote,
        name: str,
        descriptors: tuple[int, int, int],
        cgroup: Cgroup | None,
        *,
        has_keeper: bool,
    ) -> None:
        self.zygote: Zygote = zygote
        self.pidfd: int = descriptors[0]
        self.folder: int = descriptors[2]
        """Descriptor of the folder that holds ``home``, ``tmp``, ``shm`` and ``run``."""
        self.pid: int = _pid_of(self.pidfd)
        """As this process sees it; for display and measurement."""
        self.cgroup: Cgroup | None = cgroup
        self.listener: socket.socket | None = None
        """Listens inside the sandbox, for the proxy."""
        self._name = name
        self._ready = socket.socket(fileno=descriptors[1])
        self._has_keeper = has_keeper
        self._is_closed = False
        self._status: int | None = None

    async def wait_ready(self) -> Mapping[str, Any]:
        """What the process says when it is ready.

        Raises:
            SandboxDied: it ended first, or says why it cannot start.
        """
        await anyio.wait_readable(self._ready)
        data, descriptors, _, _ = socket.recv_fds(self._ready, _MESSAGE_BYTES, 1)
        self._ready.close()
        if descriptors:
            self.listener = socket.socket(fileno=descriptors[0])
        told: dict[str, Any] = json.loads(data) if data else {}
        if not told or "error" in told:
            why = told.get("error", f"it ended while it started ({self.ending()})")
            raise SandboxDied(f"the sandbox could not start: {why}")
        return told

    def first_words(self, *, timeout_s: float) -> bytes:
        """What the process says first; for those who cannot wait on an event loop."""
        readable, _, _ = select.select([self._ready], [], [], timeout_s)
        return self._ready.recv(_MESSAGE_BYTES) if readable else b""

    @property
    def is_alive(self) -> bool:
        """Whether the process runs."""
        return not self._is_closed and not is_readable(self.pidfd)

    def interrupt(self) -> None:
        """Send SIGINT."""
        self.send_signal(signal.SIGINT)

    def send_signal(self, number: int) -> None:
        """Send a signal; to a process that has ended, none."""
        if not self._is_closed:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, number)

    async def end(self) -> None:
        """Kill the process and all that it started, and wait until they are gone."""
        self.send_signal(signal.SIGTERM if self._has_keeper else signal.SIGKILL)
        if self.is_alive:
            with anyio.move_on_after(END_TIMEOUT_S):
                await anyio.wait_readable(self.pidfd)
            self.send_signal(signal.SIGKILL)
            await anyio.wait_readable(self.pidfd)

    def end_now(self) -> None:
        """As ``end``, for those who cannot wait on an event loop."""
        self.send_signal(signal.SIGTERM if self._has_keeper else signal.SIGKILL)
        select.select([self.pidfd], [], [], 5)
        self.send_signal(signal.SIGKILL)

    def status(self) -> int | None:
        """Exit status, negative for a signal; ``None`` while it runs or where nobody knows."""
        if self._status is None and not self.is_alive and not self._is_closed:
            deadline = time.monotonic() + 1
            while self._status is None and time.monotonic() < deadline:
                try:
                    told, _ = self.zygote.ask({"op": "status", "id": self._name})
                except SandboxDied:
                    break
                self._status = told.get("status")
                if self._status is None:
                    time.sleep(0.001)
            if self._status is not None and self._has_keeper and self._status > 128:
                self._status = 128 - self._status
        return self._status

    def ending(self) -> str:
        """How it ended, in words."""
        return ending_in_words(self.status())

    def oom_kills(self) -> int:
        """Processes of it that the system killed for memory."""
        return self.cgroup.oom_kills() if self.cgroup is not None else 0

    def close(self) -> None:
        """Let go of a process that has ended; its folder stays until ``Zygote.forget``."""
        if self._is_closed:
            return
        self.status()
        self._is_closed = True
        self._ready.close()
        if self.listener is not None:
            self.listener.close()
        os.close(self.pidfd)
        os.close(self.folder)
        if self.cgroup is not None:
            self.cgroup.remove()


class Zygote:
    """A running fork-server.

    Args:
        level: the highest level to try.
        is_bare: import nothing: enough to learn the level.

    Raises:
        ConfigError: this is not Linux, or a library is missing.
        SandboxDied: the server does not start.
    """

    def __init__(self, *, level: int = 3, is_bare: bool = False) -> None:
        if sys.platform != "linux" or not linux.is_known_machine():
            raise ConfigError(
                f"sandboxes need Linux on x86-64 or arm64, and this is {sys.platform} on "
                f"{platform.machine()}; use a container (ContainerSandbox)"
            )
        if not is_bare:
            _check_libraries()
        self.owner: int = os.getpid()
        self._folder = tempfile.mkdtemp(prefix="swarm-")
        if len(self._folder) > _MAX_SOCKET_PATH - 20:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise ConfigError(
                f"the folder for temporary files '{tempfile.gettempdir()}' has too long a name "
                "for Unix sockets; set TMPDIR to a shorter one"
            )
        Path(self._folder).chmod(0o711)
        Path(self.inputs_folder).mkdir(mode=0o711)
        self._path = f"{self._folder}/s"
        self._process: subprocess.Popen[bytes] | None = None
        self._cgroups: Cgroups | None = None
        self._has_namespaces = False
        self._reason = ""
        self._closed = threading.Event()
        try:
            self.isolation: Isolation = self._start(level, is_bare=is_bare)
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    def _start(self, level: int, *, is_bare: bool) -> Isolation:
        """Start the server; again without namespaces where they do not hold."""
        try:
            self._serve(level, is_bare=is_bare)
            found = self._probe(level)
        except SandboxDied as error:
            if level < 2:
                raise
            found = Isolation(level=0, reason=str(error))
            self._has_namespaces = True
        if found.level or not self._has_namespaces:
            return found
        self._stop()
        self._serve(1, is_bare=is_bare)
        lower = self._probe(1)
        return Isolation(
            level=lower.level, reason="; ".join(filter(None, (found.reason, lower.reason)))
        )

    def _serve(self, level: int, *, is_bare: bool) -> None:
        settings = {
            "socket": self._path,
            "base": self._folder,
            "level": level,
            "is_bare": is_bare,
        }
        environment = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        environment |= {
            "HOME": self._folder,
            "IPYTHONDIR": f"{self._folder}/ipython",
            "MPLBACKEND": "module://matplotlib_inline.backend_inline",
            "MPLCONFIGDIR": str(caches / "swarm-sdk" / "matplotlib"),
            "PYTHONPATH": str(_package_parent()),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": str(secrets.randbelow(2**32)),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "BLIS"):
            environment[f"{name}_NUM_THREADS"] = "1"
        self._log = open(f"{self._folder}/log", "w+b")  # noqa: SIM115 - closed with the server
        self._process = subprocess.Popen(  # noqa: S603 - our own program and settings
            [sys.executable, "-m", "swarm_sdk.tools.sandbox.zygote", json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], START_TIMEOUT_S)
        line = self._process.stdout.readline() if readable else b""
        if not line:
            raise SandboxDied(f"the fork-server of sandboxes did not start: {self._last_words()}")
        told = json.loads(line)
        self._has_namespaces = told["has_namespaces"]
        self._reason = told["reason"]

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it says nothing"

    @property
    def pid(self) -> int:
        """The server's process, or the one that waits for it; 0 where it is closed."""
        return self._process.pid if self._process is not None else 0

    @property
    def inputs_folder(self) -> str:
        """Where folders of input files are made."""
        return f"{self._folder}/inputs"

    @property
    def is_alive(self) -> bool:
        """Whether kernels can be forked."""
        return self._process is not None and self._process.poll() is None

    def ask(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """Make one request; the answer and its descriptors.

        Raises:
            SandboxDied: the server is gone, or refuses.
        """
        with self._asked(request) as connection:
            readable, _, _ = select.select([connection], [], [], ANSWER_TIMEOUT_S)
            return _answer(connection if readable else None)

    async def ask_async(self, request: Mapping[str, Any]) -> tuple[dict[str, Any], list[int]]:
        """As ``ask``; other tasks go on meanwhile."""
        with self._asked(request) as connection:
            with anyio.move_on_after(ANSWER_TIMEOUT_S):
                await anyio.wait_readable(connection)
                return _answer(connection)
            return _answer(None)

    def _asked(self, request: Mapping[str, Any]) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(self._path)
            connection.send(json.dumps(request).encode())
        except OSError as error:
            connection.close()
            raise SandboxDied(f"the fork-server of sandboxes is gone: {error}") from error
        return connection

    async def launch(
        self,
        name: str,
        settings: SandboxSettings,
        *,
        inputs: str,
        seed: int,
        is_for_any_client: bool = False,
    ) -> KernelProcess:
        """Fork a kernel; its folder is kept over kernels of the same name.

        Args:
            name: of the sandbox.
            settings: what it may use.
            inputs: folder of the task's files.
            seed: of its random numbers.
            is_for_any_client: whether it has the sockets, too, that we do not use.

        Raises:
            ConfigError: the level is below what ``settings`` ask for.
            SandboxDied: the server is gone, or refuses.
        """
        self.isolation.require(settings.lowest_level)
        level = self.isolation.level
        if settings.hosts and level < 2:
            raise ConfigError(
                f"code can reach hosts through our proxy from level L2 on; this is {self.isolation}"
            )
        extra = {"inputs": inputs, "seed": seed, "is_for_any_client": is_for_any_client}
        cgroup, request = self._request("fork", name, level, settings, extra)
        asking = asyncio.ensure_future(self.ask_async(request))
        try:
            _, descriptors = await asyncio.shield(asking)
        except BaseException as error:
            await self._undo(asking, cgroup, name, error)
            raise
        return self._process_of(name, descriptors, cgroup)

    async def _undo(
        self, asking: asyncio.Future[Any], cgroup: Cgroup | None, name: str, error: BaseException
    ) -> None:
        """End a kernel that nobody waits for any more."""
        if isinstance(error, asyncio.CancelledError):
            with anyio.CancelScope(shield=True), contextlib.suppress(SandboxDied):
                _, descriptors = await asking
                process = self._process_of(name, descriptors, cgroup)
                await process.end()
                process.close()
        elif cgroup is not None:
            cgroup.remove()

    async def forget(self, name: str) -> None:
        """Delete the folder of a sandbox whose processes have ended."""
        with contextlib.suppress(SandboxDied):
            await self.ask_async({"op": "forget", "id": name})

    def close(self) -> None:
        """End the server and every kernel; closing twice is fine."""
        if self._closed.is_set() or os.getpid() != self.owner:
            return
        self._closed.set()
        atexit.unregister(self.close)
        self._stop()
        if self._cgroups is not None:
            deadline = time.monotonic() + 1
            while not self._cgroups.remove() and time.monotonic() < deadline:
                time.sleep(0.01)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        self._log.close()
        self._process = None
        Path(self._path).unlink(missing_ok=True)

    # -- levels ------------------------------------------------------------------------------------

    def _probe(self, highest: int) -> Isolation:
        """Build each level from the top and send a canary in, until one shows that it holds."""
        reasons = []
        if highest >= 3 and self._has_namespaces:
            self._cgroups, reason = Cgroups.find()
            if reason:
                reasons.append(reason)
        elif self._reason:
            reasons.append(self._reason)
        secret = Path(self._folder, "secret")
        secret.write_text("canary")
        secret.chmod(0o644)
        with socket.create_server(("127.0.0.1", 0)) as server:
            told = {"secret": str(secret), "port": server.getsockname()[1], "host": os.getpid()}
            for level in range(highest, 0, -1):
                if (level == 3 and self._cgroups is None) or ((level >= 2) != self._has_namespaces):
                    continue
                failures = self._canary(level, told)
                if not failures:
                    secret.unlink()
                    return Isolation(level=level, reason="; ".join(reasons))
                reasons.append(f"L{level}: {failures}")
        secret.unlink()
        return Isolation(level=0, reason="; ".join(reasons) or "no isolation was asked for")

    def _canary(self, level: int, told: Mapping[str, Any]) -> str:
        """Why the level does not hold; empty where it does."""
        settings = SandboxSettings(memory_mb=64, disk_mb=8, num_files=100, num_processes=16)
        inputs = Path(self._folder, "none")
        inputs.mkdir(exist_ok=True)
        process = None
        try:
            extra = {**told, "inputs": str(inputs)}
            cgroup, request = self._request("canary", "canary", level, settings, extra)
            process = self._process_of("canary", self.ask(request)[1], cgroup)
            data = process.first_words(timeout_s=20)
            found = json.loads(data) if data else {"error": f"it ended, {process.ending()}"}
        except (SandboxDied, OSError) as error:
            return str(error)
        finally:
            if process is not None:
                process.end_now()
                process.close()
            with contextlib.suppress(SandboxDied):
                self.ask({"op": "forget", "id": "canary"})
        return _judge(level, found, is_root=os.geteuid() == 0)

    def _request(
        self,
        op: str,
        name: str,
        level: int,
        settings: SandboxSettings,
        extra: Mapping[str, Any],
    ) -> tuple[Cgroup | None, dict[str, Any]]:
        cgroup = None
        if level == 3:
            assert self._cgroups is not None
            unique = f"{name}-{secrets.token_hex(3)}"
            try:
                cgroup = self._cgroups.make(unique, settings)
            except OSError as error:
                raise SandboxDied(f"the sandbox could not start: {error}") from error
        request = {
            "op": op,
            "id": name,
            "level": level,
            "mounts": [str(mount) for mount in settings.mounts],
            "cgroups": list(cgroup.folders) if cgroup is not None else [],
            "first_user_id": FIRST_USER_ID,
            "memory_mb": settings.memory_mb,
            "disk_mb": settings.disk_mb,
            "num_files": settings.num_files,
            "num_processes": settings.num_processes,
            "cpu_s": settings.cpu_s,
            "has_proxy": bool(settings.hosts),
            "max_pixels": settings.max_pixels,
            "max_output_chars": settings.max_output_chars,
            **extra,
        }
        return cgroup, request

    def _process_of(
        self, name: str, descriptors: Sequence[int], cgroup: Cgroup | None
    ) -> KernelProcess:
        pidfd, ready, folder = descriptors
        return KernelProcess(
            self, name, (pidfd, ready, folder), cgroup, has_keeper=not self._has_namespaces
        )


def _judge(level: int, found: Mapping[str, Any], *, is_root: bool) -> str:
    """Compare what the canary could do with what the level promises."""
    if "error" in found:
        return str(found["error"])
    wrong = [
        name
        for name in (
            "reads_files",
            "writes_files",
            "connects",
            "resolves",
            "unshares",
            "gains_privileges",
        )
        if found[name]
    ]
    if found["capabilities"]:
        wrong.append("has capabilities")
    if not found["filters"]:
        wrong.append("no seccomp filter")
    if found["signals"] and (level >= 2 or is_root):
        wrong.append("signals")
    if level >= 2 and found["num_processes"] != 1:
        wrong.append("sees other processes")
    if found["bomb"] == "unlimited" or (level == 3 and found["bomb"] != "killed"):
        wrong.append(f"memory bomb: {found['bomb']}")
    return f"the canary found what must not be: {', '.join(wrong)}" if wrong else ""


def _answer(connection: socket.socket | None) -> tuple[dict[str, Any], list[int]]:
    try:
        if connection is None:
            raise SandboxDied("the fork-server of sandboxes gives no answer")
        data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 4)
    except OSError as error:
        raise SandboxDied(f"the fork-server of sandboxes is gone: {error}") from error
    told: dict[str, Any] = json.loads(data) if data else {"error": "the fork-server ended"}
    if "error" in told:
        raise SandboxDied(f"the sandbox could not start: {told['error']}")
    return told, list(descriptors)


def is_readable(descriptor: int) -> bool:
    """Whether there is something to read; of a pidfd, whether its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def ending_in_words(status: int | None) -> str:
    """An exit status for people; negative for a signal."""
    if status is None:
        return "nobody knows how"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"signal {-status}, {signal.Signals(-status).name}"
    except ValueError:
        return f"signal {-status}"


def _pid_of(pidfd: int) -> int:
    text = Path(f"/proc/self/fdinfo/{pidfd}").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pid:"))


def _package_parent() -> Path:
    file = sys.modules["swarm_sdk"].__file__
    assert file is not None
    return Path(file).parents[1]


def _check_libraries() -> None:
    from importlib.util import find_spec

    missing = [name for name in ("jupyter_client", "ipykernel") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"code needs {' and '.join(missing)}; install with: pip install 'swarm-sdk[sandbox]'"
        )


_shared: Zygote | None = None
_lock = threading.Lock()


def shared_zygote() -> Zygote:
    """This process's fork-server, started on first use and again after its death.

    Takes one to three seconds the first time; call it in a thread.

    Raises:
        ConfigError, SandboxDied: as ``Zygote``.
    """
    global _shared  # noqa: PLW0603 - one for the process is the point
    with _lock:
        if _shared is None or not _shared.is_alive or _shared.owner != os.getpid():
            if _shared is not None:
                _shared.close()
            _shared = Zygote()
        return _shared


async def ready_zygote() -> Zygote:
    """As ``shared_zygote``; other tasks go on while it starts."""
    if _shared is not None and _shared.is_alive and _shared.owner == os.getpid():
        return _shared
    return await anyio.to_thread.run_sync(shared_zygote)


def probe() -> Isolation:
    """The level that this machine gives, from a server that imports nothing.

    Raises:
        ConfigError, SandboxDied: as ``Zygote``.
    """
    zygote = Zygote(is_bare=True)
    try:
        return zygote.isolation
    finally:
        zygote.close()
