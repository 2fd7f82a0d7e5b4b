"""The loop of PARL, from questions to weights in the engine, killed, resumed and replayed."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import anyio
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from swarm_sdk.cli import app
from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError, LedgerError
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.embedded import open_embedded
from swarm_sdk.model_backend.weights.checkpoint import load
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.training.journal import Journal, read_rows
from swarm_sdk.training.parl import Parl, batch_reader, replay
from swarm_sdk.training.report import write_report
from swarm_sdk.training.settings import ParlConfig

SMALL = ParlConfig(
    steps=2, questions=2, samples=3, updates=2, max_entities=3, critical_steps=9, save_every=1
)


def metrics(run: Path) -> list[dict]:
    return read_rows(run / "metrics.jsonl")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of five iterations, and what was seen of it."""
    run = tmp_path_factory.mktemp("parl") / "run"
    config = replace(SMALL, steps=5, samples=2, save_every=2)

    async def main():
        async with Parl.open(config, run) as parl:
            frozen = None
            while parl.iteration < config.steps:
                await parl.step()
                state = {n: t.clone() for n, t in parl.frozen.engine.model.state_dict().items()}
                frozen = frozen or state
            engine = parl.policy.engine
            policy = {n: t.clone() for n, t in engine.model.state_dict().items()}
            learner = {n: t.clone() for n, t in parl.learner.weights().items()}
            await parl.train()  # nothing is left to do but to write the model
            return frozen, state, policy, learner, engine.weight_version

    return run, anyio.run(main)


@pytest.mark.timeout(400)
def test_five_iterations_train_the_orchestrator_and_leave_the_frozen_engine(trained) -> None:
    run, (first, last, policy, learner, version) = trained
    start = load(nano_directory()).state_dict()
    assert version == 5
    assert all(math.isfinite(row["loss"]) for row in metrics(run))
    for name, tensor in last.items():
        assert torch.equal(tensor, start[name]), name
        assert torch.equal(tensor, first[name]), name
    assert all(torch.equal(policy[name], tensor) for name, tensor in learner.items())
    changed = {name for name, tensor in policy.items() if not torch.equal(tensor, start[name])}
    assert "layers.3.mlp.experts.gate_up_proj" in changed
    assert not any(name.startswith(("vision_tower", "mm_projector")) for name in changed)


@pytest.mark.timeout(400)
def test_engine_and_trainer_agree_and_every_iteration_says_what_it_did(trained) -> None:
    run, _ = trained
    rows = metrics(run)
    assert [row["iteration"] for row in rows] == [0, 1, 2, 3, 4]
    measured = [r for r in rows if "engine_trainer_mean_abs_dlogprob" in r]
    for row in measured:
        assert row["engine_trainer_mean_abs_dlogprob"] <= 1e-5
        assert row["engine_trainer_max_abs_dlogprob"] <= 1e-3
        assert row["routing_disagreement"] <= 1e-3
    for row in rows:
        assert {"reward", "r_perf", "width", "critical_steps", "publish_ms", "drift"} <= row.keys()
        assert row["drift"].keys() <= {"none", "cut", "retokenised", "reread"}
        assert row["critical_steps"] <= SMALL.critical_steps
    assert rows[0]["lambda1"] > rows[-1]["lambda1"]


@pytest.mark.timeout(400)
def test_the_ids_that_train_are_those_that_the_policy_sampled(trained) -> None:
    run, _ = trained
    journal = Journal(run)

    async def main():
        async with Parl.open(replace(SMALL, steps=5, samples=2), run) as parl:
            assert parl.iteration == 5
            groups = [parl.ledger.episodes(group) for group in journal.batches[0]["groups"]]
            batch = parl.reader.read(parl.ledger, groups, 0)
            for sample in batch.samples:
                main = branches(parl.ledger, sample.episode_id)[0]
                assert tuple(sample.ids_S.tolist()) == main.token_ids
                assert tuple(sample.mask_S.tolist()) == main.mask
            models = {a.model for g in groups for e in g for a in parl.ledger.agents(e.id)}
            assert models <= {"policy", "nano"}
            return {
                (a.path == "main", a.model)
                for g in groups
                for e in g
                for a in parl.ledger.agents(e.id)
            }

    assert anyio.run(main) <= {(True, "policy"), (False, "nano")}


@pytest.mark.timeout(400)
def test_a_replay_gives_the_losses_and_the_weights_of_the_live_run_bit_for_bit(
    trained, tmp_path: Path
) -> None:
    run, _ = trained
    config = ParlConfig.load(run)
    told = replay(config, run, tmp_path / "again")
    live = metrics(run)
    for key in ("loss", "grad_norm", "kl", "reward"):
        assert [row.get(key) for row in told] == [row.get(key) for row in live]
    one, other = (load_file(p / "model" / "model.safetensors") for p in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.timeout(400)
def test_episodes_of_another_chat_format_are_told_and_counted(trained) -> None:
    run, _ = trained
    policy = open_embedded(nano_directory())
    foreign = ChatFormat(policy.chat_format.tokenizer, thinking=False)
    reader = batch_reader(SMALL, replace(policy, chat_format=foreign))
    ledger = Ledger(run / "runs", readonly=True)
    groups = [ledger.episodes(group) for group in Journal(run).batches[0]["groups"]]
    batch = reader.read(ledger, groups, 0)
    assert batch.samples == []
    assert dict(batch.left_out) == {"foreign_tokens": sum(map(len, groups))}
    assert "another tokenizer or chat format" in batch.sentences["foreign_tokens"]


@pytest.mark.timeout(400)
def test_the_report_holds_curves_and_counts(trained) -> None:
    run, _ = trained
    done = CliRunner().invoke(app, ["train", "report", str(run)])
    assert done.exit_code == 0, done.output
    page = (run / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "5 iterations" in page
    assert "What did not train" in page
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(400)
def test_a_run_killed_in_the_middle_of_an_update_goes_on_with_the_same_losses(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "swarm_sdk.training", "parl", "--out", str(run)]
    command += ["--steps", "2", "--set", "questions=2", "--set", "samples=2"]
    command += ["--set", "max_entities=3", "--set", "save_every=1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    until_s = time.monotonic() + 240
    while len(read_rows(run / "batches.jsonl")) < 2 and time.monotonic() < until_s:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)  # the second batch is chosen and not yet trained on
    process.wait()
    before = metrics(run)
    assert [row["iteration"] for row in before] == [0]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    rows = metrics(run)
    assert [row["iteration"] for row in rows] == [0, 1]
    assert rows[0] == before[0]
    told = replay(ParlConfig.load(run), run, tmp_path / "again")
    assert [row["loss"] for row in told] == [row["loss"] for row in rows]


@pytest.mark.timeout(400)
def test_with_questions_ahead_a_batch_is_the_first_that_are_complete(tmp_path: Path) -> None:
    config = replace(SMALL, steps=2, questions=1, samples=2, ahead=2, max_entities=2)
    config = replace(config, replay_routing=True)
    run = tmp_path / "run"

    async def main():
        async with Parl.open(config, run) as parl:
            await parl.train()
            return sorted(parl._open_questions)

    left = anyio.run(main)
    assert len(left) == 2
    rows = [row["groups"] for row in read_rows(run / "batches.jsonl")]
    assert [len(groups) for groups in rows] == [1, 1]
    assert all(row["staleness"] in (0, 1) for row in metrics(run))
    told = replay(config, run, tmp_path / "again")  # with the routing of each iteration's sampler
    assert [row["loss"] for row in told] == [row["loss"] for row in metrics(run)]


def test_settings_go_through_the_run_directory_and_wrong_ones_are_refused(tmp_path: Path) -> None:
    config = replace(SMALL, subagents=((0, "nano"), (5, "other")), toggle=True)
    config.save(tmp_path)
    assert ParlConfig.load(tmp_path) == config
    assert [config.subagents_at(i) for i in (0, 4, 5, 99)] == ["nano", "nano", "other", "other"]
    with pytest.raises(ConfigError, match="samples must be at least 2"):
        replace(SMALL, samples=1)
    with pytest.raises(ConfigError, match="from iteration 0"):
        replace(SMALL, subagents=((1, "nano"),))
    with pytest.raises(ConfigError, match="sampler is 'sglang:http://host:port', got 'nano'"):
        replace(SMALL, sampler="nano")
    servers = "sglang:http://127.0.0.1:30000"
    for alike in (servers, f"{servers}/", f"sglang:http://127.0.0.1:1,{servers[7:]}#/model"):
        with pytest.raises(ConfigError, match="give subagents servers of their own"):
            replace(SMALL, sampler=servers, subagents=((0, "nano"), (5, alike)))
    replace(SMALL, replay_routing=True).save(tmp_path)
    with pytest.raises(ConfigError, match="replays the routing of its own engine"):
        replace(SMALL, replay_routing=True, sampler=servers).check_run(tmp_path)
    with pytest.raises(ConfigError, match="is no training run"):
        ParlConfig.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["parl", "--set", "samples=one"], "'one' is no value of samples"),
        (["parl", "--set", "sample=2"], "'sample=2' is no setting"),
        (["parl", "--set", "toggle=1"], "toggle is bool"),
        (["parl", "--set", "environment=x"], "no environment 'x'"),
        (["parl", "--start", "/nowhere"], "no checkpoint directory '/nowhere'"),
        (["--from", "/nowhere"], "no episodes are recorded"),
        (["report", "/nowhere"], "holds no metrics.jsonl"),
    ],
)
def test_the_command_says_in_one_sentence_what_is_wrong(
    arguments: list[str], sentence: str, tmp_path: Path
) -> None:
    command = ["train", *arguments]
    if "report" not in arguments:
        command += ["--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert sentence in done.stderr


def test_a_replay_of_a_directory_without_judged_tasks_is_refused(tmp_path: Path) -> None:
    from swarm_sdk import Swarm
    from swarm_sdk.testing import ScriptedModel

    Swarm(ScriptedModel(lambda m, t: "a"), runs=tmp_path / "runs").run_sync("q")
    with pytest.raises(LedgerError, match="no episodes of an environment"):
        replay(SMALL, tmp_path / "runs" / "..", tmp_path / "out")


def test_the_report_counts_what_did_not_train_and_says_why(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for iteration, number in enumerate((2, 3)):
        told = {"left_out": {"greedy": number}, "sentences": {"greedy": f"episode e{number} <was>"}}
        journal.write_metrics(iteration, {"loss": 1.0, **told})
    page, _ = write_report(tmp_path)
    assert "<td>greedy</td><td>5</td><td>episode e2 &lt;was&gt;</td>" in page.read_text()
    assert "<th>drift</th><td>nothing</td><td>0</td>" in page.read_text()


def test_a_run_of_another_schema_version_is_refused_in_one_sentence(tmp_path: Path) -> None:
    Ledger(tmp_path / "old" / "runs").close()
    with sqlite3.connect(tmp_path / "old" / "runs" / "ledger.db") as database:
        database.execute("UPDATE meta SET value = '999' WHERE key = 'schema_version'")
    database.close()
    command = ["train", "--from", str(tmp_path / "old"), "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert "version 999" in done.stderr
    assert "use the release that wrote it" in done.stderr


def test_a_line_that_was_cut_by_a_kill_is_left_out_and_ended(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write_metrics(0, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 1, "lo')
    assert [row["iteration"] for row in metrics(tmp_path)] == [0]
    journal.write_metrics(1, {"loss": 2.0})
    assert [row["loss"] for row in metrics(tmp_path)] == [1.0, 2.0]
    (tmp_path / "batches.jsonl").write_text("{\n{}\n")
    with pytest.raises(ConfigError, match="line 1: not JSON"):
        Journal(tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_processes_train_one_run_together(tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "swarm_sdk.training", "parl", "--out", str(run), "--steps", "1"]
    command += ["--set", "questions=2", "--set", "samples=3", "--set", "max_entities=3"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    [row] = metrics(run)
    told = replay(ParlConfig.load(run), run, tmp_path / "again")
    assert row["loss"] == pytest.approx(told[0]["loss"], abs=1e-5)
    one, other = (load_file(p / "model" / "model.safetensors") for p in (run, tmp_path / "again"))
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-3, rtol=1e-2, msg=name)
