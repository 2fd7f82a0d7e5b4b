"""Rewards of answers and pictures: cases by hand, and what must always hold."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.rewards.outcome import (
    counting,
    exact,
    item_f1,
    soft_f1,
    within_budget,
)
from swarm_sdk.traces.parl.rewards.vision import (
    edit_distance,
    grounding,
    pointing,
    polygon_iou,
    polygon_mask,
    reading,
)

number = st.integers(0, 20).map(float)
boxes = st.lists(
    st.tuples(number, number, st.integers(1, 9), st.integers(1, 9)).map(
        lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
    ),
    max_size=5,
)
points = st.lists(st.tuples(number, number), max_size=5)
tables = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("xyz"), max_size=4)
texts = st.text("abc", max_size=8)


def test_item_f1_of_a_table_by_hand() -> None:
    asked = {"a": "1", "b": "2", "c": "3", "d": "4"}
    assert item_f1(asked, {"a": "1", "b": "9"}) == pytest.approx(2 * 1 / (2 + 4))
    assert item_f1(asked, asked) == 1.0
    assert item_f1(asked, {}) == 0.0
    assert item_f1({"a": "1"}, {"a": "1.0"}, lambda x, y: float(x) == float(y)) == 1.0
    precision, recall = 1.5 / 2, 1.5 / 4
    assert soft_f1(1.5, 2, 4) == pytest.approx(2 * precision * recall / (precision + recall))


@given(tables, tables)
def test_item_f1_is_symmetric_and_between_0_and_1(one, other) -> None:
    assert 0 <= item_f1(one, other) <= 1
    assert item_f1(one, other) == item_f1(other, one)
    assert item_f1(one, one) == 1.0


def test_exact_and_counting_and_budgets_by_hand() -> None:
    assert (exact("Oslo", " oslo"), exact("Oslo", "Bergen")) == (1.0, 0.0)
    assert (counting(4, 3), counting(0, 0), counting(0, 1), counting(3, 9)) == (0.75, 1.0, 0.0, 0.0)
    assert within_budget(0.8, 125, 100) == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="budget"):
        within_budget(1.0, 1, 0)


@given(st.integers(0, 50), st.integers(-50, 99), st.integers(-50, 99))
def test_counting_falls_with_the_distance(truth: int, one: int, other: int) -> None:
    near, far = sorted((one, other), key=lambda n: abs(n - truth))
    assert 0 <= counting(truth, far) <= counting(truth, near) <= 1


def test_grounding_by_hand() -> None:
    asked = [(0, 0, 10, 10), (20, 20, 30, 30)]
    given_ = [(20, 20, 30, 25), (0, 0, 10, 10), (50, 50, 60, 60)]  # IoU 0.5, 1, and none
    assert grounding(asked, given_) == pytest.approx(2 * 1.5 / 5)
    assert grounding(asked, given_, min_iou=0.6) == pytest.approx(2 * 1.0 / 5)
    assert grounding([], []) == 1.0
    assert grounding(asked, []) == grounding([], asked) == 0.0


def test_matching_is_the_best_one_and_not_greedy() -> None:
    # Greedy takes 4-5 first and leaves 0 to 9; the best sum matches 0-4 and 5-9.
    asked, given_ = [(0.0, 0.0), (5.0, 0.0)], [(4.0, 0.0), (9.0, 0.0)]
    best = 2 * math.exp(-16 / 18)
    greedy = math.exp(-1 / 18) + math.exp(-81 / 18)
    assert greedy > best  # with this sigma greedy is right after all
    assert pointing(asked, given_, sigma=3.0) == pytest.approx(2 * greedy / 4)
    wide = 2 * math.exp(-16 / 200)
    assert wide > math.exp(-1 / 200) + math.exp(-81 / 200)
    assert pointing(asked, given_, sigma=10.0) == pytest.approx(2 * wide / 4)


@given(boxes, boxes, st.randoms(use_true_random=False))
def test_grounding_is_bounded_symmetric_and_blind_to_order(one, other, random) -> None:
    reward = grounding(one, other)
    assert 0 <= reward <= 1 + 1e-12
    assert grounding(other, one) == pytest.approx(reward)
    shuffled = list(one)
    random.shuffle(shuffled)
    assert grounding(shuffled, other) == pytest.approx(reward)
    assert grounding(one, one) == pytest.approx(1.0)


@given(points, points, st.randoms(use_true_random=False))
def test_pointing_is_bounded_symmetric_and_blind_to_order(one, other, random) -> None:
    shuffled = list(one)
    random.shuffle(shuffled)
    assert pointing(shuffled, other, sigma=2.0) == pytest.approx(pointing(one, other, sigma=2.0))
    assert 0 <= pointing(one, other, sigma=2.0) <= 1 + 1e-12
    assert pointing(one, other, sigma=2.0) == pytest.approx(pointing(other, one, sigma=2.0))
    assert pointing(one, one, sigma=2.0) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="sigma"):
        pointing(one, other, sigma=0)


def test_coordinates_that_are_no_numbers_match_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    assert pointing([(1.0, 1.0)], [(nan, 1.0), (1.0, 1.0)], sigma=1.0) == pytest.approx(2 / 3)
    assert pointing([(1.0, 1.0)], [(inf, -inf)], sigma=1.0) == 0.0
    assert grounding([(0, 0, 1, 1)], [(nan, 0, 1, 1), (0, 0, inf, inf)]) == 0.0
    square = [(0.0, 0.0), (4.0, 0.0), (4.0, 4.0), (0.0, 4.0)]
    assert polygon_iou(square, [(nan, nan), (nan, 1.0), (2.0, nan)], 6, 6) == 0.0


def test_polygons_by_hand() -> None:
    square = [(0, 0), (4, 0), (4, 4), (0, 4)]
    assert polygon_mask(square, 6, 6).sum() == 16
    assert polygon_mask(square, 6, 6)[:4, :4].all()
    half = [(0, 0), (2, 0), (2, 4), (0, 4)]
    assert polygon_iou(square, half, 6, 6) == 0.5
    assert polygon_iou(square, [(5, 5), (6, 5), (6, 6)], 6, 6) == 0.0
    assert polygon_iou([], [], 6, 6) == 1.0
    triangle = polygon_mask([(0, 0), (6, 0), (0, 6)], 6, 6)
    assert triangle.tolist() == [[x + y + 1 < 6 for x in range(6)] for y in range(6)]


@given(st.lists(st.tuples(number, number), min_size=3, max_size=6))
def test_a_polygon_is_itself_from_any_corner_and_either_way(corners) -> None:
    turned = [*corners[1:], *corners[:1]]
    assert polygon_iou(corners, turned, 21, 21) == 1.0
    assert polygon_iou(corners, corners[::-1], 21, 21) == 1.0


def plain_distance(one: str, other: str) -> int:
    table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
    table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
    for i, x in enumerate(one, 1):
        for j, y in enumerate(other, 1):
            table[i, j] = min(
                table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y)
            )
    return int(table[-1, -1])


@given(texts, texts)
def test_reading_is_the_normalised_edit_distance(one: str, other: str) -> None:
    assert edit_distance(one, other) == plain_distance(one, other) == edit_distance(other, one)
    assert 0 <= reading(one, other) <= 1
    assert (reading(one, other) == 1.0) == (one == other)
