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


def coloured(*parts, colour=3, pixels=bytes(6)):
    """A picture of 2 x 2 pixels of 8 bits, with ``parts`` before its pixels."""
    header = struct.pack(">IIBBBBB", 2, 2, 8, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IDAT", zlib.compress(pixels))
    return SIGNATURE + body + chunk(b"IEND", b"")


PALETTE = chunk(b"PLTE", b"abc")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (coloured(), "palette is missing"),
        (coloured(chunk(b"PLTE", b"")), "palette is broken"),
        (coloured(chunk(b"PLTE", b"abcd")), "palette is broken"),
        (coloured(chunk(b"PLTE", b"abc" * 257)), "palette is broken"),
        (coloured(PALETTE, PALETTE), "twice"),
        (coloured(PALETTE, chunk(b"tRNS", bytes(257))), "transparency"),
        (coloured(chunk(b"tRNS", b"1"), PALETTE), "order"),
        (coloured(chunk(b"tRNS", b""), colour=2, pixels=bytes(14)), "transparency"),
        (coloured(chunk(b"tRNS", b"1"), colour=0), "transparency"),
        (coloured(chunk(b"tRNS", b"12"), colour=4, pixels=bytes(10)), "transparency"),
        (coloured(chunk(b"IDAT", b""), PALETTE, colour=0), "order"),
        (coloured(colour=0)[:-12] + chunk(b"IEND", b"x"), "more data"),
    ],
)
def test_colours_that_a_decoder_would_stumble_over_are_refused(data, says):
    with pytest.raises(BadPicture, match=says):
        checked(data, max_pixels=4)


@given(
    st.sampled_from([0, 2, 3, 4, 6]),
    st.lists(
        st.tuples(st.sampled_from([b"PLTE", b"tRNS", b"IDAT", b"tEXt"]), st.binary(max_size=9))
    ),
)
def test_what_passes_can_be_decoded(colour, parts):
    pixels = bytes(2 * (1 + 2 * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]))
    data = coloured(*(chunk(*part) for part in parts), colour=colour, pixels=pixels)
    try:
        passed, _, _ = checked(data, max_pixels=4)
    except BadPicture:
        return
    picture = Image.open(io.BytesIO(passed))
    picture.load()
    picture.convert("RGBA").convert("RGB")


@given(st.binary(max_size=200), st.integers(0, 60))
def test_no_bytes_raise_anything_else(noise, place):
    good = png()
    for data in (noise, SIGNATURE + noise, good[:place] + noise + good[place:]):
        try:
            checked(data, max_pixels=100)
        except BadPicture:
            continue
