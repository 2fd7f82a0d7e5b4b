"""Outcome rewards that a rule can give, each between 0 and 1 (K2.5 report, sections 4.4 and 5).

The report names them and gives no formulas for counting and budget control; those are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from swarm_sdk.errors import ConfigError

KeyT = TypeVar("KeyT", bound=Hashable)


def soft_f1(matched: float, num_given: int, num_asked: int) -> float:
    """2 P R / (P + R) with P = matched / given and R = matched / asked.

    Nothing given where nothing was asked is right; ``matched`` is a sum of matches of 0 to 1.

    >>> soft_f1(1.5, 2, 4)
    0.5
    """
    if num_given == num_asked == 0:
        return 1.0
    return 2 * matched / (num_given + num_asked)


def item_f1(
    asked: Mapping[KeyT, str],
    given: Mapping[KeyT, str],
    is_same: Callable[[str, str], bool] = str.__eq__,
) -> float:
    """F1 over the cells of a table (WideSearch): right ones have the same key and text.

    >>> item_f1({("Kenya", "capital"): "Nairobi"}, {("Kenya", "capital"): "Nairobi"})
    1.0
    """
    right = sum(key in asked and is_same(asked[key], cell) for key, cell in given.items())
    return soft_f1(right, len(given), len(asked))


def exact(truth: str, given: str) -> float:
    """1 for the same text but for case and spaces.

    >>> exact("New  York", "new york ")
    1.0
    """
    return float(" ".join(truth.split()).casefold() == " ".join(given.split()).casefold())


def counting(truth: int, given: int) -> float:
    """1 for the right number, less with the distance, 0 from as far off as the truth itself.

    >>> [counting(10, n) for n in (10, 9, 15, 20, 99)]
    [1.0, 0.9, 0.5, 0.0, 0.0]
    """
    return max(0.0, 1 - abs(given - truth) / max(abs(truth), 1))


def within_budget(reward: float, num_used: int, budget: int) -> float:
    """Budget control: the whole reward up to ``budget``, then linearly less, 0 from twice of it.

    >>> [within_budget(1.0, used, 100) for used in (80, 100, 150, 300)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if budget < 1:
        raise ConfigError(f"a budget must be at least 1, got {budget}")
    return reward * min(1.0, max(0.0, 2 - num_used / budget))
