"""A SGLang platform that runs on any CPU with plain PyTorch operators.

SGLang's own CPU engine needs a build of sgl-kernel with AMX; this platform needs none. SGLang
finds it by the entry point group ``sglang.srt.platforms`` and uses it under
``SGLANG_PLATFORM=swarm_cpu``.
"""


def activate() -> str:
    """Tell SGLang which class to load."""
    return "swarm_sglang_cpu.platform.PlainCpuPlatform"
