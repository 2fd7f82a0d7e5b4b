"""The embedded engine: the K2.5 network as an ``Engine`` and a ``WeightSink``, in this process.

    generate(ids) ──inbox──> the engine's thread                      (any event loop, any number)
                             ┌─> receive      new requests, weights, the end
                             │   schedule     which tokens of which sequences
                             │   run          one pass of the network, sample
                             └── postprocess  append, finish
    Generation    <──future──┘

One thread named ``swarm-engine`` runs every step, so event loops stay free while torch computes.
It starts with the first request and ends with ``aclose``. A request is a ``concurrent.futures``
future: it belongs to no event loop, and cancelling it is all it takes to cancel the request.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import torch

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.engine.pages import PageTable, bytes_per_token
from swarm_sdk.model_backend.engine.prompt import read_media, read_token_ids
from swarm_sdk.model_backend.engine.runner import Runner
from swarm_sdk.model_backend.engine.scheduler import Scheduler
from swarm_sdk.model_backend.engine.sequence import Sequence
from swarm_sdk.model_backend.weight_sink import frozen
from swarm_sdk.types import Generation, Image, Sampling

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as List

    from torch import Tensor

    from swarm_sdk.model_backend.engine.scheduler import Chunk
    from swarm_sdk.model_backend.model.kimi import KimiModel

CPU_CACHE_BYTES = 512 * 2**20
CUDA_CACHE_SHARE = 0.4
"""Of the memory that is free on the device when the engine is made."""


class EmbeddedEngine:
    """Continuous batching over a paged cache; implements ``swarm_sdk.types.Engine``."""

    def __init__(
        self,
        model: KimiModel,
        *,
        max_running: int = 64,
        page_size: int = 16,
        num_pages: int | None = None,
        prefill_chunk_tokens: int = 512,
        weight_version: int = 0,
        is_frozen: bool = False,
    ) -> None:
        """Take over ``model``, on its device and in its dtype; the cache is made here.

        ``max_running`` sequences share a step at most. ``num_pages`` of ``page_size`` tokens hold
        their keys; ``None`` takes what ``max_running`` full contexts need, within 512 MiB on the
        CPU and 40 % of the free memory on CUDA, and one full context at least. A step computes
        ``prefill_chunk_tokens`` tokens of new prompts at most. One that ``is_frozen`` refuses new
        weights.

        Raises:
            ConfigError: a number is not positive.
        """
        if num_pages is None:
            num_pages = _num_pages_that_fit(model, max_running, max(page_size, 1))
        for name, count in (
            ("max_running", max_running),
            ("page_size", page_size),
            ("num_pages", num_pages),
            ("prefill_chunk_tokens", prefill_chunk_tokens),
        ):
            if count < 1:
                raise ConfigError(f"{name} must be at least 1, got {count}")
        self.model: KimiModel = model.eval()
        self.weight_version: int = weight_version
        self.is_frozen: bool = is_frozen
        context_tokens = model.config.text_config.max_position_embeddings
        self.limit_tokens: int = min(context_tokens, num_pages * page_size)
        """Prompt and completion of one request together."""
        self._table = PageTable(num_pages, page_size)
        self._scheduler = Scheduler(
            self._table, max_running=max_running, prefill_chunk_tokens=prefill_chunk_tokens
        )
        self._runner = Runner(
            model, num_pages=num_pages, page_size=page_size, max_running=max_running
        )
        self._updates: list[_WeightUpdate] = []
        self._inbox: queue.SimpleQueue[Sequence | _WeightUpdate | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Guards the two below, so that nothing is put behind the closing ``None``."""
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Prompt tokens that went through the network, so not those found in the cache."""
        return self._scheduler.num_computed_prompt_tokens

    @property
    def num_preemptions(self) -> int:
        """How often a sequence gave its pages back because they ran out."""
        return self._scheduler.num_preemptions

    @property
    def num_requests(self) -> int:
        """Requests that run or wait for a place."""
        return len(self._scheduler.running) + len(self._scheduler.waiting)

    @property
    def max_running(self) -> int:
        """Sequences that share a step at most; those above it that run already end first."""
        return self._scheduler.max_running

    @max_running.setter
    def max_running(self, places: int) -> None:
        if places < 1:
            raise ConfigError(f"max_running must be at least 1, got {places}")
        self._scheduler.max_running = places

    async def generate(
        self, token_ids: List[int], sampling: Sampling, images: List[Image] = ()
    ) -> Generation:
        """Continue ``token_ids``; cancelling the task frees its place before the next step.

        ``images`` fill the media placeholders in order, as many as each has tokens. With
        temperature 0 the log-probabilities are those of the plain softmax.

        Raises:
            ConfigError: no ids, an id outside the vocabulary, placeholders that do not fit the
                images, an image that cannot be read, or a setting out of range.
            ContextOverflow: prompt and ``max_tokens`` do not fit ``limit_tokens``.
            ModelError: the engine is closed, or failed.
        """
        ids = read_token_ids(token_ids, sampling, self.model.config.text_config.vocab_size)
        if len(ids) + sampling.max_tokens > self.limit_tokens:
            raise ContextOverflow(num_prompt_tokens=len(ids), limit_tokens=self.limit_tokens)
        placeholder = self.model.config.media_placeholder_token_id
        media = None
        if images or placeholder in ids:
            media = await anyio.to_thread.run_sync(read_media, ids, images, placeholder)
        sequence = Sequence(ids=ids, num_prompt_tokens=len(ids), sampling=sampling, media=media)
        self._post(sequence)
        return await asyncio.wrap_future(sequence.future)

    async def update_weights(self, state_dict: Mapping[str, Tensor], weight_version: int) -> None:
        """Copy new weights into the model, between two steps, and forget all cached keys.

        ``state_dict`` may hold a part of the tensors; the others stay. Running requests go on with
        the new weights: their keys are computed anew, so each id is drawn from exactly what its
        version would say, and ``Generation.version_spans`` tells which version drew which. The
        tensors of ``state_dict`` must not change before this returns.

        Raises:
            ConfigError: the engine is frozen, or a name or a shape is not the model's; nothing is
                changed.
            ModelError: the engine is closed.
        """
        if self.is_frozen:
            raise frozen(weight_version)
        own = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        new = {name: tensor.shape for name, tensor in state_dict.items()}
        unlike = sorted(name for name in new if own.get(name) != new[name])
        if unlike:
            raise ConfigError(
                f"the new weights do not fit the model: {len(unlike)} tensors differ in name or "
                f"shape, the first is {unlike[0]}"
            )
        update = _WeightUpdate(state_dict, weight_version)
        self._post(update)
        await asyncio.wrap_future(update.future)

    async def aclose(self) -> None:
        """End running requests with ``finish_reason="abort"``, then the thread."""
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._inbox.put(None)
        if self._thread is not None:
            with anyio.CancelScope(shield=True):  # one step at most
                await anyio.to_thread.run_sync(self._thread.join)

    def _post(self, item: Sequence | _WeightUpdate) -> None:
        with self._lock:
            if self._is_closed:
                raise ModelError("the engine is closed; make a new one")
            self._inbox.put(item)
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._serve, name="swarm-engine", daemon=True
                )
                self._thread.start()

    def _serve(self) -> None:
        """Run steps until the engine is closed: the main path."""
        scheduler, runner = self._scheduler, self._runner
        while self._receive():
            chunks = scheduler.schedule()
            try:
                sampled = runner.run(chunks)
            except Exception as error:  # noqa: BLE001 - the boundary: requests fail, the engine lives
                self._fail(chunks, error)
                continue
            for sequence, reason in scheduler.postprocess(chunks, sampled):
                _complete(sequence, sequence.generation(reason, self.weight_version))
        runner.close()
        for sequence in (*scheduler.running, *scheduler.waiting):
            scheduler.remove(sequence)
            _complete(sequence, sequence.generation("abort", self.weight_version))
        for update in self._updates:
            if update.future.set_running_or_notify_cancel():
                update.future.set_exception(ModelError("the engine was closed; make a new one"))

    def _receive(self) -> bool:
        """Take what came in, waiting if there is nothing to do; ``False`` ends the engine."""
        scheduler = self._scheduler
        while True:
            while self._updates:
                self._apply(self._updates.pop(0))
            try:
                item = self._inbox.get(block=not scheduler.has_work)
            except queue.Empty:
                return True
            if item is None:
                return False
            if isinstance(item, Sequence):
                scheduler.add(item)
            else:
                self._updates.append(item)

    def _apply(self, update: _WeightUpdate) -> None:
        if not update.future.set_running_or_notify_cancel():
            return
        self._scheduler.preempt_all()
        for sequence in self._scheduler.waiting:
            sequence.end_version(self.weight_version)
            sequence.features = None
        own = self.model.state_dict()
        with torch.no_grad():
            for name, tensor in update.state_dict.items():
                own[name].copy_(tensor)
        self._table.clear()
        self._runner.refresh_weights()
        self.weight_version = update.weight_version
        update.future.set_result(None)

    def _fail(self, chunks: List[Chunk], error: Exception) -> None:
        for sequence in [chunk.sequence for chunk in chunks]:
            self._scheduler.remove(sequence)
            if sequence.future.set_running_or_notify_cancel():
                failure = ModelError(f"the embedded engine failed: {error}")
                failure.__cause__ = error
                sequence.future.set_exception(failure)


@dataclass(frozen=True, slots=True, eq=False)
class _WeightUpdate:
    state_dict: Mapping[str, Tensor]
    weight_version: int
    future: Future[None] = field(default_factory=Future)


def _complete(sequence: Sequence, generation: Generation) -> None:
    if sequence.future.set_running_or_notify_cancel():  # False: nobody waits any more
        sequence.future.set_result(generation)


def _num_pages_that_fit(model: KimiModel, max_running: int, page_size: int) -> int:
    text, weight = model.config.text_config, model.embed_tokens.weight
    limit_bytes = CPU_CACHE_BYTES
    if weight.is_cuda:
        limit_bytes = int(torch.cuda.mem_get_info(weight.device)[0] * CUDA_CACHE_SHARE)
    num_pages_of_context = -(-text.max_position_embeddings // page_size)
    num_that_fit = limit_bytes // (bytes_per_token(text, weight.dtype) * page_size)
    return max(min(num_that_fit, max_running * num_pages_of_context), num_pages_of_context)
