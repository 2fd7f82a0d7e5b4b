"""What compute questions do with looked-up numbers, as the code that an agent runs.

values = {"Kenya": 51393010, "Peru": 31989256}
v = list(values.values())
print(round(sum(v), 2))                     or  print(max(values, key=values.get))
"""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Operation:
    """One way to combine numbers."""

    name: str
    expression: str
    """Python over ``values``, a dict from name to number."""
    min_entities: int
    max_entities: int
    num_attributes: int = 1
    is_named: bool = False
    """Whether the answer is a name."""

    def draw_num_entities(self, rng: random.Random) -> int:
        """How many entities a question of this operation is about."""
        return rng.randint(self.min_entities, self.max_entities)

    def code(self, titles: Sequence[str], values: Sequence[str]) -> str:
        """The code over looked-up ``values`` (in the order of ``titles``).

        Each number stands behind its name: a small model that copies a bare list of numbers
        loses its place.
        """
        names = titles if self.num_attributes == 1 else [f"{titles[0]} {i}" for i in "ab"]
        pairs = zip(names, values, strict=True)
        numbers = ", ".join(f'"{name}": {value}' for name, value in pairs)
        return f"values = {{{numbers}}}\nv = list(values.values())\nprint({self.expression})"


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("total", "round(sum(v), 2)", 2, 8),
        Operation("average", "round(sum(v) / len(v), 2)", 2, 8),
        Operation("spread", "round(max(v) - min(v), 2)", 3, 8),
        Operation("difference", "round(abs(v[0] - v[1]), 2)", 2, 2),
        Operation("ratio", "round(v[0] / v[1], 2)", 2, 2),
        Operation("quotient", "round(v[0] / v[1], 2)", 1, 1, num_attributes=2),
        Operation("largest", "max(values, key=values.get)", 2, 8, is_named=True),
        Operation("smallest", "min(values, key=values.get)", 2, 8, is_named=True),
    )
}


def run(code: str) -> str:
    """What ``code`` (made by ``Operation.code``) prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})  # noqa: S102  our own template over numbers of the Atlas
    return printed.getvalue().strip()


def is_number(text: str) -> bool:
    """Whether ``text`` can stand in the code as a number.

    >>> is_number("12.5"), is_number("007"), is_number("n/a")
    (True, False, False)
    """
    digits = text.removeprefix("-")
    whole, _, fraction = digits.partition(".")
    return (
        digits.isascii()
        and whole.isdigit()
        and (fraction.isdigit() or not fraction)
        and not digits.endswith(".")
        and (whole == "0" or not whole.startswith("0"))
    )
