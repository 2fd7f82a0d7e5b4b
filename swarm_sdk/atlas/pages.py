"""The Atlas as pages: one entity, one page, and what is held out of training.

    Nairobi is a city in Kenya.       <- also the snippet that a search shows
    country: Kenya
    population: 4397073
    ...

Every fifth entity of each kind (by a hash of its title) and the two attributes in
``HELDOUT_ATTRIBUTES`` are held out: no training page has them or names them as a value.
Units: area km2, latitude and longitude degrees, melting and boiling point K, density g/cm3.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Literal

from swarm_sdk.errors import ConfigError

Split = Literal["train", "heldout", "all"]

PATH = Path(__file__).with_name("atlas.json.gz")

HELDOUT_ATTRIBUTES = frozenset({("country", "phone code"), ("element", "discovery year")})
"""(kind, attribute) that no training page shows and no training question asks for."""

RELATIONS = frozenset(
    {"country", "capital", "largest city", "nearest city", "next element", "element below"}
)
"""Attributes of the Atlas whose value is the title of another page."""

MEASURES = frozenset(
    {"population", "area", "atomic weight", "melting point", "boiling point", "density"}
    | {"electronegativity"}
)
"""Attributes of the Atlas whose values can be added and compared."""

UNKNOWN = "unknown"
"""What is reported where a page does not tell an attribute."""

PLURALS = {"country": "countries", "city": "cities", "element": "elements"}


@dataclass(frozen=True, slots=True)
class Entity:
    """One thing and what is known of it."""

    kind: str
    title: str
    about: str
    """``TITLE is ABOUT.`` is the first line of the page."""
    attributes: Mapping[str, str]
    """In page order; missing values are absent."""

    @property
    def text(self) -> str:
        """The page."""
        lines = (f"{name}: {value}" for name, value in self.attributes.items())
        return "\n".join([f"{self.title} is {self.about}.", *lines])

    @property
    def is_heldout(self) -> bool:
        """Whether the entity is held out of training."""
        return hashlib.sha256(self.title.encode()).digest()[0] % 5 == 0

    def value(self, attribute: str) -> str:
        """The value of ``attribute``, or ``UNKNOWN``."""
        return self.attributes.get(attribute, UNKNOWN)

    def without(self, attributes: Iterable[str]) -> Entity:
        """The same entity with fewer attributes."""
        hidden = set(attributes)
        kept = {name: value for name, value in self.attributes.items() if name not in hidden}
        return Entity(self.kind, self.title, self.about, kept)


@dataclass(frozen=True)
class World:
    """Pages that questions are asked of."""

    entities: tuple[Entity, ...]
    relations: frozenset[str]
    """Attributes whose value is the title of another page of this world."""
    measures: frozenset[str]
    """Attributes whose values are numbers that can be added and compared."""
    plurals: Mapping[str, str]
    """Kind -> its plural."""
    absent: tuple[Entity, ...] = ()
    """Things without a page and without attributes, to be reported as ``UNKNOWN``."""

    @cached_property
    def by_title(self) -> Mapping[str, Entity]:
        """Title -> entity."""
        return {entity.title: entity for entity in self.entities}

    def named(self, name: str) -> Entity | None:
        """The entity of that title, or the only one of the title ``NAME (…)``."""
        if name in self.by_title:
            return self.by_title[name]
        found = [e for title, e in self.by_title.items() if title.startswith(f"{name} (")]
        return found[0] if len(found) == 1 else None

    @cached_property
    def by_kind(self) -> Mapping[str, tuple[Entity, ...]]:
        """Kind -> its entities."""
        kinds = dict.fromkeys(entity.kind for entity in self.entities)
        return {k: tuple(e for e in self.entities if e.kind == k) for k in kinds}

    def pages(self) -> dict[str, str]:
        """Title -> text, what a search corpus is made of."""
        return {entity.title: entity.text for entity in self.entities}


@cache
def _document() -> tuple[str, tuple[Entity, ...]]:
    if not PATH.exists():
        raise ConfigError(f"{PATH} is missing; make it with: python -m swarm_sdk.atlas.build")
    document = json.loads(gzip.decompress(PATH.read_bytes()))
    entities = (Entity(kind, title, about, row) for kind, title, about, row in document["entities"])
    return document["attribution"], tuple(entities)


def attribution() -> str:
    """Whose data the Atlas is."""
    return _document()[0]


@cache
def world(split: Split = "all") -> World:
    """The real pages.

    ``train``: the training entities without the held-out attributes and without any value that
    names a held-out entity (cities of held-out countries are left out). ``heldout``: the held-out
    entities with all attributes. ``all``: everything, the corpus of held-out questions.
    """
    entities = _document()[1]
    heldout = tuple(e for e in entities if e.is_heldout)
    match split:
        case "train":
            entities = _training_entities(entities, {e.title for e in heldout})
        case "heldout":
            entities = heldout
    return World(entities, RELATIONS, MEASURES, PLURALS)


def _training_entities(entities: Iterable[Entity], heldout: set[str]) -> tuple[Entity, ...]:
    kept = []
    for entity in entities:
        if entity.is_heldout or entity.attributes.get("country") in heldout:
            continue
        hidden = {name for kind, name in HELDOUT_ATTRIBUTES if kind == entity.kind}
        hidden |= {n for n, value in entity.attributes.items() if heldout & set(value.split(", "))}
        kept.append(entity.without(hidden))
    return tuple(kept)


def pages(split: Split = "all") -> dict[str, str]:
    """Title -> text of the real pages of ``split``."""
    return world(split).pages()
