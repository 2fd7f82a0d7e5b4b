"""The calls of one turn: side by side, and whatever goes wrong in one is a result like others.

    call ─┬─ on record already ──────────────────────────> that result
          ├─ cut, ill-formed, no such tool ─────────────> error result
          └─ hooks ─> tool, within its time ─> cap ─────> result, or an error result

``create_subagent`` runs first and in order, so that the same turn can use what it makes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from swarm_sdk.errors import LedgerError, SubagentError, ToolError
from swarm_sdk.runtime.events import ToolFinished, ToolStarted
from swarm_sdk.runtime.hooks import inside
from swarm_sdk.runtime.replay import ReplayMismatch
from swarm_sdk.runtime.state import LivingAgent, is_scope_cancelled
from swarm_sdk.traces.record import AgentRecorder, now_ns
from swarm_sdk.types import Message, RunContext, Tool, ToolCall, ToolOutput, ToolSpec

MAX_ERROR_CHARS = 4_000
"""Characters of an exception's text that the model sees."""
ENDS_THE_EPISODE = (LedgerError, SubagentError, ReplayMismatch)
"""What passes the tool boundary: without a record there is no episode; fail_fast asks for it."""


class SpawnTool:
    """What the loop must know of ``create_subagent`` and ``assign_task``; the rest is theirs."""

    is_sequential = False
    """Whether the calls of a turn run before all others, one by one."""

    @property
    def spec(self) -> ToolSpec:
        """As ``Tool.spec``."""
        raise NotImplementedError

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        """As ``Tool.__call__``."""
        raise NotImplementedError

    def is_made_again(self, call: ToolCall) -> bool:
        """Whether a call with a result on record runs again, to make again what it had made."""
        del call
        return True

    def number(self, call_id: str) -> None:
        """Hear of a call before any call of the turn runs: the order is that of the turn."""


async def run_calls(
    agent: LivingAgent, calls: Sequence[ToolCall], recorder: AgentRecorder
) -> list[Message]:
    """Run the calls of one turn; results in the order of the calls.

    Raises:
        LedgerError, SubagentError, ReplayMismatch: as ``run_agent``.
    """
    agent.stop_if_cancelled()
    tools = agent.spec.tools
    results: dict[int, ToolOutput] = {}
    if len(calls) == 1 and not isinstance(tools.get(calls[0].name), SpawnTool):
        output = await _run_call(agent, calls[0], recorder)
        return [Message("tool", output.content, output.images, tool_call_id=calls[0].id)]

    async def run_one(index: int) -> None:
        results[index] = await _run_call(agent, calls[index], recorder)

    later: list[int] = []
    first: list[int] = []
    for index, call in enumerate(calls):
        tool = tools.get(call.name)
        if isinstance(tool, SpawnTool):
            tool.number(call.id)
            if tool.is_sequential:
                first.append(index)
                continue
        later.append(index)
    for index in first:
        await run_one(index)
    if len(later) == 1:
        await run_one(later[0])
    elif later:
        try:
            async with asyncio.TaskGroup() as group:  # anyio's costs five times as much a task
                for index in later:
                    name = f"{agent.spec.path} {calls[index].id}"
                    group.create_task(run_one(index), name=name)
        except BaseExceptionGroup as failures:
            raise first_of(failures) from failures
    return [
        Message("tool", results[i].content, images=results[i].images, tool_call_id=call.id)
        for i, call in enumerate(calls)
    ]


async def _run_call(agent: LivingAgent, call: ToolCall, recorder: AgentRecorder) -> ToolOutput:
    """The tool boundary: whatever a tool raises becomes a result that the model sees."""
    state = agent.state
    tool = agent.spec.tools.get(call.name)
    recorded = None if agent.recorded is None else agent.recorded.results.get(call.id)
    if recorded is not None and not (isinstance(tool, SpawnTool) and tool.is_made_again(call)):
        _tell(agent, call, *recorded)
        return recorded[0]
    started_ns = now_ns()
    if state.emit is not None:
        state.emit(ToolStarted(path=agent.spec.path, call=call))
    error: str | None = None
    if call.error is not None:
        error, output = "malformed_call", ToolOutput(f"error: {call.error}")
    elif tool is None:
        known = ", ".join(sorted(agent.spec.tools)) or "none"
        error = "unknown_tool"
        output = ToolOutput(f"error: there is no tool '{call.name}'; the tools are: {known}")
    else:
        output, error = await _within_bounds(agent, tool, call)
    if recorded is not None:  # a sub-agent was made again from the record, or created
        _tell(agent, call, *recorded)
        return recorded[0]
    recorder.tool(call, output, error=error, started_ns=started_ns)
    if state.emit is not None:
        state.emit(ToolFinished(path=agent.spec.path, call=call, output=output, error=error))
    return output


def _tell(agent: LivingAgent, call: ToolCall, output: ToolOutput, error: str | None) -> None:
    if agent.state.emit is not None:
        agent.state.emit(
            ToolFinished(
                path=agent.spec.path, call=call, output=output, error=error, is_replayed=True
            )
        )


async def _within_bounds(
    agent: LivingAgent, tool: Tool, call: ToolCall
) -> tuple[ToolOutput, str | None]:
    """Call the tool within its time; returns the capped output and the kind of its error."""
    state = agent.state
    timed = None if isinstance(tool, SpawnTool) else state.deadlines.begin()
    is_late = False
    try:
        try:
            output = await _call(agent, tool, call)
        finally:
            if timed is not None:
                state.deadlines.end(timed)
                is_late = timed.is_expired and timed.is_only_cause()
    except asyncio.CancelledError as failure:
        if is_late:
            limit_s = state.deadlines.limit_s
            text = f"error: '{call.name}' gave no result within {limit_s:g} s and was stopped"
            return ToolOutput(text), "tool_timeout"
        task = asyncio.current_task()
        is_ours = task is not None and task.cancelling() > 0
        if is_ours or is_scope_cancelled():
            raise
        return ToolOutput(f"error: the tool raised {type(failure).__name__}"), "CancelledError"
    except ToolError as failure:
        output = ToolOutput(f"error: {failure}", facts=failure.facts)
        return capped(output, state.limits.max_tool_chars), type(failure).__name__
    except (*ENDS_THE_EPISODE, KeyboardInterrupt):
        raise
    except BaseException as failure:  # noqa: BLE001 - the boundary: tools are other people's code
        return _failed(failure)
    return capped(output, state.limits.max_tool_chars), None


def _failed(failure: BaseException) -> tuple[ToolOutput, str]:
    kind = type(failure).__name__
    return capped(ToolOutput(f"error: {kind}: {failure}"), MAX_ERROR_CHARS), kind


async def _call(agent: LivingAgent, tool: Tool, call: ToolCall) -> ToolOutput:
    state = agent.state
    context: RunContext[Any] = RunContext(
        episode_id=state.episode_id,
        agent_path=agent.spec.path,
        call_id=call.id,
        deps=state.deps,
        resources=agent.resources,
        files=state.files,
        is_retry=_is_retry(agent),
    )
    if not state.hooks:
        output = await tool(call.arguments, context)
    else:

        async def proceed(changed: ToolCall) -> ToolOutput:
            return await tool(changed.arguments, context)

        around: Callable[[ToolCall], Awaitable[ToolOutput]] = proceed
        for hooks in reversed(state.hooks):
            around = inside(hooks.tool_call, agent.info, around)
        output = await around(call)
    if not isinstance(output, ToolOutput):
        raise TypeError(f"a tool must return a ToolOutput, got {type(output).__name__}")
    return output


def _is_retry(agent: LivingAgent) -> bool:
    """Whether the call belongs to a turn of the record but has no result there."""
    recorded = agent.recorded
    return recorded is not None and agent.state.graph.lengths[agent.spec.path] <= len(
        recorded.turns
    )


def capped(output: ToolOutput, max_chars: int) -> ToolOutput:
    """``output`` with its head and tail only, where its text is longer than ``max_chars``."""
    text = output.content
    if not text.isascii():
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate becomes a '?'
    if len(text) <= max_chars:
        return output if text == output.content else replace(output, content=text)
    head = max_chars - max_chars // 4
    tail = max_chars - head
    cut = f"\n[… {len(text) - max_chars} characters are not shown …]\n"
    return replace(output, content=text[:head] + cut + (text[-tail:] if tail else ""))


def first_of(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """One of several failures: the first that is no group itself."""
    first = failures.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first
