"""Environments over the Atlas: questions without end, drawn by number, with a difficulty.

    draw(17) ─> world, question ─> search and open over its pages ─> item-F1 or exact

Their prompts never ask for parallelism: that it pays follows from the questions (K2.5 report,
section 3.3). The report names wide search, deep search, long documents and bulk download; what is
hard about each, and the numbers, are ours.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import anyio.to_thread

from swarm_sdk.atlas.invent import invent_world
from swarm_sdk.atlas.names import Names
from swarm_sdk.atlas.pages import Entity, World, world
from swarm_sdk.atlas.prompts import table_row
from swarm_sdk.atlas.questions import Question, deep_question, table, wide_question
from swarm_sdk.atlas.scoring import score
from swarm_sdk.errors import ConfigError, ToolError
from swarm_sdk.runtime.environment import Environment, EnvTask, SubRollouts
from swarm_sdk.runtime.episode import Result
from swarm_sdk.tools.corpus import Corpus, Page
from swarm_sdk.tools.function import FunctionTool
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.search import OpenTool, SearchTool
from swarm_sdk.types import Task, Tool

MAX_CORPORA = 64
KEY_LINE = re.compile(r"^([\w][\w -]{0,39}): (\S.{0,119})$", flags=re.MULTILINE)
"""A line of a document that tells one fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difficulty:
    """How much a question asks for."""

    min_entities: int = 2
    max_entities: int = 8
    """Of wide questions: entities that are looked up independently."""
    real_share: float = 0.12
    """Questions about the training entities of the Atlas; the rest are of invented worlds."""
    document_chars: int = 6_000
    """Of long documents: what stands around each fact."""
    delay_s: float = 0.02
    """Of bulk download: what the server waits before it answers."""
    alone: float = 0.0
    """Share of the questions that are put to an agent without tools to spawn with: a policy that
    never works alone while it trains forgets how to."""
    alone_steps: int = 30
    """Critical steps of such an episode; one call at a time, N entities take 2 N + 1."""

    def __post_init__(self) -> None:
        if self.document_chars < 1 or self.delay_s < 0:
            raise ConfigError("document_chars must be at least 1 and delay_s at least 0")
        if not 0 <= self.alone <= 1 or self.alone_steps < 1:
            raise ConfigError("alone must be from 0 to 1 and alone_steps at least 1")
        if not 1 <= self.min_entities <= self.max_entities <= 12 or not 0 <= self.real_share <= 1:
            raise ConfigError(
                "a difficulty needs 1 <= min_entities <= max_entities <= 12 and a real_share from "
                f"0 to 1, got {self}"
            )


class DrawnEnvironment(Environment):
    """Tasks without end; the task of a number is always the same."""

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        self.seed: int = seed
        self.difficulty: Difficulty = difficulty or Difficulty()

    def draw(self, index: int) -> EnvTask:
        """The task of that number, from 0."""
        raise NotImplementedError

    def tasks(self) -> Iterator[EnvTask]:
        """All tasks, in order."""
        return map(self.draw, count())

    def drawn(self, index: int, question: Question, facts: Mapping[str, Any]) -> EnvTask:
        """The task of a question; a share of them is put to an agent that cannot spawn."""
        name = f"{self.name}-{self.seed}-{index}"
        is_alone = random.Random(f"{name}/alone").random() < self.difficulty.alone
        return EnvTask(
            name,
            Task(question.prompt, question.files),
            {"question": question, **facts},
            can_spawn=not is_alone,
            limits={"critical_steps": self.difficulty.alone_steps} if is_alone else {},
        )


class AtlasEnvironment(DrawnEnvironment):
    """Questions of one kind, each asked of a world of its own or of the real training pages."""

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        super().__init__(seed, difficulty)
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
        return self.drawn(index, self.question(rng, pages), {"world": pages})

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
            made = self.documents(task, pages)
            self._corpora[key] = await anyio.to_thread.run_sync(Corpus.from_pages, made)
        return self._corpora[key]

    def documents(self, task: EnvTask, pages: World) -> list[Page]:
        """What is searched."""
        del task
        return [Page(title, text) for title, text in pages.pages().items()]

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


class LongDocuments(WideSearch):
    """Wide search over documents that are long: each fact stands somewhere in pages of others'.

    One context cannot hold many of them; sub-agents read one each and report a row.
    """

    name = "atlas-long"

    def __init__(self, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        super().__init__(seed, replace(difficulty or Difficulty(), real_share=0.0))

    def documents(self, task: EnvTask, pages: World) -> list[Page]:
        """The pages, their lines spread over filler about other things."""
        rng = random.Random(task.id)
        return [Page(e.title, self._long(e.text, pages, rng)) for e in pages.entities]

    def _long(self, text: str, pages: World, rng: random.Random) -> str:
        head, *lines = text.splitlines()
        filler: list[str] = []
        num_chars = len(text)
        while num_chars < self.difficulty.document_chars:
            other = rng.choice(pages.entities)
            filler.append(f"Elsewhere {other.title} was named, which is {other.about}.")
            num_chars += len(filler[-1]) + 1
        places = sorted(rng.randint(0, len(filler)) for _ in lines)
        for place, line in reversed(list(zip(places, lines, strict=True))):
            filler.insert(place, line)
        return "\n".join([head, *filler])


@contextmanager
def served(files: Mapping[str, str], delay_s: float) -> Iterator[int]:
    """A server on the loopback that gives ``files`` by name, each after ``delay_s``; its port."""

    class Files(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """One file."""
            time.sleep(delay_s)
            text = files.get(unquote(self.path.removeprefix("/")))
            body = (text or "not found").encode()
            self.send_response(HTTPStatus.NOT_FOUND if text is None else HTTPStatus.OK)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def _get(port: int, name: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", f"/{quote(name)}")
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


class BulkDownload(DrawnEnvironment):
    """N files of a local HTTP server, each to be fetched and summed up: independent and slow."""

    name = "bulk-download"

    def draw(self, index: int) -> EnvTask:
        """The files of that number, and the table of their rows and sums."""
        rng = random.Random(f"{self.seed}/{self.name}/{index}")
        names = Names(rng)
        num = rng.randint(self.difficulty.min_entities, self.difficulty.max_entities)
        files: dict[str, str] = {}
        while len(files) < num:
            counts = [rng.randint(1, 999) for _ in range(rng.randint(3, 30))]
            lines = [f"{names.word().lower()},{count}" for count in counts]
            files[f"{names.word().lower()}-{len(files)}.csv"] = "\n".join(["name,count", *lines])
        rows = []
        for name, text in files.items():
            counts = [int(line.rpartition(",")[2]) for line in text.splitlines()[1:]]
            rows.append(table_row([name, str(len(counts)), str(sum(counts))]))
        question = Question(
            id=f"{self.name}-{self.seed}-{index}",
            kind="wide",
            prompt="Download each of these files and give a table with the columns name, rows and "
            "total: the number of its data rows and the sum of their counts. Files: "
            + ", ".join(files),
            answer=table(["rows", "total"], rows),
        )
        return self.drawn(index, question, {"files": files})

    @asynccontextmanager
    async def toolset(self, task: EnvTask) -> AsyncIterator[Sequence[Tool]]:
        """``download`` over a server on the loopback that lives as long as the episode."""
        with served(task.facts["files"], self.difficulty.delay_s) as port:

            async def download(name: str) -> str:
                """Download a file by its name."""
                status, text = await anyio.to_thread.run_sync(_get, port, name)
                if status != HTTPStatus.OK:
                    raise ToolError(f"the server answered {status} for '{name}'")
                return text

            yield [FunctionTool(download), IPythonTool()]

    async def judge(
        self, task: EnvTask, result: Result[Any], rollouts: SubRollouts
    ) -> Mapping[str, float]:
        """Item-F1; an episode that did not end gets 0."""
        del rollouts
        worth = score(task.facts["question"], result.output) if result.status == "done" else 0.0
        return {"reward": worth}


class Documents(WideSearch):
    """Wide search over a user's own folder: what several documents tell in ``key: value`` lines.

    Args:
        folder: text, Markdown or HTML files.
        seed: of the questions.
        difficulty: how many documents a question asks for; as many as share a key at most.

    Raises:
        ConfigError: the folder holds no document, or no key that two of them share.
    """

    name = "documents"

    def __init__(self, folder: Path, seed: int = 0, difficulty: Difficulty | None = None) -> None:
        super().__init__(seed, difficulty)
        self._corpus_of_folder = Corpus.from_folder(folder)
        entities = []
        for title in self._corpus_of_folder.titles:
            page = self._corpus_of_folder.page(title)
            assert page is not None
            found = dict(KEY_LINE.findall(page.text))
            if found:
                entities.append(Entity("document", title, "a document", found))
        counts = Counter(name for entity in entities for name in entity.attributes)
        shared = {name for name, num in counts.items() if num >= self.difficulty.min_entities > 1}
        kept = [e.without(e.attributes.keys() - shared) for e in entities]
        kept = [e for e in kept if e.attributes]
        if len(kept) < max(2, self.difficulty.min_entities):
            raise ConfigError(
                f"the documents in '{folder}' share no 'key: value' lines to ask for; give "
                "questions of your own through an Environment"
            )
        largest = min(self.difficulty.max_entities, len(kept))
        self.difficulty: Difficulty = replace(self.difficulty, max_entities=largest)
        self._world = World(tuple(kept), frozenset(), frozenset(), {"document": "documents"})

    def draw(self, index: int) -> EnvTask:
        """The question of that number."""
        rng = random.Random(f"{self.seed}/{self.name}/{index}")
        for _ in range(1_000):
            try:
                question = self.question(rng, self._world)
            except (IndexError, ValueError):  # these documents share nothing short enough
                continue
            return self.drawn(index, question, {"world": self._world})
        raise ConfigError("no question can be asked of these documents: their values are too long")

    async def _corpus(self, task: EnvTask) -> Corpus:
        del task
        return self._corpus_of_folder
