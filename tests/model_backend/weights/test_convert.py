"""Conversions: exact there and back, bounded, broken off and gone on with, refused by name."""

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import k25, tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights import convert as module
from swarm_sdk.model_backend.weights import int4
from swarm_sdk.model_backend.weights.check import check_complete
from swarm_sdk.model_backend.weights.checkpoint import load, save
from swarm_sdk.model_backend.weights.convert import Progress, convert
from swarm_sdk.model_backend.weights.headers import TensorInfo, read_headers
from swarm_sdk.model_backend.weights.layout import stored_tensors

EXPERT = "language_model.model.layers.1.mlp.experts.3.up_proj.weight"
SHARD = 60_000


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same_bits(a: Path, b: Path) -> None:
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype, name
        assert torch.equal(value.view(torch.uint8), two[name].view(torch.uint8)), name


@pytest.fixture
def released(tiny_model: KimiModel, tmp_path: Path) -> Path:
    """As the release: INT4, several files, scales of its own, codes that no rule would choose."""
    folder = tmp_path / "released"
    save(tiny_model, folder, max_shard_bytes=SHARD, is_int4=True)
    generator = torch.Generator().manual_seed(3)
    for file in folder.glob("*.safetensors"):
        changed = load_file(file)
        for name, value in changed.items():
            if name.endswith("_packed"):
                codes = torch.randint(-8, 8, (value.shape[0], value.shape[1] * 8))
                changed[name] = int4.pack(codes)
            if name.endswith("_scale"):
                drawn = torch.rand(value.shape, generator=generator) * 0.1 + 0.01
                changed[name] = drawn.to(torch.bfloat16)
        if f"{EXPERT}_packed" in changed:
            packed, scale = changed[f"{EXPERT}_packed"], changed[f"{EXPERT}_scale"]
            packed[0] = int4.pack(torch.zeros(1, 64, dtype=torch.int8))  # all zeros: any scale
            packed[1] = int4.pack(torch.full((1, 64), 3, dtype=torch.int8))  # one code alone
            packed[2], scale[2] = int4.pack(torch.arange(64)[None] % 5 - 2), 0.75  # small codes
            scale[3], scale[4] = 0.0, -0.5  # which no one would write
        save_file(changed, file)
    (folder / "tiktoken.model").write_text("tokens")
    return folder


def test_int4_to_bf16_to_int4_gives_the_same_bits(released: Path, tmp_path: Path) -> None:
    there = convert(released, tmp_path / "bf16", "bf16", max_shard_bytes=SHARD)
    back = convert(tmp_path / "bf16", tmp_path / "int4", "int4", max_shard_bytes=SHARD)
    assert (there.source_form, there.form, back.source_form) == ("int4", "bf16", "bf16")
    assert 0 < there.num_exact_groups == back.num_exact_groups < 20
    assert_same_bits(released, tmp_path / "int4")
    assert back.num_files == len(list(released.glob("*.safetensors"))) > 2
    for name in ("config.json", "generation_config.json", "tiktoken.model"):
        assert (tmp_path / "int4" / name).read_text() == (released / name).read_text()
    assert not list((tmp_path / "int4").glob("*.int4_groups"))


def test_the_bf16_form_is_the_dequantised_model(released: Path, tmp_path: Path) -> None:
    convert(released, tmp_path / "bf16", "bf16", max_shard_bytes=SHARD)
    assert "quantization_config" not in (tmp_path / "bf16" / "config.json").read_text()
    wanted = load(released).state_dict()
    for name, value in load(tmp_path / "bf16").state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_weights_that_changed_since_are_not_given_their_old_bits(
    released: Path, tmp_path: Path
) -> None:
    bf16 = tmp_path / "bf16"
    convert(released, bf16, "bf16")
    changed = tensors(bf16)
    changed[EXPERT][0, :32] = torch.linspace(-1, 1, 32)  # the group of zeros was trained
    save_file(changed, bf16 / "model.safetensors")
    convert(bf16, tmp_path / "int4", "int4")
    new = tensors(tmp_path / "int4")
    weight = int4.Int4Weight(new[f"{EXPERT}_packed"], new[f"{EXPERT}_scale"])
    error = int4.dequantize(weight)[0, :32].float() - torch.linspace(-1, 1, 32)
    assert error.abs().max() < 0.08
    assert torch.equal(weight.scale[1:], tensors(released)[f"{EXPERT}_scale"][1:])


def test_float32_of_ours_becomes_bf16_and_stays_bf16(tiny_model: KimiModel, tmp_path: Path) -> None:
    save(tiny_model, tmp_path / "ours")
    save(tiny_model, tmp_path / "wanted", dtype=torch.bfloat16)
    convert(tmp_path / "ours", tmp_path / "bf16", "bf16")
    convert(tmp_path / "bf16", tmp_path / "again", "bf16", max_shard_bytes=SHARD)
    for made in ("bf16", "again"):
        assert_same_bits(tmp_path / "wanted", tmp_path / made)
        assert json.loads((tmp_path / made / "config.json").read_text())["dtype"] == "bfloat16"


KILLED = """
import os, signal, sys
from pathlib import Path
from swarm_sdk.model_backend.weights.convert import convert
def kill(progress):
    if progress.num_files == 3: os.kill(os.getpid(), signal.SIGKILL)
source, target = map(Path, sys.argv[1:3])
convert(source, target, "bf16", max_shard_bytes=int(sys.argv[3]), on_file=kill)
"""


def test_a_killed_conversion_goes_on_with_the_files_that_are_missing(
    released: Path, tmp_path: Path
) -> None:
    target = tmp_path / "bf16"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, released, target, str(SHARD)], check=False
    )
    assert killed.returncode == -9
    (target / "model-00009.partial").write_text("half a file")
    with pytest.raises(ConfigError, match=r"config.json is missing"):
        load(target)
    (target / "model-00002-of-00011.safetensors").unlink(missing_ok=True)
    times = {file: file.stat().st_mtime_ns for file in target.glob("*.safetensors")}
    told: list[Progress] = []
    done = convert(released, target, "bf16", max_shard_bytes=SHARD, on_file=told.append)
    assert done.num_files_kept == len(times) >= 2
    assert [one.was_there for one in told].count(True) == len(times)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    convert(released, tmp_path / "wanted", "bf16", max_shard_bytes=SHARD)
    assert_same_bits(tmp_path / "wanted", target)
    assert {f.name for f in target.iterdir()} == {f.name for f in (tmp_path / "wanted").iterdir()}


def test_a_broken_off_conversion_of_something_else_is_refused(
    released: Path, tmp_path: Path
) -> None:
    target = tmp_path / "bf16"
    subprocess.run([sys.executable, "-c", KILLED, released, target, str(SHARD)], check=False)
    with pytest.raises(ConfigError, match="broken-off conversion of something else"):
        convert(released, target, "int4")
    with pytest.raises(ConfigError, match="is not empty; give a new folder"):
        convert(released, released, "bf16")


MEMORY = """
import resource, sys
from pathlib import Path
from swarm_sdk.model_backend.weights.convert import convert
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
source, scratch, target, to, shard = sys.argv[1:]
convert(Path(source), Path(scratch), to)      # a small one first: code and allocators are warm
before = peak()
convert(Path(target + "-source"), Path(target), to, max_shard_bytes=int(shard))
print(peak() - before)
"""


@pytest.mark.parametrize("to", ["bf16", "int4"])
def test_memory_stays_under_two_files_however_large_the_checkpoint(
    tiny_model: KimiModel, tmp_path: Path, to: str
) -> None:
    import dataclasses

    shard = 16_000_000
    text = dataclasses.replace(tiny().text_config, hidden_size=1024, moe_intermediate_size=512)
    vision = dataclasses.replace(tiny().vision_config, text_hidden_size=1024)
    large = KimiModel(dataclasses.replace(tiny(), text_config=text, vision_config=vision))
    large.init_weights(seed=0)
    target = tmp_path / "target"
    save(large, f"{target}-source", torch.bfloat16, shard, is_int4=to == "bf16")
    save(tiny_model, tmp_path / "small", torch.bfloat16, is_int4=to == "bf16")
    arguments = [tmp_path / "small", tmp_path / "scratch", target, to, str(shard)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True
    )
    total = sum(info.num_bytes for info in read_headers(target).values())
    total += sum(info.num_bytes for info in read_headers(Path(f"{target}-source")).values())
    assert total > 4 * shard
    assert int(done.stdout) < 2 * shard


def test_too_small_a_disk_is_told_before_anything_is_written(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(1, 1, 100_000))
    with pytest.raises(ConfigError, match=r"needs 0\.[0-9] GB more .* has 0\.0 GB free"):
        convert(released, tmp_path / "bf16", "bf16")
    assert not list((tmp_path / "bf16").glob("*.safetensors"))


def change(folder: Path, name: str, value: torch.Tensor | None) -> Path:
    """Rewrite the file that holds ``name``."""
    file = read_headers(folder)[EXPERT + "_packed"].file
    changed: dict[str, Any] = {**load_file(file), name: value}
    save_file({key: one for key, one in changed.items() if one is not None}, file)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    if value is None:
        del content["weight_map"][name]
    else:
        content["weight_map"][name] = file.name
    index.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{EXPERT}_scale", None, "lacks 1 of the"),
        ("language_model.mtp.weight", torch.zeros(2), "1 tensors are too many"),
        (f"{EXPERT}_packed", torch.zeros(32, 4, dtype=torch.int32), r"has the shape \[32, 4\]"),
        (f"{EXPERT}_scale", torch.zeros(32, 2), "holds F32, not BF16"),
    ],
    ids=["missing", "extra", "misshapen", "of another type"],
)
def test_a_wrong_tensor_is_refused_by_name_before_anything_is_written(
    released: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    change(released, name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        convert(released, tmp_path / "bf16", "bf16")
    assert name in str(caught.value)
    assert not (tmp_path / "bf16").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "not finite", "missing"])
def test_a_corrupted_file_is_named(released: Path, tmp_path: Path, damage: str) -> None:
    file = read_headers(released)[EXPERT + "_packed"].file
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-7])
    elif damage == "garbage":
        file.write_bytes(b"\xff" * 1000)
    elif damage == "missing":
        file.unlink()
    else:
        bad = torch.full((32, 2), torch.inf, dtype=torch.bfloat16)
        file = change(released, f"{EXPERT}_scale", bad)
    with pytest.raises(ConfigError) as caught:
        convert(released, tmp_path / "bf16", "bf16", max_shard_bytes=SHARD)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "bf16" / "config.json").exists()


def test_the_names_and_shapes_of_the_true_model_are_what_the_converter_asks_for() -> None:
    """The 61 layers and 384 experts of K2.5, without its terabyte."""
    headers = {
        stored.name: TensorInfo(
            name=stored.name,
            dtype=stored.dtype,
            shape=stored.shape,
            file=Path("model-00001-of-00064.safetensors"),
            begin=0,
        )
        for stored in stored_tensors(k25(), int4=True)
    }
    assert len(headers) == 208_550
    check_complete(headers, k25(), Path("K2.5"), is_int4=True)
    del headers["language_model.model.layers.60.mlp.experts.383.down_proj.weight_scale"]
    with pytest.raises(ConfigError, match=r"lacks 1 of the 208550 .*383.down_proj.weight_s"):
        check_complete(headers, k25(), Path("K2.5"), is_int4=True)


def test_the_command_converts_and_says_what_it_did(released: Path, tmp_path: Path) -> None:
    def swarm(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        code = "from swarm_sdk.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code, "checkpoint", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    target = tmp_path / "bf16"
    done = swarm("convert", released, target, "--to", "bf16", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["num_tensors"] == len(tensors(target))
    assert "1 of 1 files" in done.stderr
    shown = json.loads(swarm("show", target, "--json").stdout)
    assert (shown["experts"], shown["tensors"]) == ("bf16", len(tensors(target)))
    refused = swarm("convert", released, tmp_path / "other", "--to", "fp8")
    assert refused.returncode == 2
    assert "unknown form 'fp8'" in refused.stderr
    shutil.rmtree(released)
    gone = swarm("show", released)
    assert (gone.returncode, gone.stdout) == (2, "")
    assert "Traceback" not in gone.stderr
