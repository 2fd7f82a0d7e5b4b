"""What a checkpoint needs of GPUs, and what GPUs there are; nothing is loaded to tell.

    weights        the bytes in the headers of the safetensors files, split over tp GPUs
    KV cache       2 bytes * (kv_lora_rank + qk_rope_head_dim) * layers a token, on every GPU
    the rest       10 % of a GPU: CUDA, graphs, activations (SGLang keeps about as much)

The latent cache of MLA has one head, so tensor parallelism does not split it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import KimiConfig
from swarm_sdk.model_backend.weights.headers import read_headers

USABLE = 0.9
"""Share of a GPU's memory that weights and cache may take."""
CACHE_BYTES = 2
"""Bytes of one number of the cache (bf16)."""
GB = 1e9
ANSWERS_WITHIN_S = 60.0
"""How long ``nvidia-smi`` may take."""
MEMINFO = Path("/proc/meminfo")
"""Where Linux tells what programs can get; files that it keeps in memory give way to them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one copy of a model takes."""

    weight_bytes: int
    cache_bytes_per_token: int
    context_tokens: int

    def per_gpu(self, tp: int) -> float:
        """Bytes on each of ``tp`` GPUs with room for one context."""
        return self.weight_bytes / tp + self.cache_bytes_per_token * self.context_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU of this machine."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


def needs_of(folder: Path, config: KimiConfig, context_tokens: int | None) -> Needs:
    """Read what the checkpoint in ``folder`` needs (``None``: its longest context).

    Raises:
        ConfigError: a file is missing or damaged, or the context is longer than the model's.
    """
    text = config.text_config
    longest = text.max_position_embeddings
    if context_tokens is not None and not 0 < context_tokens <= longest:
        raise ConfigError(f"--context-length must be 1 to {longest}, got {context_tokens}")
    numbers = (text.kv_lora_rank + text.qk_rope_head_dim) * text.num_hidden_layers
    return Needs(
        weight_bytes=sum(info.num_bytes for info in read_headers(folder).values()),
        cache_bytes_per_token=CACHE_BYTES * numbers,
        context_tokens=context_tokens or longest,
    )


def find_gpus() -> list[Gpu]:
    """List the GPUs that ``nvidia-smi`` tells and ``CUDA_VISIBLE_DEVICES`` allows, in its order.

    Raises:
        ConfigError: the driver does not answer, or not what memory a GPU has; a GPU that is to be
            visible is not there.
    """
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,uuid,memory.total,memory.free,name"
    try:
        done = subprocess.run(  # noqa: S603
            [program, query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            check=False,
            timeout=ANSWERS_WITHIN_S,
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(
            f"nvidia-smi has not answered for {ANSWERS_WITHIN_S:g} s; the driver hangs"
        ) from None
    if done.returncode:
        raise ConfigError(f"nvidia-smi fails: {(done.stderr or done.stdout).strip()[:200]}")
    if done.stdout.startswith("No devices"):
        return []
    rows = [
        [part.strip() for part in line.split(",", 4)] for line in done.stdout.strip().splitlines()
    ]
    return [_gpu(*row) for row in _visible(rows)]


def _visible(rows: list[list[str]]) -> list[list[str]]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return rows
    chosen = []
    for part in visible.split(","):
        name = part.strip()
        if name in ("", "-1"):  # CUDA reads no further
            break
        found = [
            row for row in rows if row[0] == name or ("GPU-" in name and row[1].startswith(name))
        ]
        if len(found) != 1:
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES names '{name}', which is none of the {len(rows)} GPUs that "
                "nvidia-smi lists; give whole GPUs by index or uuid"
            )
        chosen += found
    return chosen


def _gpu(index: str, uuid: str, total: str, free: str, name: str) -> Gpu:
    try:
        return Gpu(
            index=int(index),
            name=name,
            total_bytes=int(total) * 2**20,
            free_bytes=int(free) * 2**20,
        )
    except ValueError:
        raise ConfigError(
            f"nvidia-smi does not tell the memory of GPU {index} ({name}, {uuid}) but '{total}'; "
            "hide it with CUDA_VISIBLE_DEVICES, or launch SGLang by hand"
        ) from None


def choose_tp(
    needs: Needs, gpus: list[Gpu], *, servers: int, tp: int | None, dp: int, num_heads: int
) -> int:
    """Return over how many GPUs each copy is split: ``tp``, or the fewest that hold it.

    Raises:
        ConfigError: there is no GPU, there are too few, or the model does not fit; with numbers.
    """
    need = (
        f"the model needs {needs.weight_bytes / GB:.{_digits(needs.weight_bytes)}f} GB of GPU "
        f"memory for the weights and "
        f"{needs.cache_bytes_per_token * needs.context_tokens / GB:.2f} GB on each GPU for one "
        f"context of {needs.context_tokens} tokens"
    )
    if not gpus:
        raise ConfigError(f"{need}, and no GPU was found; --device cpu serves small models")
    each = gpus[0]
    found = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} of {each.total_bytes / GB:.0f} GB found"
    sizes = [size for size in (1, 2, 4, 8, 16, 32, 64) if num_heads % size == 0]
    for size in sizes if tp is None else [tp]:
        if size * dp * servers > len(gpus):
            break
        used = gpus[: size * dp * servers]
        if all(needs.per_gpu(size) <= USABLE * gpu.free_bytes for gpu in used):
            return size
    most = tp or max((s for s in sizes if s * dp * servers <= len(gpus)), default=1)
    if most * dp * servers > len(gpus):
        raise ConfigError(
            f"{servers} servers x tp {most} x dp {dp} need {most * dp * servers} GPUs: {found}"
        )
    free = min(gpu.free_bytes for gpu in gpus[: most * dp * servers])
    raise ConfigError(
        f"{need}; {found} ({free / GB:.1f} GB free), and with --tp {most} each would need "
        f"{needs.per_gpu(most) / GB:.1f} GB of the {USABLE * free / GB:.1f} GB that may be used: "
        "use more GPUs, a shorter --context-length or INT4 experts (swarm checkpoint convert)"
    )


def check_ram(needs: Needs, copies: int) -> None:
    """Check that the weights fit into this machine's memory, for servers on the CPU.

    Raises:
        ConfigError: they do not.
    """
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 2**10
    if copies * needs.weight_bytes > free:
        raise ConfigError(
            f"{copies} x {needs.weight_bytes / GB:.2f} GB of weights do not fit into the "
            f"{free / GB:.2f} GB of memory that are free"
        )


def _digits(num_bytes: int) -> int:
    return 0 if num_bytes > 10 * GB else 2
