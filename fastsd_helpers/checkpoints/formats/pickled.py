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
# What trainers call the weights in their own files, the averaged ones of upscalers first.
_WRAPPERS = ("params_ema", "g_ema", "params", "model_state_dict", "model", "module", "generator", "net", "ema")
_STATE = ("optimizer", "optimizer_states", "lr_schedulers", "scheduler", "callbacks", "loops", "hyper_parameters")
_COUNTERS = (int, float, str, bool, type(None))


def load_pickled(path: Path) -> dict[str, Any]:
    """Read a pickle of tensors: name -> tensor, mapped from the file where its format allows it.

    A `state_dict` around them is taken off.

    Raises:
        CheckpointError: it is not such a file, holds anything but plain tensors, or is damaged.
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
    loaded = _unwrapped(loaded)
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        raise _refused(path)
    return loaded


def _unwrapped(loaded: Any) -> Any:
    """The tensors alone: out of what a trainer wrapped around them, and without its counters and settings."""
    import torch

    with contextlib.suppress(KeyError, TypeError):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        return loaded
    if isinstance(loaded.get("string_to_param"), dict):  # a textual inversion embedding
        return {f"string_to_param.{name}": value for name, value in loaded["string_to_param"].items()}
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inside = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
        return _unwrapped(inside) if inside is not loaded else loaded
    return {name: value for name, value in loaded.items() if not isinstance(value, _COUNTERS) and name not in _STATE}


def _refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not opened: it cannot be read as plain tensors, and anything else in it could run code.",
        "Use the model's .safetensors files, or download the file again.",
    )
