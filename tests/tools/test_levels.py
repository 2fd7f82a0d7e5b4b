import json
import os
import select
import site
import socket
import subprocess
import sys
import venv
from pathlib import Path

import anyio
import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox import launcher
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.levels import Isolation, SandboxSettings

pytestmark = pytest.mark.anyio
ESCAPES = """
import mmap, os, socket
def works(attempt):
    try:
        attempt()
    except OSError:
        return False
    return True
(works(lambda: open('/etc/shadow')), works(lambda: open('/usr/x', 'w')),
 works(lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM).connect(('127.0.0.1', {port}))),
 works(lambda: os.kill({pid}, 0)), works(lambda: os.rename(os.getcwd(), os.getcwd() + 'x')),
 works(lambda: mmap.mmap(-1, 2**33)),  # shared: no "data" of the process
 works(lambda: socket.socket(socket.AF_UNIX).connect('{service}')),
 works(lambda: socket.socketpair(type=socket.SOCK_DGRAM)[0].sendto(b'x', '{service}d')))
"""


@pytest.fixture
def services(tmp_path):
    """Unix sockets of the machine that anybody may talk to, and whether anybody did."""
    name = str(tmp_path / "service")
    with (
        socket.socket(socket.AF_UNIX) as stream,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
    ):
        stream.bind(name)
        stream.listen()
        datagrams.bind(f"{name}d")
        for path in (*tmp_path.iterdir(), tmp_path, tmp_path.parent, tmp_path.parents[1]):
            path.chmod(0o777)
        yield name, lambda: bool(select.select([stream, datagrams], [], [], 0)[0])


@pytest.mark.parametrize("level", [2, 1, 0])
async def test_each_lower_level_runs_cells_ends_them_and_leaves_nothing(
    level, monkeypatch, services
):
    service, heard = services
    zygote = launcher.Zygote(level=level)
    monkeypatch.setattr(launcher, "_shared", zygote)
    try:
        assert zygote.isolation.level == level
        settings = SandboxSettings(isolation="best")
        async with KernelSandbox(settings=settings, interrupt_grace_s=0.5) as sandbox:
            result = await sandbox.run("x = 1; 6 * 7", timeout_s=20)
            assert (result.text, result.isolation) == ("42", f"L{level}")
            assert (await sandbox.run("while True: pass", timeout_s=0.3)).status == "wall_timeout"
            assert (await sandbox.run("x", timeout_s=20)).text == "1"
            if level:
                code = ESCAPES.format(port=22, pid=os.getpid(), service=service)
                assert "True" not in (await sandbox.run(code, timeout_s=20)).text
                assert not heard()
            code = "import subprocess; subprocess.Popen(['setsid', 'sleep', '271'])\n"
            await sandbox.run(code, timeout_s=20)
            await sandbox.run("import time; time.sleep(0.3)", timeout_s=20)
            assert sleepers()
            code = "import os, signal; signal.signal(2, signal.SIG_IGN)\nwhile True: pass"
            result = await sandbox.run(code, timeout_s=0.3)
            assert (result.status, result.has_state) == ("wall_timeout", False)
            assert not sleepers()
            result = await sandbox.run("import os; os.abort()", timeout_s=20)
            assert result.status == "died"
            assert (await sandbox.run("1 + 1", timeout_s=20)).text.endswith("2")
    finally:
        zygote.close()


def sleepers():
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes() == b"sleep\x00271\x00":
                found.append(path)
        except OSError:
            continue
    return found


def test_what_is_not_enforced_is_one_sentence():
    level = Isolation(level=1, reason="unshare: Operation not permitted")
    assert str(level) == (
        "L1; NOT enforced: process hiding, disk, memory, process count "
        "(unshare: Operation not permitted)"
    )
    with pytest.raises(ConfigError, match=r"must hold level L2 and this machine gives L1; NOT enf"):
        level.require(2)
    level.require(1)
    assert str(Isolation(level=3)) == "L3"


@pytest.mark.parametrize(
    "wrong",
    [
        {"isolation": "none"}, {"level": 4}, {"memory_mb": 0}, {"cpus": -1}, {"max_pixels": 0},
        {"mounts": (Path("relative"),)}, {"mounts": (Path("/no/such/folder"),)},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        SandboxSettings(**wrong)


async def test_below_the_level_asked_for_nothing_runs(monkeypatch):
    zygote = launcher.Zygote(level=0, is_bare=True)
    monkeypatch.setattr(launcher, "_shared", zygote)
    try:
        with pytest.raises(ConfigError, match="L1 and this machine gives L0"):
            async with KernelSandbox():
                pass
    finally:
        zygote.close()


async def test_hosts_need_a_network_namespace(monkeypatch):
    zygote = launcher.Zygote(level=1, is_bare=True)
    monkeypatch.setattr(launcher, "_shared", zygote)
    try:
        with pytest.raises(ConfigError, match="from level L2 on"):
            async with KernelSandbox(settings=SandboxSettings(hosts=("example.org",))):
                pass
    finally:
        zygote.close()


def test_a_machine_that_is_not_linux_is_told_so(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="sandboxes need Linux"):
        launcher.Zygote()


async def test_a_folder_of_the_settings_can_be_read_and_not_written(tmp_path):
    (tmp_path / "data.txt").write_text("mounted")
    tmp_path.chmod(0o755)
    async with KernelSandbox(settings=SandboxSettings(mounts=(tmp_path,))) as sandbox:
        code = f"open('{tmp_path}/data.txt').read()"
        assert (await sandbox.run(code, timeout_s=20)).text == "'mounted'"
        assert (await sandbox.run(f"open('{tmp_path}/x', 'w')", timeout_s=20)).status == "error"


def test_an_environment_below_tmp_is_seen_from_inside(tmp_path):
    """Else what a kernel imports late is missing: its own /tmp lies over the machine's."""
    assert str(tmp_path).startswith("/tmp/")
    venv.create(tmp_path / "env", symlinks=True)
    [packages] = (tmp_path / "env").glob("lib/python*/site-packages")
    (packages / "late.py").write_text("found = 42")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    for place in (tmp_path, *tmp_path.parents[:2]):
        place.chmod(0o755)
    code = """
import anyio
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
async def main():
    async with KernelSandbox() as sandbox:
        for _ in range(2):  # the second process of a sandbox finds the same
            print((await sandbox.run("import late; late.found", timeout_s=20)).text)
            await sandbox.run("import os; os._exit(1)", timeout_s=20)
anyio.run(main)
"""
    done = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert [line for line in done.stdout.splitlines() if line == "42"] == ["42"] * 2, done


async def test_a_fork_server_that_died_is_replaced(monkeypatch):
    zygote = launcher.Zygote()
    monkeypatch.setattr(launcher, "_shared", zygote)
    async with KernelSandbox() as sandbox:
        await sandbox.run("x = 1", timeout_s=20)
        zygote._process.kill()
        zygote._process.wait()
        await anyio.wait_readable(sandbox._process.pidfd)
        result = await sandbox.run("1 + 1", timeout_s=20)
        assert "variables are lost" in result.text
        assert result.text.endswith("2")
        assert sandbox._zygote is not zygote
    sandbox._zygote.close()
    zygote.close()
    with pytest.raises(SandboxDied, match="gone"):
        zygote.ask({"op": "status", "id": "x"})


def test_a_process_that_ends_takes_its_fork_server_and_kernels_along(tmp_path):
    code = (
        "import anyio, os\n"
        "from swarm_sdk.tools.sandbox.kernel import KernelSandbox\n"
        "async def main():\n"
        "    sandbox = await KernelSandbox().__aenter__()\n"
        "    print(sandbox.pid, sandbox._zygote.pid, sandbox._zygote._folder, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "anyio.run(main)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    kernel, server, folder = done.stdout.split()
    for pid in (kernel, server):
        for _ in range(100):
            if not is_running(pid):
                break
            __import__("time").sleep(0.02)
        assert not is_running(pid)
    __import__("shutil").rmtree(folder, ignore_errors=True)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


REFUSING = """
import errno, os, platform, sys
from swarm_sdk.tools.sandbox import linux, seccomp
column, architecture = seccomp._ARCHITECTURES[platform.machine()]
numbers = [seccomp.DENIED[name][column] for name in ("unshare", "mount")]
numbers += [444, 445, 446] if sys.argv[1] == "L0" else []  # Landlock's
lines = seccomp._opening(architecture)
for number in numbers:
    lines += seccomp._on(number, [seccomp._return(0x50000 | errno.EPERM)])
linux.forbid_new_privileges()
linux.install_filter(b"".join([*lines, seccomp._return(0x7FFF0000)]))
code = "from swarm_sdk.cli import main; main()"
os.execv(sys.executable, [sys.executable, "-c", code, "doctor", "--json"])
"""


@pytest.mark.parametrize(("level", "reason"), [("L1", "unshare("), ("L0", "landlock")])
def test_a_machine_that_refuses_a_means_gives_the_level_without_it_and_says_why(level, reason):
    done = subprocess.run(
        [sys.executable, "-c", REFUSING, level], capture_output=True, text=True, check=False
    )
    isolation = json.loads(done.stdout)["isolation"]
    assert isolation["level"] == level, done.stderr
    assert reason in isolation["reason"]
    assert "Operation not permitted" in isolation["reason"]
    assert "memory" in isolation["not_enforced"]
