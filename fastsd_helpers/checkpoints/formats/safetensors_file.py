"""The safetensors format, read tensor by tensor; a header is not trusted until every line of it was checked.

Source: the format description in the README of huggingface/safetensors (8 bytes of length, a JSON header, the data).
"""

import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastsd_helpers.checkpoints.formats.dtypes import CODE_BITS, DTYPE_BYTES
from fastsd_helpers.checkpoints.names.layout import Shape
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import forget_cached
from fastsd_helpers.inert.headers import HEADER_LIMIT, open_header, read_entries

__all__ = ["SafetensorsFile", "Source", "TensorFact"]

# Each takes some 400 bytes of memory, which is what a hostile file can make us allocate.
_MOST_TENSORS = 500_000
_LARGEST_SIZE = 1 << 48


@dataclass(frozen=True, slots=True)
class TensorFact:
    """What a header says about one tensor, without its values."""

    dtype: str  # safetensors' name, such as "F16"
    shape: Shape

    @property
    def count(self) -> int:
        """How many values it has."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def bytes(self) -> int:
        """The size of the values."""
        if self.dtype in CODE_BITS:
            return CODE_BITS[self.dtype] * self.count // 8
        return DTYPE_BYTES[self.dtype] * self.count


class Source(ABC):
    """Tensors by the names their owner gave them; by itself one that lies in no file and has nothing to close.

    tensors: name -> what the header says of it. files: those it is read from. metadata: what the file says of itself.
    """

    tensors: Mapping[str, TensorFact]
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = MappingProxyType({})

    @abstractmethod
    def read_into(self, name: str, start: int, buffer: Any) -> None:
        """Fill a buffer with a tensor's bytes (little endian, contiguous) from `start` on."""

    def locate(self, name: str) -> tuple[int, int] | None:
        """The descriptor of the open file that a tensor's bytes lie in, and where; None where they are in none."""
        return None

    def close(self) -> None:  # noqa: B027
        """Release files and tensors; closing twice is fine."""


class SafetensorsFile(Source):
    """One .safetensors file, open for reading; the header is checked before any tensor is read.

    Attributes:
        tensors: name -> TensorFact, in the order of the data.
        metadata: the header's strings.
        data_start: how many bytes come before the data.

    Raises:
        CheckpointError: the file cannot be opened, is cut short, or its header contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.files = path, (path,)
        try:
            self._file = path.open("rb", buffering=0)
            self.bytes = os.fstat(self._file.fileno()).st_size
        except OSError as err:
            raise CheckpointError(
                f"{path} cannot be opened: {err.strerror}.", "Check the path and that the file may be read."
            ) from err
        try:
            self.data_start, header = self._open_header()
            self.metadata, self.tensors, self._starts = self._check_header(header)
        except CheckpointError:
            self._file.close()
            raise
        except OSError as err:
            self._file.close()
            raise self._unreadable("its header", err) from err
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as err:
            self._file.close()
            raise self._damaged("its header is not that of a safetensors file") from err

    def __enter__(self) -> "SafetensorsFile":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def forget_cached(self) -> None:
        """Let the next reads come from the disk itself; for verifying what was just written."""
        forget_cached(self._file.fileno())

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        """Fill a buffer with a tensor's bytes from `start` on; several threads may read at once.

        Raises:
            CheckpointError: the file ends there or cannot be read.
        """
        try:
            whole = fill(self._file.fileno(), memoryview(buffer).cast("B"), self._starts[name] + start)
        except OSError as err:
            raise self._unreadable(f"the tensor {name!r}", err) from err
        if not whole:
            raise self._damaged(f"it ends inside the tensor {name!r}")

    def locate(self, name: str) -> tuple[int, int]:
        """The descriptor of the open file, and where in it a tensor's bytes begin."""
        return self._file.fileno(), self._starts[name]

    def head(self) -> Iterator[bytes]:
        """The bytes before the data, in pieces."""
        for start in range(0, self.data_start, 1 << 20):
            piece = bytearray(min(1 << 20, self.data_start - start))
            if not fill(self._file.fileno(), memoryview(piece), start):
                raise self._damaged("it ends inside its header")
            yield bytes(piece)

    def _open_header(self) -> tuple[int, Any]:
        prefix = self._file.read(8)
        if len(prefix) < 8:
            raise self._damaged(f"it is only {self.bytes} bytes long")
        (length,) = struct.unpack("<Q", prefix)
        if length > self.bytes - 8:
            raise self._damaged("its header is not that of a safetensors file, or the file is truncated")
        if length > HEADER_LIMIT:
            raise self._damaged(f"its header has {length:,} bytes; the limit is {HEADER_LIMIT:,}")
        header = open_header(self._file, length)
        if len(header) < length:
            raise self._damaged("it ends inside its header")
        return 8 + length, header

    def _check_header(self, header: Any) -> tuple[dict[str, str], dict[str, TensorFact], dict[str, int]]:
        metadata, found = {}, []
        for kind, name, value in read_entries(header):
            if kind == "metadata":
                metadata[name] = value.read()
                continue
            if value["dtype"] not in DTYPE_BYTES and value["dtype"] not in CODE_BITS:
                raise CheckpointError(
                    f"{self.path.name} holds the tensor {name[:200]!r} in the unknown format "
                    f"{str(value['dtype'])[:40]!r}.",
                    "Save it as fp32, fp16 or bf16 with the program that made it.",
                )
            if not isinstance(value["shape"], list) or len(value["shape"]) > 16:
                raise ValueError(name)
            start, stop = map(_whole, value["data_offsets"])
            found.append((start, stop, name, TensorFact(value["dtype"], tuple(map(_whole, value["shape"])))))
            if len(found) > _MOST_TENSORS:
                raise self._damaged(f"it has more than {_MOST_TENSORS:,} tensors, which no model has")
        found.sort(key=lambda item: item[:2])
        tensors, starts, end = {}, {}, 0
        for start, stop, name, fact in found:
            if start != end or stop - start != fact.bytes:  # no gaps, no overlaps, as the reference reader demands
                raise ValueError(name)
            tensors[name], starts[name], end = fact, self.data_start + start, stop
        if self.data_start + end != self.bytes:
            raise self._damaged(f"it has {self.bytes:,} bytes where its header promises {self.data_start + end:,}")
        return metadata, tensors, starts

    def _damaged(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a complete safetensors file: {reason}.", "Download it again, or choose another file."
        )

    def _unreadable(self, what: str, err: OSError) -> CheckpointError:
        return CheckpointError(
            f"{self.path.name} cannot be read at {what}: {err.strerror}.",
            "Copy the file to a local disk and try again.",
        )


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _LARGEST_SIZE:
        raise ValueError(number)
    return number


def fill(descriptor: int, buffer: memoryview, place: int) -> bool:
    """Fill a buffer with an open file's bytes from `place` on: whether the file has so many."""
    while buffer and (count := os.preadv(descriptor, [buffer], place)):
        buffer, place = buffer[count:], place + count
    return not buffer
