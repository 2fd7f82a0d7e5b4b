"""One pool of kernels serves the rollouts of a process."""

import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import anyio
import pytest

from swarm_sdk import Swarm, Task
from swarm_sdk.runtime.environment import Environment, EnvTask, SubRollouts
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.types import Tool

pytestmark = pytest.mark.anyio

CELL = "import os\nprint('mine' in globals(), os.listdir('.'))\nmine = open('left', 'w')"


class Cells(Environment):
    """Each task runs a cell in a kernel of the pool, two episodes at a time."""

    name = "cells"

    def __init__(self, pool: KernelPool) -> None:
        self.pool = pool
        self.pids: list[int] = []
        self.together: list[set[int]] = []
        self._leased: set[int] = set()
        self._both = anyio.Event()

    def tasks(self) -> Iterator[EnvTask]:
        for index in range(6):
            yield EnvTask(str(index), Task(str(index)), {})

    @asynccontextmanager
    async def toolset(self, task: EnvTask) -> AsyncIterator[Sequence[Tool]]:
        @asynccontextmanager
        async def lease(files: Any) -> Any:
            async with self.pool.lease(files) as sandbox:
                pid = sandbox.pid
                self._leased.add(pid)
                self.pids.append(pid)
                if len(self._leased) == 2:
                    self._both.set()
                await self._both.wait()  # the first goes on only beside a second
                self.together.append(set(self._leased))
                yield sandbox
                self._leased.discard(pid)

        yield [IPythonTool(lease)]

    async def judge(self, task: EnvTask, result: Any, rollouts: SubRollouts) -> Mapping[str, float]:
        return {"reward": float(result.output == "False []")}


def policy(messages: Any, tools: Any) -> Any:
    results = [message.content for message in messages if message.role == "tool"]
    return results[0].strip() if results else calls(call("ipython", code=CELL))


async def test_rollouts_at_one_time_lease_from_one_pool_and_leave_nothing(tmp_path):
    async with KernelPool(1, max_alive=2) as pool:
        environment = Cells(pool)
        async with Swarm(ScriptedModel(policy), runs=tmp_path) as swarm:
            manager = swarm.rollouts(max_episodes=2)
            async with aclosing(manager.run(environment)) as rollouts:
                found = [rollout async for rollout in rollouts]
        assert [rollout.reward for rollout in found] == [1.0] * 6
        assert len(set(environment.pids)) == 6  # none twice
        assert max(map(len, environment.together)) == 2
        assert pool.num_alive <= 2
        assert pool.num_alive - pool.num_idle <= 1  # what is starting: nothing is leased
    assert pool.num_alive == 0
    assert not set(map(str, environment.pids)) & set(os.listdir("/proc"))  # noqa: PTH208
