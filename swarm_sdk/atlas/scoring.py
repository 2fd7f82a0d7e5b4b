"""How right an answer is: item-F1 for tables, right or wrong for the rest. Never raises.

    item-F1 = 2 P R / (P + R)     P = right cells / cells given,  R = right cells / cells asked for

A cell is right if its row bears the entity's name, its column the attribute's, and its text is the
same but for case and spaces (numbers: the same number). The name column is no item.
"""

from __future__ import annotations

import re
import unicodedata

from swarm_sdk.atlas.questions import Question
from swarm_sdk.traces.parl.rewards.outcome import item_f1 as f1_of_items

Items = dict[tuple[str, str], str]
"""(row name, column name) -> cell, all normalised."""


def score(question: Question, output: str) -> float:
    """Between 0 and 1; only wide questions score in between."""
    if question.kind == "wide":
        return item_f1(question.answer, output)
    return float(is_right(question.answer, final_answer(output), tolerance=question.tolerance))


def item_f1(truth: str, output: str) -> float:
    r"""Item-F1 of the last table of ``output`` against the table ``truth``.

    >>> truth = "| name | capital |\n|---|---|\n| Kenya | Nairobi |"
    >>> item_f1(truth, "Here it is:\n| name | capital |\n| Kenya | nairobi |")
    1.0
    """
    asked, given = table_items(truth), table_items(output)
    if not asked or not given:
        return 0.0
    return f1_of_items(asked, given, _is_same)


def table_items(text: str) -> Items:
    """The cells of the last markdown table of ``text``; empty where there is none."""
    blocks: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.strip().startswith("|"):
            blocks[-1].append([_normal(cell) for cell in line.strip().strip("|").split("|")])
        elif blocks[-1]:
            blocks.append([])
    tables = [block for block in blocks if len(block) > 1]
    if not tables:
        return {}
    header, *rows = tables[-1]
    return {
        (row[0], column): cell
        for row in rows
        if not all(set(cell) <= set("-: ") for cell in row)
        for column, cell in zip(header[1:], row[1:], strict=False)
    }


def final_answer(output: str) -> str:
    r"""What stands after the last ``answer:``, else the last line that is not empty.

    >>> final_answer("So:\nanswer: 42.")
    '42.'
    """
    found = re.findall(r"answer:[ \t*]*(.*)", output, flags=re.IGNORECASE)
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return (found or lines or [""])[-1].strip()


def is_right(truth: str, answer: str, *, tolerance: float = 0.0) -> bool:
    """Whether ``answer`` is ``truth``: each number within ``tolerance``, or the same text.

    >>> is_right("12 x 7", "12x8", tolerance=1)
    True
    """
    if _is_same(_normal(truth), _normal(answer)):
        return True
    wanted, got = _numbers(truth), _numbers(answer)
    if not wanted or len(wanted) != len(got) or re.search(r"[^\W\dxX]", truth):
        return False
    return all(abs(a - b) <= tolerance + 1e-9 for a, b in zip(wanted, got, strict=True))


def _is_same(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        return float(one) == float(other)
    except ValueError:
        return False


def _normal(text: str) -> str:
    text = unicodedata.normalize("NFC", text).strip().strip("*`").rstrip(".")
    return " ".join(text.split()).casefold()


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", text)]
