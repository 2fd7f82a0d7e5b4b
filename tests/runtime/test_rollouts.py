"""Rollouts: many episodes with bounds, judged; pause, abort, sub-rollouts, policy versions."""

import itertools
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest

from swarm_sdk import ConfigError, Message, RolloutManager, Swarm, Task
from swarm_sdk.runtime import environment as registry
from swarm_sdk.runtime.environment import (
    Environment,
    EnvTask,
    Rollout,
    SubRollouts,
    environment,
    register_environment,
)
from swarm_sdk.testing import ScriptedDialogue, ScriptedModel, call, calls
from swarm_sdk.tools.function import FunctionTool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import Sampling, Tool, ToolSpec, Turn


class Sums(Environment):
    """Adds two numbers with a tool of its own."""

    name = "sums"

    def __init__(self, num_tasks: int = 20) -> None:
        self.num_tasks = num_tasks
        self.num_open = self.most_open = 0

    def tasks(self) -> Iterator[EnvTask]:
        for index in range(self.num_tasks):
            yield EnvTask(str(index), Task(f"{index} 1"), {"answer": str(index + 1)})

    @asynccontextmanager
    async def toolset(self, task: EnvTask) -> AsyncIterator[Sequence[Tool]]:
        async def add(a: int, b: int) -> int:
            await anyio.sleep(0.001)
            return a + b

        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        yield [FunctionTool(add)]
        self.num_open -= 1

    async def judge(self, task: EnvTask, result: Any, rollouts: SubRollouts) -> Mapping[str, float]:
        if task.id == "7":
            raise ZeroDivisionError("no judgement")
        return {"reward": float(result.output == task.facts["answer"]), "length": 1.0}


def adder() -> ScriptedModel:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if messages[-1].role == "tool":
            return messages[-1].content
        a, b = messages[-1].content.split()
        return calls(call("add", a=int(a), b=int(b)))

    return ScriptedModel(policy)


async def collect(
    swarm: Swarm, env: Environment, *, max_episodes: int = 4, **how: Any
) -> list[Rollout]:
    async with swarm:
        manager = swarm.rollouts(max_episodes=max_episodes)
        return [rollout async for rollout in manager.run(env, **how)]


def test_every_sample_of_every_task_is_run_within_the_bound_and_judged(tmp_path: Path) -> None:
    env = Sums()

    async def run() -> list[Rollout]:
        return await collect(Swarm(adder(), runs=tmp_path), env, samples_per_task=3)

    found = anyio.run(run)
    assert {(r.task.id, r.sample) for r in found} == set(
        itertools.product(map(str, range(20)), range(3))
    )
    assert all(r.reward == 1.0 for r in found if r.task.id != "7")
    assert {r.error for r in found if r.task.id == "7"} == {"ZeroDivisionError: no judgement"}
    assert env.most_open == 4
    assert env.num_open == 0
    ledger = Ledger(tmp_path, readonly=True)
    launches = [e.settings["launch"] for e in ledger.episodes()]
    assert {"environment": "sums", "task": "3", "sample": 2} in launches
    assert len(launches) == 60
    ledger.close()


def test_an_endless_stream_of_tasks_is_taken_as_places_come_free(tmp_path: Path) -> None:
    taken = 0

    def endless() -> Iterator[EnvTask]:
        nonlocal taken
        for index in itertools.count(100):
            taken += 1
            yield EnvTask(str(index), Task(f"{index} 1"), {"answer": str(index + 1)})

    async def run() -> int:
        async with Swarm(adder(), runs=tmp_path) as swarm:
            found = 0
            async with aclosing(swarm.rollouts(max_episodes=3).run(Sums(), endless())) as rollouts:
                async for _ in rollouts:
                    found += 1
                    if found == 10:
                        break
            return found

    assert anyio.run(run) == 10
    assert taken < 25


class Versioned:
    """A model whose turns carry the version of the weights at the time."""

    def __init__(self) -> None:
        self.version = 0
        self.num_running = 0
        self.inner = ScriptedModel(
            lambda m, t: (
                "done" if sum(x.role == "assistant" for x in m) == 4 else calls(call("wait"))
            )
        )
        self.name, self.is_replayable = "versioned", True

    def dialogue(self, tools: Sequence[ToolSpec], *, first_call_index: int = 0) -> Any:
        model = self

        class Dialogue(ScriptedDialogue):
            async def sample(self, sampling: Sampling) -> Turn:
                model.num_running += 1
                await anyio.sleep(0.02)
                turn = await super().sample(sampling)
                model.num_running -= 1
                generation = replace(turn.generation, weight_version=model.version)
                return replace(turn, generation=generation)

        return Dialogue(self.inner, tools, first_call_index)

    async def aclose(self) -> None:
        pass


class Waits(Environment):
    name = "waits"

    def tasks(self) -> Iterator[EnvTask]:
        for index in range(6):
            yield EnvTask(str(index), Task("go"))

    async def judge(self, task: EnvTask, result: Any, rollouts: SubRollouts) -> Any:
        return {"reward": 1.0}


def test_paused_episodes_survive_new_weights_and_each_token_keeps_its_version(
    tmp_path: Path,
) -> None:
    model = Versioned()

    async def wait() -> str:
        await anyio.sleep(0.001)
        return "ok"

    async def run() -> list[Rollout]:
        found: list[Rollout] = []
        async with Swarm(model, tools=[wait], runs=tmp_path) as swarm:
            manager: RolloutManager = swarm.rollouts(max_episodes=6)

            async def consume() -> None:
                async for rollout in manager.run(Waits()):
                    found.append(rollout)  # noqa: PERF401 - read while it grows

            async with anyio.create_task_group() as group:
                group.start_soon(consume)
                await anyio.sleep(0.05)
                await manager.pause()
                assert model.num_running == 0
                await anyio.sleep(0.02)  # tools that were running end
                assert manager.num_running > 0
                num_found = len(found)
                model.version = 1
                await anyio.sleep(0.03)
                assert model.num_running == 0
                assert len(found) == num_found
                manager.resume()
        return found

    found = anyio.run(run)
    assert [r.result.status for r in found if r.result] == ["done"] * 6
    ledger = Ledger(tmp_path, readonly=True)
    versions = [
        [s.weight_version for s in ledger.steps(r.result.episode_id) if s.kind == "sample"]
        for r in found
        if r.result
    ]
    assert all(one == sorted(one) for one in versions)
    assert any(set(one) == {0, 1} for one in versions)
    ledger.close()


def test_one_episode_can_be_aborted_and_the_others_go_on(tmp_path: Path) -> None:
    async def wait() -> str:
        await anyio.sleep(0.01)
        return "ok"

    async def run() -> list[Rollout]:
        async with Swarm(Versioned(), tools=[wait], runs=tmp_path) as swarm:
            manager = swarm.rollouts(max_episodes=6)

            async def abort() -> None:
                await anyio.sleep(0.05)
                manager.abort("3")

            async with anyio.create_task_group() as group:
                group.start_soon(abort)
                return [rollout async for rollout in manager.run(Waits())]

    found = anyio.run(run)
    assert {r.task.id: r.error for r in found if r.error} == {"3": "the rollout was aborted"}
    assert len(found) == 6
    ledger = Ledger(tmp_path, readonly=True)
    assert sorted(e.status or "" for e in ledger.episodes()) == ["cancelled"] + ["done"] * 5
    ledger.close()


def test_a_judge_may_run_episodes_of_its_own_without_a_place(tmp_path: Path) -> None:
    class Judged(Sums):
        async def judge(self, task: EnvTask, result: Any, rollouts: SubRollouts) -> Any:
            if task.id.startswith("judge"):
                return {"reward": 1.0}
            inner = await rollouts.rollout(self, EnvTask(f"judge {task.id}", task.task))
            assert inner.result
            return {"reward": float(inner.result.output == result.output)}

    async def run() -> list[Rollout]:
        with anyio.fail_after(20):
            return await collect(Swarm(adder(), runs=tmp_path), Judged(5), max_episodes=1)

    assert [r.reward for r in anyio.run(run)] == [1.0] * 5


def test_environments_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    register_environment("sums", Sums)
    register_environment("sums", Sums)
    assert isinstance(environment("sums"), Sums)
    with pytest.raises(ConfigError, match="registered already"):
        register_environment("sums", Waits)
    with pytest.raises(ConfigError, match="no environment 'other'; known are: sums"):
        environment("other")


def test_bounds_below_one_are_refused(tmp_path: Path) -> None:
    async def run() -> None:
        async with Swarm(adder(), runs=tmp_path) as swarm:
            with pytest.raises(ConfigError, match="max_episodes"):
                swarm.rollouts(max_episodes=0)
            with pytest.raises(ConfigError, match="samples_per_task"):
                async for _ in swarm.rollouts().run(Sums(), samples_per_task=0):
                    pass

    anyio.run(run)


def test_what_a_rollout_is_worth_is_on_record_and_episodes_have_seeds_of_their_own(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        async with Swarm(adder(), runs=tmp_path, seed=3) as swarm:
            async for _ in swarm.rollouts().run(Sums(2), samples_per_task=2):
                pass

    anyio.run(main)
    records = Ledger(tmp_path, readonly=True).episodes()
    assert all(r.summary["rewards"] == {"reward": 1.0, "length": 1.0} for r in records)
    assert len({record.settings["seed"] for record in records}) == 4
    assert {r.settings["sampling"]["top_p"] for r in records} == {0.95}
    assert [r.id for r in Ledger(tmp_path).episodes([records[1].id, "none"])] == [records[1].id]


def test_created_sub_agents_run_on_a_model_of_their_own_where_one_is_given(tmp_path: Path) -> None:
    def main_policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if any(message.role == "tool" for message in messages):
            return messages[-1].content
        return calls(
            call("create_subagent", name="a", system_prompt="You help."),
            call("assign_task", agent="a", prompt="help"),
        )

    frozen = ScriptedModel(lambda messages, tools: "from the frozen one", name="frozen")
    swarm = Swarm(ScriptedModel(main_policy, name="policy"), subagent_model=frozen, runs=tmp_path)
    result = swarm.run_sync("go")
    assert result.output == "from the frozen one"
    agents = Ledger(tmp_path, readonly=True).agents(result.episode_id)
    assert {agent.path: agent.model for agent in agents} == {"main": "policy", "main/a.0": "frozen"}
