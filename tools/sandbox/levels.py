"""How far code in a sandbox is kept from the machine, and what a sandbox may use.

    L3  namespaces, seccomp, a user without rights, and a cgroup for memory, processes, CPU
    L2  the same without a cgroup: limits hold for each process, not for all of them together
    L1  no namespaces: Landlock for files, seccomp against the network; other processes can be seen
    L0  nothing: a process of this user

A level is what a canary has shown: it is built, and a process inside tries what must fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from swarm_sdk.errors import ConfigError

ENFORCED: Mapping[int, tuple[str, ...]] = {
    3: ("files", "network", "privileges", "process hiding", "disk", "memory", "process count"),
    2: ("files", "network", "privileges", "process hiding", "disk"),
    1: ("files", "network", "privileges"),
    0: (),
}
"""What each level holds for the sandbox as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """The level that this machine gives, and why it is no higher."""

    level: int
    reason: str = ""
    """What stood in the way of the next level; empty at the highest."""
    by: str = ""
    """The container command that builds it; empty for our own fork-server."""

    @property
    def name(self) -> str:
        """``L3`` … ``L0``, or ``L3/docker``: what results and spans carry."""
        return f"L{self.level}/{self.by}" if self.by else f"L{self.level}"

    @property
    def enforced(self) -> tuple[str, ...]:
        """What is kept from the code, or capped."""
        held = ENFORCED[self.level]
        return tuple(one for one in held if one != "disk") if self.by else held

    @property
    def missing(self) -> tuple[str, ...]:
        """What is not."""
        return tuple(one for one in ENFORCED[3] if one not in self.enforced)

    def __str__(self) -> str:
        if self.level == 3:
            return "L3"
        return f"L{self.level}; NOT enforced: {', '.join(self.missing)} ({self.reason})"

    def require(self, level: int) -> None:
        """Refuse to go on below ``level``.

        Raises:
            ConfigError: this machine gives less.
        """
        if self.level < level:
            raise ConfigError(
                f"the sandbox must hold level L{level} and this machine gives {self}; allow it "
                "with SandboxSettings(isolation='best') if you trust the code"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxSettings:
    """What the code of one sandbox may use; the same for all kernels of a pool.

    Raises:
        ConfigError: a number is not positive, or a level or a mount is unknown.
    """

    isolation: Literal["required", "best"] = "required"
    """``required`` refuses below ``level``; ``best`` takes what the machine gives, L0 included."""
    level: int = 1
    """The lowest level that ``required`` accepts."""
    memory_mb: int = 1024
    """At L3 for all processes together; at L2 and L1 for each."""
    disk_mb: int = 256
    """Home, ``/tmp`` and ``/dev/shm`` together (L2 and up); the largest file at any level."""
    num_files: int = 20_000
    """Files and folders in them (L2 and up)."""
    num_processes: int = 64
    """Processes and threads."""
    cpus: float = 1.0
    """Share of processors (L3)."""
    cpu_s: int | None = None
    """Processor seconds of one process over its life, after which it is killed."""
    max_output_chars: int = 16 * 2**20
    """Printed characters after which a cell is stopped."""
    max_pixels: int = 16384 * 14 * 14
    """Pixels of a shown picture: larger ones are scaled down. The patches of one image of the
    report's processor (``in_patch_limit`` 16384 patches of 14 x 14)."""
    mounts: tuple[Path, ...] = field(default=())
    """Folders that the code may read, at their own paths."""
    hosts: tuple[str, ...] = ()
    """``host`` or ``host:port`` that the code may reach through our proxy; ``*.name`` for all below
    a name. Empty is no network."""

    def __post_init__(self) -> None:
        if self.isolation not in ("required", "best") or not 0 <= self.level <= 3:
            raise ConfigError("isolation is 'required' or 'best', and level is 0, 1, 2 or 3")
        for name in ("memory_mb", "disk_mb", "num_files", "num_processes", "cpus"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.max_output_chars <= 0 or self.max_pixels <= 0 or (self.cpu_s or 1) <= 0:
            raise ConfigError("max_output_chars, max_pixels and cpu_s must be positive")
        for mount in self.mounts:
            if not mount.is_absolute() or not mount.is_dir():
                raise ConfigError(f"'{mount}' must be the absolute path of a folder to mount it")

    @property
    def lowest_level(self) -> int:
        """The level below which nothing runs."""
        return self.level if self.isolation == "required" else 0


DEFAULT_SETTINGS = SandboxSettings()
