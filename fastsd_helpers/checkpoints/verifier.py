"""Read a checkpoint file back from disk and compare it, tensor by tensor, with what it was made from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.layout import PART_WORDS, Row
from fastsd_helpers.checkpoints.parts import Parts, open_parts, tensor_bytes
from fastsd_helpers.checkpoints.safetensors_file import SafetensorsFile, to_torch_dtype
from fastsd_helpers.checkpoints.writer import CheckpointFile
from fastsd_helpers.errors import CheckpointError, VerificationFailed

if TYPE_CHECKING:
    import torch

__all__ = ["verify_checkpoint"]

_HINT = "Do not use this file: delete it and export again; if it happens again, check the disk."


def verify_checkpoint(
    file: CheckpointFile | Path | str,
    parts: "Mapping[str, Path | str | Mapping[str, torch.Tensor]]",
    *,
    family: str | None = None,
    dtype: str | None = None,
) -> str:
    """Compare a checkpoint file with its sources: names, shapes, number formats and every byte of every tensor.

    The file is opened anew and read from the disk; each of its names is looked up in the name table from the other
    side than the writer used.

    Args:
        file: what `write_checkpoint` returned, or a path.
        parts: the sources, as for `write_checkpoint`.
        family, dtype: as the file was written; left alone, they are those of a CheckpointFile, else sd15 and keep.

    Returns:
        SHA-256 (hex) of the file as it was read.

    Raises:
        VerificationFailed: names the first difference.
        CheckpointError: the sources cannot be read.
    """
    written = file if isinstance(file, CheckpointFile) else None
    path = written.path if written else Path(file)
    family = family or (written.family if written else "sd15")
    dtype = dtype or (written.dtype if written else "keep")
    with open_parts(find_family(family), parts) as opened:
        try:
            stored = SafetensorsFile(path)
        except CheckpointError as err:
            raise VerificationFailed(err.problem, _HINT) from err
        with stored:
            stored.forget_cached()
            sha256 = _compare(stored, opened, dtype)
    if written and sha256 != written.sha256:
        raise VerificationFailed(
            f"{path} has the SHA-256 {sha256[:12]}..., {written.sha256[:12]}... was written.", _HINT
        )
    return sha256


def _compare(stored: SafetensorsFile, parts: Parts, dtype: str) -> str:
    wanted = parts.expected(dtype)
    for name in sorted(wanted.keys() ^ stored.tensors.keys()):
        raise VerificationFailed(
            f"{stored.path} {'lacks' if name in wanted else 'has more than it should:'} the tensor {name!r}.", _HINT
        )
    sha256 = hashlib.sha256(stored.header)
    for name, fact in stored.tensors.items():
        if fact != wanted[name]:
            raise VerificationFailed(
                f"{stored.path} holds the tensor {name!r} as {fact.dtype} {list(fact.shape)}; "
                f"it should be {wanted[name].dtype} {list(wanted[name].shape)}.",
                _HINT,
            )
        values = stored.read_bytes(name)
        sha256.update(values)
        row = parts.family.to_diffusers[name]
        source = parts.read(row).to(to_torch_dtype(fact.dtype))
        if tensor_bytes(source) != values:
            raise VerificationFailed(_difference(stored, name, row, source), _HINT)
    return sha256.hexdigest()


def _difference(stored: SafetensorsFile, name: str, row: Row, source: "torch.Tensor") -> str:
    found, meant = stored.read(name).reshape(-1), source.reshape(-1)
    unequal = (found != meant).nonzero()
    place = int(unequal[0]) if len(unequal) else 0  # -0.0 and 0.0 differ in bytes only
    return (
        f"{stored.path}: the tensor {name!r} differs from the {PART_WORDS[row.part]}'s {row.diffusers!r}, "
        f"first at value {place}: {found[place].item()} instead of {meant[place].item()}."
    )
