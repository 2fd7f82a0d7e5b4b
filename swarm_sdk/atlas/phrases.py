"""The words of questions: a few templates for each kind, with lists written in several ways."""

from __future__ import annotations

import random
from collections.abc import Sequence

from swarm_sdk.atlas.arithmetic import Operation

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
COMPUTE = {
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


def wide(
    kinds: str, titles: Sequence[str], attributes: Sequence[str], rng: random.Random
) -> str:
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
