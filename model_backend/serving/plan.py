"""From what a user asks for to the commands that serve it.

    one server     sglang.launch_server on --port
    several        one on each of the ports behind --port, GPUs shared out in order, and
                   sglang_router.launch_router on --port (cache_aware: a prompt goes where its
                   prefix lies), for chat completions: it has no /model_info, no /abort_request and
                   drops return_routed_experts, so ``SglangEngine`` asks the servers themselves

Flags are chosen where the model leaves no choice: parsers of Kimi's tool calls and thinking, Triton
attention for a latent cache that is not 512 + 64 wide, tuned tiles for bf16 experts where there are
some (``moe/``, made by ``benchmarks/gpu/kernels.py``), plain PyTorch on a CPU. What follows ``--``
on the command line is given to SGLang as it is, after ours, so it wins.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import KimiConfig
from swarm_sdk.model_backend.model.config_json import read_json
from swarm_sdk.model_backend.serving.memory import (
    Gpu,
    Needs,
    check_ram,
    choose_tp,
    find_gpus,
    needs_of,
)
from swarm_sdk.model_backend.weights.quantization import found_quantization

PARSERS = ("--tool-call-parser", "kimi_k2", "--reasoning-parser", "kimi_k2")
CPU_FLAGS = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
    *("--cuda-graph-backend-decode", "disabled", "--cuda-graph-backend-prefill", "disabled"),
    *("--disable-overlap-schedule", "--mem-fraction-static", "0.2"),
)
HEALTH = {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "false"}
"""/health answers without a token, for a server that is paused (new weights, memory lent to a
training step) makes none. A batch that hangs ends the server by SGLang's own --watchdog-timeout."""
K25_CACHE = (512, 64)
"""Widths of the latent cache for which SGLang's own choice of attention kernels is made."""
NARROW_CACHE_FLAGS = ("--attention-backend", "triton", "--max-running-requests", "256")
"""For other widths, nano's among them. SGLang's own bound is 4,096 requests, with which 0.5.11 died
of an illegal memory access while it warmed up, in four quiet starts of nano on an H200; with 256 it
did not in two. The cause was not found."""
MOE = Path(__file__).with_name("moe")
"""Tile shapes of SGLang's fused experts, laid out as ``SGLANG_MOE_CONFIG_DIR`` is read."""
PROBE = (
    "import importlib.util, json\n"
    "print(json.dumps([bool(importlib.util.find_spec(name)) for name in "
    "('sglang', 'sglang_router')]))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What ``swarm serve`` was asked for."""

    folder: Path
    """Checkpoint with all that a server needs (``servable.py``)."""
    host: str = "127.0.0.1"
    port: int = 30000
    servers: int = 1
    tp: int | None = None
    """GPUs that share each copy's layers; ``None`` takes the fewest that hold it."""
    ep: int | None = None
    """GPUs that share the experts (``--ep-size``); ``None`` leaves it to SGLang."""
    dp: int = 1
    """Copies inside a server (``--dp-size``)."""
    context_tokens: int | None = None
    device: str = "cuda"
    """``cuda`` or ``cpu``."""
    python: str = "python3"
    """The interpreter that has SGLang."""
    extra: Sequence[str] = ()
    """Further flags of SGLang."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One process to be kept running."""

    name: str
    command: tuple[str, ...]
    url: str
    environment: dict[str, str]
    """Variables besides those of the parent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is launched: the servers, and the router in front of several."""

    servers: tuple[Launch, ...]
    router: Launch | None
    needs: Needs
    tp: int

    @property
    def url(self) -> str:
        """Where clients of chat completions go; ours goes to each of the servers."""
        return self.router.url if self.router else self.servers[0].url


def plan(ask: Ask) -> Plan:
    """Check everything that can be checked before a weight is loaded, and give the commands.

    Raises:
        ConfigError: the checkpoint is missing or damaged; GPUs or memory are not enough, with the
            numbers; SGLang or its router is not installed; a port is taken; a number is no use.
    """
    for name in ("servers", "tp", "ep", "dp"):
        number = getattr(ask, name)
        if number is not None and number < 1:
            raise ConfigError(f"--{name} must be at least 1, got {number}")
    if ask.device not in ("cuda", "cpu"):
        raise ConfigError(f"unknown device '{ask.device}'; use --device cuda or --device cpu")
    config_json = read_json(ask.folder)
    config = KimiConfig.from_hf(config_json)
    needs = needs_of(ask.folder, config, ask.context_tokens)
    gpus: list[Gpu] = []
    if ask.device == "cpu":
        if found_quantization(config_json) is not None:
            raise ConfigError(
                "SGLang serves INT4 experts on GPUs only; convert the checkpoint for the CPU: "
                "swarm checkpoint convert SRC DST --to bf16"
            )
        check_ram(needs, ask.servers * ask.dp)
        tp = ask.tp or 1
    else:
        gpus = find_gpus()
        heads = config.text_config.num_attention_heads
        tp = choose_tp(needs, gpus, servers=ask.servers, tp=ask.tp, dp=ask.dp, num_heads=heads)
    _check_installed(ask)
    ports = [ask.port] if ask.servers == 1 else list(range(ask.port, ask.port + ask.servers + 1))
    for port in ports:
        _check_port(ask.host, port)
    width = tp * ask.dp
    servers = tuple(
        _server(ask, config, number, port, tp, gpus[number * width : (number + 1) * width])
        for number, port in enumerate(ports[-ask.servers :])
    )
    router = _router(ask, servers) if len(servers) > 1 else None
    return Plan(servers=servers, router=router, needs=needs, tp=tp)


def _server(
    ask: Ask, config: KimiConfig, number: int, port: int, tp: int, gpus: Sequence[Gpu]
) -> Launch:
    text = config.text_config
    flags = ["--model-path", str(ask.folder), "--trust-remote-code"]
    flags += ["--host", ask.host, "--port", str(port), *PARSERS]
    if ask.device == "cpu":
        flags += CPU_FLAGS
        flags += ["--max-total-tokens", str(4 * (ask.context_tokens or 8192))]
    else:
        if (text.kv_lora_rank, text.qk_rope_head_dim) != K25_CACHE:
            flags += NARROW_CACHE_FLAGS
        flags += ["--enable-metrics"]
    if tp > 1:
        flags += ["--tp-size", str(tp)]
    if ask.ep is not None:
        flags += ["--ep-size", str(ask.ep)]
    if ask.dp > 1:
        flags += ["--dp-size", str(ask.dp)]
    if ask.context_tokens is not None:
        flags += ["--context-length", str(ask.context_tokens)]
    environment = dict(HEALTH)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(str(gpu.index) for gpu in gpus)
        if _is_tuned(ask, config, tp, gpus[0]) and "SGLANG_MOE_CONFIG_DIR" not in os.environ:
            environment["SGLANG_MOE_CONFIG_DIR"] = str(MOE)
    return Launch(
        name=f"server-{number}",
        command=(ask.python, "-m", "sglang.launch_server", *flags, *ask.extra),
        url=f"http://{ask.host}:{port}",
        environment=environment,
    )


def _is_tuned(ask: Ask, config: KimiConfig, tp: int, gpu: Gpu) -> bool:
    """Whether ``MOE`` has a file for the share of the experts that each GPU holds."""
    if ask.ep is not None or found_quantization(read_json(ask.folder)) is not None:
        return False
    text = config.text_config
    width, device = text.moe_intermediate_size // tp, gpu.name.replace(" ", "_")
    name = f"E={text.n_routed_experts},N={width},device_name={device}.json"
    return any((folder / name).is_file() for folder in (MOE / "configs").iterdir())


def _router(ask: Ask, servers: Sequence[Launch]) -> Launch:
    flags = ["--host", ask.host, "--port", str(ask.port), "--policy", "cache_aware"]
    return Launch(
        name="router",
        command=(
            *(ask.python, "-m", "sglang_router.launch_router", *flags),
            *("--worker-urls", *(server.url for server in servers)),
        ),
        url=f"http://{ask.host}:{ask.port}",
        environment={},
    )


def _check_installed(ask: Ask) -> None:
    try:
        done = subprocess.run(  # noqa: S603  the user's Python
            [ask.python, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120
        )
        has_sglang, has_router = json.loads(done.stdout)
    except OSError as error:
        raise ConfigError(f"--python {ask.python} cannot run: {error.strerror}") from None
    except (subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(f"--python {ask.python} is no working Python: {error}") from None
    if not has_sglang:
        raise ConfigError(
            f"SGLang is not installed for {ask.python}; pip install sglang, or give the Python "
            "that has it with --python"
        )
    if ask.servers > 1 and not has_router:
        raise ConfigError(
            f"{ask.servers} servers need SGLang's router, which is not installed for {ask.python}; "
            "pip install sglang-router"
        )


def _check_port(host: str, port: int) -> None:
    if not 0 < port < 65536:
        raise ConfigError(f"--port must be 1 to 65535, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"{host}:{port} cannot be used ({error.strerror}); give another --port"
            ) from None
