"""A training run as curves: ``RUN/report.html``, one page by itself, and ``RUN/report.png``."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.training.journal import METRICS, read_rows

PANELS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("reward and its outcome part", ("reward", "r_perf")),
    ("parallelism: widest group of acting sub-agents", ("width", "subagents")),
    ("critical and total steps of an episode", ("critical_steps", "total_steps")),
    ("the helpers and their weights", ("r_parallel", "r_finish", "lambda1", "lambda2")),
    ("loss (minus eq. 1) and gradient norm", ("loss", "grad_norm")),
    ("KL to the sampler; share of tokens masked", ("kl", "share_masked")),
    ("|Δ log-prob| of engine and trainer", ("engine_trainer_mean_abs_dlogprob",)),
    ("seconds of an iteration", ("rollout_s", "train_s", "publish_s")),
)
SMOOTH = 5
"""Iterations in the moving mean that is drawn over the points."""


def write_report(run: Path) -> tuple[Path, Path]:
    """Draw the metrics of a run; returns the page and the picture.

    Raises:
        ConfigError: the run has no metrics, or matplotlib is missing.
    """
    rows = read_rows(run / METRICS)
    if not rows:
        raise ConfigError(f"'{run}' holds no {METRICS}; train something there first")
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ConfigError(
            "curves need matplotlib; install it with: pip install 'swarm-sdk[train]'"
        ) from error
    mpl.use("agg")
    page, picture = run / "report.html", run / "report.png"
    _draw(rows, picture)
    settings = run / "config.json"
    config = settings.read_text(encoding="utf-8") if settings.exists() else ""
    image = base64.b64encode(picture.read_bytes()).decode()
    page.write_text(
        f"<!doctype html><meta charset=utf-8><title>{html.escape(run.name)}</title>"
        "<style>body{font:15px sans-serif;margin:2em;max-width:75em}table{border-collapse:collapse}"
        "td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd}img{max-width:100%}"
        "</style>"
        f"<h1>{html.escape(run.name)}: {len(rows)} iterations</h1>"
        f'<img src="data:image/png;base64,{image}" alt="curves">'
        f"{_table(rows)}{_left_out(rows)}<h2>Settings</h2><pre>{html.escape(config)}</pre>",
        encoding="utf-8",
    )
    return page, picture


def _draw(rows: list[dict[str, Any]], picture: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 13), layout="constrained")
    for place, (title, keys) in enumerate(PANELS, start=1):
        axes = figure.add_subplot(4, 2, place)
        for key in keys:
            points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
            if not points:
                continue
            at, values = zip(*points, strict=True)
            [line] = axes.plot(at, _smooth(values), label=key, linewidth=1.8)
            axes.plot(at, values, ".", markersize=3, alpha=0.4, color=line.get_color())
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize=8)
    figure.savefig(picture, dpi=110)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """The mean of each value and up to ``SMOOTH`` - 1 before it."""
    parts = [values[max(0, end - SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [sum(part) / len(part) for part in parts]


def _table(rows: list[dict[str, Any]]) -> str:
    """First and last tenth of the run, beside each other."""
    share = max(1, len(rows) // 10)
    lines = ["<h2>From the first to the last tenth</h2><table>"]
    lines.append("<tr><th></th><th>first</th><th>last</th></tr>")
    for key in dict.fromkeys(key for _, keys in PANELS for key in keys):
        ends = [
            [row[key] for row in part if row.get(key) is not None]
            for part in (rows[:share], rows[-share:])
        ]
        if all(ends):
            cells = "".join(f"<td>{sum(e) / len(e):.4g}</td>" for e in ends)
            lines.append(f"<tr><th>{key}</th>{cells}</tr>")
    return "".join([*lines, "</table>"])


def _left_out(rows: list[dict[str, Any]]) -> str:
    """Everything that did not train, and all drift, counted over the run and said once."""
    lines = ["<h2>What did not train, and drift</h2><table>"]
    sentences: dict[str, str] = {}
    for row in reversed(rows):
        sentences |= row.get("sentences", {})
    for kind in ("left_out", "failed", "drift"):
        sums: dict[str, int] = {}
        for row in rows:
            for reason, num in row.get(kind, {}).items():
                sums[reason] = sums.get(reason, 0) + num
        for reason, num in sorted(sums.items()) or [("nothing", 0)]:
            said = html.escape(sentences.get(reason, "")) if kind == "left_out" else ""
            told = f"<th>{kind}</th><td>{html.escape(reason)}</td><td>{num}</td><td>{said}</td>"
            lines.append(f"<tr>{told}</tr>")
    return "".join([*lines, "</table>"])
