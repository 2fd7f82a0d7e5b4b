"""A checkpoint directory as a ``Model`` that runs inside this process."""

from __future__ import annotations

from pathlib import Path

import torch

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.weights.checkpoint import load

CHUNK_TOKENS = 512
"""Prompt tokens of one step."""


def open_embedded(
    directory: Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    max_running: int = 64,
    name: str | None = None,
    is_frozen: bool = False,
) -> TokenModel:
    """Load a checkpoint and its tokenizer and start an engine on them.

    Records call the model ``name``, or the directory's. An engine that ``is_frozen`` refuses new
    weights.

    Raises:
        ConfigError: a file is missing or broken, or weights and tokenizer do not fit together.
    """
    if not directory.is_dir():
        raise ConfigError(f"there is no checkpoint directory '{directory}'; check the path")
    tokenizer = Tokenizer.from_dir(directory)
    model = load(directory, dtype=dtype, device=device)
    text = model.config.text_config
    if tokenizer.num_tokens != text.vocab_size:
        raise ConfigError(
            f"'{directory}' does not fit together: the tokenizer has {tokenizer.num_tokens} tokens "
            f"and the weights have {text.vocab_size}"
        )
    return TokenModel(
        name=name or directory.name,
        engine=EmbeddedEngine(
            model,
            max_running=max_running,
            is_frozen=is_frozen,
            prefill_chunk_tokens=CHUNK_TOKENS,
        ),
        chat_format=ChatFormat(tokenizer, thinking=True),
        context_tokens=text.max_position_embeddings,
    )
