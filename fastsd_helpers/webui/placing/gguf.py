"""What a GGUF file holds: its architecture and its tensors' names and shapes, read from the header alone."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import file_errors

__all__ = ["GGUFHeader", "read_gguf"]

_MOST = 1_000_000  # tensors or entries; a real file has thousands
_LONGEST = 64_000_000  # bytes of one text or list; vocabularies are the longest
# Number of a value's type -> bytes it takes; 8 is a text, 9 a list.
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST, _UINT32 = 8, 9, 4
# Number of a tensor's type -> (values in a block, bytes of a block).
_BLOCKS = {
    **{0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36)},
    **{10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292)},
    **{24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 30: (1, 2)},
}


@dataclass(frozen=True)
class GGUFHeader:
    """The header of a GGUF file.

    architecture: such as `flux` or `t5`; "" where the file does not say. tensors: name -> shape, slowest axis first.
    """

    architecture: str
    tensors: dict[str, tuple[int, ...]]


def read_gguf(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file, and compare the file's length with what the header promises.

    Source: the GGUF description, versions 2 and 3 (docs/gguf.md of ggml-org/ggml).

    Raises:
        CheckpointError: it is not a GGUF file, is truncated, or its header makes no sense.
    """
    with file_errors(path, "read"), path.open("rb") as file:
        try:
            return _read(file, path)
        except (struct.error, UnicodeDecodeError, MemoryError, OverflowError) as err:
            raise _damaged(path, "its header ends too early") from err


def _read(file: BinaryIO, path: Path) -> GGUFHeader:
    magic, version = struct.unpack("<4sI", _take(file, 8))
    if magic != b"GGUF":
        raise CheckpointError(
            f"{path} is called .gguf, but is not a GGUF file.", "Download it again, or choose another."
        )
    if version not in (2, 3):
        raise CheckpointError(f"{path} is a GGUF file of version {version}.", "Versions 2 and 3 can be read here.")
    count, entries = struct.unpack("<QQ", _take(file, 16))
    if max(count, entries) > _MOST:
        raise _damaged(path, "its header promises millions of entries")
    found: dict[str, object] = {}
    for _ in range(entries):
        key = _text(file)
        found[key] = _value(file, _number(file, "<I"))
    tensors, end = {}, 0
    for _ in range(count):
        name = _text(file)
        axes = _number(file, "<I")
        if axes > 8:
            raise _damaged(path, f"{name} has {axes} axes")
        shape = struct.unpack(f"<{axes}Q", _take(file, 8 * axes))
        kind, offset = struct.unpack("<IQ", _take(file, 12))
        tensors[name] = tuple(reversed(shape))
        if kind in _BLOCKS:
            values, size = _BLOCKS[kind]
            end = max(end, offset + math.prod(shape) // values * size)
    alignment = found.get("general.alignment", 32)
    align = alignment if isinstance(alignment, int) and 0 < alignment <= 65536 else 32
    start = -(-file.tell() // align) * align
    length = path.stat().st_size
    if tensors and length < start + end:
        raise _damaged(path, f"{length:,} of {start + end:,} bytes are here")
    architecture = found.get("general.architecture", "")
    return GGUFHeader(architecture if isinstance(architecture, str) else "", tensors)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} is a truncated or damaged GGUF file: {why}.", "Copy or download all of it again.")


def _take(file: BinaryIO, count: int) -> bytes:
    if count > _LONGEST:
        raise OverflowError
    found = file.read(count)
    if len(found) < count:
        raise struct.error("too short")
    return found


def _number(file: BinaryIO, form: str) -> int:
    return struct.unpack(form, _take(file, struct.calcsize(form)))[0]


def _text(file: BinaryIO) -> str:
    return _take(file, _number(file, "<Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int, depth: int = 0) -> object:
    """One value: a text or an integer as it is, anything else skipped."""
    if kind == _TEXT:
        return _text(file)
    if kind == _LIST and depth < 4:
        inner, count = _number(file, "<I"), _number(file, "<Q")
        if inner in _VALUE_BYTES:
            _take(file, _VALUE_BYTES[inner] * count)
        elif count > _LONGEST:
            raise OverflowError
        else:
            for _ in range(count):
                _value(file, inner, depth + 1)
        return None
    if kind not in _VALUE_BYTES:
        raise struct.error("unknown type of value")
    found = _take(file, _VALUE_BYTES[kind])
    return struct.unpack("<I", found)[0] if kind == _UINT32 else None
