"""One step of the network: chunks of sequences in, the next token of each in turn out.

    chunks of one token ──> DecodeNetwork over DecodeRows          (float32 on the CPU)
    all others          ──> KimiModel over PagedAttention  ──> logits of last rows ──> sample

Both read and write the same cache. Elsewhere than on a CPU in float32, all chunks go the second
way, packed into one pass.
"""

# Shapes: T = rows of a pass, B = chunks of one token (first), X = sampled rows, V = vocabulary,
# C = rows of a chunk, S = keys, M = media tokens, D = hidden, Y = layers, W = one cached token.

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from swarm_sdk.model_backend.engine.attention import PagedAttention, Segment
from swarm_sdk.model_backend.engine.decode import DecodeNetwork
from swarm_sdk.model_backend.engine.pages import kv_pool
from swarm_sdk.model_backend.engine.rows import DecodeRows
from swarm_sdk.model_backend.engine.sampler import sample

if TYPE_CHECKING:
    from collections.abc import Sequence as List

    from torch import Tensor

    from swarm_sdk.model_backend.engine.rows import Band
    from swarm_sdk.model_backend.engine.scheduler import Chunk
    from swarm_sdk.model_backend.engine.sequence import Sequence
    from swarm_sdk.model_backend.model.kimi import KimiModel


class Runner:
    """The model and its cache on the device; knows nothing of requests' lives."""

    def __init__(self, model: KimiModel, *, num_pages: int, page_size: int) -> None:
        self.model: KimiModel = model
        self.page_size: int = page_size
        self.weight: Tensor = model.embed_tokens.weight.detach()
        self.kv: Tensor = kv_pool(model.config.text_config, num_pages * page_size, self.weight)
        self.offsets: Tensor = torch.arange(page_size, device=self.weight.device)
        self.rows: DecodeRows = DecodeRows(self.kv, self._computed_slots)
        self.refresh_weights()

    def refresh_weights(self) -> None:
        """Prepare what is derived from the weights; to be called after they change."""
        self.rows.clear()
        is_supported = DecodeNetwork.supports(self.model)
        self.decode_network: DecodeNetwork | None = (
            DecodeNetwork(self.model) if is_supported else None
        )

    @torch.inference_mode()
    def run(self, chunks: List[Chunk]) -> list[tuple[int, float]]:
        """Compute the chunks, those of one token first; sample where a chunk ends its sequence."""
        network, fast = self.decode_network, []
        if network is not None:
            placeholder = self.model.config.media_placeholder_token_id
            fast = [c for c in chunks if c.num_tokens == 1 and c.next_id != placeholder]
        rest = [chunk for chunk in chunks if chunk not in fast] if fast else chunks
        logits: list[Tensor] = []
        sampled: list[Chunk] = []
        # A sequence that computes anything in another way gives up its row, which would miss it.
        bands = self.rows.update(chunk.sequence for chunk in fast)
        if network is not None and fast:
            logits_XV, order = self._decode(network, fast, bands)
            logits.append(logits_XV)
            sampled += order
        if rest:
            hidden_TD = self._forward(rest)
            ends = [chunk for chunk in rest if chunk.samples]
            if ends:
                logits.append(self.model.logits(hidden_TD))
                sampled += ends
        if not sampled:
            return []
        sequences = [chunk.sequence for chunk in sampled]
        results = sample(
            logits[0] if len(logits) == 1 else torch.cat(logits),
            [seq.sampling.temperature for seq in sequences],
            [seq.sampling.top_p for seq in sequences],
            [seq.uniforms.random() for seq in sequences],
        )
        result_of = dict(zip(map(id, sampled), results, strict=True))
        return [result_of[id(chunk)] for chunk in chunks if chunk.samples]

    def _decode(
        self, network: DecodeNetwork, chunks: list[Chunk], bands: list[Band]
    ) -> tuple[Tensor, list[Chunk]]:
        """Return logits [X, V] and the chunks that they belong to."""
        chunk_of = {id(chunk.sequence): chunk for chunk in chunks}
        order = [chunk_of[id(sequence)] for band in bands for sequence in band.sequences]
        sequences = [chunk.sequence for chunk in order]
        positions = [seq.num_computed_tokens for seq in sequences]
        kv_YBW = self.kv.new_empty(self.kv.shape[0], len(order), self.kv.shape[2])
        logits_BV = network.logits(
            self._tensor([chunk.next_id for chunk in order]),
            self._tensor(positions),
            bands,
            kv_YBW,
        )
        size = self.page_size
        places = [
            seq.pages[position // size] * size + position % size
            for seq, position in zip(sequences, positions, strict=True)
        ]
        self.kv.index_copy_(1, self._tensor(places), kv_YBW)
        kept = [row for row, chunk in enumerate(order) if chunk.samples]
        if len(kept) == len(order):
            return logits_BV, order
        return logits_BV.index_select(0, self._tensor(kept)), [order[row] for row in kept]

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

    def _computed_slots(self, sequence: Sequence) -> Tensor:
        return self._slots(sequence, sequence.num_computed_tokens)

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
