"""From one module of an adapter's file to what it adds to the weight and the bias: its kind, its factors, its scale.

LoRA, LoCon, LoHa, LoKr, DoRA around any of them, IA3, full differences and those of norm layers are read here; kinds
whose definitions differ from program to program (OFT, BOFT, GLoRA) are refused by name.
"""

from collections.abc import Mapping

import numpy as np

from fastsd_helpers.checkpoints.formats.dtypes import DTYPE_BYTES, cast
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.lora.layers import (
    Lora,
    as_adapted,
    config_of,
    read_matrices,
    read_values,
    require_finite,
    require_floats,
    settle_modules,
)
from fastsd_helpers.checkpoints.lora.layouts import LoraModule
from fastsd_helpers.checkpoints.lora.lycoris import (
    Change,
    Decomposed,
    Differences,
    HadamardProduct,
    KroneckerProduct,
    LowRank,
    Scaled,
    rank_of_factors,
)
from fastsd_helpers.checkpoints.lora.statements import find_statements
from fastsd_helpers.errors import CheckpointError

__all__ = ["changed_tensors", "read_change", "read_scales", "refuse_unmergeable"]

_WEIGHT_ROLES = ("down", "hada_", "lokr_", "diff", "w_norm", "on_input")
_BIAS_ROLES = ("bias", "diff_b", "b_norm")
_UNMERGEABLE = {
    "oft": "OFT",
    "boft": "BOFT",
    "scaled_oft": "OFT",
    "rescale": "OFT",
    "a1": "GLoRA",
    "a2": "GLoRA",
    "b1": "GLoRA",
    "b2": "GLoRA",
    "bm": "GLoRA",
    "ia3_l": "peft's IA3",
    "set_weight": "a kind that replaces weights (ComfyUI's set_weight)",
    "reshape_weight": "a kind that changes the shape of weights (reshape_weight)",
}
_DAMAGED = "Download it again, or use an earlier checkpoint of it."


def changed_tensors(module: LoraModule) -> list[str]:
    """Which of the module's tensors it changes: `weight`, `bias`, or both."""
    roles = module.tensors
    found = ["weight"] if any(role.startswith(_WEIGHT_ROLES) and role != "diff_b" for role in roles) else []
    return [*found, "bias"] if any(role in _BIAS_ROLES for role in roles) else found


def refuse_unmergeable(lora: Lora) -> None:
    """Refuse kinds that are not merged.

    Raises:
        CheckpointError: names the kind and the module.
    """
    for module in lora.layout.modules:
        for role, name in module.tensors.items():
            kind = _UNMERGEABLE.get(role) or _UNMERGEABLE.get(role.partition("_")[0])
            if kind is not None:
                raise CheckpointError(
                    f"{module.place} is changed by {kind} ({name!r}), which is not merged: programs compute "
                    "it differently.",
                    "Use it in the web UI as it is; LoRA, LoHa, LoKr, DoRA, IA3 and full differences can be merged.",
                )
        if "scalar" in module.tensors and (read_values(lora.source, module.tensors["scalar"]) != 1).any():
            raise CheckpointError(
                f"{module.place} has a {module.tensors['scalar']!r} that is not 1, which other programs ignore.",
                "Save it again with LyCORIS, which multiplies it in.",
            )
        if not changed_tensors(module):
            raise CheckpointError(
                f"The LoRA has an incomplete layer: {module.place} has only {', '.join(module.tensors.values())}.",
                _DAMAGED,
            )


def read_scales(lora: Lora) -> tuple[tuple[float, ...], list[str]]:
    """What the product of each module's factors counts, alpha / rank; all are read once for it, one at a time.

    Returns:
        One number for each module of the layout, and what a person should know, one sentence each.

    Raises:
        CheckpointError: half a pair, values that are not finite (NaN or Inf), an alpha that is none.
    """
    adapted = []
    for module in lora.layout.modules:
        shapes = {role: lora.source.tensors[name].shape for role, name in module.tensors.items()}
        rank = rank_of_factors(shapes) or _stated_rank(lora, module)
        if rank is not None:
            nothing = "dora_scale" not in module.tensors and _has_zeros(lora, module)
            kernel = bool(set(shapes.get("down", ())[2:]) - {1})
            adapted.append((module, as_adapted(lora, module, rank, kernel=kernel, nothing=nothing)))
    notes = settle_modules(lora, adapted)
    scales = {id(module): one.alpha / one.rank for module, one in adapted}
    return tuple(scales.get(id(module), 1.0) for module in lora.layout.modules), notes


def _stated_rank(lora: Lora, module: LoraModule) -> int | None:
    """Of a Kronecker product of two whole matrices, which no rank can be told from: peft divides by the stated one."""
    config = config_of(lora, module.module.part)
    if not any(role.startswith("lokr_") for role in module.tensors) or "r" not in config or "alpha" in module.tensors:
        return None
    probe = as_adapted(lora, module, 1, kernel=False, nothing=False)
    stated = [one.rank_of(probe) for one in find_statements({}, config, module.module.part)]
    rank = next((one for one in stated if one is not None), None)
    if rank is not None and not (rank >= 1 and rank.is_integer()):
        raise CheckpointError(
            f"The rank of {module.place} is stated as {rank:g}, which is not a positive integer.",
            "Correct adapter_config.json, or save the adapter again.",
        )
    return int(rank) if rank else None


def _has_zeros(lora: Lora, module: LoraModule) -> bool:
    """Whether one of the factors is all zeros, so that the product is."""
    if "down" in module.tensors or "up" in module.tensors:
        layer = read_matrices(lora.source, module.tensors, module.place)
        return not (layer.down.any() and layer.up.any())
    factors = (name for role, name in module.tensors.items() if role.startswith(("hada_", "lokr_")))
    return any(not _read(lora.source, name).any() for name in factors)


def read_change(lora: Lora, module: LoraModule, tensor: str, scale: float, shape: tuple[int, ...]) -> Change:
    """Read what a module adds to its `weight` or `bias`, at strength 1.

    Args:
        scale: what the factors' product counts: alpha / rank.
        shape: that of the model's tensor, as Diffusers has it (or, of a module that covers several, as the original).

    Raises:
        CheckpointError: factors that do not fit each other or the model, that are quantised, or NaN or Inf.
    """
    try:
        change = _bias(lora, module, scale) if tensor == "bias" else _weight(lora, module, scale, shape)
        if _stripped(change.shape) != _stripped(shape) and not _flattened(change.shape, shape):
            raise CheckpointError(
                f"The LoRA changes {module.place}.{tensor} as a tensor of {list(change.shape)}; the model's has "
                f"{list(shape)}.",
                "It was trained for a model with other dimensions: give that model.",
            )
        if tensor == "weight" and "dora_scale" in module.tensors:
            name = module.tensors["dora_scale"]
            lengths = _read(lora.source, name)
            return Decomposed(change, lengths, shape, on_input=_on_input(name, lengths.shape))
    except KeyError as err:
        raise CheckpointError(f"The LoRA has an incomplete layer: {module.place} lacks {err}.", _DAMAGED) from err
    except ValueError as err:
        problem = f"The LoRA's factors of {module.place} do not fit each other: {err}."
        raise CheckpointError(problem, _DAMAGED) from err
    return change


def _weight(lora: Lora, module: LoraModule, scale: float, shape: tuple[int, ...]) -> Change:
    roles = module.tensors
    if "down" in roles or "up" in roles:
        layer = read_matrices(lora.source, roles, module.place)
        return LowRank(layer.up.reshape(len(layer.up), -1), layer.down, scale)
    if any(role.startswith("hada_") for role in roles):
        return HadamardProduct(_factors(lora.source, roles, "hada_"), scale)
    if any(role.startswith("lokr_") for role in roles):
        return KroneckerProduct(_factors(lora.source, roles, "lokr_"), scale)
    if "on_input" in roles:
        factors, on_input = _read(lora.source, roles["weight"]).reshape(-1), bool(_read(lora.source, roles["on_input"]))
        if len(factors) != shape[int(on_input)]:
            raise ValueError(f"{len(factors)} factors for a weight of {list(shape)}")
        return Scaled(shape, factors, on_input)
    return _differences(lora.source, roles["w_norm" if "w_norm" in roles else "diff"])


def _bias(lora: Lora, module: LoraModule, scale: float) -> Change:
    if "bias" in module.tensors:  # peft multiplies it as it does the product
        return _differences(lora.source, module.tensors["bias"], scale)
    return _differences(lora.source, module.tensors["b_norm" if "b_norm" in module.tensors else "diff_b"])


def _differences(source: Source, name: str, scale: float = 1.0) -> Differences:
    """They are as large as the weight: they are read when they are needed, some rows at a time."""
    fact = source.tensors[name]
    require_floats(name, fact.dtype)
    size, width = DTYPE_BYTES[fact.dtype], fact.count // fact.shape[0]

    def read(first: int, last: int) -> np.ndarray:
        values = bytearray((last - first) * width * size)
        source.read_into(name, first * width * size, values)
        made = cast(values, fact.dtype, "F32", owner=lambda: f"The LoRA's tensor {name!r}")
        rows = np.frombuffer(made, "<f4").reshape(last - first, width)
        require_finite(name, rows)
        return rows

    return Differences(fact.shape, read, scale)


def _factors(source: Source, roles: Mapping[str, str], start: str) -> dict[str, np.ndarray]:
    return {role: _read(source, name) for role, name in roles.items() if role.startswith(start)}


def _read(source: Source, name: str) -> np.ndarray:
    dtype = source.tensors[name].dtype
    if not name.endswith("on_input"):
        require_floats(name, dtype)
    values = read_values(source, name)
    require_finite(name, values)
    return values


def _on_input(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a DoRA's lengths belong to the inputs: LyCORIS and OneTrainer write [1, in, ...] and [out, 1, ...].

    peft has one for each output, whatever the shape.
    """
    return "lora_magnitude_vector" not in name and len(shape) > 1 and shape[0] == 1


def _stripped(shape: tuple[int, ...]) -> tuple[int, ...]:
    kept = list(shape)
    while len(kept) > 2 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _flattened(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether it is a convolution's weight with all but the first axis in one, as LyCORIS has it."""
    count = 1
    for size in whole[1:]:
        count *= size
    return shape == (whole[0], count)
