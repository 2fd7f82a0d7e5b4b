"""``SglangEngine`` against a server on the loopback that answers as SGLang 0.5.23 was seen to."""

import asyncio
import base64
import json
import logging
import struct
import tracemalloc

import anyio
import pytest
from aiohttp import web

from swarm_sdk.config import nano_directory
from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.chat.tokenizer import Tokenizer
from swarm_sdk.model_backend.http import Retry
from swarm_sdk.model_backend.sglang_client import ServedModel, SglangEngine, open_sglang
from swarm_sdk.model_backend.sglang_wire import ExpertsShape, Piece, generation_of
from swarm_sdk.types import Engine, Image, Sampling

QUICK = Retry(attempts=3, first_wait_s=0.01, longest_wait_s=0.02)
DEFAULT = Sampling()
TOKENIZER = Tokenizer.from_dir(nano_directory())
NANO = ServedModel(TOKENIZER, ExpertsShape(num_layers=2, num_chosen=2))
PAD = TOKENIZER.special.media_pad
FACTS = {
    "/model_info": {
        "model_path": "m",
        "tokenizer_path": "t",
        "weight_version": "3",
        "has_image_understanding": True,
    },
    "/v1/models": {"data": [{"max_model_len": 8192}]},
    "/server_info": {
        "version": "0.5.23",
        "enable_deterministic_inference": False,
        "enable_return_routed_experts": True,
        "grammar_backend": "xgrammar",
    },
}


def told(**changes):
    """``FACTS`` with other values."""
    found = {path: facts | changes for path, facts in FACTS.items()}
    found["/v1/models"] = {"data": [{"max_model_len": changes.get("max_model_len", 8192)}]}
    return found


def serves(tokenizer=TOKENIZER, **changes):
    """What lets ``wire.serving`` pass for the server of a model with this tokenizer."""
    return {"answers_get": told(**changes), "spell": tokenizer.decode}


def another_tokenizer():
    """Ours with two tokens changed about."""
    ranks = sorted(TOKENIZER.ranks, key=TOKENIZER.ranks.__getitem__)
    ranks[300], ranks[301] = ranks[301], ranks[300]
    return Tokenizer({token: rank for rank, token in enumerate(ranks)})


def answer(ids=(11, 12, 2), finish=None, **info):
    """What ``/generate`` returns; only the parts that count."""
    return {
        "text": "",
        "output_ids": list(ids),
        "meta_info": {
            "finish_reason": finish or {"type": "stop", "matched": ids[-1]},
            "output_token_logprobs": [[-0.5 * k, token, None] for k, token in enumerate(ids)],
            "prompt_tokens": 40,
            "cached_tokens": 39,
            "completion_tokens": len(ids),
            "weight_version": "default",
            **info,
        },
    }


async def generate(server, ids=(1, 2, 3), sampling=DEFAULT, images=(), **settings):
    if "model" in settings and not server.answers_get:
        server.be(**serves())
    engine: Engine = SglangEngine(server.base_url, retry=QUICK, **settings)
    try:
        return await engine.generate(ids, sampling, images)
    finally:
        await engine.aclose()


@pytest.mark.anyio
async def test_ids_go_out_and_ids_with_logprobs_come_back(wire):
    sampling = Sampling(temperature=0.7, top_p=0.9, max_tokens=64, stop_token_ids=(2, 5))
    async with wire.serving(wire.replies(answer())) as server:
        generation = await generate(server, (1, 2, 3), sampling)
    (body,) = server.bodies
    assert body["input_ids"] == [1, 2, 3]
    assert body["return_logprob"] is True
    assert "image_data" not in body
    assert isinstance(body["sampling_params"].pop("sampling_seed"), int)
    assert body["sampling_params"] == {
        "temperature": 0.7,
        "top_p": 0.9,
        "max_new_tokens": 64,
        "stop_token_ids": [2, 5],
    }
    assert generation.token_ids == (11, 12, 2)
    assert generation.logprobs == (0.0, -0.5, -1.0)
    assert generation.finish_reason == "stop"
    assert generation.num_prompt_tokens == 40
    assert generation.num_cached_tokens == 39
    assert generation.num_completion_tokens == 3


@pytest.mark.anyio
async def test_every_request_without_a_seed_gets_a_fresh_one(wire):
    async with wire.serving(wire.replies(answer())) as server:
        for _ in range(2):
            await generate(server)
    first, second = (body["sampling_params"]["sampling_seed"] for body in server.bodies)
    assert first != second


@pytest.mark.anyio
async def test_a_picture_is_sent_with_one_placeholder_however_many_tokens_it_takes(wire):
    ids = (7, PAD, PAD, PAD, 8, PAD, PAD, 9)
    pictures = (Image(b"one"), Image(b"two", "image/jpeg"))
    async with wire.serving(wire.replies(answer())) as server:
        await generate(server, ids, images=pictures, model=NANO)
    (body,) = server.bodies
    assert body["input_ids"] == [7, PAD, 8, PAD, 9]
    assert body["image_data"] == ["data:image/png;base64,b25l", "data:image/jpeg;base64,dHdv"]


@pytest.mark.anyio
async def test_what_cannot_be_asked_is_refused_before_anything_is_sent(wire):
    async with wire.serving(wire.replies(answer())) as server:
        with pytest.raises(ConfigError, match="token_ids is empty"):
            await generate(server, ())
        with pytest.raises(ConfigError, match="ServedModel"):
            await generate(server, images=(Image(b""),))
    assert server.bodies == []


@pytest.mark.anyio
async def test_an_overflow_is_typed_and_not_tried_again(wire):
    text = "The input (9000 tokens) is longer than the model's context length (8192 tokens)."
    async with wire.serving(wire.replies({"error": {"message": text}}, status=400)) as server:
        with pytest.raises(ContextOverflow) as caught:
            await generate(server)
    assert (caught.value.num_prompt_tokens, caught.value.limit_tokens) == (9000, 8192)
    assert len(server.bodies) == 1


@pytest.mark.anyio
async def test_an_answer_is_cut_to_the_room_that_the_servers_context_leaves(wire):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves(max_model_len=12))
        for num_asked in (4096, 3):
            await generate(server, range(8), Sampling(max_tokens=num_asked), model=NANO)
        # A picture counts as what it takes, not as the one placeholder that is sent.
        await generate(server, (1, *[PAD] * 9), images=(Image(b"x"),), model=NANO)
        with pytest.raises(ContextOverflow) as caught:
            await generate(server, range(12), model=NANO)
    assert [body["sampling_params"]["max_new_tokens"] for body in server.bodies] == [4, 3, 2]
    assert (caught.value.num_prompt_tokens, caught.value.limit_tokens) == (12, 12)


@pytest.mark.anyio
async def test_every_try_has_a_request_id_of_its_own(wire):
    busy = wire.replies({"detail": "full"}, status=503)
    async with wire.serving(busy, busy, wire.replies(answer())) as server:
        await generate(server)
    assert len({body["rid"] for body in server.bodies}) == 3


def hanging():
    """A step that answers ``/generate`` only after ``/abort_request``; and the ids aborted."""
    aborted: list[str] = []
    told = asyncio.Event()

    async def step(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if request.path == "/abort_request":
            aborted.append(body["rid"])
            told.set()
            return web.Response()
        await told.wait()
        return web.json_response(answer((5, 6), {"type": "abort", "message": "Aborted"}))

    return step, aborted


@pytest.mark.anyio
async def test_a_cancelled_call_aborts_its_request(wire):
    step, aborted = hanging()
    async with wire.serving(step) as server:
        engine = SglangEngine(server.base_url)
        with anyio.move_on_after(0.2):
            await engine.generate((1,), Sampling())
        await engine.aclose()
    assert aborted == [server.bodies[0]["rid"]]


@pytest.mark.anyio
async def test_closing_ends_running_calls_with_an_abort(wire):
    step, aborted = hanging()
    found = []
    async with wire.serving(step) as server:
        engine = SglangEngine(server.base_url)

        async def call() -> None:
            found.append(await engine.generate((1,), Sampling()))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await server.asked.wait()
            await engine.aclose()
    assert aborted == [server.bodies[0]["rid"]]
    assert (found[0].finish_reason, found[0].token_ids) == ("abort", (5, 6))


@pytest.mark.anyio
async def test_a_call_that_waits_to_be_tried_again_sends_nothing_after_closing(wire):
    found = []
    async with wire.serving(wire.replies({}, status=503, Retry_After="0.2")) as server:
        engine = SglangEngine(server.base_url, retry=QUICK)

        async def call() -> None:
            found.append(await engine.generate((1,), DEFAULT))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await server.asked.wait()
            await anyio.sleep(0.05)
            await engine.aclose()
        assert len(server.bodies) == 1
        with pytest.raises(ModelError, match="the engine is closed; make a new one"):
            await engine.generate((1,), DEFAULT)
    assert found[0].finish_reason == "abort"
    assert len(server.bodies) == 1


@pytest.mark.anyio
async def test_a_call_that_the_server_ended_for_new_weights_is_asked_for_again(wire):
    ended = wire.replies(answer((5,), {"type": "abort", "message": "Aborted"}))
    async with wire.serving(ended, wire.replies(answer(weight_version="2"))) as server:
        generation = await generate(server)
    assert len(server.bodies) == 2
    assert (generation.token_ids, generation.weight_version) == ((11, 12, 2), 2)


@pytest.mark.anyio
async def test_a_call_that_the_server_ended_in_its_queue_is_asked_for_again(wire):
    ended = answer((), {"type": "abort", "message": "Abort in waiting queue"})
    del ended["meta_info"]["prompt_tokens"], ended["meta_info"]["cached_tokens"]
    async with wire.serving(wire.replies(ended), wire.replies(answer())) as server:
        assert (await generate(server)).token_ids == (11, 12, 2)


@pytest.mark.anyio
async def test_a_server_that_ignores_seeds_is_warned_of_once(wire, caplog):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves())
        engine = SglangEngine(server.base_url)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                await engine.generate((1,), Sampling(seed=7))
        facts = await engine.server()
        await engine.aclose()
    assert [body["sampling_params"]["sampling_seed"] for body in server.bodies] == [7, 7]
    assert len(caplog.records) == 1
    assert "ignores seeds" in caplog.text
    assert (facts.context_tokens, facts.weight_version, facts.honours_seeds) == (8192, 3, False)


@pytest.mark.anyio
async def test_another_kind_of_server_is_named(wire):
    async with wire.serving(wire.replies({})) as server:
        server.answers_get = {path: {} for path in ("/model_info", "/v1/models", "/server_info")}
        engine = SglangEngine(server.base_url)
        with pytest.raises(ModelError, match="not as a SGLang server does"):
            await engine.server()
        await engine.aclose()


@pytest.mark.anyio
async def test_where_sglangs_router_answers_the_servers_own_addresses_are_asked_for(wire):
    async with wire.serving(wire.replies(answer())) as server:
        server.answers_get = {
            "/get_server_info": {"router_manager": True, "routers_count": 1, "workers_count": 2}
        }
        with pytest.raises(ConfigError, match=r"own addresses in its place: sglang:URL1,URL2"):
            await generate(server, model=NANO)
        server.answers_get = {"/get_server_info": {"version": "0.1"}}
        with pytest.raises(ModelError, match="not as a SGLang server does"):
            await generate(server, model=NANO)
        server.answers_get = {"/": {}}
        with pytest.raises(ModelError, match="not as a SGLang server does"):
            await generate(server, model=NANO)
    assert server.bodies == []


@pytest.mark.parametrize(("told", "version"), [("default", 0), ("12", 12), (None, 0), ("v3", 0)])
def test_a_numeric_weight_version_is_kept_and_any_other_is_zero(told, version):
    assert generation_of(answer(weight_version=told)).weight_version == version


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ({"error": "x"}, "an answer without 'meta_info'"),
        ([], "an answer without"),
        (answer((1, 2)) | {"output_ids": [1]}, "token ids and log-probabilities that differ"),
        (answer((1, 2), {"type": "stop", "matched": 3}), "left the stop token 3 out"),
        (answer((1, 2), {"type": "dissolved"}), "an answer without 'dissolved'"),
    ],
)
def test_an_answer_that_would_spoil_the_record_is_refused(broken, sentence):
    with pytest.raises(ModelError, match=sentence):
        generation_of(broken)


@pytest.mark.anyio
async def test_another_tokenizer_behind_the_address_is_refused_before_any_id_is_sent(wire):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves(another_tokenizer()))
        with pytest.raises(ConfigError, match="tokenizer is another than ours"):
            await generate(server, model=NANO)
    assert server.bodies == []


@pytest.mark.anyio
async def test_what_a_server_cannot_do_is_said_in_one_sentence_before_any_id_is_sent(wire):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves(has_image_understanding=False))
        with pytest.raises(ConfigError, match="without vision"):
            await generate(server, images=(Image(b"x"),), model=NANO)
        with pytest.raises(ConfigError, match="the vocabulary has 4096"):
            await generate(server, (1, 4096), model=NANO)
    assert server.bodies == []


@pytest.mark.anyio
async def test_a_schema_goes_to_the_grammar(wire):
    async with wire.serving(wire.replies(answer())) as server:
        await generate(server, sampling=Sampling(json_schema='{"type": "null"}'), model=NANO)
    assert server.bodies[0]["sampling_params"]["json_schema"] == '{"type": "null"}'


@pytest.mark.anyio
async def test_a_server_without_a_grammar_gets_no_schema_and_is_warned_of_once(wire, caplog):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves(grammar_backend="none"))
        engine = SglangEngine(server.base_url, model=NANO)
        for _ in range(2):
            await engine.generate((1,), Sampling(json_schema="{}"))
        await engine.aclose()
    assert not any("json_schema" in body["sampling_params"] for body in server.bodies)
    assert len(caplog.records) == 1
    assert "has no grammar" in caplog.text


def packed(positions):
    """Experts as SGLang tells them, of 2 layers and 2 experts a token."""
    wide = b"".join(struct.pack("<4i", 300 + p, p, 0, 7) for p in positions)
    return base64.b64encode(wide).decode()


@pytest.mark.parametrize("sent", [range(5, 42), range(42)], ids=["those asked for", "all"])
@pytest.mark.anyio
async def test_experts_are_asked_for_from_a_position_on_and_read_as_uint16(wire, sent):
    replies = wire.replies(answer(routed_experts=packed(sent)))  # 40 prompt ids and 3 sampled
    async with wire.serving(replies) as server:
        generation = await generate(server, sampling=Sampling(experts_from=5), model=NANO)
    assert server.bodies[0]["routed_experts_start_len"] == 5
    assert server.bodies[0]["return_routed_experts"] is True
    experts = generation.routed_experts
    assert len(experts) == 37
    assert struct.unpack("<4H", experts.data[:8]) == (305, 5, 0, 7)
    assert struct.unpack("<4H", experts.data[-8:]) == (341, 41, 0, 7)


@pytest.mark.anyio
async def test_experts_are_not_asked_of_a_server_that_does_not_record_them(wire):
    async with wire.serving(wire.replies(answer())) as server:
        server.be(**serves(enable_return_routed_experts=False))
        generation = await generate(server, sampling=Sampling(experts_from=0), model=NANO)
    assert "return_routed_experts" not in server.bodies[0]
    assert generation.routed_experts is None


@pytest.mark.parametrize(
    ("told_experts", "sentence"),
    [
        (packed(range(7)), "7 positions where 42 were asked for"),
        (base64.b64encode(struct.pack("<4i", 70_000, 0, 0, 0) * 42).decode(), "above 65535"),
        (base64.b64encode(struct.pack("<4i", -1, 0, 0, 0) * 42).decode(), "above 65535"),
        ("?", "not base64"),
    ],
)
def test_experts_that_do_not_fit_are_refused(told_experts, sentence):
    with pytest.raises(ModelError, match=sentence):
        generation_of(answer(routed_experts=told_experts), shape=NANO.experts)


def test_tokens_sampled_under_two_versions_are_told_apart():
    spans = [{"version": "default", "start": 0, "end": 1}, {"version": "8", "start": 1, "end": 3}]
    generation = generation_of(answer(weight_version="8", weight_versions=spans))
    assert (generation.weight_version, generation.version_spans) == (8, ((0, 1), (8, 2)))
    one = generation_of(answer(weight_versions=spans[:1]))
    assert one.version_spans == ()


def events(*answers):
    """A stream of server-sent events."""
    lines = [b"data: " + json.dumps(one).encode() + b"\n\n" for one in answers]

    async def step(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in (*lines, b"data: [DONE]\n\n"):
            await response.write(line[:9])
            await asyncio.sleep(0)
            await response.write(line[9:])
        return response

    return step


async def stream(server, tell):
    engine = SglangEngine(server.base_url, retry=QUICK)
    try:
        return await engine.stream((1, 2), DEFAULT, tell)
    finally:
        await engine.aclose()


@pytest.mark.parametrize("repeats", [True, False], ids=["cumulative", "incremental"])
@pytest.mark.anyio
async def test_a_stream_tells_each_token_once_and_ends_with_the_whole(wire, repeats):
    ids, sent = (11, 12, 2), []
    for num in (1, 2, 3):
        one = answer(ids[:num], weight_version="4" if num < 3 else "5")
        info = one["meta_info"]
        if num < 3:
            info["finish_reason"] = None
        if not repeats:
            one["output_ids"] = one["output_ids"][-1:]
            info["output_token_logprobs"] = info["output_token_logprobs"][-1:]
        sent.append(one)
    pieces = []
    async with wire.serving(events(*sent)) as server:
        generation = await stream(server, pieces.append)
    assert server.bodies[0]["stream"] is True
    assert [(piece.first, piece.token_ids) for piece in pieces] == [
        (0, (11,)),
        (1, (12,)),
        (2, (2,)),
    ]
    assert [piece.weight_version for piece in pieces] == [4, 4, 5]
    assert isinstance(pieces[0], Piece)
    assert generation.token_ids == ids
    assert generation.logprobs == (0.0, -0.5, -1.0)
    assert generation.version_spans == ((4, 2), (5, 1))


@pytest.mark.anyio
async def test_ids_of_a_stream_that_differ_from_their_logprobs_are_refused(wire):
    second = answer((11, 12))
    second["output_ids"] = [13]
    second["meta_info"]["output_token_logprobs"] = [[-0.5, 12, None]]
    async with wire.serving(events(answer((11,), {"type": "length"}), second)) as server:
        with pytest.raises(ModelError, match="that differ"):
            await stream(server, lambda _: None)


@pytest.mark.anyio
async def test_an_error_in_the_middle_of_a_stream_is_typed(wire):
    text = "The input (9000 tokens) is longer than the model's context length (8192 tokens)."
    async with wire.serving(events({"error": {"message": text, "code": 400}})) as server:
        with pytest.raises(ContextOverflow):
            await stream(server, lambda _: None)
    async with wire.serving(events({"error": {"message": "no such thing"}})) as server:
        with pytest.raises(ModelError, match="no such thing"):
            await stream(server, lambda _: None)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "mine", [LookupError("mine"), ModelError("mine", retryable=True)], ids=["any", "like ours"]
)
@pytest.mark.anyio
async def test_what_the_listener_of_a_stream_raises_ends_the_call_and_the_request_at_once(
    wire, mine
):
    aborted = []

    async def step(request: web.Request) -> web.StreamResponse:
        if request.path == "/abort_request":
            aborted.append((await request.json())["rid"])
            return web.Response()
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: " + json.dumps(answer()).encode() + b"\n\n")
        await asyncio.sleep(60)
        return response

    def tell(piece):
        raise mine

    async with wire.serving(step) as server:
        with anyio.fail_after(2), pytest.raises(type(mine), match="mine") as raised:
            await stream(server, tell)
    assert raised.value is mine
    assert aborted == [server.bodies[0]["rid"]]


@pytest.mark.anyio
async def test_a_stream_that_is_ended_in_the_queue_is_asked_for_again(wire):
    """SGLang 0.5.11 ends it with all log-probabilities and the last id alone."""
    ended = answer((11, 12), {"type": "abort"}) | {"output_ids": [12]}
    events_of = [events(answer((11, 12), {"type": "length"}), ended), events(answer())]
    async with wire.serving(*events_of) as server:
        generation = await stream(server, lambda _: None)
    assert generation.token_ids == (11, 12, 2)
    assert len([body for body in server.bodies if "input_ids" in body]) == 2


@pytest.mark.parametrize("repeats", [True, False], ids=["cumulative", "incremental"])
@pytest.mark.anyio
async def test_a_long_stream_keeps_no_more_than_its_tokens(wire, repeats):
    ids, sent = range(1, 401), []
    for num in ids:
        one = answer(ids[:num], {"type": "length"}, text="x" * 4000)
        if not repeats:
            one["output_ids"] = one["output_ids"][-1:]
            info = one["meta_info"]
            info["output_token_logprobs"] = info["output_token_logprobs"][-1:]
        sent.append(one)
    async with wire.serving(events(*sent)) as server:
        tracemalloc.start()
        generation = await stream(server, lambda _: None)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert generation.token_ids == tuple(ids)
    assert most < 1e6


@pytest.mark.anyio
async def test_a_stream_that_is_cut_is_asked_for_again(wire):
    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b'data: {"half')
        request.transport.close()
        return response

    pieces = []
    async with wire.serving(cut, events(answer())) as server:
        generation = await stream(server, pieces.append)
    assert len(server.bodies) == 2
    assert [piece.first for piece in pieces] == [0]
    assert generation.token_ids == (11, 12, 2)


@pytest.mark.anyio
async def test_calls_of_one_key_stay_on_one_server_and_keys_spread(wire):
    reply = wire.replies(answer())
    async with wire.serving(reply) as one, wire.serving(reply) as two:
        for server in (one, two):
            server.be(**serves())
        engine = SglangEngine([one.base_url, two.base_url], model=NANO, retry=QUICK)
        async with anyio.create_task_group() as tasks:
            for number in range(20):
                sampling = Sampling(routing_key=f"dialogue {number % 4}")
                tasks.start_soon(engine.generate, (number % 4,), sampling)
        await engine.aclose()
    seen = [{body["input_ids"][0] for body in server.bodies} for server in (one, two)]
    assert seen[0] | seen[1] == {0, 1, 2, 3}
    assert not seen[0] & seen[1]
    assert len(seen[0]) == len(seen[1]) == 2


@pytest.mark.anyio
async def test_sglangs_router_is_told_the_key_of_the_dialogue(wire):
    async with wire.serving(wire.replies(answer())) as server:
        await generate(server, sampling=Sampling(routing_key="main/finder.3 \r\nX: y"))
        await generate(server)
    first, second = server.headers
    assert first["X-SMG-Routing-Key"] == "main/finder.3%20%0D%0AX%3A%20y"
    assert "X-SMG-Routing-Key" not in second


@pytest.mark.anyio
async def test_a_server_that_dies_in_a_call_gives_its_dialogues_to_the_others(wire, caplog):
    async def dies(request: web.Request) -> web.StreamResponse:
        request.transport.abort()
        return web.Response()

    async with wire.serving(dies) as dying, wire.serving(wire.replies(answer())) as living:
        for server in (dying, living):
            server.be(**serves())
        engine = SglangEngine([dying.base_url, living.base_url], model=NANO, retry=QUICK)
        sampling = Sampling(routing_key="mine")
        for _ in range(3):
            generation = await engine.generate((1, 2, 3), sampling)
            assert generation.token_ids == (11, 12, 2)
        await engine.aclose()
    # One call, asked once more on a fresh connection; the others went where it had gone then.
    assert len({body["rid"] for body in dying.bodies}) == 1
    assert len(living.bodies) == 3
    assert "go on elsewhere" in caplog.text


def two_servers(one, two, **settings):
    """An engine over two servers that pass for SGLang's."""
    for server in (one, two):
        if not server.answers_get:
            server.be(**serves())
    return SglangEngine([one.base_url, two.base_url], model=NANO, retry=QUICK, **settings)


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.anyio
async def test_a_server_that_answers_with_errors_gives_its_dialogues_to_the_others(wire, status):
    broken = wire.replies({"detail": "CUDA error"}, status=status)
    async with wire.serving(broken) as one, wire.serving(wire.replies(answer())) as two:
        engine = two_servers(one, two)
        for number in range(6):
            sampling = Sampling(routing_key=f"dialogue {number}")
            assert (await engine.generate((1,), sampling)).token_ids == (11, 12, 2)
        await engine.aclose()
    assert len(two.bodies) == 6
    # A busy server is waited for as often as may be tried; then it rests like a broken one.
    assert len(one.bodies) == (QUICK.attempts if status in {429, 503} else 1)


@pytest.mark.anyio
async def test_a_busy_server_keeps_its_dialogues(wire):
    busy, reply = wire.replies({}, status=503), wire.replies(answer())
    async with wire.serving(busy, reply) as one, wire.serving(reply) as two:
        engine = two_servers(one, two)
        await engine.generate((1,), Sampling(routing_key="mine"))
        await engine.aclose()
    assert (len(one.bodies), len(two.bodies)) == (2, 0)


@pytest.mark.anyio
async def test_a_busy_server_that_asks_for_more_time_than_there_is_loses_the_call(wire):
    busy = wire.replies({}, status=503, Retry_After="700")
    async with wire.serving(busy) as one, wire.serving(wire.replies(answer())) as two:
        engine = two_servers(one, two)
        with anyio.fail_after(2):
            for number in range(3):
                await engine.generate((1,), Sampling(routing_key=f"{number}"))
        await engine.aclose()
    assert one.bodies
    assert len([body for body in two.bodies if "input_ids" in body]) == 3


@pytest.mark.anyio
async def test_a_call_that_every_server_fails_sends_none_of_them_to_rest(wire):
    async def step(request):
        poison = 9 in (await request.json())["input_ids"]
        return web.json_response(answer(), status=500 if poison else 200)

    async with wire.serving(step) as one, wire.serving(step) as two:
        engine = two_servers(one, two)
        with pytest.raises(ModelError, match="answered 500"):
            await engine.generate((9,), Sampling(routing_key="bad"))
        for number in range(4):
            await engine.generate((1,), Sampling(routing_key=f"{number}"))
        async with anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(engine.generate, (2,), Sampling(routing_key=f"new {number}"))
        await engine.aclose()
    for server in (one, two):
        assert len([body for body in server.bodies if body["input_ids"] == [2]]) == 2


@pytest.mark.anyio
async def test_the_first_calls_of_a_silent_server_wait_for_one_answer_together(wire):
    reply = wire.replies(answer())
    async with wire.serving(reply) as one, wire.serving(reply) as two:
        engine = two_servers(one, two, timeout_s=0.5)
        two.is_silent = True
        start_s = anyio.current_time()
        async with anyio.create_task_group() as tasks:
            for number in range(8):
                tasks.start_soon(engine.generate, (1,), Sampling(routing_key=f"{number}"))
        taken_s = anyio.current_time() - start_s
        await engine.aclose()
    assert len(one.bodies) == 8
    assert taken_s < 1.5


@pytest.mark.anyio
async def test_a_server_is_asked_again_what_it_serves_after_a_connection_was_lost(wire):
    async def restarts(request: web.Request) -> web.StreamResponse:
        server.be(**serves(another_tokenizer()))
        request.transport.abort()
        return web.Response()

    reply = wire.replies(answer())
    async with wire.serving(reply) as server:
        server.be(**serves())
        engine = SglangEngine(server.base_url, model=NANO, retry=QUICK)
        await engine.generate((1,), DEFAULT)
        server.steps = [restarts, restarts, reply]
        with pytest.raises(ConfigError, match="tokenizer is another than ours"):
            await engine.generate((2,), DEFAULT)
        await engine.aclose()
    assert server.bodies[-1]["input_ids"] == [2]


@pytest.mark.anyio
async def test_where_all_servers_are_gone_the_call_ends_typed_after_its_retries(wire):
    engine = SglangEngine(["http://127.0.0.1:9", "http://127.0.0.1:1"], retry=QUICK)
    with pytest.raises(ModelError, match="no server answers") as caught:
        await engine.generate((1,), DEFAULT)
    assert caught.value.retryable
    assert await engine.are_healthy() == (False, False)
    await engine.aclose()


def test_addresses_are_checked_when_the_engine_is_made():
    for urls in ([], ["http://a:1", "http://a:1"], ["ftp://a"]):
        with pytest.raises(ConfigError):
            SglangEngine(urls)


def test_a_directory_gives_the_model_its_tokenizer_its_context_and_its_experts(tmp_path):
    model = open_sglang(["http://a:1", "http://b:2"], nano_directory())
    assert (model.context_tokens, model.name) == (8192, "http://a:1,http://b:2")
    assert model.engine.base_urls == ("http://a:1", "http://b:2")
    TOKENIZER.save(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json is missing"):
        open_sglang("http://a:1", tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"num_hidden_layers": 2}}')
    with pytest.raises(ConfigError, match="lacks 'max_position_embeddings'"):
        open_sglang("http://a:1", tmp_path)
