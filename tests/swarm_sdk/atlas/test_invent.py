import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from swarm_sdk.atlas.invent import invent_world
from swarm_sdk.atlas.names import Names, real_words
from swarm_sdk.atlas.pages import HELDOUT_ATTRIBUTES, world
from swarm_sdk.atlas.vocabulary import ATTRIBUTES

seeds = st.integers(0, 2**32)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_a_world_has_few_pages_with_unique_clean_titles(seed):
    made = invent_world(random.Random(seed))
    titles = [entity.title for entity in made.entities]
    assert 13 <= len(titles) <= 40
    assert len(set(titles)) == len(titles)
    for title in titles:
        assert title == " ".join(title.split())
        assert not set(';|:"\n') & set(title)


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_relations_of_a_world_lead_to_its_pages(seed):
    made = invent_world(random.Random(seed))
    for entity in made.entities:
        for name in made.relations & entity.attributes.keys():
            assert made.named(entity.value(name)) is not None


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_held_out_attributes_are_never_invented(seed):
    heldout = {name for _, name in HELDOUT_ATTRIBUTES}
    for entity in invent_world(random.Random(seed)).entities:
        assert not heldout & entity.attributes.keys()


def test_the_same_seed_gives_the_same_world():
    assert invent_world(random.Random(4)) == invent_world(random.Random(4))


def test_held_out_titles_are_no_material_for_names():
    assert not set(real_words()) & set(world("heldout").by_title)


def test_some_titles_of_a_cluster_resemble_each_other():
    titles = Names(random.Random(1)).cluster(40)
    words = Counter(word for title in titles for word in set(title.split()))
    assert sum(count > 1 for count in words.values()) >= 5


def test_values_look_as_their_kind_says():
    names = Names(random.Random(2))
    for _ in range(50):
        for look in {look for _, look in ATTRIBUTES}:
            value = names.value(look)
            assert value
            assert not set("|\n;") & set(value)
        assert names.value("large").isdigit()
        assert float(names.value("decimal")) > 0
