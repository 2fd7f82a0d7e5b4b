"""What apps build on: hooks, typed output, dependencies, context strategies, isolation, events."""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from pydantic import BaseModel

from swarm_sdk import (
    AgentOutcome,
    Budget,
    ConfigError,
    Message,
    ModelError,
    Role,
    Sampling,
    Swarm,
    SwarmError,
    ToolError,
)
from swarm_sdk import swarm as swarm_module
from swarm_sdk.errors import ContextOverflow, LedgerError, SubagentError
from swarm_sdk.runtime.context import HIDDEN, Compact, DiscardAll, HideToolResults
from swarm_sdk.runtime.episode import Result
from swarm_sdk.runtime.events import (
    AgentFinished,
    AgentQueued,
    AgentStarted,
    ContextReset,
    EventsDropped,
    StepStarted,
    ToolStarted,
)
from swarm_sdk.runtime.hooks import AgentInfo, Hooks
from swarm_sdk.runtime.state import Limits
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import Price, RunContext, ToolCall, ToolOutput, ToolSpec, Turn


def results(messages: Sequence[Message]) -> list[str]:
    return [m.content for m in messages if m.role == "tool"]


def is_main(tools: Sequence[ToolSpec]) -> bool:
    return any(tool.name == "assign_task" for tool in tools)


def fan_out(num: int, sub: Any) -> ScriptedModel:
    """Main assigns ``num`` tasks and joins the reports; ``sub(messages, tools)`` is a sub-agent."""

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools) or messages[0].content == "You work.":
            return sub(messages, tools)
        if results(messages):
            return json.dumps(results(messages)[1:])
        made = [call("assign_task", agent="w", prompt=str(i)) for i in range(num)]
        return calls(call("create_subagent", name="w", system_prompt="You work."), *made)

    return ScriptedModel(policy)


def one_call(**arguments: Any) -> ScriptedModel:
    """Calls ``act`` once and answers with its result."""
    return ScriptedModel(
        lambda m, t: results(m)[0] if results(m) else calls(call("act", **arguments))
    )


# -- typed output --


class City(BaseModel):
    name: str
    population: int


def test_a_final_message_comes_back_as_its_type(tmp_path: Path) -> None:
    model = ScriptedModel(lambda m, t: '```json\n{"name": "Oslo", "population": 709037}\n```')
    result = Swarm(model, runs=tmp_path).run_sync("go", output_type=City)
    assert result.parsed == City(name="Oslo", population=709037)


def test_a_message_that_does_not_fit_is_mended_within_the_budget(tmp_path: Path) -> None:
    said = ['{"name": "Oslo"}', "nonsense", '{"name": "Oslo", "population": 1}']
    seen: list[str] = []

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        seen.append(messages[-1].content)
        return said[sum(m.role == "assistant" for m in messages)]

    result = Swarm(ScriptedModel(policy), runs=tmp_path).run_sync("go", output_type=City)
    assert result.parsed == City(name="Oslo", population=1)
    assert result.total_steps == 3
    assert "population: Field required" in seen[1]
    short = Swarm(ScriptedModel(policy), budget=Budget(steps=2), runs=tmp_path)
    assert short.run_sync("go", output_type=City).status == "out_of_budget"


def test_a_turn_that_mends_a_message_is_held_to_its_schema_and_others_are_not(
    tmp_path: Path,
) -> None:
    asked: list[str] = []

    class Watch(Hooks):
        async def model_call(self, agent: AgentInfo, sampling: Sampling, proceed: Any) -> Turn:
            asked.append(sampling.json_schema)
            return await super().model_call(agent, sampling, proceed)

    said = iter(["nonsense", '{"name": "Oslo", "population": 1}'])
    model = ScriptedModel(lambda m, t: next(said))
    result = Swarm(model, runs=tmp_path, hooks=[Watch()]).run_sync("go", output_type=City)
    assert result.parsed == City(name="Oslo", population=1)
    assert asked[0] == ""
    assert json.loads(asked[1])["required"] == ["name", "population"]


def test_what_never_fits_is_a_typed_failure_with_the_text_kept(tmp_path: Path) -> None:
    swarm = Swarm(ScriptedModel(lambda m, t: "no"), runs=tmp_path, limits=Limits(max_repairs=1))
    result = swarm.run_sync("go", output_type=City)
    assert (result.status, result.output, result.parsed) == ("failed", "no", None)
    assert result.total_steps == 2
    assert "does not fit its type" in (result.error or "")


def test_a_role_reports_as_its_type_and_is_held_to_its_budget(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if is_main(tools):
            if results(messages):
                return " / ".join(results(messages))
            return calls(
                call("assign_task", agent="finder", prompt="Oslo"),
                call("assign_task", agent="idler", prompt="x"),
            )
        if "You idle." in messages[0].content:
            return calls(call("act", text="again"))
        assert "population" in messages[0].content  # the schema stands in the prompt
        return '{"name": "Oslo", "population": 7}'

    async def act(text: str) -> str:
        return text

    roles = [
        Role(name="finder", instructions="You find.", output_type=City),
        Role(name="idler", instructions="You idle.", budget=Budget(steps=3)),
    ]
    result = Swarm(ScriptedModel(policy), tools=[act], roles=roles, runs=tmp_path).run_sync("go")
    finder, idler = result.subagents
    assert finder.parsed == City(name="Oslo", population=7)
    assert (idler.status, idler.steps) == ("out_of_budget", 3)
    assert "idler's steps" in (idler.error or "")


def test_a_roles_own_wall_clock_ends_it_and_nobody_else(tmp_path: Path) -> None:
    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if is_main(tools):
            if results(messages):
                return results(messages)[0]
            return calls(call("assign_task", agent="slow", prompt="x"))
        await anyio.sleep(60)
        return ""

    role = Role(name="slow", instructions="s", budget=Budget(wall_s=0.05))
    result = Swarm(ScriptedModel(policy), roles=[role], runs=tmp_path).run_sync("go")
    assert result.status == "done"
    assert result.subagents[0].status == "out_of_budget"
    assert "slow's seconds" in result.output


# -- dependencies, hooks --


@dataclass
class Deps:
    greeting: str


def test_dependencies_reach_tools_with_their_type(tmp_path: Path) -> None:
    async def act(context: RunContext[Deps], name: str) -> str:
        return f"{context.deps.greeting} {name}"

    swarm = Swarm(one_call(name="you"), tools=[act], runs=tmp_path)
    assert swarm.run_sync("go", deps=Deps("hello")).output == "hello you"


class Journal(Hooks):
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    async def model_call(self, agent: AgentInfo, sampling: Sampling, proceed: Any) -> Turn:
        self.told.append(f"{self.name} model {agent.path}")
        return await proceed(sampling)

    async def tool_call(self, agent: AgentInfo, call: ToolCall, proceed: Any) -> ToolOutput:
        self.told.append(f"{self.name} tool {agent.path} {call.name}")
        output = await proceed(call)
        self.told.append(f"{self.name} told {agent.path} {call.name}")
        return output

    async def spawn(self, agent: AgentInfo, child_path: str, prompt: str) -> None:
        self.told.append(f"{self.name} spawn {child_path} {prompt}")
        if prompt == "2":
            raise ToolError("no third one")

    async def join(self, agent: AgentInfo, outcome: AgentOutcome) -> None:
        self.told.append(f"{self.name} join {outcome.path} {outcome.status}")


def test_hooks_surround_every_call_and_may_refuse(tmp_path: Path) -> None:
    told: list[str] = []
    hooks = [Journal("a", told), Journal("b", told)]
    model = fan_out(3, lambda m, t: f"fine {m[1].content}")
    result = Swarm(model, hooks=hooks, runs=tmp_path).run_sync("go")
    assert json.loads(result.output) == ["fine 0", "fine 1", "error: no third one"]
    assert told[:2] == ["a model main", "b model main"]
    assert told.index("a tool main create_subagent") < told.index("b tool main create_subagent")
    assert told.index("b told main create_subagent") < told.index("a told main create_subagent")
    assert "a join main/w.1 done" in told
    assert "a model main/w.2" not in told


def test_a_hook_may_change_a_call_and_what_it_raises_is_the_calls_failure(tmp_path: Path) -> None:
    class Change(Hooks):
        async def tool_call(self, agent: AgentInfo, call: ToolCall, proceed: Any) -> ToolOutput:
            if call.arguments["text"] == "bad":
                raise ValueError("not this")
            return await proceed(ToolCall(call.id, call.name, {"text": "changed"}))

    async def act(text: str) -> str:
        return text

    for text, expected in (("a", "changed"), ("bad", "error: ValueError: not this")):
        swarm = Swarm(one_call(text=text), tools=[act], hooks=[Change()], runs=tmp_path)
        assert swarm.run_sync("go").output == expected


# -- reports, contexts --


def test_a_long_report_is_capped_and_can_be_read_page_by_page(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools):
            return "".join(f"{i:03d}" for i in range(100))
        told = results(messages)
        if not told:
            one = call("assign_task", agent="w", prompt="x")
            return calls(call("create_subagent", name="w", system_prompt="s"), one)
        if len(told) == 2:
            return calls(
                call("read_report", agent="main/w.0", page=3),
                call("read_report", agent="main/w.0", page=4),
                call("read_report", agent="main/x.0", page=1),
            )
        return json.dumps(told[1:])

    limits = Limits(max_report_chars=100)
    result = Swarm(ScriptedModel(policy), limits=limits, runs=tmp_path).run_sync("go")
    report, page, beyond, unknown = json.loads(result.output)
    whole = "".join(f"{i:03d}" for i in range(100))
    assert report.startswith(whole[:100] + "\n[page 1 of 3")
    assert page == whole[200:]
    assert "pages 1 to 3" in beyond
    assert "no report of an agent 'main/x.0'" in unknown


def long_talk(num_calls: int, seen: list[list[str]]) -> ScriptedModel:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        seen.append([m.content for m in messages if m.role != "assistant"])
        policy.num += 1
        return calls(call("act", text=f"{policy.num}" * 200)) if policy.num <= num_calls else "end"

    policy.num = 0
    return ScriptedModel(policy)


async def act(text: str) -> str:
    """Say it."""
    return text


@pytest.mark.parametrize(
    "strategy",
    [
        HideToolResults(900, keep_rounds=1),
        DiscardAll(900),
        Compact(900, lambda messages: [*messages[:2], Message("user", "a summary")]),
    ],
)
def test_a_context_that_grows_too_long_is_begun_anew_and_on_record(
    tmp_path: Path, strategy: Any
) -> None:
    seen: list[list[str]] = []
    events: list[Any] = []
    swarm = Swarm(long_talk(6, seen), tools=[act], context=strategy, runs=tmp_path)
    result = swarm.run_sync("go", on_event=events.append)
    assert result.status == "done"
    resets = [event for event in events if isinstance(event, ContextReset)]
    assert resets
    assert resets[0].strategy == strategy.name
    ledger = Ledger(tmp_path, readonly=True)
    found = branches(ledger, result.episode_id)
    assert len(found) == 1 + len(resets)
    sampled = sum(sum(branch.is_sampled) for branch in found)
    steps = [s for s in ledger.steps(result.episode_id) if s.kind == "sample"]
    assert sampled == sum(len(s.token_ids) for s in steps)
    assert all(
        len(b.token_ids) == len(b.logprobs) == len(b.is_sampled) == len(b.weight_versions)
        for b in found
    )
    ledger.close()
    last = seen[-1]
    if isinstance(strategy, HideToolResults):
        assert HIDDEN in last
        assert last[-1] == "6" * 200
    elif isinstance(strategy, DiscardAll):
        assert any(len(one) == 2 for one in seen[1:])
    else:
        assert "a summary" in last


def test_a_compacted_context_must_end_with_something_to_answer(tmp_path: Path) -> None:
    bad = Compact(900, lambda messages: [])
    swarm = Swarm(long_talk(6, []), tools=[act], context=bad, runs=tmp_path)
    result = swarm.run_sync("go")
    assert result.status == "failed"
    assert "must end with a message that the model can answer" in (result.error or "")
    with pytest.raises(ConfigError, match="threshold_tokens >= 1"):
        DiscardAll(0)


def test_an_overflow_without_a_strategy_is_a_status_of_its_own(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        raise ContextOverflow(num_prompt_tokens=900, limit_tokens=100)

    result = Swarm(ScriptedModel(policy), runs=tmp_path).run_sync("go")
    assert result.status == "overflow"
    assert "900 tokens" in (result.error or "")


# -- isolation, limits --


class Stop(BaseException):
    """Not an Exception."""


async def hang(text: str) -> str:
    await anyio.sleep(60)
    return text


async def huge(text: str) -> str:
    return text * 50_000_000


async def unserialisable(text: str) -> object:
    return threading.Lock()


async def raises_base(text: str) -> str:
    raise Stop(text)


async def raises_exit(text: str) -> str:
    raise SystemExit(text)


async def raises_cancelled(text: str) -> str:
    raise asyncio.CancelledError(text)


@pytest.mark.parametrize(
    ("tool", "told"),
    [
        (hang, "gave no result within 0.2 s"),
        (unserialisable, "has no JSON form"),
        (raises_base, "error: Stop: x"),
        (raises_exit, "error: SystemExit: x"),
        (raises_cancelled, "the tool raised CancelledError"),
    ],
)
def test_a_tool_that_misbehaves_is_an_error_that_the_model_reads(
    tmp_path: Path, tool: Any, told: str
) -> None:
    model = ScriptedModel(
        lambda m, t: (
            " ; ".join(results(m))
            if results(m)
            else calls(call(tool.__name__, text="x"), call("act", text="fine"))
        )
    )
    swarm = Swarm(model, tools=[tool, act], limits=Limits(tool_timeout_s=0.2), runs=tmp_path)
    result = swarm.run_sync("go")
    assert result.status == "done"
    assert told in result.output
    assert result.output.endswith(" ; fine")


def test_fifty_megabytes_of_a_tool_become_its_head_and_tail(tmp_path: Path) -> None:
    model = ScriptedModel(
        lambda m, t: results(m)[0] if results(m) else calls(call("huge", text="x"))
    )
    swarm = Swarm(model, tools=[huge], limits=Limits(max_tool_chars=1000), runs=tmp_path)
    result = swarm.run_sync("go")
    assert len(result.output) < 1100
    assert "49999000 characters are not shown" in result.output


def test_a_thread_that_hangs_does_not_hold_up_the_end_of_the_episode(tmp_path: Path) -> None:
    release = threading.Event()

    def stuck(text: str) -> str:
        release.wait(30)
        return text

    model = ScriptedModel(
        lambda m, t: results(m)[0] if results(m) else calls(call("stuck", text="x"))
    )

    async def run() -> Result[None]:
        swarm = Swarm(model, tools=[stuck], limits=Limits(tool_timeout_s=0.1), runs=tmp_path)
        try:
            return await swarm.run("go")
        finally:
            release.set()
            await swarm.aclose()

    started_s = time.perf_counter()
    assert "gave no result" in anyio.run(run).output
    assert time.perf_counter() - started_s < 10


def test_a_model_of_other_people_that_raises_anything_fails_its_agent_only(tmp_path: Path) -> None:
    def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        if messages[1].content == "3":
            raise ZeroDivisionError("oops")
        return "fine"

    result = Swarm(fan_out(10, sub), runs=tmp_path).run_sync("go")
    assert json.loads(result.output).count("fine") == 9
    assert "ZeroDivisionError: oops" in result.output


def test_fail_fast_ends_the_episode_with_the_first_lost_subagent(tmp_path: Path) -> None:
    async def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        if messages[1].content == "1":
            raise ModelError("the server is gone")
        await anyio.sleep(60)
        return ""
        return "late"

    result = Swarm(fan_out(5, sub), fail_fast=True, runs=tmp_path).run_sync("go")
    assert result.status == "failed"
    assert "the server is gone" in (result.error or "")
    assert [a.status for a in result.subagents].count("cancelled") == 4


def test_a_hook_sees_the_subagent_that_ended_a_fail_fast_episode(tmp_path: Path) -> None:
    lost: list[str] = []

    class Watch(Hooks):
        async def tool_call(self, agent: AgentInfo, call: ToolCall, proceed: Any) -> ToolOutput:
            try:
                return await proceed(call)
            except SubagentError as error:
                lost.append(error.agent_path)
                raise

    def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        raise ModelError("the server is gone")

    swarm = Swarm(fan_out(1, sub), fail_fast=True, hooks=[Watch()], runs=tmp_path)
    assert swarm.run_sync("go").status == "failed"
    assert lost == ["main/w.0"]
    assert issubclass(SubagentError, SwarmError)


def test_nothing_starts_after_a_cancel_and_the_record_says_how_each_agent_ended(
    tmp_path: Path,
) -> None:
    num_calls = 0

    async def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        nonlocal num_calls
        num_calls += 1
        await anyio.sleep(0.01)
        return calls(call("act", text="x"))

    async def run() -> int:
        swarm = Swarm(fan_out(10, sub), tools=[act], runs=tmp_path)
        with anyio.move_on_after(0.15):
            await swarm.run("go")
        at_cancel = num_calls
        await anyio.sleep(0.1)
        [episode] = swarm.open_ledger().episodes()
        statuses = {a.status for a in swarm.open_ledger().agents(episode.id)}
        await swarm.aclose()
        assert (episode.status, statuses) == ("cancelled", {"cancelled"})
        return num_calls - at_cancel

    assert anyio.run(run) == 0
    assert num_calls > 10


def test_excess_agents_queue_visibly_and_all_run(tmp_path: Path) -> None:
    events: list[Any] = []

    async def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        await anyio.sleep(0.005)
        return "ok"

    swarm = Swarm(fan_out(9, sub), max_parallel=2, runs=tmp_path)
    result = swarm.run_sync("go", on_event=events.append)
    assert result.max_parallel == 2
    assert json.loads(result.output) == ["ok"] * 9
    queued = [event.num_waiting for event in events if isinstance(event, AgentQueued)]
    assert queued == [1, 2, 3, 4, 5, 6, 7]


def test_depth_says_how_many_levels_of_subagents_there_are(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools):
            return f"leaf of {messages[1].content}"
        if results(messages):
            return results(messages)[-1]
        one = call("assign_task", agent="w", prompt=messages[1].content + "+")
        return calls(call("create_subagent", name="w", system_prompt="s"), one)

    for depth, output in ((0, "leaf of go"), (1, "leaf of go+"), (3, "leaf of go+++")):
        swarm = Swarm(ScriptedModel(policy), budget=Budget(depth=depth), runs=tmp_path)
        result = swarm.run_sync("go")
        assert result.output == output
        assert len(result.subagents) == depth
        assert result.critical_steps == 2 * depth + 1


def test_nested_subagents_cannot_wait_for_each_others_places_for_ever(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools) or results(messages):
            return "ok"
        made = [call("assign_task", agent="w", prompt=str(i)) for i in range(4)]
        return calls(call("create_subagent", name="w", system_prompt="s"), *made)

    swarm = Swarm(ScriptedModel(policy), budget=Budget(depth=2), max_parallel=2, runs=tmp_path)

    async def run() -> Result[None]:
        with anyio.fail_after(20):
            return await swarm.run("go")

    assert len(anyio.run(run).subagents) == 4 + 16


def test_an_orchestrator_out_of_budget_answers_with_what_it_was_told(tmp_path: Path) -> None:
    model = fan_out(3, lambda m, t: f"found {m[1].content}")
    result = Swarm(model, budget=Budget(main_steps=1), runs=tmp_path).run_sync("go")
    assert result.status == "out_of_budget"
    assert result.output.split("\n\n") == [f"main/w.{i}: found {i}" for i in range(3)]


def test_the_total_budget_spans_the_episodes_of_a_swarm(tmp_path: Path) -> None:
    async def run() -> list[str]:
        model = ScriptedModel(lambda m, t: "ok")
        async with Swarm(model, total_budget=Budget(steps=3), runs=tmp_path) as swarm:
            return [(await swarm.run("go")).status for _ in range(5)]

    assert anyio.run(run) == ["done"] * 3 + ["out_of_budget"] * 2


def test_cost_is_counted_and_limited_at_the_given_prices(tmp_path: Path) -> None:
    model = ScriptedModel(lambda m, t: "x" * 99)
    price = Price(input_usd=0.0, output_usd=10_000.0)
    result = Swarm(model, price=price, runs=tmp_path).run_sync("go")
    assert result.cost_usd == pytest.approx(100 * 10_000 / 1e6)
    cut = Swarm(model, price=price, budget=Budget(cost_usd=0.5), runs=tmp_path).run_sync("go")
    assert (cut.status, len(cut.output)) == ("truncated", 99)
    assert cut.cost_usd <= 0.5
    with pytest.raises(ConfigError, match="no price is given"):
        Swarm(model, budget=Budget(cost_usd=1.0))


# -- events --


async def collect(swarm: Swarm) -> list[Any]:
    async with swarm:
        return [event async for event in swarm.run_stream("go")]


def test_the_stream_tells_the_whole_tree_in_order_and_ends_with_the_result(tmp_path: Path) -> None:
    model = fan_out(2, lambda m, t: "ok")
    events = anyio.run(collect, Swarm(model, runs=tmp_path))
    assert isinstance(events[0], AgentStarted)
    assert isinstance(events[-1], Result)
    paths = {event.path for event in events if isinstance(event, AgentFinished)}
    assert paths == {"main", "main/w.0", "main/w.1"}
    first = [e for e in events if getattr(e, "path", "") == "main/w.0"]
    assert [type(e).__name__ for e in first] == [
        "AgentStarted",
        "StepStarted",
        "StepFinished",
        "AgentFinished",
    ]


def test_a_slow_consumer_loses_the_oldest_events_and_is_told_how_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swarm_module, "MAX_WAITING_EVENTS", 5)

    async def run() -> list[Any]:
        seen = []
        async with Swarm(fan_out(9, lambda m, t: "ok"), runs=tmp_path) as swarm:
            async for event in swarm.run_stream("go"):
                if not seen:
                    await anyio.sleep(0.3)
                seen.append(event)
        return seen

    seen = anyio.run(run)
    dropped = [event.count for event in seen if isinstance(event, EventsDropped)]
    assert sum(dropped) > 10
    assert isinstance(seen[-1], Result)


def test_a_consumer_that_leaves_cancels_the_episode(tmp_path: Path) -> None:
    async def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        await anyio.sleep(0.01)
        return calls(call("act", text="x"))

    async def run() -> str | None:
        swarm = Swarm(fan_out(3, sub), tools=[act], runs=tmp_path)
        async with aclosing(swarm.run_stream("go")) as events:
            async for event in events:
                if isinstance(event, ToolStarted) and event.path != "main":
                    break
        [episode] = swarm.open_ledger().episodes()
        await swarm.aclose()
        return episode.status

    assert anyio.run(run) == "cancelled"


# -- the record --


def test_a_full_disk_ends_the_episode_and_what_was_committed_can_be_read(tmp_path: Path) -> None:
    seen = 0

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        nonlocal seen
        seen += 1
        return calls(call("act", text="x" * 4000))

    async def run() -> None:
        swarm = Swarm(ScriptedModel(policy), tools=[act], runs=tmp_path)
        ledger = swarm.open_ledger()
        ledger._db.execute("PRAGMA max_page_count = 40")
        with pytest.raises(LedgerError, match="full"):
            await swarm.run("go")
        with pytest.raises(LedgerError, match="full"):
            await swarm.run("again")
        ledger._db.close()

    anyio.run(run)
    ledger = Ledger(tmp_path, readonly=True)
    [episode] = ledger.episodes()
    turns = [s for s in ledger.steps(episode.id) if s.kind == "sample"]
    assert 0 < len(turns) < seen
    ledger.close()


def test_a_truncated_ledger_is_said_in_one_sentence(tmp_path: Path) -> None:
    Swarm(ScriptedModel(lambda m, t: "ok"), runs=tmp_path).run_sync("go")
    path = tmp_path / "ledger.db"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LedgerError, match=r"ledger\.db.*(malformed|cannot be)"):
        list(Ledger(tmp_path, readonly=True).episodes())


def test_a_readonly_ledger_stops_the_run_before_any_model_call(tmp_path: Path) -> None:
    Swarm(ScriptedModel(lambda m, t: "ok"), runs=tmp_path).run_sync("go")
    asked = []
    swarm = Swarm(ScriptedModel(lambda m, t: asked.append(1) or "ok"), runs=tmp_path)
    ledger = swarm.open_ledger()
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written"):
        anyio.run(swarm.run, "go")
    assert asked == []
    ledger._db.close()


def test_durable_ledgers_wait_for_the_disk(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, durable=True)
    assert ledger._db.execute("PRAGMA synchronous").fetchone() == (2,)
    ledger.close()
    plain = Ledger(tmp_path)
    assert plain._db.execute("PRAGMA synchronous").fetchone() == (1,)
    plain.close()


def test_two_swarms_of_one_loop_write_to_one_ledger(tmp_path: Path) -> None:
    async def run() -> int:
        swarms = [Swarm(fan_out(5, lambda m, t: "ok"), runs=tmp_path) for _ in range(3)]
        async with anyio.create_task_group() as group:
            for swarm in swarms:
                group.start_soon(swarm.run, "go")
        for swarm in swarms:
            await swarm.aclose()
        return len(Ledger(tmp_path, readonly=True).episodes())

    assert anyio.run(run) == 3
    assert sqlite3.connect(tmp_path / "ledger.db").execute(
        "SELECT count(*) FROM steps WHERE kind = 'sample'"
    ).fetchone() == (3 * 7,)


def test_step_events_come_before_the_model_is_asked(tmp_path: Path) -> None:
    told: list[str] = []

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        told.append("asked")
        return "ok"

    Swarm(ScriptedModel(policy), runs=tmp_path).run_sync(
        "go", on_event=lambda e: told.append("started") if isinstance(e, StepStarted) else None
    )
    assert told == ["started", "asked"]
