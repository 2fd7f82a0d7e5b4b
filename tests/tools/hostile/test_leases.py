"""A thousand leases of good and hostile cells leave nothing behind (``make test-slow``)."""

import gc
import os
import random
from pathlib import Path

import anyio
import pytest
from cases import CASES  # tests/tools/hostile/cases.py

from swarm_sdk.tools.sandbox.launcher import Zygote, shared_zygote
from swarm_sdk.tools.sandbox.levels import SandboxSettings
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.types import Image

NUM_LEASES = int(os.environ.get("SWARM_LEASES", "1000"))
SETTINGS = SandboxSettings(
    isolation="best", memory_mb=256, disk_mb=32, num_files=2000, num_processes=64
)
GOOD = [
    "1 + 1",
    "x = [i ** 2 for i in range(1000)]; sum(x)",
    "import matplotlib.pyplot as plt; plt.plot([1, 2]);",
    "open('made.txt', 'w').write('x' * 10000)",
    "raise ValueError('plain')",
    "binarize(images[0]).mean()",
]
QUICK = [case.code for case in CASES if case.timeout_s <= 2]


def png():
    return Image(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
            "0000000c49444154789c63606060000000040001f61738550000000049454e44ae426082"
        ),
        name="a.png",
    )


def open_files(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory_mb(pid):
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def children(pid):
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += children(int(child))
    return found


def counts(zygote: Zygote):
    """What must be the same before and after."""
    server = children(zygote.pid)
    folder = Path(zygote._folder)
    groups = zygote._cgroups._parents.values() if zygote._cgroups is not None else ()
    return {
        "processes": len(children(os.getpid())),
        "descriptors": open_files(os.getpid()),
        "descriptors of the server": sum(map(open_files, server)),
        "mounts of the server": len(Path(f"/proc/{server[-1]}/mounts").read_text().splitlines()),
        "cgroups": sum(len([*parent.glob("*/")]) for parent in groups),
        "input folders": len(os.listdir(zygote.inputs_folder)),
        "unix sockets": Path("/proc/net/unix").read_text().count(str(folder)),
    }


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_thousand_leases_leave_nothing_behind():
    rng = random.Random(0)
    zygote = shared_zygote()

    async def run_leases(number):
        limiter = anyio.CapacityLimiter(4)
        ended = []

        async def run_one():
            async with limiter, pool.lease([png()]) as sandbox:
                for _ in range(rng.randint(1, 3)):
                    code = rng.choice(GOOD if rng.random() < 0.7 else QUICK)
                    await sandbox.run(code, timeout_s=0.7)
                await sandbox.run("", timeout_s=20)  # the last cell may still end the process
                after = await sandbox.run("print(6 * 7)", timeout_s=20)
                ended.append((after.status, after.text.endswith("42")))

        async with KernelPool(4, settings=SETTINGS) as pool, anyio.create_task_group() as group:
            for _ in range(number):
                group.start_soon(run_one)
        return ended

    assert set(anyio.run(run_leases, NUM_LEASES // 10)) == {("ok", True)}  # caches fill
    gc.collect()
    before, memory_before = counts(zygote), memory_mb(os.getpid())
    server_before = memory_mb(children(zygote.pid)[-1])
    ended = anyio.run(run_leases, NUM_LEASES)
    gc.collect()
    assert len(ended) == NUM_LEASES
    assert set(ended) == {("ok", True)}
    assert counts(zygote) == before
    assert memory_mb(os.getpid()) < memory_before + 30
    assert memory_mb(children(zygote.pid)[-1]) < server_before + 10
