"""Errors that become one sentence and an exit code."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from swarm_sdk.terminal import said_in_one_sentence

CONVERT = "from swarm_sdk.cli import main; main()"


def said(error: BaseException, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(typer.Exit) as ended, said_in_one_sentence():
        raise error
    assert ended.value.exit_code == 1
    return capsys.readouterr().err


def test_what_the_system_refuses_is_said_with_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert said(full, capsys) == "swarm: No space left on device\n"
    denied = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/mine")
    assert said(denied, capsys) == "swarm: Permission denied: /mine\n"


@pytest.mark.parametrize("error", [TimeoutError(), BrokenPipeError(errno.EPIPE, "Broken pipe")])
def test_other_errors_pass(error: OSError) -> None:
    with pytest.raises(type(error)), said_in_one_sentence():
        raise error


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.parametrize(
    ("target", "before", "message"),
    [
        ("file/model", None, "Not a directory: "),
        ("model", small_files, "File too large"),
    ],
    ids=["a target that cannot be made", "a disk that fills"],
)
def test_a_conversion_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, target: str, before: Callable[[], None] | None, message: str
) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [
            *(sys.executable, "-c", CONVERT, "checkpoint", "convert", "nano"),
            *(str(tmp_path / target), "--to", "int4"),
        ],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=before,
    )
    assert done.returncode == 1
    assert done.stderr.startswith(f"swarm: {message}")
    assert done.stderr.count("\n") == 1
