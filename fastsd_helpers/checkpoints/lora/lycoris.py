"""What an adapter of any kind adds to one weight, by the definition of its kind, a few rows of the weight at a time.

A weight is seen as a matrix: its first axis is the rows, all others together (a convolution's kernel) are the columns.
Each kind's factors are small and stay in memory while the weight streams by; what they multiply to never is as a whole.

The scale, alpha / rank, counts once, as peft, AUTOMATIC1111 and ComfyUI read it; LyCORIS' own modules for LoHa and LoKr
multiply by it twice (LyCORIS 4.1), which is the same where alpha is the rank.

Source: KohakuBlueleaf/LyCORIS lycoris/functional/ and lycoris/modules/; peft/tuners/lora/dora.py, loha/ and lokr/;
Hu et al. 2021 (LoRA), Hyeon-Woo et al. 2021 (LoHa), Edalati et al. 2022 (KronA), Liu et al. 2024 (DoRA).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = [
    "Change",
    "Decomposed",
    "Differences",
    "HadamardProduct",
    "KroneckerProduct",
    "LowRank",
    "Scaled",
    "rank_of_factors",
]

# A weight's own rows, as the model has them: (first, last) -> float32 [last - first, columns].
Weights = Callable[[int, int], np.ndarray]


class Change(ABC):
    """What is added to a weight at strength 1; `shape` is that of the weight it is meant for: [out, in, ...]."""

    shape: Any  # a field or a property

    @abstractmethod
    def rows(self, first: int, last: int, weights: Weights) -> np.ndarray:
        """float32 [last - first, columns], the caller's own; `weights` gives the weight's rows, if asked."""

    def add(self, values: np.ndarray, first: int, strength: float, weights: Weights) -> None:
        """Add `strength` times the rows from `first` on to `values`, floats [rows, columns]."""
        added = self.rows(first, first + len(values), weights)
        added *= np.float32(strength)
        values += added


@dataclass(frozen=True)
class LowRank(Change):
    """LoRA and LoCon: `scale * up @ down`.

    up: float32 [out, rank].
    down: float32 [rank, in] or [rank, in, height, width]; Tucker's middle factor is multiplied in.
    """

    up: np.ndarray
    down: np.ndarray
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in, ...]"""
        return len(self.up), *self.down.shape[1:]

    def rows(self, first: int, last: int, _weights: Weights) -> np.ndarray:
        made = np.zeros((last - first, self.down[0].size), "<f4")
        self.add(made, first, 1.0, _weights)
        return made

    def add(self, values: np.ndarray, first: int, strength: float, _weights: Weights) -> None:
        # A few rows at a time: what was multiplied is still in a processor's cache when it is added.
        up = self.up[first : first + len(values)] * np.float32(self.scale * strength)
        for place, strip in _strips(up, self.down.reshape(len(self.down), -1)):
            values[place] += strip


class HadamardProduct(Change):
    """LoHa: `scale * (w1_a @ w1_b) * (w2_a @ w2_b)`, value by value.

    Args:
        factors: hada_w1_a [out, rank], hada_w1_b [rank, in], and w2 alike. In Tucker form hada_t1 [rank, rank, height,
            width] stands between them, and the outer ones are [rank, out] and [rank, in].
    """

    def __init__(self, factors: Mapping[str, np.ndarray], scale: float) -> None:
        self._pairs = [_pair(factors, f"hada_w{n}_a", f"hada_w{n}_b", f"hada_t{n}") for n in "12"]
        self._scale = scale
        (left, inner), (other_left, other_inner) = self._pairs
        if len(left) != len(other_left) or inner.shape[1:] != other_inner.shape[1:]:
            raise ValueError(_shapes(factors))

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in, ...]"""
        left, inner = self._pairs[0]
        return len(left), *inner.shape[1:]

    def rows(self, first: int, last: int, _weights: Weights) -> np.ndarray:
        one, other = (_product(left[first:last], inner.reshape(len(inner), -1)) for left, inner in self._pairs)
        one *= other
        one *= np.float32(self._scale)
        return one


class KroneckerProduct(Change):
    """LoKr: `scale * kron(w1, w2)`, each of the two whole or a product of narrower factors.

    Args:
        factors: lokr_w1 [a, c] or lokr_w1_a [a, rank] and lokr_w1_b [rank, c]; lokr_w2 [b, d, ...] or lokr_w2_a and
            lokr_w2_b, in Tucker form with lokr_t2 as LoHa's. The weight is [a * b, c * d, ...].
    """

    def __init__(self, factors: Mapping[str, np.ndarray], scale: float) -> None:
        self._left = _whole(factors, "lokr_w1", scale)
        self._right = _whole(factors, "lokr_w2", 1.0)
        if self._left.ndim != 2 or self._right.ndim < 2:
            raise ValueError(_shapes(factors))

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in, ...]"""
        (high, wide), (low, narrow, *kernel) = self._left.shape, self._right.shape
        return high * low, wide * narrow, *kernel

    def rows(self, first: int, last: int, _weights: Weights) -> np.ndarray:
        places = np.arange(first, last)
        left = self._left[places // len(self._right)]
        right = self._right.reshape(len(self._right), -1)[places % len(self._right)]
        return (left[:, :, None] * right[:, None, :]).reshape(last - first, -1)


@dataclass(frozen=True)
class Differences(Change):
    """Full weight differences, and those of biases and norm layers: they are added as they are.

    read: rows of them, as `Weights`.
    """

    shape: tuple[int, ...]
    read: Weights
    scale: float = 1.0

    def rows(self, first: int, last: int, _weights: Weights) -> np.ndarray:
        return self.read(first, last) * np.float32(self.scale)


@dataclass(frozen=True)
class Scaled(Change):
    """IA3: the weight's own rows or columns, multiplied.

    factors: float32 [out] or, with `on_input`, [in].
    """

    shape: tuple[int, ...]
    factors: np.ndarray
    on_input: bool

    def rows(self, first: int, last: int, weights: Weights) -> np.ndarray:
        own = weights(first, last)
        if not self.on_input:
            return own * self.factors[first:last, None]
        return (own.reshape(last - first, len(self.factors), -1) * self.factors[None, :, None]).reshape(own.shape)


class Decomposed(Change):
    """DoRA around another change: the changed weight is brought to trained lengths, per output or per input.

    `magnitude * (W + change) / norm(W + change) - W`, with the norm over all but one axis.

    Args:
        magnitude: float32, one number for each row or, with `on_input`, for each of the second axis.
        shape: that of the weight.
    """

    def __init__(self, change: Change, magnitude: np.ndarray, shape: tuple[int, ...], *, on_input: bool) -> None:
        self._change, self._magnitude, self._on_input = change, magnitude.reshape(-1), on_input
        self.shape = shape
        self._factors: np.ndarray | None = None
        if len(self._magnitude) != shape[int(on_input)]:
            raise ValueError(f"{len(self._magnitude)} lengths for a weight of {list(shape)}")

    def rows(self, first: int, last: int, weights: Weights) -> np.ndarray:
        own = weights(first, last)
        changed = own + self._change.rows(first, last, weights)
        if self._on_input:
            if self._factors is None:
                self._factors = self._magnitude / self._norms(weights)
            split = changed.reshape(last - first, len(self._factors), -1) * self._factors[None, :, None]
            return split.reshape(own.shape) - own
        norms = np.sqrt(np.einsum("ij,ij->i", changed, changed, dtype="<f8"))
        factors = (self._magnitude[first:last] / (norms + _EPSILON)).astype("<f4")
        return changed * factors[:, None] - own

    def _norms(self, weights: Weights) -> np.ndarray:
        """The length of what each input is multiplied with; the whole weight is read once for it, in pieces."""
        height, width, *_ = self.shape
        total, step = np.zeros(width), max(1, _BLOCK // max(1, self._columns()))
        for first in range(0, height, step):
            last = min(first + step, height)
            block = weights(first, last) + self._change.rows(first, last, weights)
            block = block.reshape(last - first, width, -1)
            total += np.einsum("ijk,ijk->j", block, block, dtype="<f8")
        return (np.sqrt(total) + _EPSILON).astype("<f4")

    def _columns(self) -> int:
        count = 1
        for size in self.shape[1:]:
            count *= size
        return count


_EPSILON = 2.0**-23  # LyCORIS adds it, so that rows of zeros stay zeros
_BLOCK = 1 << 20  # values


# What OpenBLAS, which numpy brings, multiplies in the thread that asks: several threads ask here at the same time, and
# its own, of which each asks for all processors, then wait for one another (ten times as long on a busy machine).
_ALONE = 1 << 18  # rows * columns * rank
_ALONE_IN_A_ROW = 1 << 13
_STRIP_ROWS = 32


def _product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """`left @ right`, float32 [rows, columns], tile by tile."""
    made = np.empty((len(left), right.shape[1]), "<f4")
    for place, strip in _strips(left, right):
        made[place] = strip
    return made


def _strips(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """`left @ right`, a few rows at a time: which they are, and their float32 values, until the next are asked for."""
    (height, rank), width = left.shape, right.shape[1]
    rows = min(height, max(_STRIP_ROWS, _ALONE // max(1, rank * width)))
    columns = max(16, (_ALONE if rows > 1 else _ALONE_IN_A_ROW) // max(1, rows * rank))
    spare = np.empty((rows, width), "<f4")
    for first in range(0, height, rows):
        factors, strip = left[first : first + rows], spare[: height - first]
        for start in range(0, width, columns):
            end = start + columns
            np.matmul(factors, right[:, start:end], out=strip[:, start:end])
        yield slice(first, first + rows), strip


def rank_of_factors(factors: Mapping[str, tuple[int, ...]]) -> int | None:
    """The rank that an alpha is divided by, from the shapes of its factors; None where LyCORIS divides by none.

    A Kronecker product of two whole matrices has no rank. Where both are products, the second's counts.
    """
    for name in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if name in factors:
            return factors[name][0]
    return None


def _pair(factors: Mapping[str, np.ndarray], outer: str, inner: str, middle: str) -> tuple[np.ndarray, np.ndarray]:
    """A product as [out, rank] and [rank, in, ...]; Tucker's middle factor is multiplied into the second."""
    left, right = factors[outer], factors[inner]
    if middle in factors:
        left, right = left.T, np.einsum("ij...,jr->ir...", factors[middle], right)
    left = left.reshape(len(left), -1)
    if left.shape[1] != len(right) or right.ndim < 2:
        raise ValueError(_shapes(factors))
    return left, right


def _whole(factors: Mapping[str, np.ndarray], name: str, scale: float) -> np.ndarray:
    if name in factors:
        return factors[name] * np.float32(scale)
    left, right = _pair(factors, f"{name}_a", f"{name}_b", name.replace("w", "t"))
    made = (left @ right.reshape(len(right), -1)) * np.float32(scale)
    return made.reshape(len(left), *right.shape[1:])


def _shapes(factors: Mapping[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {list(values.shape)}" for name, values in factors.items())
