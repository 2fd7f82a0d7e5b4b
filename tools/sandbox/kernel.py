"""One agent's IPython session: a forked, isolated kernel and the story of its cells.

    run(code):  execute ─ does not begin ──> killed; a new process runs it
                   └──> messages until idle and reply ──> CellResult
                   │ time limit, or too much output
                   ├─> interrupt, twice ──> idle within the grace time: variables kept
                   └─> no answer ──> SIGKILL: variables lost, files kept

What a kernel says is taken for data: its words decide what a result tells and never what is done
to the machine. How a process ended is asked of the system (exit status, the cgroup's events).

Invariant: once ``aclose`` or a cancelled ``run`` is over, no process of the sandbox is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import anyio

from swarm_sdk.errors import SandboxDied
from swarm_sdk.tools.sandbox.egress import Proxy
from swarm_sdk.tools.sandbox.files import (
    InputFolder,
    Outputs,
    check_file_names,
    collect,
    open_folder,
)
from swarm_sdk.tools.sandbox.host import Host, Process
from swarm_sdk.tools.sandbox.launcher import ready_zygote
from swarm_sdk.tools.sandbox.levels import DEFAULT_SETTINGS, SandboxSettings
from swarm_sdk.tools.sandbox.output import CellOutput
from swarm_sdk.tools.sandbox.protocol import CellResult, CellStatus, JournalEntry
from swarm_sdk.tools.sandbox.wire import Heard, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.types import Image

MAX_CELL_BYTES = 96 * 2**20
"""Bytes that one cell's messages may have together; more than a kernel of ours ever sends."""
BUSY_S = 10.0
"""Longest time until a kernel says that it began."""
IDLE_S = 3.0
"""Longest time between the reply to a cell and the end of its output."""
LAST_WORDS_S = 0.05
"""How long after its end we listen for what a process said before."""
GREETING_S = 0.25
"""Longest time that we wait for a kernel's greeting before we ask it something."""
MAX_JOURNAL = 10_000
MAX_NAME = 80
"""Characters of a variable's name that is told."""
_End = Literal["over", "late", "flood", "dead", "hang", "quit"]
_LOST = "the Python process was restarted: variables are lost, files are kept"
_DEAF = (
    "the Python process no longer answered and was restarted: variables are lost, files are kept"
)


class _Cell:
    """What has been heard of one request."""

    def __init__(self, request: str, output: CellOutput, num_oom: int) -> None:
        self.request = request
        self.output = output
        self.num_oom = num_oom
        """Processes killed for memory before it."""
        self.reply: Mapping[str, Any] | None = None
        self.is_idle = False
        self.has_begun = False
        self.num_bytes = 0

    def hear(self, heard: Heard) -> None:
        """Take in a message of any kind."""
        self.num_bytes += heard.num_bytes
        if heard.parent != self.request:
            return
        self.has_begun = True
        if heard.kind == "execute_reply":
            self.reply = self.reply or heard.content
        elif heard.kind == "status":
            self.is_idle = self.is_idle or heard.content.get("execution_state") == "idle"
        elif not self.is_idle:
            self.output.add(heard.kind, heard.content)

    @property
    def told(self) -> Mapping[str, Any]:
        """What our own kernel adds to a reply."""
        told = (self.reply or {}).get("swarm")
        return told if isinstance(told, dict) else {}

    @property
    def variables(self) -> tuple[str, ...]:
        """Names in the session after the cell."""
        told = self.told.get("variables")
        found = told if isinstance(told, list) else []
        names = [name for name in found[:64] if isinstance(name, str) and len(name) <= MAX_NAME]
        return tuple(name for name in names if name.isidentifier())

    @property
    def asks_to_exit(self) -> bool:
        """Whether the cell called ``quit()``: the process ends shortly after such a reply."""
        payloads = (self.reply or {}).get("payload")
        found = payloads if isinstance(payloads, list) else []
        return any(isinstance(one, dict) and one.get("source") == "ask_exit" for one in found)


class KernelSandbox:
    """One IPython kernel; an async context manager that starts it and ends it.

    Args:
        files: read-only under their names in the working directory.
        settings: what the code may use; isolated as far as the machine can, at least L1.
        max_chars: most characters of text that a cell gives back.
        start_timeout_s: how long the kernel may take to start.
        interrupt_grace_s: how long an interrupted cell may take to stop before it is killed.
        seed: of ``random`` and ``numpy.random``, the same after a restart; drawn unless given.
        host: what starts kernels: this process's fork-server, or ``ContainerHost(…).ready``.

    Raises:
        ConfigError: a file's name is not a plain name, or is given twice.
    """

    def __init__(
        self,
        files: Sequence[Image] = (),
        *,
        settings: SandboxSettings = DEFAULT_SETTINGS,
        max_chars: int = 4000,
        start_timeout_s: float = 60.0,
        interrupt_grace_s: float = 2.0,
        seed: int | None = None,
        host: Callable[[], Awaitable[Host]] = ready_zygote,
    ) -> None:
        check_file_names(files)
        self.files: tuple[Image, ...] = tuple(files)
        """Files given so far."""
        self.settings: SandboxSettings = settings
        self.seed: int = secrets.randbits(63) if seed is None else seed
        self._max_chars = max_chars
        self._start_timeout_s = start_timeout_s
        self._interrupt_grace_s = interrupt_grace_s
        self._name = f"k{secrets.token_hex(6)}"
        self._lock = anyio.Lock()
        self._host = host
        self._zygote: Host | None = None
        self._process: Process | None = None
        self._wire: Wire | None = None
        self._proxy: Proxy | None = None
        self._inputs: InputFolder | None = None
        self._is_closed = False
        self._is_interrupted = False
        self._variables: tuple[str, ...] = ()
        self._journal: list[JournalEntry] = []

    async def __aenter__(self) -> KernelSandbox:
        """Start the kernel.

        Raises:
            ConfigError: jupyter_client or ipykernel is not installed, or the machine does not give
                the isolation asked for.
            SandboxDied: the kernel does not start.
        """
        try:
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
        """The kernel's process; ``None`` where there is none."""
        process = self._process
        return process.pid if process is not None and process.is_alive else None

    @property
    def is_alive(self) -> bool:
        """Whether the kernel's process runs."""
        return self._process is not None and self._process.is_alive

    @property
    def isolation(self) -> str:
        """The level that holds, ``L3`` … ``L0``."""
        return self._zygote.isolation.name if self._zygote is not None else ""

    @property
    def journal(self) -> tuple[JournalEntry, ...]:
        """The cells that were run, in their order."""
        return tuple(self._journal)

    @property
    def variables(self) -> tuple[str, ...]:
        """Names in the session after its last cell, at most 64."""
        return self._variables

    def twin(self) -> KernelSandbox:
        """A sandbox of the same files, settings and seed, not started."""
        return KernelSandbox(
            self.files,
            settings=self.settings,
            max_chars=self._max_chars,
            start_timeout_s=self._start_timeout_s,
            interrupt_grace_s=self._interrupt_grace_s,
            seed=self.seed,
            host=self._host,
        )

    @property
    def memory_bytes(self) -> int:
        """Memory that the sandbox uses and shares with no other."""
        process = self._process
        if process is None or not process.is_alive:
            return 0
        if process.cgroup is not None:
            return process.cgroup.memory_bytes()
        return unshared_bytes(process.pid)

    async def run(self, code: str, *, timeout_s: float) -> CellResult:
        """Run one cell; see ``Sandbox.run``."""
        async with self._lock:
            if self._is_closed:
                raise SandboxDied("the sandbox is closed; no more code can run in it")
            output = CellOutput(
                code, max_chars=self._max_chars, max_pixels=self.settings.max_pixels
            )
            if not self.is_alive:
                await self._end_kernel()
                await self._start()
                output.note(_LOST)
            self._is_interrupted = False
            started = time.perf_counter()
            try:
                result = await self._run_cell(code, output, timeout_s)
            except BaseException:
                await self._end_kernel()
                raise
            if len(self._journal) < MAX_JOURNAL:
                self._journal.append(JournalEntry(code, result[0]))
            status, lost = result
            return CellResult(
                status=status,
                text=output.text,
                images=output.images,
                num_dropped_chars=output.num_dropped_chars,
                wall_s=time.perf_counter() - started,
                has_state=self.is_alive,
                lost_variables=lost,
                isolation=self.isolation,
            )

    def put(self, files: Sequence[Image]) -> None:
        """Give files; the next cell finds them in its working directory.

        Raises:
            ConfigError: as ``KernelSandbox``.
        """
        assert self._inputs is not None
        self._inputs.put(files)
        names = {file.name for file in files}
        self.files = (*(file for file in self.files if file.name not in names), *files)

    def outputs(
        self,
        *,
        max_files: int = 100,
        max_file_bytes: int = 16 * 2**20,
        max_total_bytes: int = 64 * 2**20,
    ) -> Outputs:
        """Files that cells wrote into the working directory; see ``collect``.

        Raises:
            SandboxDied: there is no kernel.
        """
        if self._process is None:
            raise SandboxDied("the sandbox has no process whose files could be read")
        home = open_folder("home", self._process.folder)
        try:
            return collect(
                home,
                max_files=max_files,
                max_file_bytes=max_file_bytes,
                max_total_bytes=max_total_bytes,
            )
        finally:
            os.close(home)

    def interrupt(self) -> None:
        """Interrupt the cell that runs; its result has status ``interrupted``."""
        if self._process is not None:
            self._is_interrupted = True
            self._process.interrupt()

    async def aclose(self) -> None:
        """End the kernel and delete its files."""
        self._is_closed = True
        with anyio.CancelScope(shield=True):
            await self._end_kernel()
            if self._zygote is not None:
                await self._zygote.forget(self._name)
            if self._inputs is not None:
                shutil.rmtree(self._inputs.path, ignore_errors=True)

    # -- one cell ----------------------------------------------------------------------------------

    async def _run_cell(
        self, code: str, output: CellOutput, timeout_s: float
    ) -> tuple[CellStatus, tuple[str, ...]]:
        cell = await self._execute(code, output)
        first = end = await self._listen(cell, timeout_s)
        if end == "hang" and not cell.has_begun:
            # The session was lost before this cell: it has not run, so a new process runs it. (Of a
            # process that died we cannot say so: the cell may have ended it before it was heard.)
            await self._end_kernel()
            await self._start()
            output.note(_DEAF)
            cell = await self._execute(code, output)
            first = end = await self._listen(cell, timeout_s)
        assert self._process is not None
        num_oom = cell.num_oom
        for _ in range(2):
            if end in ("late", "flood"):
                self._process.interrupt()
                cell.num_bytes = 0
                end = await self._listen(cell, self._interrupt_grace_s / 2)
        if end == "over" and cell.asks_to_exit:
            first = end = "quit"
        if end == "over":
            self._variables = cell.variables
            status = self._told_status(cell, first, timeout_s)
            if self._process.oom_kills() > num_oom:
                output.note(f"a process of the cell was killed: {self._memory()} were used up")
            return status, ()
        return await self._loss_of(cell, first, timeout_s, num_oom)

    async def _execute(self, code: str, output: CellOutput) -> _Cell:
        assert self._process is not None
        assert self._wire is not None
        num_oom = self._process.oom_kills()
        request = self._wire.send(
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": False,
            },
        )
        return _Cell(request, output, num_oom)

    def _told_status(self, cell: _Cell, end: _End, timeout_s: float) -> CellStatus:
        """Why a cell ended whose process lives on."""
        if end == "late":
            cell.output.note(f"stopped after {timeout_s:g} s; variables are kept")
            return "wall_timeout"
        if end == "flood" or cell.told.get("is_over_limit") is True:
            cell.output.note("stopped for printing too much; variables are kept")
            return "output_limit"
        if self._is_interrupted:
            return "interrupted"
        reply = cell.reply or {}
        is_error = cell.output.has_error or reply.get("status") == "error"
        return "error" if is_error else "ok"

    async def _loss_of(
        self, cell: _Cell, end: _End, timeout_s: float, num_oom: int
    ) -> tuple[CellStatus, tuple[str, ...]]:
        """End the kernel, and tell why and what went with it."""
        process = self._process
        assert process is not None
        if not process.is_alive and process.oom_kills() > num_oom:
            status: CellStatus = "oom"
            why = f"{self._memory()} were used up and the process was killed"
        elif end == "quit":
            status, why = "died", "the cell ended the process"
        elif end == "late":
            status = "wall_timeout"
            why = f"the cell did not stop after {timeout_s:g} s and its process was killed"
        elif end == "flood":
            status, why = "output_limit", "the cell did not stop printing and was killed"
        elif end == "hang":
            status, why = "hang", "the process no longer answered and was killed"
        else:
            status, why = "died", f"the process died ({process.ending()})"
        lost = self._variables
        names = f" ({', '.join(lost[:20])}{', …' if len(lost) > 20 else ''})" if lost else ""
        cell.output.note(f"{why}: variables are lost{names}, files are kept")
        await self._end_kernel()
        return status, lost

    def _memory(self) -> str:
        return f"the sandbox's {self.settings.memory_mb} MB of memory"

    async def _listen(self, cell: _Cell, timeout_s: float) -> _End:
        """Take in messages until the cell's end, or until there is nothing to wait for."""
        assert self._process is not None
        assert self._wire is not None
        wire, ends = self._wire, list[_End]()
        loop = asyncio.get_running_loop()
        # A descriptor of its own: who ends the sandbox meanwhile waits for the other.
        pidfd = os.dup(self._process.pidfd)

        def stop(end: _End) -> None:
            ends.append(end)
            wire.wake()

        def check_begun() -> None:
            if not cell.has_begun:
                stop("hang")

        def die() -> None:
            loop.remove_reader(pidfd)
            timers.append(loop.call_later(LAST_WORDS_S, stop, "dead"))

        timers = [loop.call_later(timeout_s, stop, "late"), loop.call_later(BUSY_S, check_begun)]
        loop.add_reader(pidfd, die)
        is_half = False
        try:
            while not ends:
                while not cell.is_idle and (heard := wire.output()) is not None:
                    cell.hear(heard)
                    if cell.num_bytes > MAX_CELL_BYTES:
                        return "flood"
                while cell.reply is None and (heard := wire.reply()) is not None:
                    cell.hear(heard)
                if cell.is_idle and cell.reply is not None:
                    return "over"
                if not is_half and (cell.is_idle or cell.reply is not None):
                    is_half = True  # outputs that do not reach us would make "ok" a lie
                    timers.append(loop.call_later(IDLE_S, stop, "hang"))
                await wire.news()
            return ends[0]
        finally:
            for timer in timers:
                timer.cancel()
            loop.remove_reader(pidfd)
            os.close(pidfd)

    # -- the process -------------------------------------------------------------------------------

    async def _start(self) -> None:
        zygote = await self._host()
        if self._zygote is not None and zygote is not self._zygote:
            self._inputs = None  # the files lie with a server that is gone
        is_new = self._inputs is None
        self._zygote = zygote
        if self._inputs is None:
            self._inputs = InputFolder(Path(zygote.inputs_folder, self._name))
        try:
            with anyio.fail_after(self._start_timeout_s):
                await self._launch(zygote, self._inputs)
        except TimeoutError as error:
            raise SandboxDied(
                f"the sandbox did not start within {self._start_timeout_s:g} s; try again"
            ) from error
        if is_new:
            self.put(self.files)

    async def _launch(self, zygote: Host, inputs: InputFolder) -> None:
        try:
            self._process = await zygote.launch(
                self._name, self.settings, inputs=str(inputs.path), seed=self.seed
            )
            told = await self._process.wait_ready()
            if self._process.listener is not None:
                self._proxy = Proxy(self.settings.hosts)
                await self._proxy.serve(self._process.listener)
            address = f"/proc/self/fd/{self._process.folder}/run/s"
            try:
                self._wire = await Wire.connect(address, told["key"].encode())
            except OSError as error:
                raise SandboxDied(f"the sandbox's sockets cannot be reached: {error}") from error
            await self._until_heard(self._wire)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._end_kernel()
            raise

    async def _until_heard(self, wire: Wire) -> None:
        """Wait until outputs reach us, or for the end of the process.

        A kernel greets who listens; where that is lost, a question makes it speak.

        Raises:
            SandboxDied: it ended.
        """
        assert self._process is not None
        while wire.output() is None:
            if not self._process.is_alive:
                raise SandboxDied(f"the sandbox ended while it started ({self._process.ending()})")
            with anyio.move_on_after(GREETING_S) as waiting:
                await wire.news()
            if waiting.cancelled_caught:
                wire.send("kernel_info_request", {})

    async def _end_kernel(self) -> None:
        self._variables = ()
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.close()
        proxy, self._proxy = self._proxy, None
        if proxy is not None:
            await proxy.aclose()
        process, self._process = self._process, None
        if process is not None:
            with anyio.CancelScope(shield=True):
                await process.end()
            process.close()


def unshared_bytes(pid: int) -> int:
    """Memory of a process that no other shares; 0 where it cannot be read."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
    return 0
