"""Training data for `nano`: the real runtime, tools and ledger, driven by scripted policies.

    draw a question -> run the episode -> read the ledger -> one row of ids an agent

The ids that are trained on are the ledger's own. Most questions are asked of invented worlds,
so that copying is learned and not names.
"""

from __future__ import annotations

import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swarm_sdk.atlas.invent import invent_world
from swarm_sdk.atlas.pages import World, world
from swarm_sdk.atlas.policies import Strategy, Swarmer, choose_strategy
from swarm_sdk.atlas.questions import (
    Question,
    compute_question,
    deep_question,
    look_question,
    wide_question,
)
from swarm_sdk.atlas.scoring import score
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.typescript import declare_tools
from swarm_sdk.runtime.episode import Result
from swarm_sdk.runtime.spawn import ASSIGN_TASK, CREATE_SUBAGENT
from swarm_sdk.swarm import Swarm
from swarm_sdk.testing import ScriptedModel
from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.sandbox.levels import SandboxSettings
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.parl.sft import Row
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import Task, Tool

EPISODES_PER_LEDGER = 500
FAIL_SHARE = 0.03
"""Share of sub-agents that fail, so that recovery is learned."""
SUB_ROW_SHARE = 0.5
"""Share of sub-agents' rows that are kept: an episode has one main row and many of theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """What is asked, by share. Ours, by trial."""

    wide: float = 0.34
    deep: float = 0.15
    compute: float = 0.28
    look: float = 0.23
    real: float = 0.12
    """Share of questions about the training entities of the Atlas; the rest are invented."""
    serial: float = 0.0
    """Share of questions that are answered alone, one call at a time, however many names they
    have: for a policy that has the parallel ways still to learn."""
    alone: float = 0.0
    """Share of questions that are answered so by an agent that has no tools to spawn with: for a
    policy that is to be compared with itself alone."""


def draw(rng: random.Random, mix: Mix) -> tuple[World, Question]:
    """A question and the world that it is asked of."""
    kind = rng.choices(
        ("wide", "deep", "compute", "look"), (mix.wide, mix.deep, mix.compute, mix.look)
    )[0]
    pages = _real_pages(rng) if rng.random() < mix.real else invent_world(rng)
    if kind == "wide":
        return pages, wide_question(pages, pages.entities, rng)
    if kind == "deep":
        return pages, deep_question(pages, pages.entities, rng)
    if kind == "compute":
        return pages, compute_question(pages, pages.entities, rng)
    return pages, look_question("train", rng)


def _real_pages(rng: random.Random) -> World:
    del rng
    return world("train")


class Teacher:
    """Runs episodes in one process and gives back their rows."""

    def __init__(
        self,
        chat_format: ChatFormat | None,
        kernels: KernelPool | None,
        directory: Path,
        seed: int,
        mix: Mix,
    ) -> None:
        self._format = chat_format
        self._kernels = kernels
        self._directory = directory
        self._rng = random.Random(seed)
        self._mix = mix
        self._real_corpus: Corpus | None = None

    async def rows(self) -> AsyncIterator[tuple[Question, list[Row]]]:
        """Questions and the rows of their episodes, without end."""
        async for question, ledger, episode_id in self.episodes():
            yield question, self._read(ledger, episode_id)

    async def episodes(self) -> AsyncIterator[tuple[Question, Ledger, str]]:
        """Questions and where their episodes are on record; wrong answers are left out."""
        number = 0
        while True:
            runs = self._directory / f"runs-{number}"
            ledger = Ledger(runs)
            for _ in range(EPISODES_PER_LEDGER):
                pages, question = draw(self._rng, self._mix)
                strategy = choose_strategy(question, self._rng)
                can_spawn = not (self._mix.alone and self._rng.random() < self._mix.alone)
                if not can_spawn or (self._mix.serial and self._rng.random() < self._mix.serial):
                    strategy = "sequence"
                result = await self.episode(pages, question, strategy, runs, can_spawn=can_spawn)
                if score(question, result.output) == 1.0:
                    yield question, ledger, result.episode_id
            ledger.close()
            shutil.rmtree(runs)
            number += 1

    async def episode(
        self,
        pages: World,
        question: Question,
        strategy: Strategy,
        runs: Path,
        *,
        can_spawn: bool = True,
    ) -> Result:
        """One episode by the book."""
        swarmer = Swarmer(question, strategy, self._rng, fail_share=FAIL_SHARE)
        model = ScriptedModel(
            start=lambda messages: swarmer.agent(messages).next, chat_format=self._format
        )
        swarm = Swarm(model, tools=self.tools(pages), runs=runs, can_spawn=can_spawn)
        try:
            return await swarm.run(Task(question.prompt, question.files))
        finally:
            await swarm.aclose()

    def tools(self, pages: World) -> list[Tool]:
        """Search and open over a world, and IPython."""
        if pages is world("train"):
            self._real_corpus = self._real_corpus or corpus_of(pages)
            corpus = self._real_corpus
        else:
            corpus = corpus_of(pages)
        ipython = IPythonTool() if self._kernels is None else IPythonTool(self._kernels.lease)
        return [SearchTool(corpus), OpenTool(corpus), ipython]

    def _read(self, ledger: Ledger, episode_id: str) -> list[Row]:
        return [
            Row(
                np.array(branch.token_ids, dtype=np.uint16),
                np.array(branch.is_sampled, dtype=np.bool_),
            )
            for branch in branches(ledger, episode_id)
            if any(branch.is_sampled)
            and (branch.agent_path == "main" or self._rng.random() < SUB_ROW_SHARE)
        ]


def corpus_of(pages: World) -> Corpus:
    """The pages of a world, searchable."""
    return Corpus.from_pages(Page(title, text) for title, text in pages.pages().items())


@contextmanager
def _scratch() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="swarm-teach-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@asynccontextmanager
async def teacher(chat_format: ChatFormat | None, seed: int, mix: Mix) -> AsyncIterator[Teacher]:
    """A teacher with a scratch directory and, where anything is computed, a kernel of its own."""
    with _scratch() as directory:
        if mix.compute == mix.look == 0:
            yield Teacher(chat_format, None, directory, seed, mix)
            return
        async with KernelPool(2, settings=SandboxSettings(isolation="best")) as kernels:
            yield Teacher(chat_format, kernels, directory, seed, mix)


async def texts(num_episodes: int, seed: int, mix: Mix) -> list[str]:
    """All texts of episodes by the book: what a vocabulary is trained on."""
    found: list[str] = []
    async with teacher(None, seed, mix) as teaching:
        number = 0
        declared = declare_tools([tool.spec for tool in teaching.tools(world("train"))])
        spawning = declare_tools([CREATE_SUBAGENT, ASSIGN_TASK])
        async for _, ledger, episode_id in teaching.episodes():
            found += [declared, spawning]
            for agent in ledger.agents(episode_id):
                for message in ledger.messages(episode_id, agent.path):
                    found += [message.content, message.reasoning]
                    found += [call.raw_arguments for call in message.tool_calls]
            number += 1
            if number == num_episodes:
                return found
    return found
