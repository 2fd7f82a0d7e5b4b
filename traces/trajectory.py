"""From the ledger to what training reads: a graph of messages, and its branches.

    node   one message or group of messages: only the ids that it adds, once
    main   [prompt]──[turn]──[results]──[turn]──[results]──[turn]        branch 1
                        │                  └─(reset)─ [kept]──[turn]     branch 2
                        └─ launched ─> main/finder.0  [prompt]──[turn]   branch 3
    branch leaf to root, turned round:   prompt ids (mask 0) | sampled ids (mask 1) | …

Only ids that the orchestrator sampled have mask 1: prompts, tool results and everything of
sub-agents are what it saw, and ``Branch.mask`` is derived from who sampled, so no caller can set
it otherwise. The ids are those of the record; text is never tokenised again.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from swarm_sdk.errors import NotTrainable
from swarm_sdk.traces.ledger import AgentRecord, Ledger, StepRecord
from swarm_sdk.types import RoutedExperts

ORCHESTRATOR = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageNode:
    """What entered a context at one point: observed messages, or one sampled turn."""

    id: int
    parent: int | None
    """The node before it in its context; ``None`` where the context begins."""
    agent_path: str
    stage: int
    kind: Literal["observed", "sampled"]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    """Of sampled ids; empty for observed ones."""
    versions: tuple[int, ...] = ()
    """Policy version of each sampled id; empty for observed ones."""
    media: tuple[str, ...] = ()
    """SHA-256 of the pictures that the messages show, in order."""
    experts: RoutedExperts | None = None
    """Of a sampled node: what its turn recorded, which covers the observed ids before it."""
    step_id: int = 0
    """The ledger's row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One context of one agent at its end: sequences of one length."""

    episode_id: str
    agent_path: str
    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    """True where the agent's model sampled the token; prompts and tool results are False."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each sampled token; 0.0 elsewhere."""
    weight_versions: tuple[int, ...]
    """Policy version of each sampled token; -1 elsewhere."""
    media: tuple[str, ...] = ()
    """SHA-256 of the pictures that it shows, in order."""
    experts: RoutedExperts | None = None
    """Which experts the engine chose at each position but the last; ``None`` unless every turn
    recorded its part."""

    @property
    def is_orchestrator(self) -> bool:
        """Whether this is a context of the agent that is trained."""
        return self.agent_path == ORCHESTRATOR

    @property
    def mask(self) -> tuple[bool, ...]:
        """True where the token is trained: sampled, and by the orchestrator."""
        return self.is_sampled if self.is_orchestrator else (False,) * len(self.is_sampled)


class MessageGraph:
    """All contexts of an episode; every message stands in it once."""

    def __init__(self, episode_id: str) -> None:
        self.episode_id: str = episode_id
        self.nodes: list[MessageNode] = []
        self.leaves: list[int] = []
        """The last node of each branch, the orchestrator's first."""
        self.launched_by: dict[str, tuple[str, int]] = {}
        """Sub-agent -> agent and turn that launched it."""

    def add_agent(self, agent: AgentRecord, steps: Iterable[StepRecord]) -> None:
        """Add the contexts of one agent.

        Raises:
            NotTrainable: its model told no token ids (a chat-only server), or the log-probabilities
                are not one finite number an id.
        """
        if agent.parent_path is not None:
            self.launched_by[agent.path] = (agent.parent_path, agent.parent_stage or 0)
        pictures: dict[str, list[str]] = {}
        last: int | None = None
        for step in steps:
            if step.kind == "tool":
                pictures[step.body["call_id"]] = [one[0] for one in step.body["images"]]
                continue
            self._check(step)
            if step.body.get("reset") and last is not None:
                self.leaves.append(last)
                last = None
            media = [
                digest
                for message in step.body.get("observed", ())
                for digest in _media(message, pictures)
            ]
            if step.prompt_ids:
                last = self._add(step, last, "observed", step.prompt_ids, media=tuple(media))
            last = self._add(
                step,
                last,
                "sampled",
                step.token_ids,
                logprobs=tuple(step.logprobs),
                versions=_versions(step),
                experts=step.experts,
            )
        if last is not None:
            self.leaves.append(last)

    def branches(self) -> list[Branch]:
        """The contexts from their beginning to their end."""
        return [self._branch(leaf) for leaf in self.leaves]

    def path(self, leaf: int) -> list[MessageNode]:
        """The nodes of a branch, first to last."""
        found: list[MessageNode] = []
        at: int | None = leaf
        while at is not None:
            found.append(self.nodes[at])
            at = self.nodes[at].parent
        return found[::-1]

    def _add(
        self,
        step: StepRecord,
        parent: int | None,
        kind: Literal["observed", "sampled"],
        token_ids: Sequence[int],
        *,
        logprobs: tuple[float, ...] = (),
        versions: tuple[int, ...] = (),
        media: tuple[str, ...] = (),
        experts: RoutedExperts | None = None,
    ) -> int:
        node = MessageNode(
            id=len(self.nodes),
            parent=parent,
            agent_path=step.agent_path,
            stage=step.stage,
            kind=kind,
            token_ids=tuple(token_ids),
            logprobs=logprobs,
            versions=versions,
            media=media,
            experts=experts,
            step_id=step.id,
        )
        self.nodes.append(node)
        return node.id

    def _check(self, step: StepRecord) -> None:
        where = f"step {step.id} of {step.agent_path} in episode {self.episode_id}"
        if not step.token_ids:
            raise NotTrainable(
                "no_token_ids",
                f"episode {self.episode_id} holds no token ids of {step.agent_path}: it ran on a "
                "server that speaks chat completions only; use SGLang or the embedded engine to "
                "train from it",
            )
        if len(step.logprobs) != len(step.token_ids):
            raise NotTrainable(
                "no_logprobs",
                f"{where} holds {len(step.logprobs)} log-probabilities for "
                f"{len(step.token_ids)} sampled ids; ask the server for them (return_logprob)",
            )
        if not all(map(math.isfinite, step.logprobs)):
            raise NotTrainable(
                "non_finite_logprobs",
                f"{where} holds a log-probability that is no finite number; the server's sampler "
                "and its log-probabilities disagree",
            )

    def _branch(self, leaf: int) -> Branch:
        nodes = self.path(leaf)
        is_sampled: list[bool] = []
        logprobs: list[float] = []
        versions: list[int] = []
        for node in nodes:
            num, sampled = len(node.token_ids), node.kind == "sampled"
            is_sampled += [sampled] * num
            logprobs += node.logprobs if sampled else [0.0] * num
            versions += node.versions if sampled else [-1] * num
        token_ids = tuple(one for node in nodes for one in node.token_ids)
        return Branch(
            episode_id=self.episode_id,
            agent_path=nodes[0].agent_path,
            token_ids=token_ids,
            is_sampled=tuple(is_sampled),
            logprobs=tuple(logprobs),
            weight_versions=tuple(versions),
            media=tuple(digest for node in nodes for digest in node.media),
            experts=_joined([n.experts for n in nodes if n.kind == "sampled"], len(token_ids) - 1),
        )


def message_graph(ledger: Ledger, episode_id: str, agent_path: str | None = None) -> MessageGraph:
    """The contexts of an episode, or of one of its agents.

    Raises:
        NotTrainable: as ``MessageGraph.add_agent``.
    """
    agents = [a for a in ledger.agents(episode_id) if agent_path in (None, a.path)]
    steps: dict[str, list[StepRecord]] = {agent.path: [] for agent in agents}
    for step in ledger.steps(episode_id, agent_path):
        steps[step.agent_path].append(step)
    graph = MessageGraph(episode_id)
    for agent in agents:
        graph.add_agent(agent, steps[agent.path])
    return graph


def branches(ledger: Ledger, episode_id: str) -> list[Branch]:
    """The branches of all agents of the episode, the orchestrator's first.

    Raises:
        NotTrainable: as ``MessageGraph.add_agent``.
    """
    return message_graph(ledger, episode_id).branches()


def orchestrator_branches(ledger: Ledger, episode_id: str) -> list[Branch]:
    """The branches that train; the sub-agents' ids are not even read.

    Raises:
        NotTrainable: as ``MessageGraph.add_agent``.
    """
    return message_graph(ledger, episode_id, ORCHESTRATOR).branches()


def _media(message: dict[str, object], pictures: dict[str, list[str]]) -> Iterator[str]:
    """Digests of the pictures of an observed message; a tool's stand in its own step."""
    stored = message.get("images")
    if isinstance(stored, list):
        yield from (one[0] for one in stored)
    elif message.get("role") == "tool":
        yield from pictures.get(str(message.get("tool_call_id")), [])


def _joined(parts: list[RoutedExperts | None], num_positions: int) -> RoutedExperts | None:
    """The turns' experts end to end; ``None`` where a part or a position is missing."""
    known = [part for part in parts if part is not None]
    shapes = {(part.num_layers, part.num_chosen) for part in known}
    if len(known) < len(parts) or len(shapes) != 1 or sum(map(len, known)) != num_positions:
        return None
    ((num_layers, num_chosen),) = shapes
    return RoutedExperts(
        data=b"".join(part.data for part in known), num_layers=num_layers, num_chosen=num_chosen
    )


def _versions(step: StepRecord) -> tuple[int, ...]:
    spans = step.body.get("version_spans") or [(step.weight_version or 0, len(step.token_ids))]
    return tuple(version for version, num in spans for _ in range(num))
