"""Open .ckpt, .bin and .pt files without ever running what is in them: torch's own `weights_only` reader, after a look.

Anything that is not plain tensors in plain dictionaries is refused. The look comes first because a zip file can promise
gigabytes that are not there.
"""

import warnings
from collections.abc import Iterator
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
_DEEPEST = 4  # one more than the hypernetworks of AUTOMATIC1111: a width, one network of two, and its layers


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
    if isinstance(loaded, torch.Tensor):
        raise CheckpointError(
            f"{path} holds one tensor without a name, as aesthetic gradients do, and not a model.",
            "Give a model, or use the file with the program that made it.",
        )
    loaded = _unwrapped(loaded)
    if not isinstance(loaded, (dict, list, tuple)):
        raise _refused(path)
    found: dict[str, Any] = {}
    for name, value in _named(loaded):
        if found.setdefault(name, value) is not value:
            raise CheckpointError(f"{path.name} holds two values under {name!r}.", "Save the weights once more.")
    if not found:
        raise CheckpointError(f"{path} holds no tensors.", "Download it again, or choose another file.")
    return found


def _unwrapped(loaded: Any) -> Any:
    """The tensors alone: out of what a trainer wrapped around them, and without its counters and settings."""
    import torch

    if isinstance(loaded, dict) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(name, str) for name in loaded):
        return loaded
    if isinstance(loaded.get("string_to_param"), dict):  # a textual inversion embedding
        return {f"string_to_param.{name}": value for name, value in loaded["string_to_param"].items()}
    if not any(isinstance(value, torch.Tensor) for value in loaded.values()):
        inside = next((loaded[name] for name in _WRAPPERS if isinstance(loaded.get(name), dict)), loaded)
        return _unwrapped(inside) if inside is not loaded else loaded
    return {name: value for name, value in loaded.items() if not isinstance(value, _COUNTERS) and name not in _STATE}


def _named(loaded: Any) -> Iterator[tuple[str, Any]]:
    """Every value by its name; inside dictionaries and lists, by the names on the way, with dots between them.

    Counters are left out. What is nested deeper than programs do it, or stands in two places, stays as it is.
    """
    seen: set[int] = set()

    def look(start: str, holder: Any, depth: int) -> Iterator[tuple[str, Any]]:
        seen.add(id(holder))
        for key, value in holder.items() if isinstance(holder, dict) else enumerate(holder):
            if isinstance(value, (dict, list, tuple)) and depth < _DEEPEST and id(value) not in seen:
                yield from look(f"{start}{key}.", value, depth + 1)
            elif not isinstance(value, _COUNTERS):
                yield f"{start}{key}", value

    return look("", loaded, 1)


def _refused(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is not opened: it cannot be read as plain tensors, and anything else in it could run code.",
        "Use the model's .safetensors files, or download the file again.",
    )
