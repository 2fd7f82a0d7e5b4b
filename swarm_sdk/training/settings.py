"""What a PARL run is started with; kept as ``config.json`` in its directory."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Self

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.parl.learner import LearnerConfig
from swarm_sdk.traces.parl.loss import Clip, LossConfig
from swarm_sdk.traces.parl.muonclip import MuonClipConfig
from swarm_sdk.traces.parl.rewards.parl import ParlReward, Schedule

FILE_NAME = "config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParlConfig:
    """Ours, by trial, where the report gives no value (it gives none of these)."""

    # what is trained, with whom, on what
    start: str = "nano"
    """``nano`` or a checkpoint directory: the policy at iteration 0."""
    subagents: tuple[tuple[int, str], ...] = ((0, "nano"),)
    """(first iteration, checkpoint): the frozen sub-agents; small ones first, then larger."""
    environment: str = "atlas-wide"
    """``atlas-wide``, ``atlas-deep``, ``atlas-long`` or ``bulk-download``."""
    documents: str = ""
    """A folder of your own documents to ask questions of, instead of the environment."""
    min_entities: int = 2
    max_entities: int = 8
    seed: int = 0

    # one iteration
    steps: int = 30
    questions: int = 8
    """A batch."""
    samples: int = 8
    """Episodes of each question (K)."""
    updates: int = 2
    """Optimiser steps on a batch, each on a part of its questions."""
    ahead: int = 0
    """Questions begun before their turn: with some, a batch is the first ``questions`` that are
    complete, and the rest go on with the next weights (partial rollouts)."""
    max_seconds: float = math.inf
    """No iteration begins after it."""

    # episodes
    critical_steps: int = 12
    """The budget of an episode (report, section 3.2)."""
    main_steps: int = 30
    sub_steps: int = 12
    max_tokens: int = 1_024
    """Of one turn."""
    temperature: float = 1.0
    max_episodes: int = 64
    """Alive at one time."""
    max_running: int = 128
    """Sequences in both engines together; their shares follow the queues."""

    # rewards
    lambda1: float = 0.3
    lambda2: float = 0.2
    anneal_steps: int = 20
    """Iterations after which both are 0."""
    target_width: int = 4
    toggle: bool = False
    toggle_period: int = 5

    # updates
    lr: float = 1e-3
    warmup_updates: int = 4
    alpha: float = 0.5
    beta: float = 2.0
    tau: float = 0.05
    clip: Clip = "mask"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    qk_tau: float = 100.0
    micro_tokens: int = 16_384
    train_subagents: bool = False
    """Train sub-agents too, on the policy's engine: not PARL, an ablation."""

    # machine
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the engines; the trainer computes in it too, over weights in float32. On an H100 a step of
    32 sequences of nano takes 22 ms in float32 and 227 ms in bfloat16."""
    save_every: int = 5
    expert_parallel: int = 0
    """Processes that share the experts under torchrun; 0 is all of them."""

    def __post_init__(self) -> None:
        for name in ("steps", "questions", "updates", "max_episodes", "save_every", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.samples < 2:
            raise ConfigError(
                "samples must be at least 2: a response is compared with the others of its question"
            )
        if self.ahead < 0 or self.temperature <= 0 or self.max_running < 2:
            raise ConfigError(
                "ahead must be at least 0, temperature above 0 and max_running at least 2"
            )
        if not self.subagents or self.subagents[0][0] != 0:
            raise ConfigError("subagents must tell a checkpoint from iteration 0 on")
        self.learner()
        self.reward()

    def learner(self) -> LearnerConfig:
        """The settings of the updates."""
        return LearnerConfig(
            loss=LossConfig(alpha=self.alpha, beta=self.beta, tau=self.tau, clip=self.clip),
            optimizer=MuonClipConfig(lr=self.lr, weight_decay=self.weight_decay, tau=self.qk_tau),
            warmup_updates=self.warmup_updates,
            max_grad_norm=self.max_grad_norm,
            micro_tokens=self.micro_tokens,
            autocast=self.dtype == "bfloat16",
        )

    def reward(self) -> ParlReward:
        """The settings of the rewards."""
        return ParlReward(
            parallel=Schedule(start=self.lambda1, steps=self.anneal_steps),
            finish=Schedule(start=self.lambda2, steps=self.anneal_steps),
            target_width=self.target_width,
        )

    def subagents_at(self, iteration: int) -> str:
        """The checkpoint of the frozen sub-agents."""
        return [path for first, path in sorted(self.subagents) if first <= iteration][-1]

    def save(self, run: Path) -> None:
        """Write ``config.json``."""
        run.mkdir(parents=True, exist_ok=True)
        (run / FILE_NAME).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, run: Path) -> Self:
        """Read ``config.json``.

        Raises:
            ConfigError: there is none, or it holds what this release does not know.
        """
        path = run / FILE_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["subagents"] = tuple((int(at), str(to)) for at, to in stored["subagents"])
            return cls(**stored)
        except FileNotFoundError as error:
            raise ConfigError(f"'{run}' is no training run: it has no {FILE_NAME}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"'{path}' cannot be read: {error}") from error
