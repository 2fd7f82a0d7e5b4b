"""``OpenAIModel`` against a real server; its requests are read by openai's own types."""

import base64
import json

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionTokenLogprob
from openai.types.chat.chat_completion import ChoiceLogprobs

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.http import Retry
from swarm_sdk.model_backend.openai_client import OpenAIModel
from swarm_sdk.types import Image, Message, Model, Sampling, ToolSpec

pytestmark = pytest.mark.anyio

SEARCH = ToolSpec("search", "Find pages.", {"type": "object", "properties": {"q": {}}})
PYTHON = ToolSpec("ipython", "Run code.", {"type": "object", "properties": {"code": {}}})
PICTURE = Image(b"\x89PNG not decoded by the client", "image/png", "coins.png")
DEFAULT = Sampling()
QUESTION = (Message("system", "Be brief."), Message("user", "How high is K2?"))


def model_of(server, **settings) -> OpenAIModel:
    settings.setdefault("retry", Retry(attempts=3, first_wait_s=0.01, longest_wait_s=0.02))
    return OpenAIModel(server.base_url + "/v1", "kimi-k2.5", **settings)


async def first_turn(server, *, tools=(SEARCH, PYTHON), sampling=DEFAULT, **settings):
    model = model_of(server, **settings)
    try:
        dialogue = model.dialogue(tools)
        dialogue.observe(QUESTION)
        return await dialogue.sample(sampling)
    finally:
        await model.aclose()


async def test_a_conversation_with_parallel_calls_is_the_one_that_openais_client_sends(wire):
    calls = (("call_a", "search", '{"q": "K2"}'), ("call_b", "search", '{"q": "K1"}'))
    sampling = Sampling(temperature=0.5, top_p=0.9, max_tokens=64, seed=3)
    async with wire.serving(wire.says(None, calls=calls), wire.says("8611 m")) as server:
        model: Model = model_of(server, api_key="key-1")
        dialogue = model.dialogue([SEARCH])
        assert dialogue.observe(QUESTION) == ()
        turn = await dialogue.sample(sampling)
        assert [call.id for call in turn.message.tool_calls] == [
            "functions.search:0",
            "functions.search:1",
        ]
        assert [call.arguments for call in turn.message.tool_calls] == [{"q": "K2"}, {"q": "K1"}]
        dialogue.observe(
            [
                Message("tool", f"about {call.arguments['q']}", tool_call_id=call.id)
                for call in turn.message.tool_calls
            ]
        )
        last = await dialogue.sample(sampling)
        await model.aclose()
    assert last.message == Message("assistant", "8611 m")

    async with wire.serving(wire.says(None, calls=calls), wire.says("8611 m")) as theirs:
        client = AsyncOpenAI(base_url=theirs.base_url + "/v1", api_key="key-1")
        messages = [{"role": m.role, "content": m.content} for m in QUESTION]
        function = {"name": "search", "description": "Find pages.", "parameters": SEARCH.parameters}
        request = {
            "model": "kimi-k2.5",
            "tools": [{"type": "function", "function": function}],
            "temperature": 0.5,
            "top_p": 0.9,
            "max_tokens": 64,
            "seed": 3,
        }
        answer = (await client.chat.completions.create(messages=messages, **request)).choices[0]
        messages.append(answer.message.model_dump(exclude_none=True) | {"content": ""})
        for call in answer.message.tool_calls:
            text = f"about {json.loads(call.function.arguments)['q']}"
            messages.append({"role": "tool", "tool_call_id": call.id, "content": text})
        await client.chat.completions.create(messages=messages, **request)
        await client.close()

    assert server.bodies == theirs.bodies
    assert [h["Authorization"] for h in server.headers] == ["Bearer key-1"] * 2
    for body in server.bodies:
        assert wire.as_openai_reads_it(body) == body


async def test_usage_and_finish_reason_are_kept_and_token_ids_are_empty(wire):
    async with wire.serving(wire.says("cut he", finish_reason="length")) as server:
        generation = (await first_turn(server)).generation
    assert generation.token_ids == ()
    assert generation.logprobs == ()
    assert generation.finish_reason == "length"
    assert generation.num_prompt_tokens == 20
    assert generation.num_cached_tokens == 12
    assert generation.num_completion_tokens == 7


async def test_such_a_model_is_not_replayable(wire):
    async with wire.serving(wire.says()) as server:
        model = model_of(server)
        assert (model.name, model.is_replayable) == ("kimi-k2.5", False)


async def test_logprobs_are_asked_for_and_kept_only_on_request(wire):
    tokens = [
        ChatCompletionTokenLogprob(token=t, logprob=p, top_logprobs=[])
        for t, p in (("a", -0.5), ("b", -1.5))
    ]
    async with wire.serving(wire.says("ab", logprobs=ChoiceLogprobs(content=tokens))) as server:
        generation = (await first_turn(server, keep_logprobs=True)).generation
        await first_turn(server)
    assert generation.logprobs == (-0.5, -1.5)
    assert [body.get("logprobs") for body in server.bodies] == [True, None]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
async def test_reasoning_is_read_and_goes_back_under_the_servers_own_name(wire, name):
    step = wire.says("8611 m", **{name: "K2 is in Pakistan"})
    async with wire.serving(step) as server:
        model = model_of(server)
        dialogue = model.dialogue([])
        dialogue.observe(QUESTION)
        turn = await dialogue.sample(Sampling())
        dialogue.observe([Message("user", "And K1?")])
        await dialogue.sample(Sampling())
        await model.aclose()
    assert turn.message.reasoning == "K2 is in Pakistan"
    assert server.bodies[1]["messages"][2] == {
        "role": "assistant",
        "content": "8611 m",
        name: "K2 is in Pakistan",
    }
    assert "tools" not in server.bodies[0]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ('{"q": "K2', 'the arguments of search must be one JSON object, but they were: {"q": "K2'),
        ('["K2"]', 'the arguments of search must be one JSON object, but they were: ["K2"]'),
        ("{} {}", "the arguments of search must be one JSON object, but they were: {} {}"),
    ],
)
async def test_malformed_arguments_become_the_calls_error_and_go_back_as_json(
    wire, arguments, error
):
    calls = (("a", "search", arguments), ("b", "ipython", '{"code": "1"}'))
    async with wire.serving(wire.says(None, calls=calls), wire.says("done")) as server:
        model = model_of(server)
        dialogue = model.dialogue([SEARCH, PYTHON])
        dialogue.observe(QUESTION)
        bad, good = (await dialogue.sample(Sampling())).message.tool_calls
        dialogue.observe([Message("tool", "error: …", tool_call_id=bad.id)])
        await dialogue.sample(Sampling())
        await model.aclose()
    assert (bad.error, bad.arguments, bad.raw_arguments) == (error, {}, arguments)
    assert (good.id, good.error, good.arguments) == ("functions.ipython:1", None, {"code": "1"})
    sent = server.bodies[1]["messages"][2]["tool_calls"][0]
    assert json.loads(sent["function"]["arguments"]) == {"not_a_json_object": arguments}
    assert server.bodies[1]["messages"][3]["tool_call_id"] == "a"


async def test_arguments_cut_at_the_token_limit_say_so(wire):
    step = wire.says(None, calls=(("a", "search", '{"q": "K'),), finish_reason="length")
    async with wire.serving(step) as server:
        (call,) = (await first_turn(server)).message.tool_calls
    assert call.error == "the call of search was cut at the token limit; write a shorter one"


async def test_an_unknown_tool_is_named_beside_the_known_ones(wire):
    async with wire.serving(wire.says(None, calls=(("a", "serach", "{}"),))) as server:
        (call,) = (await first_turn(server)).message.tool_calls
    assert call.error == "there is no tool 'serach'; the tools are: search, ipython"


async def test_a_call_without_any_arguments_is_well_formed(wire):
    async with wire.serving(wire.says(None, calls=(("a", "search", ""),))) as server:
        (call,) = (await first_turn(server)).message.tool_calls
    assert (call.arguments, call.error) == ({}, None)


async def test_call_numbers_go_on_over_the_dialogue(wire):
    one = wire.says(None, calls=(("same id", "search", "{}"),))
    async with wire.serving(one) as server:
        model = model_of(server)
        dialogue = model.dialogue([SEARCH])
        dialogue.observe(QUESTION)
        ids = []
        for _ in range(3):
            (call,) = (await dialogue.sample(Sampling())).message.tool_calls
            dialogue.observe([Message("tool", "nothing", tool_call_id=call.id)])
            ids.append(call.id)
        await model.aclose()
    assert ids == ["functions.search:0", "functions.search:1", "functions.search:2"]


async def test_pictures_go_as_data_urls_and_those_of_tools_follow_the_last_result(wire):
    calls = (("a", "ipython", "{}"), ("b", "ipython", "{}"))
    async with wire.serving(wire.says(None, calls=calls), wire.says("ok")) as server:
        model = model_of(server)
        dialogue = model.dialogue([PYTHON])
        dialogue.observe([Message("user", "Count them.", images=(PICTURE,))])
        first, second = (await dialogue.sample(Sampling())).message.tool_calls
        dialogue.observe([Message("tool", "drawn", images=(PICTURE,), tool_call_id=first.id)])
        dialogue.observe([Message("tool", "2", tool_call_id=second.id)])
        await dialogue.sample(Sampling())
        await model.aclose()
    messages = server.bodies[1]["messages"]
    assert wire.as_openai_reads_it(server.bodies[1]) == server.bodies[1]
    assert [message["role"] for message in messages] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
    ]
    encoded = base64.b64encode(PICTURE.data).decode()
    url = {"url": f"data:image/png;base64,{encoded}"}
    assert messages[0]["content"] == [
        {"type": "image_url", "image_url": url},
        {"type": "text", "text": "Count them."},
    ]
    assert messages[4]["content"] == [
        {"type": "text", "text": "Picture returned by functions.ipython:0:"},
        {"type": "image_url", "image_url": url},
    ]


async def test_a_model_that_cannot_see_reads_what_the_pictures_hold(wire):
    shown = Image(b"png", name="shown-0.png", description="4 x 3 pixels, #ffffff 100 %")
    calls = (("a", "ipython", "{}"),)
    async with wire.serving(wire.says(None, calls=calls), wire.says("ok")) as server:
        model = model_of(server, has_vision=False)
        dialogue = model.dialogue([PYTHON])
        dialogue.observe([Message("user", "Count them.", images=(PICTURE,))])
        [made] = (await dialogue.sample(Sampling())).message.tool_calls
        dialogue.observe([Message("tool", "drawn", images=(shown,), tool_call_id=made.id)])
        await dialogue.sample(Sampling())
        await model.aclose()
    contents = [message["content"] for message in server.bodies[1]["messages"]]
    assert contents[0] == "[image coins.png]\nCount them."
    assert contents[2] == "[image shown-0.png: 4 x 3 pixels, #ffffff 100 %]\ndrawn"
    assert len(contents) == 3


async def test_a_recorded_answer_can_be_observed_again(wire):
    calls = (("call_x", "search", '{"q": "K2"}'),)
    async with wire.serving(wire.says("I look.", calls=calls), wire.says("ok")) as server:
        recorded = (await first_turn(server)).message
        model = model_of(server)
        dialogue = model.dialogue([SEARCH])
        dialogue.observe([*QUESTION, recorded])
        dialogue.observe([Message("tool", "8611 m", tool_call_id="functions.search:0")])
        await dialogue.sample(Sampling())
        await model.aclose()
    answer, result = server.bodies[1]["messages"][2:]
    assert answer["tool_calls"][0]["id"] == result["tool_call_id"] == "functions.search:0"
    assert wire.as_openai_reads_it(server.bodies[1]) == server.bodies[1]


async def test_an_error_appends_nothing_and_the_dialogue_goes_on(wire):
    refuse = wire.replies({"error": {"message": "no such model"}}, status=404)
    async with wire.serving(refuse, wire.says("now")) as server:
        model = model_of(server)
        dialogue = model.dialogue([])
        dialogue.observe(QUESTION)
        with pytest.raises(ModelError, match="answered 404: no such model") as caught:
            await dialogue.sample(Sampling())
        assert (await dialogue.sample(Sampling())).message.content == "now"
        await model.aclose()
    assert (caught.value.status, caught.value.retryable) == (404, False)
    assert server.bodies[0] == server.bodies[1]


async def test_a_prompt_over_the_context_is_a_context_overflow(wire):
    text = (
        "This model's maximum context length is 8192 tokens. However, you requested 9000 tokens "
        "(8500 in the messages, 500 in the completion). Please reduce the length."
    )
    step = wire.replies({"error": {"message": text, "code": "context_length_exceeded"}}, status=400)
    async with wire.serving(step) as server:
        with pytest.raises(ContextOverflow) as caught:
            await first_turn(server)
    assert (caught.value.num_prompt_tokens, caught.value.limit_tokens) == (8500, 8192)
    assert len(server.bodies) == 1


async def test_an_answer_of_another_protocol_is_named(wire):
    async with wire.serving(wire.replies({"choices": []})) as server:
        with pytest.raises(ModelError, match=r"no chat completion \(choices: "):
            await first_turn(server)


async def test_a_filtered_answer_is_an_error(wire):
    async with wire.serving(wire.says("", finish_reason="content_filter")) as server:
        with pytest.raises(ModelError, match="content filter"):
            await first_turn(server)


async def test_a_servers_own_fields_are_sent_and_ours_cannot_be_replaced(wire):
    async with wire.serving(wire.says()) as server:
        await first_turn(server, extra_body={"thinking": {"type": "disabled"}})
        await first_turn(server, max_tokens_field="max_completion_tokens")
    assert server.bodies[0]["thinking"] == {"type": "disabled"}
    assert server.bodies[1]["max_completion_tokens"] == Sampling().max_tokens
    assert "max_tokens" not in server.bodies[1]
    with pytest.raises(ConfigError, match="cannot set messages"):
        OpenAIModel("http://localhost", "m", extra_body={"messages": []})


async def test_stop_token_ids_are_refused_before_anything_is_sent(wire):
    async with wire.serving(wire.says()) as server:
        with pytest.raises(ConfigError, match="stop_token_ids"):
            await first_turn(server, sampling=Sampling(stop_token_ids=(1,)))
    assert server.bodies == []


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/v1", "http://", "http://h:x/v1"])
def test_a_wrong_address_is_refused_at_once(url):
    with pytest.raises(ConfigError, match="is not the address of a server"):
        OpenAIModel(url, "m")


def test_a_missing_model_name_is_refused_at_once():
    with pytest.raises(ConfigError, match="name the model"):
        OpenAIModel("http://localhost/v1", "")
