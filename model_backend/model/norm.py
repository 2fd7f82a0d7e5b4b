"""The norm of the text layers, in the dtype of what it norms."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    """``x / rms(x) * weight``; float32 weights under autocast norm as an engine's own do.

    PyTorch's fused kernel wants both in one dtype; without it a norm is six kernels forward and a
    dozen backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Norm the last dimension."""
        weight = self.weight.to(x.dtype)
        return functional.rms_norm(x, tuple(self.normalized_shape), weight, self.eps)
