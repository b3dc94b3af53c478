"""Write a .safetensors file front to back, one tensor in memory at a time, whole or not at all."""

import contextlib
import glob
import hashlib
import json
import logging
import os
import secrets
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.safetensors_file import DTYPE_BYTES, TensorFact, forget_cached
from fastsd_helpers.drive import drive_errors, free_bytes
from fastsd_helpers.errors import DiskFull, VerificationFailed
from fastsd_helpers.runtime import fault_point

__all__ = ["HASH_KEY", "write_safetensors"]

_log = logging.getLogger("fastsd_helpers")

HASH_KEY = "modelspec.hash_sha256"
_HASH_TO_COME = "0x" + "0" * 64
_CHUNK_BYTES = 1 << 22


def write_safetensors(
    path: Path,
    tensors: Mapping[str, TensorFact],
    *,
    values: Callable[[str], Any],
    metadata: Mapping[str, str],
) -> tuple[str, int]:
    """Write a file front to back: header first, then one tensor after the other, then read it all back.

    The file appears under its name only when it is whole: until then it is a hidden temporary file beside it. The
    metadata gains `modelspec.hash_sha256`, the SHA-256 of the data behind the header.

    Args:
        tensors: what will be written; the order on disk is by element size, then by name.
        values: gives a tensor's bytes as a contiguous buffer; called once for each, in the order on disk.

    Returns:
        SHA-256 (hex) and size of the file, of what was read back.

    Raises:
        DiskFull, DriveReadOnly, DriveError: the folder does not take the file; nothing is left behind.
    """
    names = sorted(tensors, key=lambda name: (-DTYPE_BYTES[tensors[name].dtype], name))
    header = _build_header(names, tensors, {**metadata, HASH_KEY: _HASH_TO_COME})
    with drive_errors(path.parent, "write to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
    _check_room(path.parent, len(header) + sum(fact.bytes for fact in tensors.values()))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(2)}.part")
    try:
        with drive_errors(path, "write"):
            # Opened by name, not by tempfile: the mode then follows the user's umask, so a web UI that runs as
            # another user can read the file.
            with temporary.open("xb") as file:
                data_hash = _write_all(file, header, names, tensors, values)
                header = _build_header(names, tensors, {**metadata, HASH_KEY: "0x" + data_hash})
                file.seek(0)
                file.write(header)
                file.flush()
                os.fsync(file.fileno())
            sha256, size = _read_back(temporary, len(header), data_hash)
            fault_point("export.rename")
            temporary.replace(path)
            _sync_folder(path.parent)
    except BaseException:
        try:
            temporary.unlink(missing_ok=True)
        except OSError as err:
            _log.debug("The unfinished file %s could not be removed: %s.", temporary, err)
        raise
    return sha256, size


def _build_header(names: Sequence[str], tensors: Mapping[str, TensorFact], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name in names:
        fact = tensors[name]
        entries[name] = {
            "dtype": fact.dtype,
            "shape": list(fact.shape),
            "data_offsets": [offset, offset + fact.bytes],
        }
        offset += fact.bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which therefore starts at a multiple of 8
    return struct.pack("<Q", len(text)) + text


def _write_all(
    file: Any,
    header: bytes,
    names: Sequence[str],
    tensors: Mapping[str, TensorFact],
    values: Callable[[str], Any],
) -> str:
    file.write(header)
    data_hash = hashlib.sha256()
    for name in names:
        buffer = memoryview(values(name))
        if buffer.nbytes != tensors[name].bytes:
            raise ValueError(f"{name}: {buffer.nbytes} bytes where {tensors[name].bytes} were announced")
        file.write(buffer)
        data_hash.update(buffer)
        del buffer
        fault_point("export.tensor")
    return data_hash.hexdigest()


def _read_back(path: Path, header_bytes: int, data_hash: str) -> tuple[str, int]:
    whole, data, size = hashlib.sha256(), hashlib.sha256(), 0
    with path.open("rb") as file:
        forget_cached(file.fileno())
        head = file.read(header_bytes)
        whole.update(head)
        size += len(head)
        while chunk := file.read(_CHUNK_BYTES):
            whole.update(chunk)
            data.update(chunk)
            size += len(chunk)
    if data.hexdigest() != data_hash:
        raise VerificationFailed(
            f"{path.parent} gave back other bytes than were written.", "Check the disk, or choose another folder."
        )
    return whole.hexdigest(), size


def _check_room(folder: Path, needed: int) -> None:
    free = free_bytes(folder)
    if free < needed:
        raise DiskFull(
            f"The file needs {needed / 1e6:,.1f} MB; {folder} has {free / 1e6:,.1f} MB free.",
            "Free some space (on Google Drive, empty the trash too), or choose fp16, which is half as large as fp32.",
        )


def _remove_leftovers(path: Path) -> None:
    # A run that was killed leaves its temporary file, gigabytes of it; a living one's is kept.
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        owner = leftover.name.removeprefix(f".{path.name}.").split(".")[0]
        if owner.isdigit() and not _is_running(int(owner)):
            leftover.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if os.name != "posix":  # there, os.kill would end it
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _sync_folder(folder: Path) -> None:
    # Without it a power cut may undo the rename; some mounts do not offer it.
    if os.name == "posix":
        with contextlib.suppress(OSError):
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
