import random

from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.atlas.pages import world
from swarm_sdk.atlas.questions import Question, wide_question
from swarm_sdk.atlas.scoring import is_right, item_f1, score

TRUTH = """\
| name | capital | area |
|---|---|---|
| Kenya | Nairobi | 582650 |
| Peru | Lima | 1285220 |"""


def test_the_right_table_scores_one_whatever_its_case_order_and_rule():
    rows = [
        "| Name | Area | Capital |",
        "| peru | 1285220 | LIMA |",
        "| Kenya | 582650.0 | nairobi |",
    ]
    answer = "\n".join(["Here:", "", *rows, ""])
    assert item_f1(TRUTH, answer) == 1.0


def test_a_missing_row_costs_recall():
    answer = "| name | capital | area |\n|---|---|---|\n| Kenya | Nairobi | 582650 |"
    assert item_f1(TRUTH, answer) == 2 * 2 / (4 + 2)


def test_a_wrong_cell_costs_one_item():
    assert item_f1(TRUTH, TRUTH.replace("Lima", "Cusco")) == 0.75


def test_rows_that_nobody_asked_for_cost_precision():
    assert item_f1(TRUTH, TRUTH + "\n| Chad | N'Djamena | 1284000 |") == 2 * 4 / (4 + 6)


def test_the_last_table_counts():
    assert item_f1(TRUTH, f"| name | x |\n| a | b |\n\nso\n\n{TRUTH}") == 1.0


def test_a_final_line_is_compared_as_a_number_where_it_is_one():
    question = Question(id="q", kind="compute", prompt="", answer="12.50")
    assert score(question, "values are\nanswer: 12.5") == 1.0
    assert score(question, "answer: 12.51") == 0.0
    assert score(question, "") == 0.0


def test_each_number_may_be_off_by_the_tolerance_and_no_more():
    assert is_right("134, 225", "135,224", tolerance=2)
    assert not is_right("134, 225", "135, 228", tolerance=2)
    assert not is_right("134, 225", "134", tolerance=2)
    assert not is_right("12", "13")


def test_text_with_digits_is_no_number():
    assert not is_right("Kinoce 38", "Povem 38", tolerance=1)


@given(st.text(), st.text())
def test_scoring_never_raises(truth, output):
    for kind in ("wide", "deep"):
        question = Question(id="q", kind=kind, prompt="", answer=truth, tolerance=1.0)
        assert 0.0 <= score(question, output) <= 1.0


@given(st.integers(0, 10_000))
def test_the_answer_scores_one(seed):
    pages = world("heldout")
    question = wide_question(pages, pages.entities, random.Random(seed))
    assert score(question, question.answer) == 1.0
