"""PARL with a policy that a real SGLang server samples with, and sub-agents in this process."""

import json
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest
import torch

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.sglang_weights import SglangWeights
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.training.journal import METRICS
from swarm_sdk.training.parl import Parl
from swarm_sdk.training.settings import ParlConfig

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(400)]


@pytest.fixture
def lent_url(nano_url: str) -> Iterator[str]:
    """The server that serves nano; it has its weights again afterwards."""
    yield nano_url

    async def restore() -> None:
        model = load(nano_directory(), dtype=torch.float32)
        sink = SglangWeights(nano_url, model.config, dtype=torch.float32)
        await sink.update_weights(dict(model.named_parameters()), 0)
        await sink.aclose()

    anyio.run(restore)


def test_a_server_samples_with_the_weights_of_each_iteration(lent_url: str, tmp_path: Path) -> None:
    config = ParlConfig(
        sampler=f"sglang:{lent_url}",
        steps=2,
        questions=2,
        samples=4,
        updates=1,
        warmup_updates=1,
        max_entities=3,
        main_steps=8,
        sub_steps=6,
        max_tokens=256,
        episode_tokens=4_000,
        replay_routing=True,
    )

    async def train() -> SglangWeights:
        async with Parl.open(config, tmp_path) as parl:
            await parl.train()
            assert isinstance(parl.sink, SglangWeights)
            return parl.sink

    sink = anyio.run(train)
    figures = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [one["version"] for one in figures] == [1, 2]
    assert [one["staleness"] for one in figures] == [0, 0]
    assert figures[0]["grad_norm"] > 0, "nothing was learned, so nothing is shown"
    # The second iteration was sampled with what the first had trained.
    assert all(one["engine_trainer_mean_abs_dlogprob"] < 1e-4 for one in figures)
    assert not any("no_experts" in one["left_out"] for one in figures)
    assert sink.is_verified
    assert sink.weight_version == 2
    start, trained = (
        load(one).embed_tokens.weight for one in (nano_directory(), tmp_path / "model")
    )
    assert not torch.equal(start, trained)
