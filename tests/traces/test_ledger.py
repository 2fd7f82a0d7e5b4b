"""The ledger: what goes in comes out bit for bit, and what is broken is said."""

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm_sdk.errors import LedgerError
from swarm_sdk.traces.ledger import AgentRecord, EpisodeRecord, Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import Image


def _ledger(directory: Path) -> Ledger:
    ledger = Ledger(directory)
    ledger.begin_episode(
        EpisodeRecord(id="e1", task={"prompt": "p"}, model="m", settings={}, started_ns=1)
    )
    ledger.begin_agent(
        "e1",
        AgentRecord(
            path="main", parent_path=None, parent_stage=None, name="main", model="m", started_ns=1
        ),
    )
    return ledger


def _float32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(
    turns=st.lists(
        st.lists(
            st.tuples(st.integers(0, 2**31 - 1), st.floats(-50, 0, width=32)),
            min_size=1,
            max_size=20,
        ),
        min_size=1,
        max_size=5,
    )
)
def test_sampled_ids_and_logprobs_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, turns: list[list[tuple[int, float]]]
) -> None:
    directory = tmp_path_factory.mktemp("runs")
    ledger = _ledger(directory)
    for stage, turn in enumerate(turns):
        ledger.append(
            "e1",
            "main",
            stage,
            "sample",
            {},
            prompt_ids=(7, 8, 9),
            token_ids=tuple(i for i, _ in turn),
            logprobs=tuple(p for _, p in turn),
            weight_version=3,
        )
    ledger.close()
    reopened = Ledger(directory, readonly=True)
    [branch] = branches(reopened, "e1")
    sampled = [
        i for i, is_sampled in zip(branch.token_ids, branch.is_sampled, strict=True) if is_sampled
    ]
    assert sampled == [i for turn in turns for i, _ in turn]
    kept = [p for p, s in zip(branch.logprobs, branch.is_sampled, strict=True) if s]
    assert kept == [_float32(p) for turn in turns for _, p in turn]
    assert branch.is_sampled.count(False) == 3 * len(turns)
    reopened.close()


def test_an_episode_without_token_ids_cannot_become_a_trajectory(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger.append("e1", "main", 0, "sample", {})
    with pytest.raises(LedgerError, match="chat completions only"):
        branches(ledger, "e1")
    ledger.close()


def test_a_picture_is_stored_once_and_found_by_its_digest(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    image = Image(b"\x89PNG", name="a.png")
    ledger.put_media([image, image])
    assert ledger.media(image.sha256, "a.png") == image
    with pytest.raises(LedgerError, match="lacks the picture"):
        ledger.media("0" * 64)
    ledger.close()


def test_a_file_that_is_no_ledger_is_named(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match=r"ledger\.db"):
        Ledger(tmp_path)


def test_reading_where_nothing_was_recorded_says_so(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no episodes are recorded"):
        Ledger(tmp_path / "none", readonly=True)


def test_another_schema_version_is_refused(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger._write("UPDATE meta SET value = '999'", ())
    ledger.close()
    with pytest.raises(LedgerError, match="version 999"):
        Ledger(tmp_path)


def test_an_episode_is_found_by_the_start_of_its_id(tmp_path: Path) -> None:
    ledger = _ledger(tmp_path)
    ledger.begin_episode(
        EpisodeRecord(id="e12", task={"prompt": "p"}, model="m", settings={}, started_ns=2)
    )
    assert ledger.episode("e12").id == "e12"
    assert ledger.episode("e1").id == "e1"
    with pytest.raises(LedgerError, match="2 episodes begin"):
        ledger.episode("e")
    with pytest.raises(LedgerError, match="no episode begins"):
        ledger.episode("x")
    ledger.close()
