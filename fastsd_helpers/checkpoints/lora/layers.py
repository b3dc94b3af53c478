"""Reading a LoRA, from a file or a folder: every layer's pair of matrices as numbers, and how strongly it counts.

A LoRA adds `alpha / rank * up @ down` to a weight. LyCORIS' convolutions in Tucker form have a third matrix between
the two (`lora_mid`); it is multiplied into `down`, which changes nothing but the shape.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastsd_helpers.checkpoints.formats.dtypes import FLOATS, cast, is_small_float
from fastsd_helpers.checkpoints.formats.prediction import read_config
from fastsd_helpers.checkpoints.formats.sources import Renamed, Source, open_file, read_whole
from fastsd_helpers.checkpoints.lora.layouts import (
    ADAPTER_FILES,
    ADAPTER_PARTS,
    LORA_FILE,
    LoraLayout,
    LoraModule,
    adapters_in,
    read_layout,
)
from fastsd_helpers.checkpoints.lora.statements import Adapted, find_statements
from fastsd_helpers.checkpoints.lora.strength import settle_alphas
from fastsd_helpers.checkpoints.names.layout import Row
from fastsd_helpers.errors import CheckpointError

__all__ = [
    "Layer",
    "Lora",
    "as_adapted",
    "common_dtype",
    "config_of",
    "open_lora",
    "read_lora",
    "read_matrices",
    "read_values",
    "require_finite",
    "require_floats",
    "settle_modules",
]

_CONFIG_FILE = "adapter_config.json"

_DAMAGED = "Download it again, or export it once more."


@dataclass
class Layer:
    """What a LoRA adds to one weight.

    down: float32 [rank, in] or, for a convolution, [rank, in, height, width].
    up: float32 [out, rank] or [out, rank, 1, 1].
    dtype: the dtype it is stored in: that of the file, `F32` where the numbers had to be computed.
    """

    down: np.ndarray
    up: np.ndarray
    alpha: float
    dtype: str

    @property
    def rank(self) -> int:
        """The inner size."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What `up @ down` counts."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class Lora:
    """A LoRA that is open, by its headers.

    source: its tensors; of a folder with an adapter for each part, those of all of them.
    configs: part -> its adapter_config.json; an empty part stands for all of them.
    """

    source: Source
    layout: LoraLayout
    configs: Mapping[str, Mapping[str, Any]]


# ------------------------------------------------------------------------------------------------ files and folders


def open_lora(path: Path, stack: ExitStack) -> Lora:
    """Open a LoRA; only headers are read now.

    Args:
        path: a file, or a folder with the file diffusers looks for or with peft's adapters, perhaps one for each part.
        stack: closes the files when it is left.

    Raises:
        CheckpointError: it cannot be read, or is not a LoRA of a family we know.
    """
    files = [(path, "")] if path.is_file() else adapters_in(path) or [(path / LORA_FILE, "")]
    if len(files) == 1 and files[0][0].name in ADAPTER_FILES and files[0][0].parent.name in ADAPTER_PARTS:
        # One part's adapter alone: two text encoders have the same names, and the folder says which it is.
        files = [(files[0][0], files[0][0].parent.name)]
    sources = []
    for file, _part in files:
        sources.append(open_file(file))
        stack.callback(sources[-1].close)
    configs = {part: _config_of(file, source) for (file, part), source in zip(files, sources, strict=True)}
    if len(files) == 1:
        ((_, part),) = files
        return Lora(sources[0], read_layout(sources[0].tensors, sources[0].metadata, part=part), configs)
    joined = _joined(sources, [part for _file, part in files])
    return Lora(joined, read_layout(joined.tensors, joined.metadata), configs)


def _config_of(file: Path, source: Source) -> dict[str, Any]:
    """The adapter_config.json that belongs to a file: beside one of peft's, whatever that was renamed to."""
    ours = file.name in ADAPTER_FILES
    if not ours:
        peft = any(name.startswith("base_model.model.") for name in source.tensors)
        ours = peft and not any((file.parent / name).exists() for name in ADAPTER_FILES)
    return read_config(file.parent / _CONFIG_FILE) if ours else {}


def _joined(sources: Sequence[Source], parts: Sequence[str]) -> Source:
    """Adapters of several parts as one source; each tensor's name begins with its part."""
    homes = {}
    for source, part in zip(sources, parts, strict=True):
        for name in source.tensors:
            plain = name.removeprefix("base_model.model.")
            homes[f"{part}.{plain}" if part else plain] = source, name
    return Renamed(homes, sources)


# ------------------------------------------------------------------------------------------------ layers


def read_lora(lora: Lora) -> tuple[list[tuple[LoraModule, Layer]], list[str]]:
    """Read every layer of a plain LoRA (`layout.kind` is `lora`), each with the alpha that counts.

    Returns:
        The layers, and what a person should know about them, one sentence each.

    Raises:
        CheckpointError: half a pair, matrices that do not fit each other, or an alpha that is not a finite number.
    """
    layers: list[tuple[LoraModule, Layer]] = []
    adapted: list[tuple[LoraModule, Adapted]] = []
    for module in lora.layout.modules:
        layer = read_matrices(lora.source, module.tensors, module.place)
        _shape_as(layer, module.module.row, module.place)
        kernel, nothing = bool(set(layer.down.shape[2:]) - {1}), not (layer.down.any() and layer.up.any())
        adapted.append((module, as_adapted(lora, module, layer.rank, kernel=kernel, nothing=nothing)))
        layers.append((module, layer))
    notes = settle_modules(lora, adapted)
    for (_, one), (_, layer) in zip(adapted, layers, strict=True):
        layer.alpha = one.alpha
    return layers, notes


def _shape_as(layer: Layer, row: Row, place: str) -> None:
    """Give the matrices as many axes as the weight has; some trainers leave out, or add, those of length one."""
    kernel = tuple(int(size) for size in row.sizes[2:])
    if (layer.down.shape[2:] or (1, 1)) != (kernel or (1, 1)):
        raise CheckpointError(
            f"The LoRA's matrices of {place} do not fit: {list(layer.down.shape)} for a "
            f"{'convolution of ' + ' x '.join(row.sizes[2:]) if kernel else 'linear layer'}.",
            _DAMAGED,
        )
    layer.down = layer.down.reshape(layer.rank, -1, *kernel)
    layer.up = layer.up.reshape(len(layer.up), -1, *(1 for _ in kernel))


def as_adapted(lora: Lora, module: LoraModule, rank: int, *, kernel: bool, nothing: bool) -> Adapted:
    """What a module's strength is found by; `kernel` and `nothing` are Adapted's."""
    own = _read_number(lora.source, module.tensors["alpha"]) if "alpha" in module.tensors else None
    return Adapted(_spellings(module), module.place, rank, own, kernel, nothing)


def settle_modules(lora: Lora, adapted: Sequence[tuple[LoraModule, Adapted]]) -> list[str]:
    """Give every module the alpha that counts; returns what a person should know, one sentence each.

    Raises:
        CheckpointError: an alpha that is not a finite number, or metadata that cannot be read.
    """
    notes: list[str] = []
    unsaid = 0
    for part in dict.fromkeys(module.module.part for module, _ in adapted):
        own = [one for module, one in adapted if module.module.part == part]
        unsaid += settle_alphas(own, find_statements(lora.source.metadata, config_of(lora, part), part), notes)
    if adapted and unsaid == len(adapted):
        notes.insert(0, "The file has no alpha; alpha = rank was assumed, as in diffusers.")
    elif unsaid:
        some = f"{unsaid} layers have" if unsaid > 1 else "1 layer has"
        notes.insert(0, f"{some} no alpha; alpha = rank was assumed.")
    return list(dict.fromkeys(notes))


def config_of(lora: Lora, part: str) -> Mapping[str, Any]:
    """The adapter_config.json that speaks of a part; empty where there is none."""
    return lora.configs.get(part) or lora.configs.get("") or {}


def _spellings(module: LoraModule) -> tuple[str, ...]:
    """The ways in which a pattern may spell a module: text encoders have `text_model.` in front, or not."""
    paths = dict.fromkeys((module.spelled, module.path or module.spelled))
    if module.module.part.startswith("text"):
        plain = [path.removeprefix("text_model.") for path in paths]
        paths = dict.fromkeys(spelled for path in plain for spelled in (path, f"text_model.{path}"))
    return tuple(paths)


def read_matrices(source: Source, tensors: Mapping[str, str], place: str) -> Layer:
    """Read one layer; its alpha is the rank until something is found that states another.

    Args:
        tensors: `down`, `up` and perhaps `mid` -> the tensor's name.
        place: the layer, for messages.

    Raises:
        CheckpointError: half a pair, matrices that do not fit each other, integers, or values that are not numbers.
    """
    if lacking := [side for side in ("down", "up") if side not in tensors]:
        raise CheckpointError(f"The LoRA has an incomplete layer: {place} lacks its {lacking[0]} matrix.", _DAMAGED)
    names = [tensors[role] for role in ("down", "up", "mid") if role in tensors]
    for name in names:
        require_floats(name, source.tensors[name].dtype, "matrix")
    down, up, *middle = (read_values(source, name) for name in names)
    _check_fit(down, up, middle, place)
    dtype = common_dtype(source.tensors[name].dtype for name in names)
    if middle:  # [rank, rank, height, width]
        down, dtype = np.einsum("rshw,si->rihw", middle[0], down.reshape(len(down), -1)), "F32"
    for name, values in zip(names, (down, up, *middle), strict=True):
        require_finite(name, values, "matrix")
    return Layer(down, up, float(len(down)), dtype)


def require_floats(name: str, dtype: str, what: str = "tensor") -> None:
    """Refuse whole numbers in the place of a LoRA's weights; raises CheckpointError."""
    if dtype not in FLOATS:
        raise CheckpointError(
            f"The LoRA's {what} {name!r} contains integers ({dtype}): it is quantized, and the file does not say how.",
            "Give the LoRA in fp32, fp16 or bf16.",
        )


def require_finite(name: str, values: np.ndarray, what: str = "tensor") -> None:
    """Refuse infinite values and those that are not a number; raises CheckpointError."""
    if not np.isfinite(values).all():
        raise CheckpointError(
            f"The LoRA's {what} {name!r} contains NaN or Inf.",
            "Its training diverged: use an earlier checkpoint of it.",
        )


def _check_fit(down: np.ndarray, up: np.ndarray, middle: Sequence[np.ndarray], place: str) -> None:
    fits = (
        down.ndim in (2, 4)
        and up.ndim in (2, 4)
        and down.size > 0
        and up.size > 0
        and up.shape[1] == len(down)
        and set(up.shape[2:]) <= {1}
    )
    if fits and middle:
        fits = middle[0].ndim == 4 and middle[0].shape[:2] == (len(down),) * 2 and set(down.shape[2:]) <= {1}
    if not fits:
        shapes = " and ".join(str(list(values.shape)) for values in (down, up, *middle))
        raise CheckpointError(f"The LoRA's matrices of {place} do not fit: {shapes}.", _DAMAGED)


def _read_number(source: Source, name: str) -> float:
    fact = source.tensors[name]
    if fact.count != 1:
        raise CheckpointError(f"The LoRA's {name!r} holds {fact.count} numbers instead of one.", _DAMAGED)
    return float(read_values(source, name).reshape(-1)[0])


def read_values(source: Source, name: str) -> np.ndarray:
    """Read a tensor as float32, whatever it is stored in."""
    fact, values = source.tensors[name], read_whole(source, name)
    if fact.dtype.startswith(("I", "U")):
        kind = f"<{fact.dtype[0].lower()}{int(fact.dtype[1:]) // 8}"
        return np.frombuffer(values, kind).astype("<f4").reshape(fact.shape)
    wide = cast(values, fact.dtype, "F32", owner=lambda: f"The LoRA's tensor {name!r}")
    return np.frombuffer(wide, "<f4").reshape(fact.shape).copy()


def common_dtype(dtypes: Iterable[str]) -> str:
    """A format that holds all of them; eight bits become sixteen, which hold every one of their values."""
    stored = {"F16" if is_small_float(dtype) else dtype for dtype in dtypes}
    return stored.pop() if len(stored) == 1 else "F32"
