"""Write a .safetensors file front to back, a few pieces of a tensor in memory at a time, whole or not at all."""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.number_formats import DTYPE_BYTES
from fastsd_helpers.checkpoints.placing import check_room, new_file
from fastsd_helpers.checkpoints.pump import pump
from fastsd_helpers.checkpoints.recipes import Recipe
from fastsd_helpers.checkpoints.safetensors_file import forget_cached
from fastsd_helpers.errors import VerificationFailed
from fastsd_helpers.runtime import fault_point

__all__ = ["HASH_KEY", "write_safetensors"]

HASH_KEY = "modelspec.hash_sha256"
_HASH_TO_COME = "0x" + "0" * 64
_CHUNK_BYTES = 1 << 22
_WINDOW_BYTES = 32 << 20


def write_safetensors(
    path: Path,
    recipes: Mapping[str, Recipe],
    *,
    metadata: Mapping[str, str],
    read_back: bool = True,
    finite: bool = False,
    hashes: bool = True,
) -> tuple[str, int]:
    """Write a file front to back: the whole header first, then one tensor after the other.

    The file appears under its name only when it is whole and on the disk: until then it is a hidden temporary file
    beside it.

    Args:
        recipes: what will be written; the order on disk is by element size, then by name.
        read_back: read the file from the disk before it gets its name, and note the SHA-256 of the data in the
            metadata (`modelspec.hash_sha256`), which is known only when all of it was written.
        finite: refuse weights that are infinite or not a number.
        hashes: compute the SHA-256, as reading back always does.

    Returns:
        SHA-256 (hex; empty without `hashes`) and size of the file.

    Raises:
        CheckpointError: a source cannot be read, or a value does not fit its new format.
        DiskFull, DriveReadOnly, DriveError: the folder does not take the file; nothing is left behind.
        VerificationFailed: the disk gave back other bytes than were written.
    """
    names = sorted(recipes, key=lambda name: (-DTYPE_BYTES[recipes[name].fact.dtype], name))
    described = {**metadata, HASH_KEY: _HASH_TO_COME} if read_back else metadata
    header = _build_header(names, recipes, described)
    size = len(header) + sum(recipe.fact.bytes for recipe in recipes.values())
    with new_file(path) as (file, temporary):
        check_room(path.parent, size)
        store = partial(_store, file.fileno(), threading.Lock(), len(header))
        store(-len(header), header)
        digest: Any = hashlib.sha256(b"" if read_back else header) if hashes or read_back else None
        # Closed by the end of the block in any case: until then threads write to the file.
        with closing(pump(((name, recipes[name]) for name in names), finite=finite, store=store)) as pieces:
            for _name, buffer, last in pieces:
                if digest is not None:
                    digest.update(buffer)
                if last:
                    fault_point("export.tensor")
        sha256 = digest.hexdigest() if digest is not None else ""
        if read_back:
            header = _build_header(names, recipes, {**metadata, HASH_KEY: "0x" + sha256})
            store(-len(header), header)
            os.fsync(file.fileno())
            sha256 = _read_back(temporary, len(header), sha256)
    return sha256, size


def _store(descriptor: int, alone: threading.Lock, start: int, place: int, buffer: Any) -> None:
    """Write every byte of a buffer to its place after `start`, and set the disk to work early."""
    view, place = memoryview(buffer), start + place
    window = place // _WINDOW_BYTES
    with alone:  # the system lets in one at a time, and those that wait for it there burn a processor
        while view:
            written = os.pwrite(descriptor, view, place)
            view, place = view[written:], place + written
    if place // _WINDOW_BYTES > window and hasattr(os, "posix_fadvise"):
        # On Linux this starts writing what lies in memory, which would otherwise begin with the sync at the end.
        with suppress(OSError):
            os.posix_fadvise(descriptor, window * _WINDOW_BYTES, _WINDOW_BYTES, os.POSIX_FADV_DONTNEED)


def _build_header(names: Sequence[str], recipes: Mapping[str, Recipe], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        fact = recipes[name].fact
        entries[name] = {
            "dtype": fact.dtype,
            "shape": list(fact.shape),
            "data_offsets": [offset, offset + fact.bytes],
        }
        offset += fact.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which therefore starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _read_back(path: Path, header_bytes: int, data_hash: str) -> str:
    whole, data = hashlib.sha256(), hashlib.sha256()
    with path.open("rb") as file:
        forget_cached(file.fileno())
        whole.update(file.read(header_bytes))
        while chunk := file.read(_CHUNK_BYTES):
            whole.update(chunk)
            data.update(chunk)
    if data.hexdigest() != data_hash:
        raise VerificationFailed(
            f"{path.parent} gave back other bytes than were written.", "Check the disk, or choose another folder."
        )
    return whole.hexdigest()
