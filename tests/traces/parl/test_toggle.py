"""Toggle's phases and budgets."""

import pytest

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.toggle import Toggle


def test_the_budget_is_a_percentile_of_the_correct_lengths_found_once() -> None:
    toggle = Toggle(period=2, threshold=0.5, percentile=50)
    assert toggle.rewards("q", 0, [1, 1, 1, 0], [10, 20, 90, 5]) == [1, 1, 0.0, 0]
    assert toggle.budgets == {"q": 20}
    assert toggle.rewards("q", 1, [1, 1, 1, 1], [1, 2, 3, 21]) == [1, 1, 1, 0.0]
    assert toggle.budgets == {"q": 20}


def test_every_other_phase_of_m_iterations_has_no_budget() -> None:
    toggle = Toggle(period=3)
    assert [toggle.is_limited(t) for t in range(8)] == [True] * 3 + [False] * 3 + [True] * 2
    toggle.budgets["q"] = 1
    assert toggle.rewards("q", 3, [1, 1], [10, 20]) == [1, 1]


def test_a_question_answered_too_rarely_keeps_its_rewards() -> None:
    toggle = Toggle(threshold=0.8)
    assert toggle.rewards("hard", 0, [1, 0, 0, 0], [10, 1, 1, 1]) == [1, 0, 0, 0]
    assert toggle.rewards("hard", 0, [1, 1, 1, 0], [99, 1, 1, 1]) == [1, 1, 1, 0]


def test_a_question_without_a_correct_answer_has_no_budget() -> None:
    toggle = Toggle(threshold=0.0)
    assert toggle.rewards("q", 0, [0.4, 0.2], [10, 20]) == [0.4, 0.2]
    assert toggle.budgets == {}


def test_what_helpers_add_makes_no_response_correct_and_no_question_easy() -> None:
    toggle = Toggle(threshold=0.8, percentile=50)
    with_help = [1.3, 1.1, 1.0, 1.4]
    assert toggle.rewards("q", 0, with_help, [10, 99, 5, 20], [0.8, 0.9, 0.5, 0.9]) == with_help
    assert toggle.budgets == {}
    assert toggle.rewards("q", 1, [1.4, 1.2], [10, 20], [1.0, 0.9]) == [1.4, 0.0]
    assert toggle.budgets == {"q": 10}


def test_its_state_goes_through_a_checkpoint() -> None:
    toggle, other = Toggle(), Toggle()
    toggle.rewards("q", 0, [1.0], [12])
    other.load_state_dict(toggle.state_dict())
    assert other.budgets == {"q": 12}


def test_a_percentile_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match="percentile"):
        Toggle(percentile=101)
