"""Servers that die, hang, never start and will not end, as real processes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
import pytest

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ServeFailed
from swarm_sdk.model_backend.serving.plan import Ask, Plan, plan
from swarm_sdk.model_backend.serving.supervisor import Patience, Supervisor, Told

PATIENCE = Patience(poll_s=0.05, tell_s=0.05, grace_s=2.0, silent_s=0.5, ready_s=60)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pids(marks: Path) -> list[int]:
    """Every process that was started, and the children that they started."""
    return [int(mark.name.rpartition(".")[2]) for mark in marks.iterdir()]


class Watched:
    """Runs a plan, and is stopped when a condition on what was told holds."""

    def __init__(self, plan: Plan, tmp_path: Path, patience: Patience = PATIENCE) -> None:
        self.told: list[Told] = []
        self.marks = tmp_path / "marks"
        self.ready_calls = 0
        self._supervisor = Supervisor(plan, tmp_path / "logs", self.told.append, patience)

    def kinds(self, name: str) -> list[str]:
        return [one.kind for one in self.told if one.name == name and one.kind != "waiting"]

    def _on_ready(self) -> None:
        self.ready_calls += 1

    async def until(self, is_enough: Callable[[], bool]) -> None:
        with anyio.fail_after(90):
            async with anyio.create_task_group() as group:
                group.start_soon(self._supervisor.run, self._on_ready)
                while not is_enough():  # noqa: ASYNC110
                    await anyio.sleep(0.02)
                group.cancel_scope.cancel()

    async def run(self) -> None:
        with anyio.fail_after(90):
            await self._supervisor.run(self._on_ready)


@pytest.fixture
def ask(python: str, gpus: Callable[..., None], port: int) -> Ask:
    gpus(2)
    return Ask(folder=nano_directory(), port=port, python=python)


@pytest.mark.anyio
async def test_a_server_becomes_ready_with_progress_and_ends_with_its_children(
    ask: Ask, tmp_path: Path
) -> None:
    watched = Watched(plan(ask), tmp_path)
    await watched.until(lambda: watched.ready_calls == 1)
    assert watched.kinds("server-0") == ["started", "ready", "stopped"]
    assert any("Load weight" in one.text for one in watched.told if one.kind == "waiting")
    assert len(pids(watched.marks)) == 2
    assert not any(is_alive(pid) for pid in pids(watched.marks))


@pytest.mark.anyio
@pytest.mark.parametrize("fault", ["dies once", "falls silent once"])
async def test_a_dead_or_hung_server_is_started_again(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): fault}))
    watched = Watched(plan(ask), tmp_path)
    await watched.until(lambda: watched.kinds("server-0").count("ready") == 2)
    kind = "died" if fault == "dies once" else "silent"
    first = ["started", "ready", kind, "stopped"]
    assert watched.kinds("server-0") == [*first, "started", "ready", "stopped"]
    assert watched.ready_calls == 1
    assert not any(is_alive(pid) for pid in pids(watched.marks))


@pytest.mark.anyio
async def test_a_server_that_never_starts_fails_with_the_end_of_its_log(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "never starts"}))
    watched = Watched(plan(ask), tmp_path, dataclasses.replace(PATIENCE, max_restarts=1))
    with pytest.raises(ServeFailed, match=r"ended with code 1 and was started 2 times") as caught:
        await watched.run()
    assert "CUDA out of memory" in str(caught.value)
    assert watched.ready_calls == 0
    assert not any(is_alive(pid) for pid in pids(watched.marks))


@pytest.mark.anyio
async def test_deaths_before_the_first_answer_count_however_long_they_take(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "never starts"}))
    patience = dataclasses.replace(PATIENCE, max_restarts=1, steady_s=0.0)
    with anyio.fail_after(15), pytest.raises(ServeFailed, match="was started 2 times"):
        await Watched(plan(ask), tmp_path, patience).run()


@pytest.mark.anyio
async def test_serving_long_enough_forgives_the_deaths_before(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "dies"}))
    patience = dataclasses.replace(PATIENCE, max_restarts=1, steady_s=0.0)
    watched = Watched(plan(ask), tmp_path, patience)
    await watched.until(lambda: watched.kinds("server-0").count("ready") == 4)


@pytest.mark.anyio
async def test_a_server_that_is_paused_is_let_live(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "is paused"}))
    watched = Watched(plan(ask), tmp_path)
    with anyio.move_on_after(4):
        await watched.run()
    assert watched.kinds("server-0") == ["started", "ready", "stopped"]


@pytest.mark.anyio
async def test_a_server_that_is_not_ready_in_time_fails(ask: Ask, tmp_path: Path) -> None:
    patience = dataclasses.replace(PATIENCE, max_restarts=0, ready_s=0.0)
    with pytest.raises(ServeFailed, match="was not ready after 0 s"):
        await Watched(plan(ask), tmp_path, patience).run()


@pytest.mark.anyio
async def test_a_server_that_ignores_sigterm_is_killed(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "ignores SIGTERM"}))
    watched = Watched(plan(ask), tmp_path)
    await watched.until(lambda: watched.ready_calls == 1)
    assert not any(is_alive(pid) for pid in pids(watched.marks))


@pytest.mark.anyio
async def test_the_router_starts_after_the_servers_and_one_that_fails_stops_all(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "never starts"}))
    two = plan(dataclasses.replace(ask, servers=2))
    watched = Watched(two, tmp_path, dataclasses.replace(PATIENCE, max_restarts=0))
    with pytest.raises(ServeFailed, match="router ended with code 1"):
        await watched.run()
    order = [(one.name, one.kind) for one in watched.told]
    assert order.index(("router", "started")) > order.index(("server-0", "ready"))
    assert order.index(("router", "started")) > order.index(("server-1", "ready"))
    assert not any(is_alive(pid) for pid in pids(watched.marks))


@pytest.mark.anyio
async def test_the_router_is_ready_when_it_has_a_server_to_send_to(
    ask: Ask, tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({str(port): "knows no server"}))
    watched = Watched(plan(dataclasses.replace(ask, servers=2)), tmp_path)
    with anyio.move_on_after(4):
        await watched.run()
    assert ("router", "waiting") in [(one.name, one.kind) for one in watched.told]
    assert watched.ready_calls == 0


def swarm_serve(
    *arguments: str, cwd: Path | None = None, environment: Mapping[str, str] = {}
) -> subprocess.Popen[str]:
    code = "from swarm_sdk.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "serve", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONSAFEPATH": "1"} | environment,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_command_serves_until_a_signal_and_leaves_no_server(
    ask: Ask, tmp_path: Path, port: int, number: int
) -> None:
    common = ("nano", "--port", port, "--python", ask.python, "--logs", tmp_path / "logs")
    process = swarm_serve(*map(str, common), "--json", "--", "--random-seed", "7")
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    assert told["url"] == f"http://127.0.0.1:{port}"
    assert told["model"] == f"sglang:{told['url']}"
    pid = told["pids"]["server-0"]
    assert is_alive(pid)
    assert (tmp_path / "marks" / f"{port}.{pid}").read_text().endswith('"--random-seed", "7"]')
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 0), said
    deadline = time.monotonic() + 30
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(pid)
    assert "Traceback" not in said


def test_several_servers_are_told_as_one_model_string_with_each_address_beside_the_router(
    ask: Ask, tmp_path: Path, port: int
) -> None:
    folder = tmp_path / "mine"
    shutil.copytree(nano_directory(), folder)
    options = ("--port", port, "--python", ask.python, "--logs", tmp_path / "logs")
    process = swarm_serve(str(folder), *map(str, options), "--servers", "2", "--json")
    assert process.stdout is not None
    told = json.loads(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    urls = ",".join(f"http://127.0.0.1:{port + number}" for number in (1, 2))
    assert told["model"] == f"sglang:{urls}#{folder}"
    assert told["url"] == f"http://127.0.0.1:{port}"
    assert f"ready: --model '{told['model']}'\n" in said
    assert f"chat completions: {told['url']}/v1\n" in said


def test_the_command_says_what_does_not_fit_and_ends_with_2(
    ask: Ask, gpus: Callable[..., None], port: int
) -> None:
    gpus(1, mebibytes=80, free=20)
    process = swarm_serve("nano", "--port", str(port), "--python", ask.python)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert "needs 0.03 GB of GPU memory for the weights" in said
    assert said.count("\n") == 1


def test_logs_that_cannot_be_written_are_one_sentence_before_anything_starts(
    ask: Ask, tmp_path: Path, port: int
) -> None:
    (tmp_path / "file").touch()
    options = ("--port", str(port), "--python", ask.python, "--logs", str(tmp_path / "file/logs"))
    process = swarm_serve("nano", *options)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert said == (
        f"swarm: --logs {tmp_path}/file/logs cannot be written (Not a directory); "
        "give another folder\n"
    )
    assert pids(tmp_path / "marks") == []


@pytest.mark.anyio
async def test_a_python_that_is_gone_when_a_server_starts_fails_in_one_sentence(
    ask: Ask, tmp_path: Path
) -> None:
    planned = plan(ask)
    await anyio.Path(ask.python).unlink()
    with pytest.raises(ServeFailed, match=r"server-0 cannot be kept running: .*No such file"):
        await Watched(planned, tmp_path).run()


@pytest.mark.parametrize("given", [".", "..", "../mine/"])
def test_links_lie_in_a_folder_of_their_own_however_the_folder_is_given(
    ask: Ask, tmp_path: Path, port: int, given: str
) -> None:
    folder, temporary = tmp_path / "mine", tmp_path / "temporary"
    shutil.copytree(nano_directory(), folder)
    (folder / "sub").mkdir()
    temporary.mkdir()
    process = swarm_serve(
        *(given, "--port", str(port), "--python", ask.python, "--dry-run", "--json"),
        cwd=folder / "sub" if given == ".." else folder,
        environment={"TMPDIR": str(temporary)},
    )
    command = json.loads(process.communicate(timeout=60)[0])["commands"]["server-0"]
    links = Path(command[command.index("--model-path") + 1])
    assert links.name == "mine"
    assert links.parent.parent == temporary
    assert list(temporary.iterdir()) == []


def test_a_dry_run_prints_the_commands_alone(ask: Ask, port: int) -> None:
    common = ("nano", "--port", str(port), "--python", ask.python, "--servers", "2", "--dry-run")
    out, said = swarm_serve(*common).communicate(timeout=60)
    for number in (0, 1):
        assert f"CUDA_VISIBLE_DEVICES={number} " in out.splitlines()[number]
    assert "sglang_router.launch_router" in out.splitlines()[2]
    shown = json.loads(swarm_serve(*common, "--json").communicate(timeout=60)[0])
    assert set(shown["commands"]) == {"server-0", "server-1", "router"}
    assert said == ""
