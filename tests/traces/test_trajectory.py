"""The ledger becomes branches, exports and counts of drift."""

import base64
import json
import struct
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swarm_sdk import Swarm
from swarm_sdk.cli import app
from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError, NotTrainable
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.drift import count_drift
from swarm_sdk.traces.export import TRAJECTORY_SCHEMA, branch_to_json, export
from swarm_sdk.traces.ledger import AgentRecord, EpisodeRecord, Ledger, StepRecord
from swarm_sdk.traces.trajectory import branches, message_graph, orchestrator_branches

TOKENIZER = Tokenizer.from_dir(nano_directory())
FORMAT = ChatFormat(TOKENIZER, thinking=True)


def swarm_episode(runs: Path) -> str:
    """An orchestrator that asks two sub-agents; returns the episode's id."""

    def look(name: str) -> str:
        """Look a name up."""
        return f"found {name}"

    def policy(messages, tools):
        results = [m.content for m in messages if m.role == "tool"]
        if not any(tool.name == "assign_task" for tool in tools):
            return results[0] if results else calls(call("look", name=messages[-1].content))
        if results:
            return " and ".join(results[1:])
        assigned = [call("assign_task", agent="a", prompt=name) for name in ("Peru", "Kenya")]
        return calls(call("create_subagent", name="a", system_prompt="Look."), *assigned)

    model = ScriptedModel(policy, chat_format=FORMAT)
    return Swarm(model, tools=[look], runs=runs).run_sync("Peru and Kenya?").episode_id


def recorded(runs: Path, *steps: StepRecord, summary=None) -> Ledger:
    ledger = Ledger(runs)
    ledger.begin_episode(
        EpisodeRecord(id="e", task={"prompt": "p"}, model="m", settings={}, started_ns=0)
    )
    agent = AgentRecord(
        path="main", parent_path=None, parent_stage=None, name="main", model="m", started_ns=0
    )
    ledger.begin_agent("e", agent)
    for step in steps:
        ledger.append("e", **{k: v for k, v in asdict(step).items() if k != "id"})
    ledger.end_episode("e", status="done", output="", summary=summary or {}, ended_ns=1)
    return ledger


def sample(prompt_ids, token_ids, logprobs=None, **body) -> StepRecord:
    return StepRecord(
        agent_path="main",
        stage=0,
        kind="sample",
        body={"observed": [], "message": {"role": "assistant", "content": ""}, **body},
        prompt_ids=prompt_ids,
        token_ids=token_ids,
        logprobs=[-0.5] * len(token_ids) if logprobs is None else logprobs,
        weight_version=7,
    )


def test_only_what_the_orchestrator_sampled_has_mask_1(tmp_path: Path) -> None:
    episode_id = swarm_episode(tmp_path)
    ledger = Ledger(tmp_path, readonly=True)
    main, *others = branches(ledger, episode_id)
    assert main.mask == main.is_sampled
    assert any(main.mask)
    assert not all(main.mask)
    assert len(others) == 2
    for other in others:
        assert any(other.is_sampled)
        assert not any(other.mask)
    assert orchestrator_branches(ledger, episode_id) == [main]


def test_every_message_stands_in_the_graph_once_and_paths_give_the_contexts(tmp_path: Path) -> None:
    episode_id = swarm_episode(tmp_path)
    ledger = Ledger(tmp_path, readonly=True)
    graph = message_graph(ledger, episode_id)
    sampled = [node for node in graph.nodes if node.kind == "sampled"]
    assert len(sampled) == len([s for s in ledger.steps(episode_id) if s.kind == "sample"])
    total = sum(len(node.token_ids) for node in graph.nodes)
    assert total == sum(len(branch.token_ids) for branch in graph.branches())
    assert graph.launched_by == {"main/a.0": ("main", 0), "main/a.1": ("main", 0)}
    for leaf, branch in zip(graph.leaves, graph.branches(), strict=True):
        ids = [one for node in graph.path(leaf) for one in node.token_ids]
        assert tuple(ids) == branch.token_ids


def test_a_context_begun_anew_is_a_branch_of_its_own_and_versions_are_kept(tmp_path: Path) -> None:
    ledger = recorded(
        tmp_path,
        sample([1, 2], [3, 4], version_spans=[[5, 1], [6, 1]]),
        sample([5], [6]),
        sample([1, 9], [8], reset={"strategy": "discard"}),
    )
    first, second = branches(ledger, "e")
    assert first.token_ids == (1, 2, 3, 4, 5, 6)
    assert first.weight_versions == (-1, -1, 5, 6, -1, 7)
    assert first.is_sampled == (False, False, True, True, False, True)
    assert second.token_ids == (1, 9, 8)


def experts_of(positions: range) -> dict:
    """What an engine of 2 layers and 1 expert a token tells: position p chose 300 + p and p."""
    data = b"".join(struct.pack("<2H", 300 + p, p) for p in positions)
    return {"experts": (2, 1), "routed_experts": data}


def test_experts_of_the_turns_join_to_those_of_every_position_but_the_last(tmp_path: Path) -> None:
    parts = [experts_of(range(3)), experts_of(range(3, 5))]
    ledger = recorded(
        tmp_path,
        *(
            replace(sample(*ids, experts=part["experts"]), routed_experts=part["routed_experts"])
            for ids, part in zip((([1, 2], [3, 4]), ([5], [6])), parts, strict=True)
        ),
    )
    (branch,) = branches(ledger, "e")
    assert branch.experts is not None
    assert len(branch.experts) == len(branch.token_ids) - 1 == 5
    assert branch.experts.data == experts_of(range(5))["routed_experts"]


def test_experts_are_exported_with_their_shape(tmp_path: Path) -> None:
    part = experts_of(range(3))
    step = replace(
        sample([1, 2], [3, 4], experts=part["experts"]), routed_experts=part["routed_experts"]
    )
    ledger = recorded(tmp_path / "runs", step)
    export(ledger, ledger.episodes(), "parquet", tmp_path / "out.parquet")
    [row] = read(tmp_path / "out.parquet")
    assert row["experts"] == part["routed_experts"]
    assert (row["experts_layers"], row["experts_chosen"]) == (2, 1)
    (branch,) = branches(ledger, "e")
    told = json.loads(json.dumps(branch_to_json(branch)))
    assert base64.b64decode(told["experts"]["data"]) == part["routed_experts"]
    assert told["token_ids"] == [1, 2, 3, 4]


def test_a_branch_with_a_turn_that_told_no_experts_has_none(tmp_path: Path) -> None:
    part = experts_of(range(3))
    first = replace(
        sample([1, 2], [3, 4], experts=part["experts"]), routed_experts=part["routed_experts"]
    )
    (branch,) = branches(recorded(tmp_path, first, sample([5], [6])), "e")
    assert branch.experts is None


def test_pictures_are_listed_in_order_from_prompts_and_from_tools(tmp_path: Path) -> None:
    tool = StepRecord(
        agent_path="main",
        stage=0,
        kind="tool",
        body={"call_id": "c", "name": "t", "content": "", "images": [["b", ""]], "error": None},
    )
    user = {"role": "user", "content": "", "images": [["a", "a.png"]]}
    ledger = recorded(
        tmp_path,
        sample([1], [2], observed=[user]),
        tool,
        sample([3], [4], observed=[{"role": "tool", "tool_call_id": "c"}]),
    )
    assert [branch.media for branch in branches(ledger, "e")] == [("a", "b")]


@pytest.mark.parametrize(
    ("step", "reason", "sentence"),
    [
        (sample([], []), "no_token_ids", "chat completions only; use SGLang"),
        (sample([1], [2, 3], [-0.1]), "no_logprobs", "1 log-probabilities for 2 sampled ids"),
        (sample([1], [2], [float("nan")]), "non_finite_logprobs", "no finite number"),
        (sample([1], [2], [float("-inf")]), "non_finite_logprobs", "no finite number"),
    ],
)
def test_episodes_that_cannot_train_say_why_and_are_counted(
    tmp_path: Path, step: StepRecord, reason: str, sentence: str
) -> None:
    ledger = recorded(tmp_path / "runs", step)
    with pytest.raises(NotTrainable, match=sentence) as caught:
        branches(ledger, "e")
    assert caught.value.reason == reason
    told = export(ledger, ledger.episodes(), "parquet", tmp_path / "out.parquet")
    assert dict(told.left_out) == {reason: 1}
    assert sentence in told.sentences[0]


def test_an_episode_whose_model_never_spoke_is_counted(tmp_path: Path) -> None:
    ledger = recorded(tmp_path / "runs")
    told = export(ledger, ledger.episodes(), "slime", tmp_path / "out.jsonl")
    assert dict(told.left_out) == {"empty": 1}


def read(path: Path):
    import pyarrow.parquet

    return pyarrow.parquet.read_table(path).to_pylist()


def test_parquet_and_hf_hold_every_branch_bit_for_bit(tmp_path: Path) -> None:
    episode_id = swarm_episode(tmp_path / "runs")
    ledger = Ledger(tmp_path / "runs")
    ledger.judge_episode(episode_id, {"reward": 0.25, "length": 3.0})
    told = export(ledger, ledger.episodes(), "parquet", tmp_path / "out.parquet")
    rows = read(tmp_path / "out.parquet")
    expected = branches(ledger, episode_id)
    assert (told.num_branches, len(rows)) == (3, 3)
    assert told.num_trained_tokens == sum(expected[0].mask)
    for row, branch in zip(rows, expected, strict=True):
        assert row["schema_version"] == TRAJECTORY_SCHEMA
        assert tuple(row["token_ids"]) == branch.token_ids
        assert tuple(row["mask"]) == branch.mask
        assert tuple(row["logprobs"]) == branch.logprobs
        assert (row["reward"], json.loads(row["rewards"])["length"]) == (0.25, 3.0)
    export(ledger, ledger.episodes(), "hf", tmp_path / "hf")
    assert read(next((tmp_path / "hf" / "data").iterdir())) == rows
    assert (tmp_path / "hf" / "README.md").read_text().startswith("---\nconfigs:")
    with pytest.raises(ConfigError, match="exists already"):
        export(ledger, [], "hf", tmp_path / "hf")


def test_slime_and_verl_get_what_trains_cut_at_the_first_sampled_id(tmp_path: Path) -> None:
    episode_id = swarm_episode(tmp_path / "runs")
    ledger = Ledger(tmp_path / "runs")
    [branch] = orchestrator_branches(ledger, episode_id)
    start = branch.is_sampled.index(True)
    export(ledger, ledger.episodes(), "slime", tmp_path / "out.jsonl")
    [row] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert row["tokens"] == list(branch.token_ids)
    assert row["response_length"] == len(row["loss_mask"]) == len(row["rollout_log_probs"])
    assert row["loss_mask"] == [int(one) for one in branch.mask[start:]]
    export(ledger, ledger.episodes(), "verl", tmp_path / "verl.parquet")
    [row] = read(tmp_path / "verl.parquet")
    assert row["prompts"] + row["responses"] == list(branch.token_ids)
    assert row["response_mask"] == [int(one) for one in branch.mask[start:]]


def test_an_orchestrator_is_exported_for_training_whatever_its_sub_agents_ran_on(
    tmp_path: Path,
) -> None:
    ledger = recorded(tmp_path / "runs", sample([1, 2], [3, 4]))
    child = AgentRecord(
        path="main/a.0", parent_path="main", parent_stage=0, name="a", model="chat", started_ns=1
    )
    ledger.begin_agent("e", child)
    said = replace(sample([], []), agent_path="main/a.0")
    ledger.append("e", **{k: v for k, v in asdict(said).items() if k != "id"})
    told = export(ledger, ledger.episodes(), "verl", tmp_path / "verl.parquet")
    assert (told.num_branches, dict(told.left_out)) == (1, {})
    assert read(tmp_path / "verl.parquet")[0]["responses"] == [3, 4]
    told = export(ledger, ledger.episodes(), "parquet", tmp_path / "all.parquet")
    assert dict(told.left_out) == {"no_token_ids": 1}
    assert "no token ids of main/a.0" in told.sentences[0]


def test_drift_is_none_where_the_text_gives_the_ids_and_else_told_by_cause(tmp_path: Path) -> None:
    episode_id = swarm_episode(tmp_path)
    ledger = Ledger(tmp_path)
    assert count_drift(ledger, episode_id, FORMAT, TOKENIZER.decode) == {"none": 2}

    first = count_drift(ledger, episode_id, FORMAT, TOKENIZER.decode, max_turns=1)
    assert first == {"none": 1}

    class Edited(Ledger):
        def steps(self, episode_id, agent_path=None):
            yield from (edit(step) for step in Ledger.steps(self, episode_id, agent_path))

    def counted(change):
        nonlocal edit
        edit = change
        found = count_drift(Edited(tmp_path, readonly=True), episode_id, FORMAT, TOKENIZER.decode)
        return found - {"none": 9} if "none" in found else found

    def only_turns(change):
        return lambda step: change(step) if step.kind == "sample" else step

    edit = None
    end = TOKENIZER.special.im_end
    letters = {}  # the same text, letter by letter

    def spelt(step):
        ids = []
        for one in step.token_ids:
            text = TOKENIZER.decode([one])
            is_text = one < 3840 and text.isascii()
            ids += [i for c in text for i in TOKENIZER.encode(c)] if is_text else [one]
        letters[step.id] = ids
        return replace(step, token_ids=ids, logprobs=[-1.0] * len(ids))

    assert counted(only_turns(spelt)) == {"retokenised": 2}
    cut = only_turns(lambda s: replace(s, token_ids=[i for i in s.token_ids if i != end]))
    assert counted(cut) == {"cut": 2}
    extra = TOKENIZER.encode("x")
    other = only_turns(lambda s: replace(s, token_ids=[*extra, *s.token_ids]))
    assert counted(other) == {"reread": 2}
    foreign = only_turns(lambda s: replace(s, prompt_ids=[i + 1 for i in s.prompt_ids]))
    assert counted(foreign) == {"tokenizer": 2}


def test_a_turn_whose_picture_is_lost_is_counted_so(tmp_path: Path) -> None:
    user = {"role": "user", "content": "", "images": [["feed", "a.png", ""]]}
    ledger = recorded(tmp_path, sample([1], [2], observed=[user]))
    assert count_drift(ledger, "e", FORMAT, TOKENIZER.decode) == {"lost": 1}


def test_the_command_writes_all_episodes_and_refuses_what_it_cannot_write(tmp_path: Path) -> None:
    runs, out = tmp_path / "runs", tmp_path / "out.parquet"
    swarm_episode(runs)
    swarm_episode(runs)
    command = ["trace", "export", "--runs", str(runs), "--format"]
    done = CliRunner().invoke(app, [*command, "parquet", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "6 branches" in done.stderr
    assert len(read(out)) == 6
    assert "needs --out" in CliRunner().invoke(app, [*command, "verl"]).stderr
    assert "unknown format 'csv'" in CliRunner().invoke(app, [*command, "csv"]).stderr
