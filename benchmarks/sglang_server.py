"""A swarm on real SGLang servers that serve `nano`: it holds, and agrees with our model, or not.

    python benchmarks/sglang_server.py --url URL --url URL --kill PID [--json] [--quick]

`make test-sglang` starts two servers and runs it; the second server is killed on the way.

    the demo's wide question ─> server 1 ─> ledger ─> scored again by our model, in one pass
    cancel a call            ─> the server is idle after cancel_ms
    weights x 1.03 and back  ─> from tensor, from disk: outputs compared bit for bit
    episodes on both         ─> kill server 2 ─> they go on on server 1

Keys: item_f1, subagents, tool_calls, tool_errors, ids_in_equal_ids_out (the server, sent the
recorded contexts, reads back the recorded ids), mean_abs_dlogprob_vs_embedded,
max_abs_dlogprob_vs_embedded, routing_agreement (of (token, layer) pairs, the share for which the
server recorded the experts that our model chooses), prefix_hits_later_turns (cached tokens, of
those that earlier turns of the same context had computed), cached_fraction_later_turns (of the
whole prompt, new tool results included), cancel_ms, tensor_changes, tensor_restores, disk_changes,
disk_restores (bit for bit, ids and log-probabilities), verified (checksums), tensor_s, disk_s,
episodes_at_kill, calls_moved, episodes_survived, wall_s (of the wide question).
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import anyio
import torch
from report import report  # benchmarks/report.py

from swarm_sdk import Swarm
from swarm_sdk.atlas.demo import demo_questions
from swarm_sdk.atlas.scoring import score
from swarm_sdk.config import default_sampling, nano_directory
from swarm_sdk.desk import atlas_corpus
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.http import ServerClient
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.sglang_client import SglangEngine, open_sglang
from swarm_sdk.model_backend.sglang_weights import SglangWeights
from swarm_sdk.model_backend.weights import checkpoint
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.traces.ledger import Ledger, StepRecord
from swarm_sdk.traces.trajectory import Branch, branches
from swarm_sdk.types import Generation, Sampling

CHANGE = 1.03125
"""A factor that bfloat16 holds."""
NUM_EPISODES = 3
"""That run when the server is killed."""
QUESTION = "Give the capital and currency of these countries: Kenya, Peru, Japan, Chile, Benin."


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", action="append", required=True, help="two servers, `nano` each")
    parser.add_argument("--kill", type=int, help="process group of the second server")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true", help="score the orchestrator's tokens only")
    options = parser.parse_args()
    model = checkpoint.load(nano_directory())
    corpus = atlas_corpus()
    tools = [SearchTool(corpus), OpenTool(corpus)]
    served = open_sglang(options.url[0], nano_directory())
    engine = served.engine
    assert isinstance(engine, SglangEngine)
    server = await engine.server()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        results |= await episode(served, tools, Path(folder), model, quick=options.quick)
    results |= await cancelling(options.url[0], engine)
    results |= await updating(options.url[0], engine, model)
    await engine.aclose()
    if len(options.url) > 1 and options.kill:
        results |= await killing(options.url, options.kill, tools)
    settings = {
        "checkpoint": "nano",
        "server_dtype": (await ServerClient(options.url[0]).get("/server_info"))["dtype"],
        "sglang": server.version,
        "servers": len(options.url),
        "question": "wide, of the demo",
    }
    report("sglang", settings, results, {}, as_json=options.json)


async def episode(
    served: TokenModel, tools: list[Any], runs: Path, model: KimiModel, *, quick: bool
) -> dict[str, Any]:
    """The demo's wide question, and what its record holds beside what our model says."""
    wide, _ = demo_questions()
    swarm = Swarm(served, tools=tools, runs=runs, sampling=default_sampling("nano"))
    began_s = time.perf_counter()
    result = await swarm.run(wide.prompt)
    wall_s = time.perf_counter() - began_s
    ledger = Ledger(runs, readonly=True)
    steps = list(ledger.steps(result.episode_id))
    found = branches(ledger, result.episode_id)
    later = [s.body["usage"] for s in steps if s.kind == "sample" and s.stage > 0]
    calls = [step for step in steps if step.kind == "tool"]
    scored = [branch for branch in found if branch.is_orchestrator or not quick]
    differences, same, total = compare(model, scored)
    engine = served.engine
    assert isinstance(engine, SglangEngine)
    read_back = [await ids_read(engine.base_urls[0], branch.token_ids) for branch in found]
    ledger.close()
    return {
        "status": result.status,
        "item_f1": score(wide, result.output),
        "subagents": len(result.subagents),
        "tool_calls": len(calls),
        "tool_errors": sum(bool(step.body["error"]) for step in calls),
        "ids_in_equal_ids_out": all(
            ids == branch.token_ids for ids, branch in zip(read_back, found, strict=True)
        ),
        "sampled_tokens": len(differences),
        "mean_abs_dlogprob_vs_embedded": float(differences.mean()),
        "max_abs_dlogprob_vs_embedded": float(differences.max()),
        "routing_agreement": same / total if total else None,
        "prefix_hits_later_turns": prefix_hits(steps),
        "cached_fraction_later_turns": sum(one["num_cached_tokens"] for one in later)
        / sum(one["num_prompt_tokens"] for one in later),
        "wall_s": wall_s,
    }


def prefix_hits(steps: list[StepRecord]) -> float:
    """Cached tokens of all later turns over those that the turns before them had computed."""
    known: dict[str, int] = {}
    cached = possible = 0
    for step in steps:
        if step.kind != "sample":
            continue
        before = known.get(step.agent_path, 0)
        if before:
            cached += min(step.body["usage"]["num_cached_tokens"], before)
            possible += before
        # The last sampled token has not been through the network.
        known[step.agent_path] = before + len(step.prompt_ids) + len(step.token_ids)
    return cached / possible


@torch.inference_mode()
def compare(model: KimiModel, found: list[Branch]) -> tuple[torch.Tensor, int, int]:
    """|log-probability on record - ours| of every sampled token; routings that agree, of all."""
    differences: list[torch.Tensor] = []
    same = total = 0
    first_mixture = model.config.text_config.first_k_dense_replace
    for branch in found:
        ids_T = torch.tensor(branch.token_ids)
        attention = FullAttention(model.config.text_config, [len(ids_T)])
        chosen: list[torch.Tensor] = []
        hidden_TD = model(ids_T, torch.arange(len(ids_T)), attention, None, chosen)
        is_sampled = torch.tensor(branch.is_sampled)[1:]
        logits = model.logits(hidden_TD[:-1][is_sampled])
        ours = logits.log_softmax(-1).gather(1, ids_T[1:][is_sampled][:, None]).squeeze(1)
        differences.append((torch.tensor(branch.logprobs)[1:][is_sampled] - ours).abs())
        if branch.experts is not None:
            shape = (-1, branch.experts.num_layers, branch.experts.num_chosen)
            recorded = torch.frombuffer(bytearray(branch.experts.data), dtype=torch.uint16)
            theirs = recorded.to(torch.int64).reshape(shape)[:, first_mixture:].sort(-1).values
            mine = torch.stack([one[:-1] for one in chosen], dim=1).sort(-1).values
            same += int((theirs == mine).all(-1).sum())
            total += mine.shape[0] * mine.shape[1]
    return torch.cat(differences), same, total


async def ids_read(url: str, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    """The ids that the server read of a context that it was sent."""
    client = ServerClient(url)
    answer = await client.post(
        "/generate",
        {
            "input_ids": list(token_ids),
            "sampling_params": {"temperature": 0, "max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
        },
    )
    await client.aclose()
    return tuple(token for _, token, _ in answer["meta_info"]["input_token_logprobs"])


async def cancelling(url: str, engine: SglangEngine) -> dict[str, Any]:
    """Milliseconds from the cancel of a long call to a server that runs nothing."""
    client = ServerClient(url)

    async def num_running() -> int:
        loads = (await client.get("/v1/loads"))["loads"]
        return sum(load["num_running_reqs"] for load in loads)

    # Ids that nano never ends on its own for long; the limit is what ends them else.
    prompt = tuple(random.Random(3).choices(range(300, 3000), k=40))
    with anyio.move_on_after(1.0):
        await engine.generate(prompt, Sampling(temperature=1.5, max_tokens=7_000))
    began_s = time.perf_counter()
    with anyio.move_on_after(10) as scope:
        while await num_running():  # noqa: ASYNC110 - the server offers nothing to wait on
            await anyio.sleep(0.01)
    await client.aclose()
    took_ms = (time.perf_counter() - began_s) * 1e3
    return {"cancel_ms": None if scope.cancelled_caught else took_ms}


async def updating(url: str, engine: SglangEngine, model: KimiModel) -> dict[str, Any]:
    """Weights changed and put back, from tensor and from disk."""
    prompt = tuple(random.Random(4).choices(range(300, 3000), k=60))
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    changed = {name: tensor * CHANGE for name, tensor in weights.items()}
    sink = SglangWeights(url, model.config)

    async def sample() -> Generation:
        # Without what is cached, whose keys another batch may have computed.
        await anyio.to_thread.run_sync(urllib.request.urlopen, f"{url}/flush_cache", b"")
        return await engine.generate(prompt, Sampling(temperature=0, max_tokens=24))

    def said(generation: Generation) -> tuple[Any, ...]:
        return generation.token_ids, generation.logprobs

    with tempfile.TemporaryDirectory() as folder:
        other, same = Path(folder) / "other", Path(folder) / "same"
        clone = checkpoint.load(nano_directory())
        clone.load_state_dict(changed, strict=False)
        checkpoint.save(clone, other, dtype=torch.bfloat16)
        shutil.copytree(nano_directory(), same)
        before = await sample()
        began_s = time.perf_counter()
        await sink.update_weights(changed, 1)
        tensor_s = time.perf_counter() - began_s
        by_tensor = await sample()
        await sink.update_weights(weights, 2)
        verified = sink.is_verified
        after_tensor = await sample()
        began_s = time.perf_counter()
        await sink.load(other, 3)
        disk_s = time.perf_counter() - began_s
        by_disk = await sample()
        await sink.load(same, 4)
        after_disk = await sample()
    await sink.aclose()
    return {
        "tensor_changes": said(by_tensor) != said(before),
        "tensor_restores": said(after_tensor) == said(before),
        "disk_changes": said(by_disk) == said(by_tensor) != said(before),
        "disk_restores": said(after_disk) == said(before),
        "versions": [
            one.weight_version for one in (before, by_tensor, after_tensor, by_disk, after_disk)
        ],
        "verified": verified,
        "tensor_s": tensor_s,
        "disk_s": disk_s,
    }


async def killing(urls: list[str], group: int, tools: list[Any]) -> dict[str, Any]:
    """Episodes over both servers; the second dies while it answers calls of theirs."""
    served = open_sglang(urls, nano_directory())
    engine = served.engine
    assert isinstance(engine, SglangEngine)
    await engine.server(1)
    statuses: list[str] = []
    num_running = NUM_EPISODES
    moved = 0
    with tempfile.TemporaryDirectory() as folder:
        swarm = Swarm(served, tools=tools, runs=folder, sampling=default_sampling("nano"))

        async def run() -> None:
            nonlocal num_running
            result = await swarm.run(QUESTION)
            num_running -= 1
            statuses.append(result.status)

        async with anyio.create_task_group() as tasks:
            for number in range(NUM_EPISODES):
                tasks.start_soon(run, name=f"episode {number}")
            while not (moved := engine.num_running(1)) and num_running:  # noqa: ASYNC110
                await anyio.sleep(0.01)
            await anyio.sleep(0.3)
            moved = engine.num_running(1)
            at_kill = num_running
            os.killpg(group, signal.SIGKILL)
    await engine.aclose()
    return {
        "episodes_at_kill": at_kill,
        "calls_moved": moved,
        "episodes_survived": statuses.count("done"),
        "episodes": NUM_EPISODES,
    }


if __name__ == "__main__":
    try:
        anyio.run(main)
    except KeyboardInterrupt:
        sys.exit(130)
