"""What the GPU scripts share: checkpoints to serve, and a SGLang server for as long as needed.

    with Server(checkpoint, log, device="cuda", flags=[…]) as server:    ready, or SystemExit
        server.url

On the CPU (device="cpu") the scripts run in miniature against `.venv-sglang`, to prove the way.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.model.config import KimiConfig, k25, nano
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.weights import checkpoint
from swarm_sdk.model_backend.weights.servable import write_processor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ON_CUDA = [
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--mm-attention-backend", "triton_attn", "--grammar-backend", "none"),
    *("--moe-runner-backend", "triton", "--enable-return-routed-experts"),
    # More than any script here needs. What is free would be gigabytes of recorded experts to pin.
    *("--max-total-tokens", "262144"),
]
ON_CPU = [
    *("--device", "cpu", "--dtype", "float32", "--attention-backend", "torch_native"),
    *("--sampling-backend", "pytorch", "--cuda-graph-backend-decode", "disabled"),
    *("--cuda-graph-backend-prefill", "disabled", "--disable-overlap-schedule"),
    *("--max-total-tokens", "32768", "--enable-return-routed-experts", "--sleep-on-idle"),
]
DUMMIES = "dummies"
"""Package of the model class that starts without weights on a GPU."""
EXACT = "swarm_sdk.model_backend.serving.sglang_models"
TELL_EVERY_S = 10.0
HIGHEST_PORT = 65_535 - 10_000
CPU_ENVIRONMENT = {"SGLANG_PLATFORM": "swarm_cpu", "SGLANG_USE_CPU_ENGINE": "0"}


def true_shapes(num_layers: int, num_experts: int = 384) -> KimiConfig:
    """K2.5's layers, `num_layers` of them, with nano's vocabulary and a shorter context."""
    small, full = nano(), k25()
    text = dataclasses.replace(
        full.text_config,
        num_hidden_layers=num_layers,
        n_routed_experts=num_experts,
        vocab_size=small.text_config.vocab_size,
        max_position_embeddings=16_384,
    )
    return dataclasses.replace(small, text_config=text, vision_config=full.vision_config)


def middle() -> KimiConfig:
    """384 experts and K2.5's heads in a model of half a billion parameters."""
    config = true_shapes(4)
    text = dataclasses.replace(
        config.text_config,
        hidden_size=1024,
        intermediate_size=2048,
        moe_intermediate_size=256,
        num_attention_heads=16,
        q_lora_rank=384,
    )
    return dataclasses.replace(
        config,
        text_config=text,
        vision_config=dataclasses.replace(nano().vision_config, text_hidden_size=1024),
    )


class RandomWeights(Mapping[str, torch.Tensor]):
    """The state of a random bfloat16 model, drawn parameter by parameter as it is asked for.

    Each matrix keeps the size of what passes through it. Only the last two drawn are kept (the
    experts of one layer are asked for in turns), so that a model can be published to a server that
    leaves no room for a second copy of it.
    """

    def __init__(self, config: KimiConfig, device: str) -> None:
        with torch.device("meta"):
            self._shapes = {name: one.shape for name, one in KimiModel(config).state_dict().items()}
        self._device = device
        self._kept: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._kept:
            for old in list(self._kept)[:-1]:
                del self._kept[old]  # before the next is made
            self._kept[name] = self._draw(name, self._shapes[name])
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def _draw(self, name: str, shape: torch.Size) -> torch.Tensor:
        generator = torch.Generator(device=self._device).manual_seed(zlib.crc32(name.encode()))
        if name.endswith("e_score_correction_bias"):
            bias = torch.empty(shape, dtype=torch.float32, device=self._device)
            return bias.normal_(0.0, 0.01, generator=generator)
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        if len(shape) == 1:
            return tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        is_stack = "experts" in name and len(shape) == 3
        fan_in = shape[-1] if is_stack else shape[1:].numel()
        scale = 1.0 if "embed_tokens" in name else fan_in**-0.5
        return tensor.normal_(0.0, scale, generator=generator)


def random_model(config: KimiConfig, device: str) -> KimiModel:
    """The model with ``RandomWeights``."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # cast afterwards, it would need twice the memory
    try:
        with torch.device(device):
            model = KimiModel(config)
    finally:
        torch.set_default_dtype(default)
    weights = RandomWeights(config, device)
    for name, tensor in model.state_dict().items():
        tensor.copy_(weights[name])
    return model.eval()


def write_checkpoint(folder: Path, config: KimiConfig, device: str) -> None:
    """A checkpoint of random weights."""
    checkpoint.save(random_model(config, device), folder, dtype=torch.bfloat16)
    write_beside(folder)


def write_config(folder: Path, config: KimiConfig) -> None:
    """A checkpoint without weights, for `--load-format dummy`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_hf("bfloat16")), encoding="utf-8")
    write_beside(folder)


def write_nano(folder: Path) -> None:
    """`nano`, with what SGLang asks for beside it."""
    shutil.copytree(nano_directory(), folder)
    write_beside(folder)


def write_beside(folder: Path) -> None:
    """The tokenizer of nano, and the processor that SGLang loads."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(nano_directory() / name, folder)
    Tokenizer.from_dir(nano_directory()).save(folder)
    write_processor(folder)


def python_of_server(device: str) -> str:
    """The interpreter that has SGLang."""
    return str(ROOT / ".venv-sglang" / "bin" / "python") if device == "cpu" else sys.executable


class Server:
    """A SGLang server in a process group of its own; ``models`` is a package of its models."""

    def __init__(
        self,
        folder: Path,
        log: Path,
        *,
        device: str = "cuda",
        flags: list[str] | None = None,
        ready_within_s: float = 300,
        models: str = "",
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.ready_s = 0.0
        self._log, self._ready_within_s = log, ready_within_s
        self._command = [
            *(python_of_server(device), "-m", "sglang.launch_server", "--trust-remote-code"),
            *("--model-path", str(folder), "--host", "127.0.0.1", "--port", str(port)),
            *(ON_CPU if device == "cpu" else ON_CUDA),
            *(flags or []),
        ]
        self._environment = os.environ | (CPU_ENVIRONMENT if device == "cpu" else {})
        if models:
            folders = [os.environ.get("PYTHONPATH", ""), str(ROOT), str(HERE / "external")]
            self._environment["PYTHONPATH"] = ":".join(one for one in folders if one)
            self._environment["SGLANG_EXTERNAL_MODEL_PACKAGE"] = models

    def __enter__(self) -> Server:
        began_s = time.perf_counter()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )
        told_s = began_s
        while not self._is_ready():
            now_s = time.perf_counter()
            if self._process.poll() is not None or now_s - began_s > self._ready_within_s:
                self._end()
                raise RuntimeError(f"SGLang did not start; the end of {self._log}:\n{self.said()}")
            if now_s - told_s > TELL_EVERY_S:
                told_s = now_s
                last = self.said(300).rstrip().rpartition("\n")[2]
                print(f"[{self._log.stem} {now_s - began_s:6.1f} s] {last}", file=sys.stderr)
            time.sleep(0.5)
        self.ready_s = time.perf_counter() - began_s
        print(f"[{self._log.stem} {self.ready_s:6.1f} s] ready", file=sys.stderr, flush=True)
        return self

    def said(self, num: int = 1_700) -> str:
        """The end of its log."""
        return self._log.read_text(errors="replace")[-num:]

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self._end()

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health_generate", timeout=60):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def _end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """A port that SGLang can take: one of its own lies 10,000 above it."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        if port <= HIGHEST_PORT:
            return port


def post(url: str, path: str, content: object = None, timeout_s: float = 300) -> object:
    """POST JSON; the parsed answer, or its text."""
    request = urllib.request.Request(
        url + path,
        data=json.dumps(content or {}).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            text = answer.read().decode()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{path} answered {error.code}: {error.read()[:500]!r}") from error
    try:
        return json.loads(text)
    except ValueError:
        return text
