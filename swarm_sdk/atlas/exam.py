"""Ask a model many questions at once and score its answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import anyio

from swarm_sdk.atlas.questions import Question
from swarm_sdk.atlas.scoring import score
from swarm_sdk.runtime.budget import Budget
from swarm_sdk.runtime.episode import Result
from swarm_sdk.swarm import Swarm
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import Model, Sampling, Task, Tool

MALFORMED = frozenset({"malformed_call", "unknown_tool"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One question's answer and what it is worth, 0 to 1."""

    question: Question
    result: Result
    score: float
    num_calls: int
    num_malformed: int


async def run_exam(
    model: str | Model,
    questions: Sequence[Question],
    tools: Sequence[Tool],
    *,
    runs: Path,
    parallel: int = 8,
    sampling: Sampling | None = None,
    subagent_model: str | Model | None = None,
    can_spawn: bool = True,
    budget: Budget | None = None,
    on_mark: Callable[[Mark], None] = lambda _: None,
) -> list[Mark]:
    """Ask every question once, ``parallel`` episodes at a time; marks in the order of questions."""
    swarm = Swarm(
        model,
        tools=tools,
        runs=runs,
        sampling=sampling,
        subagent_model=subagent_model,
        can_spawn=can_spawn,
        budget=budget,
    )
    slots = anyio.CapacityLimiter(parallel)
    marks: dict[int, Mark] = {}

    async def ask(index: int, question: Question) -> None:
        async with slots:
            result = await swarm.run(Task(question.prompt, question.files))
        errors = tool_errors(swarm_ledger, result.episode_id)
        marks[index] = Mark(
            question=question,
            result=result,
            score=score(question, result.output),
            num_calls=len(errors),
            num_malformed=sum(error in MALFORMED for error in errors),
        )
        on_mark(marks[index])

    async with swarm:
        swarm_ledger = Ledger(runs)
        async with anyio.create_task_group() as group:
            for index, question in enumerate(questions):
                group.start_soon(ask, index, question, name=f"question {index}")
        swarm_ledger.close()
    return [marks[index] for index in range(len(questions))]


def tool_errors(ledger: Ledger, episode_id: str) -> list[str | None]:
    """For each tool call of an episode: the kind of its error, or ``None``."""
    return [s.body["error"] for s in ledger.steps(episode_id) if s.kind == "tool"]


def figures(marks: Sequence[Mark]) -> dict[str, float]:
    """Means by kind of question, and over all: malformed calls, steps, tokens."""
    by_kind: dict[str, list[Mark]] = defaultdict(list)
    for mark in marks:
        by_kind[mark.question.kind].append(mark)
    found: dict[str, float] = {}
    for kind, asked in by_kind.items():
        found["wide_f1" if kind == "wide" else f"{kind}_exact"] = fmean(m.score for m in asked)
        found[f"{kind}_num"] = len(asked)
        found[f"{kind}_critical_steps"] = fmean(m.result.critical_steps for m in asked)
        found[f"{kind}_total_steps"] = fmean(m.result.total_steps for m in asked)
    found["malformed_calls"] = sum(m.num_malformed for m in marks) / max(
        1, sum(m.num_calls for m in marks)
    )
    found["completion_tokens"] = sum(m.result.usage.num_completion_tokens for m in marks)
    return {key: round(value, 4) for key, value in found.items()}
