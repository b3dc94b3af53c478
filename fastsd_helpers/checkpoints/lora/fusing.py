"""The matrices of a LoRA where one layer of the original is several of Diffusers: making one of several, and back.

Flux' queries, keys and values are one matrix in Black Forest Labs' code and in kohya's names, and three in Diffusers.
"""

from collections.abc import Sequence

import numpy as np

from fastsd_helpers.checkpoints.lora.layers import Layer, common_dtype
from fastsd_helpers.checkpoints.names.layout import Row
from fastsd_helpers.errors import CheckpointError

__all__ = ["fuse", "split", "swap_halves"]

_DAMAGED = "Download it again, or export it once more."


def fuse(row: Row, given: Sequence[Layer | None], place: str) -> Layer:
    """Several layers of Diffusers as the one of the original: ups along a diagonal, downs under one another.

    Args:
        row: the weight's row of the name table.
        given: one for each of its Diffusers tensors; at least one is there.

    Raises:
        CheckpointError: they do not read the same inputs.
    """
    there = [layer for layer in given if layer is not None]
    if len({layer.down.shape[1:] for layer in there}) > 1 or any(layer.down.ndim != 2 for layer in there):
        shapes = " and ".join(str(list(layer.down.shape)) for layer in there)
        raise CheckpointError(f"The LoRA's matrices of {place} do not fit: {shapes}.", _DAMAGED)
    same = len({layer.scale for layer in there}) == 1
    scale = there[0].scale if same else 1.0
    rank, first = sum(layer.rank for layer in there), 0
    blocks = []
    for layer, height in zip(given, _heights(row, given), strict=True):
        block = np.zeros((height, rank), "<f4")
        if layer is not None:
            up = layer.up.reshape(len(layer.up), -1)
            block[:, first : first + layer.rank] = up if same else up * np.float32(layer.scale)
            first += layer.rank
        blocks.append(block)
    dtype = common_dtype(layer.dtype for layer in there) if same else "F32"
    return Layer(np.concatenate([layer.down for layer in there]), np.concatenate(blocks), scale * rank, dtype)


def _heights(row: Row, given: Sequence[Layer | None]) -> list[int]:
    """How many rows of the fused matrix each layer has; where one is not there, from what the others show."""
    width = next(layer.down.shape[1] for layer in given if layer is not None)
    sizes = {"d": width}
    for layer, symbol in zip(given, row.stacked, strict=True):
        if layer is not None:
            sizes[symbol] = len(layer.up)
    # The inner layers of Flux are four times as wide.
    return [
        len(layer.up) if layer is not None else sizes.get(symbol, 4 * width)
        for layer, symbol in zip(given, row.stacked, strict=True)
    ]


def split(row: Row, layer: Layer, place: str) -> list[Layer | None]:
    """The one layer of the original as those of Diffusers; None for those that it does not change.

    Raises:
        CheckpointError: its rows are not those of the layers it stands for.
    """
    heights = _split_heights(row, layer, place)
    ups = np.split(layer.up.reshape(len(layer.up), -1), np.cumsum(heights)[:-1])
    used = [np.flatnonzero(np.any(up != 0, axis=0)) for up in ups]
    # Where no column serves two layers, they were apart before: each gets its own rank back.
    columns = np.concatenate(used)
    apart = 0 < len(columns) == len(np.unique(columns))
    made: list[Layer | None] = []
    for up, own in zip(ups, used, strict=True):
        if not apart:
            made.append(Layer(layer.down, np.ascontiguousarray(up), layer.alpha, layer.dtype))
        elif len(own):
            narrow = np.ascontiguousarray(up[:, own])
            made.append(Layer(layer.down[own], narrow, layer.scale * len(own), layer.dtype))
        else:
            made.append(None)
    return made


def _split_heights(row: Row, layer: Layer, place: str) -> list[int]:
    width, rows = layer.down.shape[1], len(layer.up)
    others = [symbol for symbol in row.stacked if symbol != "d"]
    rest = rows - width * (len(row.stacked) - len(others))
    if layer.down.ndim != 2 or (rest <= 0 or rest % len(others) if others else rest != 0):
        raise CheckpointError(
            f"The LoRA's matrices of {place} have {width} columns and {rows} rows, which is not the shape of "
            f"{len(row.stacked)} layers in one.",
            _DAMAGED,
        )
    return [width if symbol == "d" else rest // len(others) for symbol in row.stacked]


def swap_halves(layer: Layer, place: str) -> Layer:
    """Flux' last modulation: Diffusers has (scale, shift), the original (shift, scale).

    Raises:
        CheckpointError: an odd number of rows has no halves.
    """
    half, odd = divmod(len(layer.up), 2)
    if odd:
        raise CheckpointError(f"The LoRA's matrices of {place} have {len(layer.up)} rows, an odd number.", _DAMAGED)
    return Layer(layer.down, np.concatenate([layer.up[half:], layer.up[:half]]), layer.alpha, layer.dtype)
