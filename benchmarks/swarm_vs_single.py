"""The same model with sub-agents and alone, on wide search of rising difficulty.

    python benchmarks/swarm_vs_single.py --split heldout --json
    python benchmarks/swarm_vs_single.py --before START --after RUN1/model --after RUN2/model

Every question has N entities (2, 4 … 12), held out of all training. The single agent is the same
policy without `create_subagent` and `assign_task`. Both have the same budget of critical steps.

Keys: f1_swarm, f1_single; critical_steps_ratio and wall_ratio, single over swarm, over the
questions that both answered with the same item-F1; all of them by N as well. With --before and
--after, gain_after_parl_*: the mean over the trained checkpoints (one a seed) of what they gained
over the start, and the bounds of its 95 % confidence interval (Student's t over the seeds).
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk.atlas.exam import Mark, run_exam
from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.questions import Question, wide_question
from swarm_sdk.config import nano_directory
from swarm_sdk.desk import atlas_corpus
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import Sampling

NUM_ENTITIES = (2, 4, 6, 8, 10, 12)
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for 95 %, two-sided, by the number of seeds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=["heldout"], default="heldout")
    parser.add_argument("--n", type=int, default=60, help="questions, spread over the sizes")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--policy", default="nano", help="nano or a checkpoint directory")
    parser.add_argument("--subagents", default="nano", help="the frozen sub-agents' checkpoint")
    parser.add_argument("--before", help="checkpoint that training started from")
    parser.add_argument("--after", action="append", default=[], help="trained; one a seed")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--critical-steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", type=int, default=8, help="episodes at a time")
    parser.add_argument("--only-swarm", action="store_true", help="leave the single agent out")
    parser.add_argument("--quick", action="store_true", help="3 questions")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    questions = heldout(3 if options.quick else options.n, options.seed)
    results: dict[str, Any] = {}
    if options.before:
        before = ask(options, options.before, questions, can_spawn=True)
        afters = [ask(options, path, questions, can_spawn=True) for path in options.after]
        results |= gains(before, afters)
    else:
        swarm = ask(options, options.policy, questions, can_spawn=True)
        results |= figures("swarm", swarm)
        if not options.only_swarm:
            single = ask(options, options.policy, questions, can_spawn=False)
            results |= figures("single", single) | ratios(swarm, single)
    settings = {
        name: getattr(options, name)
        for name in ("split", "seed", "temperature", "critical_steps", "device", "parallel")
    }
    names = ("policy", "subagents", "before", "after")
    settings |= {name: getattr(options, name) for name in names} | {"n": len(questions)}
    report("swarm_vs_single", settings, results, {}, as_json=options.as_json)


def heldout(num: int, seed: int) -> list[Question]:
    rng = random.Random(seed)
    everything, targets = world("all"), world("heldout").entities
    return [
        wide_question(
            everything, targets, rng, num_entities=NUM_ENTITIES[index % len(NUM_ENTITIES)]
        )
        for index in range(num)
    ]


def ask(
    options: argparse.Namespace, policy: str, questions: list[Question], *, can_spawn: bool
) -> list[Mark]:
    async def run() -> list[Mark]:
        model, frozen = (open_model(options, path) for path in (policy, options.subagents))
        corpus = atlas_corpus()
        tools = [SearchTool(corpus), OpenTool(corpus), IPythonTool()]
        with tempfile.TemporaryDirectory() as runs:
            marks = await run_exam(
                model,
                questions,
                tools,
                runs=Path(runs),
                parallel=options.parallel,
                sampling=Sampling(temperature=options.temperature, max_tokens=1_024),
                subagent_model=frozen,
                can_spawn=can_spawn,
                budget=Budget(critical_steps=options.critical_steps),
            )
        await model.aclose()
        await frozen.aclose()
        return marks

    started_s = time.perf_counter()
    marks = anyio.run(run)
    kind = "swarm" if can_spawn else "single"
    sys.stderr.write(f"{kind} {policy}: {time.perf_counter() - started_s:.0f} s\n")
    return marks


def open_model(options: argparse.Namespace, path: str) -> Any:
    directory = nano_directory() if path == "nano" else Path(path)
    return open_embedded(directory, device=options.device, max_running=128, name=path)


def num_entities(mark: Mark) -> int:
    plan = mark.question.plan
    assert plan is not None
    return len(plan.titles)  # type: ignore[union-attr]


def figures(kind: str, marks: list[Mark]) -> dict[str, float]:
    found = {
        f"f1_{kind}": statistics.fmean(m.score for m in marks),
        f"critical_steps_{kind}": statistics.fmean(m.result.critical_steps for m in marks),
        f"total_steps_{kind}": statistics.fmean(m.result.total_steps for m in marks),
        f"wall_s_{kind}": statistics.fmean(m.result.wall_s for m in marks),
        f"subagents_{kind}": statistics.fmean(len(m.result.subagents) for m in marks),
    }
    for num in sorted(set(map(num_entities, marks))):
        of_size = [m for m in marks if num_entities(m) == num]
        found[f"f1_{kind}_{num}"] = statistics.fmean(m.score for m in of_size)
        found[f"critical_steps_{kind}_{num}"] = statistics.fmean(
            m.result.critical_steps for m in of_size
        )
    return found


def ratios(swarm: list[Mark], single: list[Mark]) -> dict[str, float]:
    pairs = [
        (one, other)
        for one, other in zip(swarm, single, strict=True)
        if one.score == other.score > 0
    ]
    found: dict[str, float] = {"pairs_of_same_f1": len(pairs)}
    sizes = [None, *sorted({num_entities(one) for one, _ in pairs})]
    for num in sizes:
        of_size = [p for p in pairs if num is None or num_entities(p[0]) == num]
        if of_size:
            suffix = "" if num is None else f"_{num}"
            for key, read in (
                ("critical_steps_ratio", lambda m: m.result.critical_steps),
                ("wall_ratio", lambda m: m.result.wall_s),
            ):
                ours, theirs = (sum(read(p[at]) for p in of_size) for at in (0, 1))
                found[key + suffix] = theirs / ours
    return found


def gains(before: list[Mark], afters: list[list[Mark]]) -> dict[str, float]:
    measures = {
        "f1": lambda marks: statistics.fmean(m.score for m in marks),
        "critical_steps": lambda marks: statistics.fmean(m.result.critical_steps for m in marks),
        "subagents": lambda marks: statistics.fmean(len(m.result.subagents) for m in marks),
    }
    found: dict[str, float] = {"seeds": len(afters)}
    for name, measure in measures.items():
        found[f"{name}_before"] = measure(before)
        changes = [measure(after) - measure(before) for after in afters]
        for number, change in enumerate(changes):
            found[f"{name}_after_{number}"] = change + measure(before)
        found[f"gain_after_parl_{name}"] = statistics.fmean(changes)
        if len(changes) in T_95:
            half = T_95[len(changes)] * statistics.stdev(changes) / len(changes) ** 0.5
            found[f"gain_after_parl_{name}_low"] = statistics.fmean(changes) - half
            found[f"gain_after_parl_{name}_high"] = statistics.fmean(changes) + half
    return found


if __name__ == "__main__":
    main()
