"""Live progress in the terminal: who works on what, steps and tokens. Written to stderr."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from swarm_sdk.runtime.events import (
    AgentFinished,
    AgentQueued,
    AgentStarted,
    Event,
    EventsDropped,
    StepFinished,
    StepStarted,
    ToolStarted,
)

MAX_ROWS = 16
STATUS_STYLES = {
    "done": "green",
    "failed": "red",
    "out_of_budget": "yellow",
    "overflow": "red",
    "cancelled": "yellow",
}


@dataclass(slots=True)
class _Row:
    prompt: str
    doing: str = "waiting"
    steps: int = 0
    tokens: int = 0
    status: str = ""
    started_s: float = field(default_factory=time.perf_counter)


class Progress:
    """A context manager whose instance is an ``on_event`` callback.

    On a terminal it redraws a table; elsewhere it prints one line when an agent starts and ends.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console: Console = console or Console(stderr=True)
        self.rows: dict[str, _Row] = {}
        self._live = Live(self, console=self.console, refresh_per_second=8, transient=True)
        self._is_live = self.console.is_terminal

    def __enter__(self) -> Progress:
        """Start drawing."""
        self.console.print(Text(self.title, style="bold"))
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop drawing; on a terminal the last table stays."""
        if self._is_live:
            self._live.stop()
            self.console.print(self)

    def __call__(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, AgentStarted):
            self.rows[event.path] = _Row(event.prompt)
            self._line(f"{event.path} starts: {_short(event.prompt, 60)}")
            return
        if isinstance(event, EventsDropped):
            return
        if isinstance(event, AgentQueued):
            self._line(f"{event.path} waits for a place, {event.num_waiting} in the queue")
            return
        row = self.rows[event.path]
        if isinstance(event, StepStarted):
            row.doing = "thinking"
        elif isinstance(event, StepFinished):
            row.steps += 1
            row.tokens += event.usage.num_completion_tokens
            made = len(event.message.tool_calls)
            row.doing = f"{made} calls" if made > 1 else row.doing
        elif isinstance(event, ToolStarted):
            arguments = ", ".join(str(value) for value in event.call.arguments.values())
            row.doing = f"{event.call.name}: {_short(arguments, 40)}"
        elif isinstance(event, AgentFinished):
            row.status = event.status
            row.doing = _short(event.output, 48)
            self._line(f"{event.path} {event.status} after {event.steps} steps: {row.doing}")

    def _line(self, text: str) -> None:
        if not self._is_live:
            self.console.print(Text(text), highlight=False)

    def __rich__(self) -> Table:
        """The table as it stands."""
        table = Table(box=None, pad_edge=False)
        table.add_column("agent", no_wrap=True)
        table.add_column("task", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("now", ratio=2, no_wrap=True, overflow="ellipsis")
        table.add_column("steps", justify="right")
        table.add_column("tokens", justify="right")
        shown = list(self.rows.items())
        for path, row in shown[:MAX_ROWS]:
            table.add_row(
                Text(path),
                Text(_short(row.prompt, 60)),
                Text(row.doing, style=STATUS_STYLES.get(row.status, "")),
                str(row.steps),
                str(row.tokens),
            )
        if len(shown) > MAX_ROWS:
            table.add_row(Text(f"and {len(shown) - MAX_ROWS} more"), "", "", "", "")
        return table


def _short(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
