"""Budgets: exact, and zero means zero."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk.errors import BudgetExceeded, ConfigError
from swarm_sdk.runtime.budget import AgentMeter, Budget, Reservation, Scope
from swarm_sdk.types import Price, Usage


@pytest.mark.parametrize(
    "field", ["critical_steps", "steps", "tokens", "input_tokens", "agents", "main_steps", "depth"]
)
@pytest.mark.parametrize("value", [-1, float("nan"), 1.5, True, "3"])
def test_a_budget_that_is_no_whole_number_from_0_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Budget(**{field: value})


def test_wall_seconds_may_be_a_fraction_but_not_nan() -> None:
    assert Budget(wall_s=0.5).wall_s == 0.5
    with pytest.raises(ConfigError, match="wall_s"):
        Budget(wall_s=float("nan"))


def used(prompt: int, completion: int) -> Usage:
    return Usage(num_calls=1, num_prompt_tokens=prompt, num_completion_tokens=completion)


@pytest.mark.parametrize("limit", ["critical_steps", "steps", "tokens", "cost_usd", "main_steps"])
def test_zero_admits_no_step(limit: str) -> None:
    budget = Budget(**{limit: 0})
    scope = Scope(budget)
    with pytest.raises(BudgetExceeded):
        AgentMeter(scope, budget.main_steps, price=Price(output_usd=1.0)).reserve(10)
    assert scope.steps == 0
    assert scope.reserved_tokens == 0


def test_parallel_steps_cannot_pass_the_limit_between_check_and_count() -> None:
    scope = Scope(Budget(steps=3))
    admitted = 0
    for _ in range(5):
        try:
            AgentMeter(scope, 100).reserve(10)
            admitted += 1
        except BudgetExceeded:
            pass
    assert admitted == 3


def test_the_tightest_of_the_nested_budgets_wins_and_says_whose_it_is() -> None:
    swarm = Scope(Budget(tokens=100), name="swarm's")
    episode = Scope(Budget(tokens=60), swarm)
    role = Scope(Budget(tokens=80), episode, "finder's")
    first = AgentMeter(role, 100)
    reserved = first.reserve(1000)
    assert reserved.max_tokens == 60
    first.settle(reserved, used(5, 60))
    with pytest.raises(BudgetExceeded, match="the budget of 60 tokens is used up"):
        first.reserve(10)
    other = AgentMeter(Scope(Budget(), swarm), 100)
    assert other.reserve(1000).max_tokens == 40
    with pytest.raises(BudgetExceeded, match="swarm's tokens"):
        AgentMeter(Scope(Budget(), swarm), 100).reserve(1)


def test_a_call_that_failed_gives_its_tokens_back_and_keeps_its_step() -> None:
    scope = Scope(Budget(tokens=10, steps=5))
    meter = AgentMeter(scope, 100)
    meter.settle(meter.reserve(10), Usage())
    assert (scope.tokens, scope.reserved_tokens, scope.steps) == (0, 0, 1)


def test_a_call_is_admitted_only_if_its_highest_cost_fits() -> None:
    scope = Scope(Budget(cost_usd=0.001))
    meter = AgentMeter(scope, 100, price=Price(input_usd=1.0, cached_usd=0.1, output_usd=10.0))
    reserved = meter.reserve(1000, input_tokens=500)  # 0.0005 for the prompt, 50 tokens are left
    assert reserved.max_tokens == 50
    with pytest.raises(BudgetExceeded, match="US dollars"):
        meter.reserve(1000, input_tokens=500)
    meter.settle(
        reserved, Usage(num_prompt_tokens=500, num_cached_tokens=400, num_completion_tokens=10)
    )
    assert scope.cost_usd == pytest.approx((100 * 1.0 + 400 * 0.1 + 10 * 10.0) / 1e6)


def test_children_of_one_turn_start_at_the_same_depth_even_if_one_has_ended() -> None:
    scope = Scope(Budget(critical_steps=4))
    main = AgentMeter(scope, 100)
    main.reserve(1)
    first = AgentMeter(scope, 100, parent=main)
    first.reserve(1)
    first.reserve(1)
    main.join(first)
    second = AgentMeter(scope, 100, parent=main)
    second.reserve(1)
    main.join(second)
    assert (first.critical_steps, second.critical_steps, main.critical_steps) == (2, 1, 3)
    main.reserve(1)
    with pytest.raises(BudgetExceeded, match="critical steps"):
        main.reserve(1)


def test_a_roles_critical_steps_count_from_its_assignment_and_hold_for_all_below_it() -> None:
    episode = Scope(Budget())
    main = AgentMeter(episode, 100)
    for _ in range(5):
        main.reserve(1)
    child = AgentMeter(Scope(Budget(critical_steps=2), episode, "finder's"), 100, parent=main)
    child.reserve(1)
    grandchild = AgentMeter(child.scope, 100, parent=child)
    grandchild.reserve(1)
    with pytest.raises(BudgetExceeded, match="finder's critical steps"):
        grandchild.reserve(1)
    main.reserve(1)


class FanOut:
    """A tree of scopes with agents in it, driven at random."""

    LIMITS = ("steps", "tokens", "input_tokens", "agents", "cost_usd")

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        budgets = [self.draw_budget() for _ in range(4)]
        swarm = Scope(budgets[0], name="swarm's")
        episode = Scope(budgets[1], swarm)
        roles = [Scope(budgets[2], episode, "a's"), Scope(budgets[3], episode, "b's")]
        self.scopes = [swarm, episode, *roles]
        price = Price(input_usd=2.0, cached_usd=0.5, output_usd=8.0)
        self.meters = [
            AgentMeter(scope, 1000, price=price) for scope in (episode, *roles) for _ in range(2)
        ]
        self.open: list[tuple[AgentMeter, Reservation]] = []

    def draw_budget(self) -> Budget:
        draw = self.data.draw
        return Budget(
            steps=draw(st.none() | st.integers(0, 20)),
            tokens=draw(st.none() | st.integers(0, 200)),
            input_tokens=draw(st.none() | st.integers(0, 400)),
            agents=draw(st.none() | st.integers(0, 5)),
            cost_usd=draw(st.none() | st.floats(0, 0.002)),
        )

    def act(self) -> None:
        draw = self.data.draw
        meter = draw(st.sampled_from(self.meters))
        match draw(st.sampled_from(("reserve", "reserve", "settle", "fail", "agent"))):
            case "reserve":
                try:
                    reserved = meter.reserve(draw(st.integers(1, 60)), draw(st.integers(0, 80)))
                except BudgetExceeded:
                    return
                assert reserved.max_tokens >= 1
                self.open.append((meter, reserved))
            case "agent":
                try:
                    meter.scope.reserve_agent()
                except BudgetExceeded:
                    return
            case how if self.open:
                index = draw(st.integers(0, len(self.open) - 1))
                owner, reserved = self.open.pop(index)
                usage = Usage()
                if how == "settle":
                    usage = used(reserved.input_tokens, draw(st.integers(0, reserved.max_tokens)))
                owner.settle(reserved, usage)

    def check(self) -> None:
        for scope in self.scopes:
            budget = scope.budget
            taken = {
                "steps": scope.steps,
                "tokens": scope.tokens + scope.reserved_tokens,
                "input_tokens": scope.input_tokens + scope.reserved_input_tokens,
                "agents": scope.agents,
                "cost_usd": scope.cost_usd + scope.reserved_usd - 1e-12,
            }
            for name in self.LIMITS:
                limit = getattr(budget, name)
                assert limit is None or taken[name] <= limit, name


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_fan_out_ever_passes_a_limit_of_any_scope_around_it(data: st.DataObject) -> None:
    fan_out = FanOut(data)
    for _ in range(data.draw(st.integers(1, 40))):
        fan_out.act()
        fan_out.check()
    for meter, reserved in fan_out.open:
        meter.settle(reserved, Usage())
    for scope in fan_out.scopes:
        assert scope.reserved_tokens == scope.reserved_input_tokens == 0
        assert scope.reserved_usd == pytest.approx(0, abs=1e-12)
