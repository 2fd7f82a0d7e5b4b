"""What ``KernelSandbox`` needs of what starts its kernels: a fork-server, or containers."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from swarm_sdk.tools.sandbox.cgroups import Cgroup
    from swarm_sdk.tools.sandbox.levels import Isolation, SandboxSettings


class Process(Protocol):
    """One kernel's process, alive or ended."""

    @property
    def pid(self) -> int:
        """For display and measurement."""
        ...

    @property
    def pidfd(self) -> int:
        """Becomes readable when the process has ended."""
        ...

    @property
    def folder(self) -> int:
        """Descriptor of the folder that holds ``home`` and ``run``, where its sockets are."""
        ...

    @property
    def cgroup(self) -> Cgroup | None:
        """Its group, where there is one of ours."""
        ...

    @property
    def listener(self) -> socket.socket | None:
        """Listens inside the sandbox, for the proxy, where hosts may be reached."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether it runs."""
        ...

    async def wait_ready(self) -> Mapping[str, Any]:
        """Wait until it has its sockets; ``key`` is what its messages are signed with.

        Raises:
            SandboxDied: it ended first.
        """
        ...

    def interrupt(self) -> None:
        """Send SIGINT."""
        ...

    async def end(self) -> None:
        """Kill it and all that it started, and wait until they are gone."""
        ...

    def ending(self) -> str:
        """How it ended, in words."""
        ...

    def oom_kills(self) -> int:
        """Processes of it that were killed for memory."""
        ...

    def close(self) -> None:
        """Let go of a process that has ended."""
        ...


class Host(Protocol):
    """Starts kernels."""

    @property
    def isolation(self) -> Isolation:
        """What it holds."""
        ...

    @property
    def inputs_folder(self) -> str:
        """Where folders of input files are made."""
        ...

    async def launch(
        self, name: str, settings: SandboxSettings, *, inputs: str, seed: int
    ) -> Process:
        """Start a kernel; files are kept over kernels of the same name.

        Raises:
            ConfigError: it cannot hold what ``settings`` ask for.
            SandboxDied: it does not start.
        """
        ...

    async def forget(self, name: str) -> None:
        """Delete the files of a sandbox whose processes have ended."""
        ...
