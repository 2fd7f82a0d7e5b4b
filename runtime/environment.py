"""Environments: tasks, the tools to do them with, and a judge (report, appendix D).

class Sums(Environment):
    name = "sums"
    def tasks(self): yield EnvTask("1", Task("2 + 3"), {"answer": "5"})
    async def judge(self, task, result, rollouts): return {"reward": float(result.output == "5")}

register_environment("sums", Sums)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol

from swarm_sdk.errors import ConfigError
from swarm_sdk.types import Task, Tool

if TYPE_CHECKING:
    from swarm_sdk.runtime.episode import Result

ENTRY_POINTS = "swarm_sdk.environments"


@dataclass(frozen=True, slots=True)
class EnvTask:
    """One task of an environment."""

    id: str
    task: Task
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the judge needs and the model never sees: the true answer, a rubric."""
    can_spawn: bool = True
    """Whether the orchestrator gets the tools to spawn with, where the swarm gives them at all."""
    limits: Mapping[str, int] = field(default_factory=dict)
    """Fields of ``Budget`` that are others for this task than for the swarm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One episode of a task, and what it is worth."""

    task: EnvTask
    sample: int
    """Which of the task's episodes it is, from 0."""
    result: Result[Any] | None
    """``None`` where the episode was aborted or its toolset did not start."""
    rewards: Mapping[str, float]
    """By name; empty where ``error`` is set."""
    error: str | None = None
    """What the toolset or the judge raised; the episode itself never raises."""

    @property
    def reward(self) -> float:
        """The reward that training sums up; 0 where there is none."""
        return self.rewards.get("reward", 0.0)


class SubRollouts(Protocol):
    """Runs further episodes: what judges and tools need of the rollout manager."""

    async def rollout(self, environment: Environment, task: EnvTask, sample: int = 0) -> Rollout:
        """Run one episode of a task and judge it."""
        ...


class Environment:
    """Override ``tasks`` and ``judge``; ``toolset`` where tasks need tools of their own."""

    name: str = ""

    def tasks(self) -> Iterator[EnvTask]:
        """The tasks, in a fixed order."""
        raise NotImplementedError

    @asynccontextmanager
    async def toolset(self, task: EnvTask) -> AsyncIterator[Sequence[Tool]]:
        """Tools for one episode, beside the swarm's; what they hold ends with the context."""
        del task
        yield ()

    async def judge(
        self, task: EnvTask, result: Result[Any], rollouts: SubRollouts
    ) -> Mapping[str, float]:
        """Rewards by name; ``reward`` is the one that training sums up.

        ``rollouts`` can run further episodes for the judgement (an agent as a judge).
        """
        raise NotImplementedError


_REGISTRY: dict[str, Callable[[], Environment]] = {}


def register_environment(name: str, make: Callable[[], Environment]) -> None:
    """Add an environment under a name.

    Raises:
        ConfigError: the name is taken by another one.
    """
    if _REGISTRY.get(name, make) is not make:
        raise ConfigError(f"an environment named '{name}' is registered already; choose another")
    _REGISTRY[name] = make


def environment(name: str) -> Environment:
    """The environment of that name: registered here, or by an installed package.

    Packages name theirs as entry points of the group ``swarm_sdk.environments``.

    Raises:
        ConfigError: there is none.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]()
    found = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name not in found:
        known = ", ".join(sorted({*_REGISTRY, *found})) or "none"
        raise ConfigError(f"there is no environment '{name}'; known are: {known}")
    made: Environment = found[name].load()()
    return made
