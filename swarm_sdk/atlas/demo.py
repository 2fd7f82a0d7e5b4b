"""The demo: `nano` answers one wide and one look question on what it has never seen.

The entities and the picture are held out of all training. How to go about it, whether and how
many sub-agents to create, is the model's decision.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.questions import Question, photograph_questions, wide_question
from swarm_sdk.atlas.scoring import final_answer, score
from swarm_sdk.desk import desk_tools
from swarm_sdk.progress import Progress
from swarm_sdk.runtime.episode import Result
from swarm_sdk.swarm import Swarm
from swarm_sdk.types import Task

NUM_ENTITIES = 8
QUESTION_SEED = 7
"""The same questions each time, so that runs can be compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """What the demo asked and got."""

    wide: Question
    wide_result: Result
    look: Question
    look_result: Result

    @property
    def item_f1(self) -> float:
        """Item-F1 of the wide question's table."""
        return score(self.wide, self.wide_result.output)

    @property
    def is_look_exact(self) -> bool:
        """Whether the look question's answer is right."""
        return score(self.look, self.look_result.output) == 1.0

    def to_json(self) -> dict[str, Any]:
        """The object that ``swarm demo --json`` prints; steps are the wide question's."""
        return {
            "item_f1": round(self.item_f1, 4),
            "look_exact": self.is_look_exact,
            "subagents": len(self.wide_result.subagents),
            "created": list(self.wide_result.created),
            "critical_steps": self.wide_result.critical_steps,
            "total_steps": self.wide_result.total_steps,
            "max_parallel": self.wide_result.max_parallel,
            "wall_s": round(self.wide_result.wall_s + self.look_result.wall_s, 2),
            "episode_ids": [self.wide_result.episode_id, self.look_result.episode_id],
            "runs": str(self.wide_result.trace.directory),
            "wide": {
                "question": self.wide.prompt,
                "truth": self.wide.answer,
                "answer": self.wide_result.output,
            },
            "look": {
                "question": self.look.prompt,
                "truth": self.look.answer,
                "answer": self.look_result.output,
            },
        }


def demo_questions() -> tuple[Question, Question]:
    """A wide question on held-out countries, and how many coins a real photograph shows."""
    rng = random.Random(QUESTION_SEED)
    heldout = world("heldout")
    countries = [entity for entity in heldout.entities if entity.kind == "country"]
    wide = wide_question(world("all"), countries, rng, num_entities=NUM_ENTITIES)
    while len(wide.answer.splitlines()[0].split("|")) != 2 + 1 + 3:  # three attributes
        wide = wide_question(world("all"), countries, rng, num_entities=NUM_ENTITIES)
    look = next(q for q in photograph_questions(rng) if "coins" in q.files[0].name)
    return wide, look


async def run_demo(runs: Path) -> DemoReport:
    """Ask both questions, with live progress on stderr.

    Raises:
        ConfigError: the checkpoint is missing or broken, or a library is not installed.
    """
    wide, look = demo_questions()
    async with desk_tools(None) as tools, Swarm("nano", tools=tools, runs=runs) as swarm:
        with Progress(f"wide: {wide.prompt}") as progress:
            wide_result = await swarm.run(wide.prompt, on_event=progress)
        with Progress(f"look: {look.prompt}  [{look.files[0].name}]") as progress:
            look_result = await swarm.run(Task(look.prompt, look.files), on_event=progress)
    return DemoReport(wide=wide, wide_result=wide_result, look=look, look_result=look_result)


def print_demo(report: DemoReport, console: Console) -> None:
    """The answers beside the truth, and what they cost."""
    wide, result = report.wide, report.wide_result
    console.rule("wide")
    console.print(wide.prompt, highlight=False)
    console.print("[bold]answer[/bold]")
    console.print(Markdown(result.output))
    console.print("[bold]truth[/bold]")
    console.print(Markdown(wide.answer))
    console.print(
        f"item-F1 {report.item_f1:.2f}   {len(result.subagents)} sub-agents, at most "
        f"{result.max_parallel} at a time   critical steps {result.critical_steps} of "
        f"{result.total_steps} in total   {result.wall_s:.1f} s"
    )
    console.rule("look")
    console.print(report.look.prompt, highlight=False)
    console.print(
        f"answer [bold]{final_answer(report.look_result.output)}[/bold]   "
        f"truth {report.look.answer}   {report.look_result.wall_s:.1f} s"
    )
    console.rule("trace")
    for one in (report.wide_result, report.look_result):
        console.print(
            f"swarm trace show {one.episode_id} --runs {one.trace.directory}", highlight=False
        )
