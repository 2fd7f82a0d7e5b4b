"""The SGLang server that ``tests/sglang/run.sh`` started, and our own model on the same weights."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.sglang_client import SglangEngine
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


@pytest.fixture
async def engine(url: str, our_model: KimiModel, anyio_backend: str) -> AsyncIterator[SglangEngine]:
    engine = SglangEngine(url, media_pad_id=our_model.config.media_placeholder_token_id)
    yield engine
    await engine.aclose()
