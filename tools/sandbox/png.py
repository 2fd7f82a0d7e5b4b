"""A PNG from a stranger, checked and written anew without decoding a pixel.

    signature ─ IHDR ─ PLTE, tRNS ─ IDAT … ─ IEND     every checksum right, sizes within bounds,
                                                      as many pixels as IHDR says, and no more

What passes holds those chunks in this order and no others, so that no decoder meets text, profiles,
animation, a palette that it must guess or a stream that grows past its picture.
"""

from __future__ import annotations

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KINDS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_TRANSPARENCY = {0: (2,), 2: (6,), 3: range(1, 257)}
"""Bytes that it may have, for each kind of colour that can have any."""
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
_DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


class BadPicture(ValueError):
    """Raised if the bytes are not one plain PNG within the bounds; says what is wrong."""


def checked(data: bytes, *, max_pixels: int) -> tuple[bytes, int, int]:
    """The PNG with its needed chunks only, its width and its height.

    Raises:
        BadPicture: it is cut, forged or too large.
    """
    if not data.startswith(SIGNATURE):
        raise BadPicture("it is no PNG")
    kept = [SIGNATURE]
    seen: list[bytes] = []
    header: tuple[int, ...] | None = None
    stream: list[bytes] = []
    place = len(SIGNATURE)
    while True:
        if place + 12 > len(data):
            raise BadPicture("it is cut off")
        length, kind = struct.unpack(">I4s", data[place : place + 8])
        end = place + 12 + length
        if end > len(data):
            raise BadPicture("it is cut off")
        body = data[place + 8 : end - 4]
        if zlib.crc32(kind + body) != struct.unpack(">I", data[end - 4 : end])[0]:
            raise BadPicture("a checksum is wrong")
        if (kind == b"IHDR") != (header is None):
            raise BadPicture("its header is missing or given twice")
        if kind == b"IHDR":
            header = _header(body, max_pixels)
        if kind in _KINDS:
            _check_place(kind, body, seen, header or ())
            seen.append(kind)
            kept.append(data[place:end])
        if kind == b"IDAT":
            stream.append(body)
        if kind == b"IEND":
            break
        place = end
    assert header is not None
    _check_pixels(b"".join(stream), header)
    return b"".join(kept), header[0], header[1]


def _check_place(kind: bytes, body: bytes, seen: list[bytes], header: tuple[int, ...]) -> None:
    """Refuse what is out of order, and colours that do not fit the kind of picture."""
    if seen and _KINDS.index(kind) < _KINDS.index(seen[-1]):
        raise BadPicture("its parts are out of order")
    if kind != b"IDAT" and kind in seen:
        raise BadPicture("a part of it is given twice")
    depth, colour = header[2:4]
    if kind == b"PLTE" and (len(body) % 3 or not 0 < len(body) <= 3 * 2 ** min(depth, 8)):
        raise BadPicture("its palette is broken")
    if kind == b"tRNS" and len(body) not in _TRANSPARENCY.get(colour, ()):
        raise BadPicture("its transparency is broken")
    if kind == b"IDAT" and colour == 3 and b"PLTE" not in seen:
        raise BadPicture("its palette is missing")
    if kind == b"IEND" and body:
        raise BadPicture("it ends in more data")


def _header(body: bytes, max_pixels: int) -> tuple[int, ...]:
    if len(body) != 13:
        raise BadPicture("its header is broken")
    header = struct.unpack(">IIBBBBB", body)
    width, height, depth, colour, compression, filtering, interlace = header
    if depth not in _DEPTHS.get(colour, ()) or compression or filtering or interlace:
        raise BadPicture("it is of a kind that is not taken")
    if not 0 < width * height <= max_pixels:
        raise BadPicture(f"{width} x {height} pixels are too many")
    return header


def _check_pixels(stream: bytes, header: tuple[int, ...]) -> None:
    width, height, depth, colour = header[:4]
    row = 1 + (width * depth * _CHANNELS[colour] + 7) // 8
    expected = row * height
    inflater = zlib.decompressobj()
    try:
        pixels = inflater.decompress(stream, expected + 1)
    except zlib.error as error:
        raise BadPicture("its pixels cannot be unpacked") from error
    if len(pixels) != expected:
        raise BadPicture("it holds more or fewer pixels than its header says")
    if max(pixels[::row]) > 4:
        raise BadPicture("its rows are broken")
