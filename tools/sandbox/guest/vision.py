"""Names that a model finds natural when it looks at a picture: thin, over Pillow and scikit-image.

    picture = images[0]
    zoom(picture, (10, 10, 60, 60))      a part of it, enlarged
    count_components(binarize(picture))  how many objects stand out
    for frame in sample_frames("clip.mp4"): frame.timestamp, frame.image

A picture is a path, a Pillow image or an array [H, W] or [H, W, 3].
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""


@dataclass(frozen=True)
class Frame:
    """One frame of a clip."""

    index: int
    seconds: float
    timestamp: str
    """``HH:MM:SS.mmm``."""
    image: Image.Image


def crop(picture: Any, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Cut a part out; what lies outside the picture is left out."""
    found = _picture(picture)
    box = (max(0, left), max(0, top), min(found.width, right), min(found.height, bottom))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"the part holds no pixel of a picture of {found.width} x {found.height}")
    return found.crop(tuple(map(round, box)))  # type: ignore[arg-type]


def zoom(picture: Any, box: Box | None = None, factor: float = 4.0) -> Image.Image:
    """Enlarge a picture, or a part of it."""
    found = _picture(picture) if box is None else crop(picture, *box)
    size = (max(1, round(found.width * factor)), max(1, round(found.height * factor)))
    return found.resize(size, 3)


def binarize(picture: Any, threshold: float | None = None) -> NDArray[np.bool_]:
    """What stands out [H, W]: pixels on the rarer side of the threshold, Otsu's unless given."""
    import numpy as np
    from skimage.filters import threshold_otsu

    grey = np.asarray(_picture(picture).convert("L"), dtype=float)
    level = threshold_otsu(grey) if threshold is None else threshold
    mask: NDArray[np.bool_] = grey > level
    return mask if threshold is not None or mask.mean() < 0.5 else ~mask


def count_components(mask: Any, min_area: int | None = None) -> int:
    """How many connected parts a mask has; a picture is binarized first.

    ``min_area`` in pixels; a fifth of the largest part unless given, so that specks do not count.
    """
    import numpy as np
    from scipy import ndimage

    found = np.asarray(mask) if not isinstance(mask, (str, os.PathLike)) else binarize(mask)
    if found.dtype != bool:
        found = binarize(mask)
    labels, _ = ndimage.label(found)  # pyright: ignore[reportGeneralTypeIssues]
    areas = np.bincount(labels.ravel())[1:]
    if not len(areas):
        return 0
    least = areas.max() / 5 if min_area is None else min_area
    return int((areas >= least).sum())


def sample_frames(path: str, fps: float = 2.0, max_frames: int | None = None) -> list[Frame]:
    """Frames of a clip, evenly spread from the first to the last (report: 2 a second).

    ``max_frames`` takes that many instead where the clip would give more: the report samples 128
    frames of short clips evenly.
    """
    import numpy as np

    num_frames, native_fps = _clip(path)
    wanted = max(round(num_frames * min(fps, native_fps) / native_fps), 1)
    if max_frames is not None:
        wanted = min(wanted, max_frames)
    indices = [int(one) for one in np.linspace(0, num_frames - 1, wanted).round()]
    pictures = _frames(path, set(indices))
    frames = []
    for index in indices:
        if index in pictures:
            seconds = index / native_fps
            frames.append(Frame(index, seconds, _timestamp(seconds), pictures[index]))
    return frames


def _timestamp(seconds: float) -> str:
    whole, milliseconds = int(seconds), int(seconds % 1 * 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}.{milliseconds:03d}"


def _picture(picture: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    if isinstance(picture, Image.Image):
        return picture
    if isinstance(picture, (str, os.PathLike)):
        with Image.open(picture) as found:
            found.load()
            return found
    array = np.asarray(picture)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    elif array.dtype != np.uint8:
        top = 255.0 if array.size and array.max() <= 1.0 else 1.0
        array = np.clip(array * top, 0, 255).round().astype(np.uint8)
    return Image.fromarray(array)


def _clip(path: str) -> tuple[int, float]:
    """Frames and frames a second."""
    if str(path).lower().endswith((".gif", ".webp", ".png")):
        from PIL import Image

        with Image.open(path) as clip:
            milliseconds = clip.info.get("duration") or 100
            return getattr(clip, "n_frames", 1), 1000.0 / milliseconds
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        num_frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    if num_frames <= 0 or fps <= 0:
        raise ValueError(f"{path} is no clip that can be read")
    return num_frames, fps


def _frames(path: str, wanted: set[int]) -> dict[int, Image.Image]:
    from PIL import Image

    found: dict[int, Image.Image] = {}
    if str(path).lower().endswith((".gif", ".webp", ".png")):
        with Image.open(path) as clip:
            for index in sorted(wanted):
                clip.seek(index)
                found[index] = clip.convert("RGB")
        return found
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        for index in range(max(wanted) + 1):
            if not capture.grab():
                break
            if index in wanted:
                is_read, frame = capture.retrieve()
                if is_read:
                    found[index] = Image.fromarray(frame[:, :, ::-1])
    finally:
        capture.release()
    return found
