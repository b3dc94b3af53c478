"""Where tensors come from: a Diffusers component folder, one weights file, or tensors in memory."""

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fastsd_helpers.checkpoints.formats.dtypes import OF_TORCH
from fastsd_helpers.checkpoints.formats.file_content import is_safetensors_file, refuse_other_content
from fastsd_helpers.checkpoints.formats.pickled import PICKLE_ENDINGS, load_pickled
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, Source, TensorFact
from fastsd_helpers.checkpoints.formats.weight_sets import WeightSet, choose_set, weight_sets
from fastsd_helpers.checkpoints.names.layout import PART_WORDS
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.runtime import logger

if TYPE_CHECKING:
    import torch

__all__ = ["BytesSource", "PartGiven", "Renamed", "Source", "open_file", "open_set", "open_source", "read_whole"]

PartGiven: TypeAlias = "Path | str | Mapping[str, torch.Tensor]"  # a folder, a weights file, or its tensors


def read_whole(source: Source, name: str) -> bytearray:
    """A tensor's bytes as they lie in a source (little endian)."""
    values = bytearray(source.tensors[name].bytes)
    source.read_into(name, 0, values)
    return values


def open_source(part: str, given: PartGiven) -> Source:
    """Open one part's tensors; only headers are read now.

    Raises:
        CheckpointError: there are no weights, several that contradict each other, or they cannot be read safely.
    """
    if isinstance(given, Mapping):
        return _Memory(given, f"The {PART_WORDS[part]}")
    path = Path(given)
    if path.is_file():
        return open_file(path)
    if path.is_dir():
        return _open_folder(path, PART_WORDS[part])
    raise CheckpointError(
        f"There is no {PART_WORDS[part]} at {path}.", "Give a Diffusers folder that has it, or a weights file."
    )


def open_file(path: Path) -> Source:
    """Open one weights file: safetensors, whatever it is called, or a pickle of plain tensors.

    Raises:
        CheckpointError: it cannot be read, or is neither.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is not a file.", "Give a .safetensors, .ckpt or .bin file.")
    if path.is_file():
        refuse_other_content(path)
    if path.suffix.lower() in PICKLE_ENDINGS and not is_safetensors_file(path):
        return _Memory(load_pickled(path), path.name, (path,))
    return SafetensorsFile(path)


class Renamed(Source):
    """Tensors of other sources under other names; closing it closes those.

    Args:
        homes: name -> the source that has the tensor, and its name there.
    """

    def __init__(self, homes: Mapping[str, tuple[Source, str]], sources: Sequence[Source]) -> None:
        self._homes, self._sources = homes, sources
        self.tensors = {name: source.tensors[own] for name, (source, own) in homes.items()}
        self.files = tuple(file for source in sources for file in source.files)

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        source, own = self._homes[name]
        source.read_into(own, start, buffer)

    def locate(self, name: str) -> tuple[int, int] | None:
        source, own = self._homes[name]
        return source.locate(own)

    def close(self) -> None:
        for source in self._sources:
            source.close()


class BytesSource(Source):
    """Small tensors whose values are at hand: name -> (fact, bytes)."""

    def __init__(self, tensors: Mapping[str, tuple[TensorFact, Any]]) -> None:
        self._values = {name: memoryview(values).cast("B") for name, (_fact, values) in tensors.items()}
        self.tensors = {name: fact for name, (fact, _values) in tensors.items()}

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        view = memoryview(buffer).cast("B")
        view[:] = self._values[name][start : start + len(view)]


class _Memory(Source):
    def __init__(self, tensors: Mapping[str, Any], owner: str, files: tuple[Path, ...] = ()) -> None:
        import torch

        self._tensors = tensors
        self._last: tuple[str, Any] = ("", None)
        self._lock = threading.Lock()
        self.tensors = facts = {}
        self.files = files
        for name, tensor in tensors.items():
            known = isinstance(tensor, torch.Tensor)
            dtype = OF_TORCH.get(str(tensor.dtype).removeprefix("torch.")) if known else None
            if dtype is None:
                what = f"a tensor of type {tensor.dtype}" if known else type(tensor).__name__
                raise CheckpointError(
                    f"{owner} holds {what} under {name!r}.", "Give plain tensors, such as a model's state_dict()."
                )
            facts[name] = TensorFact(dtype, tuple(tensor.shape))

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        view = memoryview(buffer).cast("B")
        if view:
            view[:] = self._bytes_of(name)[start : start + len(view)]

    def _bytes_of(self, name: str) -> memoryview:
        import torch

        with self._lock:  # a tensor that is not contiguous or not on the CPU is copied once, not once per piece
            if self._last[0] != name:
                tensor = self._tensors[name].detach().to("cpu").contiguous()
                self._last = (name, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
            return self._last[1]

    def close(self) -> None:
        self._tensors, self._last = {}, ("", None)


def _open_shards(index: Path, part: str) -> Source:
    listed = _read_index(index)
    homes: dict[str, tuple[Source, str]] = {}
    shards: list[Source] = []
    with ExitStack() as opened:
        for file_name in sorted(set(listed.values())):
            if not (index.parent / file_name).is_file():
                raise CheckpointError(
                    f"{index.parent} lacks {file_name}, which {index.name} lists.", "Download the model again."
                )
            shards.append(open_file(index.parent / file_name))
            opened.callback(shards[-1].close)
            for name in shards[-1].tensors:
                if listed.get(name) != file_name:
                    raise CheckpointError(
                        f"{file_name} holds the tensor {name!r}, which {index.name} does not list there.",
                        f"The {part}'s files are of different models; download it again.",
                    )
                homes[name] = shards[-1], name
        for name, file_name in listed.items():
            if name not in homes:
                raise CheckpointError(
                    f"{file_name} lacks the tensor {name!r}, which {index.name} lists there.",
                    "Download the model again.",
                )
        opened.pop_all()
    whole = Renamed(homes, shards)
    whole.files = (index, *whole.files)
    return whole


def _read_index(index: Path) -> dict[str, str]:
    try:
        homes = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        plain = all(isinstance(name, str) and Path(name).name == name for name in homes.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{index} cannot be read.", "Download the model again.") from err
    if not plain:
        raise CheckpointError(f"{index} points outside its own folder.", "Use a model from a source you trust.")
    return homes


def open_set(chosen: WeightSet, part: str) -> Source:
    """Open one set of a network's weights; `part` names it in messages.

    Raises:
        CheckpointError: a file is missing or cannot be read, or the index says something else than the files.
    """
    return _open_shards(chosen.first, part) if chosen.sharded else open_file(chosen.first)


def _open_folder(folder: Path, part: str) -> Source:
    sets = weight_sets(folder)
    if not sets:
        raise CheckpointError(
            f"{folder} holds no weights of the {part}.", "Download the model again, or give a weights file."
        )
    chosen = choose_set(folder, sets)
    logger.debug("The %s is read from %s.", part, chosen.first)
    return open_set(chosen, part)
