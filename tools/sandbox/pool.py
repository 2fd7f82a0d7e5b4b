"""Kernels that stand ready: starting one costs about a second, taking one from the pool nothing.

    async with KernelPool(4) as pool:
        tool = IPythonTool(pool.lease)

    starting ──> idle ──> leased ──> ended, and another one starts
                  ^         │
                  └─────────┘  reuse=True: variables forgotten, fresh working directory

Invariants: starting + idle + leased = alive <= max_alive; nothing is alive after the pool.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from swarm_sdk.errors import ConfigError, SandboxDied, SwarmError
from swarm_sdk.tools.sandbox.kernel import KernelSandbox, check_file_names

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from anyio.abc import TaskGroup

    from swarm_sdk.types import Image


class KernelPool:
    """Starts kernels ahead of their use.

    Args:
        size: kernels that are kept idle, or starting, for the next leases.
        max_alive: most kernels alive, idle and leased together.
        reuse: hand a returned kernel out again after forgetting its variables. Quick, for trusted
            code only: a lease can see what an earlier one did to imported modules or left running.
        wait_s: how long a lease waits for a kernel when ``max_alive`` are in use.

    Raises:
        ConfigError: a number makes no sense.
    """

    def __init__(
        self, size: int = 2, *, max_alive: int = 32, reuse: bool = False, wait_s: float = 60.0
    ) -> None:
        if size < 0 or max_alive < max(1, size):
            raise ConfigError(
                f"a pool needs 0 <= size <= max_alive and max_alive >= 1, got size={size} and "
                f"max_alive={max_alive}"
            )
        self._size = size
        self._max_alive = max_alive
        self._reuse = reuse
        self._wait_s = wait_s
        self._idle: list[KernelSandbox | SwarmError] = []
        self._num_starting = 0
        self._num_waiting = 0
        self._num_alive = 0
        self._changed = anyio.Condition()
        self._group: TaskGroup | None = None
        self._stack = AsyncExitStack()

    @property
    def num_alive(self) -> int:
        """Kernels starting, idle and leased."""
        return self._num_alive

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
        """Hold one kernel, with ``files`` in its working directory.

        Raises:
            ConfigError: a file's name is not a plain name, or the pool is not open.
            SandboxDied: no kernel could be started, or none became free.
        """
        check_file_names(files)
        sandbox = await self._take()
        try:
            await sandbox.put(files)
            yield sandbox
        finally:
            with anyio.CancelScope(shield=True):
                await self._give_back(sandbox)

    async def _take(self) -> KernelSandbox:
        if self._group is None:
            raise ConfigError("the pool of sandboxes is not open; use 'async with pool:'")
        async with self._changed:
            self._num_waiting += 1
            try:
                with anyio.fail_after(self._wait_s):
                    self._refill()
                    while not self._idle:
                        await self._changed.wait()
                    taken = self._idle.pop(0)
            except TimeoutError as error:
                raise SandboxDied(
                    f"all {self._max_alive} sandboxes are in use; try again later"
                ) from error
            finally:
                self._num_waiting -= 1
        if isinstance(taken, SwarmError):
            raise taken
        self._refill()
        return taken

    async def _give_back(self, sandbox: KernelSandbox) -> None:
        is_fit = False
        if self._reuse and self._group is not None:
            try:
                await sandbox.reset()
                is_fit = True
            except SandboxDied:
                is_fit = False
        if is_fit and self._group is not None:
            self._idle.append(sandbox)
        else:
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
        ):
            self._num_alive += 1
            self._num_starting += 1
            self._group.start_soon(self._start_one, name="start a sandbox")

    async def _start_one(self) -> None:
        sandbox = KernelSandbox()
        try:
            self._idle.append(await sandbox.__aenter__())
        except SwarmError as error:  # told to the lease that waits for this kernel
            self._num_alive -= 1
            self._idle.append(error)
        except BaseException:
            self._num_alive -= 1
            raise
        finally:
            self._num_starting -= 1
        async with self._changed:
            self._changed.notify_all()

    async def _end_idle(self) -> None:
        while self._idle:
            sandbox = self._idle.pop()
            if isinstance(sandbox, KernelSandbox):
                await sandbox.aclose()
                self._num_alive -= 1
