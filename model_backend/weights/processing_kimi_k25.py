"""The processor that SGLang loads from a checkpoint: copied beside the weights, it stands alone.

    picture, or chunk of frames -> resize (never up) -> zero-pad to multiples of 28
                                -> (x/255 - 0.5)/0.5 -> 14x14 patches, frame by frame, row by row

SGLang asks for ``tokenizer``, ``image_processor`` and ``media_processor`` with ``media_proc_cfg``
and ``media_tokens_calculator``, and calls the processor with ``medias``. The rules and limits are
those of the Kimi K2.5 release (as ``model/media.py`` has them). transformers' own processor has
other names and does not fit. Nothing of swarm-sdk is needed where this runs.
"""

# Shapes: P = patches of all media, C = 3 colours, S = 14 pixels, F = frames of one medium.

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin

PATCH = 14
MERGED = 28
"""Pixels a side of one media token: 2x2 patches."""
MEDIA_PROC_CFG: dict[str, Any] = {
    "patch_size": PATCH,
    "merge_kernel_size": MERGED // PATCH,
    "in_patch_limit": 16384,
    "in_patch_limit_each_frame": 4096,
    "patch_limit_on_one_side": 512,
    "fixed_output_tokens": None,
    "sample_fps": 2.0,
    "temporal_merge_kernel_size": 4,
    "timestamp_mode": "hh:mm:ss.fff",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def resized_and_padded(width: int, height: int, patch_limit: int) -> tuple[int, int, int, int]:
    """Width and height in pixels after the resize, and after the padding."""
    limit = MEDIA_PROC_CFG["patch_limit_on_one_side"] * PATCH
    patches = max(1, width // PATCH) * max(1, height // PATCH)
    scale = min(1.0, math.sqrt(patch_limit / patches), limit / width, limit / height)
    new_width = min(max(1, int(width * scale)), limit)
    new_height = min(max(1, int(height * scale)), limit)
    padded_width = math.ceil(new_width / MERGED) * MERGED
    return new_width, new_height, padded_width, math.ceil(new_height / MERGED) * MERGED


def frames_of(media: dict[str, Any]) -> tuple[Sequence[Image.Image], int]:
    """The pictures of one medium and the most patches that each may have."""
    if media["type"] == "video_chunk":
        return media["video_chunk"], MEDIA_PROC_CFG["in_patch_limit_each_frame"]
    return [media["image"]], MEDIA_PROC_CFG["in_patch_limit"]


class MediaProcessor:
    """Turns pictures and chunks of video into patches."""

    media_proc_cfg: dict[str, Any] = MEDIA_PROC_CFG

    def media_tokens_calculator(self, media: dict[str, Any]) -> int:
        """Tokens that a medium takes in the prompt; the frames of a chunk share theirs."""
        frames, patch_limit = frames_of(media)
        _, _, width, height = resized_and_padded(*frames[0].size, patch_limit)
        return (width // MERGED) * (height // MERGED)

    def patches(self, media: dict[str, Any]) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Patches [P, C, S, S] of one medium, and their grid (frames, rows, columns)."""
        frames, patch_limit = frames_of(media)
        new_width, new_height, width, height = resized_and_padded(*frames[0].size, patch_limit)
        canvas = np.zeros((len(frames), height, width, 3), dtype=np.float32)
        for pixels, frame in zip(canvas, frames, strict=True):
            rgb = frame.convert("RGB").resize((new_width, new_height), Image.Resampling.BICUBIC)
            pixels[:new_height, :new_width] = np.asarray(rgb)
        normalised = torch.from_numpy((canvas / 255 - 0.5) / 0.5)
        rows, columns = height // PATCH, width // PATCH
        grid = normalised.reshape(len(frames), rows, PATCH, columns, PATCH, 3)
        cut = grid.permute(0, 1, 3, 5, 2, 4).reshape(-1, 3, PATCH, PATCH)
        return cut, (len(frames), rows, columns)


class KimiK25Processor(ProcessorMixin):
    """Text, pictures and chunks of video to model inputs."""

    attributes: list[str] = ["tokenizer"]  # noqa: RUF012  transformers reads a list
    tokenizer_class: str = "AutoTokenizer"

    def __init__(self, tokenizer: Any = None, **_: Any) -> None:
        super().__init__(tokenizer)  # type: ignore[no-untyped-call]
        self.media_processor: MediaProcessor = MediaProcessor()
        self.image_processor: MediaProcessor = self.media_processor

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]  SGLang's call
        self,
        text: list[str] | None = None,
        medias: list[dict[str, Any]] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """Tokenise ``text``, its placeholders already expanded, and cut ``medias`` into patches."""
        inputs = dict(self.tokenizer(text, return_tensors="pt"))
        if medias:
            cut = [self.media_processor.patches(media) for media in medias]
            inputs["pixel_values"] = torch.cat([patches for patches, _ in cut])
            inputs["grid_thws"] = torch.tensor([grid for _, grid in cut])
        return BatchFeature(inputs)
