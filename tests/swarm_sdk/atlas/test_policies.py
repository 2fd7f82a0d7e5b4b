import contextlib
import io
import random
from collections.abc import Mapping

import pytest

from swarm_sdk.atlas.invent import invent_world
from swarm_sdk.atlas.pages import World, world
from swarm_sdk.atlas.policies import STRATEGIES, Swarmer, choose_strategy
from swarm_sdk.atlas.questions import (
    Lookup,
    compute_question,
    deep_question,
    look_question,
    wide_question,
)
from swarm_sdk.atlas.scoring import score
from swarm_sdk.errors import ModelError
from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.types import Message

MAKERS = (wide_question, deep_question, compute_question)


def corpus_of(pages: World) -> Corpus:
    return Corpus.from_pages(Page(title, text) for title, text in pages.pages().items())


class ScriptedRun:
    """One episode without the runtime; ``dialogues`` is (agent, messages), the main one first."""

    def __init__(self, swarmer: Swarmer, corpus: Corpus) -> None:
        self.swarmer = swarmer
        self.corpus = corpus
        self.dialogues: list[tuple[str, list[Message]]] = []
        self.created: dict[str, str] = {}

    def output(self) -> str:
        return self._talk("main", "You answer questions.", self.swarmer.question.prompt)

    def _talk(self, agent: str, system: str, prompt: str) -> str:
        messages = [Message("system", system), Message("user", prompt)]
        self.dialogues.append((agent, messages))
        policy = self.swarmer.agent(messages)
        while True:
            said = policy.next(messages)
            messages.append(said)
            if not said.tool_calls:
                return said.content
            for call in said.tool_calls:
                result = self._run(call.name, call.arguments)
                messages.append(Message("tool", result, tool_call_id=call.id))

    def _run(self, tool: str, arguments: Mapping[str, str]) -> str:
        match tool:
            case "search":
                hits = self.corpus.search(arguments["query"])
                return "\n".join(f"{hit.title}: {hit.snippet}" for hit in hits) or "no page matches"
            case "open":
                page = self.corpus.page(arguments["title"])
                return page.text if page else f"error: no page is titled '{arguments['title']}'"
            case "ipython":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(arguments["code"], {})
                return printed.getvalue()
            case "create_subagent":
                self.created[arguments["name"]] = arguments["system_prompt"]
                return f"created {arguments['name']}"
        assert tool == "assign_task"
        try:
            return self._talk(
                arguments["agent"], self.created[arguments["agent"]], arguments["prompt"]
            )
        except ModelError as error:
            return f"error: {error}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("make", MAKERS)
def test_every_strategy_answers_every_invented_question(make, strategy):
    rng = random.Random(f"{make.__name__} {strategy}")
    for _ in range(25):
        pages = invent_world(rng)
        question = make(pages, pages.entities, rng)
        swarmer = Swarmer(question, strategy, rng, fail_share=0.1)
        output = ScriptedRun(swarmer, corpus_of(pages)).output()
        assert score(question, output) == 1.0, (question.prompt, question.answer, output)


def test_held_out_questions_over_the_whole_atlas_are_answered():
    rng = random.Random(3)
    everything, targets = world("all"), world("heldout").entities
    corpus = corpus_of(everything)
    for i in range(60):
        question = MAKERS[i % 3](everything, targets, rng)
        swarmer = Swarmer(question, choose_strategy(question, rng), rng)
        output = ScriptedRun(swarmer, corpus).output()
        assert score(question, output) == 1.0, (question.prompt, question.answer, output)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_code_for_pictures_measures_them(split, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(split)
    corpus = corpus_of(world("train"))
    for _ in range(25):
        question = look_question(split, rng)
        (picture,) = question.files
        (tmp_path / picture.name).write_bytes(picture.data)
        output = ScriptedRun(Swarmer(question, "sequence", rng), corpus).output()
        assert score(question, output) == 1.0, (question.prompt, question.answer, output)


def test_many_sub_agents_start_in_the_turn_that_creates_their_kind():
    rng = random.Random(5)
    pages = invent_world(rng)
    question = wide_question(pages, pages.entities, rng, num_entities=12)
    run = ScriptedRun(Swarmer(question, "many", rng), corpus_of(pages))
    run.output()
    first = run.dialogues[0][1][2]
    assert [call.name for call in first.tool_calls] == ["create_subagent", *["assign_task"] * 12]
    assert [call.id for call in first.tool_calls][:2] == [
        "functions.create_subagent:0",
        "functions.assign_task:1",
    ]


def test_many_sub_agents_take_at_most_half_of_the_steps_in_a_row():
    rng = random.Random(6)
    pages = invent_world(rng)
    question = wide_question(pages, pages.entities, rng, num_entities=4)
    run = ScriptedRun(Swarmer(question, "many", rng), corpus_of(pages))
    run.output()
    steps = [sum(m.role == "assistant" for m in messages) for _, messages in run.dialogues]
    critical_steps = steps[0] + max(steps[1:])
    assert critical_steps * 2 <= sum(steps)


def test_a_failed_sub_agent_is_asked_again():
    rng = random.Random(7)
    pages = invent_world(rng)
    question = wide_question(pages, pages.entities, rng, num_entities=5)
    run = ScriptedRun(Swarmer(question, "many", rng, fail_share=1.0), corpus_of(pages))
    assert score(question, run.output()) == 1.0
    main = run.dialogues[0][1]
    assert sum(m.content.startswith("error:") for m in main if m.role == "tool") == 5
    assert [call.name for call in main[-7].tool_calls] == ["assign_task"] * 5


def test_values_come_from_the_pages_and_not_from_the_answer():
    rng = random.Random(8)
    pages = invent_world(rng)
    question = wide_question(pages, pages.entities, rng, num_entities=4)
    empty = corpus_of(type(pages)((), pages.relations, pages.measures, pages.plurals))
    output = ScriptedRun(Swarmer(question, "many", rng), empty).output()
    assert score(question, output) < 0.5
    assert "unknown" in output


def test_most_questions_about_several_names_are_delegated_one_by_one():
    rng = random.Random(9)
    pages = invent_world(rng)
    drawn = []
    for _ in range(400):
        question = wide_question(pages, pages.entities, rng)
        assert isinstance(question.plan, Lookup)
        drawn.append((len(question.plan.titles), choose_strategy(question, rng)))
    wide = [strategy for num_titles, strategy in drawn if num_titles >= 4]
    assert wide.count("many") > 0.5 * len(wide)
    assert {strategy for _, strategy in drawn} == set(STRATEGIES)


def test_a_chain_is_answered_with_what_is_left_of_it_said_aloud():
    rng = random.Random(10)
    everything = world("all")
    question = deep_question(everything, (everything.by_title["Mombasa"],), rng)
    run = ScriptedRun(Swarmer(question, "sequence", rng), corpus_of(everything))
    assert score(question, run.output()) == 1.0
    first = run.dialogues[0][1][2]
    assert first.reasoning == " > ".join(["Mombasa", *question.plan.attributes])
