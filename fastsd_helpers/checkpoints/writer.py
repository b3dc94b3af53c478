"""Write one model's parts to one checkpoint file that every web UI loads."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.layout import PART_WORDS, Family
from fastsd_helpers.checkpoints.parts import Parts, cast_dtype, open_parts, tensor_bytes
from fastsd_helpers.checkpoints.safetensors_file import to_torch_dtype
from fastsd_helpers.checkpoints.safetensors_writer import write_safetensors
from fastsd_helpers.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["CheckpointFile", "check_destination", "write_checkpoint"]

_log = logging.getLogger("fastsd_helpers")


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint file as it was written and read back."""

    path: Path
    sha256: str  # of the whole file, hex
    bytes: int
    tensors: int
    family: str = "sd15"
    dtype: str = "keep"


def write_checkpoint(
    parts: "Mapping[str, Path | str | Mapping[str, torch.Tensor]]",
    dst: Path | str,
    *,
    family: str = "sd15",
    dtype: str = "keep",
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> CheckpointFile:
    """Write a model's parts to one .safetensors file in the original layout, one tensor in memory at a time.

    The file appears under its name when it is whole and was read back. Schedule buffers and position_ids are left
    out: readers compute them, and a rounded copy would override theirs.

    Args:
        parts: `unet`, `vae` and `text_encoder`, each a Diffusers component folder (safetensors or .bin, with a
            variant, in shards), a weights file, or a dict of tensors such as `model.state_dict()`.
        dst: the file to write; its folder is made when it is absent.
        family: whose names to write.
        dtype: `keep`, `fp32`, `fp16` or `bf16`, for every tensor of fractions; whole numbers are never cast.
        metadata: strings for the header beside (or instead of) ours, such as `modelspec.title`.
        overwrite: replace `dst` if it exists.

    Raises:
        CheckpointError: `dst` exists or is no .safetensors name; a part is incomplete or of another family; a weight
            is not a finite number, or becomes infinite in fp16.
        DiskFull, DriveReadOnly, DriveError: the file cannot be written; nothing half-written is left.
    """
    dst = Path(dst)
    layout = find_family(family)
    cast_dtype("F32", dtype)
    check_destination(dst, overwrite=overwrite)
    with open_parts(layout, parts) as opened:
        for source in opened.sources.values():
            _refuse_source(dst, source.files)
        tensors = opened.expected(dtype)
        _log.info("Writing %d tensors to %s ...", len(tensors), dst)
        sha256, size = write_safetensors(
            dst,
            tensors,
            values=lambda name: _converted(opened, name, tensors[name].dtype),
            metadata=_metadata(layout, dst, metadata or {}),
        )
    return CheckpointFile(dst, sha256, size, len(tensors), family, dtype)


def check_destination(dst: Path, *, overwrite: bool) -> None:
    """Refuse a destination before any work is done.

    Raises:
        CheckpointError: not a .safetensors name, a folder, or an existing file without `overwrite`.
    """
    if dst.suffix.lower() != ".safetensors":
        raise CheckpointError(
            f"{dst.name!r} cannot be written: the format is not known.", "Give a name that ends in .safetensors."
        )
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder.", "Give the name of a file.")
    if dst.exists() and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Choose another name, or replace it with --overwrite.")


def _refuse_source(dst: Path, files: tuple[Path, ...]) -> None:
    for file in files:
        if dst.exists() and dst.samefile(file):
            raise CheckpointError(f"{dst} is one of the files the model is read from.", "Choose another name.")


def _metadata(family: Family, dst: Path, given: Mapping[str, str]) -> dict[str, str]:
    for key, value in given.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"The metadata {key!r} is {value!r}.", "Metadata keys and values must be text.")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": dst.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        **family.metadata,
        **given,
    }


def _converted(parts: Parts, name: str, dtype: str) -> memoryview:
    import torch

    row = parts.family.to_diffusers[name]
    tensor = parts.read(row)
    theirs = parts.names[row.part][row.diffusers]
    largest = _largest(tensor)
    if not math.isfinite(largest):
        raise CheckpointError(
            f"The {PART_WORDS[row.part]}'s tensor {theirs!r} holds values that are not finite numbers.",
            "Export an earlier checkpoint, and train on from it with a lower learning rate.",
        )
    wanted = to_torch_dtype(dtype)
    if tensor.dtype != wanted:
        tensor = tensor.to(wanted)
        if not math.isfinite(_largest(tensor)):
            raise CheckpointError(
                f"The {PART_WORDS[row.part]}'s tensor {theirs!r} reaches {largest:.3g}; "
                f"{str(wanted).removeprefix('torch.')} ends at {torch.finfo(wanted).max:.3g}.",
                "Choose fp32.",
            )
    return tensor_bytes(tensor)


def _largest(tensor: "torch.Tensor") -> float:
    """The largest absolute value; not a number if one of them is not. Needs no second tensor, as isfinite() does."""
    import torch

    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    if tensor.element_size() == 1:  # torch cannot compare 8-bit floats
        tensor = tensor.to(torch.float32)
    low, high = torch.aminmax(tensor)
    return max(-low.item(), high.item())
