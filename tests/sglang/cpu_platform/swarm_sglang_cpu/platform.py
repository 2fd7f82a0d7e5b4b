"""The platform class; SGLang imports it once the plugin is chosen."""

from typing import Any

import torch
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class PlainCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """A CPU without sgl-kernel, Triton or graph capture: every operator takes its native path."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        """Send MLA models down the absorbed path, and keep recorded experts in plain memory.

        ``torch_native`` reads only the latent cache; without an entry of its own it would get
        Triton's handler, which takes the multi-head form for a first prefill. Host memory for
        ``--enable-return-routed-experts`` would be pinned through CUDA.
        """
        # Imported here: the module asks for the platform while it loads.
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
        from sglang.srt.models.deepseek_common.attention_backend_handler import (
            AttentionBackendRegistry,
        )
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
            AttnForwardMethod,
        )

        AttentionBackendRegistry.register(
            "torch_native", lambda _attention, _batch: AttnForwardMethod.MLA
        )
        ALLOC_MEMORY_FUNCS["cpu"] = _unpinned


def _unpinned(dims: tuple[int, ...], dtype: torch.dtype, **_: Any) -> torch.Tensor:
    return torch.empty(dims, dtype=dtype)
