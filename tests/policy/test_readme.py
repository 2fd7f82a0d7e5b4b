"""The README's code runs as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_shows_code_and_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert BLOCKS
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_readme_block_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
