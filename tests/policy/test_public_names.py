"""What users may name is there, is told by ``__all__``, and is shown by a test."""

import re
import typing
from pathlib import Path

import swarm_sdk
from swarm_sdk import errors
from swarm_sdk.runtime import events

TESTS = Path(__file__).parents[1]


def shown() -> set[str]:
    """Every word of the tests."""
    texts = [path.read_text("utf-8") for path in TESTS.rglob("*.py") if path != Path(__file__)]
    return set(re.findall(r"\w+", "\n".join(texts)))


def test_every_public_name_can_be_had() -> None:
    for name in swarm_sdk.__all__:
        assert getattr(swarm_sdk, name) is not None
    assert set(swarm_sdk.__all__) <= set(dir(swarm_sdk))


def test_every_event_every_error_and_every_public_name_is_shown_by_a_test() -> None:
    names = {one.__name__ for one in typing.get_args(events.Event)}
    names |= {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SwarmError)
    }
    names |= set(swarm_sdk.__all__)
    assert names - shown() == set()


def test_the_drawn_error_tree_holds_every_error() -> None:
    drawn = set(re.findall(r"[├└]── (\w+)", errors.__doc__ or ""))
    assert drawn == {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.SwarmError)
    } - {"SwarmError"}
