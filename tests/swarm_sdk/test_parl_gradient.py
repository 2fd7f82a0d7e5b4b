"""What a run learned from can be read again later, to the last bit of the gradient."""

import shutil
from pathlib import Path

import anyio
import pytest
import torch

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.parl.learner import Learner
from swarm_sdk.training.journal import Journal
from swarm_sdk.training.parl import Parl, batch_reader, records_of
from swarm_sdk.training.settings import ParlConfig

CONFIG = ParlConfig(questions=1, samples=2, updates=1, max_entities=2, main_steps=3)


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    named = learner.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.timeout(300)
def test_the_gradient_of_replayed_records_is_that_of_the_live_ones_bit_for_bit(
    tmp_path: Path,
) -> None:
    run, later = tmp_path / "run", tmp_path / "later"

    async def main() -> dict[str, torch.Tensor]:
        async with Parl.open(CONFIG, run) as parl:
            [group] = await parl.roll_out()
            for number, record in enumerate(group):  # rewards that differ, whatever was said
                parl.ledger.judge_episode(record.id, {"reward": float(number)})
            groups = records_of(parl.ledger, [[record.id for record in group]])
            parl.learner.accumulate(parl.reader.read(parl.ledger, groups, 0))
            return gradients(parl.learner)

    live = anyio.run(main)
    assert any(bool(gradient.any()) for gradient in live.values())
    shutil.copytree(run, later)
    shutil.rmtree(run)
    learner = Learner(load(nano_directory(), dtype=torch.float32), CONFIG.learner())
    ledger = Ledger(later / "runs", readonly=True)
    groups = records_of(ledger, Journal(later).batches[0]["groups"])
    reader = batch_reader(CONFIG, open_embedded(nano_directory()))
    learner.accumulate(reader.read(ledger, groups, 0))
    replayed = gradients(learner)
    assert replayed.keys() == live.keys()
    for name, gradient in live.items():
        assert torch.equal(gradient, replayed[name]), name
