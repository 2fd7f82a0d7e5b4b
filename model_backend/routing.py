"""Which of several servers a call goes to, so that each finds the prefixes that it has cached.

    pick(key)  the server that the key's last call went to, if it is up
               else, or for a new key: the one that is up with the fewest calls in flight
    failed     the server rests for a while; its keys move, and stay where they moved
    all rest   the one that has rested longest is tried again

A key names calls whose prompts begin alike: one dialogue. New dialogues spread by load, so a prompt
that many share is computed once a server, not once a dialogue.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass

REST_S = 5.0
"""How long a server that did not answer is left alone."""
MAX_KEYS = 65_536
"""Keys that are remembered; those not used for longest go first."""


@dataclass(slots=True)
class _Place:
    num_in_flight: int = 0
    rests_until_s: float = 0.0


class Router:
    """The servers behind one model, by number."""

    def __init__(self, num_servers: int) -> None:
        """``num_servers`` >= 1."""
        self._places = [_Place() for _ in range(num_servers)]
        self._last: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        """How many servers."""
        return len(self._places)

    def pick(self, key: str, *, beside: frozenset[int] = frozenset()) -> int | None:
        """The server for a call, which is in flight from now on; call ``leave`` when it is over.

        ``beside`` were tried for this call already. ``None`` if no other is up; without ``beside``
        there always is one.
        """
        now_s = time.monotonic()
        last = self._last.get(key) if key else None
        able = [number for number in range(len(self._places)) if number not in beside]
        up = [number for number in able if self._places[number].rests_until_s <= now_s]
        if last in up:
            number = last
        elif up:
            number = min(up, key=lambda one: self._places[one].num_in_flight)
        elif not beside:
            number = min(able, key=lambda one: self._places[one].rests_until_s)
        else:
            return None
        assert number is not None
        if key:
            self._last[key] = number
            self._last.move_to_end(key)
            if len(self._last) > MAX_KEYS:
                self._last.popitem(last=False)
        self._places[number].num_in_flight += 1
        return number

    def leave(self, number: int) -> None:
        """A call that was picked for the server is over."""
        self._places[number].num_in_flight -= 1

    def failed(self, number: int) -> None:
        """The server gave no answer, or no good one: leave it alone for a while."""
        self._places[number].rests_until_s = time.monotonic() + REST_S

    def answered(self, number: int) -> None:
        """The server is up."""
        self._places[number].rests_until_s = 0.0
