"""Budgets that hold exactly under fan-out: reserve before the call, settle after it.

A step is admitted only if every scope above it has room *together with all that is admitted and
not yet settled*. Scopes are nested, and the tightest wins:

    swarm > episode > role's assignment (and all below it)

A call in flight holds all that it may generate, and mostly gives back a part. So one that has too
little room only because of calls in flight waits for them; it is refused, or its ``max_tokens`` are
lowered to what is left, only where all that they can give back is not enough:

    free    = limit - used             below what it needs at least ─> BudgetExceeded, at once
    room    = free - held in flight    below min(max_tokens, free)  ─> wait, first come first served
                                       else ─> admitted with min(max_tokens, free)

Who waits for room of a scope is not overtaken there; calls that need none of it go on. Nothing
waits where nothing is in flight, and code inside a call (a hook, a model that runs a swarm) never
waits, as it might for itself. Steps and agents are never given back, so nobody waits for those.

Critical steps need no reservation: an agent's depth is the length of the longest chain of steps
that ends with it, so each agent checks its own against the depth at which the scope began.

    depth(agent) += 1 for each of its steps
    depth(child at start) = depth(parent) at the step that launched it
    depth(parent after a join) = max over the children joined
"""

from __future__ import annotations

import asyncio
import math
import time
from contextvars import ContextVar
from dataclasses import dataclass, fields

from swarm_sdk.errors import BudgetExceeded, ConfigError
from swarm_sdk.types import Price, Usage

FREE = Price()
_FRACTIONS = frozenset({"wall_s", "cost_usd"})

is_in_call: ContextVar[bool] = ContextVar("swarm_sdk_is_in_call", default=False)
"""Whether the code that runs belongs to a model call that holds a reservation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Limits of one scope; ``None`` is no limit and 0 is zero."""

    critical_steps: int | None = None
    """Longest chain of steps (report, section 3.2)."""
    steps: int | None = None
    """Model turns of all agents together."""
    tokens: int | None = None
    """Generated tokens of all agents together. A call in flight holds its ``Sampling.max_tokens``,
    so at most ``tokens // max_tokens`` calls run side by side; more wait for what is given back."""
    input_tokens: int | None = None
    """Prompt tokens of all calls together, cached ones included. Exact where the model tells the
    token ids of a prompt before it is sent; else each call is admitted by an estimate."""
    cost_usd: float | None = None
    """US dollars at the prices given to the swarm; a call is admitted at its highest cost."""
    wall_s: float | None = None
    """Seconds from start to end; what still runs then is cancelled."""
    agents: int | None = None
    """Sub-agents launched."""
    depth: int = 1
    """Levels of sub-agents: with 1 only the orchestrator launches any, with 2 its sub-agents do."""
    main_steps: int = 100
    """Turns of the orchestrator (the report's limit in WideSearch)."""
    sub_steps: int = 100
    """Turns of each sub-agent (likewise)."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            whole = field.name not in _FRACTIONS
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigError(
                    f"the budget's {field.name} must be a {'whole ' * whole}number, got {value!r}"
                )
            if math.isnan(value) or value < 0:
                raise ConfigError(f"the budget's {field.name} must be >= 0, got {value!r}")


class Scope:
    """What a budget's holder has used and reserved, for all agents in it together."""

    __slots__ = (
        "agents",
        "budget",
        "cost_usd",
        "episodes",
        "input_tokens",
        "is_awaited",
        "is_bounded",
        "name",
        "num_in_flight",
        "parent",
        "reserved_input_tokens",
        "reserved_tokens",
        "reserved_usd",
        "scopes",
        "started_s",
        "steps",
        "tokens",
        "waiting",
    )

    def __init__(self, budget: Budget, parent: Scope | None = None, name: str = "") -> None:
        """``name`` says in errors whose budget it is; empty for the episode's own."""
        self.budget: Budget = budget
        self.parent: Scope | None = parent
        self.scopes: tuple[Scope, ...] = (self, *(parent.scopes if parent is not None else ()))
        """This scope and those around it, outwards."""
        self.name: str = name
        self.steps: int = 0
        """Steps admitted; a step is never given back, for the model was asked."""
        self.tokens: int = 0
        self.reserved_tokens: int = 0
        self.input_tokens: int = 0
        self.reserved_input_tokens: int = 0
        self.cost_usd: float = 0.0
        self.reserved_usd: float = 0.0
        self.num_in_flight: int = 0
        """Calls that hold what is reserved."""
        self.is_bounded: bool = (
            budget.tokens is not None
            or budget.input_tokens is not None
            or budget.cost_usd is not None
        )
        """Whether it limits what calls hold and may give back."""
        self.is_awaited: bool = False
        """Whether a call waits for room here; later ones wait behind it."""
        self.waiting: list[_WaitingCall] = []
        """Calls that wait here or in a scope inside; of the outermost bounded scope only."""
        self.agents: int = 0
        self.episodes: set[str] = set()
        """Episodes that ran in it in this process; a swarm's scope only."""
        self.started_s: float = time.monotonic()

    def remaining_s(self) -> float | None:
        """Seconds until the tightest wall-clock limit ends; ``None`` without one."""
        left = [
            scope.budget.wall_s - (time.monotonic() - scope.started_s)
            for scope in self.scopes
            if scope.budget.wall_s is not None
        ]
        return max(0.0, min(left)) if left else None

    def reserve_agent(self) -> None:
        """Admit one sub-agent in all scopes.

        Raises:
            BudgetExceeded: one of them may launch no more; nothing is counted then.
        """
        for scope in self.scopes:
            scope.admit("agents", scope.agents, scope.budget.agents)
        for scope in self.scopes:
            scope.agents += 1

    def preload(self, *, steps: int, usage: Usage, usd: float, agents: int, wall_s: float) -> None:
        """Count what the record of an earlier process tells; it was admitted when it was used."""
        self.steps += steps
        self.tokens += usage.num_completion_tokens
        self.input_tokens += usage.num_prompt_tokens
        self.cost_usd += usd
        self.agents += agents
        self.started_s -= wall_s

    def admit(self, what: str, used: float, allowed: float | None) -> None:
        """Raise ``BudgetExceeded`` where ``used`` leaves no room below ``allowed``."""
        if allowed is not None and used >= allowed:
            raise BudgetExceeded(f"{self.name} {what}".strip(), used=used, allowed=allowed)

    def room(
        self, max_tokens: int, input_tokens: int, price: Price, *, is_held: bool = True
    ) -> int:
        """How many of ``max_tokens`` this scope has room for.

        ``is_held=False`` tells how many it had if all calls in flight gave back what they hold.

        Raises:
            BudgetExceeded: none, or not for the prompt.
        """
        limits, held = self.budget, int(is_held)
        if limits.tokens is not None:
            taken = self.tokens + held * self.reserved_tokens
            self.admit("tokens", taken, limits.tokens)
            max_tokens = min(max_tokens, limits.tokens - taken)
        if limits.input_tokens is not None:
            taken = self.input_tokens + held * self.reserved_input_tokens
            if taken + input_tokens > limits.input_tokens:
                self.admit("input tokens", taken + input_tokens, limits.input_tokens)
        if limits.cost_usd is not None:
            taken_usd = self.cost_usd + held * self.reserved_usd
            taken_usd += input_tokens * price.input_usd / 1e6
            self.admit("US dollars", taken_usd, limits.cost_usd)
            if price.output_usd > 0:
                affordable = int((limits.cost_usd - taken_usd) * 1e6 / price.output_usd)
                if affordable < 1:
                    self.admit("US dollars", limits.cost_usd, limits.cost_usd)
                max_tokens = min(max_tokens, affordable)
        return max_tokens

    def is_short(self, max_tokens: int, input_tokens: int, price: Price) -> bool:
        """Whether calls in flight hold room that a call of ``max_tokens`` needs."""
        if not self.num_in_flight:
            return False
        try:
            return self.room(max_tokens, input_tokens, price) < max_tokens
        except BudgetExceeded:
            return True

    def serve(self) -> None:
        """Admit those who wait and have room now, in the order of their arrival."""
        waiting, self.waiting = self.waiting, []
        for call in waiting:
            for scope in call.meter.bounded:
                scope.is_awaited = False
        for call in waiting:
            if call.turn.done():
                continue  # cancelled
            try:
                if call.meter.must_wait(call.max_tokens, call.input_tokens):
                    self.waiting.append(call)
                else:
                    call.turn.set_result(call.meter.hold(call.max_tokens, call.input_tokens))
            except BudgetExceeded as exceeded:
                call.turn.set_exception(exceeded)


@dataclass(slots=True)
class Reservation:
    """Room that one model call holds until it is settled."""

    max_tokens: int
    """How many tokens the call may generate."""
    input_tokens: int
    usd: float


@dataclass(slots=True, eq=False)
class _WaitingCall:
    """A call that waits for room."""

    meter: AgentMeter
    max_tokens: int
    input_tokens: int
    turn: asyncio.Future[Reservation]


class AgentMeter:
    """What one agent has used. ``depth`` counts steps from the start of the episode."""

    __slots__ = (
        "_critical",
        "bounded",
        "depth",
        "launch_depth",
        "level",
        "max_steps",
        "parent",
        "price",
        "scope",
        "start_depth",
        "steps",
    )

    def __init__(
        self,
        scope: Scope,
        max_steps: int,
        *,
        parent: AgentMeter | None = None,
        price: Price = FREE,
    ) -> None:
        """``scope`` is the innermost one; ``parent`` the meter of the agent that launches it."""
        self.scope: Scope = scope
        self.bounded: tuple[Scope, ...] = tuple(s for s in scope.scopes if s.is_bounded)
        """The scopes that calls may wait for, outwards."""
        self.max_steps: int = max_steps
        self.parent: AgentMeter | None = parent
        self.price: Price = price
        self.level: int = 0 if parent is None else parent.level + 1
        """0 for the orchestrator."""
        self.start_depth: int = 0 if parent is None else parent.launch_depth
        self.depth: int = self.start_depth
        self.launch_depth: int = self.start_depth
        """``depth`` right after the agent's last step: where the children of that step begin."""
        self.steps: int = 0
        self._critical: tuple[tuple[Scope, int], ...] = self._critical_scopes()
        """Scopes that limit critical steps, and the depths at which they begin."""

    def _critical_scopes(self) -> tuple[tuple[Scope, int], ...]:
        outer: tuple[Scope, ...] = () if self.parent is None else self.parent.scope.scopes
        inherited = () if self.parent is None else self.parent._critical  # noqa: SLF001 - own kind
        own = [s for s in self.scope.scopes if s not in outer]
        limited = [(s, self.start_depth) for s in own if s.budget.critical_steps is not None]
        return (*limited, *inherited)

    @property
    def critical_steps(self) -> int:
        """Length of the longest chain of steps inside this agent, its sub-agents included."""
        return self.depth - self.start_depth

    def join(self, child: AgentMeter) -> None:
        """Take over the depth of a sub-agent that ended."""
        self.depth = max(self.depth, child.depth)

    async def reserve(self, max_tokens: int, input_tokens: int = 0) -> Reservation:
        """Admit one model turn in all scopes; waits while calls in flight hold the room it needs.

        Raises:
            BudgetExceeded: a limit leaves no room; nothing is reserved then.
        """
        if is_in_call.get() or not self.must_wait(max_tokens, input_tokens):
            reserved = self.hold(max_tokens, input_tokens)
        else:
            reserved = await self._wait(max_tokens, input_tokens)
        self.count_step()
        return reserved

    async def _wait(self, max_tokens: int, input_tokens: int) -> Reservation:
        turn: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        queue = self.bounded[-1]
        queue.waiting.append(_WaitingCall(self, max_tokens, input_tokens, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                for scope in self.scope.scopes:
                    scope.steps -= 1  # admitted already, and the model is not asked
                self.settle(turn.result(), Usage())
            queue.serve()
            raise

    def must_wait(self, max_tokens: int, input_tokens: int) -> bool:
        """Whether a turn waits for calls in flight, or for those who wait already.

        Raises:
            BudgetExceeded: what calls in flight can give back is not enough.
        """
        if not self.bounded:
            return False
        self._check_steps()
        for scope in self.bounded:
            max_tokens = scope.room(max_tokens, input_tokens, self.price, is_held=False)
        short = [
            scope
            for scope in self.bounded
            if scope.is_awaited or scope.is_short(max_tokens, input_tokens, self.price)
        ]
        for scope in short:
            scope.is_awaited = True
        return bool(short)

    def hold(self, max_tokens: int, input_tokens: int) -> Reservation:
        """Reserve in all scopes what a turn may use at most; raises as ``reserve``."""
        self._check_steps()
        for scope in self.bounded:
            max_tokens = scope.room(max_tokens, input_tokens, self.price)
        usd = (input_tokens * self.price.input_usd + max_tokens * self.price.output_usd) / 1e6
        for scope in self.scope.scopes:
            scope.steps += 1
            scope.num_in_flight += 1
            scope.reserved_tokens += max_tokens
            scope.reserved_input_tokens += input_tokens
            scope.reserved_usd += usd
        return Reservation(max_tokens, input_tokens, usd)

    def _check_steps(self) -> None:
        if self.steps >= self.max_steps:
            raise BudgetExceeded("steps of one agent", used=self.steps, allowed=self.max_steps)
        for limited, start_depth in self._critical:
            limited.admit("critical steps", self.depth - start_depth, limited.budget.critical_steps)
        for scope in self.scope.scopes:
            scope.admit("steps", scope.steps, scope.budget.steps)

    def settle(self, reserved: Reservation, used: Usage) -> None:
        """Replace the reservation of a turn by what it used: nothing, where the call failed."""
        usd = self.price.of(used)
        for scope in self.scope.scopes:
            scope.reserved_tokens -= reserved.max_tokens
            scope.reserved_input_tokens -= reserved.input_tokens
            scope.num_in_flight -= 1
            scope.reserved_usd -= reserved.usd
            if not scope.num_in_flight:
                scope.reserved_usd = 0.0  # what rounding leaves would be waited for
            scope.tokens += used.num_completion_tokens
            scope.input_tokens += used.num_prompt_tokens
            scope.cost_usd += usd
        if self.bounded and self.bounded[-1].waiting:
            self.bounded[-1].serve()

    def count_step(self) -> None:
        """Count a turn for this agent: one that was admitted, or is read from the record."""
        self.steps += 1
        self.depth += 1
        self.launch_depth = self.depth
