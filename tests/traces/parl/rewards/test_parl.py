"""r = lambda1 r_parallel + lambda2 r_finish + r_perf, on episodes made by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk import Swarm
from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.parl.rewards.parl import (
    ParlReward,
    Schedule,
    Subtask,
    r_finish,
    r_parallel,
    read_subtasks,
    width,
)


def subtask(
    prompt: str, stage: int = 0, *, is_finished: bool = True, num_actions: int = 1
) -> Subtask:
    return Subtask(
        stage=stage, agent="a", prompt=prompt, is_finished=is_finished, num_actions=num_actions
    )


def test_the_widest_group_of_one_turn_counts() -> None:
    many = [subtask("x", 0), *(subtask(p, 1) for p in "abc"), subtask("y", 2)]
    assert width(many) == 3
    assert r_parallel(many, target_width=5) == 0.5
    assert r_parallel(many, target_width=3) == r_parallel(many, target_width=2) == 1.0


@pytest.mark.parametrize(
    "spurious",
    [
        [subtask("a"), subtask("b", num_actions=0)],
        [subtask("a"), subtask("b", is_finished=False)],
        [subtask("a b"), subtask(" a  b ")],
        [subtask("a", 0), subtask("b", 1), subtask("c", 2)],
        [subtask("a")],
        [],
    ],
    ids=["idle", "unfinished", "doubled", "one after the other", "alone", "none"],
)
def test_children_that_do_nothing_side_by_side_pay_nothing(spurious: list[Subtask]) -> None:
    assert r_parallel(spurious, target_width=4) == 0.0


def test_r_finish_is_the_finished_share_and_one_without_assignments() -> None:
    assert r_finish([subtask("a"), subtask("b", is_finished=False)]) == 0.5
    assert r_finish([]) == 1.0


subtasks = st.lists(
    st.builds(
        subtask,
        st.sampled_from("abcdef"),
        st.integers(0, 3),
        is_finished=st.booleans(),
        num_actions=st.integers(0, 2),
    ),
    max_size=12,
)


@given(subtasks, st.randoms(use_true_random=False))
def test_both_are_between_0_and_1_and_no_order_matters(made: list[Subtask], random) -> None:
    shuffled = list(made)
    random.shuffle(shuffled)
    for reward in (r_finish, lambda some: r_parallel(some, 4)):
        assert 0 <= reward(made) <= 1
        assert reward(made) == reward(shuffled)


@given(subtasks)
def test_one_more_idle_child_never_raises_the_reward(made: list[Subtask]) -> None:
    idle = [*made, subtask("idle", num_actions=0, is_finished=False)]
    weights = ParlReward()
    assert weights(0, 0.5, idle).total <= weights(0, 0.5, made).total


def test_the_weights_fall_to_zero_and_leave_the_outcome() -> None:
    weights = ParlReward(
        parallel=Schedule(start=0.4, steps=10), finish=Schedule(start=0.2, steps=20), target_width=2
    )
    made = [subtask("a"), subtask("b"), subtask("c", is_finished=False), subtask("d")]
    assert weights(0, 0.5, made).total == pytest.approx(0.4 + 0.2 * 0.75 + 0.5)
    assert weights(5, 0.5, made).total == pytest.approx(0.2 + 0.15 * 0.75 + 0.5)
    assert weights(20, 0.5, made).total == 0.5
    cosine = Schedule(start=1.0, steps=10, shape="cosine")
    assert [round(cosine.at(t), 4) for t in (0, 5, 10)] == [1.0, 0.5, 0.0]


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="start"):
        Schedule(start=-1, steps=2)
    with pytest.raises(ConfigError, match="target_width"):
        ParlReward(target_width=1)


def test_subtasks_are_read_from_the_record_of_an_episode(tmp_path) -> None:
    def look(name: str) -> str:
        """Look a name up."""
        return f"found {name}"

    def policy(messages, tools):
        prompt = next(m.content for m in messages if m.role == "user")
        results = [m for m in messages if m.role == "tool"]
        if prompt == "all":
            if results:
                return "done"
            assigned = [call("assign_task", agent="a", prompt=p) for p in ("one", "idle", "bad")]
            return calls(call("create_subagent", name="a", system_prompt="You look."), *assigned)
        if prompt == "bad":
            raise ModelError("the server is gone")
        return calls(call("look", name=prompt)) if prompt == "one" and not results else "report"

    result = Swarm(ScriptedModel(policy), tools=[look], runs=tmp_path).run_sync("all")
    found = read_subtasks(Ledger(tmp_path, readonly=True), result.episode_id)
    told = {s.prompt: (s.stage, s.agent, s.is_finished, s.num_actions) for s in found}
    assert told == {
        "one": (0, "a", True, 1),
        "idle": (0, "a", True, 0),
        "bad": (0, "a", False, 0),
    }
