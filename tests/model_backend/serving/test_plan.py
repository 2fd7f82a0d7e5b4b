"""What is checked before anything loads, and the commands that come of it."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import k25
from swarm_sdk.model_backend.serving import memory
from swarm_sdk.model_backend.serving.memory import Gpu, Needs, choose_tp, find_gpus, needs_of
from swarm_sdk.model_backend.serving.plan import HEALTH, Ask, Plan, plan
from swarm_sdk.model_backend.weights.layout import stored_tensors
from swarm_sdk.model_backend.weights.quantization import with_quantization


def value(launched: Plan, flag: str, server: int = 0) -> str:
    command = launched.servers[server].command
    return command[command.index(flag) + 1]


@functools.cache
def k25_needs(context: int = 262_144) -> Needs:
    size = sum(tensor.num_bytes for tensor in stored_tensors(k25(), int4=True))
    return Needs(weight_bytes=size, cache_bytes_per_token=70_272, context_tokens=context)


def gpus_of(number: int, gb: float) -> list[Gpu]:
    size = int(gb * 1e9)
    return [Gpu(index=i, name="GPU", total_bytes=size, free_bytes=size) for i in range(number)]


def test_the_needs_of_nano_come_from_its_headers() -> None:
    from swarm_sdk.model_backend.model.config import KimiConfig

    needs = needs_of(nano_directory(), KimiConfig.from_hf(nano_directory()), None)
    size = (nano_directory() / "model.safetensors").stat().st_size
    assert size - 100_000 < needs.weight_bytes < size
    assert (needs.cache_bytes_per_token, needs.context_tokens) == (2 * (128 + 32) * 7, 8192)


def test_k25_that_does_not_fit_is_told_in_one_sentence_with_the_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_tp(k25_needs(), gpus_of(4, 80), servers=1, tp=None, dp=1, num_heads=64)
    said = str(caught.value)
    assert "needs 595 GB of GPU memory for the weights" in said
    assert "18.42 GB on each GPU for one context of 262144 tokens" in said
    assert "4 GPUs of 80 GB found" in said
    assert "with --tp 4 each would need 167.2 GB of the 72.0 GB" in said
    assert "\n" not in said
    with pytest.raises(ConfigError, match="no GPU was found"):
        choose_tp(k25_needs(), [], servers=1, tp=None, dp=1, num_heads=64)


@pytest.mark.parametrize(
    ("number", "gb", "context", "tp"),
    [(8, 141, 262_144, 8), (8, 141, 8192, 8), (8, 192, 262_144, 4), (16, 80, 262_144, 16)],
)
def test_the_fewest_gpus_that_hold_a_copy_are_taken(
    number: int, gb: float, context: int, tp: int
) -> None:
    found = gpus_of(number, gb)
    assert choose_tp(k25_needs(context), found, servers=1, tp=None, dp=1, num_heads=64) == tp


def test_more_copies_than_gpus_are_refused() -> None:
    needs = Needs(weight_bytes=1, cache_bytes_per_token=1, context_tokens=1)
    with pytest.raises(ConfigError, match="2 servers x tp 2 x dp 1 need 4 GPUs: 3 GPUs of 80 GB"):
        choose_tp(needs, gpus_of(3, 80), servers=2, tp=2, dp=1, num_heads=64)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, [0, 1, 2, 3]),
        ("1,3", [1, 3]),
        ("3, 1", [3, 1]),
        ("GPU-22-aa,0", [2, 0]),
        ("GPU-33", [3]),
        ("", []),
        ("-1", []),
        ("1,-1,2", [1]),
    ],
)
def test_gpus_are_those_that_the_environment_shows_in_its_order(
    gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    found: list[int],
) -> None:
    gpus(4)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.index for gpu in find_gpus()] == found


@pytest.mark.parametrize("visible", ["7", "MIG-5c89", "GPU-"])
def test_a_visible_gpu_that_nobody_knows_is_said_in_one_sentence(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch, visible: str
) -> None:
    gpus(4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ConfigError, match=f"CUDA_VISIBLE_DEVICES names '{visible}'"):
        find_gpus()


def test_a_gpu_whose_memory_is_not_told_is_said_in_one_sentence_unless_it_is_hidden(
    gpus: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2, mebibytes="[N/A]")
    with pytest.raises(ConfigError, match=r"does not tell the memory of GPU 0 .*'\[N/A\]'"):
        find_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_gpus() == []


def test_a_driver_that_hangs_is_said_in_one_sentence(
    gpus: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(1)
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(memory, "ANSWERS_WITHIN_S", 0.2)
    with pytest.raises(ConfigError, match=r"nvidia-smi has not answered for 0\.2 s"):
        find_gpus()


def test_memory_that_holds_cached_files_counts_as_free_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    needs = Needs(weight_bytes=10**9, cache_bytes_per_token=1, context_tokens=1)
    meminfo.write_text("MemTotal: 9000000 kB\nMemFree: 1000 kB\nMemAvailable: 1200000 kB\n")
    memory.check_ram(needs, copies=1)
    with pytest.raises(ConfigError, match=r"2 x 1.00 GB .* the 1.23 GB of memory"):
        memory.check_ram(needs, copies=2)


def test_one_server_gets_flags_that_fit_the_model(
    python: str, gpus: Callable[..., None], port: int
) -> None:
    gpus(2)
    extra = ("--mem-fraction-static", "0.5")
    made = plan(Ask(folder=nano_directory(), port=port, python=python, ep=1, extra=extra))
    (server,) = made.servers
    assert made.router is None
    assert made.url == server.url == f"http://127.0.0.1:{port}"
    assert server.command[:3] == (python, "-m", "sglang.launch_server")
    assert server.command[-2:] == extra
    assert value(made, "--attention-backend") == "triton"  # its cache is 128 + 32 wide
    assert value(made, "--max-running-requests") == "256"
    assert value(made, "--tool-call-parser") == value(made, "--reasoning-parser") == "kimi_k2"
    assert value(made, "--ep-size") == "1"
    assert server.environment == HEALTH | {"CUDA_VISIBLE_DEVICES": "0"}
    assert "--tp-size" not in server.command


def test_several_servers_share_the_gpus_behind_a_router(
    python: str, gpus: Callable[..., None], port: int
) -> None:
    gpus(4)
    made = plan(Ask(folder=nano_directory(), port=port, python=python, servers=2, tp=2))
    assert [server.environment["CUDA_VISIBLE_DEVICES"] for server in made.servers] == ["0,1", "2,3"]
    assert value(made, "--tp-size") == "2"
    assert [value(made, "--port", one) for one in (0, 1)] == [str(port + 1), str(port + 2)]
    assert made.router is not None
    assert made.url == f"http://127.0.0.1:{port}"
    urls = [server.url for server in made.servers]
    at = made.router.command.index("--worker-urls")
    assert list(made.router.command[at + 1 :]) == urls


def int4_folder(folder: Path) -> Path:
    """A folder whose config says INT4; its one file is nano's."""
    folder.mkdir()
    content: dict[str, Any] = json.loads((nano_directory() / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(with_quantization(content, int4=True)))
    (folder / "model.safetensors").symlink_to(nano_directory() / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"servers": 0}, "--servers must be at least 1"),
        ({"tp": 0}, "--tp must be at least 1"),
        ({"context_tokens": 9000}, "--context-length must be 1 to 8192, got 9000"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"port": 70000}, "--port must be 1 to 65535"),
        ({"python": "/nowhere/python"}, "cannot run: No such file"),
        ({"python": "/bin/false"}, "is no working Python"),
        ({"folder": Path("/nowhere")}, "no model at"),
    ],
)
def test_a_mistake_is_one_sentence(
    python: str, gpus: Callable[..., None], port: int, changes: dict[str, Any], message: str
) -> None:
    gpus(1)
    with pytest.raises(ConfigError, match=message):
        plan(Ask(**{"folder": nano_directory(), "port": port, "python": python} | changes))


def test_a_missing_install_is_told_with_the_way_to_get_it(
    python: str, gpus: Callable[..., None], port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus(2)
    monkeypatch.setenv("INSTALLED", "[true, false]")
    plan(Ask(folder=nano_directory(), port=port, python=python))
    with pytest.raises(ConfigError, match="pip install sglang-router"):
        plan(Ask(folder=nano_directory(), port=port, python=python, servers=2))
    monkeypatch.setenv("INSTALLED", "[false, false]")
    with pytest.raises(ConfigError, match="SGLang is not installed for"):
        plan(Ask(folder=nano_directory(), port=port, python=python))


def test_a_port_in_use_is_refused(python: str, gpus: Callable[..., None], port: int) -> None:
    import socket

    gpus(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port + 2))
        taken.listen()
        plan(Ask(folder=nano_directory(), port=port, python=python))
        with pytest.raises(ConfigError, match=f"127.0.0.1:{port + 2} cannot be used"):
            plan(Ask(folder=nano_directory(), port=port, python=python, servers=2))


def test_on_the_cpu_int4_is_refused_and_bf16_gets_plain_flags(
    python: str, port: int, tmp_path: Path
) -> None:
    made = plan(Ask(folder=nano_directory(), port=port, python=python, device="cpu"))
    assert value(made, "--attention-backend") == "torch_native"
    assert made.servers[0].environment == HEALTH
    folder = int4_folder(tmp_path / "int4")
    with pytest.raises(ConfigError, match=r"INT4 experts on GPUs only; .*--to bf16"):
        plan(Ask(folder=folder, port=port, python=python, device="cpu"))


@pytest.mark.parametrize(
    ("tp", "int4", "others", "is_tuned"),
    [(1, False, "", True), (2, False, "", False), (1, True, "", False), (1, False, "/mine", False)],
    ids=["k2.5's experts", "halves of them", "int4", "the user's own"],
)
def test_experts_of_a_tuned_shape_get_the_tiles_that_were_tuned(
    tmp_path: Path,
    python: str,
    gpus: Callable[..., None],
    port: int,
    monkeypatch: pytest.MonkeyPatch,
    *,
    tp: int,
    int4: bool,
    others: str,
    is_tuned: bool,
) -> None:
    gpus(2)
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    if others:
        monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", others)
    folder = tmp_path / "model"
    shutil.copytree(nano_directory(), folder)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= {"n_routed_experts": 384, "moe_intermediate_size": 2048}
    (folder / "config.json").write_text(json.dumps(with_quantization(content, int4=int4)))
    (server,) = plan(Ask(folder=folder, port=port, python=python, tp=tp)).servers
    assert "--moe-runner-backend" not in server.command  # SGLang chooses
    place = server.environment.get("SGLANG_MOE_CONFIG_DIR")
    assert (place is not None) == is_tuned
    if place is not None:
        name = "configs/triton_3_6_0/E=384,N=2048,device_name=NVIDIA_H200.json"
        tiles = json.loads((Path(place) / name).read_text())
        assert set(tiles["4096"]) == {
            *(f"BLOCK_SIZE_{axis}" for axis in "MNK"),
            *("GROUP_SIZE_M", "num_warps", "num_stages"),
        }
