"""The SGLang servers that ``tests/sglang/run.sh`` started, and our own model on their weights."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.sglang_client import ServedModel, SglangEngine
from swarm_sdk.model_backend.sglang_wire import ExpertsShape
from swarm_sdk.model_backend.weights import checkpoint

URL = "SWARM_SGLANG_URL"
CHECKPOINT = "SWARM_SGLANG_CHECKPOINT"


@pytest.fixture(scope="session")
def url() -> str:
    if URL not in os.environ:
        pytest.skip("needs a real SGLang server: make test-sglang")
    return os.environ[URL]


@pytest.fixture(scope="session")
def checkpoint_dir(url: str) -> Path:
    return Path(os.environ[CHECKPOINT])


@pytest.fixture(scope="session")
def our_model(checkpoint_dir: Path) -> KimiModel:
    return checkpoint.load(checkpoint_dir)


@pytest.fixture(scope="session")
def tokenizer(checkpoint_dir: Path) -> Tokenizer:
    return Tokenizer.from_dir(checkpoint_dir)


@pytest.fixture(scope="session")
def served(our_model: KimiModel, tokenizer: Tokenizer) -> ServedModel:
    text = our_model.config.text_config
    return ServedModel(
        tokenizer,
        ExpertsShape(num_layers=text.num_hidden_layers, num_chosen=text.num_experts_per_tok),
    )


@pytest.fixture
async def engine(url: str, served: ServedModel, anyio_backend: str) -> AsyncIterator[SglangEngine]:
    engine = SglangEngine(url, model=served)
    yield engine
    await engine.aclose()


@pytest.fixture(scope="session")
def nano_url(url: str) -> str:
    return os.environ["SWARM_SGLANG_NANO_URL"]
