"""The compiled decoding step against the model in float64, and its parts against plain ones."""

import random

import numpy as np
import pytest
import torch

from swarm_sdk.model_backend.engine.decode import DecodeNetwork, is_supported
from swarm_sdk.model_backend.engine.pages import kv_pool
from swarm_sdk.model_backend.kernels.decode_step import ADD, STORE, product
from swarm_sdk.model_backend.kernels.simd import compiled, exponential, load, store
from swarm_sdk.model_backend.model.config import nano, tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention

PAGE_SIZE, NUM_PAGES = 4, 60


def random_model(config, *, in_bfloat16):
    """Every parameter matters; nothing is a multiple of anything."""
    model = KimiModel(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            if in_bfloat16:
                parameter.copy_(parameter.bfloat16())
        for buffer in model.buffers():
            buffer.normal_(0.0, 0.3, generator=generator)
    return model.eval()


@torch.inference_mode()
def expected_logits(model, sequences):
    """Logits of the token after each sequence, computed at once in float64."""
    exact = KimiModel(model.config).double()
    exact.load_state_dict(model.state_dict())
    rows = []
    for ids in sequences:
        context = FullAttention(model.config.text_config, [len(ids)])
        hidden = exact(torch.tensor(ids), torch.arange(len(ids)), context)
        rows.append(torch.nn.functional.linear(hidden[-1], exact.lm_head.weight))
    return torch.stack(rows)


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("in_bfloat16", [True, False])
@pytest.mark.parametrize(("make_config", "lengths"), [(tiny, (41, 1, 9, 36, 33)), (nano, (35, 2))])
def test_a_step_gives_the_logits_of_the_model_in_float64(
    make_config, lengths, in_bfloat16, num_threads
):
    model = random_model(make_config(), in_bfloat16=in_bfloat16)
    draw = random.Random(0)
    sequences = [[draw.randrange(256) for _ in range(length)] for length in lengths]
    places = list(range(NUM_PAGES))
    draw.shuffle(places)
    pages = [[places.pop() for _ in range(-(-length // PAGE_SIZE))] for length in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    kv = kv_pool(model.config.text_config, NUM_PAGES * PAGE_SIZE, model.lm_head.weight)
    network = DecodeNetwork(model, kv, page_size=PAGE_SIZE, max_rows=len(lengths))
    torch.set_num_threads(before)
    assert network.num_threads == num_threads
    logits, best = [None] * len(lengths), [None] * len(lengths)
    for position in range(max(lengths)):
        rows = [row for row, length in enumerate(lengths) if position < length]
        ids = [sequences[row][position] for row in rows]
        given = network.step(ids, [position] * len(rows), [pages[row] for row in rows])
        for row, logits_V, pair in zip(rows, given.clone(), network.best(len(rows)), strict=True):
            logits[row], best[row] = logits_V, pair
    network.close()
    expected = expected_logits(model, sequences)
    torch.testing.assert_close(torch.stack(logits).double(), expected, rtol=1e-4, atol=1e-4)
    logprobs = expected.log_softmax(-1)
    for (token_id, logprob), row in zip(best, logprobs, strict=True):
        assert token_id == int(row.argmax())
        assert logprob == pytest.approx(float(row.max()), abs=1e-4)


def test_weights_that_bfloat16_holds_exactly_take_half_the_bytes():
    def packed(*, in_bfloat16):
        model = random_model(tiny(), in_bfloat16=in_bfloat16)
        kv = kv_pool(model.config.text_config, PAGE_SIZE, model.lm_head.weight)
        return DecodeNetwork(model, kv, page_size=PAGE_SIZE, max_rows=1).weight_bytes

    assert packed(in_bfloat16=True) * 2 == packed(in_bfloat16=False)


def test_new_weights_are_packed_in_place_where_they_fit_as_a_new_network_packs_them():
    model = random_model(tiny(), in_bfloat16=False)
    kv = kv_pool(model.config.text_config, NUM_PAGES * PAGE_SIZE, model.lm_head.weight)

    def network():
        return DecodeNetwork(model, kv, page_size=PAGE_SIZE, max_rows=2)

    def first_logits(of):
        return of.step([3, 5], [0, 0], [[1], [2]]).clone()

    old, before = network(), first_logits(network())
    torch.testing.assert_close(first_logits(old), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert old.refresh()
    assert torch.equal(first_logits(old), first_logits(network()))
    assert not torch.equal(first_logits(old), before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    assert not old.refresh(), "these take half the bytes, in a new network"
    assert not network().refresh()


def test_other_dtypes_and_machines_without_numba_are_left_to_the_model(monkeypatch):
    model = random_model(tiny(), in_bfloat16=True)
    assert is_supported(model)
    assert not is_supported(model.double())
    model.float()
    monkeypatch.setattr("swarm_sdk.model_backend.engine.decode.find_spec", lambda name: None)
    assert not is_supported(model)


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 32])
def test_a_tile_of_a_product_is_that_of_matrices(num_rows):
    depth = 20
    draw = np.random.default_rng(num_rows)
    x = draw.standard_normal((num_rows, depth)).astype(np.float32)
    w = draw.standard_normal((depth, 16)).astype(np.float32)
    start = draw.standard_normal((num_rows, 16)).astype(np.float32)
    order = draw.permutation(num_rows)
    for mode, before in ((STORE, 0), (ADD, start.astype(np.float64))):
        y = start.copy()
        places = (order * depth, order * 16)
        flat = (w.ravel(), 0, depth, x.ravel(), places[0], y.reshape(-1), places[1])
        product(*flat, num_rows, 0, mode, 0)
        np.testing.assert_allclose(y, before + x.astype(np.float64) @ w, rtol=1e-5, atol=1e-5)


@compiled
def exponentials(x, y):
    for index in range(0, len(x), 8):
        store(y, index, exponential(load(x, index, 8)))


def test_the_exponential_is_exact_to_one_in_ten_million_and_ends_at_its_range():
    x = np.linspace(-87, 88, 8 * 2000, dtype=np.float32)
    y = np.empty_like(x)
    exponentials(x, y)
    np.testing.assert_allclose(y, np.exp(x.astype(np.float64)), rtol=1.5e-7)
    x[:8] = [-1e30, -200, -np.inf, 1e30, 200, 89, 0, -87]
    exponentials(x, y)
    assert (y[:3] == y[7]).all()
    assert np.isfinite(y[3:6]).all()
    assert y[6] == 1


def test_where_no_folder_can_be_written_code_is_compiled_in_each_process_and_a_warning_says_so(
    monkeypatch, caplog
):
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    double = compiled(lambda number: 2 * number)
    assert double(21) == 42
    assert "set NUMBA_CACHE_DIR" in caplog.text
