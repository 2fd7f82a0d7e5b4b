"""Resume: an episode goes on from its last commit, wherever it was cut off."""

import json
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from swarm_sdk import Budget, ConfigError, Message, ModelError, Swarm
from swarm_sdk.errors import EpisodeBusy, LedgerError
from swarm_sdk.runtime.context import DiscardAll
from swarm_sdk.runtime.events import StepFinished, ToolFinished
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import RunContext, ToolSpec


class World:
    """A scripted swarm whose model and tool count what they are asked, and can be cut off."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.asked: list[str] = []
        self.noted: list[tuple[str, bool]] = []
        self.calls_left = 10**9

    def policy(self, messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        self.calls_left -= 1
        if self.calls_left < 0:
            raise SystemExit("cut off")
        results = [m for m in messages if m.role == "tool"]
        self.asked.append(f"{messages[1].content}#{len(messages)}")
        if any(tool.name == "assign_task" for tool in tools):
            if not results:
                made = [call("assign_task", agent="w", prompt=f"t{i}") for i in range(3)]
                return calls(call("create_subagent", name="w", system_prompt="s"), *made)
            return " | ".join(m.content for m in results[1:])
        if len(results) < 2:
            return calls(call("note", text=f"{messages[1].content}.{len(results)}"))
        return f"noted {messages[1].content}"

    def swarm(self, **settings: object) -> Swarm:
        async def note(context: RunContext, text: str) -> str:
            self.noted.append((context.idempotency_key.partition("/")[2], context.is_retry))
            return f"ok {text}"

        return Swarm(ScriptedModel(self.policy), tools=[note], runs=self.runs, **settings)


FULL = "noted t0 | noted t1 | noted t2"


def cut_after(runs: Path, num_rows: int) -> str:
    """Forget all but the first steps of the record, as if the process had been killed there."""
    db = sqlite3.connect(runs / "ledger.db")
    kept = [row[0] for row in db.execute("SELECT id FROM steps ORDER BY id LIMIT ?", (num_rows,))]
    db.execute(f"DELETE FROM steps WHERE id > {kept[-1] if kept else 0}")
    db.execute("UPDATE episodes SET status = NULL, ended_ns = NULL, output = NULL")
    alive = {
        path
        for path, num in db.execute("SELECT agent_path, count(*) FROM steps GROUP BY agent_path")
        if path != "main" and num < 5
    }
    db.execute("UPDATE agents SET status = NULL WHERE path = 'main'")
    for path in alive:
        db.execute("UPDATE agents SET status = NULL WHERE path = ?", (path,))
    seen = {row[0] for row in db.execute("SELECT agent_path FROM steps")}
    for (path,) in db.execute("SELECT path FROM agents").fetchall():
        if path not in seen:
            db.execute("DELETE FROM agents WHERE path = ?", (path,))
    (episode_id,) = db.execute("SELECT id FROM episodes").fetchone()
    db.commit()
    db.close()
    return str(episode_id)


NUM_ROWS = 2 + 4 + 3 * 5
"""Turns and tool results of the full episode."""


@pytest.mark.parametrize("num_rows", range(NUM_ROWS + 1))
def test_a_record_cut_anywhere_is_finished_without_asking_or_doing_anything_again(
    tmp_path: Path, num_rows: int
) -> None:
    first = World(tmp_path)
    whole = first.swarm().run_sync("go")
    assert whole.output == FULL
    episode_id = cut_after(tmp_path, num_rows)
    ledger = Ledger(tmp_path, readonly=True)
    steps = list(ledger.steps(episode_id))
    ledger.close()
    num_turns = sum(step.kind == "sample" for step in steps)
    num_noted = sum(step.kind == "tool" and step.body["name"] == "note" for step in steps)

    second = World(tmp_path)
    events: list[object] = []

    async def resume() -> object:
        async with second.swarm() as swarm:
            return await swarm.resume(episode_id, on_event=events.append)

    result = anyio.run(resume)
    assert result.output == FULL
    assert result.total_steps == whole.total_steps
    assert result.critical_steps == whole.critical_steps
    assert [agent.path for agent in result.agents] == [agent.path for agent in whole.agents]
    assert len(second.asked) == len(first.asked) - num_turns
    assert len(second.noted) == 6 - num_noted
    replayed = [e for e in events if isinstance(e, StepFinished) and e.is_replayed]
    assert len(replayed) == num_turns
    told = [e for e in events if isinstance(e, ToolFinished)]
    assert len(told) == 4 + 6
    after = Ledger(tmp_path, readonly=True)
    assert len(list(after.steps(episode_id))) == NUM_ROWS
    assert after.episode(episode_id).status == "done"
    assert len(branches(after, episode_id)) == 4
    after.close()


def test_a_call_that_may_have_been_running_is_made_again_as_a_retry_with_the_same_key(
    tmp_path: Path,
) -> None:
    first = World(tmp_path)
    first.swarm().run_sync("go")
    assert not any(is_retry for _, is_retry in first.noted)
    ledger = Ledger(tmp_path, readonly=True)
    ids = [step.id for step in ledger.steps(ledger.episodes()[0].id) if step.kind == "sample"]
    ledger.close()
    episode_id = cut_after(tmp_path, ids[2])  # main's turn, two sub-agents' first turns

    second = World(tmp_path)

    async def resume() -> None:
        async with second.swarm() as swarm:
            await swarm.resume(episode_id)

    anyio.run(resume)
    retried = {key for key, is_retry in second.noted if is_retry}
    assert len(retried) == 2
    assert retried <= {key for key, _ in first.noted}
    assert sum(not is_retry for _, is_retry in second.noted) == 4


def test_a_cancelled_episode_can_go_on(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def run() -> str:
        swarm = world.swarm()
        with anyio.CancelScope() as scope:
            await swarm.run(
                "go",
                on_event=lambda e: scope.cancel() if isinstance(e, ToolFinished) else None,
            )
        asked_before = len(world.asked)
        ledger = swarm.open_ledger()
        [episode] = ledger.episodes()
        assert episode.status == "cancelled"
        result = await swarm.resume(episode.id)
        assert asked_before < len(world.asked)
        await swarm.aclose()
        return result.output

    assert anyio.run(run) == FULL


def test_budgets_count_what_was_used_before(tmp_path: Path) -> None:
    World(tmp_path).swarm().run_sync("go")
    episode_id = cut_after(tmp_path, 9)

    async def resume() -> object:
        async with World(tmp_path).swarm(budget=Budget(steps=7)) as swarm:
            return await swarm.resume(episode_id)

    result = anyio.run(resume)
    assert result.total_steps == 7
    assert result.status == "out_of_budget"


def test_an_episode_that_has_ended_has_nothing_to_resume(tmp_path: Path) -> None:
    world = World(tmp_path)
    result = world.swarm().run_sync("go")
    with pytest.raises(ConfigError, match=r"has ended \(done\)"):
        anyio.run(world.swarm().resume, result.episode_id)
    with pytest.raises(LedgerError, match="no episode begins"):
        anyio.run(world.swarm().resume, "nothing")


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"instructions": "other"}, "prompt of main#0 differs"),
        ({"seed": 3}, "with seed None"),
    ],
)
def test_a_swarm_made_otherwise_is_refused_and_the_record_stays(
    tmp_path: Path, settings: dict[str, object], told: str
) -> None:
    world = World(tmp_path)
    world.swarm().run_sync("go")
    episode_id = cut_after(tmp_path, 5)

    async def resume(**how: object) -> object:
        async with world.swarm(**how) as swarm:
            return await swarm.resume(episode_id)

    with pytest.raises(ConfigError, match=told):
        anyio.run(lambda: resume(**settings))


def test_one_process_resumes_an_episode_and_the_other_is_told(tmp_path: Path) -> None:
    World(tmp_path).swarm().run_sync("go")
    episode_id = cut_after(tmp_path, 5)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                from swarm_sdk.traces.ledger import Ledger
                ledger = Ledger({str(tmp_path)!r})
                ledger.claim({episode_id!r})
                print("held", flush=True)
                input()
                """
            ),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"

    async def resume() -> object:
        async with World(tmp_path).swarm() as swarm:
            return await swarm.resume(episode_id)

    with pytest.raises(EpisodeBusy, match="another process"):
        anyio.run(resume)
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    assert anyio.run(resume).output == FULL


def test_a_context_that_was_begun_anew_is_made_again_from_the_record(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        del tools
        policy.num += 1
        if policy.num == 6:
            raise ModelError("the server is gone")
        return calls(call("note", text="x" * 300)) if policy.num < 8 else "done"

    policy.num = 0

    async def note(text: str) -> str:
        return text

    def swarm() -> Swarm:
        return Swarm(ScriptedModel(policy), tools=[note], runs=tmp_path, context=DiscardAll(1500))

    result = swarm().run_sync("go")
    assert result.status == "failed"
    db = sqlite3.connect(tmp_path / "ledger.db")
    db.execute("UPDATE episodes SET status = NULL")
    db.execute("UPDATE agents SET status = NULL")
    db.commit()
    db.close()

    async def resume() -> object:
        async with swarm() as again:
            return await again.resume(result.episode_id)

    assert anyio.run(resume).status == "done"
    ledger = Ledger(tmp_path, readonly=True)
    found = branches(ledger, result.episode_id)
    resets = [s.body["reset"] for s in ledger.steps(result.episode_id) if "reset" in s.body]
    assert len(found) == 1 + len(resets) > 1
    assert resets[0]["strategy"] == "discard_all"
    ledger.close()


def test_a_resumed_episode_of_the_command_line_needs_its_launch_record(tmp_path: Path) -> None:
    World(tmp_path / ".swarm").swarm().run_sync("go")
    episode_id = cut_after(tmp_path / ".swarm", 5)
    done = subprocess.run(
        [sys.executable, "-c", "from swarm_sdk.cli import main; main()", "resume", episode_id],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Swarm.resume in the program" in done.stderr
    assert json.loads(json.dumps(done.stdout)) == ""
