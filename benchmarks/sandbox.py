"""How quick, how small and how isolated our kernels are, beside a plain kernel manager.

    python benchmarks/sandbox.py [--json] [--quick]

Peer: ``AsyncKernelManager`` of jupyter_client with ipykernel, as it comes: no isolation, no
imports. Ours: the imaging stack imported, isolated as far as the machine can. Both in one run, one
after the other in turns.

Keys: warm_first_result_ms_p50 (a lease of a pool and ``1+1``), cold_isolated_ms_p50 (fork, isolate,
connect and ``1+1``), cell_ms_p50 and cell_ms_p99 (``1+1`` in a running kernel), unshared_mb (memory
of an idle kernel that it shares with no other), hundred_ready_s (100 kernels started and each one
cell run), cpu_s_per_kernel (processor seconds of a start, in all processes), isolation (the level).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk.tools.sandbox.kernel import KernelSandbox, unshared_bytes
from swarm_sdk.tools.sandbox.launcher import ready_zygote
from swarm_sdk.tools.sandbox.pool import KernelPool

CELL = "1+1"


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def ms_since(started_s: float) -> float:
    return (time.perf_counter() - started_s) * 1e3


def cpu_s(pids: Sequence[int]) -> float:
    """Processor seconds of processes, threads included."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def ours_cold(number: int) -> list[float]:
    times = []
    for _ in range(number):
        started = time.perf_counter()
        async with KernelSandbox() as sandbox:
            await sandbox.run(CELL, timeout_s=20)
            times.append(ms_since(started))
    return times


async def ours_warm(number: int) -> list[float]:
    times = []
    async with KernelPool(2) as pool:
        for _ in range(number):
            await pool.wait_ready(2)
            started = time.perf_counter()
            async with pool.lease() as sandbox:
                await sandbox.run(CELL, timeout_s=20)
                times.append(ms_since(started))
    return times


async def ours_cells(number: int) -> tuple[list[float], float, float]:
    """Milliseconds of each cell; MB that are not shared, idle and after a plot."""
    times = []
    async with KernelSandbox() as sandbox:
        await sandbox.run(CELL, timeout_s=20)
        assert sandbox.pid is not None
        idle = unshared_bytes(sandbox.pid) / 2**20
        for _ in range(number):
            started = time.perf_counter()
            await sandbox.run(CELL, timeout_s=20)
            times.append(ms_since(started))
        plot = "import matplotlib.pyplot as plt; plt.plot([1, 2]);"
        await sandbox.run(plot, timeout_s=20)
        plotted = unshared_bytes(sandbox.pid) / 2**20
    return times, idle, plotted


async def ours_many(number: int) -> dict[str, float]:
    """Start ``number`` kernels, four at a time, and run a cell in each."""
    zygote = await ready_zygote()
    server = [zygote.pid, *children(zygote.pid)]
    before = cpu_s([os.getpid(), *server])
    started = time.perf_counter()
    sandboxes = [KernelSandbox() for _ in range(number)]
    limiter = anyio.CapacityLimiter(4)

    async def start(sandbox: KernelSandbox) -> None:
        async with limiter:
            await sandbox.__aenter__()
            await sandbox.run(CELL, timeout_s=60)

    async with anyio.create_task_group() as group:
        for sandbox in sandboxes:
            group.start_soon(start, sandbox)
    wall_s = time.perf_counter() - started
    pids = [sandbox.pid for sandbox in sandboxes if sandbox.pid]
    used_s = cpu_s([os.getpid(), *server, *pids]) - before
    memory = statistics.mean(unshared_bytes(pid) for pid in pids) / 2**20
    started = time.perf_counter()
    async with anyio.create_task_group() as group:
        for sandbox in sandboxes:
            group.start_soon(sandbox.aclose)
    return {
        "wall_s": wall_s,
        "cpu_s": used_s / number,
        "unshared_mb": memory,
        "close_s": time.perf_counter() - started,
    }


async def plain(num_starts: int, num_cells: int) -> tuple[list[float], list[float], float]:
    """Milliseconds to the first result, of each cell, and MB of an idle kernel."""
    from jupyter_client.manager import start_new_async_kernel

    starts, cells, memory = [], [], 0.0
    for _ in range(num_starts):
        started = time.perf_counter()
        manager, client = await start_new_async_kernel()
        await client.execute_interactive(CELL, output_hook=lambda _: None, timeout=60)
        starts.append(ms_since(started))
        memory = unshared_bytes(manager.provisioner.pid) / 2**20
        for _ in range(num_cells // num_starts):
            started = time.perf_counter()
            await client.execute_interactive(CELL, output_hook=lambda _: None, timeout=60)
            cells.append(ms_since(started))
        client.stop_channels()
        await manager.shutdown_kernel(now=True)
    return starts, cells, memory


async def measure(*, rounds: int, starts: int, cells: int, many: int) -> tuple[Any, Any]:
    """Ours and the peer in turns; medians over everything."""
    zygote_started = time.perf_counter()
    zygote = await ready_zygote()
    zygote_s = time.perf_counter() - zygote_started
    cold, warm, our_cells, plain_starts, plain_cells = [], [], [], [], []
    idle_mb = plotted_mb = plain_mb = 0.0
    for _ in range(rounds):
        cold += await ours_cold(starts)
        warm += await ours_warm(starts)
        more, idle_mb, plotted_mb = await ours_cells(cells)
        our_cells += more
        more_starts, more_cells, plain_mb = await plain(2, cells // 2)
        plain_starts += more_starts
        plain_cells += more_cells
    hundred = await ours_many(many)
    results = {
        "warm_first_result_ms_p50": statistics.median(warm),
        "warm_first_result_ms_min": min(warm),
        "cold_isolated_ms_p50": statistics.median(cold),
        "cold_isolated_ms_min": min(cold),
        "cell_ms_p50": statistics.median(our_cells),
        "cell_ms_p99": percentile(our_cells, 0.99),
        "unshared_mb": hundred["unshared_mb"],
        "unshared_mb_after_a_plot": plotted_mb,
        "idle_mb_of_one": idle_mb,
        "hundred_ready_s": hundred["wall_s"] * 100 / many,
        "hundred_closed_s": hundred["close_s"] * 100 / many,
        "cpu_s_per_kernel": hundred["cpu_s"],
        "zygote_start_s": zygote_s,
        "isolation": zygote.isolation.name,
    }
    peers = {
        "AsyncKernelManager": {
            "first_result_ms_p50": statistics.median(plain_starts),
            "cell_ms_p50": statistics.median(plain_cells),
            "cell_ms_p99": percentile(plain_cells, 0.99),
            "unshared_mb": plain_mb,
            "isolation": "none",
        }
    }
    return results, peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of everything")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    if options.quick:
        amount = {"rounds": 1, "starts": 3, "cells": 30, "many": 10}
    else:
        amount = {"rounds": 5, "starts": 10, "cells": 200, "many": 100}

    async def run() -> tuple[Any, Any]:
        return await measure(**amount)

    results, peers = anyio.run(run)
    report("sandbox", amount, results, peers, as_json=options.as_json)


if __name__ == "__main__":
    main()
