"""Decoding on a CPU in float32: one compiled step for one token of each of a few sequences.

    KimiModel ──pack──> matrices in tiles, vectors, a table of where each lies ─┐
    ids, positions, pages of B rows ──> step on every thread (kernels/decode_step) ──> logits [B, V]

The step reads and writes the pages of the cache in place. It is compiled by numba; where that is
not installed, and everywhere else than on a CPU in float32, ``KimiModel.forward`` decodes.
"""

# Shapes: B = rows, one a sequence, D = hidden, H = heads, N = nope, R = rope, L = latent,
# V = value width, E = experts, I = inner width; A -> O = widths of one matrix.

from __future__ import annotations

import contextlib
import logging
import threading
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional

from swarm_sdk.model_backend.model.mla import up_projections
from swarm_sdk.model_backend.model.moe import MixtureOfExperts, SwiGLU
from swarm_sdk.model_backend.model.rope import text_rotation

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from swarm_sdk.model_backend.model.kimi import DecoderLayer, KimiModel

TILE = 16
MAX_THREADS = 4
"""Stages of a small network are too short for more (ours; measured with 2)."""


def is_supported(model: KimiModel) -> bool:
    """Whether this path is made for the model: float32 on the CPU, numba there, widths in tiles."""
    weight, text = model.embed_tokens.weight, model.config.text_config
    in_tiles = (text.hidden_size, text.q_lora_rank, text.kv_lora_rank, text.intermediate_size)
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and find_spec("numba") is not None
        and all(width % TILE == 0 for width in (*in_tiles, text.moe_intermediate_size))
        and text.num_attention_heads % 4 == 0
        and text.qk_nope_head_dim % 4 == 0
        and text.qk_rope_head_dim % 8 == 0
    )


class DecodeNetwork:
    """The weights of a model, packed, and the threads that step through them.

    Made anew when weights change. ``close`` ends the threads.
    """

    @torch.inference_mode()
    def __init__(self, model: KimiModel, kv: Tensor, *, page_size: int, max_rows: int) -> None:
        """Pack the weights; ``kv`` [layers, slots, W] is the cache that steps read and write."""
        # numba takes half a second to load: only where an engine decodes.
        from swarm_sdk.model_backend.kernels import decode_step as kernel

        text = model.config.text_config
        self._model = model
        packer, rows, head_norm, head = _pack(model)
        table = torch.tensor(rows)
        self.max_rows: int = max_rows
        """Of one step."""
        self.num_threads: int = min(torch.get_num_threads(), MAX_THREADS)
        num_pages = kv.shape[1] // page_size
        heads, padded_vocabulary = text.num_attention_heads, _padded(text.vocab_size)
        self._shape = kernel.Shape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            nope=text.qk_nope_head_dim,
            rope=text.qk_rope_head_dim,
            latent=text.kv_lora_rank,
            q_rank=text.q_lora_rank,
            experts=text.n_routed_experts,
            chosen=text.num_experts_per_tok,
            inner=text.moe_intermediate_size,
            vocabulary=text.vocab_size,
            a_padded=_padded(text.q_lora_rank + kv.shape[2]),
            q_padded=_padded(text.qk_head_dim),
            key_padded=_padded(kv.shape[2]),
            value_padded=_padded(text.v_head_dim),
            page_size=page_size,
            pages=min(num_pages, -(-text.max_position_embeddings // page_size)),
            slots=kv.shape[1],
            eps=text.rms_norm_eps,
            softmax_scale=text.softmax_scale,
            routed_scale=text.routed_scaling_factor,
            head_norm=head_norm,
            head=head,
        )
        shape, num_parts = self._shape, max(max_rows, 2 * self.num_threads**2)
        num_places = max_rows * (shape.chosen + 1)
        widest = max(text.intermediate_size, text.moe_intermediate_size * text.n_shared_experts)
        own_of_experts = max_rows * _padded(shape.experts) + num_places * (2 + 2 * TILE)
        own_of_attention = heads * (kernel.BLOCK + 9) + 16
        places_of_attention = 2 * (kernel.BLOCK + heads)

        def floats(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.float32)

        def integers(*sizes: int) -> Tensor:
            return torch.zeros(sizes, dtype=torch.int64)

        rotation = text_rotation(torch.arange(text.max_position_embeddings), text)
        self.logits: Tensor = floats(max_rows, padded_vocabulary)
        own = max_rows * shape.hidden + max(own_of_experts, own_of_attention)
        tensors: dict[str, Tensor] = dict(
            kv=kv.detach(),
            embedding=model.embed_tokens.weight.detach(),
            rotation=torch.view_as_real(rotation).contiguous(),
            ids=integers(max_rows),
            positions=integers(max_rows),
            pages=integers(max_rows, shape.pages),
            x=floats(max_rows, shape.hidden),
            a=floats(max_rows, shape.a_padded),
            q=floats(max_rows, heads, shape.q_padded),
            q_key=floats(max_rows, heads, shape.key_padded),
            parts=floats(num_parts, heads, shape.latent),
            stats=floats(num_parts, 2, heads),
            value=floats(max_rows, heads, shape.value_padded),
            inner=floats(num_places * shape.inner + max_rows * widest),
            logits=self.logits,
            best=integers(max_rows),
            logprobs=floats(max_rows),
            private=floats(self.num_threads, _padded(own)),
            places=integers(self.num_threads, 5 * num_places + shape.experts + places_of_attention),
            control=integers(kernel.ATTENTION + shape.layers),
        )
        per_thread = ("private", "places")
        arrays: dict[str, Any] = {
            name: (tensor if name in per_thread else tensor.flatten()).numpy()
            for name, tensor in tensors.items()
        }
        self._buffers = kernel.Buffers(**arrays)
        self._weights, self._vectors = weights, vectors = packer.packed(), torch.cat(packer.vectors)
        self.weight_bytes: int = weights.nbytes
        """Of all packed matrices."""
        self._arguments: tuple[Any, ...] = (
            self._shape,
            weights.numpy().view("uint32") if weights.dtype == torch.int32 else weights.numpy(),
            vectors.numpy(),
            table.numpy(),
            self._buffers,
        )
        self._kernel: Any = kernel
        self._pages: list[list[int]] = [[] for _ in range(max_rows)]
        """What the table of pages holds."""
        self._team: _Team | None = None
        self._is_compiled = False

    @torch.inference_mode()
    def refresh(self) -> bool:
        """Pack the model's new weights in place of the old; whether they fit there."""
        if self._weights.dtype != torch.float32:
            return False
        packer, *_ = _pack(self._model)
        if packer.is_bfloat16:
            return False
        packer.write(self._weights)
        torch.cat(packer.vectors, out=self._vectors)
        return True

    def step(self, ids: list[int], positions: list[int], pages: list[list[int]]) -> Tensor:
        """Compute one token of each row; returns logits [B, vocabulary], valid until the next step.

        Row i reads and writes the cache at its ``pages``. ``best`` tells the most likely ids.
        """
        buffers, num_rows = self._buffers, len(ids)
        buffers.ids[:num_rows] = ids
        buffers.positions[:num_rows] = positions
        width = self._shape.pages
        for row, held in enumerate(pages):
            if held != self._pages[row]:  # rarely: comparing is cheaper than copying
                self._pages[row] = held.copy()
                buffers.pages[row * width : row * width + len(held)] = held
        buffers.control[self._kernel.NUM_ROWS] = num_rows
        number = self._kernel.post(self._shape, buffers)
        if self.num_threads > 1:
            self._team = self._team or _Team(self)
            self._team.wake()
        with contextlib.nullcontext() if self._is_compiled else _said_while_compiling():
            self._kernel.run(*self._arguments, 0, self.num_threads, number - 1, 0)
        self._is_compiled = True
        return self.logits[:num_rows, : self._shape.vocabulary]

    def best(self, num_rows: int) -> list[tuple[int, float]]:
        """Most likely id of each row of the last step, and its log-probability."""
        ids, logprobs = self._buffers.best[:num_rows], self._buffers.logprobs[:num_rows]
        return list(zip(ids.tolist(), logprobs.tolist(), strict=True))

    def follow(self, thread: int, seen: int) -> int:
        """Take part in steps after ``seen`` as thread ``thread``; returns the last one."""
        arguments = (*self._arguments, thread, self.num_threads, seen, self._kernel.IDLE_SPINS)
        last: int = self._kernel.run(*arguments)
        return last

    def close(self) -> None:
        """End the threads."""
        if self._team:
            self._team.close()


@contextlib.contextmanager
def _said_while_compiling() -> Iterator[None]:
    """One line on stderr if a first step takes long: silence would look like a hang."""
    line = "compiling the decoding step for this processor: half a minute, once"
    timer = threading.Timer(2.0, logging.getLogger(__name__).warning, (line,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Team:
    """Threads beside the engine's: awake while steps follow each other, asleep otherwise."""

    def __init__(self, network: DecodeNetwork) -> None:
        self._network = network
        self._is_closed = False
        self._wakes = [threading.Event() for _ in range(1, network.num_threads)]
        self._threads = [
            threading.Thread(
                target=self._serve, args=(index, wake), name=f"swarm-decode-{index}", daemon=True
            )
            for index, wake in enumerate(self._wakes, start=1)
        ]
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        for wake in self._wakes:
            wake.set()

    def close(self) -> None:
        self._is_closed = True
        self.wake()
        for thread in self._threads:
            thread.join()

    def _serve(self, index: int, wake: threading.Event) -> None:
        seen = 0
        while True:
            wake.wait()
            wake.clear()
            if self._is_closed:
                return
            seen = self._network.follow(index, seen)


class _Packer:
    """Matrices as tiles of 16 columns, end to end, and vectors likewise; views until written."""

    def __init__(self) -> None:
        self.vectors: list[Tensor] = []
        self._tiles: list[Tensor] = []
        self._num_rows = 0
        self._num_values = 0

    def matrix(self, weight_OA: Tensor) -> int:
        """Add a matrix; returns its place in rows of 16 weights."""
        weight_OA = functional.pad(weight_OA, (0, 0, 0, -weight_OA.shape[0] % TILE))
        return self.tiles(weight_OA.view(-1, TILE, weight_OA.shape[1]))

    def tiles(self, weight: Tensor) -> int:
        """Add matrices whose last two dimensions are a tile's columns and their depth."""
        place = self._num_rows
        self._tiles.append(weight.detach().transpose(-1, -2))
        self._num_rows += weight.numel() // TILE
        return place

    def vector(self, weight_A: Tensor) -> int:
        """Add a vector, padded to whole tiles; returns its place in numbers."""
        place = self._num_values
        self.vectors.append(functional.pad(weight_A.detach(), (0, -len(weight_A) % TILE)))
        self._num_values += len(self.vectors[-1])
        return place

    @property
    def is_bfloat16(self) -> bool:
        """Whether bfloat16 holds every matrix without loss; told early where one is not."""
        return not any(bool((one.view(torch.int32) & 0xFFFF).any()) for one in self._tiles)

    def write(self, packed: Tensor) -> None:
        """Write all matrices, float32."""
        start = 0
        for one in self._tiles:
            packed[start : start + one.numel()].view(one.shape).copy_(one)
            start += one.numel()

    def packed(self) -> Tensor:
        """All matrices: float32, or words of two bfloat16 (int32) if that loses nothing."""
        tiles = torch.empty(self._num_rows * TILE, dtype=torch.float32)
        self.write(tiles)
        if not self.is_bfloat16:
            return tiles
        bits = tiles.view(torch.int32).view(-1, TILE)
        return (bits[:, :8] >> 16 & 0xFFFF | bits[:, 8:]).flatten()


def _pack(model: KimiModel) -> tuple[_Packer, list[list[int]], int, int]:
    """All layers; their rows of the table, and the places of the last norm and of the head."""
    packer = _Packer()
    rows = [_pack_layer(cast("DecoderLayer", layer), packer) for layer in model.layers]
    return packer, rows, packer.vector(model.norm.weight), packer.matrix(model.lm_head.weight)


def _pack_layer(layer: DecoderLayer, packer: _Packer) -> list[int]:
    """Pack a layer; returns its row of the table, in the order of the kernel's places."""
    attention, config = layer.self_attn, layer.self_attn.config
    heads = config.num_attention_heads
    w_uk_HNL, w_uv_HVL = up_projections(attention.kv_b_proj.weight, config)
    q_b = attention.q_b_proj.weight.view(heads, config.qk_head_dim, -1)
    out = attention.o_proj.weight.view(-1, heads, config.v_head_dim)
    out = functional.pad(out, (0, -config.v_head_dim % TILE))
    mixture = layer.mlp if isinstance(layer.mlp, MixtureOfExperts) else None
    shared = layer.mlp if isinstance(layer.mlp, SwiGLU) else layer.mlp.shared_experts
    return [
        packer.matrix(attention.qkv_a_proj.weight),
        _matrices(packer, q_b),
        _matrices(packer, w_uk_HNL.transpose(1, 2)),
        _matrices(packer, w_uv_HVL),
        packer.matrix(out.flatten(1)),
        packer.matrix(mixture.gate.weight) if mixture else 0,
        packer.tiles(_tiles_in_turn(mixture.experts.gate_up_proj)) if mixture else 0,
        _matrices(packer, mixture.experts.down_proj) if mixture else 0,
        packer.tiles(_tiles_in_turn(shared.gate_up_proj.weight)),
        packer.matrix(shared.down_proj.weight),
        packer.vector(layer.input_layernorm.weight),
        packer.vector(attention.q_a_layernorm.weight),
        packer.vector(attention.kv_a_layernorm.weight),
        packer.vector(layer.post_attention_layernorm.weight),
        packer.vector(mixture.gate.e_score_correction_bias) if mixture else 0,
        config.n_routed_experts if mixture else 0,
        shared.down_proj.weight.shape[1],
    ]


def _matrices(packer: _Packer, weights_EOA: Tensor) -> int:
    """Pack matrices one behind the other; returns the place of the first."""
    weights_EOA = functional.pad(weights_EOA, (0, 0, 0, -weights_EOA.shape[1] % TILE))
    num, _, depth = weights_EOA.shape
    return packer.tiles(weights_EOA.view(num, -1, TILE, depth))


def _tiles_in_turn(gate_up: Tensor) -> Tensor:
    """Each tile of gates before the tile of ups that belongs to it, for any number of experts."""
    *experts, _, depth = gate_up.shape
    return gate_up.view(*experts, 2, -1, TILE, depth).transpose(-4, -3)


def _padded(width: int) -> int:
    return -(-width // TILE) * TILE
