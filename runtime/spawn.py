"""The orchestrator's own tools: ``create_subagent`` and ``assign_task``.

The schemas are the report's, word for word (appendix E.8). A sub-agent runs with a context of its
own and gives back its final message only; its failure is a result for the orchestrator, and its
siblings go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from swarm_sdk.errors import BudgetExceeded, ToolError
from swarm_sdk.runtime.agent_loop import AgentOutcome, AgentSpec, EpisodeState, run_agent
from swarm_sdk.runtime.budget import AgentMeter
from swarm_sdk.runtime.stage_graph import Node
from swarm_sdk.types import Image, Model, Sampling, Tool, ToolContext, ToolOutput, ToolSpec

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


@dataclass(frozen=True, slots=True, kw_only=True)
class SubagentConfig:
    """What a name stands for in ``assign_task``."""

    name: str
    instructions: str
    model: Model
    tools: Mapping[str, Tool]
    sampling: Sampling
    max_steps: int


class Spawner:
    """The sub-agents of one agent: those that the app declared and those that the model creates."""

    def __init__(
        self,
        state: EpisodeState,
        *,
        parent_path: str,
        parent_meter: AgentMeter,
        declared: Mapping[str, SubagentConfig],
        invent: Callable[[str, str], SubagentConfig],
        files: tuple[Image, ...],
        slots: anyio.CapacityLimiter,
    ) -> None:
        """Keep what sub-agents need; ``invent(name, system_prompt)`` configures a new one."""
        self._state = state
        self._parent_path = parent_path
        self._parent_meter = parent_meter
        self._configs = dict(declared)
        self._invent = invent
        self._files = files
        self._slots = slots
        self._num_launched = 0
        self.created: list[str] = []
        """Names of the sub-agents that the model created, in order."""

    @property
    def tools(self) -> list[Tool]:
        """``create_subagent`` and ``assign_task``."""
        return [_SpawnTool(CREATE_SUBAGENT, self._create), _SpawnTool(ASSIGN_TASK, self._assign)]

    async def _create(self, arguments: Mapping[str, Any]) -> ToolOutput:
        name, system_prompt = _texts(arguments, "name", "system_prompt")
        if not name.strip() or "/" in name or "#" in name:
            raise ToolError("a sub-agent's name must not be empty nor hold '/' or '#'")
        if name in self._configs:
            raise ToolError(
                f"a sub-agent named '{name}' exists already; assign tasks to it or choose another "
                "name"
            )
        self._configs[name] = self._invent(name, system_prompt)
        self.created.append(name)
        return ToolOutput(f"created {name}")

    async def _assign(self, arguments: Mapping[str, Any]) -> ToolOutput:
        name, prompt = _texts(arguments, "agent", "prompt")
        config = self._configs.get(name)
        if config is None:
            known = ", ".join(self._configs) or "none; create one first"
            raise ToolError(f"there is no sub-agent named '{name}'; the sub-agents are: {known}")
        try:
            self._state.meter.reserve_agent()
        except BudgetExceeded as exceeded:
            raise ToolError(str(exceeded)) from exceeded
        outcome = await self._launch(config, prompt)
        if outcome.status == "done":
            return ToolOutput(outcome.output)
        partial = f" Its last message: {outcome.output}" if outcome.output else ""
        raise SubagentError(f"the sub-agent '{name}' {outcome.status}: {outcome.error}.{partial}")

    async def _launch(self, config: SubagentConfig, prompt: str) -> AgentOutcome:
        parent = Node(self._parent_path, self._state.graph.lengths[self._parent_path] - 1)
        path = f"{self._parent_path}/{config.name}.{self._num_launched}"
        self._num_launched += 1
        meter = self._parent_meter.child(config.max_steps)
        async with self._slots:
            outcome = await run_agent(
                self._state,
                AgentSpec(
                    path=path,
                    name=config.name,
                    instructions=config.instructions,
                    prompt=prompt,
                    model=config.model,
                    tools=config.tools,
                    sampling=config.sampling,
                    meter=meter,
                    files=self._files,
                    parent=parent,
                ),
            )
        self._parent_meter.join(meter)
        return outcome


class SubagentError(ToolError):
    """Raised if a sub-agent ended without a final message; the orchestrator reads why."""


@dataclass(frozen=True, slots=True)
class _SpawnTool:
    spec: ToolSpec
    run: Callable[[Mapping[str, Any]], Any]

    async def __call__(self, arguments: Mapping[str, Any], context: ToolContext) -> ToolOutput:
        del context  # the spawner knows whose it is
        output: ToolOutput = await self.run(arguments)
        return output


def _texts(arguments: Mapping[str, Any], *names: str) -> list[str]:
    for name in names:
        if not isinstance(arguments.get(name), str):
            raise ToolError(f"argument '{name}' must be given, as a string")
    return [arguments[name] for name in names]
