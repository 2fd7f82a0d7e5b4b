"""Real pictures, looked at through code by an oracle; what it saw is in the trace."""

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from swarm_sdk import Swarm, Task
from swarm_sdk.testing import ScriptedModel, call, calls
from swarm_sdk.tools.ipython import IPythonTool
from swarm_sdk.tools.sandbox.kernel import KernelSandbox
from swarm_sdk.tools.sandbox.pool import KernelPool
from swarm_sdk.traces.ledger import Ledger
from swarm_sdk.types import Image

pytestmark = pytest.mark.anyio

COUNT = """
import numpy as np
from scipy import ndimage
g = np.asarray(images[0].convert("L"), dtype=float)
flat = ndimage.gaussian_filter(g, 1) - ndimage.gaussian_filter(g, max(g.shape) / 10)
mask = ndimage.binary_opening(ndimage.binary_fill_holes(binarize(flat - flat.min())), iterations=2)
display(crop(mask, 0, 0, 200, 200))
print(count_components(mask))
"""
# scikit-image's own recipe for this picture; nuclei cut by the border are not counted.
NUCLEI = """
from scipy import ndimage
import numpy as np
from skimage import filters, measure, segmentation, feature
g = np.asarray(images[0])
cells = g > filters.threshold_multiotsu(g, classes=3)[0]
distance = ndimage.distance_transform_edt(cells)
peaks = feature.peak_local_max(distance, min_distance=7)
print(len(peaks))
"""
MITOSIS_ARCHIVE = (
    "ome-arrow==0.1.0 "
    "--hash=sha256:955db721dec93084b3884c526f5745af8c12e13e6a928a7c6ede7587fcb4c07c"
)
MITOSIS_FILE = "examplehuman/AS_09125_050116030001_D03f00d0.tif"
BARS = """
import numpy as np
p = np.asarray(images[0].convert("RGB"), dtype=int)
dark = p.max(axis=2) < 60
rows = np.flatnonzero(dark.sum(axis=1) > 0.6 * p.shape[1])
top, bottom = rows.min(), rows.max()
bars = np.abs(p - (31, 119, 180)).max(axis=2) < 30
columns = np.flatnonzero(bars.sum(axis=0) > 2)
groups = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
heights = [bars[:, group[len(group) // 2]].argmax() for group in groups]
print([round(10 * (bottom - height) / (bottom - top)) for height in heights])
"""
CROSSING = """
import numpy as np
frames = sample_frames("clip.avi", fps=8)
centres = [np.nonzero(np.asarray(f.image.convert("L")) > 128)[1].mean() for f in frames]
first = next(i for i, x in enumerate(centres) if x > 60)
display(frames[first].image)
print(frames[first].timestamp, len(sample_frames("clip.avi")))
"""


def coins(folder):
    import skimage

    path = Path(skimage.__file__).parent / "data" / "coins.png"
    return Image(path.read_bytes(), name="coins.png")


def mitosis(folder):
    """The file behind scikit-image's ``human_mitosis()`` (CC0, David Root).

    The wheel does not hold it and fetches it on first use; the source archive of another package
    does, so that pip can have it wherever pip has packages. What counts is scikit-image's own hash.
    """
    from skimage.data._registry import registry

    path = folder / "mitosis.tif"
    if not path.exists():
        wanted = folder / "requirements.txt"
        wanted.write_text(MITOSIS_ARCHIVE)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary=ome-arrow",
        ]
        command = [*pip, "--require-hashes", "--dest", folder, "--requirement", wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
        if done.returncode:
            pytest.skip(f"human_mitosis() cannot be had here: {done.stderr.strip()[-200:]}")
        [archive] = folder.glob("*.tar.gz")
        with tarfile.open(archive) as members:
            name = next(name for name in members.getnames() if name.endswith(MITOSIS_FILE))
            path.write_bytes(members.extractfile(name).read())
        archive.unlink()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == registry["data/mitosis.tif"]
    return Image(encoded(Pillow.open(path)), name="cells.png")


def chart(folder):
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"axes.linewidth": 2}):
        figure = Figure(figsize=(5, 4), dpi=100)
        axes = figure.add_subplot()
        axes.bar(["a", "b", "c", "d"], [3, 8, 5, 1])
        axes.set_ylim(0, 10)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
    return Image(buffer.getvalue(), name="chart.png")


def clip(tmp_path):
    """A bright square that moves right by 2.5 pixels a frame; 8 frames a second, 5 seconds."""
    import cv2

    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 8.0, (128, 64))
    for index in range(40):
        frame = np.zeros((64, 128, 3), np.uint8)
        left = int(10 + 2.5 * index)
        frame[24:40, left : left + 10] = 255
        writer.write(frame)
    writer.release()
    return Image(path.read_bytes(), "video/x-msvideo", "clip.avi")


def encoded(picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


async def looked(file, code, runs, pool):
    """The answer of an oracle that looks first and then measures; the pictures in the trace."""

    def oracle(messages, tools):
        results = [message for message in messages if message.role == "tool"]
        if not results:
            return calls(call("ipython", code="images and images[0]"))
        if len(results) == 1:
            return calls(call("ipython", code=code))
        return results[-1].content.splitlines()[-1]

    async with Swarm(ScriptedModel(oracle), tools=[IPythonTool(pool.lease)], runs=runs) as swarm:
        result = await swarm.run(Task("Look.", (file,)))
    ledger = Ledger(runs, readonly=True)
    messages = ledger.messages(result.episode_id, "main")
    steps = [step.body for step in ledger.steps(result.episode_id) if step.kind == "tool"]
    ledger.close()
    shown = [image for message in messages if message.role == "tool" for image in message.images]
    return result.output, messages[0 if messages[0].role == "user" else 1].images, shown, steps


@pytest.mark.parametrize(
    ("make", "code", "answers", "num_shown"),
    [
        (coins, COUNT, ("24",), 2),
        (mitosis, NUCLEI, ("286",), 1),
        (chart, BARS, ("[3, 8, 5, 1]",), 1),
    ],
    ids=["coins", "human_mitosis", "bar chart"],
)
async def test_an_oracle_answers_and_the_trace_holds_what_it_saw(
    make, code, answers, num_shown, tmp_path, request
):
    file = make(request.config.cache.mkdir("pictures"))
    async with KernelPool(1) as pool:
        answer, given, shown, steps = await looked(file, code, tmp_path, pool)
    assert answer in answers
    assert given == (file,)
    assert len(shown) == num_shown
    assert [image.name for image in shown] == [f"shown-{i}.png" for i in range(num_shown)]
    first = Pillow.open(io.BytesIO(shown[0].data))
    original = Pillow.open(io.BytesIO(file.data))
    assert np.array_equal(np.asarray(first.convert("RGB")), np.asarray(original.convert("RGB")))
    assert shown[0].description.startswith(f"{original.width} x {original.height} pixels, #")
    for step in steps:
        assert step["facts"]["swarm.sandbox.level"] in ("L3", "L2", "L1")
        assert step["facts"]["swarm.sandbox.status"] == "ok"


async def test_a_clip_is_a_file_for_tools_and_its_frames_carry_timestamps(tmp_path):
    async with KernelPool(1) as pool:
        answer, given, shown, _ = await looked(clip(tmp_path), CROSSING, tmp_path / "runs", pool)
    # The centre is at left + 4.5: beyond 60 from frame 19 on (10 + 47 + 4.5), 19 / 8 s.
    assert answer == "00:00:02.375 10"
    assert given == ()
    assert len(shown) == 1


async def run(sandbox, code):
    return (await sandbox.run(code, timeout_s=20)).text


async def test_pictures_given_and_shown_can_be_opened_again():
    small = Image(encoded(Pillow.new("RGB", (8, 6), "red")), name="a.png")
    async with KernelSandbox([small, Image(b"x", "text/plain", "b.txt")]) as sandbox:
        assert await run(sandbox, "len(images), images[0].size, images[0].getpixel((0, 0))") == (
            "(1, (8, 6), (255, 0, 0))"
        )
        assert await run(sandbox, "images") == "images[0]  a.png  8 x 6, RGB"
        result = await sandbox.run("zoom(images[0], (0, 0, 4, 4), 2)", timeout_s=20)
        assert result.images[0].name == "shown-0.png"
        assert await run(sandbox, "shown[0].size") == "(8, 8)"
        assert (await run(sandbox, "images[3]")).startswith("IndexError: images holds 1 pictures")
        assert (await run(sandbox, "crop(images[0], 9, 9, 20, 20)")).startswith("ValueError")


async def test_a_large_picture_is_scaled_to_the_budget_and_an_enormous_one_is_left_out():
    async with KernelSandbox() as sandbox:
        code = "from PIL import Image as I\nI.new('L', (9000, 100))"
        [image] = (await sandbox.run(code, timeout_s=20)).images
        assert Pillow.open(io.BytesIO(image.data)).size == (7168, 79)
        [image] = (await sandbox.run("I.new('L', (3000, 3000))", timeout_s=20)).images
        width, height = Pillow.open(io.BytesIO(image.data)).size
        assert width * height <= 16384 * 14 * 14
        assert width == height > 1700
        result = await sandbox.run("I.new('1', (10000, 10000))", timeout_s=30)
        assert result.images == ()
        assert "left out: 10000 x 10000 pixels are too many" in result.text


def test_helpers_do_what_their_names_say(tmp_path):
    from swarm_sdk.model_backend.model import media
    from swarm_sdk.tools.sandbox.guest import vision

    picture = np.zeros((40, 60), np.uint8)
    picture[5:15, 5:15] = picture[20:30, 40:50] = 255
    picture[35, 35] = 255
    mask = vision.binarize(picture)
    assert mask.sum() == 201
    assert np.array_equal(vision.binarize(255 - picture), mask)
    assert vision.count_components(mask) == vision.count_components(picture) == 2
    assert vision.count_components(mask, min_area=1) == 3
    assert vision.count_components(np.zeros((3, 3), bool)) == 0
    assert vision.crop(picture, -5, 0, 20, 99).size == (20, 40)
    assert vision.zoom(mask, factor=0.5).size == (30, 20)
    path = tmp_path / "clip.avi"
    path.write_bytes(clip(tmp_path).data)
    frames = vision.sample_frames(str(path))
    assert [frame.index for frame in frames] == media.sample_frames(40, 8.0, 2.0)
    assert [frame.timestamp for frame in frames] == [
        media.format_timestamp(frame.index / 8) for frame in frames
    ]
    assert len(vision.sample_frames(str(path), max_frames=3)) == 3
    gif = tmp_path / "clip.gif"
    stills = [Pillow.new("L", (4, 4), 20 * i) for i in range(6)]
    stills[0].save(gif, save_all=True, append_images=stills[1:], duration=250)
    assert [frame.seconds for frame in vision.sample_frames(str(gif))] == [0.0, 0.5, 1.25]
    with pytest.raises(ValueError, match="no clip"):
        vision.sample_frames(str(tmp_path / "missing.avi"))
