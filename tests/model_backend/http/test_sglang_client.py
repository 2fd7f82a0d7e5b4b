"""``SglangEngine`` against a server on the loopback that answers as SGLang 0.5.23 was seen to."""

import asyncio
import logging

import anyio
import pytest
from aiohttp import web

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.http import Retry
from swarm_sdk.model_backend.sglang_client import SglangEngine, generation_of
from swarm_sdk.types import Engine, Image, Sampling

QUICK = Retry(attempts=3, first_wait_s=0.01, longest_wait_s=0.02)
DEFAULT = Sampling()
PAD = 4090


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
        await generate(server, ids, images=pictures, media_pad_id=PAD)
    (body,) = server.bodies
    assert body["input_ids"] == [7, PAD, 8, PAD, 9]
    assert body["image_data"] == ["data:image/png;base64,b25l", "data:image/jpeg;base64,dHdv"]


@pytest.mark.anyio
async def test_what_cannot_be_asked_is_refused_before_anything_is_sent(wire):
    async with wire.serving(wire.replies(answer())) as server:
        with pytest.raises(ConfigError, match="token_ids is empty"):
            await generate(server, ())
        with pytest.raises(ConfigError, match="media_pad_id"):
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
async def test_a_server_that_ignores_seeds_is_warned_of_once(wire, caplog):
    async with wire.serving(wire.replies(answer())) as server:
        server.answers_get = {
            "/model_info": {"model_path": "m", "tokenizer_path": "t", "weight_version": "3"},
            "/v1/models": {"data": [{"max_model_len": 8192}]},
            "/server_info": {"enable_deterministic_inference": False},
        }
        engine = SglangEngine(server.base_url)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                await engine.generate((1,), Sampling(seed=7))
        told = await engine.server()
        await engine.aclose()
    assert [body["sampling_params"]["sampling_seed"] for body in server.bodies] == [7, 7]
    assert len(caplog.records) == 1
    assert "ignores seeds" in caplog.text
    assert (told.context_tokens, told.weight_version, told.honours_seeds) == (8192, 3, False)


@pytest.mark.anyio
async def test_another_kind_of_server_is_named(wire):
    async with wire.serving(wire.replies({})) as server:
        server.answers_get = {path: {} for path in ("/model_info", "/v1/models", "/server_info")}
        engine = SglangEngine(server.base_url)
        with pytest.raises(ModelError, match="not as a SGLang server does"):
            await engine.server()
        await engine.aclose()


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
