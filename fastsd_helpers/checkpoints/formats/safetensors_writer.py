"""Write a .safetensors file front to back, a few pieces of a tensor in memory at a time, whole or not at all."""

import hashlib
import json
import os
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.dtypes import DTYPE_BYTES
from fastsd_helpers.checkpoints.formats.safetensors_file import fill
from fastsd_helpers.checkpoints.formats.tensor_plan import Piece, Recipe
from fastsd_helpers.checkpoints.formats.tensor_stream import stream
from fastsd_helpers.checkpoints.formats.writeback import allocate, start_writeback
from fastsd_helpers.errors import VerificationFailed
from fastsd_helpers.files import check_room, file_errors, forget_cached, new_file
from fastsd_helpers.runtime import fault_point

__all__ = ["HASH_KEY", "write_safetensors"]

HASH_KEY = "modelspec.hash_sha256"
_HASH_TO_COME = "0x" + "0" * 64
_WINDOW_BYTES = 32 << 20
_READ_BYTES = 8 << 20


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
        read_back: read the file from the disk before it gets its name, and note the SHA-256 of the data in the metadata
            (`modelspec.hash_sha256`), which is known only when all of it was written.
        finite: refuse weights that are infinite or not a number.
        hashes: compute the SHA-256, as reading back always does.

    Returns:
        SHA-256 (hex; empty without `hashes`) and size of the file.

    Raises:
        CheckpointError: a source cannot be read, or a value does not fit its new format.
        DiskFull: the folder does not take the file; nothing is left behind.
        DriveReadOnly: the folder does not take the file; nothing is left behind.
        DriveError: the folder does not take the file; nothing is left behind.
        VerificationFailed: the disk returned different bytes than were written.
    """
    names = sorted(recipes, key=lambda name: (-DTYPE_BYTES[recipes[name].fact.dtype], name))
    described = {**metadata, HASH_KEY: _HASH_TO_COME} if read_back else metadata
    header = _build_header(names, recipes, described)
    size = len(header) + sum(recipe.fact.bytes for recipe in recipes.values())
    with new_file(path) as (file, temporary):
        check_room(path.parent, size)
        allocate(file.fileno(), size)
        # What is read back is compared with what this process had in its hands; else the system may copy.
        output = _Output(file.fileno(), len(header), may_move=not read_back, hashed=hashes)
        output.store(-len(header), header)
        digest: Any = hashlib.sha256(b"" if read_back else header) if hashes or read_back else None
        ordered = ((name, recipes[name]) for name in names)
        # Closed by the end of the block in any case: until then threads write to the file.
        with closing(stream(ordered, finite=finite, store=output.store, move=output.move)) as pieces:
            for _name, buffer, last in pieces:
                if digest is not None:
                    digest.update(buffer)
                if last:
                    fault_point("export.tensor")
        sha256 = digest.hexdigest() if digest is not None else ""
        if read_back:
            header = _build_header(names, recipes, {**metadata, HASH_KEY: "0x" + sha256})
            output.store(-len(header), header)
            os.fsync(file.fileno())
            sha256 = _read_back(temporary, len(header), sha256)
    return sha256, size


class _Output:
    """A file that threads write to; places count from `start`."""

    def __init__(self, descriptor: int, start: int, *, may_move: bool, hashed: bool) -> None:
        self._descriptor, self._start, self._hashed = descriptor, start, hashed
        # The system lets in one at a time, and those that wait for it there burn a processor.
        self._alone = threading.Lock()
        self._can_move = may_move and hasattr(os, "copy_file_range")

    def store(self, place: int, buffer: Any) -> None:
        """Write every byte of a buffer to its place, and set the disk to work early."""
        view, at = memoryview(buffer), self._start + place
        with self._alone:
            while view:
                written = os.pwrite(self._descriptor, view, at)
                view, at = view[written:], at + written
        self._write_back(self._start + place, at)

    def move(self, place: int, piece: Piece, buffer: memoryview) -> bool:
        """Have the system copy values from their file to this one; the buffer is filled from here where it is hashed.

        Some file systems then share the blocks instead. What cannot be copied so is left to `store`, and so is what
        went wrong: reading and writing name the file that is to blame. Source: copy_file_range(2).
        """
        if not self._can_move or (found := piece.source.locate(piece.name)) is None:
            return False
        source, first = found
        first += piece.first * DTYPE_BYTES[piece.stored]
        begun, at, end = self._start + place, self._start + place, self._start + place + len(buffer)
        try:
            with self._alone:
                while at < end and (count := os.copy_file_range(source, self._descriptor, end - at, first, at)):
                    first, at = first + count, at + count
            whole = at == end and (not self._hashed or fill(self._descriptor, buffer, begun))
        except OSError:
            self._can_move = False
            return False
        self._write_back(begun, at)
        return whole

    def _write_back(self, begun: int, ended: int) -> None:
        window = begun // _WINDOW_BYTES
        if ended // _WINDOW_BYTES > window:
            start_writeback(self._descriptor, window * _WINDOW_BYTES, _WINDOW_BYTES)


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
    with file_errors(path, "read"), path.open("rb") as file:
        forget_cached(file.fileno())  # the disk is asked, not the memory
        whole, data = hashlib.sha256(file.read(header_bytes)), hashlib.sha256()
        while chunk := file.read(_READ_BYTES):
            whole.update(chunk)
            data.update(chunk)
    if data.hexdigest() != data_hash:
        raise VerificationFailed(
            f"{path.parent} returned different bytes than were written.", "Check the disk, or choose another folder."
        )
    return whole.hexdigest()
