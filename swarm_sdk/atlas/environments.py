"""Environments over the Atlas: questions without end, drawn by number, with a difficulty.

    draw(17) ─> world, question ─> search and open over its pages ─> item-F1 or exact

Their prompts never ask for parallelism: that it pays follows from the questions (K2.5 report,
section 3.3). The report names wide search, deep search, long documents and bulk download; what is
hard about each, and the numbers, are ours.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import anyio.to_thread

from swarm_sdk.atlas.invent import invent_world
from swarm_sdk.atlas.pages import World, world
from swarm_sdk.atlas.questions import Question, deep_question, wide_question
from swarm_sdk.atlas.scoring import score
from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.environment import Environment, EnvTask, SubRollouts
from swarm_sdk.runtime.episode import Result
from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import Task, Tool

MAX_CORPORA = 64


class DrawnEnvironment(Environment):
    """Tasks without end; the task of a number is always the same."""

    def draw(self, index: int) -> EnvTask:
        """The task of that number, from 0."""
        raise NotImplementedError

    def tasks(self) -> Iterator[EnvTask]:
        """All tasks, in order."""
        return map(self.draw, count())


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How much a question asks for."""

    min_entities: int = 2
    max_entities: int = 8
    """Of wide questions: entities that are looked up independently."""
    real_share: float = 0.12
    """Questions about the training entities of the Atlas; the rest are of invented worlds."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_entities <= self.max_entities <= 12 or not 0 <= self.real_share <= 1:
            raise ConfigError(
                "a difficulty needs 1 <= min_entities <= max_entities <= 12 and a real_share from "
                f"0 to 1, got {self}"
            )


class AtlasEnvironment(DrawnEnvironment):
    """Questions of one kind, each asked of a world of its own or of the real training pages."""

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        self.seed: int = seed
        self.difficulty: Difficulty = difficulty or Difficulty()
        self._corpora: dict[str, Corpus] = {}

    def question(self, rng: random.Random, pages: World) -> Question:
        """Draw a question."""
        raise NotImplementedError

    def draw(self, index: int) -> EnvTask:
        """The question of that number; ``facts`` holds it and its world."""
        rng = random.Random(f"{self.seed}/{self.name}/{index}")
        is_real = rng.random() < self.difficulty.real_share
        while True:
            pages = world("train") if is_real else invent_world(rng)
            if self.fits(pages):
                break
        question = self.question(rng, pages)
        return EnvTask(
            f"{self.name}-{self.seed}-{index}",
            Task(question.prompt, question.files),
            {"question": question, "world": pages},
        )

    def fits(self, pages: World) -> bool:
        """Whether questions of this kind can be asked of a world."""
        del pages
        return True

    @asynccontextmanager
    async def toolset(self, task: EnvTask) -> AsyncIterator[Sequence[Tool]]:
        """Search and open over the pages, and IPython, as `nano` was taught."""
        corpus = await self._corpus(task)
        yield [SearchTool(corpus), OpenTool(corpus), IPythonTool()]

    async def _corpus(self, task: EnvTask) -> Corpus:
        pages: World = task.facts["world"]
        key = "train" if pages is world("train") else task.id
        if key not in self._corpora:
            while len(self._corpora) >= MAX_CORPORA:
                del self._corpora[next(iter(self._corpora))]
            made = (Page(title, text) for title, text in pages.pages().items())
            self._corpora[key] = await anyio.to_thread.run_sync(Corpus.from_pages, made)
        return self._corpora[key]

    async def judge(
        self, task: EnvTask, result: Result[Any], rollouts: SubRollouts
    ) -> Mapping[str, float]:
        """Item-F1 of tables, right or wrong for the rest; an episode that did not end gets 0."""
        del rollouts
        question: Question = task.facts["question"]
        worth = score(question, result.output) if result.status == "done" else 0.0
        return {"reward": worth}


class WideSearch(AtlasEnvironment):
    """N entities x M attributes: N independent sources. Harder with N."""

    name = "atlas-wide"

    def fits(self, pages: World) -> bool:
        """Whether a kind has enough members for the most entities asked for."""
        most = max(len(found) for found in pages.by_kind.values())
        return most >= self.difficulty.max_entities

    def question(self, rng: random.Random, pages: World) -> Question:
        """N is drawn evenly between the bounds."""
        num = rng.randint(self.difficulty.min_entities, self.difficulty.max_entities)
        return wide_question(pages, pages.entities, rng, num_entities=num)


class DeepSearch(AtlasEnvironment):
    """Chains of lookups, each needing the one before: nothing to gain from side by side."""

    name = "atlas-deep"

    def question(self, rng: random.Random, pages: World) -> Question:
        """2 to 4 hops."""
        return deep_question(pages, pages.entities, rng)
