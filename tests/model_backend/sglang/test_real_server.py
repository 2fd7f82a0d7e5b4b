"""A real SGLang server with our checkpoint: the same ids, the same log-probabilities, typed errors.

The server computes in float32 with absorbed attention over its paged cache; our side scores the
finished sequence at once with full attention, so the two share nothing but the checkpoint.
"""

import io
import json
import random
import socket

import anyio
import numpy as np
import pytest
import torch
from PIL import Image as Pillow

from swarm_sdk.config import open_model
from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.chat.dialogue import TokenModel
from swarm_sdk.model_backend.chat.template import ChatFormat
from swarm_sdk.model_backend.http import ServerClient
from swarm_sdk.model_backend.model import media
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.openai_client import OpenAIModel
from swarm_sdk.model_backend.sglang_client import SglangEngine
from swarm_sdk.model_backend.sglang_weights import SglangWeights
from swarm_sdk.types import Image, Message, Sampling, ToolSpec

pytestmark = [pytest.mark.sglang, pytest.mark.anyio, pytest.mark.timeout(180)]

MEAN_LOGPROB_BOUND = 0.05
FLOAT32_BOUND = 1e-3
"""What float32 on both sides reaches with room; a wrong formula anywhere misses it by far."""
CONTEXT_TOKENS = 8192
LONG = Sampling(temperature=0, max_tokens=8000)
"""With the prompts that take it, at least 3,000 tokens come before a stop: half a minute."""


def random_ids(count, seed):
    return tuple(random.Random(seed).choices(range(3840), k=count))


@torch.no_grad()
def our_logits(model, prompt, generation, batch=None):
    """Logits [sampled, V] of the positions that were sampled, by our model in one pass."""
    ids = torch.tensor([*prompt, *generation.token_ids])
    attention = FullAttention(model.config.text_config, [len(ids)])
    hidden = model(ids, torch.arange(len(ids)), attention, media=batch)
    return model.logits(hidden[len(prompt) - 1 : -1])


def our_logprobs(model, prompt, generation, temperature=1.0, batch=None):
    """Log-probabilities of the sampled ids by our model."""
    logits = our_logits(model, prompt, generation, batch) / temperature
    sampled = torch.tensor(generation.token_ids)
    return torch.log_softmax(logits, dim=-1).gather(1, sampled[:, None]).squeeze(1).numpy()


def assert_same_logprobs(generation, ours):
    assert len(generation.logprobs) == len(generation.token_ids) == len(ours)
    differences = np.abs(np.array(generation.logprobs) - ours)
    assert differences.mean() <= MEAN_LOGPROB_BOUND
    assert differences.max() <= FLOAT32_BOUND


async def test_the_server_reads_exactly_the_ids_that_were_sent(url, engine):
    prompt = random_ids(80, seed=1)
    client = ServerClient(url)
    request = {
        "input_ids": list(prompt),
        "sampling_params": {"temperature": 0, "max_new_tokens": 8},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = await client.post("/generate", request)
    await client.aclose()
    generation = await engine.generate(prompt, Sampling(temperature=0, max_tokens=8))
    assert tuple(token for _, token, _ in answer["meta_info"]["input_token_logprobs"]) == prompt
    assert tuple(answer["output_ids"]) == generation.token_ids
    assert generation.num_prompt_tokens == len(prompt)
    assert generation.num_completion_tokens == len(generation.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
async def test_logprobs_are_those_of_our_model_at_the_temperature(engine, our_model, temperature):
    prompt = random_ids(100, seed=2)
    generation = await engine.generate(prompt, Sampling(temperature=temperature, max_tokens=64))
    ours = our_logprobs(our_model, prompt, generation, temperature or 1.0)
    assert_same_logprobs(generation, ours)
    # Uniform log-probabilities would agree with anything.
    assert our_logits(our_model, prompt, generation).std() > 0.5


async def test_logprobs_are_taken_before_top_p_cuts(engine, our_model):
    prompt = random_ids(50, seed=3)
    generation = await engine.generate(prompt, Sampling(top_p=0.3, max_tokens=32))
    assert_same_logprobs(generation, our_logprobs(our_model, prompt, generation))


async def test_greedy_ids_are_those_of_our_model(engine, our_model):
    prompt = random_ids(60, seed=4)
    generation = await engine.generate(prompt, Sampling(temperature=0, max_tokens=24))
    logits = our_logits(our_model, prompt, generation)
    assert tuple(logits.argmax(dim=-1).tolist()) == generation.token_ids


async def test_the_stop_token_is_the_last_id_and_has_a_logprob(engine, our_model):
    prompt = random_ids(60, seed=5)
    free = await engine.generate(prompt, Sampling(temperature=0, max_tokens=16))
    stop = free.token_ids[6]
    first = free.token_ids.index(stop)
    sampling = Sampling(temperature=0, max_tokens=16, stop_token_ids=(stop,))
    stopped = await engine.generate(prompt, sampling)
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert_same_logprobs(stopped, our_logprobs(our_model, prompt, stopped))


async def test_the_limit_of_tokens_ends_with_length(engine):
    sampling = Sampling(temperature=0, max_tokens=5)
    generation = await engine.generate(random_ids(20, seed=6), sampling)
    assert (generation.finish_reason, len(generation.token_ids)) == ("length", 5)


async def test_requests_without_a_seed_differ_and_the_server_says_that_it_ignores_seeds(engine):
    prompt = random_ids(40, seed=7)
    sampling = Sampling(max_tokens=16)
    assert await engine.generate(prompt, sampling) != await engine.generate(prompt, sampling)
    server = await engine.server()
    assert not server.honours_seeds
    assert server.context_tokens == CONTEXT_TOKENS
    seeded = await engine.generate(prompt, Sampling(temperature=0, max_tokens=4, seed=1))
    assert len(seeded.token_ids) == 4


async def test_a_prompt_over_the_context_is_a_context_overflow(url, engine):
    knows_nothing = SglangEngine(url)  # so it is the server that refuses
    for asked in (engine, knows_nothing):
        with pytest.raises(ContextOverflow) as caught:
            await asked.generate((5,) * 9000, Sampling(max_tokens=1))
        assert caught.value.num_prompt_tokens == 9000
        assert caught.value.limit_tokens == CONTEXT_TOKENS
    for num_prompt, num_asked in ((8000, 4000), (CONTEXT_TOKENS - 2, 1)):
        with pytest.raises(ContextOverflow) as caught:
            await knows_nothing.generate((5,) * num_prompt, Sampling(max_tokens=num_asked))
        assert caught.value.num_prompt_tokens == num_prompt
    await knows_nothing.aclose()


async def test_an_answer_is_cut_to_the_room_that_the_context_leaves(engine):
    generation = await engine.generate((5,) * 8100, Sampling(max_tokens=4000))
    assert generation.finish_reason == "length"
    assert 80 < len(generation.token_ids) <= CONTEXT_TOKENS - 8100


async def num_running(client):
    loads = (await client.get("/v1/loads"))["loads"]
    return sum(load["num_running_reqs"] for load in loads)


async def test_cancelling_frees_the_server_at_once(url, engine):
    client = ServerClient(url)
    with anyio.move_on_after(2.0) as scope:
        await engine.generate(random_ids(20, seed=10), LONG)
    assert scope.cancelled_caught
    with anyio.fail_after(5):
        while await num_running(client):  # noqa: ASYNC110  the server offers nothing to wait on
            await anyio.sleep(0.1)
    await client.aclose()


async def test_a_listener_that_raises_frees_the_server_at_once(url, engine):
    def tell(piece):
        raise LookupError("mine")

    client = ServerClient(url)
    with anyio.fail_after(5), pytest.raises(LookupError, match="mine"):
        await engine.stream(random_ids(20, seed=10), LONG, tell)
    with anyio.fail_after(5):
        while await num_running(client):  # noqa: ASYNC110  the server offers nothing to wait on
            await anyio.sleep(0.1)
    await client.aclose()


async def test_closing_the_engine_ends_a_running_call_with_what_it_has(engine, our_model):
    prompt = random_ids(20, seed=11)
    found = []

    async def call():
        found.append(await engine.generate(prompt, LONG))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await anyio.sleep(2.0)
        await engine.aclose()
    (generation,) = found
    assert generation.finish_reason == "abort"
    assert generation.token_ids
    assert_same_logprobs(generation, our_logprobs(our_model, prompt, generation))


async def test_the_weight_version_of_the_server_is_recorded(url, engine):
    client = ServerClient(url)
    sampling = Sampling(max_tokens=1)
    versions = [(await engine.generate((1, 2, 3), sampling)).weight_version]
    for name in ("7", "default"):
        await client.post("/update_weight_version", {"new_version": name})
        versions.append((await engine.generate((1, 2, 3), sampling)).weight_version)
    await client.aclose()
    assert versions == [0, 7, 0]


async def test_a_second_turn_reuses_the_first_and_its_ids_are_never_rewritten(
    engine, our_model, tokenizer
):
    search = ToolSpec("search", "Find pages.", {"type": "object", "properties": {"q": {}}})
    model = TokenModel(
        name="random",
        engine=engine,
        chat_format=ChatFormat(tokenizer),
        context_tokens=CONTEXT_TOKENS,
    )
    dialogue = model.dialogue([search])
    steps = [dialogue.observe([Message("system", "Be brief."), Message("user", "bananas? " * 20)])]
    first = await dialogue.sample(Sampling(max_tokens=24))
    steps += [first.prompt_ids, first.generation.token_ids]
    steps += [dialogue.observe([Message("user", "and now?")])]
    before_second = sum(map(len, steps))
    second = await dialogue.sample(Sampling(max_tokens=24))
    steps += [second.prompt_ids, second.generation.token_ids]
    ids = tuple(token for step in steps for token in step)
    assert ids == dialogue.ids
    assert second.generation.num_prompt_tokens == before_second + len(second.prompt_ids)
    # All of the first call but its last id, whose key and value no call computed.
    seen = len(steps[0]) + len(first.prompt_ids) + len(first.generation.token_ids)
    assert second.generation.num_cached_tokens >= seen - 1
    prompt = ids[: -len(second.generation.token_ids)]
    assert_same_logprobs(second.generation, our_logprobs(our_model, prompt, second.generation))


async def test_a_picture_is_seen_as_our_model_sees_it(engine, our_model, tokenizer):
    pixels = np.random.default_rng(0).integers(0, 255, (75, 110, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Pillow.fromarray(pixels).save(encoded, "PNG")
    picture = Image(encoded.getvalue())
    item = media.preprocess_image(media.decode_image(picture.data))
    special = tokenizer.special
    prompt = (
        *random_ids(10, seed=10),
        special.media_begin,
        *[special.media_pad] * item.num_tokens,
        special.media_end,
        *random_ids(10, seed=11),
    )
    generation = await engine.generate(prompt, Sampling(max_tokens=24), [picture])
    assert generation.num_prompt_tokens == len(prompt)
    batch = media.MediaBatch.of([item])
    ours = our_logprobs(our_model, prompt, generation, batch=batch)
    assert_same_logprobs(generation, ours)
    # A picture that the model did not look at would leave the numbers as they are.
    other = media.MediaBatch.of([media.preprocess_image(Pillow.new("RGB", (110, 75)))])
    blind = our_logprobs(our_model, prompt, generation, batch=other)
    assert np.abs(blind - ours).mean() > MEAN_LOGPROB_BOUND


async def test_the_same_pictures_agree_in_our_model_transformers_and_sglang(
    engine, our_model, tokenizer, checkpoint_dir, parity
):
    draw, special = np.random.default_rng(1), tokenizer.special
    pictures, items = [], []
    for height, width in ((75, 110), (300, 41)):
        encoded = io.BytesIO()
        pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Pillow.fromarray(pixels).save(encoded, "PNG")
        pictures.append(Image(encoded.getvalue()))
        items.append(media.preprocess_image(media.decode_image(encoded.getvalue())))
    begin, end = [special.media_begin], [special.media_end]
    parts = (
        [*random_ids(10, seed=17), *begin],
        items[0],
        [*end, *random_ids(5, seed=18), *begin],
        items[1],
        [*end, *random_ids(10, seed=19)],
    )
    prompt = parity.Case(parts).token_ids(special.media_pad, special.media_pad)
    generation = await engine.generate(prompt, Sampling(max_tokens=16), pictures)
    reference = parity.load_reference(checkpoint_dir)
    with torch.no_grad():
        features = our_model.encode_media(media.MediaBatch.of(items))
        theirs = parity._reference_features(reference, items)
    assert (features - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    case = parity.Case((*parts[:-1], [*parts[-1], *generation.token_ids]))
    sampled = torch.tensor(generation.token_ids)[:, None]
    for logits in (parity.our_logits(our_model, case), parity.reference_logits(reference, case)):
        logprobs = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, sampled).squeeze(1)
        assert_same_logprobs(generation, logprobs.numpy())


async def test_a_clip_is_refused_in_one_sentence_for_sglang_takes_pictures_only(engine, tokenizer):
    special = tokenizer.special
    prompt = (5, special.media_begin, special.media_pad, special.media_end, 6)
    clip = Image(b"\x00\x00\x00\x18ftypmp42", "video/mp4", name="clip.mp4")
    with pytest.raises(ConfigError, match=r"clip\.mp4 is no picture"):
        await engine.generate(prompt, Sampling(max_tokens=2), [clip])


async def test_a_stream_brings_the_tokens_one_by_one_and_the_same_as_at_once(engine):
    prompt, sampling = random_ids(60, seed=12), Sampling(temperature=0, max_tokens=12)
    at_once = await engine.generate(prompt, sampling)
    pieces = []
    streamed = await engine.stream(prompt, sampling, pieces.append)
    assert streamed.token_ids == at_once.token_ids
    assert tuple(one for piece in pieces for one in piece.token_ids) == streamed.token_ids
    assert [piece.first for piece in pieces] == list(range(len(pieces)))


async def test_a_turn_is_held_to_a_json_schema_by_the_grammar(engine, tokenizer):
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}},
        "required": ["ok"],
        "additionalProperties": False,
    }
    sampling = Sampling(
        max_tokens=60,
        json_schema=json.dumps(schema),
        stop_token_ids=(tokenizer.special.im_end,),
    )
    generation = await engine.generate(random_ids(20, seed=13), sampling)
    if generation.finish_reason == "stop":  # random weights may write spaces for ever
        assert isinstance(json.loads(tokenizer.decode(generation.token_ids[:-1]))["ok"], bool)
    else:
        assert set(tokenizer.decode(generation.token_ids)) <= set('{}"ok:truefals \n\t\r')


async def test_recorded_experts_are_those_that_our_model_chooses(engine, our_model):
    prompt = random_ids(50, seed=14)
    generation = await engine.generate(prompt, Sampling(max_tokens=20, experts_from=10))
    ids = torch.tensor([*prompt, *generation.token_ids])
    chosen = []
    with torch.no_grad():
        attention = FullAttention(our_model.config.text_config, [len(ids)])
        our_model(ids, torch.arange(len(ids)), attention, None, chosen)
    experts = generation.routed_experts
    assert len(experts) == len(ids) - 1 - 10
    told = np.frombuffer(experts.data, dtype="<u2").reshape(-1, experts.num_layers, 4)
    ours = torch.stack([one[10:-1] for one in chosen], dim=1).sort(-1).values.numpy()
    first_mixture = our_model.config.text_config.first_k_dense_replace
    agrees = (np.sort(told[:, first_mixture:], axis=-1) == ours).all(axis=-1)
    assert agrees.mean() >= 0.99  # a tie may fall otherwise


async def test_a_server_of_another_tokenizer_is_named_before_any_work(url, nano_url):
    model = open_model(f"sglang:{url}")  # nano's tokenizer; the server's is another
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "hi")])
    with pytest.raises(ConfigError, match="tokenizer is another than ours"):
        await dialogue.sample(Sampling(max_tokens=4))
    await model.aclose()
    right = open_model(f"sglang:{nano_url}")
    dialogue = right.dialogue([])
    dialogue.observe([Message("user", "hi")])
    assert (await dialogue.sample(Sampling(max_tokens=4))).generation.token_ids
    await right.aclose()


async def test_a_picture_that_cannot_be_read_is_one_sentence(engine, tokenizer):
    special = tokenizer.special
    prompt = (5, special.media_begin, special.media_pad, special.media_end, 6)
    with pytest.raises(ModelError, match="image") as caught:
        await engine.generate(prompt, Sampling(max_tokens=2), [Image(b"no picture")])
    assert not caught.value.retryable


@pytest.mark.parametrize("in_flight", ["retract", "keep", "abort"])
async def test_a_request_in_flight_goes_on_with_new_weights_and_tells_which_sampled_what(
    url, engine, our_model, in_flight
):
    weights = {name: tensor.detach() for name, tensor in our_model.named_parameters()}
    scaled = {name: tensor * 1.03125 for name, tensor in weights.items()}
    sink = SglangWeights(url, our_model.config, in_flight=in_flight)
    await sink.update_weights(weights, 1)
    found = []

    async def call():
        sampling = Sampling(max_tokens=300)
        found.append(await engine.generate(random_ids(20, seed=15), sampling))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(call)
        await anyio.sleep(1.0)
        await sink.update_weights(scaled, 2)
    await sink.update_weights(weights, 3)
    await sink.aclose()
    (generation,) = found
    assert generation.finish_reason in ("stop", "length")
    assert generation.weight_version == 2
    spans = generation.version_spans
    if in_flight == "abort":  # asked anew, so all of it is of the new weights
        assert spans == ()
    else:
        assert [version for version, _ in spans] == [1, 2]
        assert sum(num for _, num in spans) == len(generation.token_ids)


async def test_weights_over_a_process_group_and_memory_given_back_restore_the_output(
    url, engine, our_model
):
    weights = {name: tensor.detach() for name, tensor in our_model.named_parameters()}
    prompt, sampling = random_ids(40, seed=16), Sampling(temperature=0, max_tokens=12)
    sink = SglangWeights(url, our_model.config, way="distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    await sink.join("127.0.0.1", port)
    await sink.update_weights(weights, 1)
    before = await engine.generate(prompt, sampling)
    await sink.update_weights({name: tensor * 1.25 for name, tensor in weights.items()}, 2)
    other = await engine.generate(prompt, sampling)
    await sink.release_memory()
    await sink.resume_memory()
    await sink.update_weights(weights, 3)
    after = await engine.generate(prompt, sampling)
    await sink.leave()
    await sink.aclose()
    assert sink.is_verified
    assert (before.token_ids, before.logprobs) == (after.token_ids, after.logprobs)
    assert other.logprobs != before.logprobs
    assert [one.weight_version for one in (before, other, after)] == [1, 2, 3]


async def test_the_same_server_answers_chat_completions_with_our_templates_tokens(url, tokenizer):
    model = OpenAIModel(url + "/v1", "nano", keep_logprobs=True)
    dialogue = model.dialogue([])
    messages = [Message("system", "Be brief."), Message("user", "How high is K2?")]
    dialogue.observe(messages)
    turn = await dialogue.sample(Sampling(temperature=0, max_tokens=16))
    await model.aclose()
    chat = ChatFormat(tokenizer)
    ids = [*chat.open([]), *(token for m in messages for token in chat.render(m))]
    ids += chat.generation_prompt()
    assert turn.generation.num_prompt_tokens == len(ids)
    assert turn.generation.num_completion_tokens == 16
    assert len(turn.generation.logprobs) == 16


async def test_chat_completions_over_the_context_is_a_context_overflow(url):
    model = OpenAIModel(url + "/v1", "nano")
    dialogue = model.dialogue([])
    dialogue.observe([Message("user", "0 " * 9000)])
    with pytest.raises(ContextOverflow) as caught:
        await dialogue.sample(Sampling(max_tokens=16))
    assert caught.value.limit_tokens == CONTEXT_TOKENS
    await model.aclose()


async def test_a_wrong_path_of_the_server_says_so(url):
    client = ServerClient(url + "/nowhere")
    with pytest.raises(ModelError, match="answered 404") as caught:
        await client.post("/generate", {})
    assert not caught.value.retryable
    await client.aclose()
