"""What a training run keeps beside its ledger.

    config.json       the settings
    batches.jsonl     of each iteration, before its updates: the groups of episodes that train
    metrics.jsonl     of each iteration, after it: all figures; TensorBoard's too where it is there
    checkpoints/N/    weights, moments, state after N iterations (torch.distributed.checkpoint)
    model/            the policy with Hugging Face names: what `path:RUN/model` opens

A run that was killed goes on from its last checkpoint. Iterations after it are made again from
``batches.jsonl``: the same episodes, so the same losses, without asking a model anything.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.distributed import ALONE, Team

BATCHES, METRICS, CHECKPOINTS, STATE = "batches.jsonl", "metrics.jsonl", "checkpoints", "state.json"
KEPT_CHECKPOINTS = 2


class Journal:
    """The files of one run."""

    def __init__(self, run: Path) -> None:
        self.run: Path = run
        run.mkdir(parents=True, exist_ok=True)
        self.batches: dict[int, dict[str, Any]] = {
            row["iteration"]: row for row in read_rows(run / BATCHES)
        }
        """Iteration -> its row."""
        self._board: Any = None
        self._has_board: bool = True

    def write_batch(
        self,
        iteration: int,
        groups: Sequence[Sequence[str]],
        next_question: int,
        open_questions: Sequence[int],
    ) -> None:
        """Keep which episodes an iteration trains on, before it does.

        ``next_question`` is the first that was not begun by then, ``open_questions`` are begun and
        not trained on: from there a run goes on that makes this iteration again.
        """
        row = {
            "iteration": iteration,
            "groups": [list(group) for group in groups],
            "next_question": next_question,
            "open_questions": list(open_questions),
        }
        self.batches[iteration] = row
        _append(self.run / BATCHES, row)

    def write_metrics(self, iteration: int, figures: Mapping[str, Any]) -> None:
        """Append the figures of an iteration."""
        _append(self.run / METRICS, {"iteration": iteration, **figures})
        board = self._tensorboard()
        if board is not None:
            for key, value in figures.items():
                if isinstance(value, int | float):
                    board.add_scalar(key, value, iteration)
            board.flush()

    def last_checkpoint(self) -> int | None:
        """Iterations done at the newest checkpoint."""
        found = [int(p.name) for p in (self.run / CHECKPOINTS).glob("[0-9]*") if p.name.isdigit()]
        return max(found, default=None)

    def save(
        self,
        done: int,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        team: Team = ALONE,
    ) -> None:
        """Write a checkpoint; one that was broken off never bears a checkpoint's name."""
        folder = self.run / CHECKPOINTS
        partial, final = folder / f"partial-{done}", folder / f"{done:06d}"
        if team.is_leader:
            shutil.rmtree(partial, ignore_errors=True)
        team.share(None)  # nobody writes before it is gone
        _without_warnings(state_dict_saver.save, tensors, partial)
        if not team.is_leader:
            return
        (partial / STATE).write_text(json.dumps(dict(state)), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(folder.glob("[0-9]*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def load(self, done: int, tensors: dict[str, Any], team: Team = ALONE) -> dict[str, Any]:
        """Load a checkpoint into ``tensors``; returns its state. Later metrics are dropped."""
        folder = self.run / CHECKPOINTS / f"{done:06d}"
        _without_warnings(state_dict_loader.load, tensors, folder)
        state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not team.is_leader:
            return state
        rows = [row for row in read_rows(self.run / METRICS) if row["iteration"] < done]
        partial = self.run / f"{METRICS}.partial"
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        partial.replace(self.run / METRICS)
        return state

    def close(self) -> None:
        """Close TensorBoard's file."""
        if self._board is not None:
            self._board.close()

    def _tensorboard(self) -> Any:
        if self._board is None and self._has_board:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                self._has_board = False
                sys.stderr.write(
                    f"no curves for TensorBoard, {METRICS} holds the same; for both: "
                    "pip install 'swarm-sdk[train]'\n"
                )
            else:
                self._board = SummaryWriter(str(self.run / "tensorboard"))
        return self._board


def _without_warnings(do: Callable[..., Any], tensors: dict[str, Any], checkpoint_id: Path) -> None:
    """Without processes to talk to, torch warns that there are none: that is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        do(tensors, checkpoint_id=checkpoint_id)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON lines file; a last line that was cut by a kill is left out.

    Raises:
        ConfigError: another line is no JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
    return rows


def _append(path: Path, row: Mapping[str, Any]) -> None:
    """Append one line, on disk when this returns; one that was cut before is ended first."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                content = path.read_bytes()
                file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
