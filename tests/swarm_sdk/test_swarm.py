"""Episodes from prompt to result, with scripted models and real tools, ledger and graph."""

import json
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from swarm_sdk import Budget, ConfigError, Message, ModelError, Role, Swarm, ToolError
from swarm_sdk.runtime.episode import Result
from swarm_sdk.runtime.events import AgentFinished, AgentStarted
from swarm_sdk.runtime.stage_graph import read_stage_graph
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import Generation, Sampling, ToolSpec, Turn


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def fail(why: str) -> str:
    """Fail."""
    raise ValueError(why)


def delegating(num_subagents: int = 3) -> ScriptedModel:
    """Main: create and assign, then join the reports; sub-agents: one call of add, then report."""

    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        is_main = any(tool.name == "assign_task" for tool in tools)
        results = [m for m in messages if m.role == "tool"]
        if is_main and not results:
            made = [call("create_subagent", name="adder", system_prompt="You add.")]
            made += [
                call("assign_task", agent="adder", prompt=f"{i}") for i in range(num_subagents)
            ]
            return calls(*made)
        if is_main:
            return " ".join(m.content for m in results[1:])
        if not results:
            return calls(call("add", a=int(messages[-1].content), b=10))
        return results[0].content

    return ScriptedModel(policy)


def run(swarm: Swarm, task: str = "go") -> Result:
    return swarm.run_sync(task)


def test_an_orchestrator_creates_subagents_and_joins_what_they_report(tmp_path: Path) -> None:
    result = run(Swarm(delegating(), tools=[add], runs=tmp_path))
    assert result.output == "10 11 12"
    assert result.status == "done"
    assert result.created == ("adder",)
    assert [a.path for a in result.agents] == [
        "main",
        "main/adder.0",
        "main/adder.1",
        "main/adder.2",
    ]
    assert result.total_steps == 2 + 3 * 2
    assert result.critical_steps == 2 + 2
    assert result.max_parallel == 3


def test_the_ledger_gives_back_the_sampled_ids_and_the_graph_of_the_run(tmp_path: Path) -> None:
    sampled: list[tuple[int, ...]] = []
    model = delegating()
    open_dialogue = model.dialogue

    class Spy:
        def __init__(self, inner: object) -> None:
            self.inner = inner
            self.observe = inner.observe
            self.num_prompt_tokens = 0

        async def sample(self, sampling: Sampling) -> Turn:
            turn = await self.inner.sample(sampling)
            sampled.append(turn.generation.token_ids)
            return turn

    model.dialogue = lambda tools, **how: Spy(open_dialogue(tools, **how))
    result = run(Swarm(model, tools=[add], runs=tmp_path))
    ledger = Ledger(tmp_path, readonly=True)
    kept = [s.token_ids for s in ledger.steps(result.episode_id) if s.kind == "sample"]
    assert sorted(kept) == sorted(sampled)
    graph = read_stage_graph(ledger, result.episode_id)
    assert graph.critical_steps() == result.critical_steps
    assert graph.total_steps == result.total_steps
    main = branches(ledger, result.episode_id)[0]
    is_end = [i for i, token in enumerate(main.token_ids) if token == 256]
    assert main.is_sampled[is_end[-1]]
    assert not main.is_sampled[0]
    dialogue = ledger.messages(result.episode_id, "main/adder.1")
    assert [(m.role, m.content) for m in dialogue] == [
        ("system", "You add."),
        ("user", "1"),
        ("assistant", ""),
        ("tool", "11"),
        ("assistant", "11"),
    ]


def test_one_failing_child_is_a_typed_result_and_its_siblings_go_on(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if any(tool.name == "assign_task" for tool in tools):
            results = [m.content for m in messages if m.role == "tool"]
            if results:
                return json.dumps(results[1:])
            made = [call("assign_task", agent="adder", prompt=f"{i}") for i in range(10)]
            return calls(call("create_subagent", name="adder", system_prompt=""), *made)
        if messages[-1].content == "4":
            raise ModelError("the server is gone")
        return f"fine {messages[-1].content}"

    result = run(Swarm(ScriptedModel(policy), runs=tmp_path))
    reports = json.loads(result.output)
    assert [r for r in reports if r.startswith("fine")] == [
        f"fine {i}" for i in range(10) if i != 4
    ]
    assert reports[4].startswith("error: the sub-agent 'adder' failed: the server is gone")
    assert result.status == "done"
    assert result.num_failed == 1


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (call("assign_task", agent="nobody", prompt="x"), "no sub-agent named 'nobody'"),
        (call("assign_task", agent="nobody"), "argument 'prompt' must be given"),
        (call("nothing", x=1), "there is no tool 'nothing'"),
        (call("fail", why="broken"), "ValueError: broken"),
        (call("add", a="x", b=1), "a"),
        (call("create_subagent", name="", system_prompt=""), "must not be empty"),
    ],
)
def test_a_bad_call_becomes_an_error_that_the_model_reads(
    tmp_path: Path, made: object, told: str
) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        results = [m for m in messages if m.role == "tool"]
        return results[0].content if results else calls(made)

    result = run(Swarm(ScriptedModel(policy), tools=[add, fail], runs=tmp_path))
    assert result.output.startswith("error: ")
    assert told in result.output


def test_a_subagent_cannot_be_created_twice_under_one_name(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        results = [m for m in messages if m.role == "tool"]
        one = call("create_subagent", name="a", system_prompt="")
        return results[1].content if results else calls(one, one)

    result = run(Swarm(ScriptedModel(policy), runs=tmp_path))
    assert "exists already" in result.output


@pytest.mark.parametrize(
    ("budget", "limit"),
    [
        (Budget(steps=3), "steps"),
        (Budget(critical_steps=2), "critical steps"),
        (Budget(main_steps=1), "steps of one agent"),
        (Budget(tokens=0), "tokens"),
    ],
)
def test_what_is_out_of_budget_ends_typed_and_on_record(
    tmp_path: Path, budget: Budget, limit: str
) -> None:
    result = run(Swarm(delegating(), tools=[add], budget=budget, runs=tmp_path))
    assert result.status == "out_of_budget"
    assert limit in (result.error or "")
    if budget.steps is not None:
        assert result.total_steps <= budget.steps
    if budget.critical_steps is not None:
        assert result.critical_steps <= budget.critical_steps
    record = Ledger(tmp_path, readonly=True).episode(result.episode_id)
    assert record.status == "out_of_budget"


def test_the_agents_limit_turns_further_assignments_away(tmp_path: Path) -> None:
    result = run(Swarm(delegating(5), tools=[add], budget=Budget(agents=2), runs=tmp_path))
    assert len(result.subagents) == 2
    assert result.output.count("error: the budget of 2 agents") == 3


def test_wall_time_ends_all_agents_and_says_so(tmp_path: Path) -> None:
    started: list[str] = []

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if any(tool.name == "assign_task" for tool in tools):
            one = call("assign_task", agent="a", prompt="x")
            return calls(call("create_subagent", name="a", system_prompt=""), one, one)
        started.append("sub")
        await anyio.sleep(60)
        return "never"

    swarm = Swarm(ScriptedModel(policy), budget=Budget(wall_s=0.3), runs=tmp_path)
    result = run(swarm)
    assert started == ["sub", "sub"]
    assert result.status == "out_of_budget"
    assert result.wall_s < 10
    assert {a.status for a in result.subagents} == {"cancelled"}


def test_max_parallel_bounds_how_many_subagents_live_at_once(tmp_path: Path) -> None:
    result = run(Swarm(delegating(9), tools=[add], max_parallel=2, runs=tmp_path))
    assert result.max_parallel == 2
    assert len(result.subagents) == 9
    assert result.critical_steps == 4


def test_roles_of_the_app_stand_ready_with_their_own_model_and_tools(tmp_path: Path) -> None:
    def sub(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        return f"{messages[0].content} {[t.name for t in tools]}"

    def main(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if messages[-1].role == "tool":
            return messages[-1].content
        assert "- checker: checks" in messages[0].content
        return calls(call("assign_task", agent="checker", prompt="x"))

    role = Role(
        name="checker",
        instructions="You check.",
        description="checks",
        tools=[],
        model=ScriptedModel(sub),
    )
    result = run(Swarm(ScriptedModel(main), tools=[add], roles=[role], runs=tmp_path))
    assert result.output == "You check. []"


def test_events_of_the_whole_tree_arrive_in_order_and_then_the_result(tmp_path: Path) -> None:
    async def collect() -> list[object]:
        swarm = Swarm(delegating(), tools=[add], runs=tmp_path)
        events = [event async for event in swarm.run_stream("go")]
        await swarm.aclose()
        return events

    events = anyio.run(collect)
    assert isinstance(events[-1], Result)
    starts = [e.path for e in events if isinstance(e, AgentStarted)]
    ends = [e.path for e in events if isinstance(e, AgentFinished)]
    assert starts == ["main", "main/adder.0", "main/adder.1", "main/adder.2"]
    assert ends[-1] == "main"
    assert sorted(ends) == sorted(starts)


def test_cancelling_a_run_leaves_no_call_running_and_is_on_record(tmp_path: Path) -> None:
    calls_after: list[str] = []

    async def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        try:
            await anyio.sleep(60)
        finally:
            calls_after.append("ended")
        return "never"

    async def cancel() -> None:
        swarm = Swarm(ScriptedModel(policy), runs=tmp_path)
        with anyio.move_on_after(0.2):
            await swarm.run("go")
        assert calls_after == ["ended"]
        await swarm.aclose()

    anyio.run(cancel)
    [record] = Ledger(tmp_path, readonly=True).episodes()
    assert record.status == "cancelled"


def test_a_model_that_fails_ends_the_episode_typed(tmp_path: Path) -> None:
    def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> str:
        raise ModelError("no server answers")

    result = run(Swarm(ScriptedModel(policy), runs=tmp_path))
    assert (result.status, result.error) == ("failed", "no server answers")


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Swarm("gpt"), "unknown model 'gpt'"),
        (lambda: Swarm("openai:http://x/v1"), "names no model"),
        (lambda: Swarm(delegating(), tools=[add, add]), "two tools are named 'add'"),
        (lambda: Swarm(delegating(), max_parallel=0), "max_parallel"),
        (
            lambda: Swarm(delegating(), roles=[Role(name="a", instructions="")] * 2),
            "two roles are named 'a'",
        ),
        (lambda: Role(name="a/b", instructions=""), "role's name"),
        (lambda: run(Swarm(delegating()), "  "), "the task is empty"),
    ],
)
def test_a_wrong_setting_is_refused_before_any_work(make: object, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        make()


def test_files_are_offered_by_name_and_bad_ones_refused(tmp_path: Path) -> None:
    from PIL import Image as Pillow

    Pillow.new("RGB", (4, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    swarm = Swarm(ScriptedModel(lambda m, t: m[-1].content), runs=tmp_path / "runs")
    assert swarm.run_sync("look", files=[tmp_path / "a.png"]).output == "look\n\nFiles: a.png"
    for name, told in (("b.png", "not a picture"), ("c.png", "there is no file")):
        with pytest.raises(ConfigError, match=told):
            swarm.run_sync("look", files=[tmp_path / name])


def test_an_unwritable_run_directory_is_said_before_any_model_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot be opened"):
        run(Swarm(delegating(), tools=[add], runs=tmp_path / "file"))


def test_a_truncated_message_is_told_as_such(tmp_path: Path) -> None:
    swarm = Swarm(
        ScriptedModel(lambda m, t: "a long answer"), sampling=Sampling(max_tokens=4), runs=tmp_path
    )
    assert run(swarm).status == "truncated"


def test_tools_may_raise_tool_errors_and_generations_are_plain_records() -> None:
    assert issubclass(ToolError, Exception)
    assert Generation(token_ids=(1,), logprobs=(0.0,), finish_reason="stop").weight_version == 0
