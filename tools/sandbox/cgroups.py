"""Groups of processes with a cap on memory, processes and CPU (control groups, version 1 or 2).

    Cgroups.find()  ──> a folder of ours in each hierarchy that we may write to
       make(name)   ──> Cgroup: caps set; the kernel's first act is to join it
         oom_kills  ──> how often the system killed a process of it for memory
         remove     ──> gone, once its processes are

Folders are named after the process that made them, so that those of a process that was killed can
be swept by the next one.
"""

from __future__ import annotations

import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from swarm_sdk.tools.sandbox.levels import SandboxSettings

_PREFIX = "swarm-"
_PERIOD_US = 100_000
_OPTIONAL = ("memory.memsw.limit_in_bytes", "memory.swap.max", "cpu.max", "cpu.cfs_quota_us")
"""Missing where a system has no swap accounting or no CPU quotas."""
_ROOT = Path("/sys/fs/cgroup")
_TELLING = {
    1: ("memory.oom_control", "memory.usage_in_bytes"),
    2: ("memory.events", "memory.current"),
}
"""Files that tell of kills and of memory in use, by version."""


class Cgroup:
    """The caps of one kernel."""

    def __init__(self, folders: Sequence[Path], version: int) -> None:
        self._folders = folders
        events, use = _TELLING[version]
        self._events = str(folders[0] / events)  # the memory's folder is the first
        self._use = str(folders[0] / use)

    @property
    def folders(self) -> tuple[str, ...]:
        """One for each hierarchy."""
        return tuple(map(str, self._folders))

    def oom_kills(self) -> int:
        """Processes killed because the memory was used up."""
        found = re.search(r"^oom_kill (\d+)", _read(self._events), re.MULTILINE)
        return int(found[1]) if found else 0

    def memory_bytes(self) -> int:
        """Memory in use, files in its tmpfs included."""
        return int(_read(self._use) or 0)

    def remove(self) -> None:
        """Delete the group; its processes are gone, or about to be."""
        for folder in self._folders:
            for _ in range(40):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:  # a process is still being taken down
                    time.sleep(0.005)


class Cgroups:
    """Where the groups of this process are made."""

    def __init__(self, parents: Mapping[str, Path], version: int) -> None:
        self._parents = parents
        self._version = version

    @staticmethod
    def find(parent: Path | None = None) -> tuple[Cgroups | None, str]:
        """Make our folders; where that fails, ``None`` and the reason.

        Args:
            parent: of version 2, where to make it; looked for unless given.
        """
        name = f"{_PREFIX}{os.getpid()}-{secrets.token_hex(3)}"
        reasons = []
        for attempt in (_version_2, _version_1):
            try:
                return attempt(name, parent), ""
            except (OSError, LookupError) as error:
                reasons.append(f"{error}")
        return None, "no cgroup can be made: " + "; ".join(reasons)

    def make(self, name: str, settings: SandboxSettings) -> Cgroup:
        """A group with the caps of ``settings``.

        Raises:
            OSError: the system refuses.
        """
        caps = _caps(settings, self._version)
        made = []
        for controller, parent in self._parents.items():
            folder = parent / name
            folder.mkdir()
            made.append(folder)
            for file, value in caps.items():
                if file.startswith(controller) or self._version == 2:
                    _set(folder, file, value)
        return Cgroup(made, self._version)

    def remove(self) -> bool:
        """Delete our folders and what was left in them; whether all are gone."""
        for parent in self._parents.values():
            _remove_tree(parent)
        return not any(parent.exists() for parent in self._parents.values())


def _caps(settings: SandboxSettings, version: int) -> dict[str, str]:
    memory = str(settings.memory_mb << 20)
    quota = str(int(_PERIOD_US * settings.cpus))
    if version == 2:
        return {
            "memory.max": memory,
            "memory.swap.max": "0",
            "pids.max": str(settings.num_processes),
            "cpu.max": f"{quota} {_PERIOD_US}",
        }
    return {
        "memory.limit_in_bytes": memory,
        "memory.memsw.limit_in_bytes": memory,
        "pids.max": str(settings.num_processes),
        "cpu.cfs_quota_us": quota,
    }


def _set(folder: Path, file: str, value: str) -> None:
    if file in _OPTIONAL and not (folder / file).exists():
        return
    (folder / file).write_text(value)


def _version_1(name: str, parent: Path | None) -> Cgroups:
    del parent
    own = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own.update(dict.fromkeys(controllers.split(","), path))
    made: dict[str, Path] = {}
    try:
        for controller in ("memory", "pids", "cpu"):
            mount = _ROOT / controller
            if controller not in own or not mount.is_dir():
                if controller == "cpu":
                    continue
                raise LookupError(f"there is no {controller} hierarchy of version 1")
            inside = mount / own[controller].lstrip("/")
            base = inside if inside.is_dir() else mount
            _sweep(base)
            (base / name).mkdir()
            made[controller] = base / name
    except BaseException:
        for folder in made.values():
            _remove_tree(folder)
        raise
    return Cgroups(made, 1)


def _version_2(name: str, parent: Path | None) -> Cgroups:
    """Make a folder in our own group or the nearest above that may hand its controllers down."""
    base = parent
    if base is None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        path = next((line[3:] for line in lines if line.startswith("0::")), None)
        if path is None:
            raise LookupError("there is no hierarchy of version 2")
        base = _ROOT / path.lstrip("/")
    refused = f"{base} hands no memory and pids controllers down"
    for candidate in (base, *base.parents):
        if not candidate.is_relative_to(parent or _ROOT):
            break
        if not {"memory", "pids"} <= set(_read(candidate / "cgroup.controllers").split()):
            continue
        try:
            _sweep(candidate)
            _hand_down(candidate)
            (candidate / name).mkdir()
            _hand_down(candidate / name)
        except OSError as error:
            refused = str(error)
            continue
        return Cgroups({"": candidate / name}, 2)
    raise LookupError(refused)


def _hand_down(folder: Path) -> None:
    wanted = {"memory", "pids", "cpu"} & set(_read(folder / "cgroup.controllers").split())
    missing = wanted - set(_read(folder / "cgroup.subtree_control").split())
    if missing:
        text = " ".join(f"+{one}" for one in sorted(missing))
        (folder / "cgroup.subtree_control").write_text(text)


def _sweep(folder: Path) -> None:
    """Delete what processes left behind that are no more."""
    for left in folder.glob(f"{_PREFIX}*-*"):
        owner = left.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            _remove_tree(left)


def _remove_tree(folder: Path) -> None:
    for child in [*folder.glob("*/"), folder]:
        try:
            child.rmdir()
        except OSError:
            continue  # a process is left in it; the next sweep tries again


def _read(path: str | Path) -> str:
    try:
        with open(path, encoding="ascii") as stream:
            return stream.read()
    except OSError:
        return ""
