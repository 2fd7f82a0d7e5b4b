"""Inject faults into models and tools and see how every episode ends.

    python benchmarks/faults.py [--json] [--quick] [--cases 500]

A local OpenAI-compatible server lets 30 % of its answers fail, evenly: connection reset, 429 with
Retry-After, 500, an answer that never comes, JSON that is cut, a body of another schema. 10 % of
the tool calls raise, hang, or return what has no JSON form. Every case is one episode of an
orchestrator and 3 sub-agents with tools; calls are tried 3 times.

Keys: ended_typed (share of episodes that returned a Result with a status, all agents accounted for
and on record, within their time), statuses, siblings_kept (of ten sub-agents one is killed: how
many others report), calls_after_cancel (model and tool calls that start after a cancel).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
from aiohttp import web
from report import report  # benchmarks/report.py

from swarm_sdk import Budget, Limits, Message, ModelError, Sampling, Swarm
from swarm_sdk.model_backend.http import Retry
from swarm_sdk.model_backend.openai_client import OpenAIModel
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import ToolSpec

MODEL_FAULTS = ("reset", "429", "500", "hang", "cut JSON", "wrong schema")
MODEL_FAULT_SHARE = 0.3
TOOL_FAULTS = ("raise", "raise base", "hang", "no JSON form")
TOOL_FAULT_SHARE = 0.1
NUM_AGENTS = 3
TIMEOUT_S = 0.3


class Misbehaves(BaseException):
    """What no ``except Exception`` catches."""


def next_turn(messages: Sequence[Any], tools: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """Calls of the next turn; none for the final message. ``messages`` is their number."""
    if "assign_task" in tools:
        if len(messages) > 2:
            return []
        made = [("create_subagent", {"name": "w", "system_prompt": "You work."})]
        return made + [("assign_task", {"agent": "w", "prompt": str(i)}) for i in range(NUM_AGENTS)]
    return [("work", {"what": "a thing"})] if len(messages) < 6 else []


class FaultyServer:
    """Chat completions, of which a share goes wrong in every way."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.num_requests = 0

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer, or fail."""
        body = json.loads(await request.read())
        self.num_requests += 1
        if self.rng.random() < MODEL_FAULT_SHARE:
            fault = self.rng.choice(MODEL_FAULTS)
            self.faults[fault] += 1
            return await self.fail(fault, request)
        made = next_turn(body["messages"], [t["function"]["name"] for t in body.get("tools", ())])
        message: dict[str, Any] = {"role": "assistant", "content": None if made else "done"}
        if made:
            message["tool_calls"] = [
                {
                    "id": f"c{index}",
                    "type": "function",
                    "function": {"name": name, "arguments": json.dumps(arguments)},
                }
                for index, (name, arguments) in enumerate(made)
            ]
        reason = "tool_calls" if made else "stop"
        choice = {"index": 0, "message": message, "finish_reason": reason}
        usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
        return web.json_response({"id": "x", "object": "chat.completion", "created": 0,
                                  "model": "m", "choices": [choice], "usage": usage})  # fmt: skip

    async def fail(self, fault: str, request: web.Request) -> web.StreamResponse:
        """One of ``MODEL_FAULTS``."""
        match fault:
            case "reset":
                assert request.transport is not None
                request.transport.abort()
            case "429":
                return web.json_response({}, status=429, headers={"Retry-After": "0.01"})
            case "hang":
                await asyncio.sleep(30)
            case "cut JSON":
                return web.Response(text='{"choices": [{"mess', content_type="application/json")
            case "wrong schema":
                return web.json_response({"choices": "none", "usage": 3})
        return web.json_response({"error": {"message": "boom"}}, status=500)


def work_tool(rng: random.Random, faults: Counter[str]) -> Any:
    async def work(what: str) -> object:
        """Do a piece of work."""
        if rng.random() < TOOL_FAULT_SHARE:
            fault = rng.choice(TOOL_FAULTS)
            faults[fault] += 1
            match fault:
                case "raise":
                    raise RuntimeError("the tool broke")
                case "raise base":
                    raise Misbehaves("the tool broke badly")
                case "hang":
                    await asyncio.sleep(30)
                case "no JSON form":
                    return asyncio.Lock()
        return what

    return work


async def typed_endings(folder: Path, num_cases: int, seed: int) -> dict[str, Any]:
    """The share of ``num_cases`` episodes that end as they should."""
    server = FaultyServer(seed)
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.complete)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    retry = Retry(attempts=3, first_wait_s=0.005, longest_wait_s=0.02)
    model = OpenAIModel(url, "m", retry=retry, timeout_s=TIMEOUT_S)
    tool_faults: Counter[str] = Counter()
    swarm = Swarm(
        model,
        tools=[work_tool(random.Random(seed + 1), tool_faults)],
        limits=Limits(tool_timeout_s=TIMEOUT_S),
        budget=Budget(wall_s=30),
        sampling=Sampling(max_tokens=64),
        runs=folder,
    )
    statuses: Counter[str] = Counter()
    num_typed = 0
    slots = anyio.CapacityLimiter(16)

    async def case(index: int) -> None:
        nonlocal num_typed
        async with slots:
            try:
                with anyio.fail_after(60):
                    result = await swarm.run(f"case {index}")
            except BaseException as error:  # what the benchmark is there to find
                statuses[f"raised {type(error).__name__}"] += 1
                if not isinstance(error, Exception):
                    raise
                return
        statuses[result.status] += 1
        ledger = swarm.open_ledger()
        recorded = {agent.path: agent.status for agent in ledger.agents(result.episode_id)}
        is_accounted = recorded == {agent.path: agent.status for agent in result.agents}
        is_on_record = ledger.episode(result.episode_id).status == result.status
        has_reason = result.status == "done" or bool(result.error)
        num_typed += is_accounted and is_on_record and has_reason

    async with swarm, anyio.create_task_group() as group:
        for index in range(num_cases):
            group.start_soon(case, index)
    await model.aclose()
    await runner.cleanup()
    return {
        "ended_typed": num_typed / num_cases,
        "statuses": dict(statuses),
        "model_fault_share": round(sum(server.faults.values()) / server.num_requests, 3),
        "model_faults": dict(server.faults),
        "tool_faults": dict(tool_faults),
    }


async def siblings_kept(folder: Path) -> int:
    """Of ten sub-agents one dies in the middle of its work: how many others report."""

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if any(tool.name == "assign_task" for tool in tools):
            results = [m.content for m in messages if m.role == "tool"]
            if results:
                return str(sum(text == "report" for text in results))
            made = [call("assign_task", agent="w", prompt=str(i)) for i in range(10)]
            return calls(call("create_subagent", name="w", system_prompt="s"), *made)
        await anyio.sleep(0.01)
        if messages[1].content == "4":
            raise ModelError("killed")
        return "report" if len(messages) > 2 else calls(call("nothing"))

    async with Swarm(ScriptedModel(policy), runs=folder) as swarm:
        return int((await swarm.run("go")).output)


async def calls_after_cancel(folder: Path) -> int:
    """Model and tool calls that start once 20 episodes were cancelled at random moments."""
    rng = random.Random(0)
    num_calls = 0

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        nonlocal num_calls
        num_calls += 1
        await anyio.sleep(rng.uniform(0, 0.01))
        if any(tool.name == "assign_task" for tool in tools) and len(messages) == 2:
            made = [call("assign_task", agent="w", prompt=str(i)) for i in range(10)]
            return calls(call("create_subagent", name="w", system_prompt="s"), *made)
        return calls(call("work"))

    async def work() -> str:
        """Work."""
        nonlocal num_calls
        num_calls += 1
        await anyio.sleep(rng.uniform(0, 0.01))
        return "ok"

    total = 0
    async with Swarm(ScriptedModel(policy), tools=[work], runs=folder) as swarm:
        for _ in range(20):
            with anyio.move_on_after(rng.uniform(0.01, 0.1)):
                await swarm.run("go")
            at_cancel = num_calls
            await anyio.sleep(0.05)
            total += num_calls - at_cancel
    ledger = Ledger(folder, readonly=True)
    assert {episode.status for episode in ledger.episodes()} == {"cancelled"}
    ledger.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="40 cases")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    num_cases = 40 if options.quick else options.cases
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        results = anyio.run(typed_endings, folder / "faults", num_cases, options.seed)
        sys.stderr.write(f"{num_cases} cases after {time.perf_counter() - started_s:.0f} s\n")
        results["siblings_kept"] = anyio.run(siblings_kept, folder / "siblings")
        results["calls_after_cancel"] = anyio.run(calls_after_cancel, folder / "cancel")
    results["wall_s"] = round(time.perf_counter() - started_s, 1)
    settings = {"cases": num_cases, "seed": options.seed, "tries": 3, "timeout_s": TIMEOUT_S}
    report("faults", settings, results, {}, as_json=options.as_json)


if __name__ == "__main__":
    main()
