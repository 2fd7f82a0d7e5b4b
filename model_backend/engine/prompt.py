"""What a request brings, checked before it enters the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.engine.sequence import PromptMedia
from swarm_sdk.model_backend.model.media import MediaBatch, decode_image, preprocess_image

if TYPE_CHECKING:
    from collections.abc import Sequence

    from swarm_sdk.types import Image, Sampling


def read_token_ids(token_ids: Sequence[int], sampling: Sampling, vocab_size: int) -> list[int]:
    """Return the ids as a list of the engine's own.

    Raises:
        ConfigError: there are none, one is outside the vocabulary, or a sampling setting is out
            of its range.
    """
    ids = [int(token_id) for token_id in token_ids]
    if not ids:
        raise ConfigError("there is nothing to continue: token_ids is empty")
    outside = next((token_id for token_id in ids if not 0 <= token_id < vocab_size), None)
    if outside is not None:
        raise ConfigError(
            f"token id {outside} is outside the model's vocabulary of {vocab_size}; "
            "use the tokenizer that belongs to the model"
        )
    if not 0 <= sampling.temperature < float("inf"):
        raise ConfigError(f"temperature must be 0 or more, got {sampling.temperature}")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1, got {sampling.top_p}")
    if sampling.max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, got {sampling.max_tokens}")
    return ids


def read_media(ids: Sequence[int], images: Sequence[Image], placeholder_id: int) -> PromptMedia:
    """Decode the images and find the placeholders that each fills.

    Raises:
        ConfigError: an image cannot be read, or the placeholders do not fit the images.
    """
    items = [
        preprocess_image(decode_image(image.data, image.name or "an image of the prompt"))
        for image in images
    ]
    places = [place for place, token_id in enumerate(ids) if token_id == placeholder_id]
    num_tokens = sum(item.num_tokens for item in items)
    if len(places) != num_tokens:
        raise ConfigError(
            f"the prompt holds {len(places)} media placeholders, but its {len(items)} images fill "
            f"{num_tokens}"
        )
    spans: list[tuple[int, int, bytes]] = []
    start = 0
    for image, item in zip(images, items, strict=True):
        end = start + item.num_tokens
        digest = bytes.fromhex(image.sha256)
        spans.append((places[start], places[end - 1] + 1, digest))
        start = end
    return PromptMedia(MediaBatch.of(items), tuple(spans))
