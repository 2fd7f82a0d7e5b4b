"""One request inside the engine.

    ids            prompt ............ sampled ......
                   |-- num_computed --|-- to do -----|

A sequence always has at least one id whose keys are not yet in the cache. With exactly one to do
it decodes; with more (a new prompt, or one whose pages were taken away) it prefills. Computing the
last one gives the next id.
"""

# Shapes: M = media tokens, D = hidden.

from __future__ import annotations

import random
from concurrent.futures import Future
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from swarm_sdk.types import FinishReason, Generation, Sampling

if TYPE_CHECKING:
    from torch import Tensor

    from swarm_sdk.model_backend.model.media import MediaBatch


@dataclass(frozen=True, slots=True, eq=False)
class PromptMedia:
    """The pictures of a prompt."""

    batch: MediaBatch
    spans: tuple[tuple[int, int, bytes], ...]
    """Of each picture: its first placeholder, the place after its last, and its digest."""


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request with everything it owns; touched by the engine's thread only, but ``future``."""

    ids: list[int]
    num_prompt_tokens: int
    sampling: Sampling
    media: PromptMedia | None = None
    future: Future[Generation] = field(default_factory=Future)
    """Completed by the engine; cancelled by whoever waits for it."""

    features: Tensor | None = None
    """[M, D]: encoded pictures; ``None`` until the first prefill, or without pictures."""
    num_computed_tokens: int = 0
    num_cached_tokens: int | None = None
    """Prompt tokens found in the cache; ``None`` until the sequence first runs."""
    pages: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)
    """(version, tokens) of earlier weights that sampled the first ids, in order."""
    names: list[bytes] = field(default_factory=list)
    """Names of the full pages, as far as they were asked for; see ``page_name``."""
    uniforms: random.Random = field(init=False)
    """Draws one number for each sampled id, so that no other request changes the result."""
    stop_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.uniforms = random.Random(self.sampling.seed)
        self.stop_ids = frozenset(self.sampling.stop_token_ids)

    @property
    def num_to_compute(self) -> int:
        """Ids whose keys are not in the cache; at least 1."""
        return len(self.ids) - self.num_computed_tokens

    @property
    def num_completion_tokens(self) -> int:
        """Ids sampled so far."""
        return len(self.ids) - self.num_prompt_tokens

    def append(self, token_id: int, logprob: float) -> FinishReason | None:
        """Take the next sampled id; returns why the sequence ends, or ``None`` if it goes on."""
        self.ids.append(token_id)
        self.logprobs.append(logprob)
        if token_id in self.stop_ids:
            return "stop"
        return "length" if self.num_completion_tokens >= self.sampling.max_tokens else None

    def generation(self, finish_reason: FinishReason, weight_version: int) -> Generation:
        """Give the result as it stands."""
        return Generation(
            token_ids=tuple(self.ids[self.num_prompt_tokens :]),
            logprobs=tuple(self.logprobs),
            finish_reason=finish_reason,
            weight_version=weight_version,
            version_spans=self.version_spans(weight_version),
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens or 0,
            num_completion_tokens=self.num_completion_tokens,
        )

    def end_version(self, version: int) -> None:
        """Tell that ids sampled from now on are the work of newer weights than ``version``."""
        num_sampled = self.num_completion_tokens - sum(num for _, num in self.versions)
        if num_sampled:
            self.versions.append((version, num_sampled))

    def version_spans(self, weight_version: int) -> tuple[tuple[int, int], ...]:
        """Give the versions where there were several; ``weight_version`` is the last."""
        if not self.versions:
            return ()
        num_last = self.num_completion_tokens - sum(num for _, num in self.versions)
        return (*self.versions, *([(weight_version, num_last)] if num_last else []))

    def page_name(self, page_index: int, page_size: int) -> bytes:
        """Name the content of a full page and of everything before it.

        A page's name covers the name of the page before it, its own ids, and the digests of the
        pictures that it touches: equal names mean equal keys and values.
        """
        for index in range(len(self.names), page_index + 1):
            start, end = index * page_size, (index + 1) * page_size
            name = blake2b(self.names[-1] if self.names else b"", digest_size=16)
            name.update(np.asarray(self.ids[start:end], dtype=np.int64).tobytes())
            for first, after, digest in self.media.spans if self.media else ():
                if first < end and after > start:
                    name.update(digest)
            self.names.append(name.digest())
        return self.names[page_index]
