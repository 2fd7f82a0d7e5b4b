import pytest
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager

from swarm_sdk.tools.sandbox.launcher import ready_zygote
from swarm_sdk.tools.sandbox.provisioner import ZygoteProvisioner

pytestmark = pytest.mark.anyio


class Specs(KernelSpecManager):
    """Knows one kernel: ours."""

    def get_kernel_spec(self, kernel_name):
        told = {"provisioner_name": "swarm-zygote", "config": {"memory_mb": 300}}
        return KernelSpec(
            argv=[],
            display_name=kernel_name,
            language="python",
            metadata={"kernel_provisioner": told},
        )


@pytest.mark.filterwarnings("ignore")
async def test_any_jupyter_client_gets_a_sandboxed_kernel_by_its_spec():
    manager = AsyncKernelManager(kernel_spec_manager=Specs(), kernel_name="x", transport="ipc")
    await manager.start_kernel()
    assert isinstance(manager.provisioner, ZygoteProvisioner)
    assert manager.provisioner._settings.memory_mb == 300
    pid = manager.provisioner.pid
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=20)
    texts = []
    reply = await client.execute_interactive(
        "import os; print(os.getpid() == 1, os.listdir('/home'))",
        output_hook=lambda message: texts.append(message["content"].get("text", "")),
        timeout=20,
    )
    assert reply["content"]["status"] == "ok"
    level = (await ready_zygote()).isolation.level
    assert level < 2 or "".join(texts) == "True ['agent']\n"
    await manager.interrupt_kernel()
    assert await manager.is_alive()
    await manager.restart_kernel(now=True)
    assert manager.provisioner.pid != pid
    assert await manager.is_alive()
    client.stop_channels()
    await manager.shutdown_kernel(now=True)
    assert not await manager.is_alive()
