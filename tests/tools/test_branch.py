import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.sandbox.branch import branches
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.protocol import JournalEntry
from swarm_sdk.types import Image

pytestmark = pytest.mark.anyio


async def run(sandbox, code, timeout_s=20.0):
    return (await sandbox.run(code, timeout_s=timeout_s)).text


async def test_branches_begin_where_the_session_stands_and_then_go_their_own_way():
    async with KernelSandbox([Image(b"12", name="n.txt")]) as sandbox:
        await run(sandbox, "import random; x = [int(open('n.txt').read()), random.random()]")
        await run(sandbox, "1 / 0")
        await run(sandbox, "open('made.txt', 'w').write('m'); f = lambda y: y + x[0]")
        drawn = await run(sandbox, "x")
        assert sandbox.journal[1] == JournalEntry("1 / 0", "error")
        async with branches(sandbox, 2) as (first, second):
            assert await run(first, "x") == await run(second, "x") == drawn
            assert await run(first, "open('made.txt').read(), f(1)") == "('m', 13)"
            await run(first, "x.append('first')")
            await run(second, "del x")
            assert await run(sandbox, "len(x)") == "2"
            pids = {first.pid, second.pid, sandbox.pid}
            assert len(pids) == 3


async def test_a_session_that_cannot_be_run_again_is_refused():
    async with KernelSandbox() as sandbox:
        with pytest.raises(ConfigError, match="must be positive"):
            async with branches(sandbox, 0):
                pass
        await run(sandbox, "while True: pass", timeout_s=0.2)
        with pytest.raises(ConfigError, match="cell 1 of the session ended as 'wall_timeout'"):
            async with branches(sandbox, 1):
                pass


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("if KEY % 2: 1 / 0", "cell 1 ended as"),
        ("globals()['x' + str(KEY)] = 1", "differs from the session in: x"),
    ],
)
async def test_a_branch_that_came_out_differently_is_not_handed_out(code, says):
    # uuid4 is not seeded: what follows from it is not the same twice (once in 2 ** 64 it is).
    key = "(__import__('uuid').uuid4().int >> 64)"
    async with KernelSandbox() as sandbox:
        if "%" in code:
            counter = "import os, time; KEY = int(time.time() * 1e6)"
            code = f"{counter}\nif time.time() > {__import__('time').time() + 0.8}: 1 / 0"
            await run(sandbox, code)
            await __import__("anyio").sleep(0.9)
        else:
            await run(sandbox, code.replace("KEY", key))
        with pytest.raises(SandboxDied, match=says):
            async with branches(sandbox, 1):
                pass
