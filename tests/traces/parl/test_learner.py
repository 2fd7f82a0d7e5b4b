"""From episodes on record to an update: batches, packing, shared prompts, gradients."""

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import MediaBatch, decode_image, preprocess_image
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.traces.ledger import AgentRecord, EpisodeRecord, Ledger
from swarm_sdk.traces.parl.batch import Batch, BatchReader, Sample, micro_batches
from swarm_sdk.traces.parl.learner import Learner, LearnerConfig
from swarm_sdk.traces.parl.loss import LossConfig
from swarm_sdk.traces.parl.muonclip import MuonClipConfig
from swarm_sdk.traces.parl.rewards.parl import ParlReward, Schedule
from swarm_sdk.traces.parl.toggle import Toggle
from swarm_sdk.types import Image

NO_HELP = ParlReward(parallel=Schedule(start=0, steps=0), finish=Schedule(start=0, steps=0))
PROMPT = list(range(10, 30))


def model_of(seed: int) -> KimiModel:
    model = KimiModel(tiny())
    model.init_weights(seed)
    return model


def record(ledger: Ledger, episode_id: str, ids, reward, *, settings=None, status="done", **step):
    """One episode: a prompt, then turns of (observed ids, sampled ids)."""
    settings = {"launch": {"task": "q"}, "sampling": {"temperature": 1.0, "top_p": 1.0}} | (
        settings or {}
    )
    ledger.begin_episode(
        EpisodeRecord(
            id=episode_id, task={"prompt": "p"}, model="m", settings=settings, started_ns=0
        )
    )
    main = AgentRecord(
        path="main", parent_path=None, parent_stage=None, name="main", model="m", started_ns=0
    )
    ledger.begin_agent(episode_id, main)
    for seen, said in ids:
        row = {
            "agent_path": "main",
            "stage": 0,
            "kind": "sample",
            "body": {"observed": [], "message": {}},
            "prompt_ids": seen,
            "token_ids": said,
            "logprobs": [-1.0] * len(said),
        }
        ledger.append(episode_id, **(row | step))
    summary = {"critical_steps": 1, "total_steps": 1, "subagents": 0}
    ledger.end_episode(episode_id, status=status, output="", summary=summary, ended_ns=1)
    if reward is not None:
        ledger.judge_episode(episode_id, {"reward": reward})


def groups(ledger: Ledger, *sizes: int):
    records = iter(ledger.episodes())
    return [[next(records) for _ in range(size)] for size in sizes]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


def batch_of(ledger: Ledger) -> Batch:
    draw = np.random.default_rng(0)
    for question in range(3):
        prompt = [40 + question] * 7 + PROMPT
        for sample in range(4):
            said = [draw.integers(5, 400, draw.integers(3, 9)).tolist() for _ in range(2)]
            turns = [(prompt, said[0]), ([7, 8, 9], said[1])]
            record(ledger, f"e{question}{sample}", turns, float(draw.uniform()))
    return BatchReader(reward=NO_HELP).read(ledger, groups(ledger, 4, 4, 4), 0)


def picture(seed: int) -> Image:
    """28 pixels square: one token."""
    pixels = np.random.default_rng(seed).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    drawn = io.BytesIO()
    PIL.Image.fromarray(pixels).save(drawn, "PNG")
    return Image(drawn.getvalue())


def plain_logprobs(model: KimiModel, sample: Sample) -> torch.Tensor:
    """One sequence by itself."""
    ids = torch.from_numpy(sample.ids_S.astype(np.int64))
    attention = FullAttention(model.config.text_config, [len(ids)])
    seen = [preprocess_image(decode_image(image.data)) for image in sample.images]
    media = MediaBatch.of(seen) if seen else None
    hidden = model(ids, torch.arange(len(ids)), attention, media)
    logprobs = (model.logits(hidden) / sample.temperature).log_softmax(-1)
    places = torch.from_numpy(np.flatnonzero(sample.mask_S))
    return logprobs[places - 1, ids[places]]


def test_advantages_are_rewards_less_their_mean_and_weights_count_all_tokens(ledger) -> None:
    batch = batch_of(ledger)
    assert [len(group) for group in batch.groups] == [4, 4, 4]
    for group in batch.groups:
        assert sum(sample.advantage for sample in group) == pytest.approx(0)
        num = sum(int(sample.mask_S.sum()) for sample in group)
        assert {sample.weight for sample in group} == {1 / num}
    packed = micro_batches(batch, 10_000)
    assert float(sum(m.weights_X.sum() for m in packed)) == pytest.approx(1.0)


@pytest.mark.parametrize("max_tokens", [10_000, 90, 1])
def test_packed_logprobs_with_shared_prompts_are_those_of_each_sequence_alone(
    ledger, max_tokens: int
) -> None:
    batch, model = batch_of(ledger), model_of(0)
    learner = Learner(model, LearnerConfig())
    packed = micro_batches(batch, max_tokens)
    found = torch.cat([learner.logprobs(micro) for micro in packed])
    expected = torch.cat([plain_logprobs(model, sample) for sample in batch.samples])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)
    targets = torch.cat([micro.targets_X for micro in packed])
    assert targets.tolist() == [i for s in batch.samples for i in s.ids_S[s.mask_S].tolist()]
    if max_tokens == 10_000:
        assert len(packed) == 1
        assert len(packed[0].ids_T) == batch.num_tokens - 3 * 3 * 27  # each prompt stands once


def test_samples_of_other_temperatures_and_with_pictures_are_packed_right(ledger) -> None:
    batch, model = batch_of(ledger), model_of(0)
    seen = model.config.media_placeholder_token_id
    for index, group in enumerate(batch.groups):
        for number, sample in enumerate(group):
            if index == 1:  # each response was drawn after another picture, at the same ids
                ids = sample.ids_S.copy()
                ids[3] = seen
                group[number] = replace(sample, ids_S=ids, images=(picture(number),))
            if index == 2:
                group[number] = replace(sample, temperature=0.5)
    found = [Learner(model, LearnerConfig()).logprobs(m) for m in micro_batches(batch, 10_000)]
    assert len(found) == 2  # one pass for each temperature
    expected = torch.cat([plain_logprobs(model, sample) for sample in batch.samples])
    torch.testing.assert_close(torch.cat(found), expected, atol=5e-6, rtol=1e-5)
    blind = [replace(sample, images=()) for sample in batch.groups[1]]
    shown = torch.cat([plain_logprobs(model, sample) for sample in batch.groups[1]])
    unseen = torch.cat([plain_logprobs(model, sample) for sample in blind])
    assert not torch.allclose(shown, unseen, atol=1e-3)


def test_the_gradient_is_that_of_equation_1_written_out_over_plain_sequences(ledger) -> None:
    batch = batch_of(ledger)
    config = LearnerConfig(loss=LossConfig(tau=0.1, alpha=0.2, beta=5.0), micro_tokens=80)
    learner, model = Learner(model_of(0), config), model_of(0)
    figures, _ = learner.accumulate(batch)
    total = torch.zeros(())
    for group in batch.groups:
        num = sum(int(sample.mask_S.sum()) for sample in group)
        for sample in group:
            log_ratio = plain_logprobs(model, sample) + 1.0  # recorded: -1 each
            gain = log_ratio.exp().clamp(0.2, 5.0) * sample.advantage - 0.1 * log_ratio**2
            total = total - gain.sum() / num / len(batch.groups)
    total.backward()
    assert figures["loss"] == pytest.approx(float(total.detach()), rel=1e-4)
    others = dict(model.named_parameters())
    for name, parameter in learner.model.named_parameters():
        if parameter.requires_grad and others[name].grad is not None:
            torch.testing.assert_close(parameter.grad, others[name].grad, atol=1e-5, rtol=1e-3)


def test_an_update_changes_the_text_weights_and_leaves_the_eyes(ledger) -> None:
    batch = batch_of(ledger)
    learner = Learner(model_of(0), LearnerConfig(optimizer=MuonClipConfig(lr=1e-3)))
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    losses = [learner.update(batch)["loss"] for _ in range(6)]
    assert losses[-1] < losses[0]
    assert all(math.isfinite(loss) for loss in losses)
    for name, parameter in learner.model.named_parameters():
        is_eye = name.startswith(("vision_tower", "mm_projector"))
        assert torch.equal(parameter, before[name]) == is_eye, name


def test_the_rate_rises_over_the_first_updates_and_long_gradients_are_cut(ledger) -> None:
    config = LearnerConfig(optimizer=MuonClipConfig(lr=1e-3), warmup_updates=4, max_grad_norm=1e-3)
    batch, learner, rates = batch_of(ledger), Learner(model_of(0), config), []
    for _ in range(5):
        figures = learner.update(batch)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])
    assert figures["grad_norm"] > 1e-3
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    norm = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    assert float(norm) == pytest.approx(1e-3, rel=1e-2)


def test_an_update_clips_the_heads_whose_logits_its_own_forward_saw(ledger) -> None:
    batch = batch_of(ledger)
    optimizer = MuonClipConfig(lr=0.0, weight_decay=0.0, tau=0.05)  # the step itself does nothing
    learner = Learner(model_of(0), LearnerConfig(optimizer=optimizer))
    before = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    _, logits_YH = learner.accumulate(batch)
    figures = learner.update(batch)
    assert figures["clipped_heads"] == int((logits_YH > 0.05).sum()) > 0
    changed = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[-2] for name in changed} == {"q_b_proj", "kv_b_proj"}
    assert float(learner.accumulate(batch)[1][0].max()) <= 0.05 * 1.001


def test_tokens_of_the_trainers_own_version_are_compared_with_the_record(ledger) -> None:
    batch, model = batch_of(ledger), model_of(0)
    for sample in batch.samples:
        sample.logprobs_S[sample.mask_S] = plain_logprobs(model, sample).detach().numpy() + 0.25
    batch.samples[0].versions_S[batch.samples[0].mask_S] = 3
    figures, _ = Learner(model, LearnerConfig()).accumulate(batch, version=3)
    assert figures["engine_trainer_mean_abs_dlogprob"] == pytest.approx(0.25, abs=1e-5)
    assert figures["engine_trainer_max_abs_dlogprob"] == pytest.approx(0.25, abs=1e-5)
    assert (
        "engine_trainer_mean_abs_dlogprob"
        not in Learner(model, LearnerConfig()).accumulate(batch, version=9)[0]
    )


def test_routing_disagreement_is_the_share_of_tokens_with_other_experts(ledger) -> None:
    batch, learner = batch_of(ledger), Learner(model_of(0), LearnerConfig())
    same, other = model_of(0), model_of(0)
    assert learner.routing_disagreement(same, batch) == 0.0
    with torch.no_grad():  # the last mixture alone is forced to other experts
        gate = other.layers[-1].mlp.gate
        gate.e_score_correction_bias[: gate.num_chosen] += 9.0
        learner.model.layers[-1].mlp.gate.e_score_correction_bias[-gate.num_chosen :] += 9.0
    num_mixtures = sum(hasattr(layer.mlp, "gate") for layer in other.layers)
    assert learner.routing_disagreement(other, batch) == pytest.approx(1 / num_mixtures)
    assert learner.routing_disagreement(same, Batch(groups=[[]])) is None


def test_replayed_routing_takes_the_sampling_networks_experts_with_ones_own_weights(ledger) -> None:
    batch, learner, served = batch_of(ledger), Learner(model_of(0), LearnerConfig()), model_of(0)
    [micro] = micro_batches(batch, 10_000)
    own = learner.logprobs(micro)
    with torch.no_grad():  # the sampler's last mixture was at other experts
        served.layers[-1].mlp.gate.e_score_correction_bias[:2] += 9.0
    chosen: list[torch.Tensor] = []
    attention = FullAttention(served.config.text_config, micro.seq_lens, prefix_of=micro.prefix_of)
    hidden_TD = served(micro.ids_T, micro.positions_T, attention, None, chosen)
    logits_XV = served.logits(hidden_TD[micro.rows_X]).log_softmax(-1)
    theirs = logits_XV.gather(1, micro.targets_X[:, None])[:, 0]
    assert not torch.allclose(own, theirs, atol=1e-4)
    # The same weights at the same experts: the same log-probabilities.
    replayed = learner.logprobs(micro, replayed_experts=chosen)
    torch.testing.assert_close(replayed, theirs, atol=1e-5, rtol=1e-5)
    passes: list[bool] = []
    served.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    learner.accumulate(batch, replayed=served)
    assert passes == [False], "a network that is only asked keeps nothing for a backward pass"
    gate = learner.model.layers[-1].mlp.gate
    assert gate.weight.grad is not None
    assert torch.isfinite(gate.weight.grad).all()
    assert all(layer.mlp.gate.weight.grad is None for layer in served.layers[1:])


def test_experts_on_record_train_as_those_of_the_network_that_chose_them(ledger) -> None:
    batch, served = batch_of(ledger), model_of(0)
    text = served.config.text_config
    with torch.no_grad():
        served.layers[-1].mlp.gate.e_score_correction_bias[:2] += 9.0

    def recorded(sample: Sample) -> Sample:
        """As an engine tells them: layers without a mixture hold zeros."""
        chosen: list[torch.Tensor] = []
        ids_S = torch.from_numpy(sample.ids_S[:-1].astype(np.int64))
        served(ids_S, torch.arange(len(ids_S)), FullAttention(text, [len(ids_S)]), None, chosen)
        dense = [torch.zeros_like(chosen[0])] * text.first_k_dense_replace
        experts_SLK = torch.stack([*dense, *chosen], 1).numpy().astype(np.uint16)
        return replace(sample, experts_SLK=np.concatenate([experts_SLK, experts_SLK[-1:]]))

    known = Batch(groups=[[recorded(sample) for sample in group] for group in batch.groups])
    own, asked, told = (Learner(model_of(0), LearnerConfig()) for _ in range(3))
    losses = [
        learner.accumulate(given, replayed=network)[0]["kl"]
        for learner, given, network in (
            (own, batch, None),
            (asked, batch, served),
            (told, known, None),
        )
    ]
    assert losses[2] == pytest.approx(losses[1], rel=1e-6)
    assert losses[2] != pytest.approx(losses[0], rel=1e-6)
    for one, other in zip(told.model.parameters(), asked.model.parameters(), strict=True):
        if other.grad is not None:
            assert one.grad is not None
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    foreign = Batch(
        groups=[[replace(s, experts_SLK=s.experts_SLK[:, :, :1]) for s in g] for g in known.groups]
    )
    with pytest.raises(ConfigError, match="another model sampled; leave replay_routing off"):
        told.accumulate(foreign)


def test_a_reader_takes_the_experts_on_record_and_leaves_out_who_has_none(ledger) -> None:
    said, (layers, chosen) = [5, 6, 7], (3, 2)
    num = len(PROMPT) + len(said) - 1
    data = np.arange(num * layers * chosen, dtype="<u2")
    for index in range(3):
        step = {
            "body": {"observed": [], "message": {}, "experts": (layers, chosen)},
            "routed_experts": data.tobytes(),
        }
        record(ledger, f"e{index}", [(PROMPT, said)], index, **(step if index else {}))
    read = groups(ledger, 3)
    with_all = BatchReader(reward=NO_HELP, keeps_experts=True, needs_experts=True)
    batch = with_all.read(ledger, read, 0)
    assert dict(batch.left_out) == {"no_experts": 1}
    assert "--enable-return-routed-experts" in batch.sentences["no_experts"]
    for sample in batch.samples:
        told = sample.experts_SLK
        assert told.shape == (num + 1, layers, chosen)
        assert (told[:-1].reshape(-1) == data).all()
        assert (told[-1] == told[-2]).all()
    [micro] = micro_batches(batch, 10_000)
    assert micro.experts_TLK.shape == (len(micro.ids_T), layers, chosen)
    # One without makes the whole pass choose for itself.
    batch = BatchReader(reward=NO_HELP, keeps_experts=True).read(ledger, read, 0)
    [micro] = micro_batches(batch, 10_000)
    assert micro.experts_TLK is None
    assert all(s.experts_SLK is None for s in BatchReader().read(ledger, read, 0).samples)


def test_parts_of_a_batch_hold_each_question_once(ledger) -> None:
    batch = batch_of(ledger)
    batch.groups.append([])
    parts = batch.split(2)
    assert sorted(map(id, (s for p in parts for s in p.samples))) == sorted(map(id, batch.samples))
    assert sum(len(part.groups) for part in parts) == 4
    assert len(batch.split(99)) == 3
    assert Batch(groups=[[]]).split(2)[0].samples == []


def test_a_batch_without_a_sample_changes_nothing(ledger) -> None:
    learner = Learner(model_of(0), LearnerConfig())
    before = learner.model.lm_head.weight.detach().clone()
    assert learner.update(Batch(groups=[[]]))["loss"] == 0
    assert torch.equal(learner.model.lm_head.weight, before)


@pytest.mark.parametrize(
    ("change", "reason", "sentence"),
    [
        ({"reward": None}, "no_reward", "no reward on record"),
        ({"status": "cancelled"}, "unfinished", "did not end"),
        ({"settings": {"sampling": {"temperature": 1, "top_p": 0.9}}}, "top_p", "top_p 1"),
        ({"settings": {"sampling": {"temperature": 0, "top_p": 1}}}, "greedy", "temperature 0"),
        ({"ids": [([1], [511, 512])]}, "foreign_tokens", "another tokenizer"),
        ({"ids": [([1], [])]}, "no_token_ids", "chat completions only"),
        ({"ids": []}, "empty", "no sampled token"),
        ({"logprobs": [0.0]}, "no_logprobs", "log-probabilities for"),
        ({"logprobs": [float("nan")] * 2}, "non_finite_logprobs", "no finite number"),
        (
            {"body": {"observed": [{"role": "user", "images": [["feed", "x.png"]]}]}},
            "missing_media",
            "lacks the picture feed",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_train_is_told_and_counted(ledger, change, reason, sentence) -> None:
    for number in range(2):
        record(ledger, f"good{number}", [([1], [2, 3])], float(number))
    record(ledger, "odd", **({"ids": [([1], [2, 3])], "reward": 0.5} | change))
    batch = BatchReader(reward=NO_HELP, vocab_size=512).read(ledger, groups(ledger, 3), 0)
    assert dict(batch.left_out) == {reason: 1}
    assert sentence in batch.sentences[reason]
    assert len(batch.samples) == 2
    assert batch.figures["episodes"] == 2


def add_subagent(ledger: Ledger, episode_id: str, ids: list[int]) -> None:
    """A sub-agent of an episode that said ``ids``."""
    child = AgentRecord(
        path="main/a.0", parent_path="main", parent_stage=0, name="a", model="f", started_ns=1
    )
    ledger.begin_agent(episode_id, child)
    ledger.append(
        episode_id,
        agent_path="main/a.0",
        stage=0,
        kind="sample",
        body={"observed": [], "message": {}},
        prompt_ids=[9, 9],
        token_ids=ids,
        logprobs=[-1.0] * len(ids),
    )


def test_what_sub_agents_sampled_trains_only_in_the_ablation_that_says_so(ledger) -> None:
    for number in range(2):
        record(ledger, f"e{number}", [([1], [2, 3])], float(number))
        add_subagent(ledger, f"e{number}", [4, 5, 6])
    batch = BatchReader(reward=NO_HELP).read(ledger, groups(ledger, 2), 0)
    assert [sample.ids_S.tolist() for sample in batch.samples] == [[1, 2, 3]] * 2
    assert {sample.weight for sample in batch.samples} == {1 / 4}
    [micro] = micro_batches(batch, 1_000)
    assert micro.targets_X.tolist() == [2, 3] * 2
    both = BatchReader(reward=NO_HELP, train_subagents=True).read(ledger, groups(ledger, 2), 0)
    assert [s.ids_S.tolist() for s in both.samples] == [[1, 2, 3], [9, 9, 4, 5, 6]] * 2
    assert {sample.weight for sample in both.samples} == {1 / 10}


def test_groups_of_one_and_equal_rewards_give_no_samples_and_are_counted(ledger) -> None:
    record(ledger, "a", [([1], [2])], 1.0)
    for name in "bcd":
        record(ledger, name, [([1], [2])], 0.5)
    batch = BatchReader(reward=NO_HELP).read(ledger, groups(ledger, 1, 3), 0)
    assert batch.groups == [[], []]
    assert dict(batch.left_out) == {"group_of_one": 1, "equal_rewards": 3}
    assert "alone in its group" in batch.sentences["group_of_one"]
    assert "all have the reward 0.5: there is nothing to prefer" in batch.sentences["equal_rewards"]


def test_figures_tell_what_there_is_to_learn_from(ledger) -> None:
    for number, reward in enumerate((0.0, 1.0, 0.5, 0.5)):
        record(ledger, f"e{number}", [([1], [2, 3])], reward, logprobs=[-0.25, -0.75])
    figures = BatchReader(reward=NO_HELP).read(ledger, groups(ledger, 2, 2), 0).figures
    assert figures["reward_spread"] == pytest.approx(0.25)
    assert figures["share_equal_groups"] == 0.5
    assert figures["entropy"] == pytest.approx(0.5)
    assert figures["share_spawned"] == 0.0


def test_episodes_that_could_not_spawn_train_and_have_figures_of_their_own(ledger) -> None:
    said = [(PROMPT, [5, 6])]
    for number, reward in enumerate((0.0, 1.0, 0.25, 0.75)):
        record(ledger, f"e{number}", said, reward, settings={"can_spawn": number < 2})
    batch = BatchReader(reward=NO_HELP).read(ledger, groups(ledger, 2, 2), 0)
    assert [len(group) for group in batch.groups] == [2, 2]
    assert (batch.figures["reward"], batch.figures["reward_spread"]) == (0.5, 0.5)
    assert (batch.figures["alone_reward"], batch.figures["alone_reward_spread"]) == (0.5, 0.25)
    assert (batch.figures["episodes"], batch.figures["alone_episodes"]) == (2, 2)


def test_toggle_asks_what_is_correct_of_the_outcome_and_not_of_the_helpers(ledger) -> None:
    for number, outcome in enumerate((0.9, 0.5)):
        record(ledger, f"e{number}", [([1], [2, 3])], outcome)
    help_ = ParlReward(parallel=Schedule(start=0, steps=0), finish=Schedule(start=0.2, steps=9))
    toggle = Toggle(period=1)
    BatchReader(reward=help_, toggle=toggle).read(ledger, groups(ledger, 2), 0)
    assert toggle.budgets == {}


def test_toggle_takes_the_reward_of_long_answers_in_its_phase(ledger) -> None:
    for number, length in enumerate((2, 2, 2, 9)):
        record(ledger, f"e{number}", [([1], list(range(5, 5 + length)))], 1.0)
    toggle = Toggle(period=1, percentile=50)
    reader = BatchReader(reward=NO_HELP, toggle=toggle)
    limited = reader.read(ledger, groups(ledger, 4), 0)
    assert [s.advantage for s in limited.groups[0]] == [0.25, 0.25, 0.25, -0.75]
    free = reader.read(ledger, groups(ledger, 4), 1)
    assert free.groups == [[]]
    assert toggle.budgets == {"q": 2}
