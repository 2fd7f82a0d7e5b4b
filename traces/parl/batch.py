"""From recorded episodes to what one update computes: eq. (1)'s tokens, advantages and weights.

    groups of K episodes ─> rewards ─> r - mean r ─> samples ─> units ─> packed micro-batches
                               │ Toggle                          prefix | cont | cont | …
                               └ λ1 r_parallel + λ2 r_finish + r_perf

There is one way here, from the ledger: live training and the replay of old runs read the same
records through the same code, so they give the same gradient. The responses of a question begin
with the same prompt; a unit holds it once, and the responses attend to it (``FullAttention``).

A group whose rewards are all equal has no advantage; it counts among the questions of the mean, and
its tokens are not computed (their tau term, which is 0 on the first update, is left out: ours).
"""

# Shapes: S = tokens of a sample, T = packed tokens of a micro-batch, X = trained tokens.

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from swarm_sdk.errors import LedgerError, NotTrainable
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger
from swarm_sdk.traces.parl.rewards.parl import ParlReward, Terms, read_subtasks, width
from swarm_sdk.traces.parl.toggle import Toggle
from swarm_sdk.traces.trajectory import Branch, branches, orchestrator_branches
from swarm_sdk.types import Image

EQUAL = 1e-9
"""Rewards whose standard deviation is below it are all equal."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """One branch that trains."""

    episode_id: str
    ids_S: NDArray[np.int32]
    mask_S: NDArray[np.bool_]
    logprobs_S: NDArray[np.float32]
    versions_S: NDArray[np.int32]
    advantage: float
    weight: float
    """1 / N_x of its question: of each of its tokens in the question's mean."""
    temperature: float
    images: tuple[Image, ...] = ()
    experts_SLK: NDArray[np.uint16] | None = None
    """Which experts the sampler recorded, of each layer, to be replayed; the last token, which
    predicts nothing, has those of the one before."""

    @property
    def prefix_tokens(self) -> int:
        """Ids before the first sampled one."""
        return int(self.mask_S.argmax())


@dataclass(slots=True, kw_only=True)
class Batch:
    """The samples of some questions, and what was seen on the way."""

    groups: list[list[Sample]]
    """Of each question; empty where nothing of it trains."""
    figures: dict[str, float] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    """Episodes that do not train, by reason."""
    sentences: dict[str, str] = field(default_factory=dict)
    """Of each reason: what is said of its first episode."""

    def leave_out(self, reason: str, sentence: str, num_episodes: int = 1) -> None:
        """Count episodes that do not train."""
        self.left_out[reason] += num_episodes
        self.sentences.setdefault(reason, sentence)

    @property
    def samples(self) -> list[Sample]:
        """All samples, in order."""
        return [sample for group in self.groups for sample in group]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, shared prefixes counted in each."""
        return sum(len(sample.ids_S) for sample in self.samples)

    def split(self, num_parts: int) -> list[Batch]:
        """Parts of about equally many questions that train, one an update."""
        full = [group for group in self.groups if group]
        num_parts = max(1, min(num_parts, len(full)))
        share = len(self.groups) / num_parts
        parts = []
        for index in range(num_parts):
            groups = full[index::num_parts]
            empty: list[list[Sample]] = [[]] * max(0, round(share) - len(groups))
            parts.append(Batch(groups=groups + empty))
        return parts


@dataclass(slots=True, kw_only=True)
class BatchReader:
    """How episodes become a batch."""

    reward: ParlReward = field(default_factory=ParlReward)
    toggle: Toggle | None = None
    vocab_size: int | None = None
    """Ids from here on are foreign; ``None`` asks nothing."""
    train_subagents: bool = False
    """Train what sub-agents sampled too: not PARL, an ablation."""
    keeps_experts: bool = False
    """Take along the experts on record (routing replay)."""
    needs_experts: bool = False
    """Leave out episodes that have none."""
    check: Callable[[Ledger, EpisodeRecord], None] | None = None
    """Further checks of an episode; raises ``NotTrainable``."""

    def read(
        self, ledger: Ledger, groups: Sequence[Sequence[EpisodeRecord]], iteration: int
    ) -> Batch:
        """The batch of ``groups``, each the episodes of one question.

        Raises:
            LedgerError: the ledger cannot be read.
        """
        batch = Batch(groups=[])
        seen: list[list[_Seen]] = []
        for group in groups:
            read = [
                one for record in group if (one := self._read(ledger, record, iteration, batch))
            ]
            seen.append(read)
            batch.groups.append(self._samples(read, iteration, batch))
        alone = [[one for one in group if not one.can_spawn] for group in seen]
        batch.figures = _figures([[one for one in group if one.can_spawn] for group in seen])
        batch.figures |= {f"alone_{key}": value for key, value in _figures(alone).items()}
        return batch

    def _read(
        self, ledger: Ledger, record: EpisodeRecord, iteration: int, batch: Batch
    ) -> _Seen | None:
        try:
            rewards = _rewards(record)
            temperature = _temperature(record)
            read = branches if self.train_subagents else orchestrator_branches
            found = [b for b in read(ledger, record.id) if any(b.is_sampled)]
            if not found:
                raise NotTrainable("empty", f"episode {record.id} has no sampled token")
            self._check_ids(record, found)
            if self.needs_experts and not all(branch.experts for branch in found):
                raise NotTrainable(
                    "no_experts",
                    f"episode {record.id} has not all its experts on record: serve with "
                    "--enable-return-routed-experts, or leave replay_routing off",
                )
            images = [_images(ledger, branch) for branch in found]
            if self.check is not None:
                self.check(ledger, record)
        except NotTrainable as error:
            batch.leave_out(error.reason, str(error))
            return None
        subtasks = read_subtasks(ledger, record.id)
        return _Seen(
            record=record,
            branches=found,
            images=images,
            terms=self.reward(iteration, rewards["reward"], subtasks),
            width=width(subtasks),
            temperature=temperature,
        )

    def _check_ids(self, record: EpisodeRecord, found: Sequence[Branch]) -> None:
        largest = max(max(branch.token_ids) for branch in found)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise NotTrainable(
                "foreign_tokens",
                f"episode {record.id} holds the id {largest} and the policy's vocabulary has "
                f"{self.vocab_size}: it was recorded with another tokenizer",
            )

    def _samples(self, read: Sequence[_Seen], iteration: int, batch: Batch) -> list[Sample]:
        if len(read) < 2:
            if read:
                batch.leave_out(
                    "group_of_one",
                    f"episode {read[0].record.id} is alone in its group: there is no mean to "
                    "compare it with; record K >= 2 episodes a question",
                )
            return []
        rewards = [one.terms.total for one in read]
        lengths = [one.num_trained for one in read]
        if self.toggle is not None:
            question = str(read[0].record.settings.get("launch", {}).get("task", ""))
            outcomes = [one.terms.perf for one in read]
            rewards = self.toggle.rewards(question, iteration, rewards, lengths, outcomes)
        if pstdev(rewards) < EQUAL:
            batch.leave_out(
                "equal_rewards",
                f"episode {read[0].record.id} and the other {len(read) - 1} of its question "
                f"all have the reward {rewards[0]:g}: there is nothing to prefer; ask what is "
                "neither too easy nor too hard, or record more episodes of each question",
                len(read),
            )
            return []
        mean = fmean(rewards)
        return [
            Sample(
                episode_id=one.record.id,
                ids_S=np.array(branch.token_ids, dtype=np.int32),
                mask_S=np.array(branch.is_sampled, dtype=np.bool_),
                logprobs_S=np.array(branch.logprobs, dtype=np.float32),
                versions_S=np.array(branch.weight_versions, dtype=np.int32),
                advantage=reward - mean,
                weight=1 / sum(lengths),
                temperature=one.temperature,
                images=images,
                experts_SLK=_experts(branch) if self.keeps_experts else None,
            )
            for one, reward in zip(read, rewards, strict=True)
            for branch, images in zip(one.branches, one.images, strict=True)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    record: EpisodeRecord
    branches: list[Branch]
    images: list[tuple[Image, ...]]
    terms: Terms
    width: int
    temperature: float

    @property
    def can_spawn(self) -> bool:
        return bool(self.record.settings.get("can_spawn", True))

    @property
    def num_trained(self) -> int:
        return sum(sum(branch.is_sampled) for branch in self.branches)

    @property
    def sum_logprobs(self) -> float:
        return sum(
            logprob
            for branch in self.branches
            for logprob, is_sampled in zip(branch.logprobs, branch.is_sampled, strict=True)
            if is_sampled
        )


def _rewards(record: EpisodeRecord) -> Mapping[str, float]:
    if record.status is None or record.status == "cancelled":
        raise NotTrainable("unfinished", f"episode {record.id} did not end; resume it first")
    rewards = (record.summary or {}).get("rewards", {})
    if rewards.get("reward") is None:  # JSON has null where it was no finite number
        raise NotTrainable(
            "no_reward",
            f"episode {record.id} has no reward on record; run it through swarm.rollouts() with an "
            "environment that judges it",
        )
    found: Mapping[str, float] = rewards
    return found


def _temperature(record: EpisodeRecord) -> float:
    sampling = record.settings.get("sampling", {})
    temperature, top_p = sampling.get("temperature", 1.0), sampling.get("top_p", 1.0)
    if top_p < 1:
        raise NotTrainable(
            "top_p",
            f"episode {record.id} was sampled with top_p {top_p}: its log-probabilities are of a "
            "cut distribution; sample with top_p 1",
        )
    if temperature <= 0:
        raise NotTrainable(
            "greedy",
            f"episode {record.id} was sampled with temperature 0: there was nothing to explore; "
            "sample with a temperature above 0",
        )
    return float(temperature)


def _images(ledger: Ledger, branch: Branch) -> tuple[Image, ...]:
    try:
        return tuple(ledger.media(digest) for digest in branch.media)
    except LedgerError as error:
        raise NotTrainable("missing_media", f"episode {branch.episode_id}: {error}") from error


def _experts(branch: Branch) -> NDArray[np.uint16] | None:
    told = branch.experts
    if told is None:
        return None
    experts_SLK = np.frombuffer(told.data, dtype="<u2").reshape(
        len(told), told.num_layers, told.num_chosen
    )
    return np.concatenate([experts_SLK, experts_SLK[-1:]])


def _figures(groups: Sequence[Sequence[_Seen]]) -> dict[str, float]:
    """Means over the episodes that were read, and over the groups what there is to learn from."""
    seen = [one for group in groups for one in group]
    if not seen:
        return {}
    summaries = [one.record.summary or {} for one in seen]
    spreads = [pstdev([one.terms.total for one in group]) for group in groups if len(group) > 1]
    return {
        "reward": fmean(one.terms.total for one in seen),
        "r_perf": fmean(one.terms.perf for one in seen),
        "r_parallel": fmean(one.terms.parallel for one in seen),
        "r_finish": fmean(one.terms.finish for one in seen),
        "width": fmean(one.width for one in seen),
        "share_parallel": fmean(one.width > 1 for one in seen),
        "share_spawned": fmean(s["subagents"] > 0 for s in summaries),
        "critical_steps": fmean(s["critical_steps"] for s in summaries),
        "total_steps": fmean(s["total_steps"] for s in summaries),
        "subagents": fmean(s["subagents"] for s in summaries),
        "share_done": fmean(one.record.status == "done" for one in seen),
        "trained_tokens": fmean(one.num_trained for one in seen),
        "episodes": len(seen),
        # Of the K rewards of a question: no spread, nothing to learn.
        "reward_spread": fmean(spreads) if spreads else 0.0,
        "share_equal_groups": fmean(s < EQUAL for s in spreads) if spreads else 1.0,
        # -log p of what was sampled has the entropy (nats a token) as its mean.
        "entropy": -sum(one.sum_logprobs for one in seen) / sum(one.num_trained for one in seen),
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MicroBatch:
    """Packed tokens: prompts once, the responses behind them."""

    ids_T: Tensor
    positions_T: Tensor
    seq_lens: tuple[int, ...]
    prefix_of: tuple[int | None, ...]
    """Of each segment, the segment that stands before it."""
    rows_X: Tensor
    """Where the token that predicts each trained one lies."""
    targets_X: Tensor
    sampled_logprobs_X: Tensor
    advantages_X: Tensor
    weights_X: Tensor
    versions_X: Tensor
    temperature: float
    images: tuple[Image, ...]
    experts_TLK: Tensor | None = None
    """As ``Sample.experts_SLK``, int64; ``None`` unless all samples have them."""

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same on another device."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name in self.__dataclass_fields__
            for value in [getattr(self, name)]
        }
        return MicroBatch(**moved)


def micro_batches(
    batch: Batch, max_tokens: int, *, num_questions: int | None = None
) -> list[MicroBatch]:
    """Pack the samples of a batch, ``max_tokens`` at most but where one sample alone has more.

    ``num_questions`` is the number over which eq. (1) takes its mean: that of this batch unless it
    is a part of a larger one.
    """
    num_questions = num_questions or len(batch.groups)
    packed: list[list[_Unit]] = []
    num_tokens = max_tokens
    for unit in _units(batch, max_tokens):
        fits = packed and unit.temperature == packed[-1][0].temperature
        if not fits or num_tokens + unit.num_tokens > max_tokens:
            packed.append([])
            num_tokens = 0
        packed[-1].append(unit)
        num_tokens += unit.num_tokens
    return [_pack(units, num_questions) for units in packed]


def empty_batch() -> MicroBatch:
    """A pass that changes nothing, for a process that must not lag behind the others."""
    zero = torch.zeros(1)
    return MicroBatch(
        ids_T=torch.zeros(2, dtype=torch.int64),
        positions_T=torch.arange(2),
        seq_lens=(2,),
        prefix_of=(None,),
        rows_X=torch.zeros(1, dtype=torch.int64),
        targets_X=torch.zeros(1, dtype=torch.int64),
        sampled_logprobs_X=zero,
        advantages_X=zero,
        weights_X=zero,
        versions_X=torch.full((1,), -1, dtype=torch.int32),
        temperature=1.0,
        images=(),
    )


@dataclass(slots=True)
class _Unit:
    """Samples that begin with the same ids."""

    prefix_P: NDArray[np.int32]
    samples: list[Sample]
    num_tokens: int

    @property
    def temperature(self) -> float:
        return self.samples[0].temperature


def _units(batch: Batch, max_tokens: int) -> list[_Unit]:
    units: list[_Unit] = []
    for group in batch.groups:
        open_units: dict[tuple[bytes | int, float], _Unit] = {}
        for sample in group:
            prefix_P = sample.ids_S[: sample.prefix_tokens]
            # Pictures fill placeholders in order, so a prompt that shows some is not shared.
            key = (prefix_P.tobytes() if not sample.images else id(sample), sample.temperature)
            num_own = len(sample.ids_S) - len(prefix_P)
            unit = open_units.get(key)
            if unit is None or unit.num_tokens + num_own > max_tokens:
                unit = open_units[key] = _Unit(prefix_P, [], len(prefix_P))
                units.append(unit)
            unit.samples.append(sample)
            unit.num_tokens += num_own
    return units


def _pack(units: Sequence[_Unit], num_questions: int) -> MicroBatch:
    ids: list[NDArray[np.int32]] = []
    positions: list[NDArray[np.int64]] = []
    seq_lens: list[int] = []
    prefix_of: list[int | None] = []
    rows: list[NDArray[np.int64]] = []
    targets: list[NDArray[np.int32]] = []
    columns: list[tuple[NDArray[np.float32], NDArray[np.int32], float, float]] = []
    experts: list[NDArray[np.uint16] | None] = []
    start = 0
    for unit in units:
        num_prefix, prefix_index, prefix_start = len(unit.prefix_P), len(seq_lens), start
        ids.append(unit.prefix_P)
        positions.append(np.arange(num_prefix))
        seq_lens.append(num_prefix)
        prefix_of.append(None)
        experts.append(_part(unit.samples[0], slice(0, num_prefix)))
        start += num_prefix
        for sample in unit.samples:
            own_S = sample.ids_S[num_prefix:]
            places_X = np.flatnonzero(sample.mask_S)
            # The token before place p lies at p - 1 of the sample: in the prefix, or behind it.
            before_X = places_X - 1 - num_prefix
            rows.append(np.where(before_X < 0, prefix_start + places_X - 1, start + before_X))
            targets.append(sample.ids_S[places_X])
            columns.append(
                (
                    sample.logprobs_S[places_X],
                    sample.versions_S[places_X],
                    sample.advantage,
                    sample.weight / num_questions,
                )
            )
            ids.append(own_S)
            positions.append(np.arange(num_prefix, len(sample.ids_S)))
            seq_lens.append(len(own_S))
            prefix_of.append(prefix_index)
            experts.append(_part(sample, slice(num_prefix, None)))
            start += len(own_S)

    def each(values: Sequence[float]) -> Tensor:
        repeated = np.repeat(np.array(values, dtype=np.float32), [len(c[0]) for c in columns])
        return torch.from_numpy(repeated)

    return MicroBatch(
        ids_T=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
        positions_T=torch.from_numpy(np.concatenate(positions)),
        seq_lens=tuple(seq_lens),
        prefix_of=tuple(prefix_of),
        rows_X=torch.from_numpy(np.concatenate(rows)),
        targets_X=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        sampled_logprobs_X=torch.from_numpy(np.concatenate([c[0] for c in columns])),
        versions_X=torch.from_numpy(np.concatenate([c[1] for c in columns])),
        advantages_X=each([c[2] for c in columns]),
        weights_X=each([c[3] for c in columns]),
        temperature=units[0].temperature,
        images=tuple(image for unit in units for s in unit.samples for image in s.images),
        experts_TLK=_all_or_none(experts),
    )


def _part(sample: Sample, places: slice) -> NDArray[np.uint16] | None:
    return None if sample.experts_SLK is None else sample.experts_SLK[places]


def _all_or_none(parts: Sequence[NDArray[np.uint16] | None]) -> Tensor | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return torch.from_numpy(np.concatenate(known).astype(np.int64))
