"""The records and protocols that every layer shares (layer 0: standard library only).

    Model.dialogue(tools) ──> Dialogue          one agent's conversation with one model
        Dialogue.observe(messages) -> ids       what the agent sees: prompts, tool results
        Dialogue.sample(sampling)  -> Turn      what the model says: message + Generation
        Dialogue.replay(turn)                   what it said before a crash: appended, not asked
    Engine.generate(ids, ...)  ──> Generation   token ids in, token ids and log-probabilities out
    Tool(arguments, context)   ──> ToolOutput   one action of an agent

The runtime knows ``Model`` and ``Tool`` and nothing else of the layers beside it. ``Engine`` is
what a ``Model`` stands on when it sees token ids (the embedded engine, SGLang).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, overload

from typing_extensions import TypeVar, dataclass_transform

Role_ = Literal["system", "user", "assistant", "tool"]
FinishReason = Literal["stop", "length", "abort"]
ResourceT = TypeVar("ResourceT")
DepsT = TypeVar("DepsT", default=Any)
RecordT = TypeVar("RecordT")


@overload
def record(cls: type[RecordT], /) -> type[RecordT]: ...


@overload
def record(*, kw_only: bool = False) -> Callable[[type[RecordT]], type[RecordT]]: ...


@dataclass_transform(frozen_default=True)
def record(
    cls: type[Any] | None = None, /, *, kw_only: bool = False
) -> type[Any] | Callable[[type[Any]], type[Any]]:
    """A dataclass that is frozen for type checkers, and at run time left to good manners.

    ``frozen=True`` sets each field by a call: five times as long to make one, and a step of an
    agent makes a dozen of these.
    """
    make = dataclass(slots=True, kw_only=kw_only, unsafe_hash=True)
    return make if cls is None else make(cls)


@dataclass(frozen=True, slots=True)
class Image:
    """An encoded picture that an agent sees or a tool returned."""

    data: bytes
    """The encoded file, PNG or JPEG; pixels are decoded where they are used. A file of another
    type (a clip, a table) is offered to tools and not shown to models."""
    media_type: str = "image/png"
    name: str = ""
    """The file name under which tools offer it; empty where there is none."""
    description: str = ""
    """What a model that cannot see is told instead: size and colours; empty where nobody knows."""

    @property
    def in_words(self) -> str:
        """What stands in the place of the picture where a model cannot see."""
        told = f"{self.name}: {self.description}" if self.description else self.name
        return f"[image {told}]" if told else "[image]"

    @property
    def sha256(self) -> str:
        """Hex digest of ``data``: how records refer to the picture."""
        return hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """What a model is told of a tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of the arguments: ``{"type": "object", "properties": …, "required": […]}``."""


@record
class ToolCall:
    """One call that a model asked for, well-formed or not."""

    id: str
    """``functions.NAME:IDX``; IDX counts the dialogue's calls from 0 (Kimi K2 report, App. B)."""
    name: str
    arguments: Mapping[str, Any]
    """The parsed arguments; empty where ``error`` is set."""
    raw_arguments: str = ""
    """The arguments as the model wrote them."""
    error: str | None = None
    """Why the call cannot be run (cut JSON, missing end token …); ``None`` if it can."""


@record
class Message:
    """One message of a dialogue."""

    role: Role_
    content: str = ""
    images: tuple[Image, ...] = ()
    reasoning: str = ""
    """The text between ``<think>`` and ``</think>``; assistant messages only."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Assistant messages only; several calls run in parallel."""
    tool_call_id: str = ""
    """The call that a ``tool`` message answers; empty for other roles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next turn is drawn."""

    temperature: float = 1.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    max_tokens: int = 4096
    seed: int | None = None
    """``None`` draws a fresh seed for each request."""
    stop_token_ids: tuple[int, ...] = ()
    """The chat format adds its own end-of-turn token."""
    json_schema: str = ""
    """JSON schema, as text, that the message must fit. Engines with a grammar (SGLang) sample
    nothing else; others read over it, so what comes is checked all the same."""
    routing_key: str = ""
    """Calls whose prompts begin alike carry the same: servers behind one model keep them apart by
    it, so that each finds its prefix in the cache. A dialogue sets its own unless one is given."""
    experts_from: int | None = None
    """Return the experts that tokens from this position on were routed to, where the engine
    records them; a dialogue asks for what it has not yet. ``None`` asks for none."""


@record(kw_only=True)
class RoutedExperts:
    """Which experts the mixture layers chose, token by token: what a trainer replays (R3).

    Position p is the token whose pass predicted token p + 1; the last sampled token has none, for
    it has not been through the network. Those of a dialogue's turns, end to end, cover all others.
    """

    data: bytes
    """Little-endian uint16 [positions, num_layers, num_chosen], C order; layers without a mixture
    hold zeros."""
    num_layers: int
    num_chosen: int

    def __len__(self) -> int:
        """How many positions."""
        return len(self.data) // (2 * self.num_layers * self.num_chosen)


@record(kw_only=True)
class Generation:
    """The tokens that one model call sampled: the ids that training will see."""

    token_ids: tuple[int, ...]
    """Sampled ids, the stop token included; empty where the server does not tell them."""
    logprobs: tuple[float, ...]
    """Natural log-probability of each id under the distribution it was drawn from."""
    finish_reason: FinishReason
    weight_version: int = 0
    """Version of the policy weights that sampled the last of these tokens."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(version, tokens) in order, where new weights came while this was sampled; empty where all
    tokens are of ``weight_version``."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values were reused."""
    num_completion_tokens: int = 0
    routed_experts: RoutedExperts | None = None
    """Of the positions from ``Sampling.experts_from`` on; ``None`` where nobody records them."""


@record
class Turn:
    """One step of an agent: what the model said, and the tokens it said it with."""

    message: Message
    generation: Generation
    prompt_ids: tuple[int, ...] = ()
    """Ids that ``Dialogue.sample`` appended before the model's own (the generation prompt)."""


@record(kw_only=True)
class Usage:
    """Tokens that model calls used; adds up over agents."""

    num_calls: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            num_calls=self.num_calls + other.num_calls,
            num_prompt_tokens=self.num_prompt_tokens + other.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens + other.num_cached_tokens,
            num_completion_tokens=self.num_completion_tokens + other.num_completion_tokens,
        )

    @staticmethod
    def of(generation: Generation) -> Usage:
        """The usage of one model call."""
        return Usage(
            num_calls=1,
            num_prompt_tokens=generation.num_prompt_tokens,
            num_cached_tokens=generation.num_cached_tokens,
            num_completion_tokens=generation.num_completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """What a model's tokens cost, in US dollars a million."""

    input_usd: float = 0.0
    cached_usd: float | None = None
    """Prompt tokens that were cached; ``None`` costs as much as others."""
    output_usd: float = 0.0

    def of(self, usage: Usage) -> float:
        """Cost of ``usage`` in US dollars."""
        cached_usd = self.input_usd if self.cached_usd is None else self.cached_usd
        fresh = usage.num_prompt_tokens - usage.num_cached_tokens
        return (
            fresh * self.input_usd
            + usage.num_cached_tokens * cached_usd
            + usage.num_completion_tokens * self.output_usd
        ) / 1e6


class Engine(Protocol):
    """Token ids in, token ids out. Knows nothing of text, messages or tools."""

    async def generate(
        self, token_ids: Sequence[int], sampling: Sampling, images: Sequence[Image] = ()
    ) -> Generation:
        """Continue ``token_ids``; cancelling the task cancels the request.

        ``images`` fill the media placeholders of ``token_ids`` in order.

        Raises:
            ContextOverflow: the prompt and ``max_tokens`` do not fit the model's context.
            ModelError: the engine failed; ``retryable`` says whether asking again can help.
        """
        ...

    async def aclose(self) -> None:
        """Release the engine; running requests end with ``finish_reason="abort"``."""
        ...


class Dialogue(Protocol):
    """One agent's conversation: only ever appended to."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens that the next call sends; where the server does not tell ids, an estimate."""
        ...

    def observe(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Append what the agent sees; returns the token ids added (empty for chat-only servers)."""
        ...

    async def sample(self, sampling: Sampling) -> Turn:
        """Draw the model's next turn and append it.

        The ids that the engine saw for this call are exactly those of all earlier ``observe`` and
        ``sample`` calls in order, so concatenating the recorded steps gives the model's context.

        Raises:
            ModelError, ContextOverflow: as ``Engine.generate``.
        """
        ...

    def replay(self, turn: Turn) -> None:
        """Append a turn that was sampled before, as ``sample`` appended it then."""
        ...


class Model(Protocol):
    """A policy that agents can be run with."""

    @property
    def name(self) -> str:
        """What records call the model."""
        ...

    @property
    def is_replayable(self) -> bool:
        """Whether its episodes hold the exact token ids and log-probabilities."""
        ...

    def dialogue(self, tools: Sequence[ToolSpec], *, first_call_index: int = 0) -> Dialogue:
        """Open a conversation in which ``tools`` can be called.

        ``first_call_index`` is the number of its first call: above 0 where a context is begun
        anew, so that no id names two calls of one agent.
        """
        ...

    async def aclose(self) -> None:
        """Release what the model holds."""
        ...


@record
class ToolOutput:
    """What a tool gives back to the agent that called it."""

    content: str
    images: tuple[Image, ...] = ()
    facts: tuple[tuple[str, str | int | float | bool], ...] = ()
    """What the record and the span tell of the call beside its text, which the model does not
    see: names as in ``traces/schema.py``, and values."""


class Resources(Protocol):
    """What an agent holds while it lives: sandboxes, sessions. Closed when the agent ends."""

    async def get(
        self, key: str, start: Callable[[], AbstractAsyncContextManager[ResourceT]]
    ) -> ResourceT:
        """The resource ``key`` of this agent, started on first use."""
        ...


@dataclass(slots=True, kw_only=True)
class RunContext(Generic[DepsT]):
    """Who calls a tool, and with what at hand.

    A tool function whose first parameter is a ``RunContext`` gets it; the model does not see it.
    """

    episode_id: str
    agent_path: str
    """``main`` for the orchestrator, ``main/NAME.3`` for a child."""
    call_id: str
    deps: DepsT
    """What the app gave with the task (``Swarm.run(…, deps=…)``)."""
    resources: Resources
    files: tuple[Image, ...] = ()
    """The files given with the task, offered to tools by their names."""
    is_retry: bool = False
    """Whether an earlier process may have begun this very call and did not live to record it."""

    @property
    def idempotency_key(self) -> str:
        """Names this call in every run of its episode: what makes a second try recognisable."""
        return f"{self.episode_id}/{self.agent_path}/{self.call_id}"


class Tool(Protocol):
    """One action that an agent can take."""

    @property
    def spec(self) -> ToolSpec:
        """What the model is told."""
        ...

    async def __call__(self, arguments: Mapping[str, Any], context: RunContext[Any]) -> ToolOutput:
        """Run the call.

        Raises:
            ToolError: the text goes back to the model as an error result. Any other exception is
                caught at the runtime's tool boundary and becomes an error result as well.
        """
        ...


@dataclass(frozen=True, slots=True)
class Task:
    """What a user asks for."""

    prompt: str
    files: tuple[Image, ...] = ()
    """Pictures given with the task."""
