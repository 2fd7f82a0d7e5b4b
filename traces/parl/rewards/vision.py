"""Rewards of visual tasks, each between 0 and 1 (K2.5 report, section 4.4.1).

    grounding    F1 whose matches are IoUs                        boxes    x0, y0, x1, y1
    pointing     F1 whose matches are exp(-d^2 / 2 sigma^2)       points   x, y
    polygons     IoU of the masks that they fill                  corners  x, y
    reading      1 - edit distance / longer length                text

Matches are one to one and of the largest sum. Sigma and the IoU's floor are not in the report:
parameters here.
"""

# Shapes: G = given, A = asked, N = corners.

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.rewards.outcome import soft_f1

Box = tuple[float, float, float, float]
Point = tuple[float, float]


def grounding(asked: Sequence[Box], given: Sequence[Box], *, min_iou: float = 0.0) -> float:
    """F1 of boxes; a match below ``min_iou`` counts nothing."""
    iou_GA = np.array([[_iou(g, a) for a in asked] for g in given]).reshape(len(given), len(asked))
    return soft_f1(_best_sum(np.where(iou_GA >= min_iou, iou_GA, 0.0)), len(given), len(asked))


def pointing(asked: Sequence[Point], given: Sequence[Point], *, sigma: float) -> float:
    """F1 of points; a match at the distance ``sigma`` counts exp(-1/2), one with NaN nothing."""
    if sigma <= 0:
        raise ConfigError(f"sigma must be positive, got {sigma}")
    given_G2 = np.asarray(given, dtype=np.float64).reshape(-1, 1, 2)
    asked_A2 = np.asarray(asked, dtype=np.float64).reshape(1, -1, 2)
    square_GA = ((given_G2 - asked_A2) ** 2).sum(-1)
    match_GA = np.nan_to_num(np.exp(-square_GA / (2 * sigma**2)))
    return soft_f1(_best_sum(match_GA), len(given), len(asked))


def polygon_iou(asked: Sequence[Point], given: Sequence[Point], height: int, width: int) -> float:
    """IoU of the pixels whose centres lie inside (even-odd rule); two empty masks are alike."""
    one, other = (polygon_mask(corners, height, width) for corners in (asked, given))
    union = int((one | other).sum())
    return float((one & other).sum() / union) if union else 1.0


def reading(truth: str, given: str) -> float:
    """1 minus the normalised Levenshtein distance.

    >>> reading("kitten", "sitting") == 1 - 3 / 7
    True
    """
    longest = max(len(truth), len(given))
    return 1 - edit_distance(truth, given) / longest if longest else 1.0


def polygon_mask(corners: Sequence[Point], height: int, width: int) -> NDArray[np.bool_]:
    """The pixels [height, width] that a closed polygon fills."""
    mask = np.zeros((height, width), dtype=np.bool_)
    y_H1 = (np.arange(height) + 0.5)[:, None]
    x_1W = (np.arange(width) + 0.5)[None]
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], *corners[:1]], strict=True):
        if y0 == y1:
            continue
        crosses_H1 = (y0 > y_H1) != (y1 > y_H1)
        edge_H1 = x0 + (y_H1 - y0) * (x1 - x0) / (y1 - y0)
        mask ^= crosses_H1 & (x_1W < edge_H1)
    return mask


def edit_distance(one: str, other: str) -> int:
    """The fewest insertions, deletions and exchanges of characters."""
    letters = np.array([ord(letter) for letter in other], dtype=np.int64)
    places = np.arange(len(other) + 1)
    row = places.copy()
    for number, letter in enumerate(one, start=1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))
        row = np.minimum.accumulate(best - places) + places  # insertions, left to right
    return int(row[-1])


def _iou(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    union = _area(one) + _area(other) - shared
    return shared / union if union > 0 else 0.0


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _best_sum(match_GA: NDArray[np.float64]) -> float:
    """The largest sum of a one-to-one matching."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(match_GA, maximize=True)
    return float(match_GA[rows, columns].sum())
