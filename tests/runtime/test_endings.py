"""Ends that are easy to get wrong: what is told, recorded and left for another try."""

import asyncio
import json
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from swarm_sdk import Budget, ConfigError, LedgerError, Message, Role, Swarm, Task
from swarm_sdk.model_backend.pacing import Pace
from swarm_sdk.runtime.context import DiscardAll, HideToolResults
from swarm_sdk.runtime.environment import Environment, EnvTask
from swarm_sdk.runtime.replay import ReplayMismatch, read_replay
from swarm_sdk.runtime.state import Gate
from swarm_sdk.testing import ScriptedDialogue, ScriptedModel, call, calls
from swarm_sdk.traces.ledger import AgentRecord, EpisodeRecord, Ledger
from swarm_sdk.types import RunContext, Sampling, ToolSpec, Turn


def results(messages: Sequence[Message]) -> list[str]:
    return [m.content for m in messages if m.role == "tool"]


def is_main(tools: Sequence[ToolSpec]) -> bool:
    return any(tool.name == "assign_task" for tool in tools)


async def act(text: str) -> str:
    """Say it."""
    return text


def forget_the_end(runs: Path, *paths: str) -> str:
    """As if the process had been killed before these agents and the episode ended."""
    db = sqlite3.connect(runs / "ledger.db")
    db.execute("UPDATE episodes SET status = NULL")
    for path in paths:
        db.execute("UPDATE agents SET status = NULL WHERE path = ?", (path,))
    (episode_id,) = db.execute("SELECT id FROM episodes").fetchone()
    db.commit()
    db.close()
    return str(episode_id)


def test_a_resume_with_the_wrong_settings_leaves_the_episode_to_the_right_ones(
    tmp_path: Path,
) -> None:
    def swarm(instructions: str) -> Swarm:
        return Swarm(
            ScriptedModel(lambda m, t: "done" if results(m) else calls(call("act", text="x"))),
            tools=[act],
            instructions=instructions,
            runs=tmp_path,
        )

    swarm("right").run_sync("go")
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("DELETE FROM steps WHERE id > 1")
    db.commit()
    db.close()
    episode_id = forget_the_end(tmp_path, "main")
    with pytest.raises(ReplayMismatch):
        anyio.run(swarm("wrong").resume, episode_id)
    assert anyio.run(swarm("right").resume, episode_id).output == "done"


@pytest.mark.parametrize("strategy", [DiscardAll(700), HideToolResults(700)])
def test_no_call_id_names_two_calls_of_one_agent_after_a_context_was_begun_anew(
    tmp_path: Path, strategy: Any
) -> None:
    keys: list[str] = []

    async def note(context: RunContext[None], text: str) -> str:
        keys.append(context.idempotency_key)
        return text * 100

    num = 0

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        nonlocal num
        if not is_main(tools):
            return "x" * 200
        num += 1
        if num > 5:
            return "done"
        made = [call("note", text=f"{num}")]
        if num == 1:
            made = [call("create_subagent", name="w", system_prompt="s"), *made]
        return calls(*made, call("assign_task", agent="w", prompt=f"{num}"))

    swarm = Swarm(ScriptedModel(policy), tools=[note], context=strategy, runs=tmp_path)
    result = swarm.run_sync("go")
    assert result.status == "done"
    assert len(set(keys)) == 5
    assert len({agent.path for agent in result.subagents}) == 5
    ledger = Ledger(tmp_path, readonly=True)
    assert any("reset" in s.body for s in ledger.steps(result.episode_id))
    said = [s.body["call_id"] for s in ledger.steps(result.episode_id) if s.kind == "tool"]
    assert len(set(said)) == len(said) == 11
    ledger.close()


def test_the_time_between_two_processes_counts_for_nobody(tmp_path: Path) -> None:
    Swarm(ScriptedModel(lambda m, t: "done"), runs=tmp_path).run_sync("go")
    forget_the_end(tmp_path, "main")
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("UPDATE steps SET started_ns = started_ns + 9000000000000")
    db.execute("UPDATE steps SET ended_ns = started_ns + 2000000000")
    db.commit()
    db.close()
    ledger = Ledger(tmp_path)
    assert read_replay(ledger, ledger.episodes()[0].id).wall_s == pytest.approx(2.0)
    ledger.close()


def test_the_total_budget_counts_an_episode_once_that_is_resumed_in_its_own_process(
    tmp_path: Path,
) -> None:
    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if results(messages):
            return "done"
        return calls(call("slow"))

    is_slow = True

    async def slow() -> str:
        if is_slow:
            await anyio.sleep(60)
        return "ok"

    async def run() -> str:
        nonlocal is_slow
        swarm = Swarm(
            ScriptedModel(policy), tools=[slow], total_budget=Budget(steps=2), runs=tmp_path
        )
        with anyio.move_on_after(0.2):
            await swarm.run("go")
        is_slow = False
        [episode] = swarm.open_ledger().episodes()
        result = await swarm.resume(episode.id)
        await swarm.aclose()
        return result.status

    assert anyio.run(run) == "done"


def test_an_agent_that_had_ended_in_the_middle_of_a_call_does_not_make_it_again(
    tmp_path: Path,
) -> None:
    made: list[str] = []

    async def side() -> str:
        made.append("side")
        await anyio.sleep(60)
        return "ok"

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools):
            return calls(call("side"))
        if results(messages):
            return results(messages)[0]
        return calls(call("assign_task", agent="w", prompt="x"))

    def swarm() -> Swarm:
        role = Role(name="w", instructions="s", budget=Budget(wall_s=0.1))
        return Swarm(ScriptedModel(policy), tools=[side], roles=[role], runs=tmp_path)

    first = swarm().run_sync("go")
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("DELETE FROM steps WHERE id = (SELECT max(id) FROM steps)")
    db.commit()
    db.close()
    episode_id = forget_the_end(tmp_path, "main")
    resumed = anyio.run(swarm().resume, episode_id)
    assert resumed.output == first.output
    assert made == ["side"]
    assert resumed.subagents[0].status == "out_of_budget"


def test_an_assignment_that_was_refused_stays_refused(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        assert is_main(tools), "no sub-agent may live"
        if len(results(messages)) == 2:
            return results(messages)[1]
        made = [call("create_subagent", name="w", system_prompt="s")]
        return calls(*made, call("assign_task", agent="w", prompt="x"))

    def swarm(agents: int) -> Swarm:
        return Swarm(ScriptedModel(policy), budget=Budget(agents=agents), runs=tmp_path)

    first = swarm(0).run_sync("go")
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("DELETE FROM steps WHERE id = (SELECT max(id) FROM steps)")
    db.commit()
    db.close()
    resumed = anyio.run(swarm(5).resume, forget_the_end(tmp_path, "main"))
    assert resumed.output == first.output
    assert "budget of 0 agents" in resumed.output
    assert resumed.subagents == ()


def test_a_turn_that_a_closing_engine_cut_is_not_recorded_and_can_go_on(tmp_path: Path) -> None:
    class Closing(ScriptedModel):
        def dialogue(self, tools: Sequence[ToolSpec], **how: Any) -> Any:
            class Dialogue(ScriptedDialogue):
                async def sample(self, sampling: Sampling) -> Turn:
                    turn = await super().sample(sampling)
                    return replace(turn, generation=replace(turn.generation, finish_reason="abort"))

            return Dialogue(self, tools, **how)

    result = Swarm(Closing(lambda m, t: "half a"), runs=tmp_path).run_sync("go")
    assert (result.status, result.total_steps) == ("cancelled", 0)
    resumed = anyio.run(
        Swarm(ScriptedModel(lambda m, t: "whole"), runs=tmp_path).resume, result.episode_id
    )
    assert resumed.output == "whole"


def test_waiting_for_a_place_does_not_use_up_a_roles_time(tmp_path: Path) -> None:
    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        if not is_main(tools):
            await anyio.sleep(0.15)
            return "ok"
        if results(messages):
            return json.dumps(results(messages))
        return calls(*[call("assign_task", agent="w", prompt=str(i)) for i in range(4)])

    role = Role(name="w", instructions="s", budget=Budget(wall_s=0.4))
    swarm = Swarm(ScriptedModel(policy), roles=[role], max_parallel=1, runs=tmp_path)
    assert json.loads(swarm.run_sync("go").output) == ["ok"] * 4


def test_a_resource_that_cannot_be_closed_does_not_cost_the_answer(tmp_path: Path) -> None:
    @asynccontextmanager
    async def held() -> AsyncIterator[int]:
        yield 1
        raise OSError("cannot be closed")

    async def hold(context: RunContext[None]) -> str:
        await context.resources.get("it", held)
        return "held"

    model = ScriptedModel(lambda m, t: results(m)[0] if results(m) else calls(call("hold")))
    result = Swarm(model, tools=[hold], runs=tmp_path).run_sync("go")
    assert (result.status, result.output) == ("done", "held")
    assert "OSError: cannot be closed" in (result.error or "")


def test_text_that_utf8_cannot_hold_is_seen_with_a_question_mark(tmp_path: Path) -> None:
    async def names() -> str:
        return "caf\udce9.txt"

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        return results(messages)[0] if results(messages) else calls(call("names"))

    swarm = Swarm(ScriptedModel(policy), tools=[names], runs=tmp_path)
    assert swarm.run_sync("go").output == "caf?.txt"
    ledger = Ledger(tmp_path / "raw")
    ledger.begin_episode(
        EpisodeRecord(id="e", task={"prompt": "\udce9"}, model="m", settings={}, started_ns=1)
    )
    ledger.begin_agent(
        "e",
        AgentRecord(
            path="main",
            parent_path=None,
            parent_stage=None,
            name="main",
            model="m",
            prompt="\udce9",
            started_ns=1,
        ),
    )
    ledger.end_agent("e", "main", status="failed", output="", error="\udce9", ended_ns=2)
    assert ledger.agents("e")[0].error == "?"
    assert ledger.episodes()[0].task["prompt"] == "\udce9"
    ledger.close()


def test_a_finished_call_is_committed_before_its_slower_siblings_end(tmp_path: Path) -> None:
    at_quick: list[int] = []

    async def quick() -> str:
        return "ok"

    async def slow() -> str:
        await anyio.sleep(0.1)
        reader = Ledger(tmp_path, readonly=True)
        [episode] = reader.episodes()
        at_quick.append(sum(s.kind == "tool" for s in reader.steps(episode.id)))
        reader.close()
        return "ok"

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Any:
        return "done" if results(messages) else calls(call("quick"), call("slow"))

    Swarm(ScriptedModel(policy), tools=[quick, slow], runs=tmp_path).run_sync("go")
    assert at_quick == [1]


def test_who_waits_for_a_commit_waits_for_another_threads_too(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    ledger._write("INSERT INTO meta VALUES ('a', 'b')", ())
    thread = threading.Thread(target=ledger.flush)
    thread.start()
    while ledger._rows:  # until the thread has taken the row and waits for the other writer
        time.sleep(0.001)
    threading.Timer(0.1, lambda: other.execute("COMMIT")).start()
    anyio.run(ledger.committed)
    reader = sqlite3.connect(tmp_path / "ledger.db")
    assert reader.execute("SELECT 1 FROM meta WHERE key = 'a'").fetchone()
    thread.join()
    for connection in (reader, other, ledger):
        connection.close()


def test_cancelled_calls_leave_the_queue_of_a_paced_server_as_cancelled() -> None:
    async def main() -> list[str]:
        pace = Pace(first_limit=2)
        ends: list[str] = []

        async def one() -> None:
            try:
                await pace.enter()
                try:
                    await anyio.sleep(10)
                finally:
                    pace.leave()
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise
            except Exception as error:  # noqa: BLE001 - what must not happen
                ends.append(repr(error))

        with anyio.move_on_after(0.05):
            async with anyio.create_task_group() as group:
                for _ in range(20):
                    group.start_soon(one)
        assert (pace.num_in_flight, pace.num_waiting) == (0, 0)
        return ends

    assert set(anyio.run(main)) == {"cancelled"}


def test_two_who_pause_at_once_are_both_told_when_all_is_still() -> None:
    async def main() -> None:
        gate = Gate()
        gate.num_inside = 1
        with anyio.fail_after(2):
            async with anyio.create_task_group() as group:
                group.start_soon(gate.close)
                group.start_soon(gate.close)
                await anyio.sleep(0.01)
                gate.leave()

    anyio.run(main)


class Endless(Environment):
    name = "endless"

    def tasks(self) -> Any:
        index = 0
        while True:
            yield EnvTask(str(index), Task("go"))
            index += 1

    async def judge(self, task: EnvTask, result: Any, rollouts: Any) -> Any:
        return {"reward": 1.0}


def test_who_does_not_take_rollouts_gets_no_further_ones_made(tmp_path: Path) -> None:
    num_run = 0

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        nonlocal num_run
        num_run += 1
        return "ok"

    async def run() -> None:
        async with Swarm(ScriptedModel(policy), runs=tmp_path) as swarm:
            manager = swarm.rollouts(max_episodes=2)
            async with aclosing(manager.run(Endless())) as rollouts:
                async for _ in rollouts:
                    await anyio.sleep(0.2)
                    break

    anyio.run(run)
    assert num_run <= 4


def test_a_consumer_may_put_a_time_limit_around_each_event(tmp_path: Path) -> None:
    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        await anyio.sleep(0.01)
        return "ok"

    async def run() -> int:
        async with Swarm(ScriptedModel(policy), runs=tmp_path) as swarm:
            events = swarm.run_stream("go")
            num_events = 0
            while True:
                with anyio.fail_after(5):
                    try:
                        await anext(events)
                    except StopAsyncIteration:
                        return num_events
                num_events += 1

    assert anyio.run(run) == 5


def test_what_ends_a_streamed_episode_reaches_its_consumer(tmp_path: Path) -> None:
    async def run(swarm: Swarm, task: str) -> None:
        async for _ in swarm.run_stream(task):
            await anyio.sleep(0.05)

    model = ScriptedModel(lambda m, t: "ok")
    with pytest.raises(ConfigError, match="the task is empty"):
        anyio.run(run, Swarm(model, runs=tmp_path), " ")
    broken = Swarm(model, runs=tmp_path)
    ledger = broken.open_ledger()
    ledger._db.execute("PRAGMA query_only = ON")
    with pytest.raises(LedgerError, match="cannot be written"):
        anyio.run(run, broken, "go")
    ledger._db.close()


def test_a_run_directory_may_have_any_name(tmp_path: Path) -> None:
    runs = tmp_path / "what? 100% #1"
    Swarm(ScriptedModel(lambda m, t: "ok"), runs=runs).run_sync("go")
    assert (runs / "ledger.db").is_file()


def test_nothing_starts_after_a_cancellation_that_tools_of_subagents_keep_to_themselves(
    tmp_path: Path,
) -> None:
    started: list[str] = []
    is_cancelled = False

    async def stubborn(text: str) -> str:
        """Go on, whatever happens."""
        started.append("late tool" if is_cancelled else "tool")
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            return text
        return text

    def say(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        started.append("late model" if is_cancelled else "model")
        if is_main(tools) and not results(messages):
            assign = [call("assign_task", agent="worker", prompt=str(i)) for i in range(3)]
            return calls(call("create_subagent", name="worker", system_prompt="x"), *assign)
        return calls(call("stubborn", text="x"))

    async def main() -> None:
        nonlocal is_cancelled
        async with Swarm(ScriptedModel(say), tools=[stubborn], runs=tmp_path) as swarm:
            run = asyncio.create_task(swarm.run("go"))
            while started.count("tool") < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            is_cancelled = True
            run.cancel()
            with pytest.raises(asyncio.CancelledError):
                await run

    anyio.run(main)
    assert started == ["model"] * 4 + ["tool"] * 3
