import io
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from swarm_sdk.errors import ConfigError
from swarm_sdk.model_backend.model.media import (
    MediaBatch,
    MediaLimits,
    decode_image,
    format_timestamp,
    num_image_tokens,
    preprocess_image,
    preprocess_video,
    resized_size,
    sample_frames,
)


def random_image(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("size", "limits", "resized", "grid"),
    [
        ((60, 45), MediaLimits(), (60, 45), (1, 4, 6)),
        ((28, 28), MediaLimits(), (28, 28), (1, 2, 2)),
        ((5, 3), MediaLimits(), (5, 3), (1, 2, 2)),
        # sqrt(16 / (14 * 7)) = 0.4040...: 200 -> 80, 100 -> 40
        ((200, 100), MediaLimits(in_patch_limit=16), (80, 40), (1, 4, 6)),
        # 8 * 14 / 300 = 0.3733...: 300 -> 112, 30 -> 11
        ((300, 30), MediaLimits(patch_limit_on_one_side=8), (112, 11), (1, 2, 8)),
    ],
    ids=["padded", "exact", "smaller than a patch", "too many patches", "too wide"],
)
def test_a_picture_is_shrunk_padded_normalised_and_cut(
    size: tuple[int, int], limits: MediaLimits, resized: tuple[int, int], grid: tuple[int, int, int]
) -> None:
    image = random_image(*size)
    item = preprocess_image(image, limits)
    assert item.grid_thw == grid
    assert item.patches.dtype == np.float32
    expected = image if size == resized else image.resize(resized, Image.Resampling.BICUBIC)
    pixels = np.asarray(expected, dtype=np.float64)
    _, rows, columns = grid
    for index, patch in enumerate(item.patches):
        top, left = index // columns * 14, index % columns * 14
        for channel in range(3):
            block = np.full((14, 14), -1.0)
            seen = pixels[top : top + 14, left : left + 14, channel]
            block[: seen.shape[0], : seen.shape[1]] = seen / 127.5 - 1.0
            np.testing.assert_allclose(patch[channel], block, atol=1e-6)
    assert item.num_tokens == rows * columns // 4 == num_image_tokens(*size, limits)


@given(st.integers(1, 20_000), st.integers(1, 20_000))
@settings(max_examples=300, deadline=None)
def test_no_size_breaks_the_limits_or_is_enlarged(width: int, height: int) -> None:
    limits = MediaLimits()
    new_width, new_height = resized_size(width, height, 16384, 512)
    assert 1 <= new_width <= min(width, 512 * 14)
    assert 1 <= new_height <= min(height, 512 * 14)
    num_patches = max(1, width // 14) * max(1, height // 14)
    assert new_width * new_height <= max(16384 * width * height / num_patches, width, height)
    padded_rows, padded_columns = math.ceil(new_height / 28) * 2, math.ceil(new_width / 28) * 2
    assert max(padded_rows, padded_columns) <= 512
    assert num_image_tokens(width, height, limits) == padded_rows * padded_columns // 4
    if width * height <= 14 * 14 * 16384 and max(width, height) <= 512 * 14:
        assert (new_width, new_height) == (width, height)


@given(st.integers(1, 3000), st.floats(0.1, 240.0))
@settings(max_examples=200, deadline=None)
def test_frames_are_sampled_in_order_at_most_two_a_second(num_frames: int, fps: float) -> None:
    indices = sample_frames(num_frames, fps, 2.0)
    assert indices == sorted(indices)
    assert indices[0] == 0
    assert indices[-1] == (num_frames - 1 if len(indices) > 1 else 0)
    assert len(indices) == max(round(num_frames * min(2.0, fps) / fps), 1)
    if fps <= 2.0:
        assert indices == list(range(num_frames))


def test_a_video_becomes_chunks_of_four_frames_with_the_time_of_the_first() -> None:
    frames = [random_image(60, 45, seed) for seed in range(24)]
    chunks = preprocess_video(frames, native_fps=8.0)
    # 24 frames at 8 a second: 6 are kept, 0 5 9 14 18 23.
    assert [chunk.timestamp for chunk in chunks] == ["00:00:00.000", "00:00:02.250"]
    assert [chunk.item.grid_thw for chunk in chunks] == [(4, 4, 6), (2, 4, 6)]
    assert [chunk.item.num_tokens for chunk in chunks] == [6, 6]
    for frame_index, patches in (
        (5, chunks[0].item.patches[24:48]),
        (23, chunks[1].item.patches[24:]),
    ):
        np.testing.assert_array_equal(patches, preprocess_image(frames[frame_index]).patches)


def test_frames_have_a_limit_of_their_own() -> None:
    limits = MediaLimits(in_patch_limit_each_frame=16)
    frame = random_image(140, 140)
    (chunk,) = preprocess_video([frame], native_fps=1.0, limits=limits)
    assert chunk.item.grid_thw == (1, 4, 4)
    assert preprocess_image(frame, limits).grid_thw == (1, 10, 10)


@given(st.integers(0, 360_000_000))
@settings(deadline=None)
def test_timestamps_read_back_as_the_time(milliseconds: int) -> None:
    hours, minutes, rest = format_timestamp(milliseconds / 1000).split(":")
    seconds = int(hours) * 3600 + int(minutes) * 60 + float(rest)
    assert abs(seconds - milliseconds / 1000) < 0.0011
    assert int(minutes) < 60
    assert len(rest) == 6


def test_a_batch_holds_its_items_end_to_end() -> None:
    items = [preprocess_image(random_image(60, 45)), preprocess_image(random_image(28, 28))]
    batch = MediaBatch.of(items)
    assert batch.grids == ((1, 4, 6), (1, 2, 2))
    assert batch.num_tokens == 7
    np.testing.assert_array_equal(batch.patches[24:], items[1].patches)


@pytest.mark.parametrize("image_format", ["PNG", "GIF"])
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_pictures_of_every_mode_become_rgb(image_format: str, mode: str) -> None:
    image = random_image(30, 20).convert(mode)
    if image_format == "GIF" and mode == "RGBA":
        image = image.convert("P")
    decoded = decode_image(encoded(image, image_format))
    assert decoded.mode == "RGB"
    assert decoded.size == (30, 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a picture"),
        (b"hello, world", "not a picture"),
        (encoded(random_image(64, 64))[:2000], "damaged"),
        (encoded(random_image(64, 64), "JPEG")[:600], "damaged"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG"],
)
def test_bytes_that_are_no_picture_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        decode_image(data, name="chart.png")
    assert "chart.png" in str(caught.value)


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(random_image(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    with pytest.raises(ConfigError, match="more than 3000 pixels"):
        decode_image(data)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    with pytest.raises(ConfigError, match="more than 300 pixels"):
        decode_image(data)


@pytest.mark.parametrize(
    ("frames", "fps", "message"),
    [
        ([], 1.0, "no frames"),
        ([random_image(30, 20)], 0.0, "frame rate must be positive"),
        ([random_image(30, 20)], float("nan"), "frame rate must be positive"),
        ([random_image(30, 20), random_image(20, 30)], 1.0, "same size"),
    ],
)
def test_a_bad_video_is_refused(frames: list[Image.Image], fps: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        preprocess_video(frames, fps)
