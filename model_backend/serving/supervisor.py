"""Keeps the processes of a plan running, until it is told to stop or one dies too often.

    start ─> not ready: ask /health_generate, tell the log's last line ─> ready ─> ask /health
      ▲                 │ died, or not ready in time                       │ died, or silent
      └── wait 1, 2, 4 … s ◄── at most max_restarts ◄──────────────────────┘
                              more: everything stops, ServeFailed with the end of its log

Deaths are counted anew when a process has served for steady_s.

/health asks the server's HTTP alone (``plan.HEALTH``), so a paused one lives. One whose batch hangs
is ended by SGLang's watchdog after five minutes, and counts as dead here; so does one that lost a
process. What nobody sees is a scheduler that hangs outside of a batch, say in new weights.

Every process leads a group of its own, so that what it started ends with it: SIGTERM to the leader,
and SIGKILL to the group after grace_s or when the leader is gone. A server ends also if this
process is killed. The router starts when all servers are ready.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anyio
import anyio.to_thread

from swarm_sdk.errors import ServeFailed
from swarm_sdk.model_backend.serving.plan import Launch, Plan

LOG_TAIL_LINES = 20
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


TellKind = Literal["started", "waiting", "ready", "died", "silent", "stopped"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What happened to a process."""

    kind: TellKind
    name: str
    pid: int
    after_s: float
    """Seconds since its start."""
    text: str = ""
    """Last line of its log, or why it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long is waited, and how often a process is started again."""

    ready_s: float = 3600.0
    """For a first answer; a terabyte of weights takes its time."""
    silent_s: float = 300.0
    """Without an answer to /health until a server counts as hung."""
    poll_s: float = 1.0
    """Between two questions."""
    tell_s: float = 5.0
    """Between two lines of progress."""
    grace_s: float = 20.0
    """From SIGTERM to SIGKILL."""
    max_restarts: int = 3
    steady_s: float = 600.0
    """Serving this long makes the deaths before forgotten."""


class Supervisor:
    """Runs a plan; ``run`` returns when it is cancelled, everything is stopped then."""

    def __init__(
        self,
        plan: Plan,
        logs: Path,
        on_told: Callable[[Told], None],
        patience: Patience = Patience(),
    ) -> None:
        self._plan = plan
        self._logs = logs
        self._on_told = on_told
        self._patience = patience

    async def run(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until cancelled; ``on_ready`` is called once, when all processes answer.

        Raises:
            ServeFailed: a process died more often than is allowed, or cannot be started; all are
                stopped.
        """
        self._logs.mkdir(parents=True, exist_ok=True)
        failed: list[ServeFailed] = []
        ready = {launch.name: anyio.Event() for launch in self._plan.servers}

        async def keep(launch: Launch, is_ready: anyio.Event) -> None:
            try:
                await self._keep(launch, is_ready)
            except ServeFailed as error:  # one sentence, not a group of errors
                failed.append(error)
                group.cancel_scope.cancel()
            except OSError as error:  # no room for its log, no Python any more
                failed.append(ServeFailed(f"{launch.name} cannot be kept running: {error}"))
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for launch in self._plan.servers:
                group.start_soon(keep, launch, ready[launch.name], name=launch.name)
            for event in ready.values():
                await event.wait()
            router = self._plan.router
            if router is None:
                on_ready()
            else:
                is_ready = anyio.Event()
                group.start_soon(keep, router, is_ready, name=router.name)
                await is_ready.wait()
                on_ready()
        if failed:
            raise failed[0]

    async def _keep(self, launch: Launch, is_ready: anyio.Event) -> None:
        patience, deaths = self._patience, 0
        while True:
            ready_s: float | None = None
            process = _Process(launch, self._logs / f"{launch.name}.log")
            self._tell("started", process, f"log: {process.log}")
            try:
                reason = await self._until_ready(process)
                if reason is None:
                    self._tell("ready", process, launch.url)
                    is_ready.set()
                    ready_s = time.monotonic()
                    reason = await self._until_dead(process)
                died_s = time.monotonic()
            finally:
                with anyio.CancelScope(shield=True):
                    await process.stop(patience.grace_s)
                self._tell("stopped", process)
            if ready_s is not None and died_s - ready_s > patience.steady_s:
                deaths = 0
            deaths += 1
            if deaths > patience.max_restarts:
                raise ServeFailed(
                    f"{launch.name} {reason} and was started {deaths} times without serving for "
                    f"{patience.steady_s:.0f} s; the end of {process.log}:\n{process.log_tail()}"
                )
            await anyio.sleep(min(2.0 ** (deaths - 1), 30.0) * patience.poll_s)

    async def _until_ready(self, process: _Process) -> str | None:
        """Return ``None`` when the process answers, else why it never will."""
        told_s = time.monotonic()
        # The router's /health says only that it runs; /readiness, that it has a server.
        path = "/health_generate" if process.launch in self._plan.servers else "/readiness"
        while process.is_running():
            if await _answers(process.launch.url + path):
                return None
            if process.age_s() > self._patience.ready_s:
                return f"was not ready after {self._patience.ready_s:.0f} s"
            if time.monotonic() - told_s >= self._patience.tell_s:
                told_s = time.monotonic()
                self._tell("waiting", process, process.log_tail(1))
            await anyio.sleep(self._patience.poll_s)
        return self._death(process)

    async def _until_dead(self, process: _Process) -> str:
        answered_s = time.monotonic()
        while process.is_running():
            if await _answers(process.launch.url + "/health"):
                answered_s = time.monotonic()
            elif time.monotonic() - answered_s > self._patience.silent_s:
                reason = f"did not answer for {self._patience.silent_s:.0f} s"
                self._tell("silent", process, reason)
                return reason
            await anyio.sleep(self._patience.poll_s)
        return self._death(process)

    def _death(self, process: _Process) -> str:
        code = process.popen.poll()
        assert code is not None
        reason = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        self._tell("died", process, reason)
        return reason

    def _tell(self, kind: TellKind, process: _Process, text: str = "") -> None:
        self._on_told(
            Told(
                kind=kind,
                name=process.launch.name,
                pid=process.popen.pid,
                after_s=process.age_s(),
                text=text,
            )
        )


class _Process:
    """One process that leads a group of its own and writes into a log."""

    def __init__(self, launch: Launch, log: Path) -> None:
        self.launch = launch
        self.log = log
        self._started_s = time.monotonic()
        with log.open("ab") as file:
            file.write(f"\n$ {' '.join(launch.command)}\n".encode())
            file.flush()
            self.popen = subprocess.Popen(  # noqa: S603
                launch.command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | launch.environment,
                start_new_session=True,
                preexec_fn=_end_with_parent,  # noqa: PLW1509  one system call, no lock
            )

    def is_running(self) -> bool:
        return self.popen.poll() is None

    def age_s(self) -> float:
        return time.monotonic() - self._started_s

    def log_tail(self, num_lines: int = LOG_TAIL_LINES) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 16_384))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
        # Without what our own questions leave there.
        told = [line for line in lines if line.strip() and '"GET /health' not in line]
        return "\n".join(told[-num_lines:])

    async def stop(self, grace_s: float) -> None:
        """End the process, and whatever it left in its group."""
        if self.is_running():
            self.popen.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + grace_s
            while self.is_running() and time.monotonic() < deadline_s:  # noqa: ASYNC110
                await anyio.sleep(0.05)
        with suppress(ProcessLookupError):  # nothing may be left of the group
            os.killpg(self.popen.pid, signal.SIGKILL)
        await anyio.to_thread.run_sync(self.popen.wait)
        # Its GPU memory is free when the last one is gone, and a new server needs that.
        deadline_s = time.monotonic() + grace_s
        while _is_group_alive(self.popen.pid) and time.monotonic() < deadline_s:  # noqa: ASYNC110
            await anyio.sleep(0.02)


def _is_group_alive(group: int) -> bool:
    """Whether a process of the group still runs; one that nobody has waited for does not count."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it ended meanwhile
                state, _, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(its_group) == group and state != "Z":
                    return True
    return False


def _end_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


async def _answers(url: str) -> bool:
    return await anyio.to_thread.run_sync(_get, url, abandon_on_cancel=True)


def _get(url: str) -> bool:
    try:
        # Loopback is never asked for through a proxy of the environment.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(url, timeout=30) as answer:
            return bool(answer.status == 200)
    except OSError:  # not listening yet, or not well (an HTTPError is one): asked again
        return False
