"""Score a model on questions about entities and pictures that it was never trained on.

    python benchmarks/atlas_eval.py --split heldout --n 200 --json
    python benchmarks/atlas_eval.py --questions mine.jsonl

One {"question", "files", "answer", "kind"} a line asks questions of your own.

Keys: wide_f1 (item-F1), deep_exact, compute_exact, look_exact, malformed_calls (share of tool
calls that were cut, ill-formed or of an unknown tool), and steps a question by kind.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import anyio
from report import report  # benchmarks/report.py

from swarm_sdk.atlas.exam import Mark, figures, run_exam
from swarm_sdk.atlas.question_files import heldout_questions, load_questions
from swarm_sdk.config import nano_directory
from swarm_sdk.desk import desk_tools
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.types import Model, Sampling


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=["heldout"], default="heldout")
    parser.add_argument("--n", type=int, default=200, help="questions, a quarter of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--questions", type=Path, help="JSON lines of your own questions")
    parser.add_argument("--model", default="nano", help="as in `swarm run --model`")
    parser.add_argument("--device", default="cpu", help="of the embedded engine: cpu or cuda")
    parser.add_argument("--parallel", type=int, default=8, help="episodes at a time")
    parser.add_argument("--runs", type=Path, help="keep the traces in this directory")
    parser.add_argument("--wrong", type=Path, help="write the wrong answers to this file")
    parser.add_argument("--quick", action="store_true", help="8 questions")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    num = 8 if options.quick else options.n
    questions = (
        load_questions(options.questions)
        if options.questions
        else heldout_questions(num, seed=options.seed)
    )
    started_s = time.perf_counter()
    marks: list[Mark] = []

    def show(mark: Mark) -> None:
        marks.append(mark)
        sys.stderr.write(
            f"{len(marks)}/{len(questions)} {mark.question.kind} {mark.score:.2f} "
            f"{time.perf_counter() - started_s:.0f} s\n"
        )

    with tempfile.TemporaryDirectory() as scratch:
        runs = options.runs or Path(scratch)
        ordered = anyio.run(_ask, options, questions, runs, show)
    if options.wrong:
        options.wrong.write_text("\n".join(_wrong(m) for m in ordered if m.score < 1.0))
    settings = {
        "split": None if options.questions else options.split,
        "n": len(questions),
        "seed": options.seed,
        "model": options.model,
        "device": options.device,
        "parallel": options.parallel,
    }
    results = figures(ordered) | {"wall_s": round(time.perf_counter() - started_s, 1)}
    report("atlas_eval", settings, results, {}, as_json=options.as_json)


async def _ask(
    options: argparse.Namespace, questions: list, runs: Path, show: object
) -> list[Mark]:
    async with desk_tools(None, num_kernels=2) as tools:
        model: str | Model = options.model
        if model == "nano" or str(model).startswith("path:"):
            directory = nano_directory() if model == "nano" else Path(str(model)[5:])
            model = open_embedded(directory, device=options.device, max_running=128)
        marks = await run_exam(
            model,
            questions,
            tools,
            runs=runs,
            parallel=options.parallel,
            sampling=Sampling(temperature=0.0, max_tokens=2048),
            on_mark=show,
        )
        if not isinstance(model, str):
            await model.aclose()
        return marks


def _wrong(mark: Mark) -> str:
    return json.dumps(
        {
            "kind": mark.question.kind,
            "score": mark.score,
            "question": mark.question.prompt,
            "truth": mark.question.answer,
            "answer": mark.result.output,
            "status": mark.result.status,
            "error": mark.result.error,
            "episode_id": mark.result.episode_id,
        },
        ensure_ascii=False,
    )


if __name__ == "__main__":
    main()
