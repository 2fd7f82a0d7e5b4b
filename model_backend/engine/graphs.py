"""Steps on CUDA: captured as a graph once for each size, replayed from then on.

    chunks ──> rows: one for each token to compute, of a prompt as of a completion
               id, position, sequence | pages of each sequence | rows that sample, and how
       ── one copy ──> graph(rows, keys) ──> id, log-prob of each row that samples ── one copy ──>

A small network's step is bound by starting its operations: some 300, of a few microseconds each.
A graph starts them as one. Its shapes are fixed, so a step takes the next larger of a few sizes;
rows to spare write to a page of their own that nobody reads.

Every row attends by the absorbed form over the latents of its sequence up to its position
(``kernels/paged_attention``). The keys of a chunk's own earlier tokens are in the cache before any
row of the layer attends, so a prompt needs no other form. Each row reads its keys anew: right for
small networks, and not meant for large ones, which belong on a serving engine.
"""

# Shapes: T = rows, Q = sequences, X = rows that sample, P = pages of a sequence, S = keys,
# H = heads, N = nope, R = rope, V = value width, L = latent, W = L + R (one cached token).

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from swarm_sdk.model_backend.engine.sampler import draw, to_list
from swarm_sdk.model_backend.kernels.experts import waits_for_the_device
from swarm_sdk.model_backend.kernels.paged_attention import (
    attend_rows,
    attend_rows_reference,
)
from swarm_sdk.model_backend.kernels.paged_attention import is_supported as is_supported_attention
from swarm_sdk.model_backend.model.mla import up_projections
from swarm_sdk.model_backend.model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as List

    from torch import Tensor

    from swarm_sdk.model_backend.engine.scheduler import Chunk
    from swarm_sdk.model_backend.model.config import TextConfig
    from swarm_sdk.model_backend.model.kimi import KimiModel

ROWS = (8, 32, 64, 128, 192, 256, 384, 512, 768)
"""Sizes of a step; a larger one is cut into several (ours, as are the next two)."""
MIN_KEYS = 256
"""Keys of a sequence are rounded up to this times a power of two."""
MAX_GATHERED_BYTES = 4 * 2**30
"""Keys that one layer may gather; rows are fewer where they would pass this."""
NUM_SETTINGS = 3
_CAPTURE = threading.Lock()
"""One capture at a time in a process: the random state of the device can be in one only."""


class Size(NamedTuple):
    """The shapes of one graph."""

    rows: int
    pages: int
    """Of each sequence."""
    truncates: bool
    """Whether a row may have a top-p below 1."""


def is_supported(model: KimiModel) -> bool:
    """Whether steps of the model can be captured: on CUDA, and nothing in them waits for it."""
    num_chosen = model.config.text_config.num_experts_per_tok
    mixtures = [m.experts for m in model.modules() if isinstance(m, MixtureOfExperts)]
    return model.embed_tokens.weight.is_cuda and not any(
        waits_for_the_device(experts.gate_up_proj, experts.down_proj, num_chosen, ROWS[-1])
        for experts in mixtures
    )


@dataclass(frozen=True, slots=True, eq=False)
class RowAttention:
    """Each row attends to the latents of its own sequence; an ``AttentionContext``."""

    config: TextConfig
    kv: Tensor
    """[layers, slots, W]"""
    page_size: int
    pages_QP: Tensor
    sequences_T: Tensor
    positions_T: Tensor
    own_slots_T: Tensor
    """The place of each row's own key."""

    def attend(
        self,
        layer_index: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        latent_TL: Tensor,
        k_rope_TR: Tensor,
        kv_b_proj: Tensor,
    ) -> Tensor:
        """Store the rows' keys, then return the attention output [T, H, V]."""
        kv_SW = self.kv[layer_index]
        kv_SW.index_copy_(0, self.own_slots_T, torch.cat([latent_TL, k_rope_TR], dim=-1))
        w_uk_HNL, w_uv_HVL = up_projections(kv_b_proj, self.config)
        q_latent_THL = torch.bmm(q_nope_THN.transpose(0, 1), w_uk_HNL).transpose(0, 1)
        way = (
            attend_rows
            if is_supported_attention(kv_SW, self.config.kv_lora_rank)
            else attend_rows_reference
        )
        out_THL = way(
            torch.cat([q_latent_THL, q_rope_THR], dim=-1),
            kv_SW,
            self.pages_QP,
            self.sequences_T,
            self.positions_T,
            latent=self.config.kv_lora_rank,
            page_size=self.page_size,
            scale=self.config.softmax_scale,
        )
        return torch.bmm(out_THL.transpose(0, 1), w_uv_HVL.transpose(1, 2)).transpose(0, 1)


class GraphSteps:
    """The graphs of one engine. Weights may change in place; graphs stay as they are."""

    def __init__(self, model: KimiModel, kv: Tensor, *, page_size: int, max_sequences: int) -> None:
        """Steps over the cache ``kv`` [layers, slots, W], whose last page is for spare rows."""
        text, device = model.config.text_config, kv.device
        self.model: KimiModel = model
        self.kv: Tensor = kv
        self.page_size: int = page_size
        self.max_sequences: int = max_sequences
        """Of one replay."""
        self.num_graphs: int = 0
        """Captured so far."""
        self._spare_page = kv.shape[1] // page_size - 1
        self._num_pages = -(-text.max_position_embeddings // page_size)
        sampled, num_tables = max_sequences, max_sequences + 1
        # Rows | rows that sample | their settings, as bits | pages of the sequences, one to spare.
        self._sizes = (3 * ROWS[-1], sampled, NUM_SETTINGS * sampled, num_tables * self._num_pages)
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(sum(self._sizes), dtype=torch.int64, pin_memory=is_cuda)
        self._input = torch.zeros(sum(self._sizes), dtype=torch.int64, device=device)
        self._output = torch.zeros(sampled, 2, dtype=torch.float64, device=device)
        self._has_read: torch.cuda.Event | None = None
        """When the device has copied what the host wrote last."""
        self._graphs: dict[Size, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if is_cuda else None

    def run(self, chunks: List[Chunk]) -> list[tuple[int, float]]:
        """Compute the chunks; id and log-probability of those that sample, in order."""
        results: list[tuple[int, float]] = []
        for part in self._parts(chunks):
            results += self._step(part)
        return results

    def _parts(self, chunks: List[Chunk]) -> Iterator[list[tuple[Chunk, int, int]]]:
        """Cut the chunks into steps: (chunk, first token, tokens)."""
        part: list[tuple[Chunk, int, int]] = []
        num_rows, widest, most = 0, 0, 0
        for chunk in chunks:
            start = chunk.sequence.num_computed_tokens
            end = start + chunk.num_tokens
            while start < end:
                if end > widest * self.page_size:
                    widest = self._width(end)
                    most = self._max_rows(widest)
                room = most - num_rows
                if part and (room <= 0 or len(part) == self.max_sequences):
                    yield part
                    part, num_rows, widest = [], 0, 0
                    continue
                taken = min(end - start, room)
                part.append((chunk, start, taken))
                num_rows += taken
                start += taken
        if part:
            yield part

    def _width(self, num_keys: int) -> int:
        """Pages that a step over so many keys reads of each sequence."""
        size = MIN_KEYS
        while size < num_keys:
            size *= 2
        return min(-(-size // self.page_size), self._num_pages)

    def _max_rows(self, width: int) -> int:
        row_bytes = width * self.page_size * self.kv.shape[2] * self.kv.element_size()
        return max([ROWS[0], *(rows for rows in ROWS if rows * row_bytes <= MAX_GATHERED_BYTES)])

    def _step(self, part: list[tuple[Chunk, int, int]]) -> list[tuple[int, float]]:
        """One replay."""
        num_rows = sum(taken for _, _, taken in part)
        width = self._width(max(start + taken for _, start, taken in part))
        num_spare_rows = next(rows for rows in ROWS if rows >= num_rows) - num_rows
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        pages: list[list[int]] = []
        samples: list[int] = []
        settings: list[tuple[float, float, float]] = []
        truncates = False
        padding = [self._spare_page] * width
        for number, (chunk, start, taken) in enumerate(part):
            sequence, end = chunk.sequence, start + taken
            if taken == 1:
                ids.append(sequence.ids[start])
                positions.append(start)
                sequences.append(number)
            else:
                ids += sequence.ids[start:end]
                positions += range(start, end)
                sequences += [number] * taken
            held = sequence.pages[:width]
            pages.append(held + padding[len(held) :])
            if end == len(sequence.ids):  # its last id: the next one is drawn
                how = sequence.sampling
                truncates |= how.top_p < 1
                samples.append(len(ids) - 1)
                settings.append((how.temperature, how.top_p, sequence.uniforms.random()))
        nothing = [0] * num_spare_rows
        spare_sequence = [self.max_sequences] * num_spare_rows
        size = Size(num_rows + num_spare_rows, width, truncates)
        if self._has_read is not None:
            self._has_read.synchronize()
        rows_3T, samples_X, settings_X3, pages_QP = self._views(self._host, width)
        rows_3T.numpy()[:, : size.rows] = (
            ids + nothing,
            positions + nothing,
            sequences + spare_sequence,
        )
        pages += [padding] * (self.max_sequences + 1 - len(part))
        pages_QP.numpy()[:] = pages
        num_spare = self.max_sequences - len(samples)
        samples_X.numpy()[:] = samples + [0] * num_spare
        settings_X3.numpy()[:] = settings + [(0.0, 1.0, 0.0)] * num_spare
        end = sum(self._sizes[:3]) + pages_QP.numel()
        self._input[:end].copy_(self._host[:end], non_blocking=True)
        if self._input.is_cuda:
            self._has_read = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._has_read.record()
        self._replay(size)
        if not samples:
            return []
        return to_list(self._output[: len(samples)])

    def _views(self, flat: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows [3, T], samples [X], their settings [X, 3] and pages [Q + 1, P] in ``flat``."""
        rows, samples, settings, pages = flat.split_with_sizes(self._sizes)
        return (
            rows.view(3, -1),
            samples,
            settings.view(torch.float64).view(-1, NUM_SETTINGS),
            pages[: (self.max_sequences + 1) * width].view(-1, width),
        )

    def _replay(self, size: Size) -> None:
        if self._pool is None:  # the same computation, where there is no CUDA
            self._compute(size)
            return
        if size not in self._graphs:
            self._graphs[size] = self._captured(size)
        self._graphs[size].replay()

    def _captured(self, size: Size) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with _CAPTURE:
            self._compute(size)  # libraries make what they need outside the graph
            torch.cuda.current_stream().synchronize()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._compute(size)
            finally:
                graph.capture_end()
        self.num_graphs += 1
        return graph

    def _compute(self, size: Size) -> None:
        """From the input's tensors to the output's; waits for nothing."""
        rows_3T, samples_X, settings_X3, pages_QP = self._views(self._input, size.pages)
        ids_T, positions_T, sequences_T = rows_3T[:, : size.rows]
        pages_T = pages_QP[sequences_T, positions_T // self.page_size]
        attention = RowAttention(
            config=self.model.config.text_config,
            kv=self.kv,
            page_size=self.page_size,
            pages_QP=pages_QP,
            sequences_T=sequences_T,
            positions_T=positions_T,
            own_slots_T=pages_T * self.page_size + positions_T % self.page_size,
        )
        num_samples = min(size.rows, self.max_sequences)
        hidden_TD = self.model(ids_T, positions_T, attention)
        hidden_XD = hidden_TD.index_select(0, samples_X[:num_samples])
        settings_3X = settings_X3[:num_samples].T.contiguous()
        self._output[:num_samples] = draw(
            self.model.logits(hidden_XD), settings_3X, truncates=size.truncates
        )
