"""The kernel of ``paged_attention``; imported only where Triton runs."""

# One program: row t, a block of heads. Shapes: H = heads of the block, L = latent, R = rope,
# S = keys of a block.

# mypy: ignore-errors
# pyright: basic, reportMissingImports=false
# ruff: noqa: ANN001, ANN201

import triton
import triton.language as tl


@triton.jit
def attend(
    q,
    kv,
    pages,
    sequences,
    positions,
    out,
    scale,
    num_heads,
    num_pages,
    LATENT: tl.constexpr,
    ROPE: tl.constexpr,
    PAGE: tl.constexpr,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Running softmax over the keys of one row, a block at a time (FlashAttention's recurrence)."""
    WIDTH: tl.constexpr = LATENT + ROPE
    row = tl.program_id(0).to(tl.int64)
    heads_H = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    is_head_H = heads_H < num_heads
    position = tl.load(positions + row)
    table = pages + tl.load(sequences + row) * num_pages
    in_latent_L = tl.arange(0, LATENT)
    in_rope_R = LATENT + tl.arange(0, ROPE)

    q_H = q + (row * num_heads + heads_H) * WIDTH
    q_latent_HL = tl.load(q_H[:, None] + in_latent_L, mask=is_head_H[:, None], other=0.0)
    q_rope_HR = tl.load(q_H[:, None] + in_rope_R, mask=is_head_H[:, None], other=0.0)
    most_H = tl.full([HEADS], float("-inf"), tl.float32)
    total_H = tl.zeros([HEADS], tl.float32)
    sum_HL = tl.zeros([HEADS, LATENT], tl.float32)
    for start in range(0, position + 1, KEYS):
        keys_S = start + tl.arange(0, KEYS)
        is_seen_S = keys_S <= position
        page_S = tl.load(table + keys_S // PAGE, mask=is_seen_S, other=0)
        key_S = kv + (page_S * PAGE + keys_S % PAGE) * WIDTH
        latent_SL = tl.load(key_S[:, None] + in_latent_L, mask=is_seen_S[:, None], other=0.0)
        rope_SR = tl.load(key_S[:, None] + in_rope_R, mask=is_seen_S[:, None], other=0.0)
        logits_HS = tl.dot(q_latent_HL, tl.trans(latent_SL), input_precision="ieee")
        logits_HS += tl.dot(q_rope_HR, tl.trans(rope_SR), input_precision="ieee")
        logits_HS = tl.where(is_seen_S[None, :], logits_HS * scale, float("-inf"))
        higher_H = tl.maximum(most_H, tl.max(logits_HS, 1))
        weights_HS = tl.exp(logits_HS - higher_H[:, None])
        shrink_H = tl.exp(most_H - higher_H)
        total_H = total_H * shrink_H + tl.sum(weights_HS, 1)
        added_HL = tl.dot(weights_HS.to(latent_SL.dtype), latent_SL, input_precision="ieee")
        sum_HL = sum_HL * shrink_H[:, None] + added_HL
        most_H = higher_H
    out_H = out + (row * num_heads + heads_H) * LATENT
    result_HL = (sum_HL / total_H[:, None]).to(out.dtype.element_ty)
    tl.store(out_H[:, None] + in_latent_L, result_HL, mask=is_head_H[:, None])
