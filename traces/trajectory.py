"""From the ledger to what training reads: branches of ids, exactly as the model saw them.

    prompt ids (mask 0) | sampled ids (mask 1) | prompt ids (mask 0) | sampled ids (mask 1) | …

An agent has one branch, and one more for each time that its context was begun anew.

The ids are those of the record; text is never tokenised again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from swarm_sdk.errors import LedgerError
from swarm_sdk.traces.ledger import Ledger, StepRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One context of one agent at its end: four sequences of one length."""

    episode_id: str
    agent_path: str
    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    """True where the agent's model sampled the token; prompts and tool results are False."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each sampled token; 0.0 elsewhere."""
    weight_versions: tuple[int, ...]
    """Policy version of each sampled token; -1 elsewhere."""


def branches_of(episode_id: str, agent_path: str, steps: Iterable[StepRecord]) -> list[Branch]:
    """The branches of one agent from its steps, in order; none where its model never spoke.

    Raises:
        LedgerError: the agent's model told no token ids (a chat-only server).
    """
    found: list[Branch] = []
    token_ids: list[int] = []
    is_sampled: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []

    def end() -> None:
        if token_ids:
            found.append(
                Branch(
                    episode_id=episode_id,
                    agent_path=agent_path,
                    token_ids=tuple(token_ids),
                    is_sampled=tuple(is_sampled),
                    logprobs=tuple(logprobs),
                    weight_versions=tuple(versions),
                )
            )
        for column in (token_ids, is_sampled, logprobs, versions):
            column.clear()

    for step in steps:
        if step.kind != "sample":
            continue
        if not step.token_ids:
            raise LedgerError(
                f"episode {episode_id} holds no token ids of {agent_path}: it ran on a server that "
                "speaks chat completions only; use SGLang or the embedded engine to train from it"
            )
        if step.body.get("reset"):
            end()
        num_entered, num_sampled = len(step.prompt_ids), len(step.token_ids)
        token_ids += [*step.prompt_ids, *step.token_ids]
        is_sampled += [False] * num_entered + [True] * num_sampled
        logprobs += [*[0.0] * num_entered, *step.logprobs]
        versions += [-1] * num_entered + [step.weight_version or 0] * num_sampled
    end()
    return found


def branches(ledger: Ledger, episode_id: str) -> list[Branch]:
    """The branches of all agents of the episode, the orchestrator's first."""
    steps: dict[str, list[StepRecord]] = {agent.path: [] for agent in ledger.agents(episode_id)}
    for step in ledger.steps(episode_id):
        steps[step.agent_path].append(step)
    return [branch for path, own in steps.items() for branch in branches_of(episode_id, path, own)]
