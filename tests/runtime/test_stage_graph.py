"""The stage graph: joins, the longest path, and the formula of the report."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarm_sdk.errors import ConfigError
from swarm_sdk.runtime.critical_steps import StageSteps, critical_steps
from swarm_sdk.runtime.stage_graph import Node, StageGraph


def test_the_formula_of_the_report_on_its_own_example() -> None:
    stages = [StageSteps(main_steps=1, sub_steps=(4, 9)), StageSteps(main_steps=2)]
    assert critical_steps(stages) == 12
    assert critical_steps([]) == 0
    with pytest.raises(ConfigError):
        StageSteps(main_steps=-1)


@st.composite
def graphs(draw: st.DrawFn) -> StageGraph:
    graph = StageGraph()

    def agent(path: str, parent: Node | None, depth: int) -> None:
        graph.add_agent(path, parent)
        for _ in range(draw(st.integers(0, 3))):
            graph.add_stage(path)
            node = graph.node(path)
            for child in range(draw(st.integers(0, 2)) if depth < 2 else 0):
                agent(f"{path}/{node.stage}.{child}", node, depth + 1)

    agent("main", None, 0)
    return graph


@given(graphs())
def test_the_longest_path_is_the_number_of_critical_steps(graph: StageGraph) -> None:
    assert len(graph.critical_path()) == graph.critical_steps()


def test_the_next_turn_waits_for_all_that_the_last_one_launched() -> None:
    graph = StageGraph()
    graph.add_agent("main")
    graph.add_stage("main")
    first = graph.node("main")
    for path in ("main/a.0", "main/b.1"):
        graph.add_agent(path, first)
        graph.add_stage(path)
    graph.add_stage("main")
    second = graph.node("main")
    assert {str(n) for n in graph.graph.predecessors(second)} == {
        "main#0",
        "main/a.0#0",
        "main/b.1#0",
    }


def test_dangling_and_double_agents_are_refused() -> None:
    graph = StageGraph()
    with pytest.raises(ConfigError, match="no stage"):
        graph.add_agent("main/a.0", Node("main", 0))
    with pytest.raises(ConfigError, match="no agent"):
        graph.add_stage("main")
    graph.add_agent("main")
    with pytest.raises(ConfigError, match="already"):
        graph.add_agent("main")
