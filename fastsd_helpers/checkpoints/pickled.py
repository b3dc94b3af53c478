"""Open .ckpt, .bin and .pt files without ever running what is in them: torch's own `weights_only` reader, after a look.

Anything that is not plain tensors in plain dictionaries is refused. The look comes first because a zip file can promise
gigabytes that are not there.
"""

import contextlib
import pickletools
import warnings
import zipfile
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import CheckpointError

__all__ = ["PICKLE_ENDINGS", "load_pickled"]

PICKLE_ENDINGS = (".bin", ".pt", ".pth", ".ckpt")
_PROGRAM_LIMIT = 20_000_000  # the largest list of tensors of a real model has 1 MB
_MEMBER_LIMIT = 50_000


def load_pickled(path: Path) -> dict[str, Any]:
    """Read a pickle of tensors: name -> tensor, mapped from the file where its format allows it.

    A `state_dict` around them is taken off.

    Raises:
        CheckpointError: it is no such file, holds anything but plain tensors, or is damaged.
    """
    _look_at(path)
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


def _look_at(path: Path) -> None:
    """Refuse a file whose list of contents is not that of torch's own files."""
    try:
        with path.open("rb") as file:
            if not file.read(4) or not zipfile.is_zipfile(file):
                return  # torch before 1.6: one pickle after the other, read from the front
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if len(members) > _MEMBER_LIMIT:
                    raise _refused(path, f"it has {len(members):,} members")
                for member in members:
                    # torch never compresses; one small member could otherwise unfold to fill the memory.
                    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
                        raise _refused(path, f"its member {member.filename[:80]!r} is compressed")
                for member in members:
                    if member.filename.endswith("data.pkl"):
                        _look_at_program(path, archive, member)
    except CheckpointError:
        raise
    except OSError as err:
        raise CheckpointError(
            f"{path} cannot be opened: {err.strerror or err}.", "Check the path and that the file may be read."
        ) from err
    except Exception as err:  # zipfile raises many things for a damaged archive
        raise _refused(path) from err


def _look_at_program(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    if member.file_size > _PROGRAM_LIMIT:
        raise _refused(path, f"its list of tensors has {member.file_size:,} bytes")
    text: list[str] = []
    # Reads the program's steps without doing them.
    for step, argument, _place in pickletools.genops(archive.read(member)):
        if isinstance(argument, str):
            text = [*text[-1:], argument]
        name = argument if step.name == "GLOBAL" else " ".join(text) if step.name == "STACK_GLOBAL" else None
        module = str(name).split(" ")[0].split(".")[0] if name else ""
        if module and module not in ("torch", "collections", "_codecs", "numpy", "__builtin__", "builtins"):
            raise _refused(path, f"it names {str(name).replace(' ', '.')[:100]!r}, which is code and no tensor")


def _refused(path: Path, reason: str = "") -> CheckpointError:
    why = f"{reason}, and" if reason else "it cannot be read as plain tensors, and anything else in it"
    tail = "such a file could run code or fill the memory." if reason else "could run code."
    return CheckpointError(
        f"{path} is not opened: {why} {tail}",
        "Use the model's .safetensors files, or download the file again.",
    )
