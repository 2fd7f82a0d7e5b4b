"""Our Triton kernels compile for Hopper, at the shapes of K2.5; the compiler needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from swarm_sdk.model_backend.kernels.tiled_attention import (
    WIDEST_KEY,
    WIDEST_NARROW,
    WIDEST_VALUE,
    Tiles,
    parts_of,
)

pytest.importorskip("triton")

COMPILE = """
import importlib, json, sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
found = []
for place, told, constants, options in json.loads(sys.stdin.read()):
    module, name = place.split(".")
    kernel = getattr(importlib.import_module(f"swarm_sdk.model_backend.kernels.{module}"), name)
    types = dict(one.split("=") for one in told.split())
    kinds = {one: types.get(one, "constexpr") for one in kernel.arg_names}
    values = {(kernel.arg_names.index(one),): value for one, value in constants.items()}
    whole = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(kinds.values())
        if kind[0] == "*" or kind == "i32"
    }
    source = ASTSource(kernel, kinds, constexprs=values, attrs=whole)
    made = triton.compile(source, target=HOPPER, options=options)
    found.append({"place": place, "shared": made.metadata.shared, "ptx": made.asm["ptx"]})
for one in found:
    ptx = one.pop("ptx")
    one["words"] = [word for word in ("wgmma", "cp.async.bulk.tensor", "mma.sync") if word in ptx]
print(json.dumps(found))
"""

MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one program may take on Hopper."""
TILES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "PROGRAMS": 132, "PRECISION": "ieee"}
TILED = {"num_warps": 8, "num_stages": 4}
KERNELS = [
    (
        "triton_kernels.grouped_product",
        (
            "x_tiles=tensordesc<bf16[128,64]> w_tiles=tensordesc<bf16[256,64]> out=*bf16 "
            "starts=*i32 ends=*i32 first_tiles=*i32 expert_of_tile=*i32 num_experts=i32 N=i32 K=i32"
        ),
        {"W_IS_NK": True, **TILES},
        TILED,
    ),
    (
        "triton_kernels.grouped_outer",
        (
            "left_tiles=tensordesc<bf16[64,128]> right_tiles=tensordesc<bf16[64,256]> out=*bf16 "
            "starts=*i32 ends=*i32 num_experts=i32 M=i32 N=i32"
        ),
        TILES,
        TILED,
    ),
    (
        "triton_kernels.choose",
        "logits=*fp32 bias=*fp32 ids=*i64 weights=*fp32 scores=*fp32 num_experts=i32 scale=fp32",
        {"CHOSEN": 8, "CHOSEN_BLOCK": 8, "BLOCK": 512},
        {"num_warps": 1},
    ),
    (
        "triton_kernels.swiglu_backward",
        "h=*bf16 weights=*fp32 d_a=*bf16 d_h=*bf16 d_weights=*fp32 a=*bf16 inner=i32",
        {"BLOCK": 2048},
        {},
    ),
    (
        "paged_attention_triton.attend",
        (
            "q=*bf16 kv=*bf16 pages=*i64 sequences=*i64 positions=*i64 out=*bf16 scale=fp32 "
            "num_heads=i32 num_pages=i32"
        ),
        {"LATENT": 512, "ROPE": 64, "PAGE": 16, "HEADS": 16, "KEYS": 32},
        {},
    ),
]
"""Module and name, types of the arguments, compile-time values, options."""


def attention_kernels(width, value_width, *, is_causal, has_prefix):
    """The three of packed attention with the tiles of these widths."""
    (k0, k1), (v0, v1) = parts_of(width), parts_of(value_width)
    widths = {"K": width, "K0": k0, "K1": k1, "V": value_width, "V0": v0, "V1": v1}
    tiles = Tiles.of(width)
    for name, given, streams, has in (
        ("forward", "q out", "k v", {"HAS_PREFIX": has_prefix}),
        ("backward_queries", "q out d_out d_q", "k v", {"HAS_PREFIX": has_prefix}),
        ("backward_keys", "k v d_k d_v", "q d_out", {}),
    ):
        tile = getattr(tiles, name)
        rows = tile.queries if name == "backward_keys" else tile.keys
        told = [f"{one}=*bf16" for one in given.split()]
        for one in streams.split():
            first, second = parts_of(width if one in "qk" else value_width)
            told += [f"{one}0_tiles=tensordesc<bf16[{rows},{first}]>"]
            told += [f"{one}1_tiles=tensordesc<bf16[{rows},{second or first}]>"]
        told += ["log_sums=*fp32", "deltas=*fp32", "tiles=*i32", "ranges=*i32"]
        told += ["num_tokens=i32", "num_heads=i32", "scale=fp32"]
        sizes = {"QUERIES": tile.queries, "KEYS": tile.keys, "IS_CAUSAL": is_causal}
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        yield f"attention_triton.{name}", " ".join(told), sizes | has | widths, options


KERNELS += [
    *attention_kernels(WIDEST_KEY, WIDEST_VALUE, is_causal=True, has_prefix=True),
    *attention_kernels(WIDEST_NARROW, WIDEST_VALUE, is_causal=True, has_prefix=True),
    *attention_kernels(64, 32, is_causal=True, has_prefix=True),
    *attention_kernels(72, 72, is_causal=False, has_prefix=False),
]


def test_kernels_compile_for_hopper_and_fit_its_shared_memory() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        input=json.dumps(KERNELS),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [made["place"] for made in found] == [place for place, *_ in KERNELS]
    for made in found:
        place, words = made["place"], set(made["words"])
        assert made["shared"] <= MAX_SHARED, place
        if place == "paged_attention_triton.attend":
            assert "mma.sync" in words
        elif "grouped" in place or place.startswith("attention_triton"):
            # Hopper's own products and copies, and no others.
            assert words == {"wgmma", "cp.async.bulk.tensor"}, place
