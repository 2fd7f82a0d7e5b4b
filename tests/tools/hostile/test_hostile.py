"""Every hostile cell gives its result, the session goes on, and nothing outlives the kernel."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from cases import CASES, RESEARCH  # tests/tools/hostile/cases.py

from swarm_sdk.tools.sandbox.launcher import shared_zygote
from swarm_sdk.tools.sandbox.levels import SandboxSettings
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.types import Image

SETTINGS = SandboxSettings(
    isolation="best", memory_mb=512, disk_mb=64, num_files=5000, num_processes=64
)
FILES = (Image(b"given", media_type="text/plain", name="input.txt"),)
AT_ONCE = 3


def pid_namespace(pid):
    try:
        return str(Path(f"/proc/{pid}/ns/pid").readlink())
    except OSError:
        return None


def processes_in(namespace):
    return [
        name for name in os.listdir("/proc") if name.isdigit() and pid_namespace(name) == namespace
    ]


async def run_case(pool, case, fill):
    """The case's result, those of the cells after it, and the processes that outlived it."""
    code = case.code
    for name, value in fill.items():
        code = code.replace("{" + name + "}", str(value))
    async with pool.lease(FILES) as sandbox:
        namespace = pid_namespace(sandbox.pid)
        pin = os.open(f"/proc/{sandbox.pid}/ns/pid", os.O_RDONLY)  # its number is given to no other
        first = await sandbox.run(code, timeout_s=case.timeout_s)
        then = await sandbox.run(
            f"print({case.then})" if case.then == "True" else case.then, timeout_s=5
        )
        after = await sandbox.run("print(6 * 7)", timeout_s=5)
    left = processes_in(namespace) if sandbox.isolation in ("L3", "L2") else []
    os.close(pin)
    return first, then, after, left


@pytest.fixture(scope="session")
def results():
    """All cases, a few at a time; a host's secret and listening sockets stand ready."""
    os.environ["SECRET_TOKEN"] = "canary"
    touched = []
    found = {}

    async def run_all():
        limiter = anyio.CapacityLimiter(AT_ONCE)

        async def run_one(case):
            async with limiter:
                found[case.name] = await run_case(pool, case, fill)

        async with (
            KernelPool(AT_ONCE, settings=SETTINGS) as pool,
            anyio.create_task_group() as group,
        ):
            for case in CASES:
                group.start_soon(run_one, case)

    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        name = f"swarm-hostile-{os.getpid()}"
        unix.bind(f"\0{name}")
        unix.listen()
        fill = {"port": tcp.getsockname()[1], "abstract": name}
        anyio.run(run_all)
        for server in (tcp, unix):
            server.setblocking(False)
            try:
                touched.append(server.accept())
            except BlockingIOError:
                continue
    del os.environ["SECRET_TOKEN"]
    found["touched"] = touched
    return found


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_cell_ends_as_it_must_and_the_next_one_runs(case, results):
    first, then, after, left = results[case.name]
    level = int(first.isolation[1])
    if level >= case.level:
        assert first.status in case.statuses, first.text
        assert case.says in first.text
        assert not case.never or case.never not in first.text + then.text
        if case.has_state is not None:
            assert first.has_state == case.has_state, first.text
        if case.then:
            assert "True" in then.text
    assert after.status == "ok", after.text
    assert after.text.endswith("42")
    assert len(first.text) < 5000
    assert left == []


def test_no_cell_reached_a_socket_of_the_host(results):
    assert results["touched"] == [] or shared_zygote().isolation.level < 2


def test_there_are_as_many_cases_as_were_asked_for():
    assert len(RESEARCH) == 73
    assert len({case.name for case in CASES}) == len(CASES) >= 73 + 40


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.timeout(600)
def test_all_of_it_holds_for_a_user_without_rights():
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(here / "test_hostile.py"),
    ]
    done = subprocess.run(
        [here / "as_nobody.sh", sys.base_prefix, *command, "-k", "ends_as_it_must"],
        cwd=here.parents[2],
        env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
