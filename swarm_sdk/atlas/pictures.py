"""Pictures with known answers, and the short code that measures them.

    count     how many objects             minority side of a threshold, specks dropped
    colour    how many objects of a colour
    width, height, area, centre            of the largest object
    brightness, size                       of the whole picture

Training pictures are discs and squares on plain ground. Held-out pictures are ellipses, octagons
and hexagons on sloping ground with more noise, and photographs that come with scikit-image. The
code is the same for both: it does not know what is in the picture.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow

from swarm_sdk.errors import ConfigError

# Shapes: H, W = rows and columns of a picture; 3 = red, green, blue; values 0 to 255.

Task = Literal["count", "colour", "width", "height", "area", "centre", "brightness", "size"]
TASKS: tuple[Task, ...] = (
    *("count", "count", "colour", "width", "height", "area", "centre", "brightness", "size"),
)
"""Counting is drawn twice as often as the others."""

TOLERANCE: dict[Task, float] = {"width": 2, "height": 2, "area": 40, "centre": 2, "brightness": 0.5}
"""Pixels (grey values for brightness); other tasks are exact."""

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (50, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (150, 60, 180),
    "orange": (240, 140, 40),
}
PHOTOGRAPHS: tuple[tuple[str, Task, str], ...] = (
    *(("coins.png", "count", "24"), ("coins.png", "size", ""), ("coins.png", "brightness", "")),
    *(("camera.png", "size", ""), ("camera.png", "brightness", ""), ("moon.png", "brightness", "")),
    *(("astronaut.png", "size", ""), ("coffee.png", "size", ""), ("page.png", "brightness", "")),
    *(("horse.png", "size", ""), ("rocket.jpg", "size", ""), ("retina.jpg", "size", "")),
    *(("clock_motion.png", "brightness", ""), ("brick.png", "brightness", "")),
    *(("text.png", "size", ""), ("grass.png", "brightness", ""), ("chelsea.png", "size", "")),
)
"""(file of scikit-image, task, answer; empty where the pixels tell it)."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture and the answer to one task about it."""

    data: bytes
    task: Task
    answer: str
    colour: str = ""
    """What is counted in the task ``colour``."""
    is_bright: bool = True
    """Whether the objects are brighter than the ground."""


@dataclass(frozen=True, slots=True)
class _Style:
    shapes: tuple[str, ...]
    noise: float
    slope: float
    min_side: int
    max_side: int
    min_radius: int
    max_radius: int


TRAIN = _Style(("disc", "square"), 5.0, 0.0, 120, 220, 6, 9)
HELDOUT = _Style(("ellipse", "octagon", "hexagon"), 9.0, 30.0, 180, 300, 9, 13)


def draw(task: Task, rng: random.Random, *, is_heldout: bool = False) -> Picture:
    """Draw a picture for ``task``; its answer is known from how it was drawn."""
    style = HELDOUT if is_heldout else TRAIN
    height, width = (rng.randint(style.min_side, style.max_side) for _ in range(2))
    is_bright = rng.random() < 0.5
    if task == "colour":
        return _coloured(height, width, style, rng)
    if task in {"count", "brightness", "size"}:
        masks = _scatter(rng.randint(3, 24), height, width, style, rng)
    else:
        masks = [_single(height, width, style, rng)]
    covered_HW = np.logical_or.reduce(masks)
    picture_HW = _grey(covered_HW, style, rng, is_bright=is_bright)
    ys, xs = np.nonzero(covered_HW)
    answers: dict[str, Callable[[], str]] = {
        "count": lambda: str(len(masks)),
        "width": lambda: str(xs.max() - xs.min() + 1),
        "height": lambda: str(ys.max() - ys.min() + 1),
        "area": lambda: str(len(xs)),
        "centre": lambda: f"{xs.mean():.0f}, {ys.mean():.0f}",
        "brightness": lambda: str(round(float(picture_HW.mean()), 1)),
        "size": lambda: f"{width} x {height}",
    }
    return Picture(_encode(picture_HW), task, answers[task](), is_bright=is_bright)


def photograph(name: str, task: Task, answer: str = "") -> Picture:
    """One of scikit-image's own pictures, read from the installed package.

    Raises:
        ConfigError: scikit-image is not installed, or has no such picture.
    """
    spec = find_spec("skimage")
    path = Path(spec.origin).parent / "data" / name if spec and spec.origin else None
    if path is None or not path.exists():
        raise ConfigError(
            f"picture {name} comes with scikit-image; pip install 'swarm-sdk[sandbox]'"
        )
    with Pillow.open(path) as picture:
        if task == "size":
            answer = f"{picture.width} x {picture.height}"
        elif task == "brightness":
            answer = str(round(float(np.asarray(picture.convert("L")).mean()), 1))
    return Picture(path.read_bytes(), task, answer)


def code(task: Task, name: str, colour: str = "") -> str:
    """The code that answers ``task`` for the file ``name``; it prints the answer."""
    read = f'g = np.asarray(Image.open("{name}").convert("L"), dtype=float)'
    objects = [
        "m = ndimage.binary_opening(ndimage.binary_fill_holes(m), iterations=2)",
        "a = np.bincount(ndimage.label(m)[0].ravel())[1:]",
        "print((a > 0.2 * a.max()).sum())",
    ]
    largest = [
        "g = ndimage.gaussian_filter(g, 1)",
        "m = g > threshold_otsu(g)",
        "l = ndimage.label(m if m.mean() < 0.5 else ~m)[0]",
        "y, x = np.nonzero(l == np.bincount(l.ravel())[1:].argmax() + 1)",
    ]
    prints = {
        "width": "print(x.max() - x.min() + 1)",
        "height": "print(y.max() - y.min() + 1)",
        "area": "print(len(x))",
        "centre": 'print(f"{x.mean():.0f}, {y.mean():.0f}")',
    }
    numpy, pillow = "import numpy as np", "from PIL import Image"
    scipy, otsu = "from scipy import ndimage", "from skimage.filters import threshold_otsu"
    match task:
        case "count":
            lines = [
                *(numpy, pillow, scipy, otsu, read),
                "g = ndimage.gaussian_filter(g, 1) - ndimage.gaussian_filter(g, max(g.shape) / 10)",
                "m = g > threshold_otsu(g)",
                "m = m if m.mean() < 0.5 else ~m",
                *objects,
            ]
        case "colour":
            lines = [
                *(numpy, pillow, scipy),
                f'p = np.asarray(Image.open("{name}").convert("RGB"), dtype=float)',
                f"m = np.abs(p - {COLOURS[colour]}).max(axis=2) < 45",
                *objects,
            ]
        case "brightness":
            lines = [numpy, pillow, read, "print(round(g.mean(), 1))"]
        case "size":
            lines = [numpy, pillow, read, 'print(g.shape[1], "x", g.shape[0])']
        case _:
            lines = [numpy, pillow, scipy, otsu, read, *largest, prints[task]]
    return "\n".join(lines)


def _coloured(height: int, width: int, style: _Style, rng: random.Random) -> Picture:
    masks = _scatter(rng.randint(5, 20), height, width, style, rng)
    colours = rng.sample(list(COLOURS), rng.randint(2, 3))
    painted = [rng.choice(colours) for _ in masks]
    asked = painted[0]
    ground = rng.choice(((245, 245, 245), (15, 15, 15), (225, 230, 235)))
    picture_HW3 = np.full((height, width, 3), ground, dtype=float)
    for mask_HW, colour in zip(masks, painted, strict=True):
        picture_HW3[mask_HW] = COLOURS[colour]
    picture_HW3 += np.random.default_rng(rng.getrandbits(32)).normal(
        0, style.noise / 2, picture_HW3.shape
    )
    data = _encode(np.clip(picture_HW3, 0, 255).round().astype(np.uint8))
    return Picture(data, "colour", str(painted.count(asked)), colour=asked)


def _grey(
    covered_HW: Mask, style: _Style, rng: random.Random, *, is_bright: bool
) -> NDArray[np.uint8]:
    height, width = covered_HW.shape
    low, high = rng.randint(20, 60), rng.randint(170, 220)
    ground, objects = (low, high) if is_bright else (high, low)
    picture_HW = np.where(covered_HW, float(objects), float(ground))
    picture_HW += np.linspace(0, rng.uniform(-1, 1) * style.slope, width)[None, :]
    picture_HW += np.linspace(0, rng.uniform(-1, 1) * style.slope, height)[:, None]
    picture_HW += np.random.default_rng(rng.getrandbits(32)).normal(
        0, style.noise, picture_HW.shape
    )
    return np.clip(picture_HW, 0, 255).round().astype(np.uint8)


def _scatter(
    num_objects: int, height: int, width: int, style: _Style, rng: random.Random
) -> list[Mask]:
    """Objects that do not touch; fewer than asked for where the picture is full."""
    placed: list[tuple[int, int]] = []
    masks: list[Mask] = []
    gap = 2 * style.max_radius + 8
    for _ in range(40 * num_objects):
        margin = style.max_radius + 4
        y, x = rng.randint(margin, height - margin), rng.randint(margin, width - margin)
        if all(max(abs(y - v), abs(x - u)) >= gap for v, u in placed):
            radius = rng.randint(style.min_radius, style.max_radius)
            masks.append(_shape(rng.choice(style.shapes), height, width, y, x, radius, radius))
            placed.append((y, x))
        if len(masks) == num_objects:
            break
    return masks


def _single(height: int, width: int, style: _Style, rng: random.Random) -> Mask:
    tall, wide = rng.randint(12, height // 4), rng.randint(12, width // 4)
    y, x = rng.randint(tall + 4, height - tall - 4), rng.randint(wide + 4, width - wide - 4)
    return _shape(rng.choice(style.shapes), height, width, y, x, tall, wide)


def _shape(shape: str, height: int, width: int, y: int, x: int, tall: int, wide: int) -> Mask:
    """A mask of half-height ``tall`` and half-width ``wide`` around row ``y``, column ``x``."""
    dy = np.abs(np.arange(height) - y)[:, None] / tall
    dx = np.abs(np.arange(width) - x)[None, :] / wide
    match shape:
        case "square":
            return (dy <= 1) & (dx <= 1)
        case "octagon":
            return (dy <= 1) & (dx <= 1) & (dy + dx <= 1.5)
        case "hexagon":
            return (dy <= 1) & (dx + dy / 2 <= 1)
    return dy**2 + dx**2 <= 1


def _encode(picture: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, format="PNG")
    return file.getvalue()
