import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.container import ContainerHost
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.launcher import FIRST_USER_ID
from swarm_sdk.tools.sandbox.levels import SandboxSettings
from swarm_sdk.types import Image

pytestmark = pytest.mark.anyio

# Stands in for the docker command: runs the container's command as a process of this machine, and
# writes down how it was called. What it cannot show is the isolation, which is docker's.
COMMAND = """#!{python}
import os, signal, subprocess, sys
log = "{folder}/calls"
open(log, "a").write(" ".join(sys.argv[1:]) + "\\n")
verb, rest = sys.argv[1], sys.argv[2:]
pids = "{folder}/pid-"
if verb == "run":
    name = rest[rest.index("--name") + 1]
    if "broken-image" in rest:
        sys.exit("no such image")
    start = rest.index("image") + 1
    env = dict(pair.split("=", 1) for flag, pair in zip(rest, rest[1:]) if flag == "--env")
    env["PATH"] = os.environ["PATH"]
    child = subprocess.Popen([{python!r}, *rest[start + 1:]], env=env)
    open(pids + name, "w").write(str(child.pid))
    code = child.wait()
    sys.exit(code if code >= 0 else 128 - code)
elif verb == "kill":
    os.kill(int(open(pids + rest[2]).read()), getattr(signal, rest[1]))
elif verb == "inspect":
    print("false")
"""


@pytest.fixture
def docker(tmp_path):
    path = tmp_path / "docker"
    path.write_text(COMMAND.format(python=sys.executable, folder=tmp_path))
    path.chmod(0o755)
    return path


async def test_a_container_is_a_sandbox_like_any_other(docker, tmp_path):
    host = ContainerHost("image", command=str(docker))
    async with KernelSandbox([Image(b"in", name="a.txt")], host=host.ready) as sandbox:
        result = await sandbox.run("x = 1; print(open('a.txt').read())", timeout_s=20)
        assert (result.status, result.text, result.isolation) == ("ok", "in", "L3/docker")
        assert (await sandbox.run("while True: pass", timeout_s=0.5)).status == "wall_timeout"
        assert (await sandbox.run("x", timeout_s=20)).text == "1"
        result = await sandbox.run(
            "open('b', 'w').write('y'); import os; os._exit(3)", timeout_s=20
        )
        assert (result.status, result.has_state) == ("died", False)
        assert "exit status 3" in result.text
        assert (await sandbox.run("open('b').read()", timeout_s=20)).text.endswith("'y'")
        assert [file.path for file in sandbox.outputs().files] == ["b"]
    host.close()
    started = next(line for line in (tmp_path / "calls").read_text().splitlines() if "run" in line)
    for option in ("--network none", "--read-only", "--cap-drop ALL", "no-new-privileges"):
        assert option in started
    assert f"--user {os.getuid() or FIRST_USER_ID}:" in started
    assert "--memory 1024m" in started
    assert "disk" not in host.isolation.enforced


async def test_what_a_container_cannot_do_is_one_sentence(docker, tmp_path):
    with pytest.raises(ConfigError, match="which is not installed"):
        ContainerHost("image", command="no-such-command")
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ConfigError, match="start its service"):
        ContainerHost("image", command=str(broken))
    host = ContainerHost("broken-image", command=str(docker))
    with pytest.raises(SandboxDied, match="could not start: no such image"):
        async with KernelSandbox(host=host.ready):
            pass
    with pytest.raises(ConfigError, match="no network"):
        async with KernelSandbox(host=host.ready, settings=SandboxSettings(hosts=("a.org",))):
            pass
    host.close()


def distributions(*names):
    """Those of ``names`` that are installed, with all that they need."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system or version of Python
        if distribution.name not in found:
            found[distribution.name] = distribution
            wanted = [one for one in distribution.requires or () if "extra ==" not in one]
            todo += [re.match(r"[\w.-]+", one)[0] for one in wanted]
    return found.values()


def copy(source, root):
    """Copy a file to its own path below ``root``."""
    target = root / str(source).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@pytest.fixture(scope="module")
def folder_of_an_image(tmp_path_factory):
    """This Python with ipykernel, and the libraries and programs that they need: 180 MB."""
    root = tmp_path_factory.mktemp("image")
    prefix = Path(sys.base_prefix)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    place = root / str(prefix).lstrip("/")
    left_out = shutil.ignore_patterns("test", "__pycache__", "site-packages", "config-*", "*.a")
    shutil.copytree(prefix / "lib" / version, place / "lib" / version, ignore=left_out)
    for library in (prefix / "lib").glob("libpython*.so*"):
        copy(library, root)
    (place / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), place / "bin" / "python3")
    for distribution in distributions("ipykernel", "numpy", "pillow"):
        for file in distribution.files or ():
            if not {"..", "tests", "__pycache__"} & set(file.parts):
                target = place / "lib" / version / "site-packages" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(distribution.locate_file(file), target)
    programs = ["/bin/sh", "/bin/sleep"]
    binaries = [*programs, place / "bin" / "python3", *root.rglob("*.so"), *root.rglob("*.so.*")]
    told = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    libraries = set(re.findall(r"(?:=> |^\s+)(/\S+) \(0x", told, re.MULTILINE))
    for path in (*programs, *(one for one in libraries if not one.startswith(str(root)))):
        copy(path, root)
    for name in ("tmp", "proc", "sys", "dev", "etc", "run"):
        (root / name).mkdir(exist_ok=True)
    return root


PODMAN = """#!/bin/sh
verb=$1
shift
[ "$verb" != run ] || set -- --ulimit nproc=1000:1000 "$@"
exec podman --runtime runc "$verb" "$@"
"""


@pytest.fixture(params=["docker", "podman"])
def host(request, folder_of_an_image, tmp_path):
    """A host of real containers; skips where the command or its service is not there."""
    command, image = request.param, f"swarm-test-{os.getpid()}"
    if command == "podman" and shutil.which("runc"):
        # Where root has not all rights, podman cannot raise a limit that it raises otherwise, and
        # its own runtime wants one version of cgroups, where a machine can have both.
        command = str(tmp_path / "podman")
        Path(command).write_text(PODMAN)
        Path(command).chmod(0o755)
    try:
        host = ContainerHost(image, command=command)
    except ConfigError as error:
        pytest.skip(str(error))
    path = f"ENV PATH={sys.base_prefix}/bin:/bin"
    with subprocess.Popen(
        ["tar", "-C", folder_of_an_image, "-c", "."], stdout=subprocess.PIPE
    ) as tar:
        subprocess.run(
            [command, "import", "--change", path, "-", image], stdin=tar.stdout, check=True
        )
    yield host
    host.close()
    subprocess.run([command, "rmi", image], check=True)


RESTARTED = "[the Python process was restarted: variables are lost, files are kept]"
REAL = """
import os, socket
def works(attempt):
    try: attempt()
    except OSError: return False
    return True
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(
    works(lambda: open("/x", "w")), works(lambda: open("a.txt", "w")),
    works(lambda: socket.create_connection(("1.1.1.1", 80), 1)),
    works(lambda: open("b", "wb").truncate(2**40)), os.path.exists({secret!r}),
    works(lambda: os.rename(os.getcwd(), os.getcwd() + "x")),
    os.getuid() == {user}, int(status["CapEff"], 16), status["NoNewPrivs"].strip(),
    status["Seccomp"].strip(),
)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_real_container_holds_what_it_promises_and_leaves_nothing(host, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("canary")
    settings = SandboxSettings(memory_mb=256, num_processes=64, disk_mb=64)
    files = [Image(b"in", name="a.txt")]
    async with KernelSandbox(files, host=host.ready, settings=settings) as sandbox:
        assert await say(sandbox, "x = 1; print(open('a.txt').read())") == ("ok", "in")
        assert sandbox.isolation == f"L3/{Path(host._command).name}"
        code = REAL.format(secret=str(secret), user=os.getuid() or FIRST_USER_ID)
        assert await say(sandbox, code) == ("ok", "False False False False False False True 0 1 2")
        assert (await say(sandbox, "while True: pass", timeout_s=1))[0] == "wall_timeout"
        assert await say(sandbox, "x") == ("ok", "1")
        code = "p = []\ntry:\n    while len(p) < 200: p.append(os.posix_spawn('/bin/sleep', "
        code += "['sleep', '99'], {}))\nexcept OSError: print(len(p) < 64)"
        assert await say(sandbox, code) == ("ok", "True")
        await say(sandbox, "open('b', 'w').write('y');")
        code = "held = []\nwhile True: held.append(bytearray(b'x' * 2**24))"
        status, text = await say(sandbox, code, timeout_s=30)
        assert status == "oom", text
        status, text = await say(sandbox, "import os; open('b').read()")
        assert text.endswith("'y'")
        assert [file.path for file in sandbox.outputs().files] == ["b"]
        status, text = await say(sandbox, "os._exit(3)")
        assert (status, "exit status 3" in text) == ("died", True)
        status, text = await say(sandbox, "import os; os.kill(os.getpid(), 6)")
        assert (status, "SIGABRT" in text) == ("died", True)
        assert await say(sandbox, "1;") == ("ok", RESTARTED)
        container = f"swarm-{os.getpid()}-"
        assert container in listed(host)
    assert container not in listed(host)
    assert not list((host._folder / "stores").iterdir())
    async with KernelSandbox(host=host.ready) as sandbox:
        assert await say(sandbox, "1 + 1") == ("ok", "2")


async def say(sandbox, code, timeout_s=60):
    result = await sandbox.run(code, timeout_s=timeout_s)
    return result.status, result.text


def listed(host):
    command = [host._command, "ps", "--all", "--format", "{{.Names}}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
