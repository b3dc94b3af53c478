"""Write a .ckpt file that AUTOMATIC1111's safe loader accepts, streamed, without torch.

The file is a zip of `archive/data.pkl`, `archive/data/N` and `archive/version`, as torch 1.6 to 1.13 wrote it. Newer
torch adds members that AUTOMATIC1111's modules/safe.py refuses ("bad file inside").

Source: torch's docs/source/notes/serialization.rst, and the list of allowed names in modules/safe.py.
"""

import os
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from fastsd_helpers.checkpoints.formats.dtypes import CKPT_STORAGES
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe
from fastsd_helpers.checkpoints.formats.tensor_stream import stream
from fastsd_helpers.checkpoints.names.layout import Shape
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import check_room, new_file, sha256_of
from fastsd_helpers.runtime import fault_point

__all__ = ["write_ckpt"]

_ALIGNMENT = 64  # torch's own; a mapped file is read in place


def write_ckpt(
    path: Path, recipes: Mapping[str, Recipe], *, finite: bool = False, hashes: bool = True, bare: bool = False
) -> tuple[str, int]:
    """Write `{"state_dict": {name: tensor}}` front to back; returns SHA-256 (hex) and size of what was read back.

    Without `hashes` nothing is read back, and the SHA-256 is empty. With `bare` the tensors lie at the top, as in the
    .bin files of diffusers and transformers.

    Raises:
        CheckpointError: a tensor is of a format that .ckpt files do not have (8-bit floats), or cannot be read.
        DiskFull: the folder does not take the file; nothing is left behind.
        DriveReadOnly: the folder does not take the file; nothing is left behind.
        DriveError: the folder does not take the file; nothing is left behind.
    """
    names = sorted(recipes)
    for name in names:
        if recipes[name].fact.dtype not in CKPT_STORAGES:
            raise CheckpointError(
                f"A {path.suffix} file cannot hold {recipes[name].fact.dtype}, the format of {name!r}.",
                "Choose fp16, or a name that ends in .safetensors.",
            )
    needed = sum(recipe.fact.bytes + 300 for recipe in recipes.values()) + 1000
    with new_file(path) as (file, temporary):
        check_room(path.parent, needed)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            _add(archive, file, "data.pkl", [_program([(name, recipes[name]) for name in names], bare)])
            place, member = 0, None
            for name, buffer, last in stream(((name, recipes[name]) for name in names), finite=finite):
                if member is None:
                    member = archive.open(_member(file, f"data/{place}", recipes[name].fact.bytes), "w")
                member.write(buffer)
                if last:
                    member.close()
                    place, member = place + 1, None
                    fault_point("export.tensor")
            _add(archive, file, "version", [b"3\n"])
        os.fsync(file.fileno())
        return sha256_of(temporary) if hashes else "", os.fstat(file.fileno()).st_size


def _add(archive: zipfile.ZipFile, file: BinaryIO, name: str, contents: Sequence[bytes]) -> None:
    with archive.open(_member(file, name, sum(map(len, contents))), "w") as member:
        for content in contents:
            member.write(content)


def _member(file: BinaryIO, name: str, size: int) -> zipfile.ZipInfo:
    """A member whose data starts at a multiple of the alignment: an extra field fills the gap."""
    info = zipfile.ZipInfo(f"archive/{name}", (1980, 1, 1, 0, 0, 0))
    info.file_size = size
    large = size * 1.05 > zipfile.ZIP64_LIMIT
    start = file.seek(0, os.SEEK_CUR) + 30 + len(info.filename) + (20 if large else 0) + 4
    padding = -start % _ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def _program(tensors: Sequence[tuple[str, Recipe]], bare: bool) -> bytes:
    """The pickle that rebuilds the dictionary: protocol 2, in the steps that torch itself writes."""
    out = bytearray(b"\x80\x02}" + (b"" if bare else _text("state_dict") + b"}") + b"(")
    for place, (name, recipe) in enumerate(tensors):
        fact = recipe.fact
        out += _text(name)
        out += b"ctorch._utils\n_rebuild_tensor_v2\n("
        # The persistent id: where the values are.
        out += b"(" + _text("storage") + b"ctorch\n" + CKPT_STORAGES[fact.dtype].encode() + b"\n"
        out += _text(str(place)) + _text("cpu") + _number(fact.count) + b"tQ"
        out += _number(0) + _numbers(fact.shape) + _numbers(_strides(fact.shape))
        out += b"\x89ccollections\nOrderedDict\n)R" + b"tR"
    return bytes(out + (b"u." if bare else b"us."))


def _strides(shape: Shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _number(number: int) -> bytes:
    if number < 1 << 31:
        return b"J" + struct.pack("<i", number)
    encoded = number.to_bytes((number.bit_length() + 8) // 8, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _numbers(numbers: Shape) -> bytes:
    return b"(" + b"".join(map(_number, numbers)) + b"t"
