"""A Python that has "SGLang": the stand-in; and GPUs that ``nvidia-smi`` tells of."""

import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The path of an interpreter whose ``-m sglang.launch_server`` is the stand-in."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {STAND_IN} "$@"\n')
    program.chmod(0o755)
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv("MARKS", str(marks))
    return str(program)


@pytest.fixture
def gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an ``nvidia-smi`` on the path that tells of ``number`` GPUs of so many MiB."""

    def put(number: int, mebibytes: int | str = 143_771, free: int | None = None) -> None:
        rows = [
            f"{i}, GPU-{i}{i}-aa, {mebibytes}, {free or mebibytes}, NVIDIA H200"
            for i in range(number)
        ]
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{r}'\n" for r in rows))
        (folder / "nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return put


@pytest.fixture
def port() -> int:
    """The first of four ports in a row that are free."""
    while True:
        with socket.socket() as first:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
        try:
            for one in range(port, port + 4):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", one))
        except OSError:
            continue
        return port
