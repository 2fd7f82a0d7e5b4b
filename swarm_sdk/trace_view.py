"""A recorded episode for people and machines: its stages as a tree, the critical path marked."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from swarm_sdk.runtime.stage_graph import Node, StageGraph, parent_of, read_stage_graph
from swarm_sdk.traces.ledger import EpisodeRecord, Ledger, StepRecord


def episode_to_json(ledger: Ledger, episode: EpisodeRecord) -> dict[str, Any]:
    """Everything `swarm trace show` knows of an episode, token counts but not token ids."""
    graph = read_stage_graph(ledger, episode.id)
    return {
        "episode_id": episode.id,
        "task": dict(episode.task),
        "model": episode.model,
        "status": episode.status or "unfinished",
        "output": episode.output,
        "summary": episode.summary,
        "graph": graph.to_json(),
        "agents": [
            {
                "path": agent.path,
                "name": agent.name,
                "status": agent.status or "unfinished",
                "launched_by": None if (node := parent_of(agent)) is None else str(node),
                "steps": graph.lengths.get(agent.path, 0),
                "wall_s": None
                if agent.ended_ns is None
                else _wall_s(agent.started_ns, agent.ended_ns),
                "output": agent.output,
            }
            for agent in ledger.agents(episode.id)
        ],
        "steps": [_step_to_json(step) for step in ledger.steps(episode.id)],
    }


def _step_to_json(step: StepRecord) -> dict[str, Any]:
    return {
        "id": step.id,
        "agent": step.agent_path,
        "stage": step.stage,
        "kind": step.kind,
        "num_context_ids": len(step.prompt_ids),
        "num_sampled_ids": len(step.token_ids),
        "wall_s": _wall_s(step.started_ns, step.ended_ns),
        **step.body,
    }


def _wall_s(started_ns: int, ended_ns: int) -> float:
    return round((ended_ns - started_ns) / 1e9, 4)


def print_episode(ledger: Ledger, episode: EpisodeRecord, console: Console) -> None:
    """Draw the stages of an episode; ``*`` marks the critical path."""
    console.print(_drawing(ledger, episode))


def _drawing(ledger: Ledger, episode: EpisodeRecord) -> RenderableType:
    graph = read_stage_graph(ledger, episode.id)
    critical = set(graph.critical_path())
    steps = list(ledger.steps(episode.id))
    tree = Tree(Text("main", style="bold"), guide_style="dim")
    _add_agent(tree, "main", graph, critical, steps)
    tokens = sum(len(step.token_ids) for step in steps if step.kind == "sample")
    head = Text.assemble(
        (f"episode {episode.id}", "bold"),
        f"  {episode.status or 'unfinished'}  model {episode.model}\n",
        f"task: {episode.task['prompt']}\n",
        f"critical steps {graph.critical_steps()} of {graph.total_steps} in total, "
        f"{tokens} sampled tokens on record; * marks the critical path",
    )
    return Group(head, tree, Text(f"answer: {episode.output or '(none)'}"))


def _add_agent(
    tree: Tree, path: str, graph: StageGraph, critical: set[Node], steps: list[StepRecord]
) -> None:
    for stage in range(graph.lengths.get(path, 0)):
        node = Node(path, stage)
        mine = [s for s in steps if s.agent_path == path and s.stage == stage]
        said = next(s for s in mine if s.kind == "sample")
        mark = ("* ", "bold red") if node in critical else ("  ", "")
        wall_s = _wall_s(said.started_ns, said.ended_ns)
        line = Text.assemble(
            mark, (f"stage {stage} ", "cyan"), _said(said), (f"  {wall_s:.2f} s", "dim")
        )
        branch = tree.add(line)
        for child in graph.children(node):
            _add_agent(branch.add(Text(child, style="bold")), child, graph, critical, steps)
        for call in (s for s in mine if s.kind == "tool" and s.body["name"] != "assign_task"):
            style = "red" if call.body["error"] else "dim"
            branch.add(Text(f"{call.body['name']} -> {_short(call.body['content'])}", style=style))


def _said(step: StepRecord) -> str:
    message = step.body["message"]
    made = [call["name"] for call in message.get("tool_calls", ())]
    counted = [f"{made.count(name)} x {name}" for name in dict.fromkeys(made)]
    return ", ".join(counted) or _short(message["content"])


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
