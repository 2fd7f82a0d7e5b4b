"""The record of an earlier process, so that an episode goes on from where it was committed.

    resume = run again from the start, with the record as the oracle

Each turn on record is appended to its dialogue instead of being asked for, each tool result on
record is taken instead of calling the tool; where the record ends, the agent goes on living. The
prompt that each turn was sampled from is made again and compared, id by id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swarm_sdk.errors import ConfigError
from swarm_sdk.traces.ledger import AgentRecord, EpisodeRecord, Ledger, StepRecord
from swarm_sdk.types import Generation, Message, ToolOutput, Turn, Usage

ENDED = frozenset({"done", "truncated", "out_of_budget", "overflow", "failed"})
"""How agents and episodes end for good; what was cancelled can go on."""


class ReplayMismatch(ConfigError):
    """Raised if a resumed episode does not fit its record."""


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """A turn on record."""

    turn: Turn
    """Its ``prompt_ids`` are all ids that entered the context since the turn before."""
    observed: tuple[Message, ...]
    """What entered the context; tool messages have their text only where the context was reset."""
    reset: Mapping[str, Any] | None


@dataclass(slots=True)
class RecordedAgent:
    """What is on record of one agent."""

    record: AgentRecord
    turns: list[RecordedTurn] = field(default_factory=list)
    results: dict[str, tuple[ToolOutput, str | None]] = field(default_factory=dict)
    """By call id: output and the kind of its error."""

    @property
    def is_ended(self) -> bool:
        """Whether the agent had ended."""
        return self.record.status in ENDED

    def ended_during(self, stage: int, message: Message) -> bool:
        """Whether the agent had ended while the calls of its turn ``stage`` were running."""
        if not self.is_ended or stage + 1 < len(self.turns):
            return False
        return any(call.id not in self.results for call in message.tool_calls)

    @property
    def usage(self) -> Usage:
        """Tokens of its turns on record."""
        total = Usage()
        for recorded in self.turns:
            total += Usage.of(recorded.turn.generation)
        return total


@dataclass(frozen=True, slots=True)
class Replay:
    """What is on record of an episode that is resumed."""

    episode: EpisodeRecord
    agents: Mapping[str, RecordedAgent]
    wall_s: float
    """Seconds in which a step on record was running."""

    def below(self, path: str) -> list[RecordedAgent]:
        """The agent ``path`` and all its descendants."""
        return [
            agent
            for other, agent in self.agents.items()
            if other == path or other.startswith(f"{path}/")
        ]


def read_replay(ledger: Ledger, episode_id: str) -> Replay:
    """Read what is on record of an unfinished episode.

    Raises:
        ConfigError: the episode has ended.
        LedgerError: there is no such episode.
    """
    episode = ledger.episode(episode_id)
    if episode.status in ENDED:
        raise ConfigError(
            f"episode {episode.id} has ended ({episode.status}); there is nothing to resume"
        )
    agents = {record.path: RecordedAgent(record) for record in ledger.agents(episode.id)}
    worked: list[tuple[int, int]] = []
    for step in ledger.steps(episode.id):
        agent = agents[step.agent_path]
        worked.append((step.started_ns, step.ended_ns))
        if step.kind == "sample":
            agent.turns.append(_turn(ledger, step))
        else:
            body = step.body
            images = tuple(ledger.media(*image) for image in body["images"])
            agent.results[body["call_id"]] = (ToolOutput(body["content"], images), body["error"])
    return Replay(episode, agents, _union_s(worked))


def _union_s(intervals: Sequence[tuple[int, int]]) -> float:
    """Seconds covered by ``intervals`` (ns): the time between two processes counts for nobody."""
    covered_ns, end_ns = 0, 0
    for started_ns, ended_ns in sorted(intervals):
        covered_ns += max(0, ended_ns - max(started_ns, end_ns))
        end_ns = max(end_ns, ended_ns)
    return covered_ns / 1e9


def _turn(ledger: Ledger, step: StepRecord) -> RecordedTurn:
    body = step.body
    reset = body.get("reset")
    return RecordedTurn(
        turn=Turn(
            message=ledger.message(body["message"]),
            generation=Generation(
                token_ids=tuple(step.token_ids),
                logprobs=tuple(step.logprobs),
                finish_reason=body["finish_reason"],
                weight_version=step.weight_version or 0,
                version_spans=tuple((v, num) for v, num in body.get("version_spans", ())),
                routed_experts=step.experts,
                **body["usage"],
            ),
            prompt_ids=tuple(step.prompt_ids),
        ),
        observed=tuple(ledger.message(one) for one in body["observed"]) if reset else (),
        reset=reset,
    )


def check_prompt(path: str, stage: int, entered: Sequence[int], recorded: Sequence[int]) -> None:
    """Compare the ids that enter a context again with those on record.

    Raises:
        ReplayMismatch: they differ, so the episode would not go on from what it was.
    """
    if tuple(recorded[: len(entered)]) != tuple(entered):
        raise ReplayMismatch(
            f"the episode cannot be resumed: the prompt of {path}#{stage} differs from the record; "
            "use the tools, instructions, roles and model of the first run"
        )
