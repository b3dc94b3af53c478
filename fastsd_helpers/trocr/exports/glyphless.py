"""The smallest TrueType font: one glyph that shows nothing, half as wide as it is high, for text that is never seen."""

import functools
import struct

__all__ = ["glyphless_font"]

_EM, _WIDTH = 1000, 500


@functools.cache
def glyphless_font() -> bytes:
    """The font's file.

    Source: OpenType specification 1.9, the tables that a TrueType font must have.
    """
    tables = {
        b"OS/2": struct.pack(">HhHHH11h10s4I", 0, _WIDTH, 400, 5, 0, *([0] * 11), bytes(10), 0, 0, 0, 0)
        + struct.pack(">4sHHHhhhHH", b"NONE", 64, 0, 0xFFFF, _EM, 0, 0, _EM, 0),
        b"cmap": struct.pack(">HHHHI", 0, 1, 3, 1, 12)
        + struct.pack(">HHHHHHH", 4, 24, 0, 2, 2, 0, 0) + struct.pack(">HHHhH", 0xFFFF, 0, 0xFFFF, 1, 0),
        b"glyf": _glyph(),
        b"head": struct.pack(">IIIIHHQQhhhhHHhhh", 0x10000, 0x10000, 0, 0x5F0F3CF5, 3, _EM, 0, 0, 0, 0, _WIDTH, _EM,
                             0, 8, 2, 0, 0),
        b"hhea": struct.pack(">IhhhHhhhhhhhhhhhH", 0x10000, _EM, 0, 0, _WIDTH, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2),
        b"hmtx": struct.pack(">HhHh", _WIDTH, 0, _WIDTH, 0),
        b"loca": struct.pack(">HHH", 0, 0, len(_glyph()) // 2),
        b"maxp": struct.pack(">IHHHHHHHHHHHHHH", 0x10000, 2, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        b"name": _names(),
        b"post": struct.pack(">IIhhIIIII", 0x30000, 0, 0, 0, 1, 0, 0, 0, 0),
    }  # fmt: skip
    count = len(tables)
    at = 12 + 16 * count
    head = struct.pack(">IHHHH", 0x10000, count, 128, 3, 16 * count - 128)
    body = b""
    for tag, data in sorted(tables.items()):
        head += struct.pack(">4sIII", tag, _sum(data), at + len(body), len(data))
        body += data + b"\0" * (-len(data) % 4)
    font = bytearray(head + body)
    # The whole file must add up to this number.
    place = font.index(struct.pack(">I", 0x5F0F3CF5)) - 4
    struct.pack_into(">I", font, place, (0xB1B0AFBA - _sum(bytes(font))) & 0xFFFFFFFF)
    return bytes(font)


def _glyph() -> bytes:
    """A contour of two points: it has a size, which viewers select text by, and no area that could be seen."""
    flags, xs, ys = bytes([1, 1]), struct.pack(">hh", 0, _WIDTH), struct.pack(">hh", 0, _EM)
    data = struct.pack(">hhhhhHH", 1, 0, 0, _WIDTH, _EM, 1, 0) + flags + xs + ys
    return data + b"\0" * (-len(data) % 4)


def _names() -> bytes:
    texts = {1: "FastsdGlyphless", 2: "Regular", 4: "FastsdGlyphless", 6: "FastsdGlyphless"}
    rows, strings = b"", b""
    for number, text in texts.items():
        data = text.encode("utf-16-be")
        rows += struct.pack(">HHHHHH", 3, 1, 0x409, number, len(data), len(strings))
        strings += data
    return struct.pack(">HHH", 0, len(texts), 6 + len(rows)) + rows + strings


def _sum(data: bytes) -> int:
    data += b"\0" * (-len(data) % 4)
    return sum(struct.unpack(f">{len(data) // 4}I", data)) & 0xFFFFFFFF
