"""What a finished run made, as hashes: two runs are equal when these are."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

__all__ = ["fingerprint", "hash_file"]


def fingerprint(session_folder: Path, last_step: int, *, file_only: bool = False) -> dict[str, str]:
    """Hash what a finished run made: name, order, type, shape and bytes of every tensor.

    Returns:
        One hash for the finished file and one for each role of the last generation (weights, optimizer, history).
    """
    from fastsd_helpers.dreambooth.resume.generation import list_generations, read_generation, verify_files

    files = sorted((session_folder / "exports").glob("*.safetensors"))
    if len(files) != 1 or files[0].stem not in (session_folder.name, f"{session_folder.name}-lora"):
        raise AssertionError(f"The exports are {[file.name for file in files]}.")
    made = {"file": hash_file(files[0])}
    if file_only:  # on a Drive without room for it, the last checkpoint may not be there
        return made
    checkpoints = session_folder / "checkpoints"
    newest = read_generation(checkpoints, list_generations(checkpoints)[0])
    verify_files(newest)
    if (newest.stage, newest.step) != ("unet", last_step):
        raise AssertionError(f"The last generation is {newest.name}.")
    for role in sorted(newest.roles):
        made[role] = _hash_tensors(newest.load(role))
    return made


def hash_file(path: Path) -> str:
    """Read with nothing but the format's own description: 8 bytes of length, a JSON header, the bytes."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    digest = hashlib.sha256()
    for name, fact in header.items():
        if name != "__metadata__":
            start, end = (8 + size + offset for offset in fact["data_offsets"])
            digest.update(json.dumps([name, fact["dtype"], fact["shape"]]).encode() + data[start:end])
    return digest.hexdigest()


def _hash_tensors(tensors: dict[str, Any]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
