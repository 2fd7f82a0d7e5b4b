"""The ledger: one SQLite file (WAL) a run directory, all that happened, committed step by step.

    episodes 1 ── n agents 1 ── n steps                     media: pictures, once each, by SHA-256

A step is one of two records, in the order in which an agent lived them:

    sample    one model turn: the messages and ids that entered the context since the last one,
              the sampled ids, their log-probabilities, the message they spell
    tool      one tool call's result (its text stands here once; the next sample refers to it)

Concatenating ``prompt_ids`` and ``token_ids`` of an agent's sample steps gives the context that its
model saw, bit for bit; a step with ``reset`` begins a new context. Ids are stored as little-endian
int32, log-probabilities as float32, experts as uint16. Readers: the viewer, resume, the trainer.

Writes are buffered until ``flush``. ``await committed()`` is the barrier before anything that must
not happen twice: it yields once, so that all agents of one turn of the event loop share a commit.
``commit_soon()`` commits in that same turn and lets who calls it go on.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import struct
import threading
import time
import types
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from pydantic_core import to_json

from swarm_sdk.errors import LedgerError
from swarm_sdk.traces.claims import Claims
from swarm_sdk.types import Image, Message, RoutedExperts, ToolCall

SCHEMA_VERSION = 3
FILE_NAME = "ledger.db"
CHECKPOINT_PAGES = 8_192
"""Pages of 4 KiB in the write-ahead log before it is copied into the file, which waits for the
disk: with SQLite's default of 1,000 that took as long as all the rest of writing."""
BUSY_S = 30.0
"""How long a commit waits for another process that is writing to the same file."""
StepKind = Literal["sample", "tool"]

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE episodes (
    row INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
    task TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL,
    started_ns INTEGER NOT NULL, ended_ns INTEGER, status TEXT, output TEXT, error TEXT,
    summary TEXT
);
CREATE TABLE agents (
    episode INTEGER NOT NULL REFERENCES episodes (row), path TEXT NOT NULL,
    parent_path TEXT, parent_stage INTEGER, name TEXT NOT NULL, model TEXT NOT NULL,
    prompt TEXT NOT NULL, started_ns INTEGER NOT NULL, ended_ns INTEGER, status TEXT, output TEXT,
    error TEXT,
    PRIMARY KEY (episode, path)
) WITHOUT ROWID;
CREATE TABLE steps (
    id INTEGER PRIMARY KEY, episode INTEGER NOT NULL REFERENCES episodes (row),
    agent_path TEXT NOT NULL, stage INTEGER NOT NULL, kind TEXT NOT NULL,
    body TEXT NOT NULL, prompt_ids BLOB, token_ids BLOB, logprobs BLOB, weight_version INTEGER,
    routed_experts BLOB,
    started_ns INTEGER NOT NULL, ended_ns INTEGER NOT NULL
);
CREATE INDEX steps_of_episode ON steps (episode);
CREATE TABLE media (sha256 TEXT PRIMARY KEY, media_type TEXT NOT NULL, data BLOB NOT NULL);
"""
_INSERT_STEP = (
    "INSERT INTO steps (episode, agent_path, stage, kind, body, prompt_ids, token_ids,"
    " logprobs, weight_version, routed_experts, started_ns, ended_ns)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_BEGIN_AGENT = (
    "INSERT INTO agents (episode, path, parent_path, parent_stage, name, model, prompt,"
    " started_ns) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
_END_AGENT = (
    "UPDATE agents SET ended_ns = ?, status = ?, output = ?, error = ?"
    " WHERE episode = ? AND path = ?"
)
_IN_BULK = (_BEGIN_AGENT, _INSERT_STEP, _END_AGENT)
"""Written after all else of a commit, in this order: an agent may begin and end in one."""


@dataclass(slots=True, kw_only=True)
class StepRecord:
    """One row of ``steps``."""

    agent_path: str
    stage: int
    """Index of the agent's turn, from 0; a tool call carries the turn that asked for it."""
    kind: StepKind
    body: Mapping[str, Any]
    """sample: ``observed`` (the messages that entered the context), ``message``,
    ``finish_reason``, ``usage``, ``version_spans`` where several versions of the weights sampled
    the ids, ``experts`` (layers, chosen) where ``routed_experts`` is kept, and ``reset`` where the
    context was begun anew (what was dropped, and by which strategy); tool: ``call_id``, ``name``,
    ``content``, ``images``, ``error``."""
    prompt_ids: Sequence[int] = ()
    """Ids that entered the context since the last sampled one."""
    token_ids: Sequence[int] = ()
    """Sampled ids."""
    logprobs: Sequence[float] = ()
    weight_version: int | None = None
    routed_experts: bytes | None = None
    """As ``RoutedExperts.data``: of the positions since the last turn's."""
    started_ns: int = 0
    ended_ns: int = 0
    id: int = 0

    @property
    def experts(self) -> RoutedExperts | None:
        """``routed_experts`` with their shape; ``None`` where the engine told none."""
        if self.routed_experts is None:
            return None
        num_layers, num_chosen = self.body["experts"]
        return RoutedExperts(data=self.routed_experts, num_layers=num_layers, num_chosen=num_chosen)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRecord:
    """One row of ``agents``."""

    path: str
    parent_path: str | None
    parent_stage: int | None
    """The parent's turn that launched this agent; ``None`` for the orchestrator."""
    name: str
    model: str
    started_ns: int
    prompt: str = ""
    ended_ns: int | None = None
    status: str | None = None
    """``None`` while it runs, and after a crash."""
    output: str | None = None
    error: str | None = None
    """Why ``status`` is not ``done``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """One row of ``episodes``."""

    id: str
    task: Mapping[str, Any]
    model: str
    settings: Mapping[str, Any]
    started_ns: int
    ended_ns: int | None = None
    status: str | None = None
    output: str | None = None
    error: str | None = None
    summary: Mapping[str, Any] | None = None
    """``critical_steps``, ``total_steps``, token counts, and ``rewards`` by name where it was
    judged; ``None`` while it runs."""


def _pack(kind: str, numbers: Sequence[float]) -> bytes:
    return struct.pack(f"<{len(numbers)}{kind}", *numbers)


def _unpack(kind: str, blob: bytes | None) -> tuple[Any, ...]:
    return () if blob is None else struct.unpack(f"<{len(blob) // 4}{kind}", blob)


def _json(value: Any) -> str:
    """Compact JSON; floats that are no numbers become null, as everywhere in JSON."""
    try:
        return to_json(value, inf_nan_mode="null").decode()
    except ValueError:  # a lone surrogate, which UTF-8 cannot hold: as an escape it can
        return json.dumps(value, default=str)


def _text(value: str | None) -> str | None:
    """``value`` as UTF-8 can hold it."""
    if value is None or value.isascii():
        return value
    return value.encode("utf-8", "replace").decode()


def images_to_json(images: Sequence[Image]) -> list[list[str]]:
    """Pictures by digest, name and, where there is one, description: what ``media`` takes."""
    return [
        [image.sha256, image.name, *([image.description] if image.description else [])]
        for image in images
    ]


def message_to_json(message: Message) -> dict[str, Any]:
    """The stored form of a message: defaults left out, pictures by digest."""
    stored: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        stored["reasoning"] = message.reasoning
    if message.images:
        stored["images"] = images_to_json(message.images)
    if message.tool_call_id:
        stored["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        stored["tool_calls"] = [
            {
                "id": call.id,
                "name": call.name,
                "arguments": dict(call.arguments),
                "raw_arguments": call.raw_arguments,
                **({"error": call.error} if call.error else {}),
            }
            for call in message.tool_calls
        ]
    return stored


@types.coroutine
def _turn_of_the_loop() -> Generator[None]:
    """``asyncio.sleep(0)`` without its layers."""
    yield


@dataclass(slots=True)
class Row:
    """A write that waits for the next commit; ``id`` is its row's number after it."""

    statement: str
    values: Sequence[Any]
    id: int = 0


class Ledger:
    """The open ledger of a run directory; safe to use from several threads of one process.

    Args:
        directory: the run directory; made if it is missing.
        readonly: open an existing ledger without the right to write.
        durable: commits survive a power failure, not only the end of the process: each waits for
            the disk (SQLite's synchronous = FULL).

    Raises:
        LedgerError: the directory holds no ledger (``readonly``), or one of another version, or
            the file is not a ledger.
    """

    def __init__(
        self, directory: Path | str, *, readonly: bool = False, durable: bool = False
    ) -> None:
        self.directory: Path = Path(directory)
        self.path: Path = self.directory / FILE_NAME
        self._lock = threading.RLock()
        self._rows: deque[Row] = deque()
        self._group = 0
        """Counts commits: rows that wait belong to the next one."""
        self._is_scheduled = False
        """Whether a flush waits in the event loop."""
        self._failure: LedgerError | None = None
        """Set by the first write that failed: what comes after it would have a gap before it."""
        if readonly and not self.path.is_file():
            raise LedgerError(f"no episodes are recorded in '{self.directory}'; run one first")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                f"file:{quote(str(self.path))}?mode={'ro' if readonly else 'rwc'}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_S,
            )
            if not readonly:
                self._use_wal()
                self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
                self._db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
            self._check_version(create=not readonly)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"the ledger '{self.path}' cannot be opened: {error}") from error
        self._claims = None if readonly else Claims.of(self.directory)
        self._claimed: set[str] = set()
        self._episode_rows: dict[str, int] = {}

    def _use_wal(self) -> None:
        """Switch the file to a write-ahead log; SQLite does not wait for others who do so too."""
        until_s = time.monotonic() + BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError:
                if time.monotonic() > until_s:
                    raise
                time.sleep(0.01)
            else:
                return

    def _check_version(self, *, create: bool) -> None:
        with self._lock:
            if create:
                self._db.execute("BEGIN IMMEDIATE")
            try:
                row = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone()
                if row is None and create:
                    for statement in _TABLES.split(";"):
                        self._db.execute(statement)
                    self._db.execute(
                        "INSERT INTO meta VALUES ('schema_version', ?)", (str(SCHEMA_VERSION),)
                    )
                found = self._db.execute(
                    "SELECT value FROM meta WHERE key = 'schema_version'"
                ).fetchone()
            finally:
                if create:
                    self._db.execute("COMMIT")
        if found is None or found[0] != str(SCHEMA_VERSION):
            raise LedgerError(
                f"the ledger '{self.path}' has schema version {found and found[0]} and this "
                f"release reads version {SCHEMA_VERSION}; use the release that wrote it"
            )

    def close(self) -> None:
        """Commit what waits, give up all claims and close the file."""
        with self._lock:
            try:
                if self._failure is None:
                    self.flush()
            finally:
                for episode_id in tuple(self._claimed):
                    self.release(episode_id)
                self._db.close()

    # -- writing: rows wait for the next flush ---------------------------------------------------

    def _write(self, statement: str, values: Sequence[Any]) -> Row:
        if self._failure is not None:
            raise self._failure
        row = Row(statement, values)
        self._rows.append(row)
        return row

    def flush(self) -> None:
        """Commit all rows that wait, as one transaction.

        Raises:
            LedgerError: the file cannot be written (read-only, disk full …). Nothing of the
                transaction is on record then, and this ledger takes no more writes.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            rows: dict[str, list[Row]] = {}
            for _ in range(len(self._rows)):
                row = self._rows.popleft()
                rows.setdefault(row.statement, []).append(row)
            if not rows:
                return
            self._group += 1
            execute = self._db.execute
            try:
                execute("BEGIN IMMEDIATE")
                for statement in [kind for kind in rows if kind not in _IN_BULK]:
                    for row in rows[statement]:
                        row.id = execute(statement, row.values).lastrowid or 0
                for statement in _IN_BULK:
                    if statement in rows:
                        self._execute_many(statement, rows[statement])
                execute("COMMIT")
            except Exception as error:  # whatever it was: a part of the record is missing now
                if self._db.in_transaction:
                    execute("ROLLBACK")
                self._failure = LedgerError(
                    f"the ledger '{self.path}' cannot be written: {error}; what was committed "
                    "before can be read"
                )
                raise self._failure from error

    def _execute_many(self, statement: str, rows: Sequence[Row]) -> None:
        """Write rows of one kind in one go: half of what they cost one by one."""
        self._db.executemany(statement, [row.values for row in rows])
        if statement is _INSERT_STEP:  # ids go up by one: nobody else can write in between
            (last,) = self._db.execute("SELECT last_insert_rowid()").fetchone()
            for number, row in enumerate(rows, last - len(rows) + 1):
                row.id = number

    async def committed(self) -> None:
        """Return when everything written so far is committed; raises as ``flush``."""
        group = self._group
        try:
            if self._rows:
                await _turn_of_the_loop()
        finally:  # also where the task is cancelled: what happened is on record
            with self._lock:  # waits where another thread is in the middle of a commit
                if self._group == group:  # the first to come back commits for all of this turn
                    self.flush()
        if self._failure is not None:
            raise self._failure

    def commit_soon(self) -> None:
        """Commit everything written so far in the next turn of the event loop, with all others.

        Nobody waits for it: where it fails, the next write and the next ``committed`` raise.
        """
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush_scheduled)

    def _flush_scheduled(self) -> None:
        self._is_scheduled = False
        with suppress(LedgerError):  # kept in ``_failure``
            self.flush()

    def begin_episode(self, episode: EpisodeRecord) -> None:
        """Commit that an episode started, and claim it for this process."""
        row = self._write(
            "INSERT INTO episodes (id, task, model, settings, started_ns) VALUES (?, ?, ?, ?, ?)",
            (
                episode.id,
                _json(episode.task),
                episode.model,
                _json(episode.settings),
                episode.started_ns,
            ),
        )
        self.flush()
        self._take(row.id, episode.id)
        self._episode_rows[episode.id] = row.id

    def claim(self, episode_id: str) -> None:
        """Claim an episode that another process left unfinished.

        Raises:
            EpisodeBusy: a living process, or another task of this one, runs it.
            LedgerError: there is no such episode.
        """
        self._take(self._row_of(episode_id), episode_id)

    def _row_of(self, episode_id: str) -> int:
        known = self._episode_rows.get(episode_id)
        if known is not None:
            return known
        rows = self._read("SELECT row FROM episodes WHERE id = ?", (episode_id,))
        if not rows:
            raise LedgerError(f"the ledger '{self.path}' has no episode '{episode_id}'")
        self._episode_rows[episode_id] = rows[0][0]
        return int(rows[0][0])

    def _take(self, row: int, episode_id: str) -> None:
        assert self._claims is not None, "opened to be read only"
        self._claims.take(row, episode_id)
        self._claimed.add(episode_id)

    def end_episode(
        self,
        episode_id: str,
        *,
        status: str,
        output: str,
        error: str | None = None,
        summary: Mapping[str, Any],
        ended_ns: int,
    ) -> None:
        """Commit how an episode ended, and give up the claim."""
        try:
            self._write(
                "UPDATE episodes SET ended_ns = ?, status = ?, output = ?, error = ?, summary = ?"
                " WHERE id = ?",
                (ended_ns, status, _text(output), _text(error), _json(summary), episode_id),
            )
            self.flush()
        finally:
            self.release(episode_id)

    def judge_episode(self, episode_id: str, rewards: Mapping[str, float]) -> None:
        """Commit what an episode that has ended is worth."""
        self._write(
            "UPDATE episodes SET summary = json_set(summary, '$.rewards', json(?)) WHERE id = ?",
            (_json(rewards), episode_id),
        )
        self.flush()

    def release(self, episode_id: str) -> None:
        """Give up the claim on an episode; another process may resume it then."""
        if episode_id in self._claimed and self._claims is not None:
            self._claimed.discard(episode_id)
            self._claims.drop(episode_id)

    def begin_agent(self, episode_id: str, agent: AgentRecord) -> None:
        """Record that an agent started."""
        self._write(
            _BEGIN_AGENT,
            (
                self._row_of(episode_id),
                agent.path,
                agent.parent_path,
                agent.parent_stage,
                agent.name,
                agent.model,
                _text(agent.prompt),
                agent.started_ns,
            ),
        )

    def end_agent(
        self,
        episode_id: str,
        path: str,
        *,
        status: str,
        output: str,
        error: str | None = None,
        ended_ns: int,
    ) -> None:
        """Record how an agent ended."""
        self._write(
            _END_AGENT,
            (ended_ns, status, _text(output), _text(error), self._row_of(episode_id), path),
        )

    def append(
        self,
        episode_id: str,
        agent_path: str,
        stage: int,
        kind: StepKind,
        body: Mapping[str, Any],
        *,
        prompt_ids: Sequence[int] = (),
        token_ids: Sequence[int] = (),
        logprobs: Sequence[float] = (),
        weight_version: int | None = None,
        routed_experts: bytes | None = None,
        started_ns: int = 0,
        ended_ns: int = 0,
    ) -> Row:
        """Record one step, as ``StepRecord`` tells; the row has its id after the next commit."""
        return self._write(
            _INSERT_STEP,
            (
                self._row_of(episode_id),
                agent_path,
                stage,
                kind,
                _json(body),
                _pack("i", prompt_ids) if prompt_ids else None,
                _pack("i", token_ids) if token_ids else None,
                _pack("f", logprobs) if logprobs else None,
                weight_version,
                routed_experts,
                started_ns,
                ended_ns,
            ),
        )

    def put_media(self, images: Sequence[Image]) -> None:
        """Record pictures; those already held are skipped."""
        for image in images:
            self._write(
                "INSERT OR IGNORE INTO media VALUES (?, ?, ?)",
                (image.sha256, image.media_type, image.data),
            )

    # -- reading ------------------------------------------------------------------------------

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                if self._rows and self._failure is None:
                    self.flush()
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger '{self.path}' cannot be read: {error}") from error

    def episodes(self, ids: Sequence[str] | None = None) -> list[EpisodeRecord]:
        """All episodes, or those of these ids that there are, oldest first."""
        rows = self._read(
            "SELECT id, task, model, settings, started_ns, ended_ns, status, output, error,"
            " summary FROM episodes WHERE ?1 IS NULL OR id IN (SELECT value FROM json_each(?1))"
            " ORDER BY started_ns, row",
            (None if ids is None else _json(list(ids)),),
        )
        return [_episode(row) for row in rows]

    def episode(self, episode_id: str) -> EpisodeRecord:
        """The episode whose id is, or alone begins with, ``episode_id``.

        Raises:
            LedgerError: none or several match.
        """
        found = [e for e in self.episodes() if e.id.startswith(episode_id)]
        exact = [e for e in found if e.id == episode_id]
        if len(exact or found) != 1:
            many = f"{len(found)} episodes begin" if found else "no episode begins"
            raise LedgerError(f"{many} with '{episode_id}'; `swarm trace list` shows them")
        return (exact or found)[0]

    def agents(self, episode_id: str) -> list[AgentRecord]:
        """The agents of an episode in the order in which they started."""
        rows = self._read(
            "SELECT path, parent_path, parent_stage, name, model, started_ns, prompt, ended_ns,"
            " status, output, error FROM agents WHERE episode = ? ORDER BY started_ns, path",
            (self._row_of(episode_id),),
        )
        names = tuple(AgentRecord.__dataclass_fields__)
        return [AgentRecord(**dict(zip(names, row, strict=True))) for row in rows]

    def steps(self, episode_id: str, agent_path: str | None = None) -> Iterator[StepRecord]:
        """The steps of an episode, or of one of its agents, in the order of their commits."""
        rows = self._read(
            "SELECT agent_path, stage, kind, body, prompt_ids, token_ids, logprobs, weight_version,"
            " routed_experts, started_ns, ended_ns, id FROM steps WHERE episode = ?1"
            " AND (?2 IS NULL OR agent_path = ?2) ORDER BY id",
            (self._row_of(episode_id), agent_path),
        )
        for row in rows:
            yield StepRecord(
                agent_path=row[0],
                stage=row[1],
                kind=row[2],
                body=json.loads(row[3]),
                prompt_ids=_unpack("i", row[4]),
                token_ids=_unpack("i", row[5]),
                logprobs=_unpack("f", row[6]),
                weight_version=row[7],
                routed_experts=row[8],
                started_ns=row[9],
                ended_ns=row[10],
                id=row[11],
            )

    def media(self, sha256: str, name: str = "", description: str = "") -> Image:
        """A stored picture.

        Raises:
            LedgerError: the ledger does not hold it.
        """
        rows = self._read("SELECT media_type, data FROM media WHERE sha256 = ?", (sha256,))
        if not rows:
            raise LedgerError(f"the ledger '{self.path}' lacks the picture {sha256}")
        return Image(rows[0][1], rows[0][0], name, description)

    def messages(self, episode_id: str, agent_path: str) -> list[Message]:
        """The dialogue of one agent, read back: what it saw and what it said."""
        tool_results: dict[str, Mapping[str, Any]] = {}
        dialogue: list[Message] = []
        for step in self.steps(episode_id, agent_path):
            if step.kind == "tool":
                tool_results[step.body["call_id"]] = step.body
                continue
            for stored in step.body["observed"]:
                result: Mapping[str, Any] = {}
                if stored["role"] == "tool" and "content" not in stored:
                    told = tool_results[stored["tool_call_id"]]
                    result = {"content": told["content"], "images": told["images"]}
                dialogue.append(self.message({**stored, **result}))
            dialogue.append(self.message(step.body["message"]))
        return dialogue

    def message(self, stored: Mapping[str, Any]) -> Message:
        """A message from its stored form (``message_to_json``)."""
        return Message(
            role=stored["role"],
            content=stored["content"],
            reasoning=stored.get("reasoning", ""),
            images=tuple(self.media(*image) for image in stored.get("images", ())),
            tool_call_id=stored.get("tool_call_id", ""),
            tool_calls=tuple(ToolCall(**call) for call in stored.get("tool_calls", ())),
        )


def _episode(row: tuple[Any, ...]) -> EpisodeRecord:
    return EpisodeRecord(
        id=row[0],
        task=json.loads(row[1]),
        model=row[2],
        settings=json.loads(row[3]),
        started_ns=row[4],
        ended_ns=row[5],
        status=row[6],
        output=row[7],
        error=row[8],
        summary=json.loads(row[9]) if row[9] else None,
    )
