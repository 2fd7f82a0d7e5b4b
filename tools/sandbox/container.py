"""Kernels in containers, for who trusts docker or podman more, or needs another image.

    host = ContainerHost("my-image-with-ipykernel")
    tool = IPythonTool(lambda files: KernelSandbox(files, host=host.ready))

Behind ``KernelSandbox`` it looks like the fork-server: it launches processes that have sockets in a
folder and a descriptor that tells their end (that of the command that waits for the container). The
image needs Python, ipykernel >= 7 and what the cells import; our part of the kernel is shown to it
read-only. Starting takes what the container command takes. Files lie in a folder of this machine,
so that the cap on their size does not hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.files import clear_folder, restore_folder
from swarm_sdk.tools.sandbox.launcher import (
    END_TIMEOUT_S,
    FIRST_USER_ID,
    ending_in_words,
    is_readable,
)
from swarm_sdk.tools.sandbox.levels import Isolation, SandboxSettings

_COMMANDS = ("docker", "podman")
_PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "hb_port": 4, "control_port": 5}


class ContainerProcess:
    """One container; as ``KernelProcess``."""

    def __init__(
        self,
        command: str,
        name: str,
        process: subprocess.Popen[bytes],
        store: Path,
        notes: Path,
        key: str,
    ) -> None:
        self.pid: int = process.pid
        self.pidfd: int = os.pidfd_open(process.pid)
        self.folder: int = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
        self.cgroup: None = None
        self.listener: socket.socket | None = None
        self._command = command
        self._name = name
        self._process = process
        self._notes = notes
        self._key = key
        self._is_closed = False
        self._oom_kills = 0

    async def wait_ready(self) -> Mapping[str, Any]:
        """Wait until the kernel has its sockets.

        Raises:
            SandboxDied: the container ended first.
        """
        assert self._process.stdout is not None
        await anyio.wait_readable(self._process.stdout)
        if self._process.stdout.readline() != b"ready\n":
            said = await anyio.to_thread.run_sync(self._process.communicate)
            lines = said[1].decode(errors="replace").strip().splitlines()
            why = lines[-1] if lines else f"it ended ({self.ending()})"
            raise SandboxDied(f"the container could not start: {why}")
        return {"key": self._key}

    @property
    def is_alive(self) -> bool:
        """Whether the container runs."""
        return not self._is_closed and not is_readable(self.pidfd)

    def interrupt(self) -> None:
        """Send SIGINT to the kernel."""
        self.send_signal(signal.SIGINT)

    def send_signal(self, number: int) -> None:
        """Send a signal to the kernel."""
        if self.is_alive:
            name = signal.Signals(number).name
            _call(self._command, "kill", "--signal", name, self._name)

    async def end(self) -> None:
        """Kill all that runs in the container."""
        if self.is_alive:
            await anyio.to_thread.run_sync(self.send_signal, signal.SIGKILL)
            with anyio.move_on_after(END_TIMEOUT_S):
                await anyio.wait_readable(self.pidfd)
        self._process.kill()

    def status(self) -> int | None:
        """Exit status, as the container command tells it: above 128 for a signal."""
        code = self._process.poll()
        return 128 - code if code is not None and code > 128 else code

    def ending(self) -> str:
        """How it ended, in words."""
        return ending_in_words(self.status())

    def oom_kills(self) -> int:
        """1 where the container was ended for memory."""
        if not self.is_alive and not self._oom_kills:
            told = _call(self._command, "inspect", "--format", "{{.State.OOMKilled}}", self._name)
            # Some versions of podman say "false" and leave a file in the folder they ran in.
            self._oom_kills = int(told.strip() == b"true" or (self._notes / "oom").exists())
        return self._oom_kills

    def close(self) -> None:
        """Let go of a container that has ended."""
        if self._is_closed:
            return
        self._is_closed = True
        self._process.communicate()
        os.close(self.pidfd)
        os.close(self.folder)
        _call(self._command, "rm", "--force", self._name)


class ContainerHost:
    """Starts containers of one image.

    Args:
        image: has Python and ipykernel.
        command: ``docker`` or ``podman``, or a path; the first that is installed unless given.

    Raises:
        ConfigError: there is no such command, or it cannot reach its service.
    """

    def __init__(self, image: str, *, command: str | None = None) -> None:
        found = [shutil.which(name) for name in ([command] if command else _COMMANDS)]
        path = next(filter(None, found), None)
        if path is None:
            wanted = command or " or ".join(_COMMANDS)
            raise ConfigError(f"containers need {wanted}, which is not installed; leave host= away")
        try:
            subprocess.run([path, "info"], capture_output=True, check=True, timeout=20)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(
                f"'{path} info' fails ({error}); start its service or leave host= away"
            ) from error
        self._command = path
        self._image = image
        self._folder = Path(tempfile.mkdtemp(prefix="swarm-"))
        self._folder.chmod(0o711)
        self.inputs_folder: str = str(self._folder / "inputs")
        self.isolation: Isolation = Isolation(level=3, by=Path(path).name)
        # A container of root gets no user of this machine, as kernels of the fork-server do.
        self._user = os.getuid() or FIRST_USER_ID
        self._code = self._folder / "code"
        _copy_guest(self._code)

    async def ready(self) -> ContainerHost:
        """This; what ``KernelSandbox(host=…)`` takes."""
        return self

    async def launch(
        self, name: str, settings: SandboxSettings, *, inputs: str, seed: int
    ) -> ContainerProcess:
        """Start a container.

        Raises:
            ConfigError: ``settings`` ask for hosts, which containers do not get.
            SandboxDied: the command fails.
        """
        self.isolation.require(settings.lowest_level)
        if settings.hosts:
            raise ConfigError("code in containers has no network; leave hosts= away")
        store, notes = self._folder / "stores" / name, self._folder / "notes" / name
        for folder in (notes, store / "home", store / "tmp", store / "run"):
            folder.mkdir(parents=True, exist_ok=True)
            restore_folder(str(folder))
        clear_folder(str(store / "run"))
        clear_folder(str(notes))
        key = secrets.token_hex(16)
        told = {
            "info": {
                "key": key,
                "signature_scheme": "hmac-sha256",
                "transport": "ipc",
                "ip": f"{store}/run/s",
                **_PORTS,
            },
            "home": f"{store}/home",
            "inputs": inputs,
            "scratch": f"{store}/tmp",  # noqa: S108 - below a folder of ours
            "seed": seed,
            "max_pixels": settings.max_pixels,
            "max_output_chars": settings.max_output_chars,
        }
        (store / "told.json").write_text(json.dumps(told))
        store.chmod(0o700)  # the key is for nobody else
        if os.getuid() == 0:
            for path in (store, *store.iterdir()):
                os.chown(path, self._user, self._user)
        container = f"swarm-{os.getpid()}-{name}"
        _call(self._command, "rm", "--force", container)
        process = subprocess.Popen(  # noqa: ASYNC220, S603 - returns at once; options are ours
            [
                *(self._command, "run", "--name", container, "--init", "--network", "none"),
                *("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
                *("--memory", f"{settings.memory_mb}m", "--memory-swap", f"{settings.memory_mb}m"),
                *("--cpus", str(settings.cpus), "--pids-limit", str(settings.num_processes)),
                *("--ulimit", "nofile=512:512", "--ulimit", "core=0:0"),
                *("--ulimit", f"fsize={settings.disk_mb << 20}:{settings.disk_mb << 20}"),
                *("--user", f"{self._user}:{os.getgid() or self._user}"),
                *self._namespace(),
                # Each by itself: a folder in a folder of its own the code could replace by a link.
                *(f"--volume={store}/{part}:{store}/{part}" for part in ("home", "tmp", "run")),
                *(f"--volume={store}/told.json:{store}/told.json:ro",),
                *(f"--volume={inputs}:{inputs}:ro",),
                *("--volume", f"{self._code}:{self._code}:ro"),
                *(f"--volume={mount}:{mount}:ro" for mount in settings.mounts),
                *("--env", f"PYTHONPATH={self._code}", self._image),
                *("python3", "-m", "swarm_sdk.tools.sandbox.guest", f"{store}/told.json"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=notes,
        )
        return ContainerProcess(self._command, container, process, store, notes, key)

    def _namespace(self) -> tuple[str, ...]:
        """Without root, podman gives a user of ours another number unless it is told to keep it."""
        is_rootless = os.getuid() != 0 and self.isolation.by == "podman"
        return ("--userns", "keep-id") if is_rootless else ()

    async def forget(self, name: str) -> None:
        """Delete the folders of a sandbox."""
        for kind in ("stores", "notes"):
            shutil.rmtree(self._folder / kind / name, ignore_errors=True)

    def close(self) -> None:
        """Delete all folders; end the sandboxes first."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _copy_guest(target: Path) -> None:
    """Our part of the kernel, alone, at the module path that it has here."""
    package = target / "swarm_sdk" / "tools" / "sandbox" / "guest"
    package.mkdir(parents=True)
    for folder in (package.parent, package.parents[1], package.parents[2]):
        (folder / "__init__.py").touch()
    for file in (Path(__file__).parent / "guest").glob("*.py"):
        shutil.copy(file, package / file.name)


def _call(*command: str) -> bytes:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, check=False, timeout=20)  # noqa: S603
        return done.stdout
    return b""
