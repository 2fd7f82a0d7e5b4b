"""One step of the network: chunks of sequences in, the next token of each in turn out.

    chunks of one token ──> DecodeNetwork, compiled                (float32 on the CPU)
    chunks of text      ──> GraphSteps, captured                   (CUDA)
    all others          ──> KimiModel over PagedAttention  ──> logits of last rows ──> sample

All read and write the same cache. Where neither of the first two is made for the model, all chunks
go the third way, packed into one pass.
"""

# Shapes: T = rows of a pass, B = chunks of one token (first), X = sampled rows, V = vocabulary,
# C = rows of a chunk, S = keys, M = media tokens, D = hidden.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm_sdk.model_backend.engine.attention import PagedAttention, Segment
from swarm_sdk.model_backend.engine.decode import DecodeNetwork, is_supported
from swarm_sdk.model_backend.engine.graphs import GraphSteps
from swarm_sdk.model_backend.engine.graphs import is_supported as can_capture
from swarm_sdk.model_backend.engine.pages import kv_pool
from swarm_sdk.model_backend.engine.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence as List

    from torch import Tensor

    from swarm_sdk.model_backend.engine.scheduler import Chunk
    from swarm_sdk.model_backend.engine.sequence import Sequence
    from swarm_sdk.model_backend.model.kimi import KimiModel


class Runner:
    """The model and its cache on the device; knows nothing of requests' lives."""

    def __init__(
        self, model: KimiModel, *, num_pages: int, page_size: int, max_running: int
    ) -> None:
        self.model: KimiModel = model
        self.page_size: int = page_size
        self.max_running: int = max_running
        self.weight: Tensor = model.embed_tokens.weight.detach()
        captures = can_capture(model)
        num_slots = (num_pages + captures) * page_size  # a page for rows to spare
        self.kv: Tensor = kv_pool(model.config.text_config, num_slots, self.weight)
        self.graphs: GraphSteps | None = None
        if captures:
            self.graphs = GraphSteps(model, self.kv, page_size=page_size, max_sequences=max_running)
        self.stream: torch.cuda.Stream | None = None
        if self.kv.is_cuda:
            self.stream = torch.cuda.Stream(self.kv.device)  # type: ignore[no-untyped-call]
        self.offsets: Tensor = torch.arange(page_size, device=self.weight.device)
        self.decode_network: DecodeNetwork | None = None
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Prepare what is derived from the weights; to be called after they change."""
        network = self.decode_network
        if network is not None and network.max_rows >= self.max_running and network.refresh():
            return
        self.close()
        if self.stream is not None:
            torch.cuda.synchronize(self.kv.device)  # they were written on another stream
        if is_supported(self.model):
            self.decode_network = DecodeNetwork(
                self.model, self.kv, page_size=self.page_size, max_rows=self.max_running
            )

    def close(self) -> None:
        """End the threads that decode."""
        if self.decode_network is not None:
            self.decode_network.close()

    @torch.inference_mode()
    def run(self, chunks: List[Chunk]) -> list[tuple[int, float]]:
        """Compute the chunks, those of one token first; sample where a chunk ends its sequence.

        On CUDA on a stream of the engine's own, so that engines and a trainer run side by side.
        """
        with torch.cuda.stream(self.stream):
            return self._run(chunks)

    def _run(self, chunks: List[Chunk]) -> list[tuple[int, float]]:
        fast, rest = self._split(chunks)
        if self.decode_network is not None and len(fast) > self.decode_network.max_rows:
            self.max_running = 2 * len(fast)
            self.refresh_weights()
        results: dict[Chunk, tuple[int, float]] = {}
        logits: list[Tensor] = []
        sampled: list[Chunk] = []
        if self.decode_network is not None and fast:
            logits_BV = self._decode(self.decode_network, fast)
            results.update(zip(fast, self.decode_network.best(len(fast)), strict=True))
            rows = [i for i, c in enumerate(fast) if c.samples and c.sequence.sampling.temperature]
            if rows:
                logits.append(logits_BV[rows])
                sampled += [fast[row] for row in rows]
        if self.graphs is not None and fast:
            drawn = self.graphs.run(fast)
            results.update(zip([c for c in fast if c.samples], drawn, strict=True))
        if rest:
            hidden_TD = self._forward(rest)
            ends = [chunk for chunk in rest if chunk.samples]
            if ends:
                logits.append(self.model.logits(hidden_TD))
                sampled += ends
        if sampled:
            sequences = [chunk.sequence for chunk in sampled]
            drawn = sample(
                logits[0] if len(logits) == 1 else torch.cat(logits),
                [seq.sampling.temperature for seq in sequences],
                [seq.sampling.top_p for seq in sequences],
                [seq.uniforms.random() for seq in sequences],
            )
            results.update(zip(sampled, drawn, strict=True))
        return [results[chunk] for chunk in chunks if chunk.samples]

    def _split(self, chunks: List[Chunk]) -> tuple[List[Chunk], List[Chunk]]:
        """Chunks for the compiled or captured step, and the others, each in order."""
        if self.decode_network is None and self.graphs is None:
            return [], chunks
        placeholder = self.model.config.media_placeholder_token_id
        if self.graphs is not None:
            fast = [c for c in chunks if placeholder not in c.ids]
        else:
            fast = [c for c in chunks if c.num_tokens == 1 and c.next_id != placeholder]
        if len(fast) == len(chunks):
            return fast, []
        is_fast = set(fast)
        return fast, [chunk for chunk in chunks if chunk not in is_fast]

    def _decode(self, network: DecodeNetwork, chunks: List[Chunk]) -> Tensor:
        """Return logits [B, V]."""
        sequences = [chunk.sequence for chunk in chunks]
        return network.step(
            [chunk.next_id for chunk in chunks],
            [seq.num_computed_tokens for seq in sequences],
            [seq.pages for seq in sequences],
        )

    def _forward(self, chunks: List[Chunk]) -> Tensor:
        """Return the hidden states [X, D] of the last tokens of the chunks that sample."""
        ids: list[int] = []
        positions: list[int] = []
        last_rows: list[int] = []
        for chunk in chunks:
            start = chunk.sequence.num_computed_tokens
            ids += chunk.sequence.ids[start : start + chunk.num_tokens]
            positions += range(start, start + chunk.num_tokens)
            if chunk.samples:
                last_rows.append(len(ids) - 1)
        hidden_TD: Tensor = self.model(
            self._tensor(ids),
            self._tensor(positions),
            self._attention(chunks),
            self._media(chunks, ids),
        )
        return hidden_TD.index_select(0, self._tensor(last_rows))

    def _attention(self, chunks: List[Chunk]) -> PagedAttention:
        decodes = [chunk.sequence for chunk in chunks if chunk.num_tokens == 1]
        segments: list[Segment] = []
        slots: list[Tensor] = []
        decode_slots_BS, bias_BS = self._decode_slots(decodes)
        if decodes:
            last_B1 = self._tensor([seq.num_computed_tokens for seq in decodes])[:, None]
            slots.append(decode_slots_BS.gather(1, last_B1)[:, 0])
        for chunk in chunks[len(decodes) :]:
            start, num_tokens = chunk.sequence.num_computed_tokens, chunk.num_tokens
            slots_S = self._slots(chunk.sequence, start + num_tokens)
            is_seen_CS = None
            if start:
                shape = (num_tokens, start + num_tokens)
                is_seen_CS = torch.ones(shape, dtype=torch.bool, device=self.kv.device)
                is_seen_CS = is_seen_CS.tril(diagonal=start)
            segments.append(Segment(num_tokens, slots_S, is_seen_CS))
            slots.append(slots_S[start:])
        return PagedAttention(
            config=self.model.config.text_config,
            kv=self.kv,
            slots=torch.cat(slots),
            decode_slots=decode_slots_BS,
            decode_bias=bias_BS,
            segments=tuple(segments),
        )

    def _decode_slots(self, decodes: List[Sequence]) -> tuple[Tensor, Tensor]:
        """Slots of the keys of each decoding sequence and the bias of padding, both [B, S]."""
        num_keys = max((seq.num_computed_tokens + 1 for seq in decodes), default=0)
        num_pages = -(-num_keys // self.page_size)
        padded = [seq.pages[:num_pages] + [0] * (num_pages - len(seq.pages)) for seq in decodes]
        pages = self._tensor(padded).view(len(decodes), num_pages, 1)
        slots_BS = (pages * self.page_size + self.offsets).flatten(1)[:, :num_keys]
        lens_B1 = self._tensor([seq.num_computed_tokens + 1 for seq in decodes])[:, None]
        is_padding_BS = torch.arange(num_keys, device=self.kv.device) >= lens_B1
        bias_BS = torch.zeros(is_padding_BS.shape, dtype=self.kv.dtype, device=self.kv.device)
        return slots_BS, bias_BS.masked_fill(is_padding_BS, -torch.inf)

    def _slots(self, sequence: Sequence, num_tokens: int) -> Tensor:
        """Places of the first ``num_tokens`` tokens of a sequence."""
        pages = self._tensor(sequence.pages[: -(-num_tokens // self.page_size)])
        return (pages[:, None] * self.page_size + self.offsets).flatten()[:num_tokens]

    def _media(self, chunks: List[Chunk], ids: list[int]) -> Tensor | None:
        """Features of the placeholders among ``ids``, in order; ``None`` if there are none.

        A placeholder that was sampled has no picture and gets what the model gives it elsewhere:
        the embedding of id 0.
        """
        placeholder = self.model.config.media_placeholder_token_id
        if placeholder not in ids:
            return None
        parts: list[Tensor] = []
        for chunk in chunks:
            sequence = chunk.sequence
            start = sequence.num_computed_tokens
            before = sequence.ids[:start].count(placeholder)
            here = sequence.ids[start : start + chunk.num_tokens].count(placeholder)
            if here:
                parts.append(self._features(sequence, before + here)[before:])
        return torch.cat(parts)

    def _features(self, sequence: Sequence, num_placeholders: int) -> Tensor:
        if sequence.features is None:
            sequence.features = (
                self.model.encode_media(sequence.media.batch) if sequence.media else self.weight[:0]
            )
        num_bare = num_placeholders - len(sequence.features)
        if num_bare <= 0:
            return sequence.features[:num_placeholders]
        return torch.cat([sequence.features, self.weight[:1].expand(num_bare, -1)])

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.kv.device)
