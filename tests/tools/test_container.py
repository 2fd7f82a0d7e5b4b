import os
import sys

import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.container import ContainerHost
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
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
    assert f"--user {os.getuid()}" in started
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
