"""Scripted agents: how questions are answered by the book, in several ways.

    main   alone, one call at a time            search > open > search > open > ... > table
           alone, calls side by side            search x N > open x N > table
           many sub-agents                      create + assign x N > table
           few sub-agents                       create + assign x N/3 > table
           mixed                                create + assign x N-1 + search > open > table
    sub    search NAME > open TITLE > row

An agent is a generator: it yields a ``Say`` and is sent the results of its calls, so it can only
tell what the tools really gave it. ``Swarmer.agent(messages)`` is a policy for a dialogue of the
real runtime. What is thought aloud is what helps a small model copy: the lines of a page that
are asked for, the rows made of them, and what is left of a chain.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from swarm_sdk.atlas import arithmetic
from swarm_sdk.atlas.pages import UNKNOWN
from swarm_sdk.atlas.prompts import FINDER_NAME, finder_prompt, table_row
from swarm_sdk.atlas.questions import (
    Chain,
    Computation,
    Lookup,
    Measurement,
    Question,
    table,
)
from swarm_sdk.errors import ModelError
from swarm_sdk.types import Message, ToolCall, ToolSpec

Strategy = Literal["sequence", "parallel", "many", "few", "mixed"]
STRATEGIES: tuple[Strategy, ...] = ("sequence", "parallel", "many", "few", "mixed")

MAX_ALONE = 4
"""Most entities that one agent looks up itself: more pages do not fit a small context."""
NAMES_PER_TASK = 3
"""Most names in one task of a few sub-agents."""
SEPARATOR = "; "
"""Between the names of one task."""


@dataclass(frozen=True, slots=True)
class Say:
    """One turn of a scripted agent: calls to run, or the final text."""

    calls: tuple[tuple[str, Mapping[str, str]], ...] = ()
    content: str = ""
    reasoning: str = ""


Script = Generator[Say, tuple[str, ...], None]
"""Yields turns; is sent the text of each call's result."""
Rows = Generator[Say, tuple[str, ...], tuple[str, list[str]]]
"""A part of a script that returns (what is still to be thought aloud, finished table rows)."""


class ScriptedPolicy:
    """One agent's dialogue, turn by turn."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._is_started = False

    def next(self, messages: Sequence[Message], tools: Sequence[ToolSpec] = ()) -> Message:
        """The next turn after ``messages`` (the whole dialogue so far, system prompt first).

        Raises:
            ModelError: the script plays an agent whose model fails.
        """
        del tools
        if self._is_started:
            say = self._script.send(_results(messages))
        else:
            self._is_started = True
            say = next(self._script)
        num_calls = sum(len(message.tool_calls) for message in messages)
        calls = tuple(
            ToolCall(
                id=f"functions.{name}:{num_calls + i}",
                name=name,
                arguments=arguments,
                raw_arguments=json.dumps(arguments, ensure_ascii=False),
            )
            for i, (name, arguments) in enumerate(say.calls)
        )
        return Message("assistant", say.content, reasoning=say.reasoning, tool_calls=calls)


def _results(messages: Sequence[Message]) -> tuple[str, ...]:
    """Results of the last assistant turn's calls, in the order of the calls."""
    last = max(i for i, message in enumerate(messages) if message.role == "assistant")
    by_call = {m.tool_call_id: m.content for m in messages[last + 1 :] if m.role == "tool"}
    return tuple(by_call[call.id].strip() for call in messages[last].tool_calls)


class Swarmer:
    """The scripted agents of one episode: the main one and every sub-agent it starts.

    ``fail_share`` of the sub-agents' tasks end with a ``ModelError`` the first time, so that the
    main agent has something to recover from.
    """

    def __init__(
        self,
        question: Question,
        strategy: Strategy,
        rng: random.Random,
        *,
        fail_share: float = 0.0,
    ) -> None:
        self.question = question
        self.strategy = strategy
        self.plans: dict[str, Lookup] = {}
        """Prompt of a task -> what it asks for."""
        self._rng = rng
        self._fail_share = fail_share
        self._failed: set[Lookup] = set()

    def agent(self, messages: Sequence[Message]) -> ScriptedPolicy:
        """The policy for a dialogue that starts with ``messages`` (system, user)."""
        prompt = next(m.content for m in messages if m.role == "user")
        if prompt in self.plans:
            return ScriptedPolicy(self._sub(self.plans[prompt]))
        return self.main()

    def main(self) -> ScriptedPolicy:
        """The policy of the main agent."""
        match self.question.plan:
            case Lookup() as lookup:
                return ScriptedPolicy(self._wide(lookup))
            case Chain() as chain:
                return ScriptedPolicy(_deep(chain))
            case Computation() as computation:
                return ScriptedPolicy(self._compute(computation))
            case Measurement() as measurement:
                return ScriptedPolicy(_look(measurement))
            case None:
                raise ValueError(f"question {self.question.id} has no plan to follow")

    def _sub(self, lookup: Lookup) -> Script:
        if lookup not in self._failed and self._rng.random() < self._fail_share:
            self._failed.add(lookup)
            raise ModelError("the model server is overloaded")
        is_parallel = len(lookup.titles) > 1 and self._rng.random() < 0.5
        read = _read_parallel if is_parallel else _read_sequence
        thoughts, rows = yield from read(lookup, is_last_row_thought=len(lookup.titles) > 1)
        yield Say(reasoning=thoughts, content="\n".join(rows))

    def _wide(self, lookup: Lookup) -> Script:
        thoughts, rows = yield from self._rows(lookup)
        yield Say(reasoning=thoughts, content=table(lookup.attributes, rows))

    def _compute(self, computation: Computation) -> Script:
        lookup = computation.lookup
        thoughts, rows = yield from self._rows(lookup)
        values = [value for row in rows for value in cells(row)[1:]]
        operation = arithmetic.OPERATIONS[computation.operation]
        if not all(map(arithmetic.is_number, values)):
            yield Say(reasoning=thoughts, content=f"answer: {UNKNOWN}")
            return
        code = operation.code(lookup.titles, values)
        (printed,) = yield Say((("ipython", {"code": code}),), reasoning=thoughts)
        yield Say(content=f"answer: {printed}")

    def _rows(self, lookup: Lookup) -> Rows:
        match self.strategy:
            case "sequence":
                return (yield from _read_sequence(lookup))
            case "parallel":
                return (yield from _read_parallel(lookup))
            case "many":
                return (yield from self._delegate(lookup, [1] * len(lookup.titles)))
            case "few":
                return (yield from self._delegate(lookup, self._shares(len(lookup.titles))))
        return (yield from self._mix(lookup))

    def _shares(self, num_titles: int) -> list[int]:
        """How many names each of a few sub-agents gets: all the same but the last."""
        share = self._rng.randint(2, NAMES_PER_TASK)
        full, rest = divmod(num_titles, share)
        return [share] * full + [rest] * (rest > 0)

    def _delegate(self, lookup: Lookup, shares: Sequence[int]) -> Rows:
        parts = _split(lookup, shares)
        _, *reports = yield Say((_create(lookup), *self._assignments(parts)))
        return "", (yield from self._collect(lookup, parts, reports))

    def _mix(self, lookup: Lookup) -> Rows:
        """Look one up while sub-agents look up the others."""
        *others, own = _split(lookup, [1] * len(lookup.titles))
        (title,) = own.titles
        calls = (_create(lookup), *self._assignments(others), _search(title))
        _, *reports, hits = yield Say(calls)
        rows = yield from self._collect(lookup, others, reports)
        (page,) = yield Say((_open(_pick(title, hits)),))
        thoughts, row = _note(title, lookup.attributes, page)
        return f"{thoughts}\n{row}", [*rows, row]

    def _assignments(self, parts: Iterable[Lookup]) -> tuple[tuple[str, Mapping[str, str]], ...]:
        calls = []
        for part in parts:
            prompt = SEPARATOR.join(part.titles)
            self.plans[prompt] = part
            calls.append(("assign_task", {"agent": FINDER_NAME, "prompt": prompt}))
        return tuple(calls)

    def _collect(
        self, lookup: Lookup, parts: Sequence[Lookup], reports: Sequence[str]
    ) -> Generator[Say, tuple[str, ...], list[str]]:
        """The rows of all ``reports``; a task that failed is assigned once more, then given up."""
        told = list(reports)
        failed = [i for i, report in enumerate(told) if _is_error(report)]
        if failed:
            again = yield Say(self._assignments([parts[i] for i in failed]))
            for i, report in zip(failed, again, strict=True):
                told[i] = report
        rows = []
        for part, report in zip(parts, told, strict=True):
            if _is_error(report):
                empty = [UNKNOWN] * len(lookup.attributes)
                rows += [table_row([title, *empty]) for title in part.titles]
            else:
                rows += report.splitlines()
        return rows


def choose_strategy(question: Question, rng: random.Random) -> Strategy:
    """Draw a strategy that suits ``question``; sub-agents are the usual way for several names."""
    match question.plan:
        case Lookup() as lookup:
            num_titles = len(lookup.titles)
        case Computation() as computation:
            num_titles = len(computation.lookup.titles)
        case _:
            return "sequence"
    if num_titles == 1:
        return "sequence"
    if num_titles > MAX_ALONE:
        return rng.choices(("many", "few", "mixed"), (78, 14, 8))[0]
    return rng.choices(STRATEGIES, (13, 16, 58, 7 if num_titles > 2 else 0, 6))[0]


def main_policy(question: Question, strategy: Strategy, rng: random.Random) -> ScriptedPolicy:
    """The main agent alone, for strategies without sub-agents; else use ``Swarmer``."""
    return Swarmer(question, strategy, rng).main()


def cells(row: str) -> list[str]:
    """The cells of a markdown table row.

    >>> cells("| Kenya | Nairobi |")
    ['Kenya', 'Nairobi']
    """
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def _read_sequence(lookup: Lookup, *, is_last_row_thought: bool = True) -> Rows:
    """Search and open one name after the other; each page is noted before the next search."""
    thoughts, rows = "", []
    for title in lookup.titles:
        (hits,) = yield Say((_search(title),), reasoning=thoughts)
        (page,) = yield Say((_open(_pick(title, hits)),))
        lines, row = _note(title, lookup.attributes, page)
        thoughts = f"{lines}\n{row}" if is_last_row_thought else lines
        rows.append(row)
    return thoughts, rows


def _read_parallel(lookup: Lookup, *, is_last_row_thought: bool = True) -> Rows:
    """Search all names in one turn, open all pages in the next."""
    all_hits = yield Say(tuple(_search(title) for title in lookup.titles))
    picked = [_pick(title, hits) for title, hits in zip(lookup.titles, all_hits, strict=True)]
    opened = yield Say(tuple(_open(title) for title in picked))
    notes = [
        _note(title, lookup.attributes, page)
        for title, page in zip(lookup.titles, opened, strict=True)
    ]
    thoughts = "\n".join(
        f"{lines}\n{row}" if is_last_row_thought else lines for lines, row in notes
    )
    return thoughts, [row for _, row in notes]


def _deep(chain: Chain) -> Script:
    """Follow the chain; what is left of it is said before each page is opened."""
    (hits,) = yield Say((_search(chain.title),), reasoning=_steps(chain.title, chain.attributes))
    (page,) = yield Say((_open(_pick(chain.title, hits)),))
    for i, attribute in enumerate(chain.attributes):
        value = _value(page, attribute)
        thoughts = f"{attribute}: {value}"
        left = chain.attributes[i + 1 :]
        if not left or value == UNKNOWN:
            yield Say(reasoning=thoughts, content=f"answer: {value}")
            return
        thoughts += f"\n{_steps(value, left)}"
        (page,) = yield Say((_open(value),), reasoning=thoughts)
        if _is_error(page):
            (hits,) = yield Say((_search(value),))
            (page,) = yield Say((_open(_pick(value, hits)),))


def _steps(start: str, attributes: Sequence[str]) -> str:
    return " > ".join([start, *attributes])


def _look(measurement: Measurement) -> Script:
    """Run the code on the picture and tell what it prints."""
    (printed,) = yield Say((("ipython", {"code": measurement.code}),))
    yield Say(content=f"answer: {printed}")


def _create(lookup: Lookup) -> tuple[str, Mapping[str, str]]:
    prompt = finder_prompt(lookup.attributes)
    return "create_subagent", {"name": FINDER_NAME, "system_prompt": prompt}


def _search(query: str) -> tuple[str, Mapping[str, str]]:
    return "search", {"query": query}


def _open(title: str) -> tuple[str, Mapping[str, str]]:
    return "open", {"title": title}


def _split(lookup: Lookup, shares: Sequence[int]) -> list[Lookup]:
    parts, start = [], 0
    for share in shares:
        parts.append(Lookup(lookup.titles[start : start + share], lookup.attributes))
        start += share
    return parts


def _pick(title: str, hits: str) -> str:
    """The hit that is ``title``, else the first that begins with it, else ``title`` itself."""
    found = [line.split(": ")[0] for line in hits.splitlines()]
    if title in found:
        return title
    return next((hit for hit in found if hit.startswith(title)), title)


def _value(page: str, attribute: str) -> str:
    head = f"{attribute}: "
    lines = (line.removeprefix(head) for line in page.splitlines() if line.startswith(head))
    return next(lines, UNKNOWN)


def _note(title: str, attributes: Sequence[str], page: str) -> tuple[str, str]:
    """The asked lines of a page, and the row that is made of them."""
    values = [_value(page, attribute) for attribute in attributes]
    pairs = zip(attributes, values, strict=True)
    lines = "\n".join(f"{attribute}: {value}" for attribute, value in pairs)
    return lines, table_row([title, *values])


def _is_error(text: str) -> bool:
    return text.startswith("error:")
