"""Trajectories for other trainers: one row a branch (docs/trajectories.md has the schema).

    parquet   all columns, zstd                    one file
    hf        the same, as a data-set folder       data/train-00000-of-00001.parquet + README.md
    slime     one JSON object a branch             the fields of slime's ``Sample``
    verl      parquet, the keys of verl's batches  prompts, responses, response_mask …

An episode that cannot train is told with its reason; it is never left out in silence.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from swarm_sdk.errors import ConfigError, NotTrainable
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.traces.trajectory import Branch, branches, orchestrator_branches

Format = Literal["parquet", "hf", "slime", "verl"]
TRAJECTORY_SCHEMA = 1
"""Version of the columns; raised when one changes its meaning."""
SHARD = "train-00000-of-00001.parquet"


@dataclass(slots=True)
class Exported:
    """What was written, and what could not be."""

    num_branches: int = 0
    num_tokens: int = 0
    num_trained_tokens: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes by the reason for which they cannot train."""
    sentences: list[str] = field(default_factory=list)
    """One for each of them."""


def export(ledger: Ledger, episodes: Sequence[EpisodeRecord], form: Format, out: Path) -> Exported:
    """Write the branches of ``episodes`` to ``out``; slime and verl get those that train.

    Raises:
        ConfigError: pyarrow is missing, or ``out`` exists.
        LedgerError: the ledger cannot be read.
    """
    if out.exists():
        raise ConfigError(f"'{out}' exists already; choose another name or remove it")
    told = Exported()
    only_trained = form in ("slime", "verl")
    rows = list(_rows(ledger, episodes, told, only_trained=only_trained))
    out.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[form](rows, out)
    return told


def _rows(
    ledger: Ledger, episodes: Sequence[EpisodeRecord], told: Exported, *, only_trained: bool
) -> Iterator[dict[str, Any]]:
    for episode in episodes:
        try:
            found = (orchestrator_branches if only_trained else branches)(ledger, episode.id)
        except NotTrainable as error:
            told.left_out[error.reason] += 1
            told.sentences.append(str(error))
            continue
        if not found:
            told.left_out["empty"] += 1
            told.sentences.append(f"episode {episode.id} has no turn: its model never spoke")
        for number, branch in enumerate(found):
            told.num_branches += 1
            told.num_tokens += len(branch.token_ids)
            told.num_trained_tokens += sum(branch.mask)
            yield _row(episode, number, branch)


def branch_to_json(branch: Branch) -> dict[str, Any]:
    """A branch as one JSON object; experts as base64 of uint16, with their shape."""
    stored: dict[str, Any] = {**asdict(branch), "mask": branch.mask}
    if branch.experts is not None:
        stored["experts"]["data"] = base64.b64encode(branch.experts.data).decode("ascii")
    return stored


def _row(episode: EpisodeRecord, number: int, branch: Branch) -> dict[str, Any]:
    launch = episode.settings.get("launch", {})
    sampling = episode.settings.get("sampling", {})
    rewards = (episode.summary or {}).get("rewards", {})
    experts = branch.experts
    return {
        "schema_version": TRAJECTORY_SCHEMA,
        "episode_id": episode.id,
        "environment": str(launch.get("environment", "")),
        "task_id": str(launch.get("task", episode.id)),
        "sample": int(launch.get("sample", 0)),
        "model": episode.model,
        "temperature": sampling.get("temperature"),
        "agent_path": branch.agent_path,
        "branch": number,
        "token_ids": list(branch.token_ids),
        "mask": list(branch.mask),
        "is_sampled": list(branch.is_sampled),
        "logprobs": list(branch.logprobs),
        "weight_versions": list(branch.weight_versions),
        "media": list(branch.media),
        "experts": None if experts is None else experts.data,
        "experts_layers": None if experts is None else experts.num_layers,
        "experts_chosen": None if experts is None else experts.num_chosen,
        "reward": rewards.get("reward"),
        "rewards": json.dumps(rewards),
        "status": episode.status,
    }


def _schema() -> Any:
    pa = _pyarrow()
    columns = {
        "schema_version": pa.int32(),
        "episode_id": pa.string(),
        "environment": pa.string(),
        "task_id": pa.string(),
        "sample": pa.int32(),
        "model": pa.string(),
        "temperature": pa.float64(),
        "agent_path": pa.string(),
        "branch": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "mask": pa.list_(pa.bool_()),
        "is_sampled": pa.list_(pa.bool_()),
        "logprobs": pa.list_(pa.float32()),
        "weight_versions": pa.list_(pa.int32()),
        "media": pa.list_(pa.string()),
        "experts": pa.binary(),
        "experts_layers": pa.int32(),
        "experts_chosen": pa.int32(),
        "reward": pa.float64(),
        "rewards": pa.string(),
        "status": pa.string(),
    }
    return pa.schema(list(columns.items()))


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            "Parquet needs pyarrow; install it with: pip install 'swarm-sdk[train]'"
        ) from error
    return pa


def _write_parquet(rows: list[dict[str, Any]], out: Path) -> None:
    pa = _pyarrow()
    table = pa.Table.from_pylist(rows, schema=_schema())
    pa.parquet.write_table(table, out, compression="zstd")


def _write_hf(rows: list[dict[str, Any]], out: Path) -> None:
    (out / "data").mkdir(parents=True)
    _write_parquet(rows, out / "data" / SHARD)
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n---\n\nTrajectories of swarm-sdk, one row a branch; "
        f"schema version {TRAJECTORY_SCHEMA}.\n"
    )
    (out / "README.md").write_text(card, encoding="utf-8")


def _after_prompt(row: dict[str, Any]) -> int:
    """Where the first sampled id stands: what is before is the prompt of other trainers."""
    return int(row["is_sampled"].index(True))


def _write_slime(rows: list[dict[str, Any]], out: Path) -> None:
    groups: dict[str, int] = {}
    rollouts: dict[str, int] = {}
    with out.open("w", encoding="utf-8") as file:
        for index, row in enumerate(rows):
            start = _after_prompt(row)
            sample = {
                "group_index": groups.setdefault(row["task_id"], len(groups)),
                "index": index,
                "rollout_id": rollouts.setdefault(row["episode_id"], len(rollouts)),
                "tokens": row["token_ids"],
                "response_length": len(row["token_ids"]) - start,
                "loss_mask": [int(one) for one in row["mask"][start:]],
                "rollout_log_probs": row["logprobs"][start:],
                "weight_versions": sorted({str(v) for v in row["weight_versions"] if v >= 0}),
                "reward": row["reward"],
                "status": "completed" if row["status"] == "done" else "truncated",
                "metadata": {
                    "episode_id": row["episode_id"],
                    "agent_path": row["agent_path"],
                    "media": row["media"],
                },
            }
            file.write(json.dumps(sample) + "\n")


def _write_verl(rows: list[dict[str, Any]], out: Path) -> None:
    pa = _pyarrow()
    made: list[dict[str, Any]] = []
    for row in rows:
        start = _after_prompt(row)
        made.append(
            {
                "uid": row["task_id"],
                "data_source": row["environment"],
                "prompts": row["token_ids"][:start],
                "responses": row["token_ids"][start:],
                "response_mask": [int(one) for one in row["mask"][start:]],
                "rollout_log_probs": row["logprobs"][start:],
                "reward": row["reward"],
                "extra_info": json.dumps({"episode_id": row["episode_id"], "media": row["media"]}),
            }
        )
    schema = pa.schema(
        [
            ("uid", pa.string()),
            ("data_source", pa.string()),
            ("prompts", pa.list_(pa.int32())),
            ("responses", pa.list_(pa.int32())),
            ("response_mask", pa.list_(pa.int8())),
            ("rollout_log_probs", pa.list_(pa.float32())),
            ("reward", pa.float64()),
            ("extra_info", pa.string()),
        ]
    )
    pa.parquet.write_table(pa.Table.from_pylist(made, schema=schema), out, compression="zstd")


_WRITERS: dict[Format, Callable[[list[dict[str, Any]], Path], None]] = {
    "parquet": _write_parquet,
    "hf": _write_hf,
    "slime": _write_slime,
    "verl": _write_verl,
}
