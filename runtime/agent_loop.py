"""One agent from its prompt to its final message.

    observe(prompt) ─> reserve ─> sample ─> commit ─┬─> no calls: the message is the answer
         ▲                                          └─> calls ─> run them side by side ─> commit
         └────────────────────────── observe(results) ◄─────────────────────────────────────┘

Where the episode is resumed, turns come from the record until it ends (``replay.py``). Nothing
that goes wrong inside an agent leaves it as an exception, but cancellation, a record that cannot be
written or continued, and ``fail_fast``: it ends with an ``AgentOutcome`` whose status says how.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from swarm_sdk.errors import (
    BudgetExceeded,
    ContextOverflow,
    LedgerError,
    ModelError,
    SubagentError,
)
from swarm_sdk.runtime.budget import is_in_call
from swarm_sdk.runtime.events import (
    AgentFinished,
    AgentStarted,
    ContextReset,
    StepFinished,
    StepStarted,
)
from swarm_sdk.runtime.hooks import AgentInfo, inside
from swarm_sdk.runtime.replay import RecordedAgent, RecordedTurn, ReplayMismatch, check_prompt
from swarm_sdk.runtime.state import (
    AgentOutcome,
    AgentSpec,
    AgentStatus,
    EpisodeState,
    LivingAgent,
    seed_of,
)
from swarm_sdk.runtime.tool_calls import run_calls
from swarm_sdk.traces.ledger import AgentRecord
from swarm_sdk.traces.record import AgentRecorder, agent_span, now_ns
from swarm_sdk.types import Dialogue, Message, Sampling, Turn, Usage

NO_USAGE = Usage()


async def run_agent(state: EpisodeState, spec: AgentSpec) -> AgentOutcome:
    """Run one agent to its end; the outcome is also kept in ``state.outcomes``.

    Raises:
        LedgerError: the record cannot be written.
        ReplayMismatch: a resumed episode does not fit its record.
        SubagentError: with ``fail_fast``, a sub-agent ended without a report.
    """
    run = _AgentRun(state, spec)
    if state.emit is not None:
        state.emit(AgentStarted(path=spec.path, name=spec.name, prompt=spec.prompt))
    record = AgentRecord(
        path=spec.path,
        parent_path=spec.parent.path if spec.parent else None,
        parent_stage=spec.parent.stage if spec.parent else None,
        name=spec.name,
        model=spec.model.name,
        prompt=spec.prompt,
        started_ns=now_ns(),
    )
    status: AgentStatus = "cancelled"
    error: str | None = "the episode was cancelled"
    is_new = run.agent.recorded is None
    with agent_span(state.ledger, state.episode_id, record, state.spans, is_new=is_new) as recorder:
        try:
            status, error = await run.loop(recorder)
        except BudgetExceeded as exceeded:
            status, error = "out_of_budget", str(exceeded)
        except ContextOverflow as overflow:
            status, error = "overflow", str(overflow)
        except ReplayMismatch:
            raise  # the record stays as it is: the right settings can go on with it
        except LedgerError:
            status, error = "failed", "the episode's record cannot be written"
            raise
        except EngineClosed as closed:
            status, error = "cancelled", str(closed)
        except SubagentError as failure:
            status, error = "failed", str(failure)
            raise
        except Exception as failure:  # noqa: BLE001 - the boundary: models are other people's code
            is_ours = isinstance(failure, ModelError)
            status = "failed"
            error = str(failure) if is_ours else f"{type(failure).__name__}: {failure}"
        finally:
            try:
                await run.agent.resources.aclose()
            except Exception as failure:  # noqa: BLE001 - the boundary: what tools hold is theirs
                error = error or f"closing what it held: {type(failure).__name__}: {failure}"
            outcome = _end(state, spec, run, status, error)
        recorder.end_spans()
    return outcome


class EngineClosed(ModelError):
    """Raised if an engine ended a turn because it is being closed; the turn is not recorded."""


def _end(
    state: EpisodeState, spec: AgentSpec, run: _AgentRun, status: AgentStatus, error: str | None
) -> AgentOutcome:
    """Keep the outcome, record it and tell it."""
    outcome = AgentOutcome(
        path=spec.path,
        name=spec.name,
        status=status,
        output=run.last_content,
        error=error,
        parsed=run.parsed,
        steps=spec.meter.steps,
        critical_steps=spec.meter.critical_steps,
        usage=run.usage,
    )
    state.outcomes[spec.path] = outcome
    state.usage += run.usage
    if run.agent.recorded is None or not run.agent.recorded.is_ended:
        state.ledger.end_agent(
            state.episode_id,
            spec.path,
            status=status,
            output=outcome.output,
            error=error,
            ended_ns=now_ns(),
        )
    if state.emit is not None:
        state.emit(
            AgentFinished(path=spec.path, status=status, output=outcome.output, steps=outcome.steps)
        )
    return outcome


class _AgentRun:
    """The loop of one agent and what it holds."""

    __slots__ = (
        "_history",
        "agent",
        "last_content",
        "num_calls",
        "num_repairs",
        "parsed",
        "spec",
        "state",
        "usage",
        "used",
    )

    def __init__(self, state: EpisodeState, spec: AgentSpec) -> None:
        self.state = state
        self.spec = spec
        self.agent = LivingAgent(
            state,
            spec,
            AgentInfo(state.episode_id, spec.path, spec.name, state.deps),
            None if state.replay is None else state.replay.agents.get(spec.path),
        )
        self.usage = NO_USAGE
        self.used = NO_USAGE
        """Of the last turn."""
        self.last_content = ""
        self.parsed: Any = None
        self.num_repairs = 0
        self.num_calls = 0
        """Tool calls so far; their ids count on when a context is begun anew."""
        self._history: list[Message] | None = None if state.context is None else []
        """All messages of the context; kept only for a context strategy."""

    async def loop(self, recorder: AgentRecorder) -> tuple[AgentStatus, str | None]:
        """Turn after turn until a message without calls; returns the status and the error."""
        spec, state, recorded = self.spec, self.state, self.agent.recorded
        dialogue = self._open_dialogue()
        messages = self._first_messages()
        state.graph.add_agent(spec.path, spec.parent)
        while True:
            if recorded is not None and recorder.stage < len(recorded.turns):
                dialogue, turn = self._replay(recorded.turns[recorder.stage], dialogue, messages)
            elif recorded is not None and recorded.is_ended:
                return self._recorded_end(recorded)
            else:
                dialogue, turn = await self._live(dialogue, messages, recorder)
            message = turn.message
            if self._history is not None:
                self._history.append(message)
            if message.content:
                self.last_content = message.content
            if message.tool_calls:
                self.num_calls += len(message.tool_calls)
                if recorded is not None and recorded.ended_during(recorder.stage, message):
                    return self._recorded_end(recorded)
                messages = await run_calls(self.agent, message.tool_calls, recorder)
            elif turn.generation.finish_reason == "length":
                return "truncated", f"the message was cut after {len(message.content)} characters"
            elif spec.output is None:
                return "done", None
            else:
                complaint = self._parse(spec.output, message.content)
                if complaint is None:
                    return "done", None
                if self.num_repairs == state.limits.max_repairs:
                    return "failed", f"the final message does not fit its type: {complaint}"
                self.num_repairs += 1
                messages = [Message("user", f"{complaint}\nAnswer with the corrected JSON only.")]
            recorder.stage += 1

    def _open_dialogue(self, kept: Sequence[Message] = ()) -> Dialogue:
        """A new dialogue in which calls go on counting, also after ``kept`` is observed."""
        num_kept = sum(len(message.tool_calls) for message in kept)
        return self.spec.model.dialogue(
            [tool.spec for tool in self.spec.tools.values()],
            first_call_index=self.num_calls - num_kept,
        )

    def _recorded_end(self, recorded: RecordedAgent) -> tuple[AgentStatus, str | None]:
        self.last_content = recorded.record.output or self.last_content
        return recorded.record.status, recorded.record.error  # type: ignore[return-value]

    def _first_messages(self) -> list[Message]:
        spec = self.spec
        pictures = tuple(one for one in self.state.files if one.media_type.startswith("image/"))
        messages = [Message("user", spec.prompt, images=pictures)]
        instructions = spec.instructions
        if spec.output is not None:
            schema = _schema_of(spec.output)
            instructions += (
                f"\n\nEnd with one JSON object of this schema, and nothing else: {schema}"
            )
        if instructions:
            messages.insert(0, Message("system", instructions.strip("\n")))
        return messages

    # -- one turn: from the record, or from the model ----------------------------------------------

    def _replay(
        self, recorded: RecordedTurn, dialogue: Dialogue, messages: Sequence[Message]
    ) -> tuple[Dialogue, Turn]:
        """Append a turn on record to the dialogue; nothing is asked and nothing recorded."""
        path, turn = self.spec.path, recorded.turn
        stage = self.state.graph.lengths[path]
        if recorded.reset is not None:
            dialogue, messages = self._open_dialogue(recorded.observed), recorded.observed
            self._history = list(messages)
        elif self._history is not None:
            self._history += messages
        entered = dialogue.observe(messages)
        check_prompt(path, stage, entered, turn.prompt_ids)
        dialogue.replay(replace(turn, prompt_ids=turn.prompt_ids[len(entered) :]))
        self.spec.meter.count_step()
        self.used = Usage.of(turn.generation)
        self._count(turn, stage, is_replayed=True)
        return dialogue, turn

    async def _live(
        self, dialogue: Dialogue, messages: Sequence[Message], recorder: AgentRecorder
    ) -> tuple[Dialogue, Turn]:
        """Ask the model for a turn and commit it, with what entered the context before it."""
        state = self.state
        entered = dialogue.observe(messages)
        if self._history is not None:
            self._history += messages
            if self._is_too_long(dialogue) and (kept := await self._shorten(dialogue, recorder)):
                dialogue, messages = self._open_dialogue(kept), kept
                entered = dialogue.observe(messages)
        started_ns = now_ns()
        if state.emit is not None:
            state.emit(StepStarted(path=self.spec.path, stage=recorder.stage))
        turn = await self._sample(dialogue, recorder.stage)
        if turn.generation.finish_reason == "abort":
            raise EngineClosed("the engine was closed in the middle of a turn")
        recorder.sample(
            turn,
            observed=messages,
            observed_ids=entered,
            model=self.spec.model.name,
            started_ns=started_ns,
        )
        self._count(turn, recorder.stage, is_replayed=False)
        await recorder.commit()
        return dialogue, turn

    async def _sample(self, dialogue: Dialogue, stage: int) -> Turn:
        """One model call within the budget; waits while paused, or while others hold its room."""
        state, spec = self.state, self.spec
        self.agent.stop_if_cancelled()
        await state.gate.opened()
        used = NO_USAGE
        reserved = await spec.meter.reserve(spec.sampling.max_tokens, dialogue.num_prompt_tokens)
        try:
            await state.gate.opened()  # it may have closed while the call waited for room
            state.gate.num_inside += 1
            was_in_call = is_in_call.set(True)
            try:
                seed = self._seed(stage)
                sampling = spec.sampling
                if reserved.max_tokens != sampling.max_tokens or seed != sampling.seed:
                    sampling = replace(sampling, max_tokens=reserved.max_tokens, seed=seed)
                if self.num_repairs and spec.output is not None:  # nothing but the JSON, now
                    sampling = replace(sampling, json_schema=_schema_of(spec.output))
                if state.hooks:
                    turn = await self._hooked(dialogue, sampling)
                else:
                    turn = await dialogue.sample(sampling)
                used = Usage.of(turn.generation)
            finally:
                is_in_call.reset(was_in_call)
                state.gate.leave()
        finally:
            spec.meter.settle(reserved, used)
        self.used = used
        return turn

    async def _hooked(self, dialogue: Dialogue, sampling: Sampling) -> Turn:
        """The model call inside the app's hooks."""
        proceed: Callable[[Sampling], Awaitable[Turn]] = dialogue.sample
        for hooks in reversed(self.state.hooks):
            proceed = inside(hooks.model_call, self.agent.info, proceed)
        return await proceed(sampling)

    def _count(self, turn: Turn, stage: int, *, is_replayed: bool) -> None:
        state = self.state
        state.graph.add_stage(self.spec.path)
        usage = self.used
        self.usage += usage
        if state.emit is not None:
            state.emit(
                StepFinished(
                    path=self.spec.path,
                    stage=stage,
                    message=turn.message,
                    usage=usage,
                    is_replayed=is_replayed,
                )
            )

    def _seed(self, stage: int) -> int | None:
        """A seed of its own for each turn, the same in every run of the same episode seed."""
        if self.state.seed is None:
            return self.spec.sampling.seed
        return seed_of(f"{self.state.seed}/{self.spec.path}#{stage}")

    # -- what the final message must be, and what to do with a context that is too long ----------

    def _parse(self, output: TypeAdapter[Any], text: str) -> str | None:
        """Keep the message as its type; returns what is wrong with it, or ``None``."""
        try:
            self.parsed = output.validate_json(_json_of(text))
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            return f"{place + ': ' if place else ''}{first['msg']}"
        return None

    def _is_too_long(self, dialogue: Dialogue) -> bool:
        strategy = self.state.context
        return strategy is not None and dialogue.num_prompt_tokens >= strategy.threshold_tokens

    async def _shorten(self, dialogue: Dialogue, recorder: AgentRecorder) -> list[Message]:
        """What the strategy keeps of a context that is too long; nothing where it is all of it."""
        strategy, history = self.state.context, self._history
        assert strategy is not None
        assert history is not None
        kept = list(await strategy(tuple(history)))
        if kept == history:
            return []
        num_dropped = len(history) - len(kept)
        recorder.reset(
            {
                "strategy": strategy.name,
                "num_dropped_messages": num_dropped,
                "num_tokens_before": dialogue.num_prompt_tokens,
            }
        )
        self._history = list(kept)
        if self.state.emit is not None:
            self.state.emit(
                ContextReset(
                    path=self.spec.path,
                    stage=recorder.stage,
                    strategy=strategy.name,
                    num_dropped_messages=num_dropped,
                )
            )
        return kept


def _schema_of(output: TypeAdapter[Any]) -> str:
    return json.dumps(output.json_schema(), ensure_ascii=False)


def _json_of(text: str) -> str:
    """The JSON of a message, without the fence that models like to put around it."""
    stripped = text.strip()
    if stripped.startswith("```"):
        stripped = stripped.partition("\n")[2].rpartition("```")[0]
    return stripped
