import random

import pytest

from swarm_sdk.atlas import arithmetic
from swarm_sdk.atlas.pages import HELDOUT_ATTRIBUTES, UNKNOWN, Entity, World, world
from swarm_sdk.atlas.questions import (
    Chain,
    Computation,
    Lookup,
    compute_question,
    deep_question,
    look_question,
    wide_question,
)
from swarm_sdk.atlas.scoring import table_items


def test_a_wide_answer_is_what_the_pages_say():
    everything = world("all")
    question = wide_question(everything, world("heldout").entities, random.Random(1))
    assert isinstance(question.plan, Lookup)
    items = table_items(question.answer)
    for title in question.plan.titles:
        assert title in question.prompt
        for attribute in question.plan.attributes:
            cell = items[title.casefold(), attribute]
            assert cell == everything.by_title[title].value(attribute).casefold().rstrip(".")


def test_training_questions_ask_nothing_that_is_held_out():
    rng = random.Random(2)
    pages = world("train")
    heldout = set(world("heldout").by_title)
    asked = {name for _, name in HELDOUT_ATTRIBUTES}
    for _ in range(150):
        plan = wide_question(pages, pages.entities, rng).plan
        assert not heldout & set(plan.titles)
        assert not asked & set(plan.attributes)
        chain = deep_question(pages, pages.entities, rng).plan
        assert chain.title not in heldout
        assert not asked & set(chain.attributes)


def test_deep_questions_take_two_to_four_pages():
    rng = random.Random(3)
    pages = world("train")
    lengths = set()
    for _ in range(100):
        plan = deep_question(pages, pages.entities, rng).plan
        assert isinstance(plan, Chain)
        lengths.add(len(plan.attributes))
    assert lengths == {2, 3, 4}


def test_computing_uses_every_operation_and_no_unknown_number():
    rng = random.Random(4)
    pages = world("train")
    seen = set()
    for _ in range(300):
        question = compute_question(pages, pages.entities, rng)
        assert isinstance(question.plan, Computation)
        seen.add(question.plan.operation)
        assert UNKNOWN not in question.answer
    assert seen == set(arithmetic.OPERATIONS)


def test_a_thing_without_a_page_is_unknown():
    city = [Entity("city", f"City {i}", "a city", {"area": str(i)}) for i in range(4)]
    ghost = Entity("city", "Nowhere", "", {})
    pages = World(tuple(city), frozenset(), frozenset({"area"}), {"city": "cities"}, (ghost,))
    question = wide_question(pages, pages.entities, random.Random(5), num_entities=4)
    assert "| Nowhere | unknown |" in question.answer


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_a_look_question_gives_its_file_and_code_that_reads_it(split):
    question = look_question(split, random.Random(6))
    (picture,) = question.files
    assert picture.data.startswith(b"\x89PNG")
    assert picture.name in question.plan.code


def test_the_same_seed_gives_the_same_question():
    pages = world("train")
    one, other = (deep_question(pages, pages.entities, random.Random(7)) for _ in range(2))
    assert one == other


def test_code_with_names_prints_a_name():
    largest = arithmetic.OPERATIONS["largest"]
    assert arithmetic.run(largest.code(["Xi'an", "Lima"], ["3", "12.5"])) == "Lima"


@pytest.mark.parametrize("text", ["007", "1.", "1e5", "", "-", "٣", "1 000", "+1"])
def test_text_that_python_would_read_otherwise_is_no_number(text):
    assert not arithmetic.is_number(text)
