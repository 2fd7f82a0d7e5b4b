"""Branches of a session: the same cells run again in kernels of their own.

    async with branches(sandbox, 3, pool) as forks:        each ends as the session stands now
        results = [await fork.run(code, timeout_s=10) for fork, code in zip(forks, codes)]

Replay, not a copy of the process: a kernel has threads (messages, heartbeat, whatever a cell
started) and a fork keeps only the one that forks, with the locks of all others as they were. The
seed of the session's random numbers and its files go with it, so that cells that depend on nothing
outside give the same; where the outcome of a cell or the names in the session differ, the branch is
refused and not handed out (docs/adr/0010-branches-replay-the-journal.md).
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import anyio

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.kernel import KernelSandbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from swarm_sdk.tools.sandbox.protocol import JournalEntry

_REPLAYED = ("ok", "error")
"""Cells that ended by themselves. One that was interrupted leaves what no second run repeats."""


@asynccontextmanager
async def branches(
    sandbox: KernelSandbox, number: int, *, timeout_s: float = 60.0
) -> AsyncIterator[Sequence[KernelSandbox]]:
    """``number`` fresh kernels in the state of ``sandbox``; they end with the context.

    Args:
        sandbox: stays as it is, and goes on beside its branches.
        number: of branches.
        timeout_s: of each cell that is run again.

    Raises:
        ConfigError: the session holds a cell that did not end by itself, or ``number`` is not
            positive.
        SandboxDied: a cell ended differently, so that the branch is not what the session is.
    """
    if number <= 0:
        raise ConfigError(f"the number of branches must be positive, got {number}")
    journal = sandbox.journal
    for index, entry in enumerate(journal):
        if entry.status not in _REPLAYED:
            raise ConfigError(
                f"cell {index + 1} of the session ended as '{entry.status}', which cannot be run "
                "again; branch a session whose cells ended by themselves"
            )
    made = [sandbox.twin() for _ in range(number)]
    async with AsyncExitStack() as stack:

        async def replay(fork: KernelSandbox) -> None:
            for index, entry in enumerate(journal):
                await _again(fork, index, entry, timeout_s)
            if set(fork.variables) != set(sandbox.variables):
                differing = ", ".join(sorted(set(fork.variables) ^ set(sandbox.variables)))
                raise SandboxDied(f"the branch differs from the session in: {differing}")

        for fork in made:
            await stack.enter_async_context(fork)
        try:
            async with anyio.create_task_group() as group:
                for fork in made:
                    group.start_soon(replay, fork)
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        yield made


async def _again(fork: KernelSandbox, index: int, entry: JournalEntry, timeout_s: float) -> None:
    result = await fork.run(entry.code, timeout_s=timeout_s)
    if result.status != entry.status:
        raise SandboxDied(
            f"cell {index + 1} ended as '{entry.status}' in the session and as '{result.status}' "
            "in the branch: it depends on something that changed"
        )
