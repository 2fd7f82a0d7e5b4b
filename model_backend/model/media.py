"""Pictures and clips as patches: the processor of the K2.5 release, in numpy and pillow.

    picture  -> shrink to the limits, never enlarge -> pad right and below with black to x 28
             -> (pixel / 255 - 0.5) / 0.5           -> 14 x 14 patches, row by row
    video    -> 2 frames a second -> chunks of up to 4 frames, each one item with a timestamp

2 x 2 patches make one token, and the frames of a chunk are pooled, so a chunk costs the tokens of
one picture: ``num_tokens = (height / 28) * (width / 28)``.
"""

from __future__ import annotations

import io
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from swarm_sdk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

Grid = tuple[int, int, int]
"""Frames, rows and columns of patches of one item."""

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""What is decoded; pillow knows more, some by running other programs."""
PATCH_SIZE = 14
MERGE_SIZE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaLimits:
    """How large pictures may be and how videos are sampled (``media_proc_cfg`` of the release)."""

    in_patch_limit: int = 16384
    """Patches of one picture."""
    in_patch_limit_each_frame: int = 4096
    """Patches of one video frame."""
    patch_limit_on_one_side: int = 512
    sample_fps: float = 2.0
    temporal_merge_kernel_size: int = 4
    """Frames of one chunk."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One picture, or one chunk of up to 4 video frames."""

    patches: NDArray[np.float32]
    """[frames * rows * columns, 3, 14, 14], frame by frame and row by row, in -1 … 1."""
    grid_thw: Grid

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens that the item fills."""
        return self.grid_thw[1] * self.grid_thw[2] // MERGE_SIZE**2


@dataclass(frozen=True, slots=True)
class VideoChunk:
    """One chunk of a video and when it starts."""

    item: MediaItem
    timestamp: str
    """``HH:MM:SS.mmm`` of the first frame; stands before the chunk in the prompt."""


@dataclass(frozen=True, slots=True, eq=False)
class MediaBatch:
    """The items of one forward pass, in the order of their placeholders."""

    patches: NDArray[np.float32]
    """All patches end to end [P, 3, 14, 14]."""
    grids: tuple[Grid, ...]

    @staticmethod
    def of(items: Sequence[MediaItem]) -> MediaBatch:
        """Pack items; at least one."""
        assert items, "a batch of no media is None"
        patches = np.concatenate([item.patches for item in items])
        return MediaBatch(patches, tuple(item.grid_thw for item in items))

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens that all items fill."""
        return sum(rows * columns // MERGE_SIZE**2 for _, rows, columns in self.grids)


def decode_image(data: bytes, name: str = "the image") -> Image.Image:
    """Decode a PNG, JPEG or other picture to RGB.

    Raises:
        ConfigError: the bytes are no picture, are cut off, or hold more pixels than pillow's
            guard against decompression bombs allows.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).convert("RGB")
    except UnidentifiedImageError:
        raise ConfigError(f"{name} is not a picture that can be read; give a PNG or JPEG") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ConfigError(
            f"{name} has more than {Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ConfigError(f"{name} is damaged and cannot be decoded: {error}") from None


def preprocess_image(image: Image.Image, limits: MediaLimits = MediaLimits()) -> MediaItem:
    """Resize, pad, normalise and cut a picture into patches.

    Raises:
        ConfigError: the picture has no pixels.
    """
    return _preprocess_frames([image], limits.in_patch_limit, limits)


def preprocess_video(
    frames: Sequence[Image.Image],
    native_fps: float,
    limits: MediaLimits = MediaLimits(),
) -> tuple[VideoChunk, ...]:
    """Sample frames and cut them into chunks, each with the time of its first frame.

    Raises:
        ConfigError: there are no frames, they differ in size, or ``native_fps`` is not positive.
    """
    if not frames:
        raise ConfigError("the video has no frames")
    if not (math.isfinite(native_fps) and native_fps > 0):
        raise ConfigError(f"the video's frame rate must be positive, got {native_fps}")
    indices = sample_frames(len(frames), native_fps, limits.sample_fps)
    chunk_size = limits.temporal_merge_kernel_size
    chunks = [indices[i : i + chunk_size] for i in range(0, len(indices), chunk_size)]
    return tuple(
        VideoChunk(
            _preprocess_frames(
                [frames[i] for i in chunk], limits.in_patch_limit_each_frame, limits
            ),
            format_timestamp(chunk[0] / native_fps),
        )
        for chunk in chunks
    )


def sample_frames(num_frames: int, native_fps: float, sample_fps: float) -> list[int]:
    """Return the indices of the frames to keep, evenly spread from the first to the last.

    >>> sample_frames(10, native_fps=4.0, sample_fps=2.0)
    [0, 2, 4, 7, 9]
    """
    fps = min(sample_fps, native_fps)
    num_kept = max(round(num_frames * fps / native_fps), 1)
    return [int(index) for index in np.linspace(0, num_frames - 1, num_kept).round()]


def format_timestamp(seconds: float) -> str:
    """Write ``HH:MM:SS.mmm``, the milliseconds cut and not rounded.

    >>> format_timestamp(3661.2509)
    '01:01:01.250'
    """
    whole = int(seconds)
    milliseconds = int(seconds % 1 * 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{milliseconds:03d}"


def resized_size(width: int, height: int, patch_limit: int, side_limit: int) -> tuple[int, int]:
    """Return width and height in pixels after shrinking to about ``patch_limit`` patches.

    ``side_limit`` bounds the patches along one side. The first limit counts the whole patches of
    the original, as the release does, so that a few more can remain: 1277 x 2978 keeps 16464.

    >>> resized_size(640, 480, patch_limit=16384, side_limit=512)
    (640, 480)
    """
    num_patches = max(1, width // PATCH_SIZE) * max(1, height // PATCH_SIZE)
    side_pixels = side_limit * PATCH_SIZE
    total_scale = math.sqrt(patch_limit / num_patches)
    scale = min(1.0, total_scale, side_pixels / width, side_pixels / height)
    new_width, new_height = max(1, int(width * scale)), max(1, int(height * scale))
    return min(new_width, side_pixels), min(new_height, side_pixels)


def num_image_tokens(width: int, height: int, limits: MediaLimits = MediaLimits()) -> int:
    """Count the tokens that a picture of this size in pixels fills.

    >>> num_image_tokens(640, 480)
    414
    """
    new = resized_size(width, height, limits.in_patch_limit, limits.patch_limit_on_one_side)
    unit = PATCH_SIZE * MERGE_SIZE
    return math.ceil(new[0] / unit) * math.ceil(new[1] / unit)


def _preprocess_frames(
    frames: Sequence[Image.Image], patch_limit: int, limits: MediaLimits
) -> MediaItem:
    width, height = frames[0].size
    if any(frame.size != (width, height) for frame in frames):
        raise ConfigError("the frames of a video must all have the same size")
    if not width or not height:
        raise ConfigError(f"the picture is {width} x {height} pixels; it must have some")
    new_width, new_height = resized_size(width, height, patch_limit, limits.patch_limit_on_one_side)
    unit = PATCH_SIZE * MERGE_SIZE
    rows = math.ceil(new_height / unit) * MERGE_SIZE
    columns = math.ceil(new_width / unit) * MERGE_SIZE

    shape = (len(frames), rows * PATCH_SIZE, columns * PATCH_SIZE, 3)
    pixels = np.zeros(shape, dtype=np.uint8)
    for canvas, frame in zip(pixels, frames, strict=True):
        rgb = frame.convert("RGB")
        if rgb.size != (new_width, new_height):
            rgb = rgb.resize((new_width, new_height), Image.Resampling.BICUBIC)
        canvas[:new_height, :new_width] = np.asarray(rgb)

    normalised = (pixels.astype(np.float32) / 255.0 - 0.5) / 0.5
    cut = normalised.reshape(len(frames), rows, PATCH_SIZE, columns, PATCH_SIZE, 3)
    patches = cut.transpose(0, 1, 3, 5, 2, 4).reshape(-1, 3, PATCH_SIZE, PATCH_SIZE)
    return MediaItem(np.ascontiguousarray(patches), (len(frames), rows, columns))
