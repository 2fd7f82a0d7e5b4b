"""The PARL experiment in one command: a serial start, training, both measured.

    python benchmarks/gpu/parl.py --out OUT                              the main run, in 9 minutes
    python benchmarks/gpu/parl.py --out OUT --start S --ablation no-parallel
    python benchmarks/gpu/parl.py --out OUT --device cpu --mini          the same in miniature

    nano ─ sft: alone, one call at a time ─> OUT/start ─ parl ─> OUT/run/model
               │                              │ before            │ after
               └ a policy that has parallelism └──── swarm_vs_single on held-out questions ──> gain
                 still to learn

No network, no plotting library. Writes OUT/parl-ABLATION-SEED.json, which holds everything that is
kept of the run: settings, the measurements before and after, the figures of every iteration. With
those of several runs in benchmarks/results/, `swarm_vs_single.py` tells the gain and
`parl_page.py` draws the page. Beside it: OUT/log.txt, OUT/start, OUT/run/{config.json,
metrics.jsonl, batches.jsonl, model}. The ledger of the run (OUT/run/runs) is deleted at the end
unless --keep-ledger is given; its SHA-256 is in the result.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import report  # noqa: E402 - benchmarks/report.py

PATHS = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
MIX = ("wide=1", "deep=0", "compute=0", "look=0", "serial=0.85", "alone=0.3")
"""What the start is taught. Of the questions put to an agent that may spawn, 15 % are answered as
`nano` does, by sub-agents mostly: without any, PARL would have nothing to find. 30 % are put to an
agent that may not, so that the policy can be compared with itself alone."""
SETTINGS = {
    # All ours: the report gives no values. docs/experiments/README.md has what they rest on.
    "questions": "32",  # 256 episodes an iteration: a dozen iterations in the time there is
    "samples": "8",  # of a start that spawns in 15 %, 3 groups of 4 hold at least one that does
    "updates": "4",  # 8 questions each; the last is 3 updates off the weights that sampled
    "lr": "3e-4",  # MuonClip moves by the rate whatever the gradient: see there
    "critical_steps": "9",  # alone: 2 N + 1 steps, so N <= 4; with sub-agents: 5 to 9 for any N
    "min_entities": "3",  # a third of the questions (3, 4) can be answered alone
    "max_entities": "8",
    "max_tokens": "512",  # the longest turns that make sense have 400
    "episode_tokens": "12000",  # used 1,600 at 8 entities; in flight 9 agents hold 4,600
    "ahead": "4",  # questions more than a batch takes: nobody waits for the slowest episodes
    "anneal_steps": "10",  # λ1 and λ2 are 0 well before the end: what stays pays for itself
    "max_episodes": "256",
    "max_running": "256",
}
MINI = {"questions": "2", "samples": "3", "updates": "1", "max_entities": "4", "ahead": "0"}
MINI |= {"max_running": "48"}
ABLATIONS: dict[str, dict[str, str]] = {
    "none": {},
    "no-parallel": {"lambda1": "0"},
    "no-finish": {"lambda2": "0"},
    "train-subagents": {"train_subagents": "true"},
    "ppo": {"clip": "ppo"},
    "toggle": {"toggle": "true"},
    "no-limit": {"critical_steps": "40"},
    "no-limit-no-parallel": {"critical_steps": "40", "lambda1": "0"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=530, help="of everything together")
    parser.add_argument("--start", help="a checkpoint to train from; made here unless given")
    parser.add_argument(
        "--before", type=Path, help="a result from the same start: not measured anew"
    )
    parser.add_argument("--serial-seconds", type=float, default=50, help="to make the start")
    parser.add_argument("--ablation", choices=list(ABLATIONS), default="none")
    parser.add_argument("--steps", type=int, default=15, help="iterations at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=80, help="held-out questions")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE of ParlConfig")
    parser.add_argument("--single", action="store_true", help="after: the policy alone as well")
    parser.add_argument("--keep-ledger", action="store_true")
    parser.add_argument("--mini", action="store_true", help="minutes on two cores: proves the way")
    options = parser.parse_args()
    started_s = time.perf_counter()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    log = (out / "log.txt").open("a", encoding="utf-8")
    seconds: dict[str, float] = {}

    def left_s() -> float:
        return options.seconds - (time.perf_counter() - started_s)

    def run(name: str, *arguments: str, limit_s: float) -> str:
        """One stage: its stdout is returned, everything goes to the log."""
        began_s = time.perf_counter()
        tell(log, f"== {name}: {' '.join(arguments)}")
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            timeout=max(limit_s, 1),
            env=os.environ | {"PYTHONPATH": PATHS},
            check=False,
        )
        seconds[name] = round(time.perf_counter() - began_s, 1)
        tell(log, f"== {name}: exit {done.returncode}, {seconds[name]} s")
        if done.returncode:
            raise SystemExit(f"{name} failed; see {out / 'log.txt'}")
        return done.stdout

    start = options.start or str(out / "start")
    if not options.start:
        serial_s = 20 if options.mini else options.serial_seconds
        run(
            "serial start",
            *("-m", "swarm_sdk.training", "sft", "--start", nano(), "--out", start),
            *("--device", options.device, "--max-seconds", str(serial_s), "--peak-lr", "5e-4"),
            *("--workers", "1" if options.mini else "12", "--seed", "7"),
            *("--batch-tokens", "8192" if options.mini else "65536"),
            *(f"--mix={share}" for share in MIX),
            limit_s=serial_s + 240,
        )
    evaluation = [
        *("benchmarks/swarm_vs_single.py", "--json", "--device", options.device),
        *("--n", "5" if options.mini else str(options.n), "--parallel", "64"),
        *("--within", SETTINGS["critical_steps"]),
    ]
    results: dict[str, Any] = {}
    if options.before:
        known = json.loads(options.before.read_text())
        results |= {k: v for k, v in known["results"].items() if k.endswith("_before")}
        seconds["before"] = known["seconds"]["before"]
    else:
        results |= measured(
            "before",
            run("before", *evaluation, "--only-swarm", "--policy", start, limit_s=left_s()),
        )
    after_s = seconds["before"] * (3 if options.single else 1.3) + 10
    settings = SETTINGS | (MINI if options.mini else {}) | ABLATIONS[options.ablation]
    chosen = [f"{key}={value}" for key, value in settings.items()] + options.set
    run(
        "parl",
        *("-m", "swarm_sdk.training", "parl", "--out", str(out / "run"), "--start", start),
        *("--device", options.device, "--seed", str(options.seed)),
        *("--steps", str(min(options.steps, 2) if options.mini else options.steps)),
        *("--max-seconds", str(max(left_s() - after_s - 25, 5))),
        *(f"--set={one}" for one in chosen),
        limit_s=max(left_s(), 60) + 240 * options.mini,
    )
    if not options.single:
        evaluation.append("--only-swarm")
    after = run("after", *evaluation, "--policy", str(out / "run" / "model"), limit_s=600)
    results |= measured("after", after)
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text().splitlines()]
    results["iterations"] = len(rows)
    ledger = out / "run" / "runs" / "ledger.db"
    with ledger.open("rb") as file:
        ledger_sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not options.keep_ledger:
        shutil.rmtree(out / "run" / "runs")
    shutil.rmtree(out / "run" / "checkpoints")
    content = {
        "name": "parl",
        "commit": report.commit(),
        "machine": report.machine(),
        "versions": report.versions(),
        "settings": {
            "ablation": options.ablation,
            "seed": options.seed,
            "start": options.start or "made by this run",
            "before": options.before.name if options.before else "measured by this run",
            "n": options.n,
            "config": json.loads((out / "run" / "config.json").read_text()),
        },
        "results": results,
        "seconds": seconds,
        "ledger_sha256": ledger_sha256,
        "iterations": rows,
    }
    name = f"parl-{options.ablation}-{options.seed}.json"
    (out / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for when in ("before", "after"):
        keys = ("f1", "f1_within", "critical_steps", "total_steps", "subagents")
        told = (f"{key} {results[f'{key}_{when}']:.3f}" for key in keys)
        tell(log, f"{when}: {', '.join(told)}")
    tell(log, f"{len(rows)} iterations in {time.perf_counter() - started_s:.0f} s; {out / name}")
    log.close()


def measured(when: str, printed: str) -> dict[str, Any]:
    """The figures that the comparison printed, named by when they were measured."""
    figures = json.loads(printed)["results"]
    return {f"{key.replace('_swarm', '')}_{when}": value for key, value in figures.items()}


def nano() -> str:
    return str(ROOT / "model_backend" / "nano")


def tell(log: Any, text: str) -> None:
    log.write(text + "\n")
    log.flush()
    print(text, flush=True)


if __name__ == "__main__":
    main()
