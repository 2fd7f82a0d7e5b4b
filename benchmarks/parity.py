"""Compare our network with the reference, number by number.

    python benchmarks/parity.py [--json] [--quick]

Random weights in fp32 are saved by our ``checkpoint.save``, loaded by ``transformers`` and by us,
and run on the same ids and pixels. Each key is the largest absolute difference of the logits over
all positions: ``text``, ``image``, ``packed_images`` (two sizes), ``clip4`` and ``clip3`` (frames),
``mixed``. ``greedy_equal`` is 1 if the most likely token agrees at every position of every case
(or the reference's two best are closer than 1e-4, a tie that occurs about once in 2,000 positions).
``engine_logprob`` is the largest difference between the log-probs of the embedded engine and those
of the model run without any cache; ``dialogues_equal`` is 1 if 200 generated dialogues have the ids
that an independent renderer gives them.

Weights are drawn so that mistakes show: every norm, bias and correction bias is random, and logits
have a spread (standard deviation) of about 0.5; the peer's ``spread`` tells it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import Kimi_K25ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from swarm_sdk.model_backend.model.config import KimiConfig, nano, tiny
from swarm_sdk.model_backend.model.kimi import KimiModel
from swarm_sdk.model_backend.model.media import (
    MediaBatch,
    MediaItem,
    preprocess_image,
    preprocess_video,
)
from swarm_sdk.model_backend.model.mla import FullAttention
from swarm_sdk.model_backend.weights import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

REFERENCE_VIDEO_TOKEN_ID = 163840
MAX_RANDOM_TOKEN_ID = 256
TIE = 1e-4
"""Logits closer than fp32 can order after a network's worth of sums."""


@dataclass(frozen=True)
class Case:
    """One sequence: runs of text (token ids), pictures (one frame) and clips, in order."""

    parts: tuple[list[int] | MediaItem, ...]

    @property
    def media(self) -> list[MediaItem]:
        """The pictures and clips, in order."""
        return [part for part in self.parts if isinstance(part, MediaItem)]

    def token_ids(self, image_id: int, clip_id: int) -> list[int]:
        """Return the ids of the sequence with the given placeholder ids."""
        token_ids: list[int] = []
        for part in self.parts:
            if isinstance(part, MediaItem):
                token_ids += [image_id if part.grid_thw[0] == 1 else clip_id] * part.num_tokens
            else:
                token_ids += part
        return token_ids


def cases(seed: int) -> dict[str, Case]:
    """Build the sequences that are compared, by result key."""
    rng = np.random.default_rng(seed)

    def text(num_tokens: int) -> list[int]:
        return [int(i) for i in rng.integers(0, MAX_RANDOM_TOKEN_ID, num_tokens)]

    def picture(width: int, height: int) -> Image.Image:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))

    wide = preprocess_image(picture(150, 60))
    square = preprocess_image(picture(112, 112))  # as large as tiny's table of positions
    video = preprocess_video([picture(90, 70) for _ in range(7)], native_fps=2.0)
    clip4, clip3 = (chunk.item for chunk in video)
    return {
        "text": Case((text(64),)),
        "image": Case((text(8), wide, text(24))),
        "packed_images": Case((square, text(8), wide, text(24))),
        "clip4": Case((text(8), clip4, text(24))),
        "clip3": Case((text(8), clip3, text(24))),
        "mixed": Case((text(8), clip4, text(5), wide, clip3, text(16), square, text(24))),
    }


def random_model(config: KimiConfig, seed: int) -> KimiModel:
    """Draw a model in which every parameter and buffer matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    model = KimiModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                mean = 0.0 if name.endswith("bias") else 1.0
                parameter.normal_(mean, 0.3, generator=generator)
            elif "embed_tokens" in name or "pos_emb" in name:
                parameter.normal_(0.0, 1.0, generator=generator)
            else:
                fan_in = parameter[0].numel() if parameter.ndim == 4 else parameter.shape[-1]
                gain = (
                    2.0 if ".fc0." in name or ".fc1." in name else 0.5
                )  # out of GELU's linear part
                parameter.normal_(0.0, gain * fan_in**-0.5, generator=generator)
        for buffer in model.buffers():
            buffer.normal_(0.0, 0.3, generator=generator)
    return model


@torch.inference_mode()
def our_logits(model: KimiModel, case: Case) -> Tensor:
    """Return the logits [T, V] of our network."""
    placeholder = model.config.media_placeholder_token_id
    token_ids = torch.tensor(case.token_ids(placeholder, placeholder))
    attention = FullAttention(model.config.text_config, [len(token_ids)])
    media = MediaBatch.of(case.media) if case.media else None
    return model.logits(model(token_ids, torch.arange(len(token_ids)), attention, media))


@torch.inference_mode()
def reference_logits(reference: Kimi_K25ForConditionalGeneration, case: Case) -> Tensor:
    """Return the logits [T, V] of transformers.

    Pixels go through its tower and projector here and into its model as features, pictures packed
    and clips one by one: its own ``get_video_features`` (5.23) splits the pooled features by
    t * h * w instead of h * w and fails for clips, and its tower cannot pack clips of 4 and 3
    frames.
    """
    image_id = reference.config.image_token_id
    token_ids = case.token_ids(image_id, REFERENCE_VIDEO_TOKEN_ID)
    pictures = [item for item in case.media if item.grid_thw[0] == 1]
    clips = [item for item in case.media if item.grid_thw[0] > 1]
    encoded: dict[str, BaseModelOutputWithPooling] = {}
    picture_batches = [pictures] if pictures else []
    for kind, batches in (("image", picture_batches), ("video", [[clip] for clip in clips])):
        if batches:
            features = tuple(_reference_features(reference, batch) for batch in batches)
            encoded[kind] = BaseModelOutputWithPooling(pooler_output=features)
    output = reference(input_ids=torch.tensor([token_ids]), mm_encoder_outputs=encoded)
    return output.logits[0].float()


def _reference_features(
    reference: Kimi_K25ForConditionalGeneration, items: list[MediaItem]
) -> Tensor:
    pixels = torch.from_numpy(np.concatenate([item.patches for item in items]))
    grids = torch.tensor([item.grid_thw for item in items])
    pooled = reference.model.vision_tower(pixels, grid_thw=grids).pooler_output
    projected: Tensor = reference.model.mm_projector(pooled).squeeze(1)
    return projected


def greedy_equal(ours_TV: Tensor, theirs_TV: Tensor) -> bool:
    """Tell whether the most likely token is the same at every position.

    Where the reference's two best are closer than ``TIE``, either of them is the same.
    """
    best_T2 = theirs_TV.topk(2, dim=-1)
    is_tie_T = best_T2.values[:, 0] - best_T2.values[:, 1] < TIE
    is_same_T2 = ours_TV.argmax(-1, keepdim=True) == best_T2.indices
    return bool((is_same_T2[:, 0] | (is_same_T2[:, 1] & is_tie_T)).all())


def load_reference(folder: str | Path) -> Kimi_K25ForConditionalGeneration:
    """Load a checkpoint of ours into transformers; every tensor must find its place."""
    transformers.utils.logging.disable_progress_bar()
    reference, report = Kimi_K25ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    misplaced = {kind: names for kind, names in report.items() if names}
    assert not misplaced, misplaced
    return reference.eval()


def model_parity(config: KimiConfig, seeds: range) -> Iterator[tuple[str, float, float, bool]]:
    """Yield for each case and seed: key, difference, spread of the logits, greedy ids equal."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(random_model(config, seed), folder)
            ours, reference = checkpoint.load(folder), load_reference(folder)
        for key, case in cases(seed).items():
            a_TV, b_TV = our_logits(ours, case), reference_logits(reference, case)
            difference = float((a_TV - b_TV).abs().max())
            yield key, difference, float(b_TV.std()), greedy_equal(a_TV, b_TV)


def measure(*, is_quick: bool) -> dict[str, Any]:
    """Measure all numbers of this benchmark: worst case over the seeds."""
    num_seeds = 1 if is_quick else 5
    settings = {"dtype": "float32", "config": "tiny", "seeds": num_seeds}
    results: dict[str, float] = {}
    spreads: list[float] = []
    is_greedy_equal = True
    for key, difference, spread, is_equal in model_parity(tiny(), range(num_seeds)):
        results[key] = max(difference, results.get(key, 0.0))
        spreads.append(spread)
        is_greedy_equal &= is_equal
    results["greedy_equal"] = int(is_greedy_equal)
    if not is_quick:
        results["nano_text"] = max(
            difference for key, difference, *_ in model_parity(nano(), range(1)) if key == "text"
        )
    results["engine_logprob"] = _reference("engine").engine_logprob()
    results["dialogues_equal"] = int(_reference("chat").dialogues_equal(num=200))
    return {
        "name": "parity",
        "commit": _commit(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "settings": settings,
        "results": results,
        "peers": {"transformers": {"spread": float(np.median(spreads))}},
    }


def _reference(layer: str) -> Any:
    """Load the independent references that the tests of a layer use, by path."""
    path = Path(__file__).parents[1] / "tests" / "model_backend" / layer / "reference.py"
    spec = importlib.util.spec_from_file_location(f"{layer}_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _commit() -> str:
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="one seed instead of five")
    options = parser.parse_args()
    report = measure(is_quick=options.quick)
    if options.json:
        print(json.dumps(report))
        return
    for key, value in report["results"].items():
        print(f"{key:<16}{value:.3g}")
    print(f"{'spread':<16}{report['peers']['transformers']['spread']:.3g}")


if __name__ == "__main__":
    main()
