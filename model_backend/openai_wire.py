"""Chat completions on the wire: our records to JSON, the server's JSON to what we read of it.

Servers add fields of their own; those that are not named here are left out.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, Field

from swarm_sdk.errors import ModelError
from swarm_sdk.model_backend.http import data_url
from swarm_sdk.types import Generation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swarm_sdk.types import FinishReason, Image, Message, ToolCall, ToolSpec

WireMessage = dict[str, Any]
"""One entry of ``messages``, ready for JSON."""

_LONGEST_QUOTE: Final = 120


class Function(BaseModel):
    """Name and arguments of a call; the arguments are the model's own text."""

    name: str
    arguments: str = ""


class AnsweredCall(BaseModel):
    """A tool call of an answer."""

    id: str | None = None
    function: Function


class AnsweredMessage(BaseModel):
    """The message of an answer."""

    content: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """The reasoning, as Moonshot, DeepSeek and SGLang name it."""
    reasoning: str | None = None
    """The reasoning, as vLLM and OpenRouter name it."""
    tool_calls: list[AnsweredCall] | None = None


class TokenLogprob(BaseModel):
    """Natural log-probability of one sampled token."""

    logprob: float


class Logprobs(BaseModel):
    """Those of all tokens of the answer."""

    content: list[TokenLogprob] | None = None


class Choice(BaseModel):
    """One answer."""

    message: AnsweredMessage
    finish_reason: str | None = None
    logprobs: Logprobs | None = None

    def finished(self) -> FinishReason:
        """Why the answer ends.

        Raises:
            ModelError: the server's content filter cut it.
        """
        if self.finish_reason == "content_filter":
            raise ModelError("the server's content filter cut the answer; change the task")
        if self.finish_reason == "length":
            return "length"
        return "abort" if self.finish_reason == "abort" else "stop"


class PromptDetails(BaseModel):
    """What the prompt's tokens were."""

    cached_tokens: int | None = None


class AnsweredUsage(BaseModel):
    """Tokens of one call."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    cached_tokens: int | None = None
    """Where Moonshot tells it."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that the server had in its cache."""
        details = self.prompt_tokens_details
        return (details.cached_tokens if details is not None else None) or self.cached_tokens or 0


class Completion(BaseModel):
    """An answer of ``/chat/completions``; we ask for one choice."""

    choices: Annotated[list[Choice], Field(min_length=1)]
    usage: AnsweredUsage | None = None

    def generation(self, finish_reason: FinishReason) -> Generation:
        """Give what is known of the tokens: their number, and log-probabilities where asked for."""
        usage = self.usage or AnsweredUsage()
        logprobs = self.choices[0].logprobs or Logprobs()
        return Generation(
            token_ids=(),
            logprobs=tuple(token.logprob for token in logprobs.content or ()),
            finish_reason=finish_reason,
            num_prompt_tokens=usage.prompt_tokens,
            num_cached_tokens=usage.num_cached_tokens,
            num_completion_tokens=usage.completion_tokens,
        )


def wire_tool(tool: ToolSpec) -> dict[str, Any]:
    """Declare a tool."""
    return {
        "type": "function",
        "function": {
            "name": tool.name,
            "description": tool.description,
            "parameters": dict(tool.parameters),
        },
    }


def wire_message(message: Message) -> WireMessage:
    """Render a message that this server did not sample: system, user, or a recorded answer."""
    if message.role == "assistant":
        calls = [wire_call(call, call.id) for call in message.tool_calls]
        wire: WireMessage = {"role": "assistant", "content": message.content}
        return wire | ({"tool_calls": calls} if calls else {})
    if not message.images:
        return {"role": message.role, "content": message.content}
    pictures = [image_part(image) for image in message.images]
    return {"role": message.role, "content": [*pictures, text_part(message.content)]}


def wire_answer(answer: AnsweredMessage, calls: list[dict[str, Any]]) -> WireMessage:
    """Render what the server said as the next request repeats it; ``calls`` by ``wire_call``."""
    wire: WireMessage = {"role": "assistant", "content": answer.content or answer.refusal or ""}
    if answer.reasoning_content is not None:
        wire["reasoning_content"] = answer.reasoning_content
    elif answer.reasoning is not None:
        wire["reasoning"] = answer.reasoning
    return wire | ({"tool_calls": calls} if calls else {})


def wire_call(call: ToolCall, wire_id: str) -> dict[str, Any]:
    """Render a tool call under the id ``wire_id``; its arguments always parse as a JSON object."""
    text = call.raw_arguments or json.dumps(dict(call.arguments), ensure_ascii=False)
    if _json_object(text) is None:
        text = json.dumps({"not_a_json_object": text}, ensure_ascii=False)
    return {"id": wire_id, "type": "function", "function": {"name": call.name, "arguments": text}}


def text_part(text: str) -> dict[str, Any]:
    """Render text as one part of a message."""
    return {"type": "text", "text": text}


def image_part(image: Image) -> dict[str, Any]:
    """Render a picture as one part of a message."""
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def read_arguments(function: Function, *, is_cut: bool) -> tuple[Mapping[str, Any], str | None]:
    """Parse the arguments of a call, or say what is wrong with them in one sentence.

    No text at all is a call without arguments. ``is_cut`` tells that the answer reached its token
    limit.
    """
    if not function.arguments.strip():
        return {}, None
    arguments = _json_object(function.arguments)
    if arguments is not None:
        return arguments, None
    if is_cut:
        return {}, f"the call of {function.name} was cut at the token limit; write a shorter one"
    text = function.arguments
    quote = text if len(text) <= _LONGEST_QUOTE else text[:_LONGEST_QUOTE] + "…"
    return {}, f"the arguments of {function.name} must be one JSON object, but they were: {quote}"


def _json_object(text: str) -> dict[str, Any] | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
