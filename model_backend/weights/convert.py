"""One checkpoint to another: bf16 <-> INT4 experts, tensor by tensor.

    headers of SOURCE ─> all there, nothing else, right shapes ─> files of TARGET ─> disk space
      ─> each file: read a matrix, convert it, write it; FILE.partial ─> FILE
      ─> tokenizer and other files, index, and config.json last: half a checkpoint never loads

SOURCE is Kimi K2.5 as released (INT4, 64 files), or any checkpoint of ours: the names are the same.
Memory is that of a few matrices. What was killed goes on with the first file that is not there.

INT4 -> bf16 -> INT4 gives the same bits. ``int4.quantize`` finds nearly every group again; those
that it would write otherwise (a group of zeros has any scale) are kept beside the bf16 weights in
``FILE.int4_groups``, and are used on the way back where the weights are still the same.
"""

# Shapes: O = rows, I = columns of a matrix, N = its groups of 32, row by row, M = some of them.

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import KimiConfig
from swarm_sdk.model_backend.model.config_json import read_json
from swarm_sdk.model_backend.weights import int4
from swarm_sdk.model_backend.weights.check import check_complete
from swarm_sdk.model_backend.weights.checkpoint import (
    int4_parts,
    read_int4,
    write_json,
)
from swarm_sdk.model_backend.weights.files import read_tensor, write_tensors
from swarm_sdk.model_backend.weights.headers import (
    INDEX_FILE,
    TensorInfo,
    read_header,
    read_headers,
)
from swarm_sdk.model_backend.weights.layout import (
    CODES_PER_WORD,
    GROUP,
    MAX_SHARD_BYTES,
    StoredTensor,
    index_of,
    shards,
    stored_tensors,
)
from swarm_sdk.model_backend.weights.quantization import is_int4 as has_int4_experts
from swarm_sdk.model_backend.weights.quantization import with_quantization

Form = Literal["bf16", "int4"]
JOURNAL = "conversion.json"
"""Lies in TARGET until the conversion is complete; tells what is being converted."""
GROUPS_SUFFIX = ".int4_groups"
WORDS = GROUP // CODES_PER_WORD


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Told after each file of the target."""

    file: str
    num_files: int
    """Files that are complete."""
    of_files: int
    num_bytes: int
    """Bytes of them."""
    of_bytes: int
    was_there: bool
    """Whether an earlier, broken-off conversion had written the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """What a conversion did."""

    source_form: Form
    form: Form
    num_tensors: int
    num_files: int
    num_bytes: int
    num_files_kept: int
    """Files that an earlier, broken-off conversion had written."""
    num_exact_groups: int
    """INT4 groups that were kept beside the bf16 weights, or taken from there."""
    wall_s: float


def convert(
    source: Path,
    target: Path,
    to: Form,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    on_file: Callable[[Progress], None] = lambda _: None,
) -> Converted:
    """Write the checkpoint in ``source`` into the folder ``target`` with experts as ``to``.

    All other weights become bf16 (the router's correction bias float32). ``target`` is new, empty,
    or holds the same conversion broken off, which then goes on.

    Raises:
        ConfigError: a file of ``source`` is missing or damaged; a tensor is missing, misshapen, not
            finite or none of the network's; ``target`` holds something else or is being written;
            the disk has too little room. Names the file; nothing is written before these checks but
            for numbers that are not finite.
    """
    started_s = time.perf_counter()
    config_json = read_json(source)
    config = KimiConfig.from_hf(config_json)
    is_int4 = has_int4_experts(config_json)
    headers = read_headers(source)
    check_complete(headers, config, source, is_int4=is_int4)
    files = shards(stored_tensors(config, int4=to == "int4"), max_shard_bytes)
    sizes = {file: sum(tensor.num_bytes for tensor in shard) for file, shard in files.items()}
    job = {
        "source": str(source.resolve()),
        "to": to,
        "max_shard_bytes": max_shard_bytes,
        "files": sorted(
            [info.name, info.stat().st_size, info.stat().st_mtime_ns]
            for info in {tensor.file for tensor in headers.values()}
        ),
    }
    with _claimed(target, job):
        kept = {file for file, shard in files.items() if _is_written(target / file, shard)}
        _check_disk(target, sum(size for file, size in sizes.items() if file not in kept))
        work = _Work(headers, _known_groups(source), is_source_int4=is_int4)
        num_bytes = 0
        for number, (file, shard) in enumerate(files.items(), start=1):
            if file not in kept:
                work.write(target / file, shard, to)
            num_bytes += sizes[file]
            on_file(
                Progress(
                    file=file,
                    num_files=number,
                    of_files=len(files),
                    num_bytes=num_bytes,
                    of_bytes=sum(sizes.values()),
                    was_there=file in kept,
                )
            )
        _copy_others(source, target)
        if index := index_of(files):
            write_json(target / INDEX_FILE, index)
        described = _with_dtype(config_json)
        if is_int4 != (to == "int4"):
            described = with_quantization(described, int4=to == "int4")
        write_json(target / "config.json", described)
    return Converted(
        source_form="int4" if is_int4 else "bf16",
        form=to,
        num_tensors=sum(map(len, files.values())),
        num_files=len(files),
        num_bytes=num_bytes,
        num_files_kept=len(kept),
        num_exact_groups=work.num_exact_groups,
        wall_s=time.perf_counter() - started_s,
    )


class _Work:
    """Converts matrices; counts the groups that only the record of their bits brings back."""

    def __init__(
        self,
        headers: dict[str, TensorInfo],
        known_groups: dict[str, Path],
        *,
        is_source_int4: bool,
    ) -> None:
        self._headers = headers
        self._known_groups = known_groups
        self._is_source_int4 = is_source_int4
        self._groups: dict[str, Tensor] = {}
        self.num_exact_groups = 0

    def write(self, path: Path, shard: list[StoredTensor], to: Form) -> None:
        """Write one file of the target."""
        self._groups = {}
        values = self._int4_values(shard) if to == "int4" else self._bf16_values(shard)
        write_tensors(path, shard, self._with_groups_first(values, path))

    def _with_groups_first(
        self, values: Iterator[tuple[str, Tensor]], path: Path
    ) -> Iterator[tuple[str, Tensor]]:
        """The values; when all are made the groups are on disk, before the file has its name."""
        yield from values
        if self._groups:
            save_file(self._groups, path.with_suffix(GROUPS_SUFFIX))

    def _bf16_values(self, shard: list[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        for stored in shard:
            tensor = stored.of
            if not (self._is_source_int4 and tensor.is_routed_expert):
                yield stored.name, self._plain(stored)
                continue
            weight = read_int4(tensor.name, tensor.shape, self._headers.__getitem__)
            w_OI = int4.dequantize(weight)
            self._remember(tensor.name, weight, int4.quantize(w_OI))
            yield stored.name, w_OI

    def _int4_values(self, shard: list[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
        for stored in shard:
            tensor = stored.of
            if not tensor.is_routed_expert:
                yield stored.name, self._plain(stored)
            elif stored.name.endswith("_packed"):
                if self._is_source_int4:
                    weight = read_int4(tensor.name, tensor.shape, self._headers.__getitem__)
                else:
                    w_OI = self._finite(tensor.name).to(torch.bfloat16)
                    weight = self._recalled(tensor.name, w_OI, int4.quantize(w_OI))
                yield from int4_parts(tensor.name, weight)

    def _plain(self, stored: StoredTensor) -> Tensor:
        return self._finite(stored.name).to(
            torch.float32 if stored.of.is_float32 else torch.bfloat16
        )

    def _finite(self, name: str) -> Tensor:
        info = self._headers[name]
        value = read_tensor(info)
        if not value.isfinite().all():
            raise ConfigError(f"{info.file} is damaged: {name} holds numbers that are not finite")
        return value

    def _remember(self, name: str, weight: int4.Int4Weight, again: int4.Int4Weight) -> None:
        """Keep the groups that would be quantised to other bits than they had."""
        packed_NW, scale_N = _by_group(weight)
        again_NW, again_N = _by_group(again)
        is_other_N = (packed_NW != again_NW).any(dim=1)
        is_other_N |= scale_N.view(torch.int16) != again_N.view(torch.int16)
        index_M = is_other_N.nonzero().flatten()
        if len(index_M):
            self._groups |= {
                f"{name}.index": index_M,
                f"{name}.packed": packed_NW[index_M].contiguous(),
                f"{name}.scale": scale_N[index_M].contiguous(),
            }
            self.num_exact_groups += len(index_M)

    def _recalled(self, name: str, w_OI: Tensor, weight: int4.Int4Weight) -> int4.Int4Weight:
        """``weight``, with the bits that groups had once where those still say ``w_OI``."""
        path = self._known_groups.get(name)
        if path is None:
            return weight
        groups = _read_groups(path)
        index_M = groups[f"{name}.index"]
        packed_MW, scale_M = groups[f"{name}.packed"], groups[f"{name}.scale"]
        said_MK = int4.dequantize(int4.Int4Weight(packed_MW, scale_M[:, None]))
        is_same_M = (said_MK == w_OI.reshape(-1, GROUP)[index_M]).all(dim=1)
        index_M = index_M[is_same_M]
        packed_NW, scale_N = (part.clone() for part in _by_group(weight))
        packed_NW[index_M], scale_N[index_M] = packed_MW[is_same_M], scale_M[is_same_M]
        self.num_exact_groups += len(index_M)
        return int4.Int4Weight(
            packed_NW.view(weight.packed.shape), scale_N.view(weight.scale.shape)
        )


def _by_group(weight: int4.Int4Weight) -> tuple[Tensor, Tensor]:
    return weight.packed.reshape(-1, WORDS), weight.scale.reshape(-1)


def _known_groups(source: Path) -> dict[str, Path]:
    """The file that keeps groups of a matrix, by the name of the matrix."""
    return {
        name.removesuffix(".index"): path
        for path in sorted(source.glob(f"*{GROUPS_SUFFIX}"))
        for name in read_header(path)
        if name.endswith(".index")
    }


def _read_groups(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} is damaged: {error}; delete it to go on without") from None


@contextmanager
def _claimed(target: Path, job: dict[str, Any]) -> Iterator[None]:
    """Hold ``target`` for this job alone; the journal goes when the job is done."""
    path = target / JOURNAL
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; give a folder to be made")
    if not path.exists() and target.is_dir() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty; give a new folder")
    target.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is converting into {target}") from None
        journal.seek(0)
        text = journal.read()
        if not text:
            journal.write(json.dumps(job))
            journal.flush()
        elif text != json.dumps(job):
            raise ConfigError(
                f"{target} holds a broken-off conversion of something else, or its source has "
                "changed; delete the folder or give another"
            )
        for partial in target.glob("*.partial"):
            partial.unlink()
        yield
        path.unlink()


def _is_written(path: Path, shard: list[StoredTensor]) -> bool:
    if not path.exists():
        return False
    there = {(info.name, info.dtype, info.shape) for info in read_header(path).values()}
    return there == {(tensor.name, tensor.dtype, tensor.shape) for tensor in shard}


def _check_disk(target: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(target).free
    if num_bytes > free:
        raise ConfigError(
            f"the converted checkpoint needs {num_bytes / 1e9:.1f} GB more at {target} and the "
            f"disk has {free / 1e9:.1f} GB free; make room or give another folder"
        )


def _copy_others(source: Path, target: Path) -> None:
    """Tokenizer, template, processor, licence: all but weights, index and config."""
    for file in source.iterdir():
        is_weights = file.suffix in (".safetensors", GROUPS_SUFFIX, ".partial")
        if file.is_file() and not is_weights and file.name not in ("config.json", INDEX_FILE):
            shutil.copyfile(file, target / file.name)


def _with_dtype(config_json: Any) -> dict[str, Any]:
    content = {**config_json, "text_config": dict(config_json["text_config"])}
    for section in (content, content["text_config"]):
        for key in ("dtype", "torch_dtype"):
            if key in section:
                section[key] = "bfloat16"
    return content
