"""The network against transformers' on the same random weights, fp32."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.weights.checkpoint import save

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def reference(
    parity: ModuleType, tiny_model: KimiModel, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    folder: Path = tmp_path_factory.mktemp("checkpoint")
    save(tiny_model, folder)
    return parity.load_reference(folder)


@pytest.mark.parametrize("key", ["text", "image", "packed_images", "clip4", "clip3", "mixed"])
def test_logits_equal_those_of_transformers(
    parity: ModuleType, tiny_model: KimiModel, reference: Any, key: str
) -> None:
    case = parity.cases(seed=0)[key]
    ours, theirs = (
        parity.our_logits(tiny_model, case),
        parity.reference_logits(reference, case),
    )
    assert float(theirs.std()) > 0.3
    assert float((ours - theirs).abs().max()) <= TOLERANCE
    assert parity.greedy_equal(ours, theirs)


def test_every_picture_changes_the_logits(parity: ModuleType, tiny_model: KimiModel) -> None:
    case, other = parity.cases(seed=0)["image"], parity.cases(seed=1)["image"]
    swapped = parity.Case(
        tuple(other.media[0] if part is case.media[0] else part for part in case.parts)
    )
    difference = parity.our_logits(tiny_model, case) - parity.our_logits(tiny_model, swapped)
    assert float(difference.abs().max()) > 100 * TOLERANCE


@torch.inference_mode()
def test_a_placeholder_without_media_reads_like_id_0(
    parity: ModuleType, tiny_model: KimiModel, reference: Any
) -> None:
    placeholder = tiny_model.config.media_placeholder_token_id
    case, same = (parity.Case(([5, token_id, 7, 8],)) for token_id in (placeholder, 0))
    ours, theirs = parity.our_logits(tiny_model, case), parity.reference_logits(reference, case)
    assert float((ours - theirs).abs().max()) <= TOLERANCE
    assert torch.equal(ours, parity.our_logits(tiny_model, same))


@torch.inference_mode()
def test_greedy_decoding_gives_the_tokens_of_transformers(
    tiny_model: KimiModel, reference: Any
) -> None:
    prompt, num_new = list(range(40, 60)), 24
    token_ids = list(prompt)
    for _ in range(num_new):
        attention = FullAttention(tiny_model.config.text_config, [len(token_ids)])
        hidden = tiny_model(torch.tensor(token_ids), torch.arange(len(token_ids)), attention)
        token_ids.append(int(tiny_model.logits(hidden[-1:]).argmax()))
    theirs = reference.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_new,
        min_new_tokens=num_new,
        max_length=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert theirs[0].tolist() == token_ids
