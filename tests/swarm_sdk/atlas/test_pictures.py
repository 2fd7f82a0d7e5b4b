import random

import pytest

from swarm_sdk.atlas import arithmetic, pictures
from swarm_sdk.atlas.scoring import is_right


def measured(picture: pictures.Picture, name: str) -> str:
    return arithmetic.run(pictures.code(picture.task, name, picture.colour))


@pytest.mark.parametrize("photograph", pictures.PHOTOGRAPHS, ids=lambda p: " ".join(p[:2]))
def test_the_code_measures_photographs(photograph, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = pictures.photograph(*photograph)
    (tmp_path / photograph[0]).write_bytes(picture.data)
    answer = measured(picture, photograph[0])
    assert is_right(picture.answer, answer, tolerance=pictures.TOLERANCE.get(picture.task, 0))


@pytest.mark.parametrize("is_heldout", [False, True])
@pytest.mark.parametrize("task", sorted(set(pictures.TASKS)))
def test_the_code_measures_drawn_pictures(task, is_heldout, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(f"{task} {is_heldout}")
    right = 0
    for _ in range(15):
        picture = pictures.draw(task, rng, is_heldout=is_heldout)
        (tmp_path / "a.png").write_bytes(picture.data)
        tolerance = pictures.TOLERANCE.get(task, 0)
        right += is_right(picture.answer, measured(picture, "a.png"), tolerance=tolerance)
    assert right == 15


def test_twenty_four_coins_are_counted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = pictures.photograph("coins.png", "count", "24")
    (tmp_path / "coins.png").write_bytes(picture.data)
    assert measured(picture, "coins.png") == "24"


def test_a_picture_that_is_not_installed_is_named():
    with pytest.raises(pictures.ConfigError, match=r"nowhere\.png"):
        pictures.photograph("nowhere.png", "size")


def test_code_is_short():
    for task in pictures.TASKS:
        assert len(pictures.code(task, "a.png", "red").splitlines()) <= 11
