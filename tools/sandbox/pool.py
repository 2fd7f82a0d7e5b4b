"""Kernels that stand ready, sandboxed and idle: taking one costs one cell's time.

    async with KernelPool(4) as pool:
        tool = IPythonTool(pool.lease)         one pool for all episodes, swarms and rollouts

    starting ──> idle ─ healthy? ──> leased ──> ended, and another one starts
                          └ no ──> ended

No kernel is leased twice. All pools of a process share its fork-server.

Invariants: starting + idle + leased = alive <= max_alive; kernels start ahead only while those that
stand ready hold less than ``memory_mb``; nothing is alive after the pool.
"""

from __future__ import annotations

from collections import deque
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from swarm_sdk.errors import ConfigError, SandboxDied, SwarmError
from swarm_sdk.tools.sandbox.files import check_file_names
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.levels import DEFAULT_SETTINGS, SandboxSettings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from anyio.abc import TaskGroup

    from swarm_sdk.types import Image

MAX_STARTING = 4
"""Kernels that start at one time; more would only slow each other down."""

AHEAD_S = 0.1
"""What a start ahead waits while another kernel stands ready: the lease that was just given runs
its first cell in this time, and should have the processors."""
TYPICAL_BYTES = 12 * 2**20
"""What an idle kernel holds for itself alone (measured: ``benchmarks/sandbox.py``)."""


class KernelPool:
    """Starts kernels ahead of their use.

    Args:
        size: kernels that are kept idle, or starting, for the next leases.
        max_alive: most kernels alive, idle and leased together.
        memory_mb: memory that idle kernels may hold together, shared pages not counted.
        wait_s: how long a lease waits for a kernel when ``max_alive`` are in use.
        settings: what the code may use.

    Raises:
        ConfigError: a number makes no sense.
    """

    def __init__(
        self,
        size: int = 2,
        *,
        max_alive: int = 32,
        memory_mb: int = 2048,
        wait_s: float = 60.0,
        settings: SandboxSettings = DEFAULT_SETTINGS,
    ) -> None:
        if size < 0 or max_alive < max(1, size):
            raise ConfigError(
                f"a pool needs 0 <= size <= max_alive and max_alive >= 1, got size={size} and "
                f"max_alive={max_alive}"
            )
        if memory_mb * 2**20 < TYPICAL_BYTES:
            raise ConfigError(
                f"memory_mb must be at least {TYPICAL_BYTES // 2**20}, what one idle kernel holds, "
                f"got {memory_mb}"
            )
        self.settings: SandboxSettings = settings
        self._size = size
        self._max_alive = max_alive
        self._memory_mb = memory_mb
        self._wait_s = wait_s
        self._idle: deque[KernelSandbox | SwarmError] = deque()
        self._num_starting = 0
        self._num_waiting = 0
        self._num_alive = 0
        self._changed = anyio.Condition()
        self._hurry = anyio.Event()
        self._group: TaskGroup | None = None
        self._stack = AsyncExitStack()

    @property
    def num_alive(self) -> int:
        """Kernels starting, idle and leased."""
        return self._num_alive

    @property
    def num_idle(self) -> int:
        """Kernels that stand ready."""
        return sum(isinstance(one, KernelSandbox) for one in self._idle)

    async def __aenter__(self) -> KernelPool:
        """Begin to start kernels."""
        self._stack.push_async_callback(self._end_idle)
        self._group = await self._stack.enter_async_context(anyio.create_task_group())
        self._refill()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """End all kernels that are not leased; a leased one ends with its lease."""
        assert self._group is not None
        self._group.cancel_scope.cancel()
        self._group = None
        await self._stack.aclose()

    @asynccontextmanager
    async def lease(self, files: Sequence[Image] = ()) -> AsyncIterator[KernelSandbox]:
        """Hold one kernel that nobody used before, with ``files`` in its working directory.

        Raises:
            ConfigError: a file's name is not a plain name, or the pool is not open.
            SandboxDied: no kernel could be started, or none became free.
        """
        check_file_names(files)
        sandbox = await self._take()
        try:
            sandbox.put(files)
            yield sandbox
        finally:
            with anyio.CancelScope(shield=True):
                await self._end(sandbox)

    async def wait_ready(self, number: int) -> None:
        """Wait until ``number`` kernels, or an error, stand ready."""
        async with self._changed:
            while len(self._idle) < min(number, self._size):
                await self._changed.wait()

    async def _take(self) -> KernelSandbox:
        if self._group is None:
            raise ConfigError("the pool of sandboxes is not open; use 'async with pool:'")
        while True:
            taken = await self._next()
            if isinstance(taken, SwarmError):
                raise taken
            self._refill()
            if taken.is_alive:
                return taken
            await self._end(taken)  # it died in idleness

    async def _next(self) -> KernelSandbox | SwarmError:
        async with self._changed:
            self._num_waiting += 1
            try:
                with anyio.fail_after(self._wait_s):
                    self._refill()
                    while not self._idle:
                        self._hurry.set()
                        await self._changed.wait()
                    return self._idle.popleft()
            except TimeoutError as error:
                raise SandboxDied(
                    f"all {self._max_alive} sandboxes are in use; try again later"
                ) from error
            finally:
                self._num_waiting -= 1

    async def _end(self, sandbox: KernelSandbox) -> None:
        await sandbox.aclose()
        self._num_alive -= 1
        self._refill()
        async with self._changed:
            self._changed.notify_all()

    def _refill(self) -> None:
        """Start as many kernels as are wanted and allowed."""
        while (
            self._group is not None
            and len(self._idle) + self._num_starting < self._size + self._num_waiting
            and self._num_alive < self._max_alive
            and self._num_starting < MAX_STARTING
            and (self._num_waiting or self._has_memory())
        ):
            self._num_alive += 1
            self._num_starting += 1
            self._group.start_soon(self._start_one, name="start a sandbox")

    def _has_memory(self) -> bool:
        idle = [one.memory_bytes for one in self._idle if isinstance(one, KernelSandbox)]
        typical = max(idle, default=TYPICAL_BYTES)
        return sum(idle) + typical * (self._num_starting + 1) <= self._memory_mb * 2**20

    async def _start_one(self) -> None:
        sandbox = KernelSandbox(settings=self.settings)
        try:
            if self._idle:
                self._hurry = anyio.Event()
                with anyio.move_on_after(AHEAD_S):
                    await self._hurry.wait()
            self._idle.append(await sandbox.__aenter__())
        except SwarmError as error:  # told to the lease that waits for this kernel
            self._num_alive -= 1
            self._idle.append(error)
        except BaseException:
            self._num_alive -= 1
            raise
        finally:
            self._num_starting -= 1
        if not isinstance(self._idle[-1], SwarmError):
            self._refill()
        async with self._changed:
            self._changed.notify_all()

    async def _end_idle(self) -> None:
        while self._idle:
            sandbox = self._idle.popleft()
            if isinstance(sandbox, KernelSandbox):
                await sandbox.aclose()
                self._num_alive -= 1
