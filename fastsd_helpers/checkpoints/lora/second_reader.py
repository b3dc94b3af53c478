"""A second reader of LoRA: does every layer of a written file change its weight as the source's layer does?

It shares nothing with what wrote the file but the table of names: it reads the files by the definition of their layout,
`alpha / rank * up @ down` per module, one layer at a time. The difference of two layers is computed without either of
them being spelled out: both are products of narrow matrices, whose norm follows from the matrices' own inner products.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastsd_helpers.checkpoints.formats.dtypes import cast
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.formats.sources import Source, read_whole
from fastsd_helpers.checkpoints.lora.modules import Module, lora_modules
from fastsd_helpers.checkpoints.names.layout import PART_WORDS
from fastsd_helpers.errors import CheckpointError, VerificationFailed

__all__ = ["Checked", "SourceLayer", "check_lora"]

_METADATA_KEY = "lora_adapter_metadata"  # as diffusers has it
_HINT = "Nothing was written. Please report it with the name of this LoRA; the source is as it was."
_TOLERANCE = 1e-6  # of a layer's change: sums of products in fp32, and an alpha stored in fp32
_UNIT = {"F64": 0.0, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}  # the largest relative error of rounding
_TINY = {"F16": 2.0**-25, "BF16": 2.0**-134}  # and the largest error of numbers too small for that

Key = tuple[str, str]  # (part, Diffusers path)


@dataclass(frozen=True)
class SourceLayer:
    """One layer of the source, by its tensors.

    path: the Diffusers path that is meant; empty where the matrices are the original's, for all paths of the module.
    tensors: `down`, `up` and perhaps `mid` -> the tensor's name.
    """

    source: Source
    module: Module
    path: str
    tensors: Mapping[str, str]
    alpha: float


@dataclass(frozen=True)
class Checked:
    """What was compared: how many layers of Diffusers, and by how much rounding changed the one it changed most."""

    layers: int
    worst: float
    where: str


@dataclass
class _Product:
    """`scale * up @ down`, float64."""

    up: np.ndarray
    down: np.ndarray
    scale: float
    unit: float = 0.0
    tiny: float = 0.0

    def rows(self, first: int, last: int) -> "_Product":
        up = self.up[first:last]
        columns = np.flatnonzero(up.any(axis=0))
        return replace(self, up=up[:, columns], down=self.down[columns])


def check_lora(path: Path, family: str, layers: Iterable[SourceLayer]) -> Checked:
    """Compare a written LoRA with its source, layer by layer.

    Raises:
        VerificationFailed: a layer is lacking, is one too many, or counts differently.
    """
    try:
        file = SafetensorsFile(path)
    except CheckpointError as err:
        raise VerificationFailed(err.problem, _HINT) from err
    try:
        written = _index_diffusers(file, family) if _METADATA_KEY in file.metadata else _index_kohya(file, family)
        seen: set[Key] = set()
        worst, where = 0.0, ""
        last: dict[str, _Product] = {}
        for layer in layers:
            keys = [(layer.module.part, path) for path in ((layer.path,) if layer.path else layer.module.paths)]
            if not seen.isdisjoint(keys):
                raise VerificationFailed(f"{_words(keys[0])} is contained in the source twice.", _HINT)
            seen.update(keys)
            if keys[0] in written and _are_copies(layer, written[keys[0]]):
                continue
            product = _product(layer.source, layer.tensors, layer.alpha)
            for key, wanted in zip(keys, [product] if layer.path else _cut(layer.module, product), strict=True):
                error = _compare(key, wanted, written[key].product(last) if key in written else None)
                if error > worst:
                    worst, where = error, _words(key)
        for key in written.keys() - seen:
            if _norm(written[key].product(last)):
                raise VerificationFailed(f"{path.name} changes {_words(key)}, which the source does not change.", _HINT)
    finally:
        file.close()
    return Checked(len(seen), worst, where)


def _words(key: Key) -> str:
    return f"{key[1]} of the {PART_WORDS.get(key[0], key[0])}"


def _compare(key: Key, wanted: _Product, found: _Product | None) -> float:
    """The relative difference of two layers, which is no more than rounding.

    Raises:
        VerificationFailed: it is more.
    """
    if found is None:
        if _norm(wanted):
            raise VerificationFailed(f"The written LoRA does not change {_words(key)}, which the source does.", _HINT)
        return 0.0
    if found.down.shape[1] != wanted.down.shape[1] or len(found.up) != len(wanted.up):
        raise VerificationFailed(f"The written LoRA's matrices of {_words(key)} have another shape.", _HINT)
    turned = abs(found.scale - wanted.scale)
    if (
        turned <= _TOLERANCE * abs(wanted.scale)
        and np.array_equal(found.up, wanted.up)
        and np.array_equal(found.down, wanted.down)
    ):
        return turned / abs(wanted.scale) if turned else 0.0
    stacked = _Product(
        np.concatenate([wanted.up * wanted.scale, found.up * -found.scale], axis=1),
        np.concatenate([wanted.down, found.down]),
        1.0,
    )
    size, error = _norm(wanted), _norm(stacked)
    # Each value of either matrix is off by what rounding to its format allows, and by no more.
    up, down = np.abs(found.up), np.abs(found.down)
    allowed = ((1 + found.unit) ** 2 - 1 + _TOLERANCE) * _norm(_Product(up, down, abs(found.scale)))
    sums = len(up) * np.square(down.sum(axis=0)).sum(), down.shape[1] * np.square(up.sum(axis=1)).sum()
    allowed += found.tiny * abs(found.scale) * sum(map(math.sqrt, sums))
    if not error <= allowed:
        raise VerificationFailed(
            f"The written LoRA changes {_words(key)} by {_norm(found):.6g} in all, the source by {size:.6g}; they "
            f"differ by {error:.3g}, and rounding accounts for {allowed:.3g}.",
            _HINT,
        )
    return error / size if size else 0.0


def _norm(product: _Product) -> float:
    """The Frobenius norm of the product; where much cancels out, good to 1e-7 of what did not."""
    inner = (product.up.T @ product.up) * (product.down @ product.down.T)
    return max(float(inner.sum()), 0.0) ** 0.5 * abs(product.scale)


# ------------------------------------------------------------------------------------------------ the files


@dataclass(frozen=True)
class _Written:
    """One layer of Diffusers in the written file: which tensors, and which rows of them."""

    file: SafetensorsFile
    down: str
    up: str
    alpha: float
    module: Module | None = None
    place: int = 0

    def product(self, last: dict[str, _Product]) -> _Product:
        """Read it; `last` holds what was read before, of which this may be other rows."""
        if self.down not in last:
            last.clear()
            last[self.down] = _product(self.file, {"down": self.down, "up": self.up}, self.alpha)
        return last[self.down] if self.module is None else _cut(self.module, last[self.down])[self.place]


def _are_copies(layer: SourceLayer, written: _Written) -> bool:
    """Whether both matrices were copied byte by byte and the strength is the same: nothing is left to compute."""
    forms = [module for module in (None if layer.path else layer.module, written.module) if module is not None]
    if "mid" in layer.tensors or any(len(module.paths) > 1 or module.row.form == "swapped" for module in forms):
        return False
    pairs = ((layer.tensors["down"], written.down), (layer.tensors["up"], written.up))
    facts = [(layer.source.tensors[ours], written.file.tensors.get(theirs)) for ours, theirs in pairs]
    if any(ours != theirs for ours, theirs in facts) or layer.alpha != written.alpha:
        return False
    return all(read_whole(layer.source, ours) == read_whole(written.file, theirs) for ours, theirs in pairs)


def _index_kohya(file: SafetensorsFile, family: str) -> dict[Key, _Written]:
    modules = {module.kohya: module for module in lora_modules(family)}
    found = {}
    for name in file.tensors:
        base, dot, ending = name.partition(".")
        if f"{dot}{ending}" != ".lora_down.weight":
            continue
        if base not in modules:
            raise VerificationFailed(f"The written LoRA has {base!r}, which no model has.", _HINT)
        alpha = float(_floats(file, f"{base}.alpha").reshape(-1)[0])
        module = modules[base]
        for place, path in enumerate(module.paths):
            found[module.part, path] = _Written(file, name, f"{base}.lora_up.weight", alpha, module, place)
    return found


def _index_diffusers(file: SafetensorsFile, family: str) -> dict[Key, _Written]:
    modules = {(module.part, path) for module in lora_modules(family) for path in module.paths}
    said = json.loads(file.metadata[_METADATA_KEY])
    found = {}
    for name in file.tensors:
        match = re.fullmatch(r"(.+)\.(lora_A|lora_linear_layer\.down)\.weight", name)
        if match is None:
            continue
        path, up = match[1], {"lora_A": "lora_B"}.get(match[2], "lora_linear_layer.up")
        part, _, module = path.partition(".")
        key = (part, module.removeprefix("text_model.") if part.startswith("text") else module)
        if key not in modules:
            raise VerificationFailed(f"The written LoRA has {path!r}, which no model has.", _HINT)
        # As peft: the first pattern that fits the end of the name; and the rank must be that of the matrices.
        rank, alpha = (
            _of_patterns(said, part, module, *keys) for keys in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
        )
        if rank != file.tensors[name].shape[0]:
            raise VerificationFailed(f"The written LoRA states rank {rank} for {_words(key)}.", _HINT)
        found[key] = _Written(file, name, f"{path}.{up}.weight", float(alpha))
    return found


def _of_patterns(said: Mapping[str, Any], part: str, module: str, patterns: str, otherwise: str) -> Any:
    for pattern, value in said[f"{part}.{patterns}"].items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return said[f"{part}.{otherwise}"]


def _product(source: Source, tensors: Mapping[str, str], alpha: float) -> _Product:
    up, down = _floats(source, tensors["up"]), _floats(source, tensors["down"])
    rank = up.shape[1]
    up = up.reshape(len(up), rank)
    if "mid" in tensors:
        middle = np.moveaxis(_floats(source, tensors["mid"]), 1, -1)  # [rank, height, width, rank]
        down = np.moveaxis(middle @ down.reshape(rank, -1), -1, 1)
    kinds = [source.tensors[tensors[role]].dtype for role in ("up", "down")]
    return _Product(
        up,
        down.reshape(rank, -1),
        alpha / rank,
        max(_UNIT.get(kind, 0.0) for kind in kinds),
        max(_TINY.get(kind, 0.0) for kind in kinds),
    )


def _floats(source: Source, name: str) -> np.ndarray:
    if name not in source.tensors:
        raise VerificationFailed(f"The written LoRA lacks {name!r}.", _HINT)
    fact = source.tensors[name]
    raw = read_whole(source, name)
    if fact.dtype == "BF16":
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    elif fact.dtype in ("F16", "F32", "F64"):
        values = np.frombuffer(raw, f"<f{fact.bytes // max(fact.count, 1)}")
    else:
        values = np.frombuffer(cast(raw, fact.dtype, "F32", owner=lambda: f"The LoRA's tensor {name!r}"), "<f4")
    return values.astype("<f8").reshape(fact.shape)


def _cut(module: Module, product: _Product) -> list[_Product]:
    """The original's matrix as those of Diffusers: rows of it, and for one module its halves exchanged."""
    if module.row.form == "swapped":
        return [replace(product, up=np.roll(product.up, len(product.up) // 2, axis=0))]
    if len(module.paths) == 1:
        return [product]
    width, rows = product.down.shape[1], len(product.up)
    # Queries, keys and values are as wide as what they read; what follows them has the rest.
    edges = [width * place for place in range(len(module.paths))] + [rows]
    return [product.rows(first, last) for first, last in pairwise(edges)]
