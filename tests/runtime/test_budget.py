"""Budgets: exact, and zero means zero; who lacks only what others hold waits for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk import Swarm
from swarm_sdk.errors import BudgetExceeded, ConfigError
from swarm_sdk.runtime.budget import AgentMeter, Budget, Reservation, Scope
from swarm_sdk.runtime.environment import Environment, EnvTask
from swarm_sdk.runtime.hooks import Hooks
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.types import Price, Sampling, Task, Usage


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
async def test_zero_admits_no_step(limit: str) -> None:
    budget = Budget(**{limit: 0})
    scope = Scope(budget)
    with pytest.raises(BudgetExceeded):
        await AgentMeter(scope, budget.main_steps, price=Price(output_usd=1.0)).reserve(10)
    assert scope.steps == 0
    assert scope.reserved_tokens == 0


async def test_parallel_steps_cannot_pass_the_limit_between_check_and_count() -> None:
    scope = Scope(Budget(steps=3))
    admitted = 0
    for _ in range(5):
        try:
            await AgentMeter(scope, 100).reserve(10)
            admitted += 1
        except BudgetExceeded:
            pass
    assert admitted == 3


async def test_the_tightest_of_the_nested_budgets_wins_and_says_whose_it_is() -> None:
    swarm = Scope(Budget(tokens=100), name="swarm's")
    episode = Scope(Budget(tokens=60), swarm)
    role = Scope(Budget(tokens=80), episode, "finder's")
    first = AgentMeter(role, 100)
    reserved = await first.reserve(1000)
    assert reserved.max_tokens == 60
    first.settle(reserved, used(5, 60))
    with pytest.raises(BudgetExceeded, match="the budget of 60 tokens is used up"):
        await first.reserve(10)
    other = AgentMeter(Scope(Budget(), swarm), 100)
    reserved = await other.reserve(1000)
    assert reserved.max_tokens == 40
    other.settle(reserved, used(5, 40))
    with pytest.raises(BudgetExceeded, match="swarm's tokens"):
        await AgentMeter(Scope(Budget(), swarm), 100).reserve(1)


async def test_a_call_that_failed_gives_its_tokens_back_and_keeps_its_step() -> None:
    scope = Scope(Budget(tokens=10, steps=5))
    meter = AgentMeter(scope, 100)
    meter.settle(await meter.reserve(10), Usage())
    assert (scope.tokens, scope.reserved_tokens, scope.steps) == (0, 0, 1)


async def test_a_call_is_admitted_only_if_its_highest_cost_fits() -> None:
    scope = Scope(Budget(cost_usd=0.001))
    meter = AgentMeter(scope, 100, price=Price(input_usd=1.0, cached_usd=0.1, output_usd=10.0))
    # 0.0005 dollars for the prompt leave 50 tokens.
    reserved = await meter.reserve(1000, input_tokens=500)
    assert reserved.max_tokens == 50
    meter.settle(
        reserved, Usage(num_prompt_tokens=500, num_cached_tokens=400, num_completion_tokens=10)
    )
    assert scope.cost_usd == pytest.approx((100 * 1.0 + 400 * 0.1 + 10 * 10.0) / 1e6)
    with pytest.raises(BudgetExceeded, match="US dollars"):
        await meter.reserve(1000, input_tokens=800)


async def test_children_of_one_turn_start_at_the_same_depth_even_if_one_has_ended() -> None:
    scope = Scope(Budget(critical_steps=4))
    main = AgentMeter(scope, 100)
    await main.reserve(1)
    first = AgentMeter(scope, 100, parent=main)
    await first.reserve(1)
    await first.reserve(1)
    main.join(first)
    second = AgentMeter(scope, 100, parent=main)
    await second.reserve(1)
    main.join(second)
    assert (first.critical_steps, second.critical_steps, main.critical_steps) == (2, 1, 3)
    await main.reserve(1)
    with pytest.raises(BudgetExceeded, match="critical steps"):
        await main.reserve(1)


async def test_a_roles_critical_steps_count_from_its_assignment_and_hold_for_all_below_it() -> None:
    episode = Scope(Budget())
    main = AgentMeter(episode, 100)
    for _ in range(5):
        await main.reserve(1)
    child = AgentMeter(Scope(Budget(critical_steps=2), episode, "finder's"), 100, parent=main)
    await child.reserve(1)
    grandchild = AgentMeter(child.scope, 100, parent=child)
    await grandchild.reserve(1)
    with pytest.raises(BudgetExceeded, match="finder's critical steps"):
        await grandchild.reserve(1)
    await main.reserve(1)


@dataclass(eq=False)
class Call:
    """One model call of a test, in a task of its own."""

    meter: AgentMeter
    wanted: int
    input_tokens: int = 0
    reserved: Reservation | None = None
    error: BudgetExceeded | None = None
    scope: anyio.CancelScope | None = None
    is_over: bool = False
    has_waited: bool = False

    async def run(self, log: list["Call"]) -> None:
        with anyio.CancelScope() as self.scope:
            try:
                self.reserved = await self.meter.reserve(self.wanted, self.input_tokens)
                log.append(self)
            except BudgetExceeded as exceeded:
                self.error = exceeded
        self.is_over = self.reserved is None

    def settle(self, usage: Usage) -> None:
        self.meter.settle(self.reserved, usage)
        self.is_over = True

    @property
    def is_waiting(self) -> bool:
        return self.reserved is None and not self.is_over

    @property
    def is_in_flight(self) -> bool:
        return self.reserved is not None and not self.is_over


async def turns() -> None:
    """Let every task go as far as it can."""
    for _ in range(6):
        await anyio.lowlevel.checkpoint()


def caller(group, log: list[Call]):
    async def begin(meter: AgentMeter, wanted: int, input_tokens: int = 0) -> Call:
        call = Call(meter, wanted, input_tokens)
        group.start_soon(call.run, log)
        await turns()
        call.has_waited = call.is_waiting
        return call

    return begin


async def test_a_call_waits_for_room_that_calls_in_flight_hold_and_is_served_in_order() -> None:
    scope, log = Scope(Budget(tokens=100)), []
    async with anyio.create_task_group() as group:
        begin = caller(group, log)
        first, second = [await begin(AgentMeter(scope, 9), 50) for _ in range(2)]
        third, small = await begin(AgentMeter(scope, 9), 60), await begin(AgentMeter(scope, 9), 1)
        assert [c.is_waiting for c in (first, second, third, small)] == [False, False, True, True]
        first.settle(used(1, 5))  # 45 are free: enough for the small one, which does not overtake
        await turns()
        assert third.is_waiting
        assert small.is_waiting
        second.settle(used(1, 5))
        await turns()
        assert [c.reserved.max_tokens for c in (third, small)] == [60, 1]
        third.settle(used(1, 60))
        small.settle(used(1, 1))
    assert log == [first, second, third, small]
    assert (scope.tokens, scope.reserved_tokens, scope.num_in_flight) == (71, 0, 0)


async def test_what_calls_in_flight_cannot_give_back_is_refused_at_once_or_lowered_at_the_end() -> (
    None
):
    scope, log = Scope(Budget(tokens=100, input_tokens=50)), []
    async with anyio.create_task_group() as group:
        begin = caller(group, log)
        first = await begin(AgentMeter(scope, 9), 100, 20)
        hopeless = await begin(AgentMeter(scope, 9), 1, 51)
        assert "input tokens" in str(hopeless.error)
        more, late = [await begin(AgentMeter(scope, 9), 1000, 20) for _ in range(2)]
        assert more.is_waiting
        first.settle(used(20, 70))
        await turns()
        assert more.reserved.max_tokens == 30  # nothing is in flight: what is left
        assert late.is_waiting
        more.settle(used(20, 30))
        await turns()
        assert "the budget of 100 tokens is used up" in str(late.error)


async def test_who_is_cancelled_while_it_waits_leaves_its_place_to_the_next() -> None:
    scope, log = Scope(Budget(tokens=10, steps=3)), []
    async with anyio.create_task_group() as group:
        begin = caller(group, log)
        first, large, small = [await begin(AgentMeter(scope, 9), n) for n in (6, 10, 4)]
        assert small.is_waiting
        large.scope.cancel()
        await turns()
        assert small.is_in_flight
        meter = AgentMeter(scope, 9)
        waiting = asyncio.create_task(meter.reserve(10))
        await turns()
        first.settle(used(0, 0))
        small.settle(used(0, 0))  # the next one is admitted here, and cancelled before it runs
        assert scope.num_in_flight == 1
        waiting.cancel()
        await turns()
        assert waiting.cancelled()
    assert (scope.steps, scope.num_in_flight, scope.reserved_tokens) == (2, 0, 0)
    assert (meter.steps, meter.depth) == (0, 0)


async def test_waiting_in_a_roles_budget_holds_up_nobody_outside_of_it() -> None:
    episode, log = Scope(Budget(tokens=1_000)), []
    role = Scope(Budget(tokens=10), episode, "a's")
    async with anyio.create_task_group() as group:
        begin = caller(group, log)
        first, second, outside = (
            await begin(AgentMeter(role, 9), 10),
            await begin(AgentMeter(role, 9), 10),
            await begin(AgentMeter(episode, 9), 10),
        )
        assert [c.is_waiting for c in (first, second, outside)] == [False, True, False]
        outside.settle(used(0, 3))
        await turns()
        assert second.is_waiting
        first.settle(used(0, 4))
        await turns()
        assert second.reserved.max_tokens == 6
        second.settle(used(0, 6))


@pytest.mark.parametrize("num_siblings", [4, 12])
def test_a_swarm_with_little_room_goes_on_by_turns_and_every_sub_agent_answers(
    num_siblings: int, tmp_path
) -> None:
    def policy(messages, tools):
        if not any(tool.name == "assign_task" for tool in tools):
            return "seen"
        if any(m.role == "tool" for m in messages):
            return "all"
        assigned = [call("assign_task", agent="a", prompt=str(n)) for n in range(num_siblings)]
        return calls(call("create_subagent", name="a", system_prompt="s"), *assigned)

    budget, sampling = Budget(tokens=1_000), Sampling(max_tokens=300)
    swarm = Swarm(ScriptedModel(policy), budget=budget, sampling=sampling, runs=tmp_path)
    result = swarm.run_sync("go")
    assert (result.status, result.num_failed, len(result.subagents)) == ("done", 0, num_siblings)
    assert result.usage.num_completion_tokens <= 1_000


async def test_a_pause_does_not_wait_for_a_call_that_waits_for_room(tmp_path) -> None:
    release, asked = anyio.Event(), []

    async def policy(messages, tools):
        asked.append(messages[-1].content)
        if len(asked) == 1:
            await release.wait()
        return "a"

    class Two(Environment):
        name = "two"

        async def judge(self, task, result, rollouts):
            return {"reward": float(result.status == "done")}

    total, sampling = Budget(tokens=100), Sampling(max_tokens=100)
    async with Swarm(
        ScriptedModel(policy), total_budget=total, sampling=sampling, runs=tmp_path
    ) as swarm:
        rollouts, found = swarm.rollouts(), []

        async def roll(name: str) -> None:
            found.append(await rollouts.rollout(Two(), EnvTask(name, Task(name), {})))

        async with anyio.create_task_group() as group:
            group.start_soon(roll, "one")
            group.start_soon(roll, "other")
            await anyio.wait_all_tasks_blocked()
            assert len(asked) == 1
            group.start_soon(rollouts.pause)
            await anyio.wait_all_tasks_blocked()
            release.set()
            await anyio.wait_all_tasks_blocked()
            assert len(asked) == 1  # the other has room now and stays where it is
            rollouts.resume()
    assert sorted(asked) == ["one", "other"]
    assert [one.rewards for one in found] == [{"reward": 1.0}] * 2


async def test_a_hook_that_asks_its_own_swarm_during_a_call_does_not_wait_for_itself(
    tmp_path,
) -> None:
    class Ask(Hooks):
        async def model_call(self, agent, sampling, proceed):
            if not answers:
                answers.append("")
                answers[0] = (await swarm.run("inner")).status
            return await proceed(sampling)

    answers: list[str] = []
    total, sampling = Budget(tokens=100), Sampling(max_tokens=100)
    async with Swarm(
        ScriptedModel(lambda m, t: "a"),
        total_budget=total,
        sampling=sampling,
        hooks=[Ask()],
        runs=tmp_path,
    ) as swarm:
        with anyio.fail_after(20):
            outer = await swarm.run("outer")
    assert (outer.status, answers) == ("done", ["out_of_budget"])


Draw = Callable[[st.SearchStrategy], Any]


class FanOut:
    """A tree of scopes with agents in it, driven at random."""

    LIMITS = ("steps", "tokens", "input_tokens", "agents", "cost_usd")
    PRICE = Price(input_usd=2.0, cached_usd=0.5, output_usd=8.0)

    def __init__(self, draw: Draw, group) -> None:
        self.draw = draw
        budgets = [self.draw_budget() for _ in range(4)]
        swarm = Scope(budgets[0], name="swarm's")
        episode = Scope(budgets[1], swarm)
        roles = [Scope(budgets[2], episode, "a's"), Scope(budgets[3], episode, "b's")]
        self.scopes = [swarm, episode, *roles]
        self.calls: list[Call] = []
        """In the order of their arrival."""
        self.admitted: list[Call] = []
        self.begin = caller(group, self.admitted)

    def draw_budget(self) -> Budget:
        draw = self.draw
        return Budget(
            steps=draw(st.none() | st.integers(0, 20)),
            tokens=draw(st.none() | st.integers(0, 200)),
            input_tokens=draw(st.none() | st.integers(0, 400)),
            agents=draw(st.none() | st.integers(0, 5)),
            cost_usd=draw(st.none() | st.floats(0, 0.002)),
        )

    async def act(self) -> None:
        draw = self.draw
        scope = draw(st.sampled_from(self.scopes[1:]))
        waiting = [one for one in self.calls if one.is_waiting]
        in_flight = [one for one in self.calls if one.is_in_flight]
        match draw(st.sampled_from(("call", "call", "settle", "settle", "fail", "agent", "quit"))):
            case "call":
                meter = AgentMeter(scope, 1000, price=self.PRICE)
                one = await self.begin(meter, draw(st.integers(1, 60)), draw(st.integers(0, 80)))
                self.calls.append(one)
                assert one.reserved is None or one.reserved.max_tokens >= 1
                if one.error is not None:  # not even with all that is in flight
                    with pytest.raises(BudgetExceeded):
                        self.room_if_all_is_given_back(one)
            case "agent":
                try:
                    scope.reserve_agent()
                except BudgetExceeded:
                    return
            case "quit" if waiting:
                draw(st.sampled_from(waiting)).scope.cancel()
            case "settle" | "fail" as how if in_flight:
                one = draw(st.sampled_from(in_flight))
                num = draw(st.integers(0, one.reserved.max_tokens)) if how == "settle" else 0
                one.settle(used(one.input_tokens, num) if how == "settle" else Usage())
        await turns()

    def room_if_all_is_given_back(self, one: Call) -> None:
        for scope in one.meter.scope.scopes:
            scope.admit("steps", scope.steps, scope.budget.steps)
            scope.room(one.wanted, one.input_tokens, self.PRICE, is_held=False)

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
        waiting = [one for one in self.calls if one.is_waiting]
        if waiting:
            assert any(one.is_in_flight for one in self.calls), "nobody will ever be served"
        for one in waiting:  # each waits for room that a call in one of its scopes holds
            assert any(scope.num_in_flight for scope in one.meter.bounded)
        for scope in self.scopes:  # who waited in a scope was served in the order of arrival
            inside = [c for c in self.calls if c.has_waited and c.meter.scope is scope]
            served = [c for c in self.admitted if c in inside]
            assert served == [c for c in inside if c in served]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_fan_out_ever_passes_a_limit_and_none_that_waits_is_forgotten(
    data: st.DataObject,
) -> None:
    async def main() -> None:
        async with anyio.create_task_group() as group:
            fan_out = FanOut(data.draw, group)
            for _ in range(data.draw(st.integers(1, 40))):
                await fan_out.act()
                fan_out.check()
            while in_flight := [one for one in fan_out.calls if one.is_in_flight]:
                in_flight[0].settle(Usage())
                await turns()
                fan_out.check()
        assert all(one.is_over for one in fan_out.calls)
        for scope in fan_out.scopes:
            assert scope.reserved_tokens == scope.reserved_input_tokens == scope.reserved_usd == 0
            assert (scope.num_in_flight, scope.waiting, scope.is_awaited) == (0, [], False)

    anyio.run(main)
