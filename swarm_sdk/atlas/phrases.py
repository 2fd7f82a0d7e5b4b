"""The words of questions: a few templates for each kind, with lists written in several ways."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from swarm_sdk.atlas.arithmetic import Operation
from swarm_sdk.atlas.names import Names
from swarm_sdk.atlas.pictures import Picture

WIDE = (
    "For each of these {kinds} give the {attributes}: {names}.",
    "Give the {attributes} of {names}.",
    "Give the {attributes} of these {kinds}: {names}.",
    "I need a table of the {attributes} of {names}.",
    "Make a table with the {attributes} of each of these {kinds}: {names}.",
    "Find the {attributes} of {names}.",
    "Please look up the {attributes} for the following {kinds}: {names}.",
    "What {is_are} the {attributes} of each of these {kinds}: {names}?",
    "Tell me the {attributes} of {names}.",
    "{names}: give the {attributes} of each.",
)
WIDE_BULLETS = (
    "Give the {attributes} of these {kinds}:\n{bullets}",
    "For each of the following {kinds}, find the {attributes}:\n{bullets}",
    "List the {attributes} for:\n{bullets}",
)
DEEP = (
    "What is {phrase}?",
    "Find {phrase}.",
    "Tell me {phrase}.",
    "I want to know {phrase}.",
    "Give me {phrase}.",
)
DEEP_FORWARD = (
    "Take {title}: find its {first}, {then}. What is the last one?",
    "Start from {title}. Look up its {first}, {then}.",
    "{title}: what is its {first}, {then}?",
)
ROUNDED = " Round to 2 decimals."
COMPUTE: dict[str, tuple[str, ...]] = {
    "total": (
        "What is the total {a} of {names}?" + ROUNDED,
        "What is the sum of the {a} of {names}?" + ROUNDED,
        "Add up the {a} of these {kinds}: {names}." + ROUNDED,
    ),
    "average": (
        "What is the average {a} of {names}?" + ROUNDED,
        "Compute the mean {a} of these {kinds}: {names}." + ROUNDED,
    ),
    "spread": (
        "What is the difference between the largest and the smallest {a} of {names}?" + ROUNDED,
        "How far apart are the highest and the lowest {a} of these {kinds}: {names}?" + ROUNDED,
    ),
    "difference": (
        "What is the difference between the {a} of {x} and the {a} of {y}?" + ROUNDED,
        "By how much does the {a} of {x} differ from the {a} of {y}?" + ROUNDED,
    ),
    "ratio": (
        "What is the {a} of {x} divided by the {a} of {y}?" + ROUNDED,
        "What is the ratio of the {a} of {x} to the {a} of {y}?" + ROUNDED,
    ),
    "quotient": (
        "What is the {a} of {x} divided by its {b}?" + ROUNDED,
        "Divide the {a} of {x} by its {b}." + ROUNDED,
    ),
    "largest": (
        "Which of these {kinds} has the largest {a}: {names}?",
        "Which has the highest {a}: {names}?",
    ),
    "smallest": (
        "Which of these {kinds} has the smallest {a}: {names}?",
        "Which has the lowest {a}: {names}?",
    ),
}
DENSITY = "What is the population density of {x} (population divided by area)?" + ROUNDED

LOOK: dict[str, tuple[str, ...]] = {
    "count": (
        "How many {things} are in the picture?",
        "How many {things} does {name} show?",
        "Count the {things} in {name}.",
        "Count the {things} in the picture.",
        "What is the number of {things} in the picture?",
    ),
    "colour": (
        "How many {colour} {things} are in the picture?",
        "Count the {colour} {things} in {name}.",
        "How many of the {things} in the picture are {colour}?",
    ),
    "width": (
        "How wide is the {thing} in the picture, in pixels?",
        "What is the width in pixels of the {thing} in {name}?",
        "Measure the width of the {thing} in the picture in pixels.",
    ),
    "height": (
        "How tall is the {thing} in the picture, in pixels?",
        "What is the height in pixels of the {thing} in {name}?",
        "Measure the height of the {thing} in the picture in pixels.",
    ),
    "area": (
        "How many pixels does the {thing} in the picture cover?",
        "What is the area in pixels of the {thing} in {name}?",
        "Measure the area of the {thing} in the picture in pixels.",
    ),
    "centre": (
        "Where is the centre of the {thing} in the picture? Give x, y in pixels.",
        "Locate the {thing} in {name}: give the x, y of its centre in pixels.",
        "At which x, y in pixels is the centre of the {thing}?",
    ),
    "brightness": (
        "What is the mean brightness of the picture, from 0 to 255?",
        "How bright is {name} on average, from 0 to 255?",
        "What is the average grey value of the picture, from 0 to 255?",
    ),
    "size": (
        "What is the size of the picture in pixels, width x height?",
        "How large is {name} in pixels, width x height?",
        "Give the size of the picture, width x height.",
    ),
}
THINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "train": (
        *(("disc", "discs"), ("object", "objects"), ("spot", "spots"), ("dot", "dots")),
        *(("square", "squares"), ("shape", "shapes"), ("cell", "cells"), ("particle", "particles")),
        *(("seed", "seeds"), ("mark", "marks"), ("tile", "tiles"), ("grain", "grains")),
        *(("stone", "stones"), ("drop", "drops"), ("button", "buttons"), ("coin", "coins")),
    ),
    "heldout": (
        *(("object", "objects"), ("blob", "blobs"), ("shape", "shapes"), ("pebble", "pebbles")),
        *(("bead", "beads"), ("patch", "patches")),
    ),
}
"""(one, several) of what pictures may show."""
PICTURE_NAMES: dict[str, tuple[str, ...]] = {
    "train": ("picture", "image", "photo", "scan", "img", "frame", "sample", "view"),
    "heldout": ("plate", "slide", "shot", "field", "exhibit"),
}


def look(
    picture: Picture, name: str, split: Literal["train", "heldout"], rng: random.Random
) -> str:
    """Ask for the picture's task; about half of the templates name the file."""
    thing, things = rng.choice(THINGS[split])
    if split == "train" and rng.random() < 0.4:  # what the things are called must not matter
        thing = Names(rng).word().lower().replace("'", "")
        things = f"{thing}s"
    if name == "coins.png":
        thing, things = "coin", "coins"
    elif picture.task in {"count", "width", "height", "area", "centre"} and rng.random() < 0.5:
        look = "bright" if picture.is_bright else "dark"
        thing, things = f"{look} {thing}", f"{look} {things}"
    return rng.choice(LOOK[picture.task]).format(
        name=name, thing=thing, things=things, colour=picture.colour
    )


def wide(kinds: str, titles: Sequence[str], attributes: Sequence[str], rng: random.Random) -> str:
    """Ask for a table."""
    filled = {
        "kinds": kinds,
        "attributes": listed(attributes),
        "is_are": "is" if len(attributes) == 1 else "are",
    }
    if rng.random() < 0.2:
        bullets = "\n".join(f"- {title}" for title in titles)
        return rng.choice(WIDE_BULLETS).format(bullets=bullets, **filled)
    return rng.choice(WIDE).format(names=_names(titles, rng), **filled)


def deep(title: str, attributes: Sequence[str], rng: random.Random) -> str:
    """Ask for ``attributes`` one after the other, starting at ``title``."""
    first, *rest = attributes
    if rng.random() < 0.25:
        then = ", ".join(f"then the {name} of that" for name in rest)
        return rng.choice(DEEP_FORWARD).format(title=title, first=first, then=then)
    phrase = f"the {first} of {title}"
    if first == "country" and rng.random() < 0.4:
        phrase = f"the country that {title} is in"
    for name in rest:
        phrase = f"the {name} of {phrase}"
    return rng.choice(DEEP).format(phrase=phrase)


def compute(
    operation: Operation,
    kinds: str,
    titles: Sequence[str],
    attributes: Sequence[str],
    rng: random.Random,
) -> str:
    """Ask for ``operation`` over the numbers of ``titles``."""
    templates = COMPUTE[operation.name]
    if tuple(attributes) == ("population", "area"):
        templates = (*templates, DENSITY)
    x, y = titles[0], titles[-1]
    return rng.choice(templates).format(
        kinds=kinds, names=_names(titles, rng), a=attributes[0], b=attributes[-1], x=x, y=y
    )


def listed(words: Sequence[str]) -> str:
    """Words as English lists them.

    >>> listed(["capital", "area", "currency"])
    'capital, area and currency'
    """
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"


def _names(titles: Sequence[str], rng: random.Random) -> str:
    """A list of titles; with semicolons where commas could be misread."""
    if rng.random() < 0.15 or any(", " in title or " and " in title for title in titles):
        return "; ".join(titles)
    return listed(titles) if rng.random() < 0.8 else ", ".join(titles)
