from collections import Counter

import pytest

from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.question_files import heldout_questions, load_questions, save_questions
from swarm_sdk.atlas.questions import Lookup
from swarm_sdk.atlas.scoring import score
from swarm_sdk.errors import ConfigError


def test_held_out_questions_ask_the_four_kinds_equally():
    questions = heldout_questions(200, seed=0)
    assert Counter(q.kind for q in questions) == dict.fromkeys(
        ("wide", "deep", "compute", "look"), 50
    )
    assert len({q.id for q in questions}) == 200
    assert questions == heldout_questions(200, seed=0)


def test_held_out_questions_are_about_held_out_entities_of_every_number():
    heldout = world("heldout").by_title
    plans = [q.plan for q in heldout_questions(200) if q.kind == "wide"]
    assert {len(plan.titles) for plan in plans} == set(range(2, 13))
    for plan in plans:
        assert isinstance(plan, Lookup)
        assert heldout.keys() >= set(plan.titles)


def test_the_first_held_out_picture_is_of_coins():
    coins = next(q for q in heldout_questions(40) if q.kind == "look")
    assert coins.files[0].name == "coins.png"
    assert score(coins, "answer: 24") == 1.0


def test_questions_survive_the_way_through_a_file(tmp_path):
    questions = heldout_questions(16, seed=1)
    save_questions(questions, tmp_path / "set.jsonl")
    for before, after in zip(questions, load_questions(tmp_path / "set.jsonl"), strict=True):
        assert (after.id, after.kind, after.prompt) == (before.id, before.kind, before.prompt)
        assert (after.answer, after.files, after.tolerance) == (
            before.answer,
            before.files,
            before.tolerance,
        )


def test_rows_as_objects_become_a_table(tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_text('{"question": "?", "kind": "wide", "answer": [{"name": "Peru", "area": 12}]}\n')
    (question,) = load_questions(file)
    assert score(question, "| name | area |\n| Peru | 12 |") == 1.0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no question"),
        ("{", "line 1: not JSON"),
        ("[]", "needs the keys"),
        ('{"question": "?", "answer": "x", "kind": "odd"}', "kind must be one of"),
        ('{"question": "?", "answer": "x", "kind": "look", "files": ["a.png"]}', "cannot read"),
        ('{"question": "?", "answer": "x", "kind": "look", "files": ["a.txt"]}', "PNG or JPEG"),
        ('{"question": "?", "answer": [], "kind": "wide"}', "one object a row"),
        ('{"question": "?", "answer": "1", "kind": "deep", "tolerance": "a"}', "a number"),
    ],
)
def test_a_bad_question_file_is_refused_in_one_sentence(tmp_path, text, problem):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_questions(file)


def test_a_missing_question_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the questions"):
        load_questions(tmp_path / "none.jsonl")
