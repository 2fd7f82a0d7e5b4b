"""The experiment's page holds what its result files hold, and keeps what is written by hand."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parl_page", GPU / "parl_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, ablation: str, seed: int, gain: float) -> None:
    results = {
        f"{key}_{when}": value + gain * (when == "after")
        for when in ("before", "after")
        for key, value in {
            "f1": 0.25,
            "f1_within": 0.125,
            "critical_steps": 9.0,
            "subagents": 1.0,
            "f1_4": 0.5,
            "critical_steps_4": 9.0,
        }.items()
    }
    keys = ("r_perf", "width", "critical_steps", "total_steps", "entropy", "kl")
    rows = [
        {
            "iteration": at,
            **dict.fromkeys(keys, at + gain),
            "episodes": 64,
            "left_out": {"empty": 1},
        }
        for at in range(3)
    ]
    run = {
        "commit": "0123456789",
        "machine": {"cpu": "one"},
        "settings": {"ablation": ablation, "seed": seed, "config": {"lr": 0.5, "clip": ablation}},
        "results": results,
        "seconds": {"parl": 10.0},
        "ledger_sha256": "ab" * 32,
        "iterations": rows,
    }
    (folder / f"parl-{ablation}-{seed}.json").write_text(json.dumps(run))


def test_every_number_comes_from_the_files_and_text_outside_the_marks_stays(
    page: ModuleType, tmp_path: Path
) -> None:
    for seed, gain in enumerate((0.25, 0.5, 0.75)):
        write_run(tmp_path, "none", seed, gain)
    write_run(tmp_path, "ppo", 0, 0.0)
    runs = page.read_runs(tmp_path)
    assert {ablation: len(found) for ablation, found in runs.items()} == {"none": 3, "ppo": 1}
    out = tmp_path / "docs"
    page.write_page(runs, out)
    (out / "parl.md").write_text(f"By hand.\n{(out / 'parl.md').read_text()}And after.\n")
    page.write_page(runs, out)
    text = (out / "parl.md").read_text()
    assert text.startswith("By hand.\n")
    assert text.endswith("And after.\n")
    assert text.count(page.BEGIN) == 1
    # The mean gain 0.5, its deviation 0.25, t(3 seeds) = 4.303: 0.5 -+ 4.303 * 0.25 / sqrt(3).
    assert "| PARL (3) | 0.25 → 0.75 [-0.12, +1.12] |" in text
    assert "| PPO's clip (1) | 0.25 → 0.25 |" in text
    assert "| item-F1, after | 1.00 |" in text
    assert "| PARL | 2 | 3 | 192 | empty 3 | 10 | one | 01234567 |" in text
    assert 'PPO\'s clip: `clip="ppo"`' in text
    for picture in ("parl.png", "parl-ablations.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_a_page_without_its_marks_is_left_alone(page: ModuleType, tmp_path: Path) -> None:
    write_run(tmp_path, "none", 0, 0.0)
    (tmp_path / "parl.md").write_text("By hand.\n")
    with pytest.raises(SystemExit, match="lacks the lines"):
        page.write_page(page.read_runs(tmp_path), tmp_path)
    assert (tmp_path / "parl.md").read_text() == "By hand.\n"
