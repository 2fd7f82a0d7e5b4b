"""What the tools need of a place where code runs.

    async with start(files) as sandbox:        one agent's own, files in its working directory
        result = await sandbox.run(code, timeout_s=30)

    status         the cell                                             variables
    ok             ended by itself                                      kept
    error          raised; ``text`` tells what                          kept
    interrupted    was interrupted by the app                           kept
    wall_timeout   was interrupted at its time limit, or killed there   kept, or lost
    output_limit   printed more than it may, and was stopped            kept, or lost
    oom            used up the memory: the process was killed           lost
    hang           the process no longer answered and was killed        lost
    died           took the process with it                             lost

``has_state`` says which; after a loss the next cell gets a new process, and files are kept. An
isolated kernel and one in a container look the same through this protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from swarm_sdk.types import Image

CellStatus = Literal[
    "ok", "error", "interrupted", "wall_timeout", "output_limit", "oom", "hang", "died"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """What one cell left behind."""

    status: CellStatus
    text: str
    """What was printed, the last value and the exception, in the order in which they came."""
    images: tuple[Image, ...] = ()
    num_dropped_chars: int = 0
    """Characters cut out of the middle of ``text``."""
    wall_s: float = 0.0
    has_state: bool = True
    """Whether the session's variables are there for the next cell."""
    lost_variables: tuple[str, ...] = ()
    """Names that went with the process, as far as they are known."""
    isolation: str = ""
    """The level that held: ``L3`` … ``L0``; empty where nobody knows."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One cell that was run, to run it again."""

    code: str
    status: CellStatus


class Sandbox(Protocol):
    """A Python session: variables and files live from cell to cell."""

    async def run(self, code: str, *, timeout_s: float) -> CellResult:
        """Run one cell; cells asked for at the same time run one after the other.

        ``timeout_s`` counts from when the cell starts. Cancelling ends the cell.

        Raises:
            SandboxDied: there is no process to run the cell, and none could be started.
        """
        ...

    async def aclose(self) -> None:
        """End the process and delete its files; closing twice is fine."""
        ...


StartSandbox = Callable[[Sequence[Image]], AbstractAsyncContextManager[Sandbox]]
"""Starts a sandbox with files in its working directory."""
