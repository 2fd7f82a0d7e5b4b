"""Two engines of a run of PARL: who serves the sub-agents, and how places are shared out."""

import shutil
from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from swarm_sdk.config import nano_directory
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.training.journal import read_rows
from swarm_sdk.training.parl import Parl
from swarm_sdk.training.settings import ParlConfig

SMALL = ParlConfig(
    steps=3, questions=1, samples=2, updates=1, max_entities=2, main_steps=3, save_every=50
)


@pytest.mark.timeout(400)
def test_the_curriculum_changes_the_sub_agents_once_none_of_the_old_ones_run(
    tmp_path: Path,
) -> None:
    larger = tmp_path / "larger"
    shutil.copytree(nano_directory(), larger)
    run = tmp_path / "run"
    config = replace(SMALL, ahead=1, subagents=((0, "nano"), (1, str(larger))))

    async def main() -> list[str]:
        names, old = [], None
        async with Parl.open(config, run) as parl:
            for _ in range(3):
                await parl.step()
                names.append(parl.frozen.name)
                old = old or parl.frozen
            assert old is not parl.frozen
            assert old.engine._is_closed
        return names

    # In iteration 1 the question that was begun ahead ends with the old ones.
    assert anyio.run(main) == ["nano", "nano", str(larger)]
    ledger = Ledger(run / "runs", readonly=True)
    served = []
    for row in read_rows(run / "batches.jsonl"):
        agents = [a for group in row["groups"] for e in group for a in ledger.agents(e)]
        served.append({a.model for a in agents if a.path != "main"})
    assert served[0] | served[1] <= {"nano"}
    assert served[2] <= {str(larger)}


def test_engines_get_places_by_the_requests_that_they_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: dict[int, int] = {}
    monkeypatch.setattr(
        EmbeddedEngine, "num_requests", property(lambda self: loads.get(id(self), 0))
    )
    monkeypatch.setattr("swarm_sdk.training.parl.BALANCE_S", 0.001)

    async def main() -> None:
        async with Parl.open(replace(SMALL, max_running=12), tmp_path / "run") as parl:
            assert not await parl._change_subagents()
            policy, frozen = parl.policy.engine, parl.frozen.engine
            for waiting, places in (((8, 2), (9, 3)), ((0, 10), (1, 11)), ((0, 0), (6, 6))):
                loads.update({id(policy): waiting[0], id(frozen): waiting[1]})
                with anyio.move_on_after(0.05):
                    await parl._balance()
                assert (policy.max_running, frozen.max_running) == places

    anyio.run(main)
