"""The safetensors format, read and written tensor by tensor, so that memory never holds more than one of them.

Source: the format description in the README of huggingface/safetensors (8 bytes of length, a JSON header, the data).
"""

import contextlib
import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints.layout import Shape
from fastsd_helpers.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = [
    "DTYPE_BYTES",
    "SafetensorsFile",
    "TensorFact",
    "dtype_name",
    "forget_cached",
    "to_torch_dtype",
]


_HEADER_LIMIT = 100_000_000  # the reference implementation's own limit

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True)
class TensorFact:
    """What a header says about one tensor, without its values."""

    dtype: str  # safetensors' name, such as "F16"
    shape: Shape

    @property
    def bytes(self) -> int:
        """The size of the values."""
        count = DTYPE_BYTES[self.dtype]
        for size in self.shape:
            count *= size
        return count


def to_torch_dtype(name: str) -> "torch.dtype":
    """torch's dtype for a safetensors dtype name."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def dtype_name(dtype: "torch.dtype") -> str | None:
    """The safetensors name of a torch dtype; None where the format has none."""
    words = {theirs: ours for ours, theirs in _TORCH_NAMES.items()}
    return words.get(str(dtype).removeprefix("torch."))


class SafetensorsFile:
    """One .safetensors file, open for reading; the header is checked before any tensor is read.

    Attributes:
        tensors: name -> TensorFact, in the order of the data.
        metadata: the header's strings.

    Raises:
        CheckpointError: the file cannot be opened, is cut short, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self.bytes = os.fstat(self._file.fileno()).st_size
        except OSError as err:
            raise CheckpointError(
                f"{path} cannot be opened: {err.strerror}.", "Check the path and that the file may be read."
            ) from err
        try:
            self.header = self._read_header()
            self.metadata, self.tensors, self._starts = self._check_header(json.loads(self.header[8:]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
            self._file.close()
            raise self._damaged("its header is not that of a safetensors file") from err
        except CheckpointError:
            self._file.close()
            raise

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice is fine."""
        self._file.close()

    def forget_cached(self) -> None:
        """Let the next reads come from the disk itself; for verifying what was just written."""
        forget_cached(self._file.fileno())

    def read_bytes(self, name: str) -> bytearray:
        """Read one tensor's values as they lie in the file (little endian)."""
        values = bytearray(self.tensors[name].bytes)
        try:
            self._file.seek(self._starts[name])
            got = self._file.readinto(values)
        except OSError as err:
            raise CheckpointError(
                f"{self.path.name} cannot be read at the tensor {name!r}: {err.strerror}.",
                "Copy the file to a local disk and try again.",
            ) from err
        if got != len(values):
            raise self._damaged(f"it ends inside the tensor {name!r}")
        return values

    def read(self, name: str) -> "torch.Tensor":
        """Read one tensor onto the CPU."""
        import torch

        fact = self.tensors[name]
        dtype = to_torch_dtype(fact.dtype)
        values = self.read_bytes(name)
        if not values:
            return torch.empty(fact.shape, dtype=dtype)
        return torch.frombuffer(values, dtype=dtype).reshape(fact.shape)

    def _read_header(self) -> bytes:
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise self._damaged(f"it is only {self.bytes} bytes long")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(_HEADER_LIMIT, self.bytes - 8):
            raise self._damaged("its header is not that of a safetensors file, or the file is cut short")
        return prefix + self._file.read(length)

    def _check_header(self, header: Any) -> tuple[dict[str, str], dict[str, TensorFact], dict[str, int]]:
        metadata = header.pop("__metadata__", None) or {}
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        tensors, starts, end = {}, {}, 0
        for name, entry in ordered:
            if entry["dtype"] not in DTYPE_BYTES:
                raise CheckpointError(
                    f"{self.path.name} holds the tensor {name!r} in the unknown format {entry['dtype']!r}.",
                    "Save it as fp32, fp16 or bf16 with the program that made it.",
                )
            shape = tuple(entry["shape"])
            if not all(isinstance(size, int) and size >= 0 for size in shape):
                raise ValueError(shape)
            fact = TensorFact(entry["dtype"], shape)
            start, stop = entry["data_offsets"]
            if start != end or stop - start != fact.bytes:  # no gaps, no overlaps, as the reference reader demands
                raise ValueError(name)
            tensors[name], starts[name], end = fact, len(self.header) + start, stop
        if len(self.header) + end != self.bytes:
            raise self._damaged(f"it has {self.bytes:,} bytes where its header promises {len(self.header) + end:,}")
        return metadata, tensors, starts

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole safetensors file: {reason}.", "Download it again, or pick another file."
        )


def forget_cached(descriptor: int) -> None:
    """Let the next reads of an open file ask the disk, not the memory its bytes were just written from."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
