"""Budgets that hold exactly under fan-out: reserve before the call, settle after it.

A step that runs in parallel with others is admitted only if the limits allow it *together with
everything admitted and not yet settled*. Critical steps need no reservation: an agent's depth is
the length of the longest chain of steps that ends with it, so each agent checks its own.

    depth(agent) += 1 for each of its steps
    depth(child at start) = depth(parent) at the step that launched it
    depth(parent after a join) = max over the children joined
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from swarm_sdk.errors import BudgetExceeded, ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Limits of one episode; ``None`` is no limit and 0 is zero."""

    critical_steps: int | None = None
    """Longest chain of steps (report, section 3.2)."""
    steps: int | None = None
    """Model turns of all agents together."""
    tokens: int | None = None
    """Generated tokens of all agents together."""
    wall_s: float | None = None
    """Seconds from start to end; what still runs then is cancelled."""
    agents: int | None = None
    """Sub-agents launched."""
    main_steps: int = 100
    """Turns of the orchestrator (the report's limit in WideSearch)."""
    sub_steps: int = 100
    """Turns of each sub-agent (likewise)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            whole = field.name != "wall_s"
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigError(
                    f"the budget's {field.name} must be a {'whole ' * whole}number, got {value!r}"
                )
            if math.isnan(value) or value < 0:
                raise ConfigError(f"the budget's {field.name} must be >= 0, got {value!r}")


@dataclass(slots=True)
class AgentMeter:
    """What one agent has used. ``depth`` counts from the start of the episode."""

    max_steps: int
    start_depth: int = 0
    depth: int = 0
    launch_depth: int = 0
    """``depth`` right after the agent's last step: where the children of that step begin."""
    steps: int = 0

    @property
    def critical_steps(self) -> int:
        """Length of the longest chain of steps inside this agent, its sub-agents included."""
        return self.depth - self.start_depth

    def child(self, max_steps: int) -> AgentMeter:
        """The meter of a sub-agent launched now."""
        return AgentMeter(max_steps, self.launch_depth, self.launch_depth, self.launch_depth)

    def join(self, child: AgentMeter) -> None:
        """Take over the depth of a sub-agent that ended."""
        self.depth = max(self.depth, child.depth)


class BudgetMeter:
    """What an episode has used and reserved, for all agents together."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.steps = 0
        """Steps admitted; a step is never given back, for the model was asked."""
        self.tokens = 0
        self.reserved_tokens = 0
        self.agents = 0

    def reserve_step(self, agent: AgentMeter, max_tokens: int) -> int:
        """Admit one model turn; returns how many tokens it may generate.

        Raises:
            BudgetExceeded: a limit leaves no room; nothing is reserved then.
        """
        limits = self.budget
        _admit("steps of one agent", agent.steps, agent.max_steps)
        _admit("critical steps", agent.depth, limits.critical_steps)
        _admit("steps", self.steps, limits.steps)
        if limits.tokens is not None:
            _admit("tokens", self.tokens + self.reserved_tokens, limits.tokens)
            max_tokens = min(max_tokens, limits.tokens - self.tokens - self.reserved_tokens)
        self.steps += 1
        agent.steps += 1
        agent.depth += 1
        agent.launch_depth = agent.depth
        self.reserved_tokens += max_tokens
        return max_tokens

    def settle_step(self, *, reserved_tokens: int, used_tokens: int) -> None:
        """Replace the reservation of a turn by what it used."""
        self.reserved_tokens -= reserved_tokens
        self.tokens += used_tokens

    def reserve_agent(self) -> None:
        """Admit one sub-agent.

        Raises:
            BudgetExceeded: no more may be launched.
        """
        _admit("agents", self.agents, self.budget.agents)
        self.agents += 1


def _admit(what: str, used: int, allowed: int | None) -> None:
    if allowed is not None and used >= allowed:
        raise BudgetExceeded(what, used=used, allowed=allowed)
