"""Two gloo processes train as one does: FSDP2, expert parallelism, checkpoints."""

import json
import os
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.batch import Batch, Sample
from swarm_sdk.traces.parl.distributed import ALONE, Team
from swarm_sdk.training.journal import Journal

SCRIPT = Path(__file__).with_name("two_processes.py")
learner_of = runpy.run_path(str(SCRIPT))["learner_of"]


def batch_of(num_groups: int) -> Batch:
    draw = np.random.default_rng(0)
    groups = []
    for question in range(num_groups):
        group = []
        for number in range(4):
            prompt, said = [40 + question] * 9, draw.integers(5, 400, draw.integers(6, 20))
            ids = np.array([*prompt, *said], dtype=np.int32)
            mask = np.arange(len(ids)) >= len(prompt)
            group.append(
                Sample(
                    episode_id=f"{question}.{number}",
                    ids_S=ids,
                    mask_S=mask,
                    logprobs_S=np.where(mask, -6.2, 0.0).astype(np.float32),
                    versions_S=np.where(mask, 0, -1).astype(np.int32),
                    advantage=float(draw.normal()),
                    weight=1 / 50,
                    temperature=1.0,
                )
            )
        groups.append(group)
    return Batch(groups=groups)


def run_processes(folder: Path, num: int, expert_parallel: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), str(expert_parallel)],
            env=os.environ
            | {"RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(num)
    ]
    errors = [process.communicate(timeout=150)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * num, "\n".join(errors)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("num_groups", "expert_parallel"), [(3, 2), (1, 2), (3, 1)], ids=["ep", "idle", "fsdp"]
)
def test_two_processes_have_the_loss_and_the_weights_of_one(
    tmp_path: Path, num_groups: int, expert_parallel: int
) -> None:
    batch = batch_of(num_groups)
    torch.save(batch, tmp_path / "batch.pt")
    run_processes(tmp_path, 2, expert_parallel)
    alone = learner_of(ALONE)
    expected = [alone.update(batch) for _ in range(2)]
    figures = json.loads((tmp_path / "figures.json").read_text())
    for one, other in zip(figures, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
        for key in ("loss_tokens", "clipped_heads"):
            assert one[key] == other[key]
    assert expected[0]["clipped_heads"] > 0
    weights = torch.load(tmp_path / "weights.pt")
    for name, tensor in alone.weights().items():
        torch.testing.assert_close(weights[name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    other = learner_of(ALONE)
    assert Journal(tmp_path / "run").load(2, other.state_dict())["num_updates"] == 2
    for name, tensor in other.weights().items():
        assert torch.equal(weights[name], tensor), name


def test_processes_and_experts_must_be_divisible(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Team.join("cpu") == ALONE
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="4 processes cannot be divided into groups of 3"):
        Team.join("cpu", expert_parallel=3)
