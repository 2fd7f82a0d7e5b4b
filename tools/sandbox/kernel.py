"""A plain IPython kernel as a sandbox: a process of this user, NOT isolated from the machine.

    /tmp/swarm-XXXX/           private to this user, deleted on close
        work/                  the kernel's working directory and HOME; the task's files lie here
        run/                   connection file and Unix sockets (ipc: no TCP port to race for)

    run(code):  execute ──> messages until idle ──> CellResult
                   │ time limit
                   ├─> interrupt ──> idle within the grace time: "timeout", variables kept
                   └─> no answer ──> SIGKILL to the process group: "died", variables lost

Invariant: once ``aclose`` or a cancelled ``run`` is over, the kernel's process group is gone.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from queue import Empty
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any, Literal

import anyio

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.output import CellOutput
from swarm_sdk.tools.sandbox.protocol import CellResult, CellStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swarm_sdk.types import Image

_MAX_SOCKET_PATH = 100
_POLL_S = 0.25
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "LD_LIBRARY_PATH", "PYTHONPATH")
_KERNEL_SETTINGS = (
    "--HistoryManager.enabled=False",
    "--InteractiveShell.colors=NoColor",
    "--InteractiveShell.xmode=Plain",
    "--IPKernelApp.log_level=CRITICAL",
)
_QUIET = logging.getLogger("swarm_sdk.sandbox.jupyter")
_QUIET.addHandler(logging.NullHandler())
_QUIET.propagate = False
_CellEnd = Literal["over", "late", "quit", "dead"]
_WHY_DIED: dict[_CellEnd, str] = {
    "late": "the cell did not stop after {:g} s and its process was killed",
    "quit": "the cell ended the process",
    "dead": "the process died",
}
_LOST = "the Python process was restarted: variables are lost, files are kept"
_RESET = """
import gc as _gc, os as _os, sys as _sys
_sys.modules.get("matplotlib.pyplot") and _sys.modules["matplotlib.pyplot"].close("all")
_os.chdir({work!r}); _os.environ["HOME"] = {work!r}
get_ipython().run_line_magic("reset", "-f")
"""


class KernelSandbox:
    """One IPython kernel; an async context manager that starts it and ends it.

    Args:
        files: written into the working directory under their names.
        max_chars: most characters of text that a cell gives back.
        start_timeout_s: how long the kernel may take to start.
        interrupt_grace_s: how long an interrupted cell may take to stop before it is killed.

    Raises:
        ConfigError: a file's name is not a plain name, or is given twice.
    """

    def __init__(
        self,
        files: Sequence[Image] = (),
        *,
        max_chars: int = 4000,
        start_timeout_s: float = 60.0,
        interrupt_grace_s: float = 2.0,
    ) -> None:
        check_file_names(files)
        self._files = files
        self._max_chars = max_chars
        self._start_timeout_s = start_timeout_s
        self._interrupt_grace_s = interrupt_grace_s
        self._lock = anyio.Lock()
        self._root: Path | None = None
        self._work = Path()
        self._num_resets = 0
        self._manager: Any = None
        self._client: Any = None
        self._is_closed = False
        self._has_lost_variables = False

    async def __aenter__(self) -> KernelSandbox:
        """Start the kernel.

        Raises:
            ConfigError: jupyter_client or ipykernel is not installed.
            SandboxDied: the kernel does not start.
        """
        try:
            self._make_folders()
            await self.put(self._files)
            await self._start()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """End the kernel."""
        await self.aclose()

    @property
    def pid(self) -> int | None:
        """The kernel's process, which leads its process group; ``None`` where there is none."""
        provisioner = self._manager.provisioner if self._manager is not None else None
        return provisioner.pid if provisioner is not None and provisioner.has_process else None

    async def run(self, code: str, *, timeout_s: float) -> CellResult:
        """Run one cell; see ``Sandbox.run``."""
        async with self._lock:
            if self._is_closed or self._root is None:
                raise SandboxDied("the sandbox is closed; no more code can run in it")
            if not await self._is_alive():
                self._has_lost_variables = True
                await self._end_kernel()
                await self._start()
            output = CellOutput(code, max_chars=self._max_chars)
            if self._has_lost_variables:
                output.note(_LOST)
                self._has_lost_variables = False
            started = time.perf_counter()
            try:
                status = await self._run_cell(code, output, timeout_s)
            except BaseException:
                await self._end_kernel()
                raise
            return CellResult(
                status=status,
                text=output.text,
                images=output.images,
                num_dropped_chars=output.num_dropped_chars,
                wall_s=time.perf_counter() - started,
            )

    async def put(self, files: Sequence[Image]) -> None:
        """Write files into the working directory.

        Raises:
            ConfigError: as ``KernelSandbox``.
        """
        check_file_names(files)
        for file in files:
            if file.name:
                await anyio.Path(self._work, file.name).write_bytes(file.data)

    async def reset(self) -> None:
        """Forget all variables and go to a new, empty working directory.

        Imported modules and whatever code did to them stay, so this isolates nothing.

        Raises:
            SandboxDied: the kernel is gone or does not answer.
        """
        left = self._work
        self._num_resets += 1
        self._make_folders()
        result = await self.run(_RESET.format(work=str(self._work)), timeout_s=10.0)
        if result.status != "ok" or result.text:
            raise SandboxDied(f"the sandbox could not be reset: {result.text}")
        shutil.rmtree(left, ignore_errors=True)

    async def aclose(self) -> None:
        """End the kernel and delete its files."""
        self._is_closed = True
        with anyio.CancelScope(shield=True):
            await self._end_kernel()
            if self._root is not None:
                shutil.rmtree(self._root, ignore_errors=True)

    async def _run_cell(self, code: str, output: CellOutput, timeout_s: float) -> CellStatus:
        request = self._client.execute(code, allow_stdin=False)
        end = await self._collect(request, output, timeout_s)
        if end == "over":
            return "error" if output.has_error else "ok"
        if end == "late":
            await self._manager.interrupt_kernel()
            if await self._collect(request, output, self._interrupt_grace_s) == "over":
                output.note(f"stopped after {timeout_s:g} s; variables are kept")
                return "timeout"
        output.note(f"{_WHY_DIED[end].format(timeout_s)}: variables are lost, files are kept")
        await self._end_kernel()
        return "died"

    async def _collect(self, request: str, output: CellOutput, timeout_s: float) -> _CellEnd:
        """Take in the cell's messages until its end, or until there is nothing to wait for."""
        with anyio.move_on_after(timeout_s):
            is_idle = False
            while not is_idle:
                try:
                    message = await self._client.get_iopub_msg(timeout=_POLL_S)
                except Empty:
                    if not await self._is_alive():
                        return "dead"
                    continue
                await anyio.lowlevel.checkpoint()
                if message["parent_header"].get("msg_id") != request:
                    continue
                kind, content = message["msg_type"], message["content"]
                is_idle = kind == "status" and content.get("execution_state") == "idle"
                output.add(kind, content)
            while True:
                reply = await self._client.get_shell_msg()
                if reply["parent_header"].get("msg_id") == request:
                    return "quit" if _asks_to_exit(reply["content"]) else "over"
        return "late"

    async def _start(self) -> None:
        try:
            from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
            from jupyter_client.manager import AsyncKernelManager
        except ImportError as error:
            raise ConfigError(
                "code needs jupyter_client; install it with: pip install 'swarm-sdk[sandbox]'"
            ) from error

        class ThisPython(KernelSpecManager):
            """Knows one kernel: ipykernel in the Python that runs this."""

            def get_kernel_spec(self, kernel_name: str) -> Any:
                argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
                return KernelSpec(argv=argv, display_name=kernel_name, language="python")

        assert self._root is not None
        connection_file = Path(tempfile.mkdtemp(prefix="k", dir=self._root / "run"), "c.json")
        if len(str(connection_file)) > _MAX_SOCKET_PATH:
            raise ConfigError(
                f"the folder for temporary files '{tempfile.gettempdir()}' has too long a name for "
                "Unix sockets; set TMPDIR to a shorter one"
            )
        self._manager = AsyncKernelManager(
            kernel_spec_manager=ThisPython(),
            kernel_name="python3",
            transport="ipc",
            connection_file=str(connection_file),
            log=_QUIET,
        )
        try:
            with anyio.fail_after(self._start_timeout_s):
                await self._launch()
        except TimeoutError as error:
            raise SandboxDied(
                f"the sandbox did not start within {self._start_timeout_s:g} s; try again"
            ) from error
        except OSError as error:
            raise SandboxDied(f"the sandbox could not start: {error}") from error

    async def _launch(self) -> None:
        try:
            await self._manager.start_kernel(
                extra_arguments=list(_KERNEL_SETTINGS),
                env=self._environment(),
                cwd=str(self._work),
                stdin=DEVNULL,
                stdout=DEVNULL,
                stderr=DEVNULL,
            )
            self._client = self._manager.client()
            self._client.start_channels(stdin=False, hb=False, control=False)
            await self._wait_ready()
        except BaseException:
            await self._end_kernel()
            raise

    async def _wait_ready(self) -> None:
        """Wait until the kernel answers and we see its messages (late subscribers miss some)."""
        while True:
            request = self._client.kernel_info()
            try:
                while True:
                    reply = await self._client.get_shell_msg(timeout=1.0)
                    if reply["parent_header"].get("msg_id") == request:
                        break
                while True:
                    message = await self._client.get_iopub_msg(timeout=0.2)
                    if message["parent_header"].get("msg_id") == request:
                        return
            except Empty:
                if not await self._is_alive():
                    raise SandboxDied(
                        "the sandbox's Python process ended while it started; is ipykernel "
                        "installed (pip install 'swarm-sdk[sandbox]')?"
                    ) from None

    async def _is_alive(self) -> bool:
        return self._manager is not None and await self._manager.is_alive()

    async def _end_kernel(self) -> None:
        """Kill the process group, reap the process, close the sockets."""
        manager, client = self._manager, self._client
        self._kill_group()
        self._manager = self._client = None
        with anyio.CancelScope(shield=True):
            if client is not None:
                client.stop_channels()
            if manager is not None and manager.has_kernel:
                await manager.shutdown_kernel(now=True)
            elif manager is not None:
                await manager.cleanup_resources()

    def _kill_group(self) -> None:
        if self.pid is not None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                return

    def _make_folders(self) -> None:
        if self._root is None:
            self._root = Path(tempfile.mkdtemp(prefix="swarm-")).resolve()
            (self._root / "run").mkdir()
        self._work = self._root / (f"work{self._num_resets}" if self._num_resets else "work")
        self._work.mkdir()

    def _environment(self) -> dict[str, str]:
        """Give what code may see of our environment: no keys, no tokens."""
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return {
            **kept,
            "HOME": str(self._work),
            "IPYTHONDIR": f"{self._root}/run/ipython",
            "JUPYTER_RUNTIME_DIR": f"{self._root}/run",
            "MPLCONFIGDIR": str(caches / "swarm-sdk" / "matplotlib"),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONWARNINGS": "ignore:To exit:UserWarning",
        }


def _asks_to_exit(reply: Mapping[str, Any]) -> bool:
    """Whether the cell called ``quit()``: the process ends shortly after such a reply."""
    return any(payload.get("source") == "ask_exit" for payload in reply.get("payload", ()))


def check_file_names(files: Sequence[Image]) -> None:
    """Refuse names that are not plain file names.

    Raises:
        ConfigError: a name holds a folder or control characters, or is given twice.
    """
    seen = set()
    for name in (file.name for file in files if file.name):
        if name in (".", "..") or len(name.encode()) > 255 or "/" in name or "\\" in name:
            raise ConfigError(f"'{name}' is not a plain file name; give the file a name alone")
        if not name.isprintable():
            raise ConfigError(f"{name!r} holds characters that a file name cannot have; rename it")
        if name in seen:
            raise ConfigError(f"two files are named '{name}'; rename one of them")
        seen.add(name)
