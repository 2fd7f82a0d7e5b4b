"""Supervised training on episodes by the book, run by worker processes while it trains.

workers ──rows──> reservoir ──> pool ──batches──> AdamW -> checkpoint
"""

from __future__ import annotations

import json
import multiprocessing as mp
import queue
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import typer

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from swarm_sdk.atlas.teach import Mix
    from swarm_sdk.traces.parl.sft import Row

NANO: Path = nano_directory()
ROWS_PER_MESSAGE = 64
MAX_WAITING_ROWS = 50_000
RESERVOIR_ROWS = 400_000
"""Rows kept for another pass when workers are slower than the trainer."""


def tokenizer(
    out: Annotated[Path, typer.Option(help="Directory for tiktoken.model.")] = NANO,
    episodes: Annotated[int, typer.Option(help="Episodes whose text is counted.")] = 4_000,
    base_tokens: Annotated[int, typer.Option(help="Ranks besides the 256 special tokens.")] = 3_840,
    seed: int = 0,
) -> None:
    """Train the byte-pair vocabulary of `nano` on the text of episodes by the book."""
    from swarm_sdk.atlas.teach import Mix, texts
    from swarm_sdk.model_backend.chat.train_tokenizer import export_tokenizer_json, train

    started_s = time.perf_counter()
    trained = train(anyio.run(texts, episodes, seed, Mix()), base_tokens)
    out.mkdir(parents=True, exist_ok=True)
    trained.save(out)
    export_tokenizer_json(trained, out)
    _say(f"{trained.num_tokens} tokens in {out} after {time.perf_counter() - started_s:.0f} s")


def sft(
    out: Annotated[Path, typer.Option(help="Directory for the checkpoint and the log.")],
    start: Annotated[Path | None, typer.Option(help="Go on from this checkpoint.")] = None,
    vocabulary: Annotated[Path, typer.Option(help="Directory of tiktoken.model.")] = NANO,
    max_seconds: Annotated[
        float, typer.Option(help="End of training; the rate decays to 0.")
    ] = 420,
    workers: Annotated[int, typer.Option(help="Processes that run episodes.")] = 2,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch_tokens: int = 65_536,
    peak_lr: float = 3e-3,
    shares: Annotated[
        list[str] | None, typer.Option("--mix", help="KEY=SHARE of what is taught, as in Mix.")
    ] = None,
    seed: int = 0,
) -> None:
    """Train `nano` on episodes by the book, run by worker processes while it trains."""
    import torch

    from swarm_sdk.atlas.teach import Mix
    from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
    from swarm_sdk.model_backend.model.config import nano
    from swarm_sdk.model_backend.model.kimi import KimiModel
    from swarm_sdk.model_backend.weights.checkpoint import load
    from swarm_sdk.model_backend.weights.servable import save_checkpoint
    from swarm_sdk.traces.parl.sft import SftConfig, train

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device; use --device cpu")
    tokenizer = Tokenizer.from_dir(vocabulary)  # a bad one is found before any work starts
    config = SftConfig(
        max_seconds=max_seconds, batch_tokens=batch_tokens, peak_lr=peak_lr, seed=seed
    )
    if start is None:
        model = KimiModel(nano()).to(device)
        model.init_weights(seed)
    else:
        model = load(start, dtype=torch.float32, device=device)
    out.mkdir(parents=True, exist_ok=True)
    mix = Mix(**_shares(shares or [], set(Mix.__dataclass_fields__)))
    with (
        (out / "train.jsonl").open("w") as log_file,
        RowStream(vocabulary, workers, seed, mix) as rows,
    ):

        def log(entry: dict[str, Any]) -> None:
            entry |= rows.counts()
            log_file.write(json.dumps(entry) + "\n")
            log_file.flush()
            _say(
                f"step {entry['step']} {entry['seconds']:.0f} s  loss {entry['loss']:.4f}  "
                f"top-1 {entry['top1']:.4f}  {entry['tokens_per_s']} tokens/s  "
                f"{entry['fresh_rows']} rows, {entry['reused_rows']} again"
            )

        totals = train(model, iter(rows), config, log)
        totals |= rows.counts()
    save_checkpoint(model.to(torch.bfloat16), tokenizer, out)
    settings = {"sft": asdict(config), "mix": asdict(mix), "workers": workers, "totals": totals}
    (out / "training.json").write_text(json.dumps(settings, indent=1, default=str) + "\n")
    _say(f"saved to {out}: {totals}")


def _shares(given: list[str], known: set[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in given:
        key, _, share = one.partition("=")
        try:
            found[key] = float(share)
        except ValueError as error:
            raise ConfigError(f"'{one}' is no share; write KEY=SHARE") from error
        if key not in known:
            raise ConfigError(f"there is no share '{key}'; known are: {', '.join(sorted(known))}")
    return found


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class RowStream:
    """Rows from worker processes, without end; older rows again while no fresh one is ready."""

    def __init__(self, vocabulary: Path, workers: int, seed: int, mix: Mix) -> None:
        context = mp.get_context("spawn")
        self._queue: mp.Queue[Any] = context.Queue(maxsize=64)
        self._processes = [
            context.Process(
                target=_work, args=(vocabulary, seed * 1_000 + i, mix, self._queue), daemon=True
            )
            for i in range(workers)
        ]
        self._reservoir: list[Row] = []
        self._random = random.Random(seed)
        self._kinds: Counter[str] = Counter()
        self._fresh: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._num_fresh = self._num_reused = 0
        self._reader = threading.Thread(target=self._read, daemon=True, name="row reader")
        self._is_open = True

    def __enter__(self) -> RowStream:
        """Start the workers."""
        for process in self._processes:
            process.start()
        self._reader.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """End the workers."""
        self._is_open = False
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()

    def _read(self) -> None:
        while self._is_open:
            if self._fresh.qsize() > MAX_WAITING_ROWS:
                time.sleep(0.1)  # the workers wait too: their queue fills up
                continue
            try:
                kinds, rows = self._queue.get(timeout=0.5)
            except queue.Empty:
                continue
            self._kinds.update(kinds)
            for row in rows:
                self._fresh.put(row)

    def counts(self) -> dict[str, Any]:
        """How many rows were used for the first time and again, and questions by kind."""
        return {
            "fresh_rows": self._num_fresh,
            "reused_rows": self._num_reused,
            "questions": dict(self._kinds),
        }

    def __iter__(self) -> Iterator[Row]:
        """Rows for the trainer."""
        min_rows = 4_096
        while True:
            wait = len(self._reservoir) < min_rows
            try:
                row = self._fresh.get(timeout=120 if wait else 0)
            except queue.Empty:
                if wait:
                    raise ConfigError("the workers gave no rows for two minutes") from None
                self._num_reused += 1
                yield self._random.choice(self._reservoir)
                continue
            self._num_fresh += 1
            if len(self._reservoir) < RESERVOIR_ROWS:
                self._reservoir.append(row)
            else:
                self._reservoir[self._random.randrange(RESERVOIR_ROWS)] = row
            yield row


def _work(vocabulary: Path, seed: int, mix: Mix, out: mp.Queue[Any]) -> None:
    """One worker: episodes by the book until it is ended."""
    import os
    import signal

    from swarm_sdk.atlas.teach import teacher
    from swarm_sdk.model_backend.chat.template import ChatFormat
    from swarm_sdk.model_backend.chat.tokenizer import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(10)  # the trainer's own thread comes first
    chat_format = ChatFormat(Tokenizer.from_dir(vocabulary), thinking=True)

    async def run() -> None:
        kinds: list[str] = []
        rows: list[Row] = []
        async with teacher(chat_format, seed, mix) as teaching:
            async for question, made in teaching.rows():
                kinds.append(question.kind)
                rows += made
                if len(rows) >= ROWS_PER_MESSAGE:
                    out.put((kinds, rows))
                    kinds, rows = [], []

    anyio.run(run)


def first_rows(vocabulary: Path, count: int, seed: int, mix: Mix) -> list[Row]:
    """``count`` rows made in this process: for tests and short trials."""
    from swarm_sdk.atlas.teach import teacher
    from swarm_sdk.model_backend.chat.template import ChatFormat
    from swarm_sdk.model_backend.chat.tokenizer import Tokenizer

    chat_format = ChatFormat(Tokenizer.from_dir(vocabulary), thinking=True)

    async def collect() -> list[Row]:
        rows: list[Row] = []
        async with teacher(chat_format, seed, mix) as teaching:
            async for _, made in teaching.rows():
                rows += made
                if len(rows) >= count:
                    break
        return list(islice(rows, count))

    return anyio.run(collect)
