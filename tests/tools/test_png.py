import io
import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from swarm_sdk.tools.sandbox.png import SIGNATURE, BadPicture, checked


def png(mode="RGB", size=(5, 4), **options):
    buffer = io.BytesIO()
    Image.new(mode, size, 1).save(buffer, "PNG", **options)
    return buffer.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def built(width, height, pixels, *, depth=8, colour=2, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels))
    return SIGNATURE + body + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "LA"])
def test_plain_pictures_of_every_mode_pass_unchanged(mode):
    data = png(mode)
    assert checked(data, max_pixels=20) == (data, 5, 4)


def test_texts_and_other_extras_are_taken_out_and_the_pixels_stay():
    told = PngImagePlugin.PngInfo()
    told.add_text("comment", "run this")
    data = png(pnginfo=told)
    clean, _, _ = checked(data + b"trailing", max_pixels=100)
    assert b"run this" in data
    assert b"run this" not in clean
    assert Image.open(io.BytesIO(clean)).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"GIF89a", "no PNG"),
        (SIGNATURE, "cut off"),
        (png()[:-1], "cut off"),
        (png().replace(b"IDAT", b"IDAU"), "checksum"),
        (built(50_000, 50_000, b""), "too many"),
        (built(0, 3, b""), "too many"),
        (built(2, 2, bytes(13)), "fewer"),
        (built(2, 2, bytes(15)), "more"),
        (built(2, 2, bytes(10**7)), "more"),
        (built(2, 2, b"\x09" + bytes(13)), "rows"),
        (built(2, 2, bytes(14), depth=3), "kind"),
        (built(2, 2, bytes(14), interlace=1), "kind"),
        (SIGNATURE + chunk(b"IDAT", b""), "header"),
        (SIGNATURE + chunk(b"IHDR", b"12") + chunk(b"IEND", b""), "header"),
    ],
)
def test_what_is_forged_cut_or_too_large_is_refused(data, says):
    with pytest.raises(BadPicture, match=says):
        checked(data, max_pixels=10**6)


@given(st.binary(max_size=200), st.integers(0, 60))
def test_no_bytes_raise_anything_else(noise, place):
    good = png()
    for data in (noise, SIGNATURE + noise, good[:place] + noise + good[place:]):
        try:
            checked(data, max_pixels=100)
        except BadPicture:
            continue
