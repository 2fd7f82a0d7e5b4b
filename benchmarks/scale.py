"""Many at once in one process: agents that wait on a model, episodes through the rollout manager.

    python benchmarks/scale.py [--json] [--quick] [--agents 100000] [--episodes 10000]

Agents: 1,000 episodes of 100 sub-agents, all of which wait on a model at one moment (the report's
rollout manager holds up to 100,000 agent tasks), then go on and finish. Memory is the process's
resident set then, over that before, less the bytes of the conversations themselves.

Keys: agents_alive, kb_per_agent, agents_finished, agents_lost, episodes, episodes_lost,
episodes_per_s, ledger_mb.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk import Environment, EnvTask, Message, Swarm, Task
from swarm_sdk.runtime.environment import SubRollouts
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import ToolSpec

AGENTS_PER_EPISODE = 100


def resident_bytes() -> int:
    """Resident set of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def agents_at_once(folder: Path, num_agents: int) -> dict[str, Any]:
    """Let ``num_agents`` sub-agents wait on their model at one moment."""
    num_waiting = 0
    opened = anyio.Event()
    all_wait = anyio.Event()

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        nonlocal num_waiting
        if tools and tools[-1].name == "assign_task":
            if len(messages) > 2:
                return "done"
            made = [
                call("assign_task", agent="w", prompt=f"t{i}") for i in range(AGENTS_PER_EPISODE)
            ]
            return calls(call("create_subagent", name="w", system_prompt="You wait."), *made)
        num_waiting += 1
        if num_waiting == num_agents:
            all_wait.set()
        await opened.wait()
        return "ok"

    finished: list[int] = []
    async with Swarm(ScriptedModel(policy), runs=folder) as swarm:
        swarm.open_ledger()
        await warm_up(folder / "warm")
        gc.collect()
        before = resident_bytes()

        async def episode() -> None:
            result = await swarm.run("wait")
            finished.append(sum(agent.status == "done" for agent in result.subagents))

        async with anyio.create_task_group() as group:
            for _ in range(num_agents // AGENTS_PER_EPISODE):
                group.start_soon(episode)
            await all_wait.wait()
            gc.collect()
            taken = resident_bytes() - before
            alive = num_waiting
            sys.stderr.write(f"{alive} agents wait, {taken / 2**20:.0f} MiB\n")
            opened.set()
    conversation_bytes = sum(map(sys.getsizeof, ("You wait.", "t99"))) * num_agents
    return {
        "agents_alive": alive,
        "kb_per_agent": round((taken - conversation_bytes) / num_agents / 1024, 2),
        "agents_finished": sum(finished),
        "agents_lost": num_agents - sum(finished),
    }


async def warm_up(folder: Path) -> None:
    """One small episode, so that what is loaded once is not counted."""

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if len(messages) > 2 or tools[-1].name != "assign_task":
            return "done"
        one = call("assign_task", agent="w", prompt="x")
        return calls(call("create_subagent", name="w", system_prompt="s"), one)

    async with Swarm(ScriptedModel(policy), runs=folder) as swarm:
        await swarm.run("go")


class Echo(Environment):
    """Two sub-agents and a tool call each; the judge compares."""

    name = "echo"

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def tasks(self) -> Iterator[EnvTask]:
        """Numbered tasks."""
        for index in range(self.num_tasks):
            yield EnvTask(str(index), Task(f"task {index}"), {"answer": f"{index}"})

    async def judge(self, task: EnvTask, result: Any, rollouts: SubRollouts) -> Mapping[str, float]:
        """Whether both sub-agents reported."""
        del rollouts
        return {"reward": float(result.output == task.facts["answer"])}


async def many_episodes(folder: Path, num_episodes: int) -> dict[str, Any]:
    """Run ``num_episodes`` through the rollout manager, 256 at a time, all on record."""

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if tools[-1].name != "assign_task":
            if len(messages) == 2:
                return calls(call("echo", text=messages[1].content))
            return messages[-1].content
        if len(messages) > 2:
            return messages[-1].content
        text = messages[1].content.split()[-1]
        made = [call("assign_task", agent="w", prompt=text) for _ in range(2)]
        return calls(call("create_subagent", name="w", system_prompt="You echo."), *made)

    async def echo(text: str) -> str:
        """Say it again."""
        return text

    num_right = 0
    started_s = time.perf_counter()
    async with Swarm(ScriptedModel(policy), tools=[echo], runs=folder) as swarm:
        async for rollout in swarm.rollouts().run(Echo(num_episodes)):
            num_right += rollout.reward == 1.0
            if num_right % 2000 == 0:
                sys.stderr.write(f"{num_right} episodes\n")
    wall_s = time.perf_counter() - started_s
    ledger = Ledger(folder, readonly=True)
    on_record = [episode.status for episode in ledger.episodes()]
    ledger.close()
    return {
        "episodes": on_record.count("done"),
        "episodes_lost": num_episodes - num_right,
        "episodes_per_s": round(num_episodes / wall_s, 1),
        "ledger_mb": round((folder / "ledger.db").stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", type=int, default=100_000)
    parser.add_argument("--episodes", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="5,000 agents and 300 episodes")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    num_agents, num_episodes = options.agents, options.episodes
    if options.quick:
        num_agents, num_episodes = 5_000, 300
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = anyio.run(agents_at_once, folder / "agents", num_agents)
        results |= anyio.run(many_episodes, folder / "episodes", num_episodes)
    results["wall_s"] = round(time.perf_counter() - started_s, 1)
    settings = {"agents_per_episode": AGENTS_PER_EPISODE, "episodes_at_once": 256}
    report("scale", settings, results, {}, as_json=options.as_json)


if __name__ == "__main__":
    main()
