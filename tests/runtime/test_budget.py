"""Budgets: exact, and zero means zero."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import BudgetExceeded, ConfigError
from swarm_sdk.runtime.budget import AgentMeter, Budget, BudgetMeter


@pytest.mark.parametrize("field", ["critical_steps", "steps", "tokens", "agents", "main_steps"])
@pytest.mark.parametrize("value", [-1, float("nan"), 1.5, True, "3"])
def test_a_budget_that_is_no_whole_number_from_0_is_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=field):
        Budget(**{field: value})


def test_wall_seconds_may_be_a_fraction_but_not_nan() -> None:
    assert Budget(wall_s=0.5).wall_s == 0.5
    with pytest.raises(ConfigError, match="wall_s"):
        Budget(wall_s=float("nan"))


@pytest.mark.parametrize("limit", ["critical_steps", "steps", "tokens", "main_steps"])
def test_zero_admits_no_step(limit: str) -> None:
    budget = Budget(**{limit: 0})
    meter = BudgetMeter(budget)
    with pytest.raises(BudgetExceeded):
        meter.reserve_step(AgentMeter(budget.main_steps), 10)
    assert meter.steps == 0


def test_parallel_steps_cannot_pass_the_limit_between_check_and_count() -> None:
    meter = BudgetMeter(Budget(steps=3))
    agents = [AgentMeter(100) for _ in range(5)]
    admitted = 0
    for agent in agents:
        try:
            meter.reserve_step(agent, 10)
            admitted += 1
        except BudgetExceeded:
            pass
    assert admitted == 3


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50)), max_size=30), st.integers(0, 200)
)
def test_generated_tokens_never_pass_the_limit(turns: list[tuple[int, int]], limit: int) -> None:
    meter = BudgetMeter(Budget(tokens=limit))
    open_reservations: list[tuple[int, int]] = []
    for asked, used in turns:
        try:
            granted = meter.reserve_step(AgentMeter(10), asked)
        except BudgetExceeded:
            continue
        open_reservations.append((granted, min(used, granted)))
        assert meter.tokens + meter.reserved_tokens <= limit
    for granted, used in open_reservations:
        meter.settle_step(reserved_tokens=granted, used_tokens=used)
    assert meter.reserved_tokens == 0
    assert meter.tokens <= limit


def test_children_of_one_turn_start_at_the_same_depth_even_if_one_has_ended() -> None:
    meter = BudgetMeter(Budget(critical_steps=4))
    main = AgentMeter(100)
    meter.reserve_step(main, 1)
    first = main.child(100)
    meter.reserve_step(first, 1)
    meter.reserve_step(first, 1)
    main.join(first)
    second = main.child(100)
    meter.reserve_step(second, 1)
    main.join(second)
    assert (first.critical_steps, second.critical_steps, main.critical_steps) == (2, 1, 3)
    meter.reserve_step(main, 1)
    with pytest.raises(BudgetExceeded, match="critical steps"):
        meter.reserve_step(main, 1)
