"""Collects what a kernel says about one cell.

    stream │ display_data │ execute_result │ error  ──>  CellOutput  ──>  text, images

The text is cut while it arrives: its first and last ``max_chars / 2`` characters are held, the
middle is counted and dropped, so that endless output costs no memory.
"""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Any

from swarm_sdk.tools.sandbox.png import BadPicture, checked
from swarm_sdk.types import Image

if TYPE_CHECKING:
    from collections.abc import Mapping

MAX_IMAGES = 8
MAX_IMAGE_BYTES = 8 * 2**20
MAX_PIXELS = 16384 * 14 * 14
"""Pixels of a picture that is taken from a kernel: the patches of the report's processor."""
_CUT_TYPE = "application/x-swarm-cut"
_HANDLE = re.compile(r"shown-\d{1,3}\.png")
_PALETTE = re.compile(r"[#0-9a-f %,]{0,120}")
_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-_])")
_CELL_FILE = re.compile(r" \(\d+\.py, line \d+\)$")
_CELL_LINE = re.compile(r"Cell In\[(\d+)\], line ([0-9]{1,9})")


class ClippedText:
    """A text of which the head and the tail are kept.

    Invariant: ``len(head) + num_dropped + len(tail)`` is the number of characters added.
    """

    def __init__(self, max_chars: int) -> None:
        self._max_head = (max_chars + 1) // 2
        self._max_tail = max_chars // 2
        self._head = ""
        self._tail = ""
        self._num_dropped = 0

    @property
    def num_dropped(self) -> int:
        """Characters cut out of the middle."""
        return self._num_dropped

    def add(self, text: str) -> None:
        """Append ``text``."""
        room = self._max_head - len(self._head)
        self._head += text[:room]
        tail = self._tail + text[room:]
        self._num_dropped += max(0, len(tail) - self._max_tail)
        self._tail = tail[max(0, len(tail) - self._max_tail) :]

    def skip(self, count: int) -> None:
        """Count ``count`` characters that were cut before they came; the head ends here."""
        self._max_head = len(self._head)
        self._num_dropped += len(self._tail) + count
        self._tail = ""

    def __str__(self) -> str:
        if not self._num_dropped:
            return self._head + self._tail
        return f"{self._head}\n[{self._num_dropped} characters cut]\n{self._tail}"


class CellOutput:
    """Text and pictures of one cell.

    Args:
        code: the cell, to quote the line that raised.
        max_chars: most characters of text that are kept.
        max_pixels: largest picture that is taken.
    """

    def __init__(self, code: str, *, max_chars: int, max_pixels: int = MAX_PIXELS) -> None:
        self._code = code
        self._max_pixels = max_pixels
        self._text = ClippedText(max_chars)
        self._ends_line = True
        self._images: list[Image] = []
        self._execution_count = 0
        self.has_error: bool = False

    @property
    def text(self) -> str:
        """All text in its order, without terminal escapes and overwritten progress lines."""
        lines = _ESCAPE.sub("", str(self._text)).split("\n")
        return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines).rstrip()

    @property
    def images(self) -> tuple[Image, ...]:
        """The pictures shown, in their order."""
        return tuple(self._images)

    @property
    def num_dropped_chars(self) -> int:
        """Characters cut out of the middle of ``text``."""
        return self._text.num_dropped

    def add(self, kind: str, content: Mapping[str, Any]) -> None:
        """Take in a message of the Jupyter protocol; kinds that show nothing are ignored."""
        if kind == "execute_input":
            count = content.get("execution_count", 0)
            self._execution_count = count if isinstance(count, int) else 0
        elif kind == "stream":
            self._write(_text(content.get("text")))
        elif kind in ("display_data", "execute_result"):
            self._show(_object(content.get("data")), _object(content.get("metadata")))
        elif kind == "error":
            self.has_error = True
            self._line(self._error(content))

    def note(self, text: str) -> None:
        """Add a line of our own."""
        self._line(f"[{text}]")

    def _show(self, data: Mapping[str, Any], metadata: Mapping[str, Any]) -> None:
        cut = _object(data.get(_CUT_TYPE)).get("dropped")
        if isinstance(cut, int) and 0 < cut < 2**63:
            self._text.skip(cut)
            return
        if "image/png" in data:
            self._picture(_text(data["image/png"]), _object(metadata.get("swarm")))
        if "text/plain" in data:
            self._line(_text(data["text/plain"]))

    def _picture(self, encoded: str, told: Mapping[str, Any]) -> None:
        if len(self._images) >= MAX_IMAGES:
            self.note(f"a picture was left out; a cell can show {MAX_IMAGES}")
            return
        if len(encoded) > MAX_IMAGE_BYTES * 3 // 2:
            self.note(f"a picture of {len(encoded)} bytes was left out; make it smaller")
            return
        try:
            decoded = base64.b64decode("".join(encoded.split()), validate=True)
            picture, width, height = checked(decoded, max_pixels=self._max_pixels)
        except BadPicture as error:
            self.note(f"a picture was left out: {error}")
        except (binascii.Error, ValueError):
            self.note("a picture was left out: it is no PNG")
        else:
            name, palette = _text(told.get("name")), _text(told.get("palette"))
            description = f"{width} x {height} pixels"
            if palette and _PALETTE.fullmatch(palette):
                description += f", {palette}"
            self._images.append(
                Image(
                    picture,
                    "image/png",
                    name if _HANDLE.fullmatch(name) else "",
                    description=description,
                )
            )

    def _error(self, content: Mapping[str, Any]) -> str:
        """Give the exception on one line, and under it the line of the cell that raised."""
        value = _CELL_FILE.sub("", _text(content.get("evalue")))
        first = f"{_text(content.get('ename')) or 'Error'}: {value}".rstrip(": ")
        traceback = content.get("traceback", ())
        lines_of_trace = traceback if isinstance(traceback, list) else []
        trace = _ESCAPE.sub("", "\n".join(map(_text, lines_of_trace)))
        lines = self._code.splitlines()
        for count, number in reversed(_CELL_LINE.findall(trace)):
            if count == str(self._execution_count) and 1 <= int(number) <= len(lines):
                return f"{first}\n  line {number}: {lines[int(number) - 1].strip()}"
        return first

    def _line(self, text: str) -> None:
        if not self._ends_line:
            self._write("\n")
        self._write(f"{text}\n")

    def _write(self, text: str) -> None:
        if text:
            self._text.add(text)
            self._ends_line = text.endswith("\n")


def _text(value: Any) -> str:
    """``value`` where it is a text, as UTF-8 can hold it (JSON can carry half a surrogate pair)."""
    if not isinstance(value, str):
        return ""
    return value if value.isascii() else value.encode("utf-8", "replace").decode()


def _object(value: Any) -> Mapping[str, Any]:
    """``value`` where it is a JSON object; an empty one for anything else."""
    return value if isinstance(value, dict) else {}
