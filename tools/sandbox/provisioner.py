"""The fork-server for any Jupyter client: a kernel spec that names it gets forked kernels.

    {"argv": [], "display_name": "Python (sandboxed)", "language": "python",
     "metadata": {"kernel_provisioner": {"provisioner_name": "swarm-zygote"}}}

``config`` beside the name takes the fields of ``SandboxSettings``. The client must take ipc
connections: ``AsyncKernelManager(transport="ipc")``. What a kernel says goes to that client as it
is; only ``KernelSandbox`` checks it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Dict

from swarm_sdk.tools.sandbox.files import InputFolder
from swarm_sdk.tools.sandbox.launcher import KernelProcess, ready_zygote
from swarm_sdk.tools.sandbox.levels import SandboxSettings

if TYPE_CHECKING:
    from jupyter_client.connect import KernelConnectionInfo

_PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "hb_port": 4, "control_port": 5}


class ZygoteProvisioner(KernelProvisionerBase):
    """Forks, signals and ends the kernel of one kernel manager."""

    settings: Any = Dict(config=True)
    process: KernelProcess | None = None

    def __init__(self, **options: Any) -> None:
        names = SandboxSettings.__dataclass_fields__
        fields = {name: options.pop(name) for name in list(options) if name in names}
        super().__init__(**options)
        self._settings = SandboxSettings(**{**self.settings, **fields})
        self._name = f"p{secrets.token_hex(6)}"

    @property
    def has_process(self) -> bool:
        """Whether there is a kernel, alive or ended."""
        return self.process is not None

    @property
    def pid(self) -> int | None:
        """The kernel's process."""
        return self.process.pid if self.process is not None else None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing is executed: the command stays empty."""
        kwargs = await super().pre_launch(**kwargs)
        kwargs["cmd"] = []
        return kwargs

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        """Fork a kernel; where its sockets are."""
        del cmd, kwargs
        zygote = await ready_zygote()
        inputs = InputFolder(Path(zygote.inputs_folder, self._name))
        seed = secrets.randbits(63)
        process = await zygote.launch(
            self._name, self._settings, inputs=str(inputs.path), seed=seed, is_for_any_client=True
        )
        self.process = process
        told = await process.wait_ready()
        info: Any = {
            "transport": "ipc",
            "ip": f"/proc/{os.getpid()}/fd/{process.folder}/run/s",
            "key": told["key"].encode(),
            "signature_scheme": "hmac-sha256",
            **_PORTS,
        }
        manager: Any = self.parent
        manager.transport, manager.ip = "ipc", info["ip"]
        manager.session.key = info["key"]
        for port, number in _PORTS.items():
            setattr(manager, port, number)
        self.connection_info = info
        return self.connection_info

    async def poll(self) -> int | None:
        """``None`` while the kernel runs, its exit status afterwards."""
        if self.process is None:
            return 0
        if self.process.is_alive:
            return None
        status = self.process.status()
        return 1 if status is None else status

    async def wait(self) -> int | None:
        """Wait for the kernel's end."""
        if self.process is None:
            return 0
        if self.process.is_alive:
            await anyio.wait_readable(self.process.pidfd)
        status = await self.poll()
        self.process.close()
        self.process = None
        return status

    async def send_signal(self, signum: int) -> None:
        """Send a signal to the kernel."""
        if self.process is not None:
            self.process.send_signal(signum)

    async def kill(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002 - their signature
        """End the kernel and all that it started."""
        del restart
        if self.process is not None:
            await self.process.end()

    async def terminate(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002
        """As ``kill``: pid 1 of a namespace hears no SIGTERM."""
        await self.kill(restart)

    async def cleanup(self, restart: bool = False) -> None:  # noqa: FBT001, FBT002
        """Delete the kernel's files, unless another kernel takes its place."""
        if not restart:
            zygote = await ready_zygote()
            await zygote.forget(self._name)
