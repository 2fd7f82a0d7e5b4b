"""What each of two gloo processes runs for test_distributed.py: two updates, then a checkpoint."""

import json
import sys
from pathlib import Path

import torch

from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.traces.parl.batch import Batch
from swarm_sdk.traces.parl.distributed import Team
from swarm_sdk.traces.parl.learner import Learner, LearnerConfig
from swarm_sdk.traces.parl.muonclip import MuonClipConfig
from swarm_sdk.training.journal import Journal


def learner_of(team: Team) -> Learner:
    model = KimiModel(tiny())
    model.init_weights(0)
    config = LearnerConfig(optimizer=MuonClipConfig(lr=1e-3, tau=0.05), micro_tokens=100)
    return Learner(model, config, team)


def main() -> None:
    folder, expert_parallel = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    team = Team.join("cpu", expert_parallel=expert_parallel)
    batch: Batch = torch.load(folder / "batch.pt", weights_only=False)
    learner = learner_of(team)
    figures = [learner.update(batch) for _ in range(2)]
    weights = learner.weights()
    if team.is_leader:
        torch.save(weights, folder / "weights.pt")
        (folder / "figures.json").write_text(json.dumps(figures))
    Journal(folder / "run").save(2, learner.state_dict(), {"num_updates": 2}, team)
    team.leave()


if __name__ == "__main__":
    main()
