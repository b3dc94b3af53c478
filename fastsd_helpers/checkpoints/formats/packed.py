"""Weights whose numbers alone are not their values: codes with scales, packed bits, 8-bit floats; one rule for all.

It looks at what a file or folder holds, not at the program that made it: a tensor with a scale beside it, whole numbers
in the place of weights, or a configuration that says so. Cast without their scales such codes become other weights.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.dtypes import CODE_BITS, FLOATS, is_small_float
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.formats.weight_sets import weight_sets
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.inert import read_config

__all__ = ["refuse_gguf", "refuse_packed", "refuse_packed_config", "refuse_small_floats"]

_HINT = "Download the fp16 or bf16 file of the same model."
# What is left of a companion's name is the tensor it belongs to: 'weight_scale_inv' and 'scale_weight' to 'weight'.
_SCALE = re.compile(
    r"_?(scale|absmax|zero_?point|zero|quant|scb|g_idx|codebook|weight_format|nested|packed|inv|amax)s?_?"
)
_WORDS = re.compile(r"scale|absmax|zero|quant|scb$|g_idx|codebook|weight_format", re.IGNORECASE)
_CODES = ("I8", "U8", "I16", "U16", "I32", "U32")  # wider ones count or point at something
# Of the inputs and outputs of a layer, or of all of it.
_OF_THE_LAYER = ("", "w", "q", "s", "b", "input", "output", "act", "activation", "comfy")


def refuse_packed(where: Path | str, tensors: Mapping[str, TensorFact]) -> None:
    """Refuse weights that cannot be read without a scale, a code book or a program of their own.

    Raises:
        CheckpointError: names the first such tensor, and what lies beside it.
    """
    scales = _scales(tensors)
    marker = next((name for name in tensors if name.rpartition(".")[2] == "scaled_fp8"), None)
    if marker is not None:
        raise CheckpointError(
            f"{where} holds scaled 8-bit weights (its {marker!r} says so), which cannot be converted.", _HINT
        )
    for name, fact in tensors.items():
        if fact.dtype in CODE_BITS:
            raise CheckpointError(
                f"{where} holds quantized weights ({name!r} in the format {fact.dtype}), which cannot be converted.",
                _HINT,
            )
        companion = _companion(name, fact, scales)
        if companion is not None:
            kind = "scaled 8-bit" if is_small_float(fact.dtype) else "quantized"
            raise CheckpointError(
                f"{where} holds {kind} weights ({name!r} with {companion!r} next to it), which cannot be converted.",
                _HINT,
            )
        if fact.dtype not in FLOATS and len(fact.shape) > 1 and re.search(r"weight(_packed)?$", name):
            raise CheckpointError(
                f"{where} holds quantized weights ({name!r} are whole numbers, {fact.dtype}), which cannot be "
                "converted.",
                _HINT,
            )


def _scales(tensors: Mapping[str, TensorFact]) -> dict[str, list[tuple[str, str]]]:
    """What could be a scale: the module or tensor it lies in -> [(its own name, the whole name)]."""
    found: dict[str, list[tuple[str, str]]] = {}
    for name in tensors:
        # bitsandbytes puts a dot into the last part: quant_state.bitsandbytes__nf4
        inside, _, last = re.sub(r"\.(quant_state)\..*$", r".\1", name).rpartition(".")
        if _WORDS.search(last):
            found.setdefault(inside, []).append((last, name))
    return found


def _companion(name: str, fact: TensorFact, scales: Mapping[str, list[tuple[str, str]]]) -> str | None:
    """The name of a scale that a tensor's values need; None where they are what they are."""
    inside, _, last = name.rpartition(".")
    if _WORDS.search(last) or fact.dtype == "BOOL":
        return None
    if name in scales:
        return scales[name][0][1]
    code = is_small_float(fact.dtype) or fact.dtype in _CODES
    for word, whole in scales.get(inside, ()):
        whose = re.sub(r"\d+$", "", _SCALE.sub("", word.lower()).strip("_"))
        named = last.lower().strip("_").startswith(whose) and bool(whose)
        if named and (code or last.endswith("weight")) and whole != name:
            return whole
        if code and whose in _OF_THE_LAYER:
            return whole
    return None


def refuse_packed_config(folder: Path) -> None:
    """Refuse a part whose config.json says, at any depth, that its weights are quantized.

    Raises:
        CheckpointError: names the file and the kind. ModelError, UnsafeModel: the file cannot be read.
    """
    path = folder / "config.json"
    todo: list[Any] = [read_config(path)] if path.is_file() else []
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            stated = value.get("quantization_config") or value.get("compression_config")
            if stated:
                kind = stated.get("quant_method") if isinstance(stated, dict) else stated
                raise CheckpointError(
                    f"{path} says that the weights are quantized ({str(kind)[:40]}); they cannot be converted.", _HINT
                )
        todo += [inner for inner in (value.values() if isinstance(value, dict) else value)
                 if isinstance(inner, (dict, list))]  # fmt: skip


def refuse_gguf(folder: Path) -> None:
    """Refuse a model of which a part has its weights as a GGUF file alone.

    Raises:
        CheckpointError: names the file.
    """
    for part in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        packed = sorted(part.glob("*.gguf"))
        if packed and not weight_sets(part) and (part / "config.json").is_file():
            raise CheckpointError(
                f"{packed[0]} is a GGUF file: its weights are quantized to few bits and are not converted.",
                "Give the model's .safetensors files.",
            )


def refuse_small_floats(path: Path, source: Source, dtype: str) -> tuple[str, ...]:
    """Refuse packed weights, and plain 8-bit ones unless they are to be widened; says so when they are.

    Raises:
        CheckpointError: `dtype` is keep, or the values need scales to be read.
    """
    refuse_packed(path, source.tensors)
    small = [name for name, fact in source.tensors.items() if is_small_float(fact.dtype)]
    if not small:
        return ()
    if dtype == "keep":
        raise CheckpointError(
            f"{path} holds {len(small)} tensors in an 8-bit format, such as {small[0]!r}.",
            "Upcast them with --dtype fp16 (the precision lost in 8 bits stays lost), or download the fp16 file of "
            "the same model.",
        )
    return (f"{len(small)} tensors were upcast from 8 bits: the precision lost in 8 bits stays lost.",)
