"""Questions with exact answers, asked of a world.

    wide      N entities x M attributes of one kind      -> a table
    deep      2 to 4 lookups, each needing the one before -> a value
    compute   lookups, then arithmetic by code            -> a number or a name
    look      a picture, measured by code                 -> a number, a pair, a size

A question carries its plan: what has to be looked up and computed. The plan is what scripted
agents follow; it is never shown to a model.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from swarm_sdk.atlas import arithmetic, phrases, pictures
from swarm_sdk.atlas.names import Names
from swarm_sdk.atlas.pages import UNKNOWN, Entity, World
from swarm_sdk.atlas.prompts import table_row
from swarm_sdk.types import Image

Kind = Literal["wide", "deep", "compute", "look"]
KINDS: tuple[Kind, ...] = ("wide", "deep", "compute", "look")


@dataclass(frozen=True, slots=True)
class Lookup:
    """Attributes of entities of one kind: the plan of a wide question."""

    titles: tuple[str, ...]
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Chain:
    """``title``, then each attribute in turn, where all but the last lead to a page."""

    title: str
    attributes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Computation:
    """A lookup and what is done with its numbers."""

    lookup: Lookup
    operation: str
    """A key of ``arithmetic.OPERATIONS``."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Code that is run on the picture."""

    code: str


Plan = Lookup | Chain | Computation | Measurement


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked, and what is right."""

    id: str
    kind: Kind
    prompt: str
    answer: str
    """wide: a markdown table; else what stands after ``answer:``."""
    files: tuple[Image, ...] = ()
    tolerance: float = 0.0
    """How far each number of the answer may be off; 0 asks for the exact text or number."""
    plan: Plan | None = None
    """``None`` for questions read from a file."""


def table(attributes: Sequence[str], rows: Sequence[str]) -> str:
    """A markdown table of finished ``rows``."""
    rule = "|" + "---|" * (len(attributes) + 1)
    return "\n".join([table_row(["name", *attributes]), rule, *rows])


def wide_question(
    world: World, targets: Sequence[Entity], rng: random.Random, *, num_entities: int | None = None
) -> Question:
    """N entities of one kind (2 to 12; ``num_entities`` fixes N) x 1 to 4 attributes."""
    kind, entities = _same_kind(targets, num_entities or rng.randint(2, 12), rng)
    longest = 40 if len(entities) > 5 else 120
    names = [
        name
        for name in _attributes(entities)
        if all(len(e.value(name)) <= longest for e in entities)
        and sum(e.value(name) == UNKNOWN for e in entities) * 4 <= len(entities)
    ]
    for absent in world.absent:
        if absent.kind == kind and len(entities) > 2:
            entities[rng.randrange(len(entities))] = absent
    num_attributes = min(len(names), rng.choices((1, 2, 3, 4), (2, 4, 4, 2))[0])
    attributes = tuple(rng.sample(names, num_attributes))
    titles = tuple(e.title for e in entities)
    rows = [table_row([e.title, *(e.value(a) for a in attributes)]) for e in entities]
    return Question(
        id=_id("wide", rng),
        kind="wide",
        prompt=phrases.wide(world.plurals[kind], titles, attributes, rng),
        answer=table(attributes, rows),
        plan=Lookup(titles, attributes),
    )


def deep_question(world: World, targets: Sequence[Entity], rng: random.Random) -> Question:
    """2 to 4 dependent lookups along the relations of ``world``, from an entity of ``targets``."""
    num_hops = rng.choices((2, 3, 4), (4, 4, 2))[0]
    members = _by_kind(targets)
    weights = [math.sqrt(len(found)) for found in members.values()]
    chain = None
    while chain is None:
        start = rng.choice(members[rng.choices(list(members), weights)[0]])
        chain = _walk(world, start, num_hops, rng)
    value = chain.title
    for attribute in chain.attributes:
        entity = world.named(value)
        assert entity is not None
        value = entity.value(attribute)
    return Question(
        id=_id("deep", rng),
        kind="deep",
        prompt=phrases.deep(chain.title, chain.attributes, rng),
        answer=value,
        plan=chain,
    )


def compute_question(world: World, targets: Sequence[Entity], rng: random.Random) -> Question:
    """Arithmetic over a numeric attribute of 1 to 8 entities, done by code."""
    while True:
        operation = arithmetic.OPERATIONS[rng.choice(tuple(arithmetic.OPERATIONS))]
        kind, entities = _same_kind(targets, operation.draw_num_entities(rng), rng)
        names = [
            name
            for name in _attributes(entities)
            if name in world.measures and _can_be_computed([e.value(name) for e in entities])
        ]
        if len(names) < operation.num_attributes:
            continue
        attributes = tuple(rng.sample(names, operation.num_attributes))
        titles = tuple(e.title for e in entities)
        values = [e.value(a) for e in entities for a in attributes]
        answer = arithmetic.run(operation.code(titles, values))
        if operation.is_named or abs(float(answer)) >= 0.1:
            break
    return Question(
        id=_id("compute", rng),
        kind="compute",
        prompt=phrases.compute(operation, world.plurals[kind], titles, attributes, rng),
        answer=answer,
        plan=Computation(Lookup(titles, attributes), operation.name),
    )


def _id(kind: Kind, rng: random.Random) -> str:
    return f"{kind}-{rng.getrandbits(40):010x}"


def _same_kind(
    targets: Sequence[Entity], num_entities: int, rng: random.Random
) -> tuple[str, list[Entity]]:
    members = _by_kind(targets)
    kind = rng.choice([k for k, found in members.items() if len(found) >= num_entities])
    return kind, rng.sample(members[kind], num_entities)


def _by_kind(entities: Sequence[Entity]) -> dict[str, list[Entity]]:
    members: dict[str, list[Entity]] = {}
    for entity in entities:
        members.setdefault(entity.kind, []).append(entity)
    return members


def _attributes(entities: Sequence[Entity]) -> list[str]:
    """The attributes that any of ``entities`` has, in page order."""
    return list(dict.fromkeys(name for entity in entities for name in entity.attributes))


def _can_be_computed(values: Sequence[str]) -> bool:
    """Whether all are numbers, none is zero and no two are the same (one would be the largest)."""
    are_numbers = all(arithmetic.is_number(value) and float(value) != 0 for value in values)
    return are_numbers and len({float(value) for value in values}) == len(values)


def _walk(world: World, start: Entity, num_hops: int, rng: random.Random) -> Chain | None:
    """A chain that visits ``num_hops`` different pages, or ``None`` where the walk got stuck."""
    visited = [start]
    attributes: list[str] = []
    while len(visited) < num_hops:
        steps = {}
        for name in world.relations & visited[-1].attributes.keys():
            target = world.named(visited[-1].value(name))
            if target is not None and target not in visited:
                steps[name] = target
        if not steps:
            return None
        attributes.append(rng.choice(sorted(steps)))
        visited.append(steps[attributes[-1]])
    last = [name for name, value in visited[-1].attributes.items() if len(value) <= 40]
    if not last:
        return None
    return Chain(start.title, (*attributes, rng.choice(last)))


def look_question(split: Literal["train", "heldout"], rng: random.Random) -> Question:
    """A drawn picture and something to measure; held-out pictures are drawn another way."""
    picture = pictures.draw(rng.choice(pictures.TASKS), rng, is_heldout=split == "heldout")
    names = phrases.PICTURE_NAMES[split]
    name = f"{rng.choice(names)}{rng.choice(('', rng.randint(1, 99)))}.png"
    if split == "train" and rng.random() < 0.6:
        name = f"{Names(rng).word().lower()}{rng.choice(('', '_', '-'))}{rng.randint(0, 999)}.png"
    if split == "train" and rng.random() < 0.25:
        name = name.removesuffix(".png") + ".jpg"  # a name says nothing of what is inside
    return _look_question(picture, name.replace("'", ""), split, rng)


def photograph_questions(rng: random.Random) -> list[Question]:
    """Held-out questions about the photographs of scikit-image."""
    return [
        _look_question(pictures.photograph(name, task, answer), name, "heldout", rng)
        for name, task, answer in pictures.PHOTOGRAPHS
    ]


def _look_question(
    picture: pictures.Picture, name: str, split: Literal["train", "heldout"], rng: random.Random
) -> Question:
    media_type = "image/png" if name.endswith(".png") else "image/jpeg"
    return Question(
        id=_id("look", rng),
        kind="look",
        prompt=phrases.look(picture, name, split, rng),
        answer=picture.answer,
        files=(Image(picture.data, media_type, name),),
        tolerance=pictures.TOLERANCE.get(picture.task, 0.0),
        plan=Measurement(pictures.code(picture.task, name, picture.colour)),
    )
