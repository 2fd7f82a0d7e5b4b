"""The engine as a whole, against the model run without a cache."""

import asyncio
import random
import threading
import time
from dataclasses import replace

import anyio
import anyio.lowlevel
import pytest
import torch

from swarm_sdk.errors import ConfigError, ContextOverflow, ModelError
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.weight_sink import WeightSink
from swarm_sdk.types import Image, Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=12)


def check_greedy(reference, model, prompts, *, images=None, sampling=GREEDY, **settings):
    """Run all prompts at once; ids equal to the uncached model's, log-probabilities to 1e-4."""
    engine = EmbeddedEngine(model, **settings)
    results = anyio.run(reference.generate_all, engine, prompts, sampling, images)
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        given = images[index] if images else ()
        assert reference.is_greedy(model, prompt, result.token_ids, given)
        assert reference.logprob_difference(model, prompt, result, given) <= 1e-4
        assert result.finish_reason == "length"
        assert result.num_prompt_tokens == len(prompt)
        assert result.num_completion_tokens == sampling.max_tokens
    return engine, results


def test_a_batch_of_different_lengths_equals_the_uncached_model(reference, model):
    draw = random.Random(1)
    prompts = [reference.random_ids(draw, num) for num in (1, 2, 3, 15, 16, 17, 33, 90)]
    check_greedy(reference, model, prompts)


def test_the_path_for_other_devices_gives_the_same(reference, model, monkeypatch):
    monkeypatch.setattr("swarm_sdk.model_backend.engine.runner.is_supported", lambda model: False)
    draw = random.Random(1)
    prompts = [reference.random_ids(draw, num) for num in (1, 16, 17, 33)]
    check_greedy(reference, model, prompts, prefill_chunk_tokens=20)


def test_sequences_that_grow_over_many_pages_go_on_equally(reference, model):
    draw = random.Random(2)
    prompts = [reference.random_ids(draw, num) for num in (250, 255, 256, 20)]
    check_greedy(reference, model, prompts)


def test_prompts_cut_into_chunks_give_the_same(reference, model):
    draw = random.Random(3)
    prompts = [reference.random_ids(draw, num) for num in (1, 30, 57)]
    check_greedy(reference, model, prompts, prefill_chunk_tokens=7, page_size=4)


def test_sequences_that_are_preempted_give_the_same(reference, model):
    draw = random.Random(4)
    prompts = [reference.random_ids(draw, num) for num in (20, 21, 22, 23, 30)]
    engine, _ = check_greedy(reference, model, prompts, num_pages=20, page_size=4)
    assert engine.num_preemptions > 0


def test_requests_beyond_max_running_wait_and_give_the_same(reference, model):
    draw = random.Random(5)
    prompts = [reference.random_ids(draw, 9) for _ in range(7)]
    check_greedy(reference, model, prompts, max_running=2)


def test_concurrent_requests_compute_a_shared_prefix_once(reference, model):
    draw = random.Random(6)
    prefix = reference.random_ids(draw, 80)
    prompts = [prefix + reference.random_ids(draw, 5) for _ in range(6)]
    engine, results = check_greedy(reference, model, prompts, prefill_chunk_tokens=32)
    assert [result.num_cached_tokens for result in results] == [0, 80, 80, 80, 80, 80]
    assert engine.num_computed_prompt_tokens == 80 + 6 * 5


def test_the_next_turn_reuses_the_pages_of_the_last_one(reference, model):
    async def main():
        engine = EmbeddedEngine(model, page_size=4)
        prompt = reference.random_ids(random.Random(7), 21)
        first = await engine.generate(prompt, GREEDY)
        longer = [*prompt, *first.token_ids, 5, 6, 7]
        second = await engine.generate(longer, GREEDY)
        await engine.aclose()
        return longer, second

    longer, second = anyio.run(main)
    assert second.num_cached_tokens == 32  # all 8 full pages of the 32 tokens computed before
    assert reference.is_greedy(model, longer, second.token_ids)
    assert reference.logprob_difference(model, longer, second) <= 1e-4


def test_a_prompt_seen_before_computes_its_last_page_again(reference, model):
    async def main():
        engine = EmbeddedEngine(model, page_size=4)
        prompt = reference.random_ids(random.Random(8), 16)
        results = [await engine.generate(prompt, GREEDY) for _ in range(2)]
        await engine.aclose()
        return results

    first, second = anyio.run(main)
    assert second.num_cached_tokens == 12
    assert second.token_ids == first.token_ids


def test_images_fill_their_placeholders(reference, model):
    draw = random.Random(9)
    images = [(reference.random_image(70, 40, 1),), (reference.random_image(112, 60, 2),), ()]
    images.append(images[0] + images[1])
    prompts = [
        [
            *reference.random_ids(draw, 9),
            *(i for image in given for i in reference.placeholders(model, image)),
            *reference.random_ids(draw, 4),
        ]
        for given in images
    ]
    check_greedy(reference, model, prompts, images=images, prefill_chunk_tokens=11, page_size=4)


def test_equal_ids_with_other_pictures_share_nothing(reference, model):
    one, other = reference.random_image(56, 56, 1), reference.random_image(56, 56, 2)
    prompt = [1, 2, *reference.placeholders(model, one), 3, 4, 5, 6]

    async def main():
        engine = EmbeddedEngine(model, page_size=2)
        results = [await engine.generate(prompt, GREEDY, (image,)) for image in (one, other, one)]
        await engine.aclose()
        return results

    results = anyio.run(main)
    assert [result.num_cached_tokens for result in results] == [0, 2, 8]
    for image, result in zip((one, other, one), results, strict=True):
        assert reference.is_greedy(model, prompt, result.token_ids, (image,))
        assert reference.logprob_difference(model, prompt, result, (image,)) <= 1e-4


def test_log_probabilities_over_hard_cases_agree(reference):
    assert reference.engine_logprob() <= 1e-4


def test_a_stop_id_ends_the_sequence_and_is_part_of_it(reference, model):
    prompt = reference.random_ids(random.Random(10), 20)
    ids, _ = reference.uncached_greedy(model, prompt, 12)
    stop = ids[5]
    sampling = replace(GREEDY, stop_token_ids=(stop,))
    engine = EmbeddedEngine(model)
    (result,) = anyio.run(reference.generate_all, engine, [prompt], sampling)
    assert result.token_ids == ids[: ids.index(stop) + 1]
    assert len(result.logprobs) == len(result.token_ids)
    assert result.finish_reason == "stop"


def test_a_seed_gives_the_same_ids_alone_and_among_others(reference, model):
    draw = random.Random(11)
    prompt = reference.random_ids(draw, 20)
    seeded = Sampling(temperature=0.8, top_p=0.9, max_tokens=20, seed=7)

    async def main():
        engine = EmbeddedEngine(model)
        alone = await engine.generate(prompt, seeded)
        results = []

        async def again():
            results.append(await engine.generate(prompt, seeded))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                noise = reference.random_ids(draw, 30)
                group.start_soon(engine.generate, noise, Sampling(max_tokens=15))
            group.start_soon(again)
        unlike = await engine.generate(prompt, replace(seeded, seed=8))
        await engine.aclose()
        return alone, results[0], unlike

    alone, among, unlike = anyio.run(main)
    assert among.token_ids == alone.token_ids
    assert among.logprobs == pytest.approx(alone.logprobs, abs=1e-4)
    assert unlike.token_ids != alone.token_ids


def test_sampled_log_probabilities_are_those_after_temperature_and_top_p(reference, model):
    prompt = reference.random_ids(random.Random(12), 20)
    sampling = Sampling(temperature=0.7, top_p=0.8, max_tokens=20, seed=1)
    engine = EmbeddedEngine(model)
    (result,) = anyio.run(reference.generate_all, engine, [prompt], sampling)
    logits = reference.uncached_logits(model, [*prompt, *result.token_ids])
    for row, token_id, logprob in zip(
        logits[len(prompt) - 1 :], result.token_ids, result.logprobs, strict=False
    ):
        ordered = (row / 0.7).softmax(-1).sort(descending=True)
        num_kept = int((ordered.values.cumsum(0) < 0.8).sum()) + 1
        kept = ordered.values[:num_kept] / ordered.values[:num_kept].sum()
        place = ordered.indices[:num_kept].tolist().index(token_id)
        assert logprob == pytest.approx(float(kept[place].log()), abs=1e-4)


def test_cancelling_a_request_frees_its_place_and_harms_no_other(reference, model):
    draw = random.Random(13)
    prompt, other = reference.random_ids(draw, 20), reference.random_ids(draw, 25)

    async def main():
        engine = EmbeddedEngine(model, max_running=1)
        with anyio.move_on_after(0.05) as scope:
            await engine.generate(prompt, Sampling(temperature=0.0, max_tokens=900))
        assert scope.cancelled_caught
        started_s = time.perf_counter()
        result = await engine.generate(other, GREEDY)  # the only place is free
        seconds = time.perf_counter() - started_s
        num_left = len(engine._scheduler.running) + len(engine._scheduler.waiting)
        available = engine._table.num_available
        await engine.aclose()
        return result, seconds, num_left, available == engine._table.num_pages

    result, seconds, num_left, all_free = anyio.run(main)
    assert reference.is_greedy(model, other, result.token_ids)
    assert seconds < 2
    assert num_left == 0
    assert all_free


def test_cancelling_who_computes_a_prefix_lets_the_others_compute_it(reference, model):
    draw = random.Random(14)
    prompt = reference.random_ids(draw, 400)

    async def main():
        engine = EmbeddedEngine(model, prefill_chunk_tokens=2, page_size=4)
        async with anyio.create_task_group() as group:
            first = anyio.CancelScope()

            async def owner():
                with first:
                    await engine.generate(prompt, GREEDY)

            group.start_soon(owner)
            await anyio.sleep(0.02)
            with anyio.fail_after(30):
                task = asyncio.ensure_future(engine.generate(prompt, GREEDY))
                await anyio.sleep(0.02)
                first.cancel()
                result = await task
        await engine.aclose()
        return result

    assert reference.is_greedy(model, prompt, anyio.run(main).token_ids)


def test_the_event_loop_stays_free_while_the_engine_works(reference, model):
    async def main():
        engine = EmbeddedEngine(model)
        num_ticks = 0
        async with anyio.create_task_group() as group:

            async def tick():
                nonlocal num_ticks
                while True:
                    await anyio.sleep(0.001)
                    num_ticks += 1

            group.start_soon(tick)
            while engine.num_computed_prompt_tokens < 60:  # prompts of 3 tokens, 20 times
                prompt = [engine.num_computed_prompt_tokens + i for i in range(3)]
                await engine.generate(prompt, Sampling(temperature=0.0, max_tokens=50))
            group.cancel_scope.cancel()
        await engine.aclose()
        return num_ticks

    assert anyio.run(main) > 10


def test_closing_aborts_what_runs_and_ends_the_thread(reference, model):
    async def main():
        engine = EmbeddedEngine(model, max_running=1)
        results = []

        async def one():
            results.append(await engine.generate([1, 2], Sampling(max_tokens=1000, seed=0)))

        async with anyio.create_task_group() as group:
            group.start_soon(one)
            group.start_soon(one)
            await anyio.sleep(0.05)
            await engine.aclose()
        await engine.aclose()  # a second time does nothing
        with pytest.raises(ModelError, match="closed"):
            await engine.generate([1], GREEDY)
        return results

    results = anyio.run(main)
    assert [result.finish_reason for result in results] == ["abort", "abort"]
    for result in results:
        assert len(result.logprobs) == len(result.token_ids) == result.num_completion_tokens
    assert "swarm-engine" not in {thread.name for thread in threading.enumerate()}


def test_one_engine_serves_one_event_loop_after_another(reference, model):
    engine = EmbeddedEngine(model)
    prompt = [1, 2, 3]
    results = [anyio.run(engine.generate, prompt, GREEDY) for _ in range(2)]
    anyio.run(engine.aclose)
    assert results[0].token_ids == results[1].token_ids


def test_new_weights_forget_cached_keys_and_raise_the_version(reference):
    old, new = reference.random_model(0), reference.random_model(1)
    prompt = reference.random_ids(random.Random(15), 40)

    async def main():
        engine = EmbeddedEngine(old, weight_version=3)
        before = await engine.generate(prompt, GREEDY)
        await engine.update_weights(new.state_dict(), weight_version=4)
        after = await engine.generate(prompt, GREEDY)
        await engine.aclose()
        return before, after

    before, after = anyio.run(main)
    assert (before.weight_version, after.weight_version) == (3, 4)
    assert before.version_spans == after.version_spans == ()
    assert after.num_cached_tokens == 0
    assert reference.is_greedy(new, prompt, after.token_ids)


def test_a_frozen_engine_refuses_new_weights_and_serves_on(reference):
    prompt = reference.random_ids(random.Random(15), 40)

    async def main():
        engine = EmbeddedEngine(reference.random_model(0), is_frozen=True)
        before = await engine.generate(prompt, GREEDY)
        sink: WeightSink = engine
        with pytest.raises(ConfigError, match="frozen"):
            await sink.update_weights(reference.random_model(1).state_dict(), 1)
        after = await engine.generate(prompt, GREEDY)
        await engine.aclose()
        return before, after

    before, after = anyio.run(main)
    assert (before.token_ids, before.weight_version) == (after.token_ids, after.weight_version)


def test_running_requests_go_on_with_new_weights_and_tell_which_drew_which_ids(reference):
    new = reference.random_model(1)
    draw = random.Random(16)
    prompts = [reference.random_ids(draw, num) for num in (40, 7)]
    sampling = replace(GREEDY, max_tokens=60)

    async def main():
        engine = EmbeddedEngine(reference.random_model(0), weight_version=3)
        running = [asyncio.ensure_future(engine.generate(p, sampling)) for p in prompts]
        while engine.num_computed_prompt_tokens < 47:  # until some ids are of the old weights
            await anyio.lowlevel.checkpoint()
        await engine.update_weights(new.state_dict(), weight_version=4)
        results = [await one for one in running]
        await engine.aclose()
        return results

    for prompt, result in zip(prompts, anyio.run(main), strict=True):
        (old_version, num_old), (new_version, num_new) = result.version_spans
        assert (old_version, new_version, num_old + num_new) == (3, 4, 60)
        assert result.weight_version == 4
        assert result.num_prompt_tokens == len(prompt)
        head, tail = result.token_ids[:num_old], result.token_ids[num_old:]
        assert reference.is_greedy(reference.random_model(0), prompt, head)
        context = [*prompt, *head]
        assert reference.is_greedy(new, context, tail)
        alone = replace(result, token_ids=tail, logprobs=result.logprobs[num_old:])
        assert reference.logprob_difference(new, context, alone) <= 1e-4


def test_an_update_of_some_tensors_leaves_the_others(reference, model):
    async def main():
        engine = EmbeddedEngine(reference.random_model(0))
        head = reference.random_model(1).lm_head.weight
        await engine.update_weights({"lm_head.weight": head}, weight_version=1)
        state = engine.model.state_dict()
        await engine.aclose()
        return head, state

    head, state = anyio.run(main)
    other = reference.random_model(0).state_dict()
    assert torch.equal(state.pop("lm_head.weight"), head)
    assert all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def test_weights_of_another_shape_are_refused(reference, model):
    async def main():
        engine = EmbeddedEngine(model)
        state = model.state_dict() | {"lm_head.weight": torch.zeros(3, 3)}
        with pytest.raises(ConfigError, match="lm_head"):
            await engine.update_weights(state, weight_version=1)
        await engine.aclose()

    anyio.run(main)


def test_a_step_that_fails_fails_its_requests_and_not_the_engine(reference, model, monkeypatch):
    async def main():
        engine = EmbeddedEngine(model)
        run = engine._runner.run

        def fail(chunks):
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._runner, "run", fail)
        with pytest.raises(ModelError, match="out of memory"):
            await engine.generate([1, 2, 3], GREEDY)
        monkeypatch.setattr(engine._runner, "run", run)
        result = await engine.generate([1, 2, 3], GREEDY)
        await engine.aclose()
        return result

    assert reference.is_greedy(model, [1, 2, 3], anyio.run(main).token_ids)


@pytest.mark.parametrize(
    ("token_ids", "sampling", "images", "message"),
    [
        ([], GREEDY, (), "empty"),
        ([1, 512], GREEDY, (), "512 is outside"),
        ([-1], GREEDY, (), "outside"),
        ([1], Sampling(temperature=-1.0), (), "temperature"),
        ([1], Sampling(temperature=float("nan")), (), "temperature"),
        ([1], Sampling(top_p=0.0), (), "top_p"),
        ([1], Sampling(max_tokens=0), (), "max_tokens"),
        ([1], GREEDY, (Image(data=b"no picture", name="a.png"),), "a.png"),
    ],
)
def test_bad_requests_are_refused_with_a_clear_sentence(
    model, token_ids, sampling, images, message
):
    async def main():
        engine = EmbeddedEngine(model)
        with pytest.raises(ConfigError, match=message):
            await engine.generate(token_ids, sampling, images)
        await engine.aclose()

    anyio.run(main)


def test_placeholders_that_no_picture_fills_are_refused(reference, model):
    async def main():
        engine = EmbeddedEngine(model)
        image = reference.random_image(56, 56, 1)
        pad = model.config.media_placeholder_token_id
        for prompt, images in (([1, pad], ()), ([1, 2], (image,)), ([pad] * 3, (image,))):
            with pytest.raises(ConfigError, match="placeholders"):
                await engine.generate(prompt, GREEDY, images)
        await engine.aclose()

    anyio.run(main)


def test_prompt_and_completion_must_fit_the_context(reference, model):
    context = model.config.text_config.max_position_embeddings

    async def main():
        engine = EmbeddedEngine(model)
        with pytest.raises(ContextOverflow) as caught:
            await engine.generate([1] * (context - 3), replace(GREEDY, max_tokens=4))
        assert caught.value.num_prompt_tokens == context - 3
        result = await engine.generate([1] * (context - 3), replace(GREEDY, max_tokens=3))
        await engine.aclose()
        return result

    assert anyio.run(main).num_completion_tokens == 3


@pytest.mark.parametrize("name", ["max_running", "page_size", "num_pages", "prefill_chunk_tokens"])
def test_settings_below_one_are_refused(model, name):
    with pytest.raises(ConfigError, match=name):
        EmbeddedEngine(model, **{name: 0})


@pytest.mark.parametrize("num_others", [0, 2])
def test_a_sampled_placeholder_counts_as_the_model_counts_it(reference, num_others):
    model = reference.random_model()
    prompt = reference.random_ids(random.Random(16), 30)
    (first, *_), _ = reference.uncached_greedy(model, prompt, 1)
    model.config = replace(model.config, media_placeholder_token_id=first)
    others = [[1, 2, 3, 4 + index] for index in range(num_others)]
    _, (result, *_) = check_greedy(reference, model, [prompt, *others])
    assert result.token_ids[0] == first


def test_places_can_be_shared_out_anew_while_requests_wait(reference, model):
    draw = random.Random(17)
    prompts = [reference.random_ids(draw, 9) for _ in range(6)]

    async def main():
        engine = EmbeddedEngine(model, max_running=1)
        running = [asyncio.ensure_future(engine.generate(p, GREEDY)) for p in prompts]
        await anyio.lowlevel.checkpoint()
        engine.max_running = 6
        results = [await one for one in running]
        assert engine.num_requests == 0
        with pytest.raises(ConfigError, match="max_running"):
            engine.max_running = 0
        await engine.aclose()
        return results

    for prompt, result in zip(prompts, anyio.run(main), strict=True):
        assert reference.is_greedy(model, prompt, result.token_ids)
