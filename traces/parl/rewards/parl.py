"""The three-term reward of PARL (K2.5 report, section 3.1), its weights annealed to zero.

    r = lambda1(t) r_parallel + lambda2(t) r_finish + r_perf

The report gives neither the form of the two helpers nor what counts as finished. Ours:

    r_parallel   (width of the widest group - 1) / (target - 1), at most 1. The width of a group
                 counts the sub-agents launched in one turn with *different* tasks, that *acted*
                 (at least one tool call that gave a result) *and finished*. So one child is not
                 parallel, idle and doubled ones pay nothing, and past the target more pay nothing.
    r_finish     finished / assigned, and 1 where nothing was assigned: it takes away from who
                 assigns what is not finished, and pays nobody for assigning, which is r_parallel's
                 part. Finished: the agent ended by itself, with a report that is not empty.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.ledger import Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Subtask:
    """One assignment of the orchestrator, from the record."""

    stage: int
    """The orchestrator's turn that launched it."""
    agent: str
    prompt: str
    is_finished: bool
    num_actions: int
    """Its tool calls that gave a result."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """A weight that falls from ``start`` to 0 at iteration ``steps`` and stays there."""

    start: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.start < 0 or self.steps < 0 or not math.isfinite(self.start):
            raise ConfigError(
                f"a schedule needs start >= 0 and steps >= 0, got {self.start} and {self.steps}"
            )

    def at(self, iteration: int) -> float:
        """The weight at an iteration, from 0.

        >>> [Schedule(start=0.2, steps=4).at(t) for t in (0, 2, 4, 9)]
        [0.2, 0.1, 0.0, 0.0]
        """
        if iteration >= self.steps:
            return 0.0
        left = 1 - iteration / self.steps
        return self.start * (left if self.shape == "linear" else (1 - math.cos(math.pi * left)) / 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParlReward:
    """The weights of the three terms; ours, by trial."""

    parallel: Schedule = field(default_factory=lambda: Schedule(start=0.3, steps=30))
    finish: Schedule = field(default_factory=lambda: Schedule(start=0.2, steps=30))
    target_width: int = 4
    """Sub-agents side by side from which r_parallel is 1."""

    def __post_init__(self) -> None:
        if self.target_width < 2:
            raise ConfigError(f"target_width must be at least 2, got {self.target_width}")

    def __call__(self, iteration: int, r_perf: float, subtasks: Sequence[Subtask]) -> Terms:
        """The reward of one episode."""
        parallel = r_parallel(subtasks, self.target_width)
        finish = r_finish(subtasks)
        lambda1, lambda2 = self.parallel.at(iteration), self.finish.at(iteration)
        return Terms(
            total=lambda1 * parallel + lambda2 * finish + r_perf,
            parallel=parallel,
            finish=finish,
            perf=r_perf,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """A reward and what it was made of; the parts are not weighted."""

    total: float
    parallel: float
    finish: float
    perf: float


def width(subtasks: Sequence[Subtask]) -> int:
    """The most sub-agents launched in one turn with different tasks that acted and finished."""
    groups: dict[int, set[tuple[str, str]]] = defaultdict(set)
    for subtask in subtasks:
        if subtask.is_finished and subtask.num_actions > 0:
            groups[subtask.stage].add((subtask.agent, " ".join(subtask.prompt.split())))
    return max(map(len, groups.values()), default=0)


def r_parallel(subtasks: Sequence[Subtask], target_width: int) -> float:
    """Between 0 and 1: how wide the orchestrator fanned out with children that did something."""
    return min(1.0, max(0, width(subtasks) - 1) / (target_width - 1))


def r_finish(subtasks: Sequence[Subtask]) -> float:
    """Between 0 and 1: the share of the assigned subtasks that were finished."""
    if not subtasks:
        return 1.0
    return sum(subtask.is_finished for subtask in subtasks) / len(subtasks)


def read_subtasks(ledger: Ledger, episode_id: str) -> list[Subtask]:
    """The orchestrator's assignments of a recorded episode, in the order of their start."""
    num_actions: dict[str, int] = defaultdict(int)
    for step in ledger.steps(episode_id):
        if step.kind == "tool" and step.body["error"] is None:
            num_actions[step.agent_path] += 1
    return [
        Subtask(
            stage=agent.parent_stage or 0,
            agent=agent.name,
            prompt=agent.prompt,
            is_finished=agent.status == "done" and bool((agent.output or "").strip()),
            num_actions=num_actions[agent.path],
        )
        for agent in ledger.agents(episode_id)
        if agent.parent_path == "main"
    ]
