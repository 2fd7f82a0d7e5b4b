"""Pictures on their way to the model, and the way back to them.

    display(…) ──> decode, at most MAX_DECODED pixels ──> scale down to the budget ──> PNG ──> sent
                                                                                   └─> shown[i]

The budget is the number of pixels that the model's patches hold (report: ``in_patch_limit``); a
picture is never enlarged. ``shown[i]`` opens what was sent in an earlier cell, ``images[i]`` what
was given with the task.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

MAX_DECODED = 64 * 2**20
MAX_BYTES = 7 * 2**20
MAX_SIDE = 512 * 14
"""Pixels along one side that the report's processor keeps (512 patches of 14)."""
MAX_KEPT = 64
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
INDEX = ".index.json"
_PICTURE_TYPES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


class Pictures(Sequence["Image.Image"]):
    """Pictures in files, opened when they are asked for."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._paths: list[Path] = []

    def set(self, paths: Sequence[Path]) -> None:
        """Hold these instead."""
        self._paths = list(paths)

    @property
    def paths(self) -> list[str]:
        """Where the files are."""
        return [str(path) for path in self._paths]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [opened(path) for path in self._paths[index]]
        try:
            return opened(self._paths[index])
        except IndexError:
            raise IndexError(f"{self._name} holds {len(self._paths)} pictures") from None

    def __iter__(self) -> Iterator[Image.Image]:
        return map(opened, self._paths)

    def __repr__(self) -> str:
        lines = []
        for number, path in enumerate(self._paths):
            picture = opened(path)
            size = f"{picture.width} x {picture.height}, {picture.mode}"
            lines.append(f"{self._name}[{number}]  {path.name}  {size}")
        return "\n".join(lines) or f"{self._name} holds no picture"


class Shelf:
    """Keeps what was shown, and makes it fit to be sent."""

    def __init__(self) -> None:
        self.images: Pictures = Pictures("images")
        self.shown: Pictures = Pictures("shown")
        self.max_pixels: int = 16384 * 14 * 14
        self.folder: Path = Path("/tmp/shown")  # noqa: S108 - the sandbox's own
        self._inputs = Path("/input")
        self._stamp = 0

    def configure(self, *, inputs: str, scratch: str, max_pixels: int) -> None:
        """Tell where files lie."""
        self._inputs, self.folder = Path(inputs), Path(scratch, "shown")
        self.max_pixels = max_pixels

    def take_inputs(self, home: str) -> None:
        """Link files that came since the last cell into ``home``, and list the pictures."""
        try:
            stamp = os.stat(self._inputs / INDEX).st_mtime_ns
        except OSError:
            return
        if stamp == self._stamp:
            return
        self._stamp = stamp
        names = json.loads((self._inputs / INDEX).read_text())
        for name in names:
            link = Path(home, name)
            if not link.is_symlink() and not link.exists():
                link.symlink_to(self._inputs / name)
        self.images.set(
            [self._inputs / name for name in names if name.lower().endswith(_PICTURE_TYPES)]
        )

    def prepared(self, data: bytes) -> tuple[bytes, dict[str, Any]]:
        """The PNG that is sent for an encoded picture, and what is told of it.

        Raises:
            ValueError: the bytes are no picture, or one of too many pixels.
        """
        picture = decoded(data)
        size = picture.size
        picture = fitted(picture, self.max_pixels)
        encoded = _encoded(picture)
        while len(encoded) > MAX_BYTES:
            picture = fitted(picture, picture.width * picture.height // 2)
            encoded = _encoded(picture)
        told = {"width": size[0], "height": size[1], "palette": palette(picture)}
        name = self._keep(encoded)
        if name:
            told["name"] = name
        return encoded, told

    def _keep(self, encoded: bytes) -> str:
        number = len(self.shown)
        if number >= MAX_KEPT:
            return ""
        path = self.folder / f"shown-{number}.png"
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_bytes(encoded)
        except OSError:  # the disk is full: the picture is sent all the same
            return ""
        self.shown.set([*map(Path, self.shown.paths), path])
        return path.name


SHELF = Shelf()


def opened(path: Path) -> Image.Image:
    """Decode a file."""
    return decoded(path.read_bytes())


def decoded(data: bytes) -> Image.Image:
    """Decode a picture of at most MAX_DECODED pixels to 8 bits a channel.

    Raises:
        ValueError: it cannot be decoded, or is larger.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MAX_DECODED:
                size = f"{picture.width} x {picture.height}"
                raise ValueError(f"{size} pixels are too many; make the picture smaller")
            picture.load()
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"the bytes cannot be decoded: {error}") from error
    if picture.mode in ("L", "RGB", "RGBA"):
        return picture
    if picture.mode in ("1", "I;16", "I", "F"):
        return picture.convert("L")
    return picture.convert("RGBA" if "transparency" in picture.info else "RGB")


def fitted(picture: Image.Image, max_pixels: int) -> Image.Image:
    """Scale down to ``max_pixels`` and MAX_SIDE, never up."""
    width, height = picture.size
    scale = min(1.0, math.sqrt(max_pixels / (width * height)), MAX_SIDE / width, MAX_SIDE / height)
    if scale == 1.0:
        return picture
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    return picture.resize(size, 3)  # bicubic, as the report's processor


def palette(picture: Image.Image, num_colours: int = 4) -> str:
    """The most frequent colours with their shares, for models that cannot see.

    >>> from PIL import Image
    >>> palette(Image.new("L", (4, 3), 255))
    '#ffffff 100 %'
    """
    small = picture.convert("RGB").copy()
    small.thumbnail((64, 64))
    reduced = small.quantize(num_colours)
    colours = reduced.getpalette() or []
    counts: list[tuple[int, Any]] = sorted(reduced.getcolors() or [], reverse=True)
    total = small.width * small.height
    return ", ".join(
        "#{:02x}{:02x}{:02x}".format(*colours[3 * i : 3 * i + 3]) + f" {100 * count / total:.0f} %"
        for count, i in counts
    )


def _encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()
