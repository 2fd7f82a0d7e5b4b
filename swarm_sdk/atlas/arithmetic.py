"""What compute questions do with looked-up numbers, as the code that an agent runs.

    values = [51393010, 31989256]            or  values = {"Kenya": 51393010, "Peru": 31989256}
    print(round(sum(values), 2))                 print(max(values, key=values.get))
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
    """Python over ``values``: a list of numbers, or a dict from name to number."""
    min_entities: int
    max_entities: int
    num_attributes: int = 1
    is_named: bool = False
    """Whether ``values`` is the dict, and the answer a name."""

    def draw_num_entities(self, rng: random.Random) -> int:
        """How many entities a question of this operation is about."""
        return rng.randint(self.min_entities, self.max_entities)

    def code(self, titles: Sequence[str], values: Sequence[str]) -> str:
        """The code over looked-up ``values`` (in the order of ``titles``)."""
        if self.is_named:
            pairs = zip(titles, values, strict=True)
            numbers = "{" + ", ".join(f'"{title}": {value}' for title, value in pairs) + "}"
        else:
            numbers = "[" + ", ".join(values) + "]"
        return f"values = {numbers}\nprint({self.expression})"


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("total", "round(sum(values), 2)", 2, 8),
        Operation("average", "round(sum(values) / len(values), 2)", 2, 8),
        Operation("spread", "round(max(values) - min(values), 2)", 3, 8),
        Operation("difference", "round(abs(values[0] - values[1]), 2)", 2, 2),
        Operation("ratio", "round(values[0] / values[1], 2)", 2, 2),
        Operation("quotient", "round(values[0] / values[1], 2)", 1, 1, num_attributes=2),
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
