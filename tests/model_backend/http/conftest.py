"""A real chat-completions server on the loopback, with a script of answers and faults.

Requests are checked against the types of the official ``openai`` package, and answers are built
from its models.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_message_function_tool_call import (
    ChatCompletionMessageFunctionToolCall,
    Function,
)
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from openai.types.completion_usage import PromptTokensDetails
from pydantic import TypeAdapter

Step = Callable[[web.Request], Awaitable[web.StreamResponse]]
REQUEST = TypeAdapter(CompletionCreateParamsNonStreaming)


def as_openai_reads_it(body: dict[str, Any]) -> dict[str, Any]:
    """The request after openai's types: fields that they do not know are gone, lists are read."""
    return json.loads(json.dumps(REQUEST.validate_python(body), default=list))


@dataclass
class ChatServer:
    """What the server was asked, and what it will do next."""

    steps: list[Step]
    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    remotes: set[Any] = field(default_factory=set)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)
    answers_get: dict[str, Any] = field(default_factory=dict)
    spell: Callable[[list[int]], str] = str
    is_silent: bool = False
    """It takes questions about itself and never answers them."""

    def be(self, *, answers_get: dict[str, Any], spell: Callable[[list[int]], str]) -> None:
        """Pass for a SGLang server: what it tells of itself, and how it spells tokens."""
        self.answers_get, self.spell = answers_get, spell

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        tokens = (await request.json())["tokens"]
        return web.json_response({"text": [self.spell(ids) for ids in tokens]})

    async def tell(self, request: web.Request) -> web.StreamResponse:
        if self.is_silent:
            await asyncio.sleep(60)
        if request.path not in self.answers_get:
            raise web.HTTPNotFound
        return web.json_response(self.answers_get[request.path])

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.asked.set()
        self.headers.append(dict(request.headers))
        self.remotes.add(request.transport.get_extra_info("peername"))
        step = self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]
        try:
            return await step(request)
        except asyncio.CancelledError:
            self.disconnected.set()
            raise


@asynccontextmanager
async def serving(*steps: Step) -> AsyncIterator[ChatServer]:
    """A server that does ``steps`` one by one, the last for ever."""
    server = ChatServer(list(steps))
    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/chat/completions", server.answer)
    app.router.add_post("/generate", server.answer)
    app.router.add_post("/abort_request", server.answer)
    app.router.add_post("/v1/detokenize", server.detokenize)
    app.router.add_get("/{path:.*}", server.tell)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.base_url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


def says(
    content: str | None = "hello",
    *,
    calls: tuple[tuple[str, str, str], ...] = (),
    finish_reason: Any = None,
    logprobs: ChoiceLogprobs | None = None,
    **more: Any,
) -> Step:
    """Answer with openai's own ``ChatCompletion``; ``calls`` are (id, name, arguments)."""
    tool_calls = [
        ChatCompletionMessageFunctionToolCall(
            id=call_id, type="function", function=Function(name=name, arguments=arguments)
        )
        for call_id, name, arguments in calls
    ]
    completion = ChatCompletion(
        id="chatcmpl-1",
        object="chat.completion",
        created=1,
        model="kimi-k2.5",
        choices=[
            Choice(
                index=0,
                finish_reason=finish_reason or ("tool_calls" if calls else "stop"),
                logprobs=logprobs,
                message=ChatCompletionMessage(
                    role="assistant", content=content, tool_calls=tool_calls or None, **more
                ),
            )
        ],
        usage=CompletionUsage(
            prompt_tokens=20,
            completion_tokens=7,
            total_tokens=27,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=12),
        ),
    )
    return replies(completion.model_dump(mode="json"))


def replies(body: Any, status: int = 200, **headers: str) -> Step:
    """Answer with any JSON."""

    async def step(request: web.Request) -> web.StreamResponse:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.json_response(body, status=status, headers=named)

    return step


@pytest.fixture
def wire() -> SimpleNamespace:
    """What the tests take from here."""
    return SimpleNamespace(
        serving=serving, says=says, replies=replies, as_openai_reads_it=as_openai_reads_it
    )
