"""An episode as a directed acyclic graph of stages.

A node is one turn of one agent, ``PATH#STAGE``. Edges say what had to end first:

    main#0 ──> main#1                         the next turn of the same agent
    main#0 ──> main/a.0#0 ──> main/a.0#1 ──┐  a sub-agent that turn 0 launched
    main#0 ──> main/b.1#0 ─────────────────┴─> main#1      and the join

With every node worth one step, the longest path is the number of critical steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from swarm_sdk.errors import ConfigError, LedgerError
from swarm_sdk.runtime.critical_steps import StageSteps, critical_steps
from swarm_sdk.traces.ledger import AgentRecord, Ledger


@dataclass(frozen=True, slots=True)
class Node:
    """One turn of one agent."""

    path: str
    stage: int

    def __str__(self) -> str:
        return f"{self.path}#{self.stage}"


class StageGraph:
    """The stages of one episode, grown while it runs or read from the ledger."""

    def __init__(self) -> None:
        self.parents: dict[str, Node | None] = {}
        """Which turn launched each agent; ``None`` for the orchestrator."""
        self.lengths: dict[str, int] = {}
        """How many turns each agent has had."""
        self._launched: dict[str, dict[int, list[str]]] = {}
        """Sub-agents by the agent and the turn that launched them."""

    def add_agent(self, path: str, parent: Node | None = None) -> None:
        """Add an agent, launched by the turn ``parent`` (``None`` for the orchestrator).

        Raises:
            ConfigError: the path exists, or the parent's turn does not.
        """
        if path in self.lengths:
            raise ConfigError(f"the stage graph holds an agent '{path}' already")
        if parent is not None:
            if not 0 <= parent.stage < self.lengths.get(parent.path, 0):
                raise ConfigError(f"the stage graph has no stage '{parent}' to launch '{path}'")
            self._launched.setdefault(parent.path, {}).setdefault(parent.stage, []).append(path)
        self.parents[path] = parent
        self.lengths[path] = 0

    def add_stage(self, path: str) -> None:
        """Add the next turn of an agent; it waits for all that the previous turn launched.

        Raises:
            ConfigError: there is no such agent.
        """
        if path not in self.lengths:
            raise ConfigError(f"the stage graph has no agent '{path}'")
        self.lengths[path] += 1

    def node(self, path: str) -> Node:
        """The last turn of an agent."""
        return Node(path, self.lengths[path] - 1)

    @property
    def graph(self) -> nx.DiGraph[Node]:
        """The stages as a new networkx graph."""
        graph: nx.DiGraph[Node] = nx.DiGraph()
        for path, length in self.lengths.items():
            for stage in range(length):
                node = Node(path, stage)
                graph.add_node(node)
                if stage:
                    previous = Node(path, stage - 1)
                    graph.add_edge(previous, node)
                    for child in self.children(previous):
                        graph.add_edges_from((end, node) for end in self._ends(child))
                elif (parent := self.parents[path]) is not None:
                    graph.add_edge(parent, node)
        return graph

    def _ends(self, path: str) -> Iterator[Node]:
        """The turns with which an agent ended: its last, and those of children it never joined."""
        if self.lengths[path]:
            last = Node(path, self.lengths[path] - 1)
            yield last
            for child in self.children(last):
                yield from self._ends(child)

    def children(self, node: Node) -> Sequence[str]:
        """Paths of the sub-agents that a turn launched, in order."""
        return self._launched.get(node.path, {}).get(node.stage, ())

    def critical_steps(self, path: str = "main") -> int:
        """Critical steps of an agent and all below it, by the report's formula."""
        launched = self._launched.get(path, {})
        parallel = critical_steps(
            StageSteps(main_steps=1, sub_steps=tuple(map(self.critical_steps, children)))
            for children in launched.values()
        )
        return parallel + self.lengths.get(path, 0) - len(launched)  # other turns cost one each

    @property
    def total_steps(self) -> int:
        """Turns of all agents."""
        return sum(self.lengths.values())

    def critical_path(self) -> list[Node]:
        """The longest chain of turns; its length is ``critical_steps()``."""
        return list(nx.dag_longest_path(self.graph, default_weight=1))

    def to_json(self) -> dict[str, Any]:
        """Nodes, edges and the critical path, by name."""
        graph = self.graph
        critical = set(nx.dag_longest_path(graph, default_weight=1))
        return {
            "nodes": [
                {
                    "id": str(node),
                    "agent": node.path,
                    "stage": node.stage,
                    "critical": node in critical,
                }
                for node in graph
            ],
            "edges": [[str(before), str(after)] for before, after in graph.edges],
            "critical_steps": self.critical_steps(),
            "total_steps": self.total_steps,
        }


def read_stage_graph(ledger: Ledger, episode_id: str) -> StageGraph:
    """The graph of a recorded episode: equal to the one that grew while it ran."""
    graph = StageGraph()
    agents = {agent.path: agent for agent in ledger.agents(episode_id)}
    for step in ledger.steps(episode_id):
        if step.kind != "sample":
            continue
        path = step.agent_path
        if path not in graph.lengths:
            if path not in agents:
                raise LedgerError(f"episode {episode_id} has steps of '{path}', which never began")
            graph.add_agent(path, parent_of(agents[path]))
        graph.add_stage(path)
    return graph


def parent_of(agent: AgentRecord) -> Node | None:
    """The turn that launched a recorded agent."""
    return None if agent.parent_path is None else Node(agent.parent_path, agent.parent_stage or 0)
