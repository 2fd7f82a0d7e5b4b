import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.atlas.pages import (
    HELDOUT_ATTRIBUTES,
    RELATIONS,
    Entity,
    attribution,
    pages,
    world,
)


def test_the_atlas_has_countries_cities_and_all_elements():
    kinds = world("all").by_kind
    assert len(kinds["element"]) == 118
    assert len(kinds["country"]) > 240
    assert 3000 <= len(kinds["city"]) <= 5000


def test_a_page_starts_with_what_its_title_is():
    lines = pages("all")["Nairobi"].splitlines()
    assert lines[0] == "Nairobi is a city in Kenya."
    assert "country: Kenya" in lines


def test_titles_are_unique_and_hold_no_mark_that_separates_titles():
    titles = [entity.title for entity in world("all").entities]
    assert len(set(titles)) == len(titles)
    assert not [title for title in titles if ";" in title or "|" in title or ": " in title]


def test_about_a_fifth_of_each_kind_is_held_out():
    for kind, members in world("all").by_kind.items():
        share = len(world("heldout").by_kind[kind]) / len(members)
        assert 0.15 < share < 0.25, kind


def test_training_pages_neither_have_nor_name_what_is_held_out():
    heldout = set(world("heldout").by_title)
    for entity in world("train").entities:
        assert entity.title not in heldout
        assert not {(entity.kind, name) for name in entity.attributes} & HELDOUT_ATTRIBUTES
        for value in entity.attributes.values():
            assert not heldout & set(value.split(", ")), (entity.title, value)


def test_held_out_attributes_are_on_the_full_pages():
    assert world("all").by_title["Kenya"].value("phone code") == "254"
    assert world("all").by_title["Helium"].value("discovery year") == "1895"


def test_relations_lead_to_pages():
    everything = world("all").by_title
    for entity in everything.values():
        for name in RELATIONS & entity.attributes.keys():
            assert entity.value(name) in everything, (entity.title, name)


def test_values_are_short_lines():
    for entity in world("all").entities:
        for value in entity.attributes.values():
            assert value == value.strip()
            assert "\n" not in value
            assert "|" not in value


def test_the_sources_are_named():
    assert "GeoNames" in attribution()
    assert "CC BY 4.0" in attribution()
    assert "mendeleev" in attribution()


@given(st.text())
def test_holding_out_depends_on_the_title_alone(title):
    assert (
        Entity("city", title, "", {}).is_heldout == Entity("x", title, "y", {"a": "b"}).is_heldout
    )


def test_reading_the_pages_loads_no_torch():
    code = (
        "import swarm_sdk.atlas.pages as p, sys; p.pages('all'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
