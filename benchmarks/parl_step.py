"""How fast the orchestrator's policy is trained, and what the parts of an iteration cost.

    python benchmarks/parl_step.py --json
    python benchmarks/parl_step.py --device cuda --questions 8 --micro-tokens 65536 --json

A batch of episodes that `nano` plays is trained by ours (prompts of a question once, nothing
padded, logits only where something is trained, MuonClip) and by a plain loop on `transformers`'
model with its grouped experts (rows of like lengths padded to the longest, AdamW): same samples,
same loss, forward, backward and optimiser step.

Keys: train_tokens_per_s (tokens of the samples; a shared prompt counts in each),
train_tokens_ratio (over the plain loop), publish_ms (new weights into the engine),
share_rollout, share_training, share_publishing of an iteration, engine_trainer_*_abs_dlogprob.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import torch
import transformers
from report import report  # benchmarks/report.py
from torch.nn.utils.rnn import pad_sequence
from transformers import Kimi_K25ForConditionalGeneration

from swarm_sdk.config import nano_directory
from swarm_sdk.traces.parl.batch import Batch, Sample
from swarm_sdk.traces.parl.loss import LossConfig, policy_loss
from swarm_sdk.traces.trajectory import orchestrator_branches
from swarm_sdk.training.parl import Parl
from swarm_sdk.training.settings import ParlConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument(
        "--micro-tokens", type=int, default=16_384, help="of one pass, for both: a GPU likes more"
    )
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one question, one repetition")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    if options.quick:
        options.questions, options.samples, options.repeat = 1, 4, 1
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as run:
        results, peers = anyio.run(measure, options, Path(run))
    settings = {k: v for k, v in vars(options).items() if k not in ("quick", "as_json")}
    report("parl_step", settings, results, peers, as_json=options.as_json)


async def measure(options: argparse.Namespace, run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    is_cuda = options.device.startswith("cuda")
    config = ParlConfig(
        steps=1,
        questions=options.questions,
        samples=options.samples,
        updates=1,
        micro_tokens=options.micro_tokens,
        device=options.device,
        dtype="bfloat16" if is_cuda else "float32",
    )
    async with Parl.open(config, run) as parl:
        figures = await parl.step()
        [row] = parl.journal.batches.values()
        batch = made_to_train(parl, row["groups"])
        publish_ms = []
        for _ in range(max(5, options.repeat)):
            started_s = time.perf_counter()
            await parl.publish()
            publish_ms.append((time.perf_counter() - started_s) * 1e3)
        peer = Peer(options.device, options.micro_tokens)
        ours_s, theirs_s = [], []
        for number in range(options.repeat + 1):
            ours = timed(options.device, lambda: parl.learner.update(batch))
            theirs = timed(options.device, lambda: peer.update(batch))
            if number:  # the first warms up
                ours_s.append(ours)
                theirs_s.append(theirs)
    parts = {name: figures[f"{name}_s"] for name in ("rollout", "train", "publish")}
    whole = sum(parts.values())
    ours_rate = [batch.num_tokens / s for s in ours_s]
    theirs_rate = [batch.num_tokens / s for s in theirs_s]
    ratios = [a / b for a, b in zip(ours_rate, theirs_rate, strict=True)]
    results = {
        "train_tokens_per_s": statistics.median(ours_rate),
        "train_tokens_ratio": statistics.median(ratios),
        "train_tokens_ratio_low": min(ratios),
        "train_tokens_ratio_high": max(ratios),
        "batch_tokens": batch.num_tokens,
        "publish_ms": statistics.median(publish_ms),
        "publish_ms_low": min(publish_ms),
        "share_rollout": parts["rollout"] / whole,
        "share_training": parts["train"] / whole,
        "share_publishing": parts["publish"] / whole,
        **{key: value for key, value in figures.items() if key.startswith("engine_trainer")},
    }
    return results, {"transformers_tokens_per_s": statistics.median(theirs_rate)}


def made_to_train(parl: Parl, groups: list[list[str]]) -> Batch:
    """All episodes of the batch with advantages of 1 and -1 in turn, so that every token counts."""
    made: list[list[Sample]] = []
    for group in groups:
        found = [b for e in group for b in orchestrator_branches(parl.ledger, e)]
        num = sum(sum(branch.mask) for branch in found)
        made.append(
            [
                Sample(
                    episode_id=branch.episode_id,
                    ids_S=np.array(branch.token_ids, dtype=np.int32),
                    mask_S=np.array(branch.mask, dtype=np.bool_),
                    logprobs_S=np.array(branch.logprobs, dtype=np.float32),
                    versions_S=np.array(branch.weight_versions, dtype=np.int32),
                    advantage=(-1.0) ** number,
                    weight=1 / num,
                    temperature=1.0,
                )
                for number, branch in enumerate(found)
            ]
        )
    return Batch(groups=made)


def timed(device: str, do: Any) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    started_s = time.perf_counter()
    do()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - started_s


class Peer:
    """A plain loop on transformers' model."""

    def __init__(self, device: str, micro_tokens: int) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.model = Kimi_K25ForConditionalGeneration.from_pretrained(
            nano_directory(), dtype=torch.float32
        ).to(device)
        self.model.model.language_model.set_experts_implementation("grouped_mm")
        self.model.train()
        self.device, self.micro_tokens = device, micro_tokens
        text = [
            p for n, p in self.model.named_parameters() if "vision" not in n and "proj_" not in n
        ]
        self.optimizer = torch.optim.AdamW(text, lr=1e-5, fused=True)

    def update(self, batch: Batch) -> None:
        """One optimiser step."""
        self.optimizer.zero_grad()
        rows = sorted(batch.samples, key=lambda sample: len(sample.ids_S))
        parts: list[list[Sample]] = [[]]
        for row in rows:
            if parts[-1] and (len(parts[-1]) + 1) * len(row.ids_S) > self.micro_tokens:
                parts.append([])
            parts[-1].append(row)
        for part in parts:
            self.loss(part, len(batch.groups)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()

    def loss(self, rows: list[Sample], num_questions: int) -> torch.Tensor:
        """Minus eq. (1) of padded rows."""

        def padded(columns: list[np.ndarray]) -> torch.Tensor:
            tensors = [torch.from_numpy(np.ascontiguousarray(c)) for c in columns]
            return pad_sequence(tensors, batch_first=True).to(self.device)

        ids_BS = padded([row.ids_S.astype(np.int64) for row in rows])
        mask_BS = padded([row.mask_S for row in rows])[:, 1:]
        is_real_BS = padded([np.ones(len(row.ids_S), dtype=np.int64) for row in rows])
        enabled = self.device.startswith("cuda")
        with torch.autocast("cuda" if enabled else "cpu", torch.bfloat16, enabled=enabled):
            logits = self.model(input_ids=ids_BS, attention_mask=is_real_BS).logits
        logprobs_BS = torch.log_softmax(logits[:, :-1].float(), -1)
        logprobs_BS = logprobs_BS.gather(2, ids_BS[:, 1:, None])[..., 0]
        sampled_BS = padded([row.logprobs_S for row in rows])[:, 1:]
        ones_BS = torch.ones_like(sampled_BS)
        advantages = torch.tensor([r.advantage for r in rows], device=self.device)[:, None]
        weights = torch.tensor([r.weight / num_questions for r in rows], device=self.device)[
            :, None
        ]
        parts = policy_loss(
            logprobs_BS[mask_BS],
            sampled_BS[mask_BS],
            (advantages * ones_BS)[mask_BS],
            (weights * ones_BS)[mask_BS],
            LossConfig(),
        )
        return parts.loss


if __name__ == "__main__":
    main()
