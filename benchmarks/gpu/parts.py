"""A run in parts on a machine that is lent by the minute: what was found is never lost.

    parts = Parts("serve", settings, out, seconds=300)
    with parts.part("nano"):                   begins and ends on stderr, with the seconds
        parts.results["nano"] = …
    if parts.has_time("large", needs_s=60):    else it is told as left out
        …
    parts.finish()

A part that raises is told under `failures`, the others go on, and the exit code is 1 at the end.
OUT/NAME.json is written anew after each part.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from report import described, report

MAX_ERROR = 2_000
"""Characters of an error that are kept: its end, where a server's log stands."""


class Parts:
    """What was found, what failed, and how much time is left."""

    def __init__(
        self,
        name: str,
        settings: dict[str, Any],
        out: Path | None,
        *,
        seconds: float,
        summary: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        self.results: dict[str, Any] = {}
        self.failures: list[dict[str, str]] = []
        self._name, self._out, self._seconds = name, out, seconds
        self._settings = {
            key: str(value) if isinstance(value, Path) else value
            for key, value in settings.items()
            if key not in ("out", "json")
        }
        self._summary = summary
        self._began_s = time.perf_counter()

    @property
    def left_s(self) -> float:
        """Seconds until the run should have ended."""
        return self._seconds - (time.perf_counter() - self._began_s)

    def say(self, text: str) -> None:
        """One line on stderr, after the seconds since the start."""
        passed_s = time.perf_counter() - self._began_s
        print(f"[{self._name} {passed_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    def has_time(self, name: str, needs_s: float) -> bool:
        """Whether a part that takes about ``needs_s`` still fits; else it is told as left out."""
        if self.left_s >= needs_s:
            return True
        error = f"left out: needs about {needs_s:.0f} s and {self.left_s:.0f} s are left"
        self.failures.append({"part": name, "error": error})
        self.say(f"{name} {error}")
        return False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """The boundary of one part: what it raises is told, and the rest runs."""
        self.say(f"{name} …")
        began_s = time.perf_counter()
        try:
            yield
        except Exception as error:  # noqa: BLE001
            told = "".join(traceback.format_exception(error, limit=-3))[-MAX_ERROR:]
            self.failures.append({"part": name, "error": told})
            self.say(f"FAILED {name}: {told}")
        finally:
            self.say(f"{name}: {time.perf_counter() - began_s:.1f} s")
            self._keep()

    def finish(self, *, as_json: bool) -> None:
        """Print everything; exits with 1 where a part failed or was left out."""
        self._keep()
        report(self._name, self._settings, self._found(), {}, as_json=as_json)
        sys.exit(1 if self.failures else 0)

    def _found(self) -> dict[str, Any]:
        summary = self._summary(self.results) if self._summary else {}
        return self.results | summary | {"failures": self.failures}

    def _keep(self) -> None:
        if self._out is not None:
            self._out.mkdir(parents=True, exist_ok=True)
            content = described(self._name, self._settings, self._found(), {})
            text = json.dumps(content) + "\n"
            (self._out / f"{self._name}.json").write_text(text, encoding="utf-8")
