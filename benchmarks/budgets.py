"""Run random fan-outs under random budgets and count limits that were passed by any unit.

    python benchmarks/budgets.py [--json] [--quick] [--n 10000]

Each case is an episode of the real runtime with random limits (steps, critical steps, generated
and prompt tokens, sub-agents, US dollars, turns of the orchestrator and of sub-agents, two levels),
some of them zero. What was used is counted from the ledger, not from the meter that enforces it.

Keys: budget_overruns (cases in which a limit was passed), cases, statuses, overruns_of (by limit).
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import anyio
import anyio.lowlevel
from report import report  # benchmarks/report.py

from swarm_sdk import Budget, Message, Price, Sampling, Swarm
from swarm_sdk.runtime.stage_graph import read_stage_graph
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import ToolSpec

PRICE = Price(input_usd=3.0, output_usd=15.0)


def draw_budget(rng: random.Random) -> Budget:
    """Limits, each there in half of the cases, and sometimes zero."""

    def maybe(high: int) -> int | None:
        if rng.random() < 0.5:
            return None
        return 0 if rng.random() < 0.03 else rng.randint(1, high)

    cost = maybe(40)
    return Budget(
        critical_steps=maybe(10),
        steps=maybe(30),
        tokens=maybe(800),
        input_tokens=maybe(6_000),
        agents=maybe(8),
        cost_usd=None if cost is None else cost / 1000,
        depth=rng.randint(0, 2),
        main_steps=rng.choice((100, 2, 4)),
        sub_steps=rng.choice((100, 2, 3)),
    )


def policy(rng: random.Random) -> object:
    """Agents that fan out, work and answer at random."""

    async def next_turn(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        for _ in range(rng.randint(0, 2)):
            await anyio.lowlevel.checkpoint()
        text = "x" * rng.randint(0, 60)
        may_spawn = any(tool.name == "assign_task" for tool in tools)
        choice = rng.random()
        if may_spawn and choice < 0.45 and len(messages) < 9:
            name = f"w{len(messages)}"
            made = [call("assign_task", agent=name, prompt="go") for _ in range(rng.randint(1, 6))]
            return calls(call("create_subagent", name=name, system_prompt="s"), *made, content=text)
        if choice < 0.75 and len(messages) < 12:
            return calls(*[call("work") for _ in range(rng.randint(1, 3))], content=text)
        return text or "done"

    return next_turn


async def work() -> str:
    """Do a piece of work."""
    await anyio.lowlevel.checkpoint()
    return "worked"


def passed(ledger: Ledger, episode_id: str, budget: Budget) -> list[str]:
    """Which limits the record shows to be passed, and which were reached exactly."""
    graph = read_stage_graph(ledger, episode_id)
    turns = [step for step in ledger.steps(episode_id) if step.kind == "sample"]
    usages = [step.body["usage"] for step in turns]
    generated = sum(usage["num_completion_tokens"] for usage in usages)
    prompts = sum(usage["num_prompt_tokens"] for usage in usages)
    agents = [agent for agent in ledger.agents(episode_id) if agent.path != "main"]
    used = {
        "critical_steps": graph.critical_steps(),
        "steps": len(turns),
        "tokens": generated,
        "input_tokens": prompts,
        "agents": len(agents),
        "cost_usd": (prompts * PRICE.input_usd + generated * PRICE.output_usd) / 1e6 - 1e-12,
        "depth": max((agent.path.count("/") for agent in agents), default=0),
        "main_steps": graph.lengths.get("main", 0),
        "sub_steps": max((graph.lengths.get(agent.path, 0) for agent in agents), default=0),
    }
    limits = {name: getattr(budget, name) for name in used}
    return [name for name, limit in limits.items() if limit is not None and used[name] > limit]


async def run(folder: Path, num_cases: int, seed: int) -> dict[str, object]:
    statuses: Counter[str] = Counter()
    overruns: Counter[str] = Counter()
    num_overruns = 0
    for index in range(num_cases):
        rng = random.Random(f"{seed}/{index}")
        budget = draw_budget(rng)
        swarm = Swarm(
            ScriptedModel(policy(rng)),
            tools=[work],
            budget=budget,
            price=PRICE,
            sampling=Sampling(max_tokens=rng.choice((40, 200))),
            max_parallel=rng.randint(1, 8),
            runs=folder / str(index // 500),
        )
        async with swarm:
            result = await swarm.run("go")
            wrong = passed(swarm.open_ledger(), result.episode_id, budget)
        statuses[result.status] += 1
        overruns.update(wrong)
        num_overruns += bool(wrong)
        if (index + 1) % 1000 == 0:
            sys.stderr.write(f"{index + 1} of {num_cases} cases\n")
    return {
        "budget_overruns": num_overruns,
        "cases": num_cases,
        "statuses": dict(statuses),
        "overruns_of": dict(overruns),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="300 cases")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    num_cases = 300 if options.quick else options.n
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        results = anyio.run(run, Path(name), num_cases, options.seed)
    results["wall_s"] = round(time.perf_counter() - started_s, 1)
    settings = {"cases": num_cases, "seed": options.seed}
    report("budgets", settings, results, {}, as_json=options.as_json)


if __name__ == "__main__":
    main()
