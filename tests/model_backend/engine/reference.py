"""The model run without any cache: the truth that the engine is compared with."""

import io
import random

import anyio
import numpy as np
import torch
from PIL import Image as Picture

from swarm_sdk.model_backend.engine.engine import EmbeddedEngine
from swarm_sdk.model_backend.model.config import tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import MediaBatch, decode_image, preprocess_image
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.types import Image, Sampling


def random_model(seed=0):
    """A tiny model in which every parameter matters and logits are spread."""
    model = KimiModel(tiny())
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
        for buffer in model.buffers():
            buffer.normal_(0.0, 0.3, generator=generator)
    return model.eval()


def random_image(width, height, seed):
    """A PNG of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Picture.fromarray(pixels).save(file, "PNG")
    return Image(data=file.getvalue())


def placeholders(model, image):
    """The ids that stand for a picture in a prompt."""
    num_tokens = preprocess_image(decode_image(image.data)).num_tokens
    return [model.config.media_placeholder_token_id] * num_tokens


@torch.inference_mode()
def uncached_logits(model, ids, images=()):
    """Logits [T, V] of the whole sequence, computed at once."""
    items = [preprocess_image(decode_image(image.data)) for image in images]
    hidden = model(
        torch.tensor(ids),
        torch.arange(len(ids)),
        FullAttention(model.config.text_config, [len(ids)]),
        MediaBatch.of(items) if items else None,
    )
    return model.logits(hidden)


def uncached_greedy(model, prompt, num_tokens, images=()):
    """Ids and log-probabilities, every step over the whole sequence."""
    ids, logprobs = list(prompt), []
    for _ in range(num_tokens):
        last = uncached_logits(model, ids, images)[-1].log_softmax(-1)
        ids.append(int(last.argmax()))
        logprobs.append(float(last.max()))
    return tuple(ids[len(prompt) :]), logprobs


def is_greedy(model, prompt, token_ids, images=()):
    """Whether each id is the uncached model's most likely one after all before it."""
    logits = uncached_logits(model, [*prompt, *token_ids], images)[len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist() == list(token_ids)


def logprob_difference(model, prompt, generation, images=()):
    """Largest difference between a generation's log-probabilities and the uncached model's."""
    ids = [*prompt, *generation.token_ids]
    all_logprobs = uncached_logits(model, ids, images).log_softmax(-1)
    rows = all_logprobs[len(prompt) - 1 : -1]
    expected = rows.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0]
    return float((expected - torch.tensor(generation.logprobs)).abs().max())


def random_ids(draw, num_tokens):
    """Text ids of the tiny vocabulary."""
    return [draw.randrange(256) for _ in range(num_tokens)]


async def generate_all(engine, prompts, sampling, images=None):
    """All prompts at once, results in order; the engine is closed."""
    results = [None] * len(prompts)

    async def one(index):
        given = images[index] if images else ()
        results[index] = await engine.generate(prompts[index], sampling, given)

    async with anyio.create_task_group() as group:
        for index in range(len(prompts)):
            group.start_soon(one, index)
    await engine.aclose()
    return results


def engine_logprob():
    """Largest difference of log-probabilities, engine to uncached model, over hard cases.

    Prompts of many lengths, half of them with a shared start, two with pictures; prompts cut into
    small chunks, pages so scarce that sequences are preempted.
    """
    model, draw = random_model(), random.Random(0)
    shared = random_ids(draw, 40)
    prompts = [random_ids(draw, num) for num in (1, 2, 17, 64, 200)]
    prompts += [shared + random_ids(draw, num) for num in (1, 5, 9, 30, 31)]
    images = [()] * len(prompts)
    for width, height in ((70, 40), (112, 112)):
        image = random_image(width, height, seed=width)
        prompts.append(shared[:10] + placeholders(model, image) + random_ids(draw, 12))
        images.append((image,))
    worst = 0.0
    for settings in ({}, {"page_size": 4, "num_pages": 110, "prefill_chunk_tokens": 23}):
        engine = EmbeddedEngine(model, **settings)
        sampling = Sampling(temperature=0.0, max_tokens=24)
        results = anyio.run(generate_all, engine, prompts, sampling, images)
        for prompt, result, given in zip(prompts, results, images, strict=True):
            worst = max(worst, logprob_difference(model, prompt, result, given))
    return worst
