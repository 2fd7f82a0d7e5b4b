"""A run of PARL that was broken off goes on as if nothing had been."""

from dataclasses import replace
from pathlib import Path

import anyio
import pytest

from swarm_sdk.errors import ConfigError
from swarm_sdk.training.journal import read_rows
from swarm_sdk.training.parl import Parl
from swarm_sdk.training.settings import ParlConfig

SMALL = ParlConfig(
    steps=3,
    questions=1,
    samples=2,
    updates=1,
    max_entities=2,
    main_steps=3,
    save_every=50,
)


def steps(config: ParlConfig, run: Path, num: int) -> list[list[str]]:
    """Make so many iterations and break off; the questions of each batch on record."""

    async def main() -> list[list[str]]:
        async with Parl.open(config, run) as parl:
            for _ in range(num):
                await parl.step()
            return [
                [
                    parl.ledger.episode(group[0]).settings["launch"]["task"]
                    for group in row["groups"]
                ]
                for row in read_rows(run / "batches.jsonl")
            ]

    return anyio.run(main)


@pytest.mark.timeout(400)
def test_iterations_after_those_on_record_ask_questions_that_were_not_trained_on(
    tmp_path: Path,
) -> None:
    config = replace(SMALL, ahead=1)
    before = steps(config, tmp_path / "run", 2)
    after = steps(config, tmp_path / "run", 3)  # no checkpoint was kept: two are made again
    assert after[:2] == before
    asked = [task for batch in after for task in batch]
    assert len(set(asked)) == 3
    assert set(asked) <= {f"atlas-wide-0-{number}" for number in range(4)}


def test_a_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    replace(SMALL, steps=9, save_every=1, max_running=8).check_run(tmp_path)
    with pytest.raises(ConfigError, match=r"begun with lr 0\.001 and cannot go on with 0\.1"):
        replace(SMALL, lr=0.1).check_run(tmp_path)

    async def main() -> None:
        async with Parl.open(replace(SMALL, seed=1), tmp_path):
            raise AssertionError("it was opened")

    with pytest.raises(ConfigError, match="begun with seed 0"):
        anyio.run(main)
    SMALL.check_run(tmp_path / "new")
