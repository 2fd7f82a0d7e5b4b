"""Measure what the runtime costs beside a hand-written loop that makes the same calls.

    python benchmarks/orchestration.py [--json] [--quick] [--http]

One orchestrator gives N sub-agents a task each; a sub-agent calls its model 4 times and a tool
after each of the first 3. Ours keeps the ledger and ends a span for every model and tool call (an
OpenTelemetry SDK provider collects them); the hand loop keeps nothing.

Keys, in process: ms_per_step_N (process seconds over model calls), hand_ms_per_step_N,
growth_5000_over_100. With --http, against a local OpenAI-compatible server that answers after
200 ms: http_efficiency_N (critical path over wall time), http_cpu_over_aiohttp (CPU of our process
over that of the bare aiohttp loop).
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import multiprocessing as mp
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import aiohttp
import anyio
import anyio.lowlevel
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from report import report  # benchmarks/report.py

from swarm_sdk import Budget, Message, Sampling, Swarm, tool
from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.openai_client import OpenAIModel
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.types import ToolSpec

NUM_CALLS = 4
LATENCY_S = 0.2
ANSWER = "the answer of a sub-agent"


class CountingProcessor(SpanProcessor):
    """Takes every span that ends, as an exporter would, and counts it."""

    def __init__(self) -> None:
        self.num_spans = 0

    def on_end(self, span: ReadableSpan) -> None:
        """Count the span."""
        del span
        self.num_spans += 1


@tool
async def look(what: str) -> str:
    """Look something up."""
    return f"{what}: 42"


@lru_cache
def policy(num_agents: int) -> object:
    """The scripted model: the same turns for every sub-agent."""
    assign = [call("assign_task", agent="worker", prompt=f"task {i}") for i in range(num_agents)]
    launch = calls(call("create_subagent", name="worker", system_prompt="You look."), *assign)
    step = calls(call("look", what="a thing"))

    def next_turn(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if tools[-1].name == "assign_task":
            return launch if len(messages) == 2 else "all done"
        return step if len(messages) < 2 + 2 * (NUM_CALLS - 1) else ANSWER

    return next_turn


async def ours(num_agents: int, runs: Path) -> tuple[float, float, int]:
    """Wall and CPU seconds of one episode, and its model calls."""
    provider = TracerProvider()
    processor = CountingProcessor()
    provider.add_span_processor(processor)
    swarm = Swarm(
        ScriptedModel(policy(num_agents)),
        tools=[look],
        max_parallel=num_agents,
        runs=runs,
        tracer_provider=provider,
    )
    async with swarm:
        swarm.open_ledger()
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        result = await swarm.run("go")
        wall_s = time.perf_counter() - started_s
        cpu_s = time.process_time() - started_cpu_s
    num_steps = NUM_CALLS * num_agents + 2
    assert result.status == "done", result.error
    assert result.total_steps == num_steps, result.total_steps
    assert result.num_failed == 0
    num_spans = 1 + (1 + num_agents) + num_steps + (1 + num_agents + 3 * num_agents)
    assert processor.num_spans == num_spans, (processor.num_spans, num_spans)
    return wall_s, cpu_s, num_steps


async def by_hand(num_agents: int, runs: Path) -> tuple[float, float, int]:
    """The same calls in a loop of the simplest kind, with nothing on record."""
    del runs
    model = policy(num_agents)
    worker_tools = [look.spec]
    num_steps = 0

    async def turn(messages: list[Message], tools: Sequence[ToolSpec]) -> Message:
        nonlocal num_steps
        num_steps += 1
        await anyio.lowlevel.checkpoint()
        said = model(messages, tools)
        message = Message("assistant", said) if isinstance(said, str) else said
        messages.append(message)
        return message

    async def agent(prompt: str, reports: list[str]) -> None:
        messages = [Message("system", "You look."), Message("user", prompt)]
        while True:
            message = await turn(messages, worker_tools)
            if not message.tool_calls:
                reports.append(message.content)
                return
            for made in message.tool_calls:
                output = await look(made.arguments, None)
                messages.append(Message("tool", output.content))

    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    main_tools = [ToolSpec("assign_task", "", {})]
    messages = [Message("system", ""), Message("user", "go")]
    launched = await turn(messages, main_tools)
    reports: list[str] = []
    async with anyio.create_task_group() as group:
        for made in launched.tool_calls[1:]:
            group.start_soon(agent, made.arguments["prompt"], reports)
    messages += [Message("tool", report) for report in reports]
    await turn(messages, main_tools)
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    assert num_steps == NUM_CALLS * num_agents + 2
    return wall_s, cpu_s, num_steps


# -- over HTTP


class ChatServer(asyncio.Protocol):
    """Chat completions after ``LATENCY_S``, with as little work as possible.

    It has one core and the client the other: a server framework would take as long as the client
    and be what is measured at 1,000 agents.
    """

    answers: ClassVar[dict[tuple[int, int, bool], bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        self.transport = transport
        self.received = b""

    def data_received(self, data: bytes) -> None:
        """Answer each request that is complete."""
        self.received += data
        head, blank, rest = self.received.partition(b"\r\n\r\n")
        if not blank:
            return
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(rest) < length:
            return
        self.received = rest[length:]
        loop = asyncio.get_running_loop()
        loop.call_later(LATENCY_S, self.transport.write, self.answer(rest[:length]))

    def answer(self, content: bytes) -> bytes:
        """The whole response; the same conversations come again and again."""
        body = json.loads(content)
        is_main = any(t["function"]["name"] == "assign_task" for t in body["tools"])
        key = (body["seed"], len(body["messages"]), is_main)
        known = self.answers.get(key)
        if known is None:
            known = self.answers[key] = response(*key)
        return known


def response(num_agents: int, num_messages: int, is_main: bool) -> bytes:  # noqa: FBT001
    """An HTTP response with the next turn of a conversation of ``num_messages``."""
    tool = ToolSpec("assign_task" if is_main else "look", "", {})
    said = policy(num_agents)([None] * num_messages, [tool])
    message: dict[str, object] = {"role": "assistant", "content": said}
    reason = "stop"
    if isinstance(said, Message):
        reason = "tool_calls"
        message = {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": f"c{index}",
                    "type": "function",
                    "function": {"name": made.name, "arguments": json.dumps(made.arguments)},
                }
                for index, made in enumerate(said.tool_calls)
            ],
        }
    choice = {"index": 0, "message": message, "finish_reason": reason}
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    answer = {"id": "x", "object": "chat.completion", "created": 0, "model": "m"}
    body = json.dumps(answer | {"choices": [choice], "usage": usage}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    return head.encode() + b"\r\n\r\n" + body


def serve(ready: object) -> None:
    """Run the server in a process of its own and send its port."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(ChatServer, "127.0.0.1", 0, backlog=4096)
        ready.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(main())


async def ours_http(num_agents: int, runs: Path, url: str) -> tuple[float, float]:
    """Efficiency and CPU seconds."""
    model = OpenAIModel(url, "m")
    swarm = Swarm(
        model,
        tools=[look],
        max_parallel=num_agents,
        runs=runs,
        sampling=Sampling(seed=num_agents, max_tokens=256),
        budget=Budget(),
        tracer_provider=TracerProvider(),
    )
    async with swarm:
        swarm.open_ledger()
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        result = await swarm.run("go")
        wall_s = time.perf_counter() - started_s
        cpu_s = time.process_time() - started_cpu_s
    await model.aclose()
    assert result.status == "done", result.error
    assert (result.num_failed, result.critical_steps) == (0, NUM_CALLS + 2)
    return (NUM_CALLS + 2) * LATENCY_S / wall_s, cpu_s


async def by_hand_http(num_agents: int, runs: Path, url: str) -> tuple[float, float]:
    """The same requests by a bare aiohttp loop, with nothing on record."""
    del runs
    spec = {"type": "function", "function": {"name": "look", "parameters": {}}}
    assign = {"type": "function", "function": {"name": "assign_task", "parameters": {}}}
    connector = aiohttp.TCPConnector(limit=0)

    async with aiohttp.ClientSession(connector=connector) as session:

        async def turn(messages: list[dict[str, object]], tools: list[object]) -> dict[str, object]:
            body = {"model": "m", "messages": messages, "tools": tools, "seed": num_agents}
            async with session.post(f"{url}/chat/completions", json=body) as response:
                answer = json.loads(await response.read())
            message = answer["choices"][0]["message"]
            messages.append(message)
            return message

        async def agent(prompt: str, reports: list[str]) -> None:
            messages: list[dict[str, object]] = [
                {"role": "system", "content": "You look."},
                {"role": "user", "content": prompt},
            ]
            while True:
                message = await turn(messages, [spec])
                if not message.get("tool_calls"):
                    reports.append(message["content"])
                    return
                for made in message["tool_calls"]:
                    output = await look(json.loads(made["function"]["arguments"]), None)
                    result = {"role": "tool", "tool_call_id": made["id"], "content": output.content}
                    messages.append(result)

        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        messages: list[dict[str, object]] = [
            {"role": "system", "content": ""},
            {"role": "user", "content": "go"},
        ]
        launched = await turn(messages, [assign])
        reports: list[str] = []
        async with anyio.create_task_group() as group:
            for made in launched["tool_calls"][1:]:
                prompt = json.loads(made["function"]["arguments"])["prompt"]
                group.start_soon(agent, prompt, reports)
        messages += [
            {"role": "tool", "tool_call_id": made["id"], "content": report}
            for made, report in zip(launched["tool_calls"][1:], reports, strict=True)
        ]
        await turn(messages, [assign])
        wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    return (NUM_CALLS + 2) * LATENCY_S / wall_s, cpu_s


# -- the report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer agents and repeats")
    parser.add_argument("--http", action="store_true", help="over HTTP instead of in process")
    parser.add_argument("--json", action="store_true", dest="as_json")
    options = parser.parse_args()
    repeats = 2 if options.quick else 5
    measure = measure_http if options.http else measure_in_process
    with tempfile.TemporaryDirectory() as folder:
        results, peers = measure(Path(folder), repeats, is_quick=options.quick)
    settings = {"calls_per_agent": NUM_CALLS, "repeats": repeats, "ledger": True, "spans": True}
    if options.http:
        settings["latency_s"] = LATENCY_S
    name = "orchestration_http" if options.http else "orchestration"
    report(name, settings, results, peers, as_json=options.as_json)


def measure_in_process(
    folder: Path, repeats: int, *, is_quick: bool
) -> tuple[dict[str, float], dict[str, float]]:
    results: dict[str, float] = {}
    peers: dict[str, float] = {}
    sizes = (1, 100, 500) if is_quick else (1, 10, 100, 1000, 5000)
    ms: dict[int, list[float]] = {size: [] for size in sizes}
    hand_ms: dict[int, list[float]] = {size: [] for size in sizes}
    for repeat in range(-1, repeats):  # the first round warms up
        for size in sizes:
            for way, kept in ((ours, ms), (by_hand, hand_ms)):
                if size * NUM_CALLS >= 10_000 and repeat >= 3:
                    continue
                rounds = max(1, 4_000 // (size * NUM_CALLS))
                runs = folder / f"{way.__name__}-{size}-{repeat}"
                gc.collect()  # what another size left behind is not charged to this one
                taken = [anyio.run(way, size, runs) for _ in range(rounds)]
                if repeat >= 0:
                    steps = sum(steps for *_, steps in taken)
                    kept[size].append(sum(cpu_s for _, cpu_s, _ in taken) / steps * 1e3)
        sys.stderr.write(f"round {repeat + 1} of {repeats}\n")
    for size in sizes:
        results[f"ms_per_step_{size}"] = round(statistics.median(ms[size]), 4)
        results[f"ms_per_step_{size}_spread"] = round(max(ms[size]) - min(ms[size]), 4)
        peers[f"hand_ms_per_step_{size}"] = round(statistics.median(hand_ms[size]), 4)
    if not is_quick:
        growth = results["ms_per_step_5000"] / results["ms_per_step_100"]
        results["growth_5000_over_100"] = round(growth, 3)
    return results, peers


def measure_http(
    folder: Path, repeats: int, *, is_quick: bool
) -> tuple[dict[str, float], dict[str, float]]:
    context = mp.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    server = context.Process(target=serve, args=(sender,), daemon=True)
    server.start()
    if not receiver.poll(30):
        raise ConfigError("the local server did not start")
    url = f"http://127.0.0.1:{receiver.recv()}/v1"
    results: dict[str, float] = {}
    peers: dict[str, float] = {}
    ratios: list[float] = []
    try:
        for size in (20, 100) if is_quick else (100, 1000):
            kept: dict[str, list[tuple[float, float]]] = {"ours": [], "hand": []}
            for repeat in range(-1, repeats):
                runs = folder / f"http-{size}-{repeat}"
                for name, way in (("ours", ours_http), ("hand", by_hand_http)):
                    measured = anyio.run(way, size, runs, url)
                    if repeat >= 0:
                        kept[name].append(measured)
                sys.stderr.write(f"{size} agents, round {repeat + 1} of {repeats}\n")
            ratios += [a[1] / b[1] for a, b in zip(kept["ours"], kept["hand"], strict=True)]
            results[f"http_efficiency_{size}"] = round(
                statistics.median(e for e, _ in kept["ours"]), 3
            )
            peers[f"aiohttp_efficiency_{size}"] = round(
                statistics.median(e for e, _ in kept["hand"]), 3
            )
            for place, name in ((results, "ours"), (peers, "hand")):
                cpu_s = statistics.median(cpu for _, cpu in kept[name])
                place[f"{name}_http_ms_per_step_{size}"] = round(
                    cpu_s / (NUM_CALLS * size + 2) * 1e3, 4
                )
        results["http_cpu_over_aiohttp"] = round(statistics.median(ratios), 3)
        results["http_cpu_over_aiohttp_spread"] = round(max(ratios) - min(ratios), 3)
    finally:
        server.terminate()
        server.join()
    return results, peers


if __name__ == "__main__":
    main()
