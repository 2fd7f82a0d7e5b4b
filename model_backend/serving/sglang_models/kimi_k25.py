"""SGLang's Kimi K2.5 with float32 where rounding costs the trainer most: a sampler that it meets.

    SGLANG_EXTERNAL_MODEL_PACKAGE=swarm_sdk.model_backend.serving.sglang_models \
        swarm serve MODEL -- --enable-fp32-lm-head

    hidden ─> norm ─> attention ─(+)─> norm ─> router ─> experts ─(+)─> … ─> norm ─> lm_head
                                  │             fp32               │         fp32    fp32 (flag)
                                  └──────── residual, fp32 ────────┘

SGLang keeps the residual stream and the router's logits in bfloat16. Each sum of the stream then
rounds it, and near ties of the router fall otherwise than in a trainer that has both in float32.
The classes are SGLang's own, by name and by weights; only what they round to differs. Recorded
experts, replayed by the trainer, do the rest. Written against SGLang 0.5.11 and 0.5.23. Ours; the
report is silent about it.
"""

# mypy: ignore-errors
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.models import kimi_k25
from sglang.srt.models.deepseek_v2 import MoEGate
from torch.nn import functional


class _Float32Gate(MoEGate):
    """The router: products of bfloat16 numbers, summed and kept in float32."""

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Logits [T, E] in float32."""
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype == torch.bfloat16:
            return torch.mm(hidden_states, self.weight.t(), out_dtype=torch.float32)
        return functional.linear(hidden_states.float(), self.weight.float())


class _Exact(kimi_k25.KimiK25ForConditionalGeneration):
    """SGLang's model but for what is kept in float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        network = self.language_model.model
        for layer in network.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                _keep_residual(norm)
            if isinstance(getattr(layer.mlp, "gate", None), MoEGate):
                layer.mlp.gate.__class__ = _Float32Gate
        _keep_residual(network.norm)
        network.norm.override_orig_dtype = torch.float32  # what the output matrix reads


def _keep_residual(norm: RMSNorm) -> None:
    """SGLang's plain form of the norm, which can return the residual stream unrounded."""
    norm.fp32_residual = True
    norm._forward_method = norm.forward_native  # noqa: SLF001 - what SGLang dispatched to


_Exact.__name__ = "KimiK25ForConditionalGeneration"  # by which config.json asks for it
EntryClass: list[type] = [_Exact]
"""What SGLang looks for in each module of the package."""
