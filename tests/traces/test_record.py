"""Spans point to the ledger, which is written first; children stay below their parents."""

import struct
from collections.abc import Sequence
from pathlib import Path

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider

from swarm_sdk import Message, Swarm
from swarm_sdk.config import nano_directory
from swarm_sdk.errors import SandboxDied
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.traces import schema
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.traces.trajectory import branches
from swarm_sdk.types import (
    Generation,
    Image,
    RoutedExperts,
    Sampling,
    ToolOutput,
    ToolSpec,
)


class Collector(SpanProcessor):
    """Keeps spans, and at the end of each looks its ledger row up."""

    def __init__(self, runs: Path) -> None:
        self.runs = runs
        self.spans: list[ReadableSpan] = []
        self.kinds: dict[int, str] = {}

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)
        step_id = (span.attributes or {}).get(schema.LEDGER_STEP_ID)
        if step_id is not None:
            ledger = Ledger(self.runs, readonly=True)
            episode_id = str((span.attributes or {})[schema.EPISODE_ID])
            rows = {step.id: step.kind for step in ledger.steps(episode_id)}
            self.kinds[int(str(step_id))] = rows[int(str(step_id))]
            ledger.close()


def policy(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
    results = [m for m in messages if m.role == "tool"]
    if any(tool.name == "assign_task" for tool in tools) and not results:
        made = [call("assign_task", agent="a", prompt=str(i)) for i in range(5)]
        return calls(call("create_subagent", name="a", system_prompt=""), *made)
    return "done"


def test_every_record_is_committed_before_its_span_ends_and_spans_keep_their_parents(
    tmp_path: Path,
) -> None:
    provider = TracerProvider()
    collector = Collector(tmp_path)
    provider.add_span_processor(collector)
    Swarm(ScriptedModel(policy), runs=tmp_path, tracer_provider=provider).run_sync("go")

    by_id = {span.context.span_id: span for span in collector.spans}
    operations = [(span.attributes or {})[schema.OPERATION] for span in collector.spans]
    assert operations.count(schema.CHAT) == 2 + 5
    assert operations.count(schema.EXECUTE_TOOL) == 6
    assert sorted(collector.kinds.values()) == ["sample"] * 7 + ["tool"] * 6

    def path(span: ReadableSpan) -> str:
        return str((span.attributes or {}).get(schema.AGENT_PATH, ""))

    for span in collector.spans:
        operation = (span.attributes or {})[schema.OPERATION]
        if operation == schema.INVOKE_WORKFLOW:
            assert span.parent is None
            continue
        assert span.parent is not None
        parent = by_id[span.parent.span_id]
        if operation in (schema.CHAT, schema.EXECUTE_TOOL):
            assert (parent.attributes or {})[schema.OPERATION] == schema.INVOKE_AGENT
            assert path(parent) == path(span)
        elif path(span) == "main":
            assert (parent.attributes or {})[schema.OPERATION] == schema.INVOKE_WORKFLOW
        else:
            assert path(parent) == "main"


def test_spans_never_carry_tokens_or_texts(tmp_path: Path) -> None:
    provider = TracerProvider()
    collector = Collector(tmp_path)
    provider.add_span_processor(collector)
    secret = "a very particular sentence"
    swarm = Swarm(ScriptedModel(lambda m, t: secret), runs=tmp_path, tracer_provider=provider)
    swarm.run_sync(secret)
    assert not any(secret in str(span.attributes) for span in collector.spans)


def test_what_a_tool_tells_beside_its_text_is_in_its_row_and_its_span(tmp_path: Path) -> None:
    class Told:
        spec = ToolSpec("told", "", {"type": "object", "properties": {}})

        def __init__(self) -> None:
            self.facts = ((schema.SANDBOX_LEVEL, "L2"), (schema.SANDBOX_HAS_STATE, True))

        async def __call__(self, arguments: object, context: object) -> ToolOutput:
            if arguments:
                lost = SandboxDied("gone")
                lost.facts = ((schema.SANDBOX_STATUS, "oom"),)
                raise lost
            return ToolOutput("text", facts=self.facts)

    def say(messages: Sequence[Message], tools: Sequence[ToolSpec]) -> Message | str:
        if any(m.role == "tool" for m in messages):
            return "done"
        return calls(call("told"), call("told", dies=True))

    collector = Collector(tmp_path)
    provider = TracerProvider()
    provider.add_span_processor(collector)
    swarm = Swarm(ScriptedModel(say), tools=[Told()], runs=tmp_path, tracer_provider=provider)
    episode_id = swarm.run_sync("go").episode_id
    spans = {
        str(s.attributes and s.attributes.get(schema.TOOL_CALL_ID)): s for s in collector.spans
    }
    assert spans["functions.told:0"].attributes[schema.SANDBOX_LEVEL] == "L2"
    assert spans["functions.told:0"].attributes[schema.SANDBOX_HAS_STATE] is True
    assert spans["functions.told:1"].attributes[schema.SANDBOX_STATUS] == "oom"
    ledger = Ledger(tmp_path, readonly=True)
    bodies = [step.body for step in ledger.steps(episode_id) if step.kind == "tool"]
    ledger.close()
    assert bodies[0]["facts"] == {"swarm.sandbox.level": "L2", "swarm.sandbox.has_state": True}
    assert bodies[1]["facts"] == {"swarm.sandbox.status": "oom"}


class Recording:
    """An engine that says one id and tells which experts it chose at each position."""

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, images: Sequence[Image] = ()
    ) -> Generation:
        first = sampling.experts_from or 0
        positions = range(first, len(token_ids))
        return Generation(
            token_ids=(sampling.stop_token_ids[-1],),
            logprobs=(-0.5,),
            finish_reason="stop",
            routed_experts=RoutedExperts(
                data=b"".join(struct.pack("<2H", p, 300) for p in positions),
                num_layers=1,
                num_chosen=2,
            ),
        )

    async def aclose(self) -> None:
        """Nothing is held."""


def test_the_experts_of_a_turn_are_on_record_and_in_its_branch(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_dir(nano_directory())
    model = TokenModel(
        name="m", engine=Recording(), chat_format=ChatFormat(tokenizer), context_tokens=1_000
    )
    result = Swarm(model, runs=tmp_path).run_sync("go")
    ledger = Ledger(tmp_path, readonly=True)
    (branch,) = branches(ledger, result.episode_id)
    (step,) = [step for step in ledger.steps(result.episode_id) if step.kind == "sample"]
    assert step.experts == branch.experts
    assert branch.experts is not None
    assert len(branch.experts) == len(branch.token_ids) - 1
    assert struct.unpack("<4H", branch.experts.data[:8]) == (0, 300, 1, 300)
    ledger.close()
