"""Open .ckpt, .bin and .pt files without ever running what is in them: torch's own `weights_only` reader, after a look.

Anything that is not plain tensors in plain dictionaries is refused. The look comes first because a zip file can promise
gigabytes that are not there.
"""

import contextlib
import warnings
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import CheckpointError, FastSDError
from fastsd_helpers.inert import require_inert

__all__ = ["PICKLE_ENDINGS", "load_pickled"]

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")


def load_pickled(path: Path) -> dict[str, Any]:
    """Read a pickle of tensors: name -> tensor, mapped from the file where its format allows it.

    A `state_dict` around them is taken off.

    Raises:
        CheckpointError: it is no such file, holds anything but plain tensors, or is damaged.
    """
    try:
        require_inert(path)
    except CheckpointError:  # what was found, and where
        raise
    except FastSDError as err:
        raise CheckpointError(err.problem, err.hint) from err
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # Mapped, so that a tensor comes into memory when it is read; files of torch before 1.6 cannot be.
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # a damaged pickle raises whatever its broken program runs into
        raise _refused(path) from err
    with contextlib.suppress(KeyError, TypeError):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise _refused(path)
    return loaded


def _refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not opened: it cannot be read as plain tensors, and anything else in it could run code.",
        "Use the model's .safetensors files, or download the file again.",
    )
