"""Who runs an episode: one advisory lock an episode, given up by the system when a process ends.

    ledger.lock, byte N  <──  the process that runs the episode in row N of the ledger

A lock of the operating system needs no heartbeat and no clean-up: after ``kill -9`` it is gone.
"""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import ClassVar

from swarm_sdk.errors import EpisodeBusy, LedgerError

FILE_NAME = "ledger.lock"


class Claims:
    """The claims of this process in one run directory.

    Locks of one process do not exclude each other, and closing any descriptor of the file drops
    them all: so there is one object a directory, and it keeps its descriptor open.
    """

    _known: ClassVar[dict[Path, Claims]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("ab")
        except OSError as error:
            raise LedgerError(f"'{path}' cannot be opened: {error}") from error
        self._rows: dict[str, int] = {}

    @classmethod
    def of(cls, directory: Path) -> Claims:
        """The claims in ``directory``.

        Raises:
            LedgerError: the lock file cannot be opened.
        """
        path = directory.resolve() / FILE_NAME
        with cls._guard:
            known = cls._known.get(path)
            if known is None or not path.exists():
                known = cls._known[path] = cls(path)
            return known

    def take(self, row: int, episode_id: str) -> None:
        """Claim the episode in ``row``.

        Raises:
            EpisodeBusy: another process, or another task of this one, holds it.
        """
        with self._guard:
            if episode_id in self._rows:
                raise EpisodeBusy(episode_id)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, row)
            except OSError as error:
                raise EpisodeBusy(episode_id) from error
            self._rows[episode_id] = row

    def drop(self, episode_id: str) -> None:
        """Give up the claim; without one nothing happens."""
        with self._guard:
            row = self._rows.pop(episode_id, None)
            if row is not None:
                fcntl.lockf(self._file, fcntl.LOCK_UN, 1, row)
