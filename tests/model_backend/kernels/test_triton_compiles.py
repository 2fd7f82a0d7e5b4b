"""Our Triton kernels compile for Hopper, at the shapes of K2.5; the compiler needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

COMPILE = """
import importlib, json, sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = GPUTarget("cuda", 90, 32)
found = {}
for module, name, types, constants, options in json.loads(sys.stdin.read()):
    kernel = getattr(importlib.import_module(f"swarm_sdk.model_backend.kernels.{module}"), name)
    kinds = {one: types.get(one, "constexpr") for one in kernel.arg_names}
    values = {(kernel.arg_names.index(one),): value for one, value in constants.items()}
    whole = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(kinds.values())
        if kind[0] == "*" or kind == "i32"
    }
    source = ASTSource(kernel, kinds, constexprs=values, attrs=whole)
    made = triton.compile(source, target=HOPPER, options=options)
    found[name] = {"shared": made.metadata.shared, "ptx": made.asm["ptx"]}
for one in found.values():
    ptx = one.pop("ptx")
    one["words"] = [word for word in ("wgmma", "cp.async.bulk.tensor", "mma.sync") if word in ptx]
print(json.dumps(found))
"""

MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one program may take on Hopper."""
TILES = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "PROGRAMS": 132, "PRECISION": "ieee"}
TILED = {"num_warps": 8, "num_stages": 4}
STARTS = {"starts": "*i32", "ends": "*i32", "num_experts": "i32"}
KERNELS = [
    (
        "triton_kernels",
        "grouped_product",
        {
            "x_tiles": "tensordesc<bf16[128,64]>",
            "w_tiles": "tensordesc<bf16[256,64]>",
            **STARTS,
            "out": "*bf16",
            "first_tiles": "*i32",
            "expert_of_tile": "*i32",
            "N": "i32",
            "K": "i32",
        },
        {"W_IS_NK": True, **TILES},
        TILED,
    ),
    (
        "triton_kernels",
        "grouped_outer",
        {
            "left_tiles": "tensordesc<bf16[64,128]>",
            "right_tiles": "tensordesc<bf16[64,256]>",
            **STARTS,
            "out": "*bf16",
            "M": "i32",
            "N": "i32",
        },
        TILES,
        TILED,
    ),
    (
        "triton_kernels",
        "choose",
        {
            "logits": "*fp32",
            "bias": "*fp32",
            "ids": "*i64",
            "weights": "*fp32",
            "scores": "*fp32",
            "num_experts": "i32",
            "scale": "fp32",
        },
        {"CHOSEN": 8, "CHOSEN_BLOCK": 8, "BLOCK": 512},
        {"num_warps": 1},
    ),
    (
        "triton_kernels",
        "swiglu_backward",
        {
            "h": "*bf16",
            "weights": "*fp32",
            "d_a": "*bf16",
            "d_h": "*bf16",
            "d_weights": "*fp32",
            "a": "*bf16",
            "inner": "i32",
        },
        {"BLOCK": 2048},
        {},
    ),
    (
        "paged_attention_triton",
        "attend",
        {
            "q": "*bf16",
            "kv": "*bf16",
            "pages": "*i64",
            "sequences": "*i64",
            "positions": "*i64",
            "out": "*bf16",
            "scale": "fp32",
            "num_heads": "i32",
            "num_pages": "i32",
        },
        {"LATENT": 512, "ROPE": 64, "PAGE": 16, "HEADS": 16, "KEYS": 32},
        {},
    ),
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
    assert found.keys() == {name for _, name, *_ in KERNELS}
    for name, made in found.items():
        assert made["shared"] <= MAX_SHARED, name
    for name in ("grouped_product", "grouped_outer"):  # Hopper's own products and copies
        assert {"wgmma", "cp.async.bulk.tensor"} <= set(found[name]["words"]), name
    assert "mma.sync" in found["attend"]["words"]
