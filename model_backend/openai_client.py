"""A model behind any server that speaks OpenAI's chat completions.

    Dialogue.observe(messages)  kept as wire messages, nothing is sent
    Dialogue.sample(sampling)   POST /chat/completions {model, messages, tools, …} -> one Turn

Such a server tells no token ids, so its episodes are not replayable bit for bit: ``token_ids`` is
empty. What differs on the wire from our records:

- Tool calls have the server's ids there and ours (``functions.NAME:IDX``) everywhere else.
- ``tool`` messages hold text only. Pictures that tools returned follow in one user message after
  the last result of the turn, each under the id of its call.
- The model's reasoning goes back under the field name that the server used for it, if it used one.
- Arguments that are no JSON object go back wrapped in one, because many servers parse them again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal

from pydantic import ValidationError

from swarm_sdk.errors import ConfigError, ModelError
from swarm_sdk.model_backend.http import Retry, ServerClient
from swarm_sdk.model_backend.openai_wire import (
    Completion,
    Function,
    WireMessage,
    image_part,
    read_arguments,
    text_part,
    wire_answer,
    wire_call,
    wire_message,
    wire_tool,
)
from swarm_sdk.types import Message, ToolCall, Turn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from swarm_sdk.types import Image, Sampling, ToolSpec

_OUR_FIELDS: Final = frozenset(
    {"model", "messages", "tools", "temperature", "top_p", "seed", "logprobs", "stream", "n"}
)
"""Fields of a request that ``extra_body`` cannot set."""


IMAGE_CHARS: Final = 3_000
"""What a picture counts in the estimate of a prompt's length."""


class OpenAIModel:
    """``Model`` over a chat-completions server: OpenAI, Moonshot, SGLang, vLLM, llama.cpp."""

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        keep_logprobs: bool = False,
        max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens",
        extra_body: Mapping[str, Any] | None = None,
        retry: Retry | None = None,
        timeout_s: float = 600.0,
        max_connections: int = 0,
        has_vision: bool = True,
    ) -> None:
        """Check the settings; connects to nothing.

        ``base_url`` ends before ``/chat/completions``, mostly with ``/v1``. ``keep_logprobs`` asks
        for the log-probabilities of the sampled tokens. OpenAI's reasoning models want
        ``max_completion_tokens``. ``extra_body`` is added to every request (a server's own
        fields). ``timeout_s`` bounds one request; ``max_connections`` = 0 sets no bound.
        Without ``has_vision`` the model reads size and colours in the place of pictures.

        Raises:
            ConfigError: a setting is wrong.
        """
        if not model:
            raise ConfigError("name the model that the server shall use: openai:URL#MODEL")
        self._extra_body = dict(extra_body or {})
        if taken := sorted({*_OUR_FIELDS, max_tokens_field} & self._extra_body.keys()):
            raise ConfigError(f"extra_body cannot set {', '.join(taken)}")
        self._client = ServerClient(
            base_url, api_key=api_key, timeout_s=timeout_s, max_connections=max_connections
        )
        self._name = model
        self.has_vision: bool = has_vision
        self._keep_logprobs = keep_logprobs
        self._max_tokens_field = max_tokens_field
        self._retry = Retry() if retry is None else retry

    @property
    def name(self) -> str:
        """The server's name of the model."""
        return self._name

    @property
    def is_replayable(self) -> bool:
        """Never: the server does not tell token ids."""
        return False

    def dialogue(self, tools: Sequence[ToolSpec], *, first_call_index: int = 0) -> OpenAIDialogue:
        """Open a conversation in which ``tools`` can be called."""
        return OpenAIDialogue(self, tools, first_call_index)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def complete(
        self,
        messages: Sequence[WireMessage],
        tools: Sequence[dict[str, Any]],
        sampling: Sampling,
    ) -> Completion:
        """Ask for one completion, again where that can help.

        Raises:
            ConfigError: ``sampling`` has stop token ids, which this protocol does not know.
            ContextOverflow, ModelError: as ``ServerClient.post``, or the answer is no completion.
        """
        if sampling.stop_token_ids:
            raise ConfigError("a chat-completions server takes no stop_token_ids; leave them empty")
        body: dict[str, Any] = {
            "model": self._name,
            "messages": list(messages),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._max_tokens_field: sampling.max_tokens,
        }
        if tools:
            body["tools"] = tools
        if sampling.seed is not None:
            body["seed"] = sampling.seed
        if self._keep_logprobs:
            body["logprobs"] = True
        body |= self._extra_body
        answer = await self._retry.run(
            lambda: self._client.post("/chat/completions", body, is_paced=True)
        )
        try:
            return Completion.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "body"
            raise ModelError(
                f"{self._client.base_url} sent an answer that is no chat completion "
                f"({place}: {first['msg']})"
            ) from error


class OpenAIDialogue:
    """One conversation as the list of its wire messages."""

    def __init__(
        self, model: OpenAIModel, tools: Sequence[ToolSpec], first_call_index: int = 0
    ) -> None:
        self._model = model
        self._known = tuple(tool.name for tool in tools)
        self._wire_tools = [wire_tool(tool) for tool in tools]
        self._messages: list[WireMessage] = []
        self._wire_ids: dict[str, str] = {}
        """The server's id of each of our call ids."""
        self._num_calls = first_call_index
        self._tool_images: list[tuple[str, Image]] = []
        """Pictures of tool results, with their call ids, that no user message holds yet."""
        self._num_known_tokens = 0
        """Tokens of the context up to the last answer, as the server counted them."""
        self._num_new_chars = 0

    @property
    def num_prompt_tokens(self) -> int:
        """An estimate: what the server counted up to its last answer, a token for 3 characters."""
        return self._num_known_tokens + self._num_new_chars // 3 + 8

    @property
    def messages(self) -> tuple[WireMessage, ...]:
        """What was observed and answered, as it goes over the wire."""
        return tuple(self._messages)

    def observe(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Append messages; returns no ids, since the server does not tell them."""
        for given in messages:
            message = given if self._model.has_vision else _told_in_words(given)
            self._num_new_chars += len(message.content) + IMAGE_CHARS * len(message.images)
            if message.role == "tool":
                call_id = message.tool_call_id
                self._messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": self._wire_ids.get(call_id, call_id),
                        "content": message.content,
                    }
                )
                self._tool_images += [(call_id, image) for image in message.images]
            else:
                self._flush_tool_images()
                self._messages.append(wire_message(message))
                self._num_calls += len(message.tool_calls)
        return ()

    async def sample(self, sampling: Sampling) -> Turn:
        """Draw the next turn and append it; on an error nothing is appended.

        Raises:
            ModelError: as ``OpenAIModel.complete``, or the server's content filter cut the answer.
            ContextOverflow, ConfigError: as ``OpenAIModel.complete``.
        """
        self._flush_tool_images()
        completion = await self._model.complete(self._messages, self._wire_tools, sampling)
        choice = completion.choices[0]
        answer, finish_reason = choice.message, choice.finished()
        calls: list[ToolCall] = []
        wire_calls: list[dict[str, Any]] = []
        for answered in answer.tool_calls or ():
            index = self._num_calls + len(calls)
            call = self._read_call(answered.function, index, is_cut=finish_reason == "length")
            self._wire_ids[call.id] = answered.id or call.id
            wire_calls.append(wire_call(call, self._wire_ids[call.id]))
            calls.append(call)
        self._num_calls += len(calls)
        self._messages.append(wire_answer(answer, wire_calls))
        message = Message(
            role="assistant",
            content=answer.content or answer.refusal or "",
            reasoning=answer.reasoning_content or answer.reasoning or "",
            tool_calls=tuple(calls),
        )
        generation = completion.generation(finish_reason)
        self._num_known_tokens = generation.num_prompt_tokens + generation.num_completion_tokens
        self._num_new_chars = 0
        return Turn(message=message, generation=generation)

    def replay(self, turn: Turn) -> None:
        """Append a recorded answer; its calls keep our ids on the wire."""
        self.observe([turn.message])

    def _read_call(self, function: Function, index: int, *, is_cut: bool) -> ToolCall:
        """Read one call; what is wrong with it becomes its ``error``."""
        known = self._known
        if function.name in known:
            arguments, error = read_arguments(function, is_cut=is_cut)
        else:
            arguments = {}
            error = (
                f"there is no tool {function.name!r}; the tools are: {', '.join(known) or 'none'}"
            )
        return ToolCall(
            id=f"functions.{function.name}:{index}",
            name=function.name,
            arguments=arguments,
            raw_arguments=function.arguments,
            error=error,
        )

    def _flush_tool_images(self) -> None:
        if not self._tool_images:
            return
        parts: list[dict[str, Any]] = []
        for call_id, image in self._tool_images:
            parts += [text_part(f"Picture returned by {call_id}:"), image_part(image)]
        self._messages.append({"role": "user", "content": parts})
        self._tool_images = []


def _told_in_words(message: Message) -> Message:
    words = "".join(f"{image.in_words}\n" for image in message.images)
    return replace(message, content=words + message.content, images=())
