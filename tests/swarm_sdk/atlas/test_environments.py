"""Environments of training: questions by number and difficulty, tools, judges."""

import time
from pathlib import Path

import anyio
import pytest

from swarm_sdk import Swarm
from swarm_sdk.atlas.environments import (
    BulkDownload,
    DeepSearch,
    Difficulty,
    Documents,
    DrawnEnvironment,
    LongDocuments,
    WideSearch,
    served,
)
from swarm_sdk.atlas.policies import Swarmer
from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.environment import Rollout
from swarm_sdk.testing import ScriptedModel, call, calls


def rollout(environment: DrawnEnvironment, index: int, runs: Path, model: ScriptedModel) -> Rollout:
    async def main() -> Rollout:
        async with Swarm(model, runs=runs) as swarm:
            return await swarm.rollouts().rollout(environment, environment.draw(index))

    return anyio.run(main)


def by_the_book(environment: DrawnEnvironment, index: int) -> ScriptedModel:
    import random

    question = environment.draw(index).facts["question"]
    swarmer = Swarmer(question, "many", random.Random(0))
    return ScriptedModel(start=lambda messages: swarmer.agent(messages).next)


@pytest.mark.parametrize("kind", [WideSearch, DeepSearch, LongDocuments])
def test_the_book_answers_every_drawn_question_with_the_environments_tools(kind, tmp_path) -> None:
    environment = kind(5, Difficulty(max_entities=4, document_chars=1_000))
    for index in range(3):
        done = rollout(environment, index, tmp_path, by_the_book(environment, index))
        assert done.rewards == {"reward": 1.0}, (kind, index, done.result.output, done.error)


@pytest.mark.parametrize("kind", [WideSearch, DeepSearch, LongDocuments, BulkDownload])
def test_a_number_stands_for_one_question_that_does_not_speak_of_parallelism(kind) -> None:
    one, same, other = kind(1), kind(1), kind(2)
    for index in range(4):
        task = one.draw(index)
        assert task.task == same.draw(index).task
        assert task.id == same.draw(index).id != other.draw(index).id
        assert task.task.prompt != one.draw(index + 1).task.prompt
        words = task.task.prompt.casefold()
        assert not any(word in words for word in ("parallel", "agent", "at once", "side by side"))


def test_difficulty_sets_how_much_is_asked_for() -> None:
    for num in (2, 12):
        wide = WideSearch(3, Difficulty(min_entities=num, max_entities=num))
        assert len(wide.draw(0).facts["question"].plan.titles) == num
        bulk = BulkDownload(3, Difficulty(min_entities=num, max_entities=num))
        assert len(bulk.draw(0).facts["files"]) == num
    short, long = (LongDocuments(3, Difficulty(document_chars=n)) for n in (100, 9_000))
    task = long.draw(0)
    assert all(len(p.text) >= 9_000 for p in long.documents(task, task.facts["world"]))
    assert max(len(p.text) for p in short.documents(task, task.facts["world"])) < 3_000
    for wrong in (
        {"min_entities": 5, "max_entities": 4},
        {"document_chars": 0},
        {"delay_s": -1},
        {"alone": 1.1},
    ):
        with pytest.raises(ConfigError):
            Difficulty(**wrong)


@pytest.mark.parametrize("kind", [WideSearch, DeepSearch, BulkDownload])
def test_a_share_of_the_questions_is_put_to_an_agent_that_cannot_spawn(kind) -> None:
    plain, mixed = kind(4), kind(4, Difficulty(alone=0.3, alone_steps=17))
    tasks = [mixed.draw(index) for index in range(60)]
    assert 6 <= sum(not task.can_spawn for task in tasks) <= 32
    for index, task in enumerate(tasks):
        assert task.task == plain.draw(index).task, "the question is the same for both"
        assert task.limits == ({} if task.can_spawn else {"critical_steps": 17})
    assert all(plain.draw(index).can_spawn for index in range(60))


def test_an_agent_alone_has_no_tools_to_spawn_with_and_limits_of_its_own(tmp_path: Path) -> None:
    environment = WideSearch(5, Difficulty(alone=1.0, alone_steps=2))
    offered: list[set[str]] = []

    def search_on(messages, tools):
        offered.append({tool.name for tool in tools})
        return calls(call("search", query="x"))

    done = rollout(environment, 0, tmp_path, ScriptedModel(search_on))
    assert offered == [{"search", "open", "ipython"}] * 2
    assert (done.result.critical_steps, done.rewards) == (2, {"reward": 0.0})


def test_bulk_download_is_fetched_summed_up_and_judged(tmp_path: Path) -> None:
    environment = BulkDownload(0, Difficulty(min_entities=3, max_entities=3))
    files = environment.draw(0).facts["files"]

    def policy(messages, tools):
        results = [m.content for m in messages if m.role == "tool"]
        if not results:
            return calls(
                *(call("download", name=name) for name in files), call("download", name="x")
            )
        assert results[-1].startswith("error: the server answered 404")
        lines = ["| name | rows | total |", "|---|---|---|"]
        for name, text in zip(files, results, strict=False):
            counts = [int(row.split(",")[1]) for row in text.splitlines()[1:]]
            lines.append(f"| {name} | {len(counts)} | {sum(counts)} |")
        return "\n".join(lines)

    done = rollout(environment, 0, tmp_path, ScriptedModel(policy))
    assert done.rewards == {"reward": 1.0}, done.result.output
    wrong = rollout(environment, 0, tmp_path, ScriptedModel(lambda m, t: "no idea"))
    assert wrong.rewards == {"reward": 0.0}


def test_the_server_waits_and_serves_side_by_side() -> None:
    from swarm_sdk.atlas.environments import _get

    async def main() -> tuple[float, set]:
        found = set()

        async def get(name: str) -> None:
            found.add(await anyio.to_thread.run_sync(_get, port, name))

        with served({"ä b.csv": "1", "c": "2"}, 0.2) as port:
            started_s = time.perf_counter()
            async with anyio.create_task_group() as group:
                for name in ("ä b.csv", "c", "c", "nothing"):
                    group.start_soon(get, name)
            return time.perf_counter() - started_s, found

    seconds, found = anyio.run(main)
    assert found == {(200, "1"), (200, "2"), (404, "not found")}
    assert seconds >= 0.2


def test_documents_of_a_user_are_asked_for_what_they_share(tmp_path: Path) -> None:
    folder = tmp_path / "docs"
    folder.mkdir()
    for index in range(6):
        text = f"Contract {index}\nparty: firm {index}\nnotice: {index + 1} months\n"
        (folder / f"contract-{index}.txt").write_text(text + f"only here {index}: yes\n")
    environment = Documents(folder, 1, Difficulty(min_entities=2, max_entities=4))
    question = environment.draw(0).facts["question"]
    assert set(question.plan.attributes) <= {"party", "notice"}
    done = rollout(environment, 0, tmp_path / "runs", by_the_book(environment, 0))
    assert done.rewards == {"reward": 1.0}, done.result.output
    for file in folder.iterdir():
        file.write_text("prose without facts")
    with pytest.raises(ConfigError, match="share no 'key: value' lines"):
        Documents(folder)
