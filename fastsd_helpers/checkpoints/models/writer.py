"""Write one model's parts to one checkpoint file that every web UI loads."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fastsd_helpers.checkpoints.formats.ckpt_writer import write_ckpt
from fastsd_helpers.checkpoints.formats.dtypes import cast_dtype
from fastsd_helpers.checkpoints.formats.prediction import Prediction, marks, unsaid_prediction
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource, PartGiven
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, copied
from fastsd_helpers.checkpoints.models.parts import open_parts
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.runtime import logger

__all__ = [
    "CheckpointFile",
    "check_destination",
    "describe",
    "marked",
    "refuse_existing",
    "refuse_sources",
    "write_checkpoint",
    "write_recipes",
]


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint as it was written: one file, or a Diffusers folder.

    sha256: of the whole file, hex; empty for a folder, and where none was asked for.
    bytes, tensors: of everything that was written.
    notes: what a reader should know, one sentence each: what was left out, what lies beside the file.
    beside: files that belong to it: a .yaml with the prediction type, the VAE of Flux.
    """

    path: Path
    sha256: str
    bytes: int
    tensors: int
    family: str = "sd15"
    dtype: str = "keep"
    notes: tuple[str, ...] = ()
    beside: tuple[Path, ...] = ()


def write_checkpoint(
    parts: Mapping[str, PartGiven],
    dst: Path | str,
    *,
    family: str = "sd15",
    dtype: str = "keep",
    metadata: Mapping[str, str] | None = None,
    prediction: Prediction | None = None,
    overwrite: bool = False,
) -> CheckpointFile:
    """Write a model's parts to one .safetensors or .ckpt file in the original layout, streamed.

    The file appears under its name when it is whole and was read back. Schedule buffers and position_ids are left
    out: readers compute them, and a rounded copy would override theirs.

    Args:
        parts: such as `unet`, `vae` and `text_encoder`, each a Diffusers component folder (safetensors or .bin, with
            a variant, in shards), a weights file, or a dict of tensors such as `model.state_dict()`.
        dst: the file to write; its folder is made when it is absent.
        family: whose names to write.
        dtype: `keep`, `fp32`, `fp16` or `bf16`, for every tensor of fractions; whole numbers are never cast.
        metadata: strings for the header beside (or instead of) ours, such as `modelspec.title`.
        prediction: what the model predicts, where the family's files say it in small tensors (SDXL).
        overwrite: replace `dst` if it exists.

    Returns:
        What was written: `path`, `sha256`, `bytes` and `tensors`.

    Raises:
        CheckpointError: `dst` exists or has another ending; a part is incomplete or of another family; a weight is not
            a finite number, or becomes infinite in fp16.
        DiskFull: the file cannot be written; nothing half-written is left.
        DriveReadOnly: the file cannot be written; nothing half-written is left.
        DriveError: the file cannot be written; nothing half-written is left.
    """
    dst = Path(dst)
    layout = find_family(family)
    cast_dtype("F32", dtype)
    check_destination(dst, overwrite=overwrite)
    with open_parts(layout, parts) as opened:
        for source in opened.sources.values():
            refuse_sources(dst, source.files)
        recipes = {**opened.recipes(dtype), **marked(layout, prediction)}
        sha256, size = write_recipes(dst, recipes, metadata=describe(layout, dst, metadata), finite=True)
    return CheckpointFile(dst, sha256, size, len(recipes), family, dtype)


def marked(family: Family, prediction: Prediction | None) -> dict[str, Recipe]:
    """Plan the small tensors that tell web UIs what a model predicts."""
    tensors = marks(family, prediction) if prediction is not None else {}
    source = BytesSource(tensors)
    return {name: copied(source, name) for name in tensors}


def write_recipes(
    dst: Path,
    recipes: Mapping[str, Recipe],
    *,
    metadata: Mapping[str, str],
    read_back: bool = True,
    finite: bool = False,
    hashes: bool = True,
) -> tuple[str, int]:
    """Write tensors in the format that the name asks for; arguments and result as those of `write_safetensors`.

    Raises as `write_checkpoint`.
    """
    logger.info("Writing %d tensors to %s ...", len(recipes), dst)
    if dst.suffix.lower() == ".ckpt":
        return write_ckpt(dst, recipes, finite=finite, hashes=hashes or read_back)
    return write_safetensors(dst, recipes, metadata=metadata, read_back=read_back, finite=finite, hashes=hashes)


def check_destination(dst: Path, *, overwrite: bool) -> None:
    """Refuse a destination file before any work is done.

    Raises:
        CheckpointError: neither a .safetensors nor a .ckpt name, a folder, or an existing file without `overwrite`.
    """
    if dst.suffix.lower() not in (".safetensors", ".ckpt"):
        raise CheckpointError(
            f"{dst.name!r} cannot be written: the format is not known.",
            "Give a name that ends in .safetensors (or .ckpt).",
        )
    if dst.is_dir():
        raise CheckpointError(f"{dst} is a folder.", "Give the name of a file.")
    refuse_existing(dst, overwrite=overwrite)


def refuse_existing(dst: Path, *, overwrite: bool) -> None:
    """Refuse a destination that is there, unless it may be replaced.

    Raises:
        CheckpointError: it exists; or it is a folder that holds something else than a model.
    """
    if dst.is_dir() and overwrite and any(dst.iterdir()) and not _is_model(dst):
        raise CheckpointError(
            f"{dst} contains something other than a model, and is not replaced.",
            "Choose another name for the new folder.",
        )
    if (dst.exists() or dst.is_symlink()) and not overwrite:
        raise CheckpointError(f"{dst} exists already.", "Choose another name, or replace it with --overwrite.")


def refuse_sources(dst: Path, files: tuple[Path, ...]) -> None:
    """Refuse a destination that is one of the files a model is read from, or a folder that holds one."""
    for file in files:
        if dst.exists() and dst.samefile(file):
            raise CheckpointError(f"{dst} is one of the files the model is read from.", "Choose another name.")
        if dst.resolve() in file.resolve().parents and dst.is_dir():
            raise CheckpointError(f"{dst} holds the model that is read.", "Choose another name for the new one.")


def _is_model(folder: Path) -> bool:
    alone = (folder / "config.json").is_file() or (folder / "pytorch_lora_weights.safetensors").is_file()
    return (folder / "model_index.json").is_file() or (alone and any(folder.glob("*.safetensors")))


def describe(family: Family, dst: Path, given: Mapping[str, str] | None = None) -> dict[str, str]:
    """The metadata of a single file: ModelSpec 1.0.1, what the family's table says, and what the caller gave.

    Source: the ModelSpec standard, Stability-AI/ModelSpec.

    Raises:
        CheckpointError: something given is not text.
    """
    for key, value in (given or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise CheckpointError(f"The metadata {key!r} is {value!r}.", "Metadata keys and values must be text.")
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": dst.stem,
        "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
        **family.metadata,
        **({"modelspec.prediction_type": kind} if (kind := unsaid_prediction(family.key).kind) else {}),
        **(given or {}),
    }
