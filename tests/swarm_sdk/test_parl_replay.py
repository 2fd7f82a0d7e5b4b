"""``swarm train --from``: what does not train is said in a sentence and counted in the report."""

import io
import json
import math
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path

import anyio
import PIL.Image
import pytest
from typer.testing import CliRunner

from swarm_sdk import Swarm
from swarm_sdk.cli import app
from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.runtime.environment import Environment, EnvTask
from swarm_sdk.testing import ScriptedModel
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.training.journal import Journal, read_rows
from swarm_sdk.types import Image, Sampling, Task

FORMAT = ChatFormat(Tokenizer.from_dir(nano_directory()), thinking=True)
TOKENS = ScriptedModel(lambda messages, tools: "an answer", chat_format=FORMAT)


class Given(Environment):
    """Tasks whose rewards are given."""

    name = "given"

    async def judge(self, task, result, rollouts):
        del result, rollouts
        return {"reward": task.facts["rewards"].pop(0)}


def rolled_out(runs: Path, task: str, rewards: list[float], files=()) -> list[str]:
    """Episodes of a task, one a reward."""

    async def main() -> list[str]:
        async with Swarm(TOKENS, sampling=Sampling(max_tokens=64), runs=runs) as swarm:
            rollouts, ids = swarm.rollouts(), []
            one = EnvTask(task, Task(f"the task {task}", files), {"rewards": list(rewards)})
            for sample in range(len(rewards)):
                done = await rollouts.rollout(Given(), one, sample)
                ids.append(done.result.episode_id)
            return ids

    return anyio.run(main)


def changed(runs: Path, episode: str, column: str, change: Callable[[bytes], bytes | None]) -> None:
    """Change what is on record of an episode's first turn."""
    with sqlite3.connect(runs / "ledger.db") as database:
        row, stored = database.execute(
            f"SELECT id, {column} FROM steps WHERE kind = 'sample' AND episode = "
            "(SELECT row FROM episodes WHERE id = ?)",
            (episode,),
        ).fetchone()
        database.execute(f"UPDATE steps SET {column} = ? WHERE id = ?", (change(stored), row))
    database.close()


def a_run_with_everything_that_is_wrong(runs: Path) -> dict[str, int]:
    """Write it; what a replay leaves out of it, by reason."""
    rolled_out(runs, "good", [0.0, 1.0])
    rolled_out(runs, "alone", [1.0])
    rolled_out(runs, "equal", [0.5, 0.5])
    [chat, no_logprobs, nan, foreign, other_format] = (
        rolled_out(runs, name, [1.0])[0] for name in ("chat", "bare", "nan", "foreign", "format")
    )
    for column in ("prompt_ids", "token_ids", "logprobs"):
        changed(runs, chat, column, lambda stored: None)
    changed(runs, no_logprobs, "logprobs", lambda stored: None)
    changed(runs, nan, "logprobs", lambda stored: stored[:-4] + struct.pack("<f", math.nan))
    changed(runs, foreign, "prompt_ids", lambda stored: stored[:-4] + struct.pack("<i", 10**6))
    changed(runs, other_format, "prompt_ids", lambda stored: stored[4:] + stored[:4])
    drawn = io.BytesIO()
    PIL.Image.new("RGB", (28, 28)).save(drawn, "PNG")
    rolled_out(runs, "picture", [1.0], files=(Image(drawn.getvalue(), "image/png", "p.png"),))
    with sqlite3.connect(runs / "ledger.db") as database:
        database.execute("DELETE FROM media")
    database.close()
    Swarm(TOKENS, runs=runs).run_sync("a task of no environment")
    ledger = Ledger(runs)
    launch = {"launch": {"environment": "given", "task": "empty", "sample": 0}}
    ledger.begin_episode(
        EpisodeRecord(
            id="empty", task={"prompt": "p"}, model="m", settings=launch, started_ns=2**62
        )
    )
    ledger.end_episode("empty", status="failed", output="", summary={}, ended_ns=2**62)
    ledger.judge_episode("empty", {"reward": 0.0})
    ledger.close()
    return {
        "group_of_one": 1,
        "equal_rewards": 2,
        "no_token_ids": 1,
        "no_logprobs": 1,
        "non_finite_logprobs": 1,
        "foreign_tokens": 2,
        "missing_media": 1,
        "no_task": 1,
        "empty": 1,
    }


@pytest.mark.timeout(300)
def test_nothing_that_does_not_train_is_dropped_in_silence(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out"
    expected = a_run_with_everything_that_is_wrong(runs)
    command = ["train", "--from", str(runs), "--out", str(out), "--set", "questions=99"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    [row] = read_rows(out / "metrics.jsonl")
    assert row["left_out"] == expected
    assert row["loss_tokens"] > 0  # the good ones train
    assert row["drift"]["none"] >= 2
    assert (row["drift"]["tokenizer"], row["drift"]["lost"]) == (2, 1)
    assert row["sentences"].keys() == expected.keys()
    for sentence in row["sentences"].values():
        assert f"left out: {sentence}" in done.stderr
    assert CliRunner().invoke(app, ["train", "report", str(out)]).exit_code == 0
    page = (out / "report.html").read_text()
    for reason, number in expected.items():
        assert f"<td>{reason}</td><td>{number}</td>" in page
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2
    assert "holds a run already" in again.stderr


@pytest.mark.timeout(300)
def test_batches_after_the_last_step_are_counted_and_lost_episodes_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ids = [rolled_out(source / "runs", name, [0.0, 1.0]) for name in "abc"]
    for iteration, group in enumerate(ids):
        Journal(source).write_batch(iteration, [group], iteration + 1, [])
    command = ["train", "--from", str(source), "--set", "steps=1", "--out"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr
    [row] = read_rows(tmp_path / "out" / "metrics.jsonl")
    assert row["left_out"] == {"after_the_last_step": 4}
    rows = read_rows(source / "batches.jsonl")
    rows[0]["groups"][0][1] = "20260101-000000-00000000"
    (source / "batches.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = CliRunner().invoke(app, [*command, str(tmp_path / "other")])
    assert done.exit_code == 2
    assert "names the episode 20260101-000000-00000000 and the ledger does not hold it" in (
        done.stderr
    )


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of TensorBoard's files."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for file in folder.glob("events.*"):
        data, at = file.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
    return found


def test_the_figures_of_an_iteration_stand_in_tensorboards_file_too(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for iteration in range(2):
        journal.write_metrics(iteration, {"loss": 0.5 + iteration, "drift": {"none": 3}})
    journal.close()
    assert scalars(tmp_path / "tensorboard") == {("loss", 0): 0.5, ("loss", 1): 1.5}


def test_without_tensorboards_writer_that_is_said_once(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    journal = Journal(tmp_path)
    for iteration in range(2):
        journal.write_metrics(iteration, {"loss": 0.5})
    assert capsys.readouterr().err.count("no curves for TensorBoard") == 1
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 2
