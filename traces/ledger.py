"""The ledger: one SQLite file (WAL) a run directory, all that happened, committed step by step.

    episodes 1 ── n agents 1 ── n steps                     media: pictures, once each, by SHA-256

A step is one of three records, in the order in which an agent lived them:

    observe   messages that entered the context, and the ids they became
    sample    one model turn: generation prompt, sampled ids, their log-probabilities, the message
    tool      one tool call's result (its text stands here once; ``observe`` refers to it)

Concatenating ``prompt_ids`` and ``token_ids`` of an agent's observe and sample steps gives the
context that its model saw, bit for bit. Ids are stored as little-endian int32, log-probabilities
as float32. Readers: the viewer, resume, the trainer.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from swarm_sdk.errors import LedgerError
from swarm_sdk.types import Image, Message, ToolCall

SCHEMA_VERSION = 1
FILE_NAME = "ledger.db"
StepKind = Literal["observe", "sample", "tool"]

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE episodes (
    id TEXT PRIMARY KEY, task TEXT NOT NULL, model TEXT NOT NULL, settings TEXT NOT NULL,
    started_ns INTEGER NOT NULL, ended_ns INTEGER, status TEXT, output TEXT, summary TEXT
);
CREATE TABLE agents (
    episode_id TEXT NOT NULL REFERENCES episodes (id), path TEXT NOT NULL,
    parent_path TEXT, parent_stage INTEGER, name TEXT NOT NULL, model TEXT NOT NULL,
    started_ns INTEGER NOT NULL, ended_ns INTEGER, status TEXT, output TEXT,
    PRIMARY KEY (episode_id, path)
) WITHOUT ROWID;
CREATE TABLE steps (
    id INTEGER PRIMARY KEY, episode_id TEXT NOT NULL REFERENCES episodes (id),
    agent_path TEXT NOT NULL, stage INTEGER NOT NULL, kind TEXT NOT NULL,
    body TEXT NOT NULL, prompt_ids BLOB, token_ids BLOB, logprobs BLOB, weight_version INTEGER,
    started_ns INTEGER NOT NULL, ended_ns INTEGER NOT NULL
);
CREATE INDEX steps_of_agent ON steps (episode_id, agent_path, id);
CREATE TABLE media (sha256 TEXT PRIMARY KEY, media_type TEXT NOT NULL, data BLOB NOT NULL);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One row of ``steps``."""

    agent_path: str
    stage: int
    """Index of the agent's turn, from 0; an observation carries the turn that follows it, a tool
    call the turn that asked for it."""
    kind: StepKind
    body: Mapping[str, Any]
    """observe: ``messages``; sample: ``message``, ``finish_reason``, ``usage``; tool: ``call_id``,
    ``name``, ``content``, ``images``, ``error``."""
    prompt_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    weight_version: int | None = None
    started_ns: int = 0
    ended_ns: int = 0
    id: int = 0


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
    ended_ns: int | None = None
    status: str | None = None
    """``None`` while it runs, and after a crash."""
    output: str | None = None


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
    summary: Mapping[str, Any] | None = None
    """``critical_steps``, ``total_steps``, token counts; ``None`` while it runs."""


def _pack(kind: str, numbers: Sequence[float]) -> bytes | None:
    if not numbers:
        return None
    packed = array(kind, numbers)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def _unpack(kind: str, blob: bytes | None) -> tuple[Any, ...]:
    if blob is None:
        return ()
    packed = array(kind)
    packed.frombytes(blob)
    if sys.byteorder == "big":
        packed.byteswap()
    return tuple(packed)


def message_to_json(message: Message) -> dict[str, Any]:
    """The stored form of a message: defaults left out, pictures by digest."""
    stored: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        stored["reasoning"] = message.reasoning
    if message.images:
        stored["images"] = [[image.sha256, image.name] for image in message.images]
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


class Ledger:
    """The open ledger of a run directory; safe to use from several threads of one process.

    Args:
        directory: the run directory; made if it is missing.
        readonly: open an existing ledger without the right to write.

    Raises:
        LedgerError: the directory holds no ledger (``readonly``), or one of another version, or
            the file is not a ledger.
    """

    def __init__(self, directory: Path | str, *, readonly: bool = False) -> None:
        self.directory = Path(directory)
        self.path = self.directory / FILE_NAME
        self._lock = threading.Lock()
        if readonly and not self.path.is_file():
            raise LedgerError(f"no episodes are recorded in '{self.directory}'; run one first")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                f"file:{self.path}?mode={'ro' if readonly else 'rwc'}",
                uri=True,
                isolation_level=None,
                check_same_thread=False,
            )
            if not readonly:
                self._db.execute("PRAGMA journal_mode = WAL")
                self._db.execute("PRAGMA synchronous = NORMAL")
            self._check_version(create=not readonly)
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(f"the ledger '{self.path}' cannot be opened: {error}") from error

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
        """Close the file; what was committed stays."""
        with self._lock:
            self._db.close()

    def _write(self, statement: str, values: Sequence[Any]) -> int:
        try:
            with self._lock:
                return int(self._db.execute(statement, values).lastrowid or 0)
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger '{self.path}' cannot be written: {error}") from error

    def _read(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        try:
            with self._lock:
                return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise LedgerError(f"the ledger '{self.path}' cannot be read: {error}") from error

    # -- writing: each call is one committed transaction ---------------------------------------

    def begin_episode(self, episode: EpisodeRecord) -> None:
        """Commit that an episode started."""
        self._write(
            "INSERT INTO episodes (id, task, model, settings, started_ns) VALUES (?, ?, ?, ?, ?)",
            (
                episode.id,
                json.dumps(episode.task),
                episode.model,
                json.dumps(episode.settings),
                episode.started_ns,
            ),
        )

    def end_episode(
        self,
        episode_id: str,
        *,
        status: str,
        output: str,
        summary: Mapping[str, Any],
        ended_ns: int,
    ) -> None:
        """Commit how an episode ended."""
        self._write(
            "UPDATE episodes SET ended_ns = ?, status = ?, output = ?, summary = ? WHERE id = ?",
            (ended_ns, status, output, json.dumps(summary), episode_id),
        )

    def begin_agent(self, episode_id: str, agent: AgentRecord) -> None:
        """Commit that an agent started."""
        self._write(
            "INSERT INTO agents (episode_id, path, parent_path, parent_stage, name, model,"
            " started_ns) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                episode_id,
                agent.path,
                agent.parent_path,
                agent.parent_stage,
                agent.name,
                agent.model,
                agent.started_ns,
            ),
        )

    def end_agent(
        self, episode_id: str, path: str, *, status: str, output: str, ended_ns: int
    ) -> None:
        """Commit how an agent ended."""
        self._write(
            "UPDATE agents SET ended_ns = ?, status = ?, output = ?"
            " WHERE episode_id = ? AND path = ?",
            (ended_ns, status, output, episode_id, path),
        )

    def append(self, episode_id: str, step: StepRecord) -> int:
        """Commit one step; returns its id."""
        return self._write(
            "INSERT INTO steps (episode_id, agent_path, stage, kind, body, prompt_ids, token_ids,"
            " logprobs, weight_version, started_ns, ended_ns)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                episode_id,
                step.agent_path,
                step.stage,
                step.kind,
                json.dumps(step.body, ensure_ascii=False),
                _pack("i", step.prompt_ids),
                _pack("i", step.token_ids),
                _pack("f", step.logprobs),
                step.weight_version,
                step.started_ns,
                step.ended_ns,
            ),
        )

    def put_media(self, images: Sequence[Image]) -> None:
        """Commit pictures; those already held are skipped."""
        for image in images:
            self._write(
                "INSERT OR IGNORE INTO media VALUES (?, ?, ?)",
                (image.sha256, image.media_type, image.data),
            )

    # -- reading ------------------------------------------------------------------------------

    def episodes(self) -> list[EpisodeRecord]:
        """All episodes, oldest first."""
        rows = self._read("SELECT * FROM episodes ORDER BY started_ns, rowid")
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
            "SELECT path, parent_path, parent_stage, name, model, started_ns, ended_ns, status,"
            " output FROM agents WHERE episode_id = ? ORDER BY started_ns, path",
            (episode_id,),
        )
        names = tuple(AgentRecord.__dataclass_fields__)
        return [AgentRecord(**dict(zip(names, row, strict=True))) for row in rows]

    def steps(self, episode_id: str, agent_path: str | None = None) -> Iterator[StepRecord]:
        """The steps of an episode, or of one of its agents, in the order of their commits."""
        rows = self._read(
            "SELECT agent_path, stage, kind, body, prompt_ids, token_ids, logprobs, weight_version,"
            " started_ns, ended_ns, id FROM steps WHERE episode_id = ?1"
            " AND (?2 IS NULL OR agent_path = ?2) ORDER BY id",
            (episode_id, agent_path),
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
                started_ns=row[8],
                ended_ns=row[9],
                id=row[10],
            )

    def media(self, sha256: str, name: str = "") -> Image:
        """A stored picture.

        Raises:
            LedgerError: the ledger does not hold it.
        """
        rows = self._read("SELECT media_type, data FROM media WHERE sha256 = ?", (sha256,))
        if not rows:
            raise LedgerError(f"the ledger '{self.path}' lacks the picture {sha256}")
        return Image(data=rows[0][1], media_type=rows[0][0], name=name)

    def messages(self, episode_id: str, agent_path: str) -> list[Message]:
        """The dialogue of one agent, read back: what it saw and what it said."""
        tool_results: dict[str, Mapping[str, Any]] = {}
        dialogue: list[Message] = []
        for step in self.steps(episode_id, agent_path):
            if step.kind == "tool":
                tool_results[step.body["call_id"]] = step.body
            elif step.kind == "sample":
                dialogue.append(self._message(step.body["message"]))
            else:
                for stored in step.body["messages"]:
                    result: Mapping[str, Any] = {}
                    if stored["role"] == "tool":
                        told = tool_results[stored["tool_call_id"]]
                        result = {"content": told["content"], "images": told["images"]}
                    dialogue.append(self._message({**stored, **result}))
        return dialogue

    def _message(self, stored: Mapping[str, Any]) -> Message:
        return Message(
            role=stored["role"],
            content=stored["content"],
            reasoning=stored.get("reasoning", ""),
            images=tuple(self.media(digest, name) for digest, name in stored.get("images", ())),
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
        summary=json.loads(row[8]) if row[8] else None,
    )
