"""The orchestrator's own tools: ``create_subagent`` and ``assign_task``.

The schemas are the report's, word for word (appendix E.8). A sub-agent runs with a context of its
own and gives back its final message only; its failure is a result for its parent, and its siblings
go on. ``read_report`` is ours: it is there only where reports are capped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anyio
from pydantic import TypeAdapter

from swarm_sdk.errors import BudgetExceeded, SubagentError, ToolError
from swarm_sdk.runtime.agent_loop import run_agent
from swarm_sdk.runtime.budget import AgentMeter, Budget, Scope
from swarm_sdk.runtime.events import AgentQueued
from swarm_sdk.runtime.hooks import AgentInfo
from swarm_sdk.runtime.places import Places
from swarm_sdk.runtime.state import AgentOutcome, AgentSpec, EpisodeState
from swarm_sdk.runtime.tool_calls import SpawnTool
from swarm_sdk.types import (
    Model,
    Price,
    RunContext,
    Sampling,
    Tool,
    ToolCall,
    ToolOutput,
    ToolSpec,
    Usage,
)

CREATE_SUBAGENT = ToolSpec(
    "create_subagent",
    "Create a custom subagent with specific system prompt and name for reuse.",
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "description": "Unique name for this agent configuration"},
            "system_prompt": {
                "type": "string",
                "description": "System prompt defining the agent's role, capabilities, and "
                "boundaries",
            },
        },
        "required": ["name", "system_prompt"],
    },
)
ASSIGN_TASK = ToolSpec(
    "assign_task",
    "Launch a new agent.\nUsage notes:\n"
    " 1. You can launch multiple agents concurrently whenever possible, to maximize performance;\n"
    " 2. When the agent is done, it will return a single message back to you.",
    {
        "type": "object",
        "properties": {
            "agent": {"type": "string", "description": "Specify which created agent to use."},
            "prompt": {"type": "string", "description": "The task for the agent to perform"},
        },
        "required": ["agent", "prompt"],
    },
)
READ_REPORT = ToolSpec(
    "read_report",
    "Read one page of a subagent's report that was cut.",
    {
        "type": "object",
        "properties": {
            "agent": {"type": "string", "description": "The agent as the cut report names it"},
            "page": {"type": "integer", "description": "From 1"},
        },
        "required": ["agent", "page"],
    },
)
NAMES = frozenset({CREATE_SUBAGENT.name, ASSIGN_TASK.name, READ_REPORT.name})


@dataclass(frozen=True, slots=True, kw_only=True)
class SubagentConfig:
    """What a name stands for in ``assign_task``."""

    name: str
    instructions: str
    model: Model
    tools: Mapping[str, Tool]
    sampling: Sampling
    max_steps: int
    price: Price
    budget: Budget | None = None
    """Limits of one assignment, with all below it; ``None`` sets none of its own."""
    output: TypeAdapter[Any] | None = None
    """What its report must parse as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What all spawners of an episode share."""

    state: EpisodeState
    declared: Mapping[str, SubagentConfig]
    """Roles that the app declared."""
    invent: Callable[[str, str], SubagentConfig]
    """Configures a sub-agent from a name and a system prompt."""
    slots: Sequence[Places]
    """Places of each level below the orchestrator. A level of its own each: an agent that waits
    for its sub-agents must not hold the place that they wait for."""


class Spawner:
    """The sub-agents of one agent: those that the app declared and those that the model creates."""

    def __init__(self, family: Family, path: str, name: str, meter: AgentMeter) -> None:
        """``path``, ``name`` and ``meter`` are those of the agent whose tools these become."""
        self._family = family
        self._path = path
        self._meter = meter
        self._info = AgentInfo(family.state.episode_id, path, name, family.state.deps)
        self._configs = dict(family.declared)
        self._numbers: dict[str, int] = {}
        self.created: list[str] = []
        """Names of the sub-agents that the model created, in order."""

    @property
    def tools(self) -> list[Tool]:
        """``create_subagent``, ``assign_task`` and, where reports are capped, ``read_report``."""
        tools: list[Tool] = [_CreateTool(self), _AssignTool(self)]
        if self._family.state.limits.max_report_chars is not None:
            tools.append(_ReadTool(self))
        return tools

    def number(self, call_id: str) -> None:
        """Number an assignment; its sub-agent's path carries the number, also when resumed."""
        self._numbers.setdefault(call_id, len(self._numbers))

    def is_launched(self, call: ToolCall) -> bool:
        """Whether the record tells of the sub-agent that a call launched."""
        replay = self._family.state.replay
        path = f"{self._path}/{call.arguments.get('agent')}.{self._numbers.get(call.id)}"
        return replay is not None and path in replay.agents

    def create(self, arguments: Mapping[str, Any]) -> ToolOutput:
        """``create_subagent``."""
        name, system_prompt = _texts(arguments, "name", "system_prompt")
        if not name.strip() or "/" in name or "#" in name:
            raise ToolError("a sub-agent's name must not be empty nor hold '/' or '#'")
        if name in self._configs:
            raise ToolError(
                f"a sub-agent named '{name}' exists already; assign tasks to it or choose another "
                "name"
            )
        self._configs[name] = self._family.invent(name, system_prompt)
        self.created.append(name)
        return ToolOutput(f"created {name}")

    async def assign(self, arguments: Mapping[str, Any], call_id: str) -> ToolOutput:
        """``assign_task``."""
        name, prompt = _texts(arguments, "agent", "prompt")
        config = self._configs.get(name)
        if config is None:
            known = ", ".join(self._configs) or "none; create one first"
            raise ToolError(f"there is no sub-agent named '{name}'; the sub-agents are: {known}")
        state = self._family.state
        path = f"{self._path}/{name}.{self._numbers[call_id]}"
        is_recorded = state.replay is not None and path in state.replay.agents
        if not is_recorded:
            for hooks in state.hooks:
                await hooks.spawn(self._info, path, prompt)
            try:
                self._meter.scope.reserve_agent()
            except BudgetExceeded as exceeded:
                raise ToolError(str(exceeded)) from exceeded
        outcome = await self._launch(config, path, prompt)
        for hooks in state.hooks:
            await hooks.join(self._info, outcome)
        if outcome.status == "done":
            return ToolOutput(self._report(outcome))
        partial = f" Its last message: {outcome.output}" if outcome.output else ""
        sentence = f"the sub-agent '{name}' {outcome.status}: {outcome.error}.{partial}"
        if state.fail_fast:
            raise SubagentError(path, sentence)
        raise ToolError(sentence)

    def read(self, arguments: Mapping[str, Any]) -> ToolOutput:
        """``read_report``."""
        (path,) = _texts(arguments, "agent")
        page, size = arguments.get("page"), self._family.state.limits.max_report_chars
        outcome = self._family.state.outcomes.get(path)
        if outcome is None or not path.startswith(f"{self._path}/"):
            raise ToolError(f"there is no report of an agent '{path}'")
        assert size is not None
        num_pages = max(1, -(-len(outcome.output) // size))
        if isinstance(page, bool) or not isinstance(page, int) or not 1 <= page <= num_pages:
            raise ToolError(f"the report of '{path}' has the pages 1 to {num_pages}, got {page!r}")
        return ToolOutput(outcome.output[(page - 1) * size : page * size])

    def _report(self, outcome: AgentOutcome) -> str:
        size, text = self._family.state.limits.max_report_chars, outcome.output
        if size is None or len(text) <= size:
            return text
        num_pages = -(-len(text) // size)
        return (
            f"{text[:size]}\n[page 1 of {num_pages}; the others: "
            f'read_report(agent="{outcome.path}", page=2) …]'
        )

    async def _launch(self, config: SubagentConfig, path: str, prompt: str) -> AgentOutcome:
        family, state = self._family, self._family.state
        parent = state.graph.node(self._path)
        scope = self._meter.scope
        if config.budget is not None:
            scope = Scope(config.budget, scope, f"{config.name}'s")
            _preload(scope, state, path, config.price)
        meter = AgentMeter(scope, config.max_steps, parent=self._meter, price=config.price)
        tools = config.tools
        if meter.level < len(family.slots):
            own = Spawner(family, path, config.name, meter)
            tools = {**tools, **{tool.spec.name: tool for tool in own.tools}}
        spec = AgentSpec(
            path=path,
            name=config.name,
            instructions=config.instructions,
            prompt=prompt,
            model=config.model,
            tools=tools,
            sampling=config.sampling,
            meter=meter,
            output=config.output,
            parent=parent,
        )
        slots = family.slots[meter.level - 1]
        if state.emit is not None and not slots.is_free:
            num_waiting = slots.num_waiting + 1
            state.emit(AgentQueued(path=path, name=config.name, num_waiting=num_waiting))
        async with slots:
            if scope is not self._meter.scope and state.replay is None:
                scope.started_s = time.monotonic()  # waiting for a place does not count
            state.num_alive += 1
            state.max_alive = max(state.max_alive, state.num_alive)
            try:
                outcome = await _run_within_wall_time(state, spec)
            finally:
                state.num_alive -= 1
        self._meter.join(meter)
        return outcome


async def _run_within_wall_time(state: EpisodeState, spec: AgentSpec) -> AgentOutcome:
    """Run an agent; one whose own wall-clock limit ends first ends out of budget."""
    own = spec.meter.scope
    if own is state.scope or own.budget.wall_s is None:
        return await run_agent(state, spec)
    with anyio.move_on_after(own.remaining_s()) as limit:
        return await run_agent(state, spec)
    assert limit.cancelled_caught
    exceeded = BudgetExceeded(
        f"{own.name} seconds", used=own.budget.wall_s, allowed=own.budget.wall_s
    )
    return state.out_of_time(spec.path, exceeded)


def _preload(scope: Scope, state: EpisodeState, path: str, price: Price) -> None:
    """Count in a role's own budget what the record tells of the assignment."""
    if state.replay is None:
        return
    total = Usage()
    agents = state.replay.below(path)
    for agent in agents:
        total += agent.usage
    scope.preload(
        steps=sum(len(agent.turns) for agent in agents),
        usage=total,
        usd=price.of(total),
        agents=max(0, len(agents) - 1),
        wall_s=0.0,
    )


@dataclass(frozen=True, slots=True)
class _CreateTool(SpawnTool):
    spawner: Spawner
    is_sequential = True

    @property
    def spec(self) -> ToolSpec:
        return CREATE_SUBAGENT

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        del context  # the spawner knows whose it is
        return self.spawner.create(arguments)


@dataclass(frozen=True, slots=True)
class _AssignTool(SpawnTool):
    spawner: Spawner

    @property
    def spec(self) -> ToolSpec:
        return ASSIGN_TASK

    def number(self, call_id: str) -> None:
        self.spawner.number(call_id)

    def is_made_again(self, call: ToolCall) -> bool:
        """Only if a sub-agent was launched: what was refused then is not launched now."""
        return self.spawner.is_launched(call)

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        return await self.spawner.assign(arguments, context.call_id)


@dataclass(frozen=True, slots=True)
class _ReadTool:
    spawner: Spawner

    @property
    def spec(self) -> ToolSpec:
        return READ_REPORT

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        del context
        return self.spawner.read(arguments)


def _texts(arguments: Mapping[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(arguments.get(name), str):
            raise ToolError(f"argument '{name}' must be given, as a string")
    return [arguments[name] for name in names]
