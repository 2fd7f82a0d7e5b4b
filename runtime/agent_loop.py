"""One agent from its prompt to its final message.

    observe(prompt) ─> reserve ─> sample ─> record ─┬─> no calls: the message is the answer
         ▲                                          └─> calls ─> run them side by side ─> record
         └────────────────────────── observe(results) ◄─────────────────────────────────────┘

Nothing that goes wrong inside an agent leaves it as an exception, but cancellation: it ends with
an ``AgentOutcome`` whose status says how.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import anyio

from swarm_sdk.errors import BudgetExceeded, LedgerError, ModelError, ToolError
from swarm_sdk.runtime.budget import AgentMeter, BudgetMeter
from swarm_sdk.runtime.events import (
    AgentFinished,
    AgentStarted,
    Emit,
    StepFinished,
    StepStarted,
    ToolFinished,
    ToolStarted,
)
from swarm_sdk.runtime.stage_graph import Node, StageGraph
from swarm_sdk.traces.ledger import AgentRecord, Ledger
from swarm_sdk.traces.record import AgentRecorder, agent_span, now_ns
from swarm_sdk.types import (
    Image,
    Message,
    Model,
    Sampling,
    Tool,
    ToolCall,
    ToolContext,
    ToolOutput,
    Usage,
)

AgentStatus = Literal["done", "truncated", "out_of_budget", "failed", "cancelled"]
ResourceT = TypeVar("ResourceT")
SEQUENTIAL_TOOLS = frozenset({"create_subagent"})
"""Tools of a turn that run first and in order, so that the same turn can use what they make."""


@dataclass(slots=True, kw_only=True)
class EpisodeState:
    """What all agents of one episode share."""

    episode_id: str
    ledger: Ledger
    tracer: Any
    """An OpenTelemetry tracer."""
    meter: BudgetMeter
    graph: StageGraph
    emit: Emit
    seed: int | None
    """Every turn derives its own seed from it; ``None`` draws fresh ones."""
    usage: Usage = field(default_factory=Usage)
    outcomes: dict[str, AgentOutcome] = field(default_factory=dict)
    """Agents that ended, by path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSpec:
    """An agent about to run."""

    path: str
    name: str
    instructions: str
    """The system prompt; empty for none."""
    prompt: str
    model: Model
    tools: Mapping[str, Tool]
    sampling: Sampling
    meter: AgentMeter
    files: tuple[Image, ...] = ()
    parent: Node | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentOutcome:
    """How an agent ended."""

    path: str
    name: str
    status: AgentStatus
    """done: it gave its final message; truncated: the message was cut at the token limit;
    out_of_budget, failed, cancelled: ``error`` says why and ``output`` is the last it said."""
    output: str
    error: str | None = None
    steps: int = 0
    critical_steps: int = 0
    usage: Usage = field(default_factory=Usage)


class AgentResources:
    """What one agent holds while it lives; closed when it ends, also on cancellation."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._held: dict[str, Any] = {}
        self._locks: dict[str, anyio.Lock] = {}

    async def get(
        self, key: str, start: Callable[[], AbstractAsyncContextManager[ResourceT]]
    ) -> ResourceT:
        """The resource ``key``, started on first use even if several calls ask at once."""
        async with self._locks.setdefault(key, anyio.Lock()):
            if key not in self._held:
                self._held[key] = await self._stack.enter_async_context(start())
        held: ResourceT = self._held[key]
        return held

    async def aclose(self) -> None:
        """Give everything back."""
        with anyio.CancelScope(shield=True):
            await self._stack.aclose()


async def run_agent(state: EpisodeState, spec: AgentSpec) -> AgentOutcome:
    """Run one agent to its end; the outcome is also kept in ``state.outcomes``."""
    run = _AgentRun(state, spec)
    state.emit(AgentStarted(path=spec.path, name=spec.name, prompt=spec.prompt))
    record = AgentRecord(
        path=spec.path,
        parent_path=spec.parent.path if spec.parent else None,
        parent_stage=spec.parent.stage if spec.parent else None,
        name=spec.name,
        model=spec.model.name,
        started_ns=now_ns(),
    )
    status: AgentStatus = "cancelled"
    error: str | None = "the episode was cancelled"
    with agent_span(state.ledger, state.episode_id, record, state.tracer) as recorder:
        try:
            status, error = await run.loop(recorder)
        except BudgetExceeded as exceeded:
            status, error = "out_of_budget", str(exceeded)
        except ModelError as failure:
            status, error = "failed", str(failure)
        finally:
            await run.resources.aclose()
            outcome = AgentOutcome(
                path=spec.path,
                name=spec.name,
                status=status,
                output=run.last_content,
                error=error,
                steps=spec.meter.steps,
                critical_steps=spec.meter.critical_steps,
                usage=run.usage,
            )
            state.outcomes[spec.path] = outcome
            state.ledger.end_agent(
                state.episode_id,
                spec.path,
                status=status,
                output=outcome.output,
                ended_ns=now_ns(),
            )
            state.emit(
                AgentFinished(
                    path=spec.path, status=status, output=outcome.output, steps=outcome.steps
                )
            )
    return outcome


class _AgentRun:
    """The loop of one agent and what it holds."""

    def __init__(self, state: EpisodeState, spec: AgentSpec) -> None:
        self.state = state
        self.spec = spec
        self.resources = AgentResources()
        self.usage = Usage()
        self.last_content = ""

    async def loop(self, recorder: AgentRecorder) -> tuple[AgentStatus, str | None]:
        """Turn after turn until a message without calls; returns the status and the error."""
        spec = self.spec
        dialogue = spec.model.dialogue([tool.spec for tool in spec.tools.values()])
        messages = [Message("user", spec.prompt, images=spec.files)]
        if spec.instructions:
            messages.insert(0, Message("system", spec.instructions))
        self.state.graph.add_agent(spec.path, spec.parent)
        while True:
            recorder.observe(messages, dialogue.observe(messages))
            max_tokens = self.state.meter.reserve_step(spec.meter, spec.sampling.max_tokens)
            used_tokens = 0
            self.state.emit(StepStarted(path=spec.path, stage=recorder.stage))
            started_ns = now_ns()
            try:
                turn = await dialogue.sample(
                    replace(spec.sampling, max_tokens=max_tokens, seed=self._seed(recorder.stage))
                )
                used_tokens = turn.generation.num_completion_tokens
            finally:
                self.state.meter.settle_step(reserved_tokens=max_tokens, used_tokens=used_tokens)
            recorder.sample(turn, model=spec.model.name, started_ns=started_ns)
            self.state.graph.add_stage(spec.path)
            usage = Usage.of(turn.generation)
            self.usage += usage
            self.state.usage += usage
            message = turn.message
            self.last_content = message.content or self.last_content
            self.state.emit(
                StepFinished(path=spec.path, stage=recorder.stage, message=message, usage=usage)
            )
            if not message.tool_calls:
                if turn.generation.finish_reason == "length":
                    return "truncated", f"the message was cut at {max_tokens} tokens"
                return "done", None
            messages = await self._run_calls(message.tool_calls, recorder)
            recorder.stage += 1

    async def _run_calls(self, calls: Sequence[ToolCall], recorder: AgentRecorder) -> list[Message]:
        """Run the calls of one turn side by side; results in the order of the calls."""
        results: dict[int, ToolOutput] = {}

        async def run_one(index: int) -> None:
            results[index] = await self._run_call(calls[index], recorder)

        first = [i for i, call in enumerate(calls) if call.name in SEQUENTIAL_TOOLS]
        for index in first:
            await run_one(index)
        async with anyio.create_task_group() as group:
            for index, call in enumerate(calls):
                if index not in first:
                    group.start_soon(run_one, index, name=f"{self.spec.path} {call.id}")
        return [
            Message("tool", output.content, images=output.images, tool_call_id=calls[index].id)
            for index, output in sorted(results.items())
        ]

    async def _run_call(self, call: ToolCall, recorder: AgentRecorder) -> ToolOutput:
        """The tool boundary: whatever a tool raises becomes a result that the model sees."""
        started_ns = now_ns()
        error: str | None = None
        tool = self.spec.tools.get(call.name)
        self.state.emit(ToolStarted(path=self.spec.path, call=call))
        try:
            if call.error is not None:
                error, output = "malformed_call", ToolOutput(f"error: {call.error}")
            elif tool is None:
                known = ", ".join(sorted(self.spec.tools)) or "none"
                error = "unknown_tool"
                output = ToolOutput(
                    f"error: there is no tool '{call.name}'; the tools are: {known}"
                )
            else:
                output = await tool(
                    call.arguments,
                    ToolContext(
                        episode_id=self.state.episode_id,
                        agent_path=self.spec.path,
                        call_id=call.id,
                        resources=self.resources,
                        files=self.spec.files,
                    ),
                )
        except ToolError as failure:
            error, output = type(failure).__name__, ToolOutput(f"error: {failure}")
        except LedgerError:
            raise  # without a record there is no episode
        except Exception as failure:  # noqa: BLE001 - the boundary: tools are other people's code
            error = type(failure).__name__
            output = ToolOutput(f"error: {type(failure).__name__}: {failure}")
        recorder.tool(call, output, error=error, started_ns=started_ns)
        self.state.emit(ToolFinished(path=self.spec.path, call=call, output=output, error=error))
        return output

    def _seed(self, stage: int) -> int | None:
        """A seed of its own for each turn, the same in every run of the same episode seed."""
        if self.state.seed is None:
            return self.spec.sampling.seed
        text = f"{self.state.seed}/{self.spec.path}#{stage}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
