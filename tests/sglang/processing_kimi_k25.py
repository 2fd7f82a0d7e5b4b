"""The processor that SGLang's Kimi-K2.5 server loads from a checkpoint (remote code, CPU path).

    image -> resize (never up) -> zero-pad to multiples of 28 -> (x/255 - 0.5)/0.5 -> 14x14 patches

SGLang asks for ``tokenizer``, ``image_processor`` and ``media_processor`` with ``media_proc_cfg``
and ``media_tokens_calculator``, and calls the processor with ``medias``. The rules and limits are
those of the Kimi K2.5 release. transformers' own processor has other names and does not fit.
"""

# Shapes: P = patches of all images, C = 3 colours, S = 14 pixels, N = images.

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

PATCH = 14
MERGED = 28
"""Pixels a side of one media token: 2x2 patches."""
MEDIA_PROC_CFG = {
    "patch_size": PATCH,
    "merge_kernel_size": MERGED // PATCH,
    "in_patch_limit": 16384,
    "patch_limit_on_one_side": 512,
    "fixed_output_tokens": None,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def resized_and_padded(width: int, height: int) -> tuple[int, int, int, int]:
    """Width and height in pixels after the resize, and after the padding."""
    limit = 512 * PATCH
    patches = max(1, width // PATCH) * max(1, height // PATCH)
    scale = min(1.0, math.sqrt(16384 / patches), limit / width, limit / height)
    new_width = min(max(1, int(width * scale)), limit)
    new_height = min(max(1, int(height * scale)), limit)
    return (
        new_width,
        new_height,
        math.ceil(new_width / MERGED) * MERGED,
        math.ceil(new_height / MERGED) * MERGED,
    )


class MediaProcessor:
    """Turns pictures into patches."""

    media_proc_cfg = MEDIA_PROC_CFG

    def media_tokens_calculator(self, media: dict[str, Any]) -> int:
        """Tokens that a picture takes in the prompt."""
        _, _, width, height = resized_and_padded(*media["image"].size)
        return (width // MERGED) * (height // MERGED)

    def patches(self, image: Image.Image) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches [P, C, S, S] in row order, and their grid (frames, rows, columns)."""
        new_width, new_height, width, height = resized_and_padded(*image.size)
        canvas = np.zeros((height, width, 3), dtype=np.float32)
        resized = image.convert("RGB").resize((new_width, new_height), Image.Resampling.BICUBIC)
        canvas[:new_height, :new_width] = np.asarray(resized)
        pixels = torch.from_numpy((canvas / 255 - 0.5) / 0.5)
        rows, columns = height // PATCH, width // PATCH
        grid = pixels.reshape(rows, PATCH, columns, PATCH, 3).permute(0, 2, 4, 1, 3)
        return grid.reshape(rows * columns, 3, PATCH, PATCH), (1, rows, columns)


class KimiK25Processor(ProcessorMixin):
    """Text and pictures to model inputs."""

    attributes = ["tokenizer"]  # noqa: RUF012  transformers reads a list
    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, **_: Any) -> None:
        super().__init__(tokenizer)
        self.media_processor = MediaProcessor()
        self.image_processor = self.media_processor

    def __call__(
        self,
        text: list[str] | None = None,
        medias: list[dict[str, Any]] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Tokenise ``text``, its placeholders already expanded, and cut ``medias`` into patches."""
        inputs = dict(self.tokenizer(text, return_tensors="pt"))
        if medias:
            cut = [self.media_processor.patches(media["image"]) for media in medias]
            inputs["pixel_values"] = torch.cat([patches for patches, _ in cut])
            inputs["grid_thws"] = torch.tensor([grid for _, grid in cut])
        return BatchFeature(inputs)
