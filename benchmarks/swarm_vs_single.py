"""The same model with sub-agents and alone, on wide search of rising difficulty.

    python benchmarks/swarm_vs_single.py --split heldout --json
    python benchmarks/swarm_vs_single.py --policy OUT/run/model

Every question has N entities (4, 6 … 12), held out of all training. The single agent is the same
policy, asked the same questions with the same tools but `create_subagent` and `assign_task`; it has
steps enough to end (2 N + 1 when it looks one up after the other). A policy that was never taught
without those two calls them all the same; `malformed_single` tells. The halves run one after the
other, each with `--parallel` episodes at a time in one engine: `wall_ratio` is that of a busy
machine, the ratios of steps do not depend on it.

    f1_swarm, f1_single       item-F1, also by N
    f1_within_swarm, …        the same where what needed more than `--within` critical steps counts
                              0: an episode under a lower limit is the beginning of this one
    critical_steps_ratio      single over swarm at the same item-F1, as the report draws it (figure
                              8): the fewest critical steps within which a half reaches the mean
                              item-F1 T, where what needs more steps counts 0. The mean over the
                              T from 0.3 to 0.7 (_at_30 … _at_70) that both halves reach.
    wall_ratio, wall_ratio_at_T  the same with seconds in the place of steps.
    …_ratio_same_question     sums over the questions that both answered with the same item-F1 above
                              0 (num_same_question); also by N. An agent alone seldom gets a large
                              table as right as the swarm does, so these are the small ones mostly.
    gain_after_parl_*         what training changed, from the experiment's result files
                              (benchmarks/results/parl-none-*.json, one a seed, each measured before
                              and after): mean over the seeds and the bounds of its 95 % confidence
                              interval (Student's t over the seeds). Fewer critical steps: below 0.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk.atlas.exam import Mark, run_exam
from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.questions import Lookup, Question, wide_question
from swarm_sdk.config import nano_directory
from swarm_sdk.desk import atlas_corpus
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import Sampling

NUM_ENTITIES = (4, 6, 8, 10, 12)
TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Item-F1 at which figure 8 of the report compares."""
EPISODE_TOKENS = 32_000
"""An agent that loses itself is not waited for. Calls in flight count with all they may generate:
13 agents at a time hold 13,000."""
RESULTS = Path(__file__).parent / "results"
GAINS = ("f1", "f1_within", "critical_steps", "subagents")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
"""Student's t for 95 %, two-sided, by the number of seeds."""
SWITCH_S = 5e-4
"""Engines and the event loop share the interpreter: see swarm_sdk/training/commands.py."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=["heldout"], default="heldout")
    parser.add_argument("--n", type=int, default=40, help="questions, spread over the sizes")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--policy", default="nano", help="nano or a checkpoint directory")
    parser.add_argument("--subagents", default="nano", help="the frozen sub-agents' checkpoint")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--critical-steps", type=int, default=40)
    parser.add_argument("--within", type=int, default=9, help="critical steps; see f1_within_*")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--parallel", type=int, default=16, help="episodes at a time")
    parser.add_argument("--only-swarm", action="store_true", help="leave the single agent out")
    parser.add_argument("--quick", action="store_true", help="one question of each size")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    questions = heldout(len(NUM_ENTITIES) if options.quick else options.n, options.seed)
    sys.setswitchinterval(SWITCH_S)

    async def run() -> dict[str, Any]:
        models = [open_model(options, path) for path in (options.policy, options.subagents)]
        swarm = await ask(options, models, questions, can_spawn=True)
        results: dict[str, Any] = figures("swarm", swarm, options.within)
        if not options.only_swarm:
            single = await ask(options, models, questions, can_spawn=False)
            results |= figures("single", single, options.within) | ratios(swarm, single)
        for model in models:
            await model.aclose()
        return results

    results = anyio.run(run)
    if not options.only_swarm:
        results |= gains(sorted(RESULTS.glob("parl-none-*.json")))
    names = ("split", "seed", "temperature", "critical_steps", "device", "parallel", "policy")
    settings = {name: getattr(options, name) for name in (*names, "subagents")}
    settings |= {"n": len(questions), "num_entities": NUM_ENTITIES, "within": options.within}
    report("swarm_vs_single", settings, results, {}, as_json=options.as_json)


def heldout(num: int, seed: int) -> list[Question]:
    """Questions of all sizes in turn."""
    rng = random.Random(seed)
    everything, targets = world("all"), world("heldout").entities
    return [
        wide_question(
            everything, targets, rng, num_entities=NUM_ENTITIES[index % len(NUM_ENTITIES)]
        )
        for index in range(num)
    ]


async def ask(
    options: argparse.Namespace,
    models: Sequence[TokenModel],
    questions: list[Question],
    *,
    can_spawn: bool,
) -> list[Mark]:
    """One half; a line on stderr for each answer."""
    kind, started_s, num_done = "swarm" if can_spawn else "single", time.perf_counter(), 0

    def say(mark: Mark) -> None:
        nonlocal num_done
        num_done += 1
        result = mark.result
        sys.stderr.write(
            f"{kind} {num_done}/{len(questions)}  {time.perf_counter() - started_s:.0f} s: "
            f"{num_entities(mark)} entities, item-F1 {mark.score:.2f}, "
            f"{result.critical_steps} critical of {result.total_steps} steps, {result.status}\n"
        )

    policy, frozen = models
    corpus = atlas_corpus()
    with tempfile.TemporaryDirectory() as runs:
        return await run_exam(
            policy,
            questions,
            [SearchTool(corpus), OpenTool(corpus), IPythonTool()],
            runs=Path(runs),
            parallel=options.parallel,
            sampling=Sampling(temperature=options.temperature, max_tokens=1_024),
            subagent_model=frozen,
            can_spawn=can_spawn,
            budget=Budget(critical_steps=options.critical_steps, tokens=EPISODE_TOKENS),
            on_mark=say,
        )


def open_model(options: argparse.Namespace, path: str) -> TokenModel:
    directory = nano_directory() if path == "nano" else Path(path)
    return open_embedded(directory, device=options.device, max_running=128, name=path)


def num_entities(mark: Mark) -> int:
    plan = mark.question.plan
    assert isinstance(plan, Lookup)
    return len(plan.titles)


def figures(kind: str, marks: Sequence[Mark], within: int) -> dict[str, float]:
    found = {
        f"f1_{kind}": statistics.fmean(m.score for m in marks),
        f"f1_within_{kind}": statistics.fmean(
            m.score * (m.result.critical_steps <= within) for m in marks
        ),
        f"critical_steps_{kind}": statistics.fmean(m.result.critical_steps for m in marks),
        f"total_steps_{kind}": statistics.fmean(m.result.total_steps for m in marks),
        f"wall_s_{kind}": statistics.fmean(m.result.wall_s for m in marks),
        f"subagents_{kind}": statistics.fmean(len(m.result.subagents) for m in marks),
        f"malformed_{kind}": sum(m.num_malformed for m in marks)
        / max(1, sum(m.num_calls for m in marks)),
        f"ended_{kind}": statistics.fmean(m.result.status == "done" for m in marks),
    }
    for num in sorted(set(map(num_entities, marks))):
        of_size = [m for m in marks if num_entities(m) == num]
        found[f"f1_{kind}_{num}"] = statistics.fmean(m.score for m in of_size)
        found[f"critical_steps_{kind}_{num}"] = statistics.fmean(
            m.result.critical_steps for m in of_size
        )
    return found


def ratios(swarm: Sequence[Mark], single: Sequence[Mark]) -> dict[str, float]:
    """Single over swarm at the same item-F1, by targets and by questions."""
    pairs = [
        (one, other)
        for one, other in zip(swarm, single, strict=True)
        if abs(one.score - other.score) < 1e-9 < one.score
    ]
    found: dict[str, float] = {"num_same_question": len(pairs)}
    measures: dict[str, Callable[[Mark], float]] = {
        "critical_steps": lambda mark: mark.result.critical_steps,
        "wall": lambda mark: mark.result.wall_s,
    }
    for key, read in measures.items():
        at = {}
        for target in TARGETS:
            ours, theirs = (to_reach(marks, target, read) for marks in (swarm, single))
            if ours is not None and theirs is not None:
                at[f"{key}_ratio_at_{round(100 * target)}"] = theirs / ours
        if at:
            found |= {f"{key}_ratio": statistics.fmean(at.values())} | at
        for num in (None, *sorted({num_entities(one) for one, _ in pairs})):
            alike = [pair for pair in pairs if num in (None, num_entities(pair[0]))]
            if alike:
                ours, theirs = (sum(read(pair[side]) for pair in alike) for side in (0, 1))
                of_size = "" if num is None else f"_{num}"
                found[f"{key}_ratio_same_question{of_size}"] = theirs / ours
    return found


def to_reach(marks: Sequence[Mark], target: float, read: Callable[[Mark], float]) -> float | None:
    """The least within which the mean item-F1 is ``target``; ``None``: never."""
    total = 0.0
    for mark in sorted(marks, key=read):
        total += mark.score
        if total >= target * len(marks) - 1e-9:
            return read(mark)
    return None


def gains(files: Sequence[Path]) -> dict[str, float]:
    """What training changed, over the seeds; empty where nothing was trained yet."""
    runs = [json.loads(file.read_text(encoding="utf-8"))["results"] for file in files]
    if not runs:
        sys.stderr.write(f"no result of the experiment in {RESULTS}: no gain_after_parl\n")
        return {}
    found: dict[str, float] = {"gain_after_parl_seeds": len(runs)}
    for name in GAINS:
        changes = [run[f"{name}_after"] - run[f"{name}_before"] for run in runs]
        found |= interval(f"gain_after_parl_{name}", changes)
    return found


def interval(key: str, values: Sequence[float]) -> dict[str, float]:
    """The mean and, of several, the bounds of its 95 % confidence interval."""
    mean = statistics.fmean(values)
    if len(values) not in T_95:
        return {key: mean}
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {key: mean, f"{key}_low": mean - half, f"{key}_high": mean + half}


if __name__ == "__main__":
    main()
