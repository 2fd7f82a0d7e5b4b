"""Critical steps: what an episode cost in steps that could not run side by side.

One stage costs the orchestrator's own steps plus the longest of its sub-agents' (Kimi K2.5
report, section 3.2):

    CriticalSteps = sum over stages t of ( S_main(t) + max over i of S_sub,i(t) ),   max of none = 0
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarm_sdk.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class StageSteps:
    """Steps spent in one stage. One step is one model turn."""

    main_steps: int
    sub_steps: tuple[int, ...] = ()
    """Critical steps of each sub-agent that the stage launched."""

    def __post_init__(self) -> None:
        if self.main_steps < 0 or any(steps < 0 for steps in self.sub_steps):
            raise ConfigError(f"steps must be >= 0, got {self}")


def critical_steps(stages: Iterable[StageSteps]) -> int:
    """Critical steps of a whole episode.

    >>> critical_steps([StageSteps(main_steps=1, sub_steps=(4, 9)), StageSteps(main_steps=2)])
    12
    """
    return sum(stage.main_steps + max(stage.sub_steps, default=0) for stage in stages)
