"""``nano`` behind real SGLang servers, end to end, as ``benchmarks/sglang_server.py`` measures it.

The file that SWARM_SGLANG_FIGURES names, if it is set, gets the figures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def figures(nano_url: str) -> dict[str, Any]:
    """The results; the second server is gone after that."""
    servers = ["--url", nano_url, "--url", os.environ["SWARM_SGLANG_SECOND_URL"]]
    done = subprocess.run(
        [
            sys.executable,
            "benchmarks/sglang_server.py",
            "--json",
            *servers,
            "--kill",
            os.environ["SWARM_SGLANG_SECOND_PID"],
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    sys.stdout.write(done.stdout)
    if path := os.environ.get("SWARM_SGLANG_FIGURES"):
        Path(path).write_text(done.stdout, encoding="utf-8")
    return json.loads(done.stdout)["results"]


def test_the_wide_question_is_answered_with_tools_by_sub_agents(figures: dict[str, Any]) -> None:
    assert figures["status"] == "done"
    assert figures["item_f1"] >= 0.8
    assert figures["subagents"] >= 4
    assert figures["tool_calls"] > figures["subagents"]
    assert figures["tool_errors"] == 0


def test_the_recorded_ids_are_those_that_the_server_reads(figures: dict[str, Any]) -> None:
    assert figures["ids_in_equal_ids_out"]


def test_logprobs_and_routing_are_those_of_our_model(figures: dict[str, Any]) -> None:
    assert figures["sampled_tokens"] > 300
    assert figures["mean_abs_dlogprob_vs_embedded"] <= 0.05
    assert figures["routing_agreement"] >= 0.99


def test_later_turns_find_their_prefix_in_the_cache(figures: dict[str, Any]) -> None:
    assert figures["prefix_hits_later_turns"] > 0.8


def test_a_cancelled_call_leaves_the_server_idle(figures: dict[str, Any]) -> None:
    assert figures["cancel_ms"] is not None


@pytest.mark.parametrize("way", ["tensor", "disk"])
def test_new_weights_change_the_output_and_the_old_ones_restore_it_bit_for_bit(
    figures: dict[str, Any], way: str
) -> None:
    assert figures[f"{way}_changes"]
    assert figures[f"{way}_restores"]
    assert figures["versions"][1:] == [1, 2, 3, 4]
    assert figures["verified"]


def test_episodes_survive_a_server_that_is_killed_under_them(figures: dict[str, Any]) -> None:
    assert figures["episodes_at_kill"] > 0
    assert figures["calls_moved"] > 0
    assert figures["episodes_survived"] == figures["episodes"]
