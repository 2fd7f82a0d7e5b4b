"""Steps of rows, as CUDA runs them: against the uncached model, on the CPU without the graphs."""

import random

import anyio
import pytest
import torch

from swarm_sdk.model_backend.engine import graphs
from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.types import Sampling

HAS_CUDA = torch.cuda.is_available()
GREEDY = Sampling(temperature=0.0, max_tokens=12)


@pytest.fixture(
    params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA, reason="no GPU"))]
)
def make_engine(request, reference, monkeypatch):
    """An engine whose every step of text is one of rows."""
    monkeypatch.setattr("swarm_sdk.model_backend.engine.runner.is_supported", lambda model: False)
    monkeypatch.setattr("swarm_sdk.model_backend.engine.runner.can_capture", lambda model: True)

    def make(**settings):
        engine = EmbeddedEngine(reference.random_model().to(request.param), **settings)
        assert engine._runner.graphs is not None
        return engine

    return make


def check_greedy(reference, model, engine, prompts, images=None):
    results = anyio.run(reference.generate_all, engine, prompts, GREEDY, images)
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        given = images[index] if images else ()
        assert reference.is_greedy(model, prompt, result.token_ids, given)
        assert reference.logprob_difference(model, prompt, result, given) <= 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prefill_chunk_tokens": 7, "page_size": 4},
        {"num_pages": 90, "page_size": 4},
        {"max_running": 2},
        {"page_size": 5},
    ],
    ids=["plain", "chunks", "few pages", "few places", "odd pages"],
)
def test_rows_of_prompts_and_completions_equal_the_uncached_model(
    reference, model, make_engine, settings
):
    draw = random.Random(1)
    shared = reference.random_ids(draw, 40)
    prompts = [reference.random_ids(draw, num) for num in (1, 2, 16, 33, 90, 255)]
    prompts += [shared + reference.random_ids(draw, num) for num in (1, 9)]
    check_greedy(reference, model, make_engine(**settings), prompts)


def test_a_step_of_more_rows_than_fit_is_cut_into_several(
    reference, model, make_engine, monkeypatch
):
    monkeypatch.setattr(graphs, "ROWS", (4, 8, 16))
    monkeypatch.setattr(graphs, "MAX_GATHERED_BYTES", 1)
    prompts = [reference.random_ids(random.Random(seed), 30 + seed) for seed in range(7)]
    check_greedy(reference, model, make_engine(), prompts)


def test_pictures_are_read_by_the_other_way_into_the_same_cache(reference, model, make_engine):
    draw = random.Random(3)
    image = reference.random_image(70, 40, seed=1)
    seen = reference.random_ids(draw, 9) + reference.placeholders(model, image)
    prompts = [seen + reference.random_ids(draw, 7), reference.random_ids(draw, 20)]
    check_greedy(reference, model, make_engine(), prompts, [(image,), ()])


def test_a_seed_gives_the_ids_of_the_other_way(reference, make_engine, model):
    prompts = [reference.random_ids(random.Random(seed), 20) for seed in range(4)]
    for top_p in (1.0, 0.8):
        seeded = Sampling(temperature=0.8, top_p=top_p, max_tokens=20, seed=7)
        ours = anyio.run(reference.generate_all, make_engine(), prompts, seeded)
        expected = anyio.run(reference.generate_all, EmbeddedEngine(model), prompts, seeded)
        for one, other in zip(ours, expected, strict=True):
            assert one.token_ids == other.token_ids
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def test_rows_to_spare_leave_the_cache_of_sequences_alone(reference, make_engine):
    engine = make_engine()
    prompt = reference.random_ids(random.Random(5), 21)
    anyio.run(reference.generate_all, engine, [prompt], GREEDY)
    written = engine._runner.kv.abs().sum(dim=(0, 2)) > 0
    num_slots = written.numel() - engine._runner.page_size
    assert int(written[:num_slots].sum()) == len(prompt) + GREEDY.max_tokens - 1


@pytest.mark.skipif(not HAS_CUDA, reason="no GPU")
def test_a_size_is_captured_once(reference, make_engine):
    engine = make_engine()
    prompts = [reference.random_ids(random.Random(seed), 20) for seed in range(4)]
    anyio.run(reference.generate_all, engine, prompts, GREEDY)
    graphs_made = engine._runner.graphs.num_graphs
    if engine._runner.kv.is_cuda:
        assert 1 <= graphs_made <= 4
