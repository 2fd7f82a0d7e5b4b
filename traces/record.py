"""One record a step, then one span that points to it.

    a turn            append to the ledger ──> await committed() ──> its span ends
    a tool's result   append to the ledger ──> commit_soon()          its span ends with the next

The order is the rule: the row is committed first, its id becomes the attribute
``swarm.ledger.step_id``, then the span ends. Spans go to whatever OpenTelemetry provider the app
has set; without one they cost next to nothing and go nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.trace import SpanContext

from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import AgentRecord, Ledger, images_to_json, message_to_json
from swarm_sdk.traces.spans import EpisodeSpans, Step
from swarm_sdk.types import Image, Message, ToolCall, ToolOutput, Turn


def now_ns() -> int:
    """Wall-clock nanoseconds since 1970: what records and spans carry."""
    return time.time_ns()


class AgentRecorder:
    """Writes the steps of one agent, in order."""

    __slots__ = ("_open", "_reset", "_span", "_spans", "episode_id", "ledger", "path", "stage")

    def __init__(
        self,
        ledger: Ledger,
        episode_id: str,
        path: str,
        spans: EpisodeSpans,
        span: SpanContext | None,
    ) -> None:
        """``span`` is the agent's own, as ``EpisodeSpans.agent`` gave it."""
        self.ledger: Ledger = ledger
        self.episode_id: str = episode_id
        self.path: str = path
        self.stage: int = 0
        """Index of the agent's current turn."""
        self._spans = spans
        self._span = span
        self._open: list[Step] = []
        """Spans whose rows wait for their commit."""
        self._reset: Mapping[str, Any] | None = None

    def reset(self, how: Mapping[str, Any]) -> None:
        """Tell with the next turn that it began a new context, and what was dropped."""
        self._reset = how

    def sample(
        self,
        turn: Turn,
        *,
        observed: Sequence[Message],
        observed_ids: Sequence[int],
        model: str,
        started_ns: int,
    ) -> None:
        """Record one model turn and what entered the context before it."""
        generation = turn.generation
        ended_ns = now_ns()
        stored = []
        for message in observed:
            if message.role == "tool" and self._reset is None:  # its text stands in its own step
                stored.append({"role": "tool", "tool_call_id": message.tool_call_id})
                continue
            if message.images:
                self.ledger.put_media(message.images)
            stored.append(message_to_json(message))
        body: dict[str, Any] = {
            "observed": stored,
            "message": message_to_json(turn.message),
            "finish_reason": generation.finish_reason,
            "usage": {
                "num_prompt_tokens": generation.num_prompt_tokens,
                "num_cached_tokens": generation.num_cached_tokens,
                "num_completion_tokens": generation.num_completion_tokens,
            },
        }
        if generation.version_spans:
            body["version_spans"] = generation.version_spans
        experts = generation.routed_experts
        if experts is not None:
            body["experts"] = (experts.num_layers, experts.num_chosen)
        if self._reset is not None:
            body["reset"], self._reset = self._reset, None
        row = self.ledger.append(
            self.episode_id,
            self.path,
            self.stage,
            "sample",
            body,
            prompt_ids=(*observed_ids, *turn.prompt_ids),
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            weight_version=generation.weight_version,
            routed_experts=None if experts is None else experts.data,
            started_ns=started_ns,
            ended_ns=ended_ns,
        )
        if self._spans.is_on:
            attributes = {
                schema.OPERATION: schema.CHAT,
                schema.REQUEST_MODEL: model,
                schema.INPUT_TOKENS: generation.num_prompt_tokens,
                schema.OUTPUT_TOKENS: generation.num_completion_tokens,
                schema.FINISH_REASONS: (generation.finish_reason,),
                schema.EPISODE_ID: self.episode_id,
                schema.AGENT_PATH: self.path,
                schema.STAGE_INDEX: self.stage,
            }
            self._open.append((row, f"{schema.CHAT} {model}", attributes, started_ns, ended_ns))

    def tool(
        self, call: ToolCall, output: ToolOutput, *, error: str | None, started_ns: int
    ) -> None:
        """Record one tool call's result, to be committed soon. ``error`` names what went wrong."""
        if output.images:
            self.ledger.put_media(output.images)
        ended_ns = now_ns()
        row = self.ledger.append(
            self.episode_id,
            self.path,
            self.stage,
            "tool",
            {
                "call_id": call.id,
                "name": call.name,
                "content": output.content,
                "images": images_to_json(output.images),
                "error": error,
                **({"facts": dict(output.facts)} if output.facts else {}),
            },
            started_ns=started_ns,
            ended_ns=ended_ns,
        )
        self.ledger.commit_soon()
        if self._spans.is_on:
            attributes = {
                schema.OPERATION: schema.EXECUTE_TOOL,
                schema.TOOL_NAME: call.name,
                schema.TOOL_CALL_ID: call.id,
                schema.EPISODE_ID: self.episode_id,
                schema.AGENT_PATH: self.path,
                schema.STAGE_INDEX: self.stage,
            }
            attributes.update(output.facts)
            if error:
                attributes[schema.ERROR_TYPE] = error
            name = f"{schema.EXECUTE_TOOL} {call.name}"
            self._open.append((row, name, attributes, started_ns, ended_ns))

    async def commit(self) -> None:
        """Return when all that was recorded is committed and its spans have ended.

        Raises:
            LedgerError: the record cannot be written.
        """
        await self.ledger.committed()
        if self._open:
            self.end_spans()

    def end_spans(self) -> None:
        """End all spans; their rows are committed first, where they are not.

        Raises:
            LedgerError: the record cannot be written.
        """
        ended, self._open = self._open, []
        if ended and not ended[-1][0].id:
            self.ledger.flush()
        for row, _, attributes, _, _ in ended:
            attributes[schema.LEDGER_STEP_ID] = row.id
        self._spans.steps(self._span, ended)


@contextmanager
def agent_span(
    ledger: Ledger, episode_id: str, agent: AgentRecord, spans: EpisodeSpans, *, is_new: bool
) -> Iterator[AgentRecorder]:
    """Record that an agent started and hold its span open; ``end_agent`` is the runtime's call.

    ``is_new`` is ``False`` where the record of an earlier process tells of the agent already.
    """
    if is_new:
        ledger.begin_agent(episode_id, agent)
    attributes = {
        schema.OPERATION: schema.INVOKE_AGENT,
        schema.EPISODE_ID: episode_id,
        schema.AGENT_PATH: agent.path,
        schema.AGENT_NAME: agent.name,
    }
    name = f"{schema.INVOKE_AGENT} {agent.name}"
    with spans.agent(name, attributes, agent.started_ns, now_ns) as span:
        yield AgentRecorder(ledger, episode_id, agent.path, spans, span)


def media_of(files: Sequence[Image]) -> list[list[str]]:
    """How a task's record refers to its files: ``[digest, name]`` each."""
    return images_to_json(files)
