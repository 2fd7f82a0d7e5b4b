"""Kill episodes with SIGKILL at random moments and finish them from the ledger.

    python benchmarks/crash.py [--json] [--quick] [--kills 200]

An orchestrator, 6 sub-agents, 3 tool calls each; every tool call has an effect outside (a line in a
file) at a random moment of its run. The tool asks whether its line is there only where the runtime
says that the call may have run before, so a call that ran twice without that word shows. An episode
is killed again and again until it ends; then the next one begins.

Keys: kills, resumed (kills after which the episode was finished from the ledger),
steps_asked_again (turns that were committed at a kill and asked for after it), side_effects_twice,
side_effects_missing, wrong_answers, retries_told (calls made again and told so).
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk import Message, Swarm
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import RunContext, ToolSpec

NUM_AGENTS = 6
NUM_TOOL_CALLS = 3
LONGEST_S = 0.1
"""Kills fall evenly into this time after the start of a process's work; an episode takes longer."""
ANSWER = " ".join(f"done-{i}" for i in range(NUM_AGENTS))


def _log(path: Path, line: str) -> None:
    """One line in one write: there whole, or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, f"{line}\n".encode())
    os.close(descriptor)


def swarm_of(folder: Path, seed: int) -> Swarm:
    """The swarm under test; its model and tool write down what they are asked."""
    rng = random.Random(seed)

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        who = messages[1].content
        turn = sum(m.role == "assistant" for m in messages)
        _log(folder / "asked", f"{who}#{turn}")
        await anyio.sleep(rng.uniform(0, 0.01))
        results = [m for m in messages if m.role == "tool"]
        if any(tool.name == "assign_task" for tool in tools):
            if results:
                return " ".join(m.content for m in results[1:])
            made = [call("assign_task", agent="w", prompt=str(i)) for i in range(NUM_AGENTS)]
            return calls(call("create_subagent", name="w", system_prompt="s"), *made)
        if len(results) < NUM_TOOL_CALLS:
            return calls(call("pay", account=f"{who}-{len(results)}"))
        return f"done-{who}"

    async def pay(context: RunContext, account: str) -> str:
        del account
        key = context.idempotency_key
        await anyio.sleep(rng.uniform(0, 0.01))
        if context.is_retry:
            _log(folder / "retries", key)
            effects = folder / "effects"
            if effects.exists() and key in effects.read_text().splitlines():
                return "paid before"
        _log(folder / "effects", key)
        await anyio.sleep(rng.uniform(0, 0.01))
        return "paid"

    return Swarm(ScriptedModel(policy), tools=[pay], runs=folder)


def live(folder: Path, seed: int, episode_id: str | None, started: Any) -> None:
    """A process: run an episode, or resume it."""

    async def main() -> None:
        async with swarm_of(folder, seed) as swarm:
            swarm.open_ledger()
            started.set()
            if episode_id is None:
                await swarm.run("go")
            else:
                await swarm.resume(episode_id)

    anyio.run(main)


def committed(folder: Path) -> tuple[str | None, set[str], bool]:
    """The episode's id, its turns on record as the model names them, and whether it has ended."""
    if not (folder / "ledger.db").exists():
        return None, set(), False
    ledger = Ledger(folder, readonly=True)
    episodes = ledger.episodes()
    turns = set()
    if episodes:
        prompts = {a.path: a.prompt for a in ledger.agents(episodes[0].id)}
        for step in ledger.steps(episodes[0].id):
            if step.kind == "sample":
                turns.add(f"{prompts[step.agent_path]}#{step.stage}")
    ledger.close()
    if not episodes:
        return None, turns, False
    return episodes[0].id, turns, episodes[0].status is not None


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10 kills")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    num_kills = 10 if options.quick else options.kills
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(Path(folder), num_kills, options.seed)
    results = dict(counts) | {"wall_s": round(time.perf_counter() - started_s, 1)}
    settings = {"kills": num_kills, "seed": options.seed, "agents": NUM_AGENTS}
    report("crash", settings, results, {}, as_json=options.as_json)


def run(scratch: Path, num_kills: int, seed: int) -> dict[str, int]:
    """Episodes until ``num_kills`` kills have hit a living process."""
    rng = random.Random(seed)
    context = mp.get_context("fork")
    counts = dict.fromkeys(
        (
            "kills",
            "resumed",
            "episodes",
            "steps_asked_again",
            "side_effects_twice",
            "side_effects_missing",
            "wrong_answers",
            "retries_told",
        ),
        0,
    )
    while counts["kills"] < num_kills:
        folder = scratch / str(counts["episodes"])
        folder.mkdir()
        hits, asked_again = 0, 0
        while True:
            episode_id, turns, is_ended = committed(folder)
            if is_ended:
                break
            num_asked = len(_lines(folder / "asked"))
            started = context.Event()
            process = context.Process(
                target=live, args=(folder, rng.randrange(10**9), episode_id, started)
            )
            process.start()
            started.wait(60)
            may_kill = counts["kills"] + hits < num_kills
            process.join(rng.uniform(0, LONGEST_S) if may_kill else 60)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                hits += not committed(folder)[2]  # a kill after the end proves nothing
            asked_again += sum(line in turns for line in _lines(folder / "asked")[num_asked:])
            assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        ledger = Ledger(folder, readonly=True)
        [episode] = ledger.episodes()
        ledger.close()
        effects = Counter(_lines(folder / "effects"))
        is_right = episode.status == "done" and episode.output == ANSWER
        counts["kills"] += hits
        counts["resumed"] += hits if is_right else 0
        counts["episodes"] += 1
        counts["steps_asked_again"] += asked_again
        counts["side_effects_twice"] += sum(count > 1 for count in effects.values())
        counts["side_effects_missing"] += NUM_AGENTS * NUM_TOOL_CALLS - len(effects)
        counts["wrong_answers"] += not is_right
        counts["retries_told"] += len(_lines(folder / "retries"))
        sys.stderr.write(f"{counts['kills']} of {num_kills} kills, {counts['episodes']} episodes\n")
    return counts


if __name__ == "__main__":
    main()
