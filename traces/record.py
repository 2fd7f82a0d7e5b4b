"""One record a step, then one span that points to it.

The order is the rule: the ledger's row is committed first, its id becomes the attribute
``swarm.ledger.step_id``, then the span ends. Spans go to whatever OpenTelemetry provider the app
has set; without one they cost next to nothing and go nowhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from opentelemetry import trace

from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import AgentRecord, Ledger, StepRecord, message_to_json
from swarm_sdk.types import Image, Message, ToolCall, ToolOutput, Turn


def now_ns() -> int:
    """Wall-clock nanoseconds since 1970: what records and spans carry."""
    return time.time_ns()


@dataclass(slots=True)
class AgentRecorder:
    """Writes the steps of one agent, in order."""

    ledger: Ledger
    episode_id: str
    path: str
    tracer: trace.Tracer
    stage: int = field(default=0)
    """Index of the agent's current turn."""

    def observe(self, messages: Sequence[Message], token_ids: tuple[int, ...]) -> None:
        """Commit messages that entered the context; a tool's text already stands in its step."""
        stored = []
        for message in messages:
            self.ledger.put_media(message.images)
            one = message_to_json(message)
            if message.role == "tool":
                one = {"role": "tool", "tool_call_id": message.tool_call_id}
            stored.append(one)
        at_ns = now_ns()
        self.ledger.append(
            self.episode_id,
            StepRecord(
                agent_path=self.path,
                stage=self.stage,
                kind="observe",
                body={"messages": stored},
                token_ids=token_ids,
                started_ns=at_ns,
                ended_ns=at_ns,
            ),
        )

    def sample(self, turn: Turn, *, model: str, started_ns: int) -> None:
        """Commit one model turn, then end its span."""
        generation = turn.generation
        ended_ns = now_ns()
        step_id = self.ledger.append(
            self.episode_id,
            StepRecord(
                agent_path=self.path,
                stage=self.stage,
                kind="sample",
                body={
                    "message": message_to_json(turn.message),
                    "finish_reason": generation.finish_reason,
                    "usage": {
                        "num_prompt_tokens": generation.num_prompt_tokens,
                        "num_cached_tokens": generation.num_cached_tokens,
                        "num_completion_tokens": generation.num_completion_tokens,
                    },
                },
                prompt_ids=turn.prompt_ids,
                token_ids=generation.token_ids,
                logprobs=generation.logprobs,
                weight_version=generation.weight_version,
                started_ns=started_ns,
                ended_ns=ended_ns,
            ),
        )
        self._span(
            schema.CHAT,
            f"{schema.CHAT} {model}",
            {
                schema.REQUEST_MODEL: model,
                schema.INPUT_TOKENS: generation.num_prompt_tokens,
                schema.OUTPUT_TOKENS: generation.num_completion_tokens,
                schema.FINISH_REASONS: (generation.finish_reason,),
                schema.LEDGER_STEP_ID: step_id,
            },
            started_ns,
            ended_ns,
        )

    def tool(
        self, call: ToolCall, output: ToolOutput, *, error: str | None, started_ns: int
    ) -> None:
        """Commit one tool call's result, then end its span. ``error`` names what went wrong."""
        self.ledger.put_media(output.images)
        ended_ns = now_ns()
        step_id = self.ledger.append(
            self.episode_id,
            StepRecord(
                agent_path=self.path,
                stage=self.stage,
                kind="tool",
                body={
                    "call_id": call.id,
                    "name": call.name,
                    "content": output.content,
                    "images": [[image.sha256, image.name] for image in output.images],
                    "error": error,
                },
                started_ns=started_ns,
                ended_ns=ended_ns,
            ),
        )
        attributes = {
            schema.TOOL_NAME: call.name,
            schema.TOOL_CALL_ID: call.id,
            schema.LEDGER_STEP_ID: step_id,
        }
        if error:
            attributes[schema.ERROR_TYPE] = error
        self._span(
            schema.EXECUTE_TOOL,
            f"{schema.EXECUTE_TOOL} {call.name}",
            attributes,
            started_ns,
            ended_ns,
        )

    def _span(
        self,
        operation: str,
        name: str,
        attributes: Mapping[str, Any],
        started_ns: int,
        ended_ns: int,
    ) -> None:
        span = self.tracer.start_span(name, start_time=started_ns)
        if span.is_recording():
            span.set_attributes(
                {
                    schema.OPERATION: operation,
                    schema.EPISODE_ID: self.episode_id,
                    schema.AGENT_PATH: self.path,
                    schema.STAGE_INDEX: self.stage,
                    **attributes,
                }
            )
        span.end(end_time=ended_ns)


@contextmanager
def agent_span(
    ledger: Ledger, episode_id: str, agent: AgentRecord, tracer: trace.Tracer
) -> Iterator[AgentRecorder]:
    """Commit that an agent started and hold its span open; ``end_agent`` is the runtime's call."""
    ledger.begin_agent(episode_id, agent)
    with tracer.start_as_current_span(
        f"{schema.INVOKE_AGENT} {agent.name}",
        start_time=agent.started_ns,
        attributes={
            schema.OPERATION: schema.INVOKE_AGENT,
            schema.EPISODE_ID: episode_id,
            schema.AGENT_PATH: agent.path,
            schema.AGENT_NAME: agent.name,
        },
    ):
        yield AgentRecorder(ledger, episode_id, agent.path, tracer)


def media_of(files: Sequence[Image]) -> list[list[str]]:
    """How a task's record refers to its files: ``[digest, name]`` each."""
    return [[image.sha256, image.name] for image in files]
