"""From the ledger to what training reads: one branch an agent, ids exactly as its model saw them.

    observe ids (mask 0) | generation prompt (mask 0) | sampled ids (mask 1) | observe ids …

The ids are those of the record; text is never tokenised again.
"""

from __future__ import annotations

from dataclasses import dataclass

from swarm_sdk.errors import LedgerError
from swarm_sdk.traces.ledger import AgentRecord, Ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """The context of one agent at its end: four sequences of one length."""

    episode_id: str
    agent_path: str
    token_ids: tuple[int, ...]
    is_sampled: tuple[bool, ...]
    """True where the agent's model sampled the token; prompts and tool results are False."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each sampled token; 0.0 elsewhere."""
    weight_versions: tuple[int, ...]
    """Policy version of each sampled token; -1 elsewhere."""


def branch(ledger: Ledger, episode_id: str, agent: AgentRecord) -> Branch:
    """The branch of one agent.

    Raises:
        LedgerError: the agent's model told no token ids (a chat-only server).
    """
    token_ids: list[int] = []
    is_sampled: list[bool] = []
    logprobs: list[float] = []
    versions: list[int] = []
    for step in ledger.steps(episode_id, agent.path):
        if step.kind == "tool":
            continue
        if step.kind == "sample" and not step.token_ids:
            raise LedgerError(
                f"episode {episode_id} holds no token ids of {agent.path}: it ran on a server that "
                "speaks chat completions only; use SGLang or the embedded engine to train from it"
            )
        context = step.prompt_ids + (step.token_ids if step.kind == "observe" else ())
        token_ids += context
        is_sampled += [False] * len(context)
        logprobs += [0.0] * len(context)
        versions += [-1] * len(context)
        if step.kind == "sample":
            token_ids += step.token_ids
            is_sampled += [True] * len(step.token_ids)
            logprobs += step.logprobs
            versions += [step.weight_version or 0] * len(step.token_ids)
    return Branch(
        episode_id=episode_id,
        agent_path=agent.path,
        token_ids=tuple(token_ids),
        is_sampled=tuple(is_sampled),
        logprobs=tuple(logprobs),
        weight_versions=tuple(versions),
    )


def branches(ledger: Ledger, episode_id: str) -> list[Branch]:
    """One branch for each agent of the episode, the orchestrator first."""
    return [branch(ledger, episode_id, agent) for agent in ledger.agents(episode_id)]
