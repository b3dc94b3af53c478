"""Read a checkpoint back from disk and compare it, tensor by tensor, with what it was made from."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.pickled import PICKLE_ENDINGS
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.sources import PartGiven, Source, open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe
from fastsd_helpers.checkpoints.formats.tensor_stream import stream
from fastsd_helpers.checkpoints.models.parts import open_parts
from fastsd_helpers.checkpoints.models.writer import CheckpointFile
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import PART_WORDS
from fastsd_helpers.errors import CheckpointError, VerificationFailed
from fastsd_helpers.files import sha256_of

__all__ = ["compare", "verify_checkpoint"]

_HINT = "Do not use this file: delete it and export again; if the problem persists, check the disk."


def verify_checkpoint(
    file: CheckpointFile | Path | str,
    parts: Mapping[str, PartGiven],
    *,
    family: str | None = None,
    dtype: str | None = None,
) -> str:
    """Compare a checkpoint file with its sources: names, shapes, dtypes and every byte of every tensor.

    Args:
        file: what `write_checkpoint` returned, or a path.
        parts: the sources, as for `write_checkpoint`.
        family: as the file was written; default: that of a CheckpointFile, else sd15.
        dtype: as the file was written; default: that of a CheckpointFile, else keep.

    Returns:
        SHA-256 (hex) of the file as it was read.

    Raises:
        VerificationFailed: names the first difference.
        CheckpointError: the sources cannot be read.
    """
    written = file if isinstance(file, CheckpointFile) else None
    path = file.path if isinstance(file, CheckpointFile) else Path(file)
    family = family or (written.family if written else "sd15")
    dtype = dtype or (written.dtype if written else "keep")
    with open_parts(find_family(family), parts) as opened:
        sha256 = compare(path, opened.recipes(dtype))
    if written and sha256 != written.sha256:
        raise VerificationFailed(
            f"{path} has the SHA-256 {sha256[:12]}... instead of {written.sha256[:12]}..., which was written.", _HINT
        )
    return sha256


def compare(path: Path, wanted: Mapping[str, Recipe]) -> str:
    """Open a file anew, read it from the disk, and compare it with the recipes it should have been made by.

    Returns:
        SHA-256 (hex) of the file as it was read.

    Raises:
        VerificationFailed: names the first difference.
        CheckpointError: a source cannot be read any more.
    """
    try:
        stored: Source = SafetensorsFile(path) if path.suffix.lower() not in PICKLE_ENDINGS else open_file(path)
    except CheckpointError as err:
        raise VerificationFailed(err.problem, _HINT) from err
    try:
        if isinstance(stored, SafetensorsFile):
            stored.forget_cached()
        _compare_lists(path, stored.tensors, wanted)
        sha256 = hashlib.sha256()
        for piece in stored.head() if isinstance(stored, SafetensorsFile) else ():
            sha256.update(piece)
        _compare_values(path, stored, wanted, sha256)
    finally:
        stored.close()
    return sha256.hexdigest() if isinstance(stored, SafetensorsFile) else sha256_of(path)


def _compare_lists(path: Path, stored: Mapping[str, TensorFact], wanted: Mapping[str, Recipe]) -> None:
    for name in sorted(wanted.keys() ^ stored.keys()):
        raise VerificationFailed(
            f"{path} {'lacks the' if name in wanted else 'contains an unexpected'} tensor {name!r}.", _HINT
        )
    for name, fact in stored.items():
        meant = wanted[name].fact
        if fact != meant:
            raise VerificationFailed(
                f"{path} holds the tensor {name!r} as {fact.dtype} {list(fact.shape)}; "
                f"it should be {meant.dtype} {list(meant.shape)}.",
                _HINT,
            )


def _compare_values(path: Path, stored: Source, wanted: Mapping[str, Recipe], sha256: Any) -> None:
    place = 0
    for name, values, last in stream((name, wanted[name]) for name in stored.tensors):
        meant = memoryview(values).cast("B")
        found = bytearray(len(meant))
        try:
            stored.read_into(name, place, found)
        except CheckpointError as err:
            raise VerificationFailed(err.problem, _HINT) from err
        sha256.update(found)
        if found != meant:
            raise VerificationFailed(_difference(path, name, wanted[name], found, meant, place), _HINT)
        place = 0 if last else place + len(meant)


def _difference(path: Path, name: str, recipe: Recipe, found: bytearray, meant: memoryview, start: int) -> str:
    byte = next(place for place in range(len(found)) if found[place] != meant[place])
    size = recipe.fact.bytes // recipe.fact.count
    first = byte // size * size
    whose = f"the {PART_WORDS[recipe.part]}'s " if recipe.part else "the source's "
    sources = whose + " and ".join(repr(piece.name) for piece in recipe.pieces)
    return (
        f"{path}: the tensor {name!r} differs from {sources}, first at value {(start + first) // size}: "
        f"bytes {found[first : first + size].hex()} instead of {bytes(meant[first : first + size]).hex()}."
    )
