"""Curves and tables of docs/experiments/parl.md, from the result files of benchmarks/gpu/parl.py.

    python benchmarks/gpu/parl_page.py

    benchmarks/results/parl-ABLATION-SEED.json ─┬─> docs/experiments/parl.png             figure 4
                                                ├─> docs/experiments/parl-ablations.png
                                                └─> docs/experiments/parl.md, between its two marks

Every number of the page comes from those files; what stands outside the marks is written by hand
and left alone. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from swarm_vs_single import interval  # noqa: E402 - benchmarks/swarm_vs_single.py

BEGIN, END = "<!-- from here: parl_page.py -->", "<!-- to here: parl_page.py -->"
Run = dict[str, Any]
TITLES = {
    "none": "PARL",
    "no-parallel": "without r_parallel",
    "no-finish": "without r_finish",
    "train-subagents": "sub-agents trained too",
    "ppo": "PPO's clip",
    "toggle": "with Toggle",
    "no-limit": "without a tight limit",
    "no-limit-no-parallel": "without a tight limit, without r_parallel",
}
PANELS = (
    ("r_perf", "outcome (item-F1 under the limit)"),
    ("width", "sub-agents side by side"),
    ("critical_steps", "critical steps"),
    ("total_steps", "total steps"),
    ("entropy", "entropy, nats a token"),
    ("kl", "KL to the sampler, nats a token"),
)
MEASURES = (
    ("f1", "item-F1"),
    ("f1_within", "item-F1 within the limit"),
    ("critical_steps", "critical steps"),
    ("subagents", "sub-agents"),
)
FIGURES = (
    ("reward", ".3f"),
    ("r_perf", ".3f"),
    ("r_parallel", ".3f"),
    ("r_finish", ".3f"),
    ("share_spawned", ".2f"),
    ("width", ".2f"),
    ("critical_steps", ".2f"),
    ("share_equal_groups", ".2f"),
    ("trained_tokens", ".0f"),
    ("entropy", ".4f"),
    ("kl", ".1e"),
    ("share_masked", ".1e"),
    ("clipped_heads", ".0f"),
    ("engine_trainer_mean_abs_dlogprob", ".1e"),
    ("routing_disagreement", ".1e"),
    ("rollout_s", ".1f"),
    ("train_s", ".1f"),
    ("publish_ms", ".0f"),
)
WHEN = ("before", "after")
ENDS = 2
"""Iterations in the means of a run's beginning and end."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "experiments")
    options = parser.parse_args()
    runs = read_runs(options.results)
    if not runs:
        raise SystemExit(f"'{options.results}' holds no parl-*.json; run benchmarks/gpu/parl.py")
    write_page(runs, options.out)
    print(options.out / "parl.md")


def read_runs(folder: Path) -> dict[str, list[Run]]:
    """The runs of each ablation, ``none`` first, by seed."""
    runs: dict[str, list[Run]] = defaultdict(list)
    for file in folder.glob("parl-*.json"):
        run = json.loads(file.read_text(encoding="utf-8"))
        runs[run["settings"]["ablation"]].append(run)
    return {
        ablation: sorted(runs[ablation], key=lambda run: run["settings"]["seed"])
        for ablation in sorted(runs, key=list(TITLES).index)
    }


def write_page(runs: dict[str, list[Run]], out: Path) -> None:
    """Draw both pictures and write what stands between the marks."""
    draw({"none": runs["none"]} if "none" in runs else runs, out / "parl.png", has_points=True)
    draw(runs, out / "parl-ablations.png", has_points=False)
    page = out / "parl.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"{BEGIN}\n{END}\n"
    before, has_begin, rest = text.partition(BEGIN)
    _, has_end, after = rest.partition(END)
    if not has_begin or not has_end:
        raise SystemExit(f"'{page}' lacks the lines '{BEGIN}' and '{END}'; put them back")
    made = "\n\n".join(part for part in sections(runs) if part)
    page.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}", encoding="utf-8")


def sections(runs: dict[str, list[Run]]) -> list[str]:
    """Everything between the marks."""
    return [
        "![reward, parallelism and critical steps by iteration](parl.png)",
        "The line is the mean over the seeds, the points are the seeds.",
        "### Before and after, on held-out questions",
        before_and_after(runs),
        "Means over the seeds; in brackets the change's 95 % confidence interval (Student's t).",
        "### By number of entities, item-F1 and critical steps",
        by_size(runs),
        "### The training itself",
        f"Means over the first and the last {ENDS} iterations, and over the seeds.",
        first_and_last(runs),
        "![the ablations](parl-ablations.png)",
        "### The runs",
        run_table(runs),
        "### Settings",
        settings_table(runs),
    ]


def draw(runs: dict[str, list[Run]], picture: Path, *, has_points: bool) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    for place, (key, title) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(2, 3, place)
        for ablation, of_it in runs.items():
            rows = [one["iterations"] for one in of_it]
            length = max(map(len, rows))
            means = [
                statistics.fmean(found)
                for at in range(length)
                if (found := [r[at][key] for r in rows if at < len(r) and key in r[at]])
            ]
            label = f"{TITLES[ablation]} ({len(of_it)})"
            [line] = axes.plot(range(len(means)), means, label=label, linewidth=1.8)
            for row in rows if has_points else ():
                points = [(r["iteration"], r[key]) for r in row if key in r]
                axes.plot(*zip(*points, strict=True), ".", alpha=0.4, color=line.get_color())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=100)


def before_and_after(runs: dict[str, list[Run]]) -> str:
    rows = []
    for ablation, of_it in runs.items():
        cells = [f"{TITLES[ablation]} ({len(of_it)})"]
        for key, _ in MEASURES:
            before, after = ([r["results"][f"{key}_{when}"] for r in of_it] for when in WHEN)
            told = interval("change", [b - a for a, b in zip(before, after, strict=True)])
            text = f"{statistics.fmean(before):.2f} → {statistics.fmean(after):.2f}"
            if "change_low" in told:
                text += f" [{told['change_low']:+.2f}, {told['change_high']:+.2f}]"
            cells.append(text)
        rows.append(cells)
    return table(["runs (seeds)", *(title for _, title in MEASURES)], rows)


def by_size(runs: dict[str, list[Run]]) -> str:
    of_it = runs.get("none", [])
    if not of_it:
        return ""
    keys = of_it[0]["results"]
    named = {key.split("_")[1] for key in keys if key.startswith("f1_")}
    sizes = sorted(int(name) for name in named if name.isdigit())
    rows = []
    for when in WHEN:
        for key, title in (("f1", "item-F1"), ("critical_steps", "critical steps")):
            means = [
                statistics.fmean(r["results"][f"{key}_{size}_{when}"] for r in of_it)
                for size in sizes
            ]
            rows.append([f"{title}, {when}", *(f"{mean:.2f}" for mean in means)])
    return table(["entities", *map(str, sizes)], rows)


def first_and_last(runs: dict[str, list[Run]]) -> str:
    parts: tuple[Callable[[list[Any]], list[Any]], ...] = (lambda r: r[:ENDS], lambda r: r[-ENDS:])
    rows = []
    for key, form in FIGURES:
        cells = [f"`{key}`"]
        for of_it in runs.values():
            ends = []
            for part in parts:
                found = [row[key] for r in of_it for row in part(r["iterations"]) if key in row]
                ends.append(format(statistics.fmean(found), form) if found else "-")
            cells.append(" → ".join(ends))
        rows.append(cells)
    return table(["", *(TITLES[ablation] for ablation in runs)], rows)


def run_table(runs: dict[str, list[Run]]) -> str:
    rows = [
        [
            TITLES[ablation],
            str(run["settings"]["seed"]),
            str(len(run["iterations"])),
            f"{sum(row.get('episodes', 0) for row in run['iterations']):.0f}",
            ", ".join(
                f"{reason} {num}" for reason, num in sorted(left_out(run["iterations"]).items())
            ),
            f"{sum(run['seconds'].values()):.0f}",
            run["machine"].get("gpu", run["machine"]["cpu"]),
            run["commit"][:8],
            f"`{run['ledger_sha256'][:12]}`",
        ]
        for ablation, of_it in runs.items()
        for run in of_it
    ]
    head = ["run", "seed", "iterations", "episodes", "left out", "seconds", "on", "commit"]
    return table([*head, "SHA-256 of the ledger"], rows)


def left_out(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    sums: dict[str, int] = defaultdict(int)
    for row in rows:
        for reason, num in (row.get("left_out", {}) | row.get("failed", {})).items():
            sums[reason] += num
    return sums


def settings_table(runs: dict[str, list[Run]]) -> str:
    """The settings of the first run, and what the ablations change."""
    first = next(iter(runs.values()))[0]["settings"]["config"]
    told = ", ".join(
        f"`{key}={json.dumps(value)}`"
        for key, value in first.items()
        if key not in {"start", "seed", "max_seconds", "steps"}
    )
    changes = [
        f"{TITLES[ablation]}: "
        + ", ".join(
            f"`{key}={json.dumps(value)}`"
            for key, value in of_it[0]["settings"]["config"].items()
            if value != first.get(key) and key not in {"start", "seed", "max_seconds", "steps"}
        )
        for ablation, of_it in list(runs.items())[1:]
    ]
    return "\n\n".join([told, *changes])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
