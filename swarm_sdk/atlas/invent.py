"""Invented worlds: pages whose names and values nobody can have memorised.

A small model trained on real names learns them by heart and copies no new one; trained mostly on
invented names it learns to copy, and real held-out names then work. A world is a few kinds of
things, joined by relations, with names that are easily confused:

    ship --home port--> port --country--> country --capital--> port

Three families of schemas: the Atlas's own, other English words, and invented words for kinds and
attributes too (so that an attribute never seen in training can be asked for).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from swarm_sdk.atlas.names import Names
from swarm_sdk.atlas.pages import HELDOUT_ATTRIBUTES, Entity, World
from swarm_sdk.atlas.vocabulary import ATTRIBUTES, KINDS, RELATION_NAMES

MEASURE_LOOKS = frozenset({"count", "large", "decimal"})
LOOKS = tuple(look for _, look in ATTRIBUTES)
MISSING_SHARE = 0.03
"""Share of values that a page leaves out."""
ABSENT_SHARE = 0.06
"""Share of worlds that know of a thing without a page."""
STEM_SHARE = 0.3
"""Share of references that say ``Hyderabad`` where the page is titled ``Hyderabad (Pakistan)``."""


@dataclass(frozen=True, slots=True)
class Schema:
    """One kind of thing."""

    kind: str
    plural: str
    attributes: tuple[tuple[str, str], ...]
    """(attribute, look of its values), where the look ``@KIND`` is a relation to that kind."""


ELEMENT = Schema(
    "element",
    "elements",
    (
        *(("symbol", "code"), ("atomic number", "count"), ("atomic weight", "decimal")),
        *(("period", "digit"), ("group", "count"), ("block", "letter"), ("category", "phrase")),
        *(("melting point", "decimal"), ("boiling point", "decimal"), ("density", "decimal")),
        *(("electronegativity", "decimal"), ("next element", "@element")),
        ("element below", "@element"),
    ),
)
COUNTRY = Schema(
    "country",
    "countries",
    (
        *(("capital", "@city"), ("continent", "name"), ("population", "large"), ("area", "large")),
        *(("currency", "name"), ("currency code", "code"), ("country code", "code")),
        *(("domain", "domain"), ("languages", "codes"), ("largest city", "@city")),
        ("neighbours", "names"),
    ),
)
CITY = Schema(
    "city",
    "cities",
    (
        *(("country", "@country"), ("population", "large"), ("latitude", "degrees")),
        *(("longitude", "degrees"), ("time zone", "path"), ("nearest city", "@city")),
    ),
)


def invent_world(rng: random.Random) -> World:
    """Draw a world of 15 to 40 pages."""
    family: Callable[[random.Random, Names], list[Schema]] = rng.choices(
        (_atlas_family, _english_family, _invented_family), (45, 30, 25)
    )[0]
    names = Names(rng)
    schemas = family(rng, names)
    largest = rng.choice(schemas)
    titles = {
        schema.kind: names.cluster(rng.randint(13, 20) if schema is largest else rng.randint(5, 9))
        for schema in schemas
    }
    entities = [
        _entity(schema, title, titles, names) for schema in schemas for title in titles[schema.kind]
    ]
    rng.shuffle(entities)
    absent = []
    if rng.random() < ABSENT_SHARE:
        absent = [Entity(largest.kind, names.title(), "", {})]
    pairs = [pair for schema in schemas for pair in schema.attributes]
    return World(
        tuple(entities),
        relations=frozenset(name for name, look in pairs if look.startswith("@")),
        measures=frozenset(name for name, look in pairs if look in MEASURE_LOOKS),
        plurals={schema.kind: schema.plural for schema in schemas},
        absent=tuple(absent),
    )


def _entity(schema: Schema, title: str, titles: dict[str, list[str]], names: Names) -> Entity:
    rng = names.rng
    row = {}
    for name, look in schema.attributes:
        if look.startswith("@"):
            row[name] = rng.choice([other for other in titles[look[1:]] if other != title])
        elif rng.random() >= MISSING_SHARE:
            row[name] = names.value(look)
    row = {
        name: _stem(value, titles) if rng.random() < STEM_SHARE else value
        for name, value in row.items()
    }
    if schema.kind == ELEMENT.kind:
        return Entity(schema.kind, title, "a chemical element", row)
    about = f"{'an' if schema.kind[0] in 'aeiou' else 'a'} {schema.kind}"
    places = [row[name] for name, look in schema.attributes if look.startswith("@")]
    if places and rng.random() < 0.7:
        about += f" in {places[0]}"
    return Entity(schema.kind, title, about, row)


def _stem(value: str, titles: dict[str, list[str]]) -> str:
    """``value`` without what stands in brackets, if it is a title that stays clear without."""
    stem = value.split(" (", maxsplit=1)[0]
    everything = [title for members in titles.values() for title in members]
    is_clear = [t for t in everything if t.startswith(stem)] == [value]
    return stem if is_clear else value


def _atlas_family(rng: random.Random, names: Names) -> list[Schema]:
    schemas = [ELEMENT] if rng.random() < 0.25 else [COUNTRY, CITY]
    return [_widened(schema, rng, names) for schema in schemas]


def _widened(schema: Schema, rng: random.Random, names: Names) -> Schema:
    """``schema`` with up to three attributes that its kind does not have in the Atlas.

    Without them a country's attributes would be a closed list, and one that was never trained
    on would be answered with a neighbour of it.
    """
    own = dict(schema.attributes)
    attributes = list(schema.attributes)
    for _ in range(rng.randint(0, 3)):
        name, look = rng.choice(_known_attributes())
        if rng.random() < 0.4:
            name, look = names.attribute(), rng.choice(LOOKS)
        if name not in own:
            own[name] = look
            attributes.insert(rng.randint(0, len(attributes)), (name, look))
    return Schema(schema.kind, schema.plural, tuple(attributes))


def _known_attributes() -> list[tuple[str, str]]:
    heldout = {name for _, name in HELDOUT_ATTRIBUTES}
    return [pair for pair in ATTRIBUTES if pair[0] not in heldout]


def _english_family(rng: random.Random, _: Names) -> list[Schema]:
    kinds = rng.sample(KINDS, rng.randint(2, 3))
    relations = iter(rng.sample(RELATION_NAMES, 9))
    attributes = iter(rng.sample(_known_attributes(), 33))
    return [_schema(kind, kinds, relations, attributes, rng) for kind in kinds]


def _invented_family(rng: random.Random, names: Names) -> list[Schema]:
    words = [names.attribute() for _ in range(3)]
    kinds = [(word, f"{word}s") for word in words[: rng.randint(2, 3)]]

    def relations() -> Iterator[str]:
        while True:
            yield names.attribute()

    def attributes() -> Iterator[tuple[str, str]]:
        while True:
            yield names.attribute(), rng.choice(LOOKS)

    return [_schema(kind, kinds, relations(), attributes(), rng) for kind in kinds]


def _schema(
    kind: tuple[str, str],
    kinds: Sequence[tuple[str, str]],
    relations: Iterator[str],
    attributes: Iterator[tuple[str, str]],
    rng: random.Random,
) -> Schema:
    targets = [rng.choice(kinds)[0] for _ in range(rng.randint(1, 3))]
    pairs = [(next(relations), f"@{target}") for target in targets]
    pairs += [next(attributes) for _ in range(rng.randint(4, 9))]
    pairs += [(f"{next(attributes)[0]} {rng.choice(('rate', 'count'))}", "decimal")]
    rng.shuffle(pairs)
    return Schema(kind[0], kind[1], tuple(pairs))
