"""``swarm serve`` with a real SGLang on the CPU: ready, asked, paused, stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from swarm_sdk.config import open_model
from swarm_sdk.errors import ModelError
from swarm_sdk.model_backend.http import ServerClient
from swarm_sdk.types import Message, Sampling

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
ON_CPU = {
    "SGLANG_PLATFORM": "swarm_cpu",
    "SGLANG_USE_CPU_ENGINE": "0",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
FLAGS = ("--dtype", "float32", "--sleep-on-idle")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def group_of(leader: int) -> list[int]:
    """Processes of the group that ``leader`` leads, but for those that wait to be collected."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(group) == leader and state != "Z":
            found.append(int(entry.name))
    return found


@pytest.fixture
def said(tmp_path: Path) -> Path:
    return tmp_path / "said"


@pytest.fixture
def serving(tmp_path: Path, said: Path) -> Iterator[subprocess.Popen[str]]:
    if not PYTHON.exists():
        pytest.skip("needs SGLang: make sglang-cpu")
    options = ("--device", "cpu", "--python", PYTHON, "--port", free_port(), "--json")
    command = (sys.executable, "-c", "from swarm_sdk.cli import main; main()", "serve", "nano")
    with said.open("w") as errors:
        process = subprocess.Popen(
            [*command, *map(str, options), "--logs", str(tmp_path / "logs"), "--", *FLAGS],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | ON_CPU | {"HF_HOME": str(tmp_path / "hf")},
        )
    yield process
    if process.poll() is None:
        process.terminate()
        process.wait(60)
    assert process.stdout is not None
    process.stdout.close()


async def tokens_sampled(model: str) -> int:
    client = open_model(model)
    dialogue = client.dialogue([])
    dialogue.observe([Message("user", "hi")])
    sampled = await dialogue.sample(Sampling(temperature=0, max_tokens=4))
    await client.aclose()
    return len(sampled.generation.token_ids)


async def is_healthy_when_paused(url: str) -> bool:
    client = ServerClient(url, timeout_s=10)
    await client.command("/pause_generation", {"mode": "retract"})
    try:
        await client.get("/health")
    except ModelError:
        return False
    finally:
        await client.command("/continue_generation", {})
        await client.aclose()
    return True


def test_the_command_serves_lives_through_a_pause_and_leaves_no_process(
    serving: subprocess.Popen[str], said: Path
) -> None:
    assert serving.stdout is not None
    line = serving.stdout.readline()
    assert line, said.read_text()
    told = json.loads(line)
    leader = told["pids"]["server-0"]
    assert len(group_of(leader)) > 1  # SGLang starts processes of its own
    assert anyio.run(tokens_sampled, told["model"]) > 0
    assert anyio.run(is_healthy_when_paused, told["url"])
    assert anyio.run(tokens_sampled, told["model"]) > 0
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(60) == 0
    assert group_of(leader) == []
    assert "Traceback" not in said.read_text()
