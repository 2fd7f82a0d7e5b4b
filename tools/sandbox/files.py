"""Files on their way into a sandbox, and out of it.

    put      ──> a folder of ours that the sandbox can only read; linked into its working directory
    collect  <── a walk over its folder by descriptor: plain files only, no link followed, capped

The walk never resolves a path that the sandbox chose: each name is opened in the folder before it,
refusing links, pipes and devices.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from swarm_sdk.types import Image

INDEX = ".index.json"
_MAX_DEPTH = 16
_MAX_ENTRIES = 20_000


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One file that a sandbox left in its working directory."""

    path: str
    """Relative to the working directory."""
    data: bytes


@dataclass(frozen=True, slots=True)
class Outputs:
    """What was collected, and what was not."""

    files: tuple[OutputFile, ...]
    left_out: tuple[str, ...]
    """Paths of files over a cap, and of what is no plain file."""


class InputFolder:
    """The files that a sandbox can read and not change."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._names: list[str] = []
        path.mkdir(parents=True, mode=0o755, exist_ok=True)

    def put(self, files: Sequence[Image]) -> None:
        """Add files; one of the same name is replaced.

        Raises:
            ConfigError: a file's name is not a plain name, or is given twice.
        """
        check_file_names(files)
        for file in files:
            if file.name:
                target = self.path / file.name
                target.write_bytes(file.data)
                target.chmod(0o644)
                if file.name not in self._names:
                    self._names.append(file.name)
        if self._names:
            fresh = self.path / f"{INDEX}.new"
            fresh.write_text(json.dumps(self._names))
            fresh.chmod(0o644)
            fresh.replace(self.path / INDEX)


def open_folder(name: str, parent: int) -> int:
    """Open a folder in an open one, which a sandbox may have replaced by a link to elsewhere.

    Raises:
        OSError: it is a link, or no folder.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=parent)


def restore_folder(path: str) -> None:
    """Let its owner into a folder again, whatever code did to its rights.

    Raises:
        OSError: it is a link, or no folder.
    """
    if not stat.S_ISDIR(os.lstat(path).st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
    os.chmod(path, 0o700)


def clear_folder(path: str) -> None:
    """Delete the files in a folder; of a link to elsewhere nothing.

    Raises:
        OSError: it is a link, or no folder.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for name in os.listdir(folder):
            if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
                continue
            os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)


def collect(
    folder: int,
    *,
    max_files: int = 100,
    max_file_bytes: int = 16 * 2**20,
    max_total_bytes: int = 64 * 2**20,
) -> Outputs:
    """Read the files below an open folder.

    Args:
        folder: its descriptor; stays open.
        max_files: most files that are read.
        max_file_bytes: largest file that is read.
        max_total_bytes: most bytes of all files together.
    """
    found: list[OutputFile] = []
    left_out: list[str] = []
    total = 0
    num_seen = 0
    for path, descriptor, size in _walk(folder, "", 0):
        num_seen += 1
        if num_seen > _MAX_ENTRIES:
            left_out.append("…")
            break
        if descriptor is None:
            left_out.append(path)
            continue
        try:
            fits = size <= max_file_bytes and total + size <= max_total_bytes
            if not fits or len(found) >= max_files:
                left_out.append(path)
                continue
            data = _read(descriptor, size)
            total += len(data)
            found.append(OutputFile(path, data))
        finally:
            os.close(descriptor)
    return Outputs(tuple(found), tuple(left_out))


def _walk(folder: int, prefix: str, depth: int) -> Iterator[tuple[str, int | None, int]]:
    """Path, open descriptor (``None`` for what is not read) and size of each entry."""
    for name in sorted(os.listdir(folder)):
        path = prefix + name
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            kind = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not (stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode)):
                if not (depth == 0 and stat.S_ISLNK(kind.st_mode)):  # inputs are links
                    yield path, None, 0
                continue
            descriptor = os.open(name, flags, dir_fd=folder)
        except OSError:
            yield path, None, 0
            continue
        facts = os.fstat(descriptor)
        if stat.S_ISREG(facts.st_mode):
            yield path, descriptor, facts.st_size
            continue
        try:
            if stat.S_ISDIR(facts.st_mode) and depth < _MAX_DEPTH:
                yield from _walk(descriptor, f"{path}/", depth + 1)
            else:
                yield path, None, 0
        finally:
            os.close(descriptor)


def _read(descriptor: int, size: int) -> bytes:
    """At most ``size`` bytes: a file may grow while it is read."""
    parts = []
    while size > 0:
        part = os.read(descriptor, min(size, 2**20))
        if not part:
            break
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def check_file_names(files: Sequence[Image]) -> None:
    """Refuse names that are not plain file names.

    Raises:
        ConfigError: a name holds a folder or control characters, or is given twice.
    """
    seen = {INDEX, f"{INDEX}.new"}
    for name in (file.name for file in files if file.name):
        if name in (".", "..") or len(name.encode()) > 255 or "/" in name or "\\" in name:
            raise ConfigError(f"'{name}' is not a plain file name; give the file a name alone")
        if not name.isprintable():
            raise ConfigError(f"{name!r} holds characters that a file name cannot have; rename it")
        if name in seen:
            raise ConfigError(f"two files are named '{name}'; rename one of them")
        seen.add(name)
