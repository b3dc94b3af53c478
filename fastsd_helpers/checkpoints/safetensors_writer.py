"""Write a .safetensors file front to back, a few pieces of a tensor in memory at a time, whole or not at all."""

import hashlib
import json
import os
import queue
import struct
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastsd_helpers.checkpoints.number_formats import DTYPE_BYTES
from fastsd_helpers.checkpoints.placing import check_room, new_file
from fastsd_helpers.checkpoints.pump import pump
from fastsd_helpers.checkpoints.recipes import Recipe
from fastsd_helpers.checkpoints.safetensors_file import forget_cached
from fastsd_helpers.errors import VerificationFailed
from fastsd_helpers.runtime import fault_point

__all__ = ["HASH_KEY", "Hasher", "write_all", "write_safetensors"]

HASH_KEY = "modelspec.hash_sha256"
_HASH_TO_COME = "0x" + "0" * 64
_CHUNK_BYTES = 1 << 22


def write_safetensors(
    path: Path,
    recipes: Mapping[str, Recipe],
    *,
    metadata: Mapping[str, str],
    read_back: bool = True,
    finite: bool = False,
) -> tuple[str, int]:
    """Write a file front to back: the whole header first, then one tensor after the other.

    The file appears under its name only when it is whole and on the disk: until then it is a hidden temporary file
    beside it.

    Args:
        recipes: what will be written; the order on disk is by element size, then by name.
        read_back: read the file from the disk before it gets its name, and note the SHA-256 of the data in the
            metadata (`modelspec.hash_sha256`), which is known only when all of it was written.
        finite: refuse weights that are infinite or not a number.

    Returns:
        SHA-256 (hex) and size of the file.

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
        write_all(file, header)
        with Hasher(b"" if read_back else header) as hasher:
            for _name, buffer, last in pump(((name, recipes[name]) for name in names), finite=finite):
                write_all(file, buffer)
                hasher.update(buffer)
                if last:
                    fault_point("export.tensor")
        sha256 = hasher.hexdigest()
        if read_back:
            header = _build_header(names, recipes, {**metadata, HASH_KEY: "0x" + sha256})
            file.seek(0)
            write_all(file, header)
            os.fsync(file.fileno())
            sha256 = _read_back(temporary, len(header), sha256)
    return sha256, size


class Hasher:
    """SHA-256 in a thread of its own, so that it costs no time where a processor is free."""

    def __init__(self, first: bytes = b"") -> None:
        self._hash = hashlib.sha256(first)
        self._waiting: queue.Queue[list[Any] | None] = queue.Queue(maxsize=8)
        self._small: list[Any] = []  # what is not worth waking the thread for yet
        self._small_bytes = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Hasher":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
        for buffer in self._small:
            self._hash.update(buffer)

    def update(self, buffer: Any) -> None:
        """Take the next bytes; the buffer must not change any more."""
        self._small.append(buffer)
        self._small_bytes += len(memoryview(buffer).cast("B"))
        if self._small_bytes < 1 << 20:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="sha256", daemon=True)
            self._thread.start()
        self._waiting.put(self._small)
        self._small, self._small_bytes = [], 0

    def hexdigest(self) -> str:
        """The hash of everything, once the `with` block has ended."""
        return self._hash.hexdigest()

    def _work(self) -> None:
        while (buffers := self._waiting.get()) is not None:
            for buffer in buffers:
                self._hash.update(buffer)


def write_all(file: BinaryIO, buffer: Any) -> None:
    """Write every byte of a buffer to an unbuffered file, which may take fewer at a time."""
    view = memoryview(buffer).cast("B")
    while view:
        view = view[file.write(view) :]


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
