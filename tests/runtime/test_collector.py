"""The cycle collector is asked less often while episodes run, and put back as it was."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from swarm_sdk import Swarm
from swarm_sdk.runtime.collector import THRESHOLD, relaxed_collector
from swarm_sdk.testing import ScriptedModel


@pytest.fixture(autouse=True)
def thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


def test_the_last_episode_to_end_puts_the_threshold_back(tmp_path: Path) -> None:
    gc.set_threshold(700, 10, 10)
    seen = []
    model = ScriptedModel(lambda m, t: seen.append(gc.get_threshold()[0]) or "ok")
    with relaxed_collector():
        Swarm(model, runs=tmp_path).run_sync("go")
        assert gc.get_threshold()[0] == THRESHOLD
    assert seen == [THRESHOLD]
    assert gc.get_threshold() == (700, 10, 10)


@pytest.mark.parametrize("own", [(0, 10, 10), (THRESHOLD + 1, 5, 5)])
def test_a_collector_that_the_app_has_set_is_left_alone(own: tuple[int, int, int]) -> None:
    gc.set_threshold(*own)
    with relaxed_collector():
        assert gc.get_threshold() == own
    assert gc.get_threshold() == own


def test_an_error_puts_it_back_too() -> None:
    gc.set_threshold(700, 10, 10)
    with pytest.raises(ValueError, match="inside"), relaxed_collector():
        raise ValueError("inside")
    assert gc.get_threshold() == (700, 10, 10)
