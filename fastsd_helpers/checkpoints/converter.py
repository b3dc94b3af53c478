"""Turn a Diffusers pipeline folder into one checkpoint file."""

import json
import logging
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.verifier import verify_checkpoint
from fastsd_helpers.checkpoints.writer import CheckpointFile, check_destination, write_checkpoint
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.registry import detect_family

__all__ = ["convert"]

_log = logging.getLogger("fastsd_helpers")


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    dtype: str = "keep",
    overwrite: bool = False,
    verify: bool = False,
) -> CheckpointFile:
    """Write a Diffusers pipeline folder as one .safetensors file in the original layout.

    Args:
        src: the folder that holds model_index.json.
        dst: the file to write.
        dtype: `keep`, `fp32`, `fp16` or `bf16`.
        overwrite: replace `dst` if it exists.
        verify: read the file back from disk and compare every tensor with the folder's.

    Raises:
        CheckpointError, DiskFull, DriveReadOnly, DriveError: as `write_checkpoint`.
        WrongFamily, ModelNotFound: `src` is not a model folder that can be converted.
        VerificationFailed: with `verify`, the file is not what it should be.
    """
    src, dst = Path(src), Path(dst)
    if src.exists() and dst.exists() and src.samefile(dst):
        raise CheckpointError(f"{dst} is both source and destination.", "Choose another name for the new file.")
    if src.is_file():
        raise CheckpointError(
            f"{src} is a file; a Diffusers folder is needed.", "Give the folder that holds model_index.json."
        )
    check_destination(dst, overwrite=overwrite)
    family = detect_family(src)
    parts = {part: src / part for part in find_family(family).parts}
    written = write_checkpoint(parts, dst, family=family, dtype=dtype, metadata=_describe(src), overwrite=overwrite)
    if verify:
        verify_checkpoint(written, parts)
        _log.info("Read %s back and found every tensor right.", written.path)
    return written


def _describe(folder: Path) -> dict[str, str]:
    """What the folder's configs say that the weights do not: resolution and prediction type."""
    described = {}
    unet, vae = _read_config(folder / "unet" / "config.json"), _read_config(folder / "vae" / "config.json")
    sample_size, levels = unet.get("sample_size"), len(vae.get("block_out_channels", ()))
    if isinstance(sample_size, int) and levels:
        side = sample_size * 2 ** (levels - 1)
        described["modelspec.resolution"] = f"{side}x{side}"
    prediction = _read_config(folder / "scheduler" / "scheduler_config.json").get("prediction_type")
    if prediction:
        described["modelspec.prediction_type"] = {"v_prediction": "v"}.get(prediction, prediction)
    return described


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as err:
        raise CheckpointError(f"{path} cannot be read.", "Download the model again.") from err
    return config if isinstance(config, dict) else {}
