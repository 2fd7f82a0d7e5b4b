import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest

from swarm_sdk.errors import ConfigError, SandboxDied
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.sandbox.protocol import CellResult
from swarm_sdk.types import Image, RunContext

PICTURE = Image(b"png")
FILES = (Image(b"bytes", name="a.png"),)


class OneAgent:
    """Resources as an agent holds them."""

    def __init__(self):
        self.held = {}
        self.stack = AsyncExitStack()

    async def get(self, key, start):
        if key not in self.held:
            self.held[key] = await self.stack.enter_async_context(start())
        return self.held[key]


class Answers:
    """A sandbox that gives prepared results."""

    def __init__(self, *results):
        self.results = list(results)
        self.asked = []

    async def run(self, code, *, timeout_s):
        self.asked.append((code, timeout_s))
        return self.results.pop(0)

    async def aclose(self): ...


def context(agent):
    return RunContext(
        episode_id="e", agent_path="main", call_id="c", deps=None, resources=agent, files=FILES
    )


def test_the_sandbox_starts_once_with_the_files_and_its_results_come_back():
    sandbox = Answers(
        CellResult(status="ok", text="3", images=(PICTURE,)),
        CellResult(status="ok", text=""),
        CellResult(status="error", text="NameError: x"),
        CellResult(status="wall_timeout", text="[stopped after 5 s; variables are kept]"),
    )
    started = []

    @asynccontextmanager
    async def start(files):
        started.append(files)
        yield sandbox

    async def calls():
        agent, tool = OneAgent(), IPythonTool(start, timeout_s=5)
        async with agent.stack:
            return [await tool({"code": code}, context(agent)) for code in "abcd"]

    outputs = anyio.run(calls)
    assert [output.content for output in outputs] == [
        "3",
        "(no output)",
        "NameError: x",
        "[stopped after 5 s; variables are kept]",
    ]
    assert outputs[0].images == (PICTURE,)
    assert started == [FILES]
    assert sandbox.asked == [(code, 5) for code in "abcd"]


def test_a_sandbox_that_died_is_a_tool_error():
    @asynccontextmanager
    async def start(files):
        yield Answers(CellResult(status="died", text="gone: variables are lost", has_state=False))

    async def call():
        await IPythonTool(start)({"code": "1"}, context(OneAgent()))

    with pytest.raises(SandboxDied, match="gone: variables are lost"):
        anyio.run(call)


def test_without_settings_it_runs_in_a_local_kernel_that_ends_with_the_agent():
    async def calls():
        agent, tool = OneAgent(), IPythonTool()
        async with agent.stack:
            await tool({"code": "x = 6"}, context(agent))
            output = await tool({"code": "x * 7, open('a.png').read()"}, context(agent))
            pid = agent.held["ipython"].pid
        return output.content, pid, agent.held["ipython"].pid

    content, before, after = anyio.run(calls)
    assert content == "(42, 'bytes')"
    assert before is not None
    assert after is None


def test_what_the_model_is_told():
    spec = IPythonTool().spec
    assert spec.name == "ipython"
    assert spec.description == (
        "Run Python code; variables persist. Prints and the last value come back."
    )
    assert spec.parameters == {
        "type": "object",
        "properties": {"code": {"type": "string"}},
        "required": ["code"],
    }


def test_a_time_limit_must_be_positive():
    with pytest.raises(ConfigError, match="timeout_s must be positive"):
        IPythonTool(timeout_s=0)


def test_the_tools_load_neither_kernel_client_nor_torch():
    code = (
        "import sys, swarm_sdk.tools.search, swarm_sdk.tools.ipython\n"
        "import swarm_sdk.tools.sandbox.pool\n"
        "print({'jupyter_client', 'zmq', 'torch', 'IPython'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
