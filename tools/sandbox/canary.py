"""A process inside a sandbox that tries what must fail, and tells what it could do."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from swarm_sdk.tools.sandbox import linux

BOMB_MB = 96


def sing(request: Mapping[str, Any]) -> dict[str, Any]:
    """Try everything.

    Args:
        request: ``secret`` is a file of the host, ``port`` one that the host listens on, ``host``
            a process of the host.
    """
    status = dict(
        line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines()
    )
    return {
        "reads_files": _works(lambda: Path(request["secret"]).read_bytes()),
        "writes_files": _works(lambda: Path("/usr/.swarm-canary").touch()),
        "connects": _works(lambda: _connect(request["port"])),
        "resolves": _works(lambda: socket.getaddrinfo("localhost.example", 80)),
        "signals": _works(lambda: os.kill(request["host"], 0)),
        "num_processes": sum(name.isdigit() for name in os.listdir("/proc")) if _has_proc() else 0,
        "capabilities": status["CapEff"].strip("0\n "),
        "gains_privileges": status["NoNewPrivs"].strip() != "1",
        "filters": status["Seccomp"].strip() == "2",
        "unshares": _works(lambda: linux.unshare(linux.CLONE_NEWUSER, "user namespace")),
        "bomb": _bomb(),
    }


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _has_proc() -> bool:
    return _works(lambda: os.listdir("/proc"))


def _connect(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        pass


def _bomb() -> str:
    """Use more memory than allowed, in a child: ``killed``, ``refused``, or ``unlimited``."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            for _ in range(BOMB_MB):
                memory = mmap.mmap(-1, 2**20, flags=mmap.MAP_PRIVATE)
                for place in range(0, 2**20, 4096):
                    memory[place] = 1
                _HELD.append(memory)
        except (OSError, MemoryError):
            code = 3
        os._exit(code)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {0: "unlimited", -signal.SIGKILL: "killed"}.get(code, "refused")
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return "unlimited"


_HELD: list[mmap.mmap] = []
