"""Which server a call goes to: by key, by load, and away from those that rest."""

import time

from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.model_backend import routing
from swarm_sdk.model_backend.routing import Router


def test_calls_without_a_key_go_to_the_server_with_the_fewest_in_flight():
    router = Router(3)
    assert sorted(router.pick("") for _ in range(3)) == [0, 1, 2]
    router.leave(1)
    assert router.pick("") == 1


def test_a_key_stays_where_it_was_however_busy_that_server_is():
    router = Router(2)
    first = router.pick("a")
    assert [router.pick("a") for _ in range(5)] == [first] * 5
    assert router.pick("b") != first


def test_a_key_moves_away_from_a_server_that_failed_and_does_not_come_back():
    router = Router(2)
    first = router.pick("a")
    router.failed(first)
    second = router.pick("a", beside=frozenset({first}))
    assert second == 1 - first
    router.answered(first)
    assert router.pick("a") == second


def test_a_server_is_tried_again_when_it_has_rested(monkeypatch):
    router = Router(2)
    router.failed(0)
    assert [router.pick("") for _ in range(3)] == [1, 1, 1]
    now_s = time.monotonic() + routing.REST_S
    monkeypatch.setattr(routing.time, "monotonic", lambda: now_s)
    assert router.pick("") == 0


def test_where_all_rest_the_one_that_rested_longest_is_tried_and_then_the_others():
    router = Router(3)
    for number in (1, 2, 0):
        router.failed(number)
    assert router.pick("") == 1
    # Beside one that was tried there is nothing that is up.
    assert router.pick("", beside=frozenset({1})) is None


def test_keys_that_were_not_used_for_longest_are_forgotten(monkeypatch):
    monkeypatch.setattr(routing, "MAX_KEYS", 2)
    router = Router(4)
    for key in ("a", "b", "a", "c"):
        router.pick(key)
    assert list(router._last) == ["a", "c"]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40))
def test_calls_in_flight_are_counted_right_and_every_call_finds_a_server(calls):
    router, in_flight = Router(3), []
    for key, fails in calls:
        number = router.pick(key)
        assert number is not None
        in_flight.append(number)
        if fails:
            router.failed(number)
    assert [place.num_in_flight for place in router._places] == [
        in_flight.count(n) for n in range(3)
    ]
    for number in in_flight:
        router.leave(number)
    assert not any(place.num_in_flight for place in router._places)
