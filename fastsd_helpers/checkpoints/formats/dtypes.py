"""Dtypes of tensors: which there are, and changing one into another without torch.

Rounding is to the nearest, ties to even, as torch rounds: bit for bit, subnormals included. A not-a-number stays one;
which of them depends, in torch, on the processor. It works on pieces of a tensor, so that memory never holds more than
one piece.
"""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints.formats.half_floats import half_floats
from fastsd_helpers.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CKPT_STORAGES",
    "CODE_BITS",
    "DTYPES",
    "DTYPE_BYTES",
    "FLOATS",
    "OF_TORCH",
    "cast",
    "cast_dtype",
    "count_not_finite",
    "is_small_float",
]

DTYPES = {"keep": None, "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
# safetensors' name -> bytes of a value, torch's name, and that of a .ckpt file's storage, which has no others.
_TABLE = {
    "F64": (8, "float64", "DoubleStorage"),
    "F32": (4, "float32", "FloatStorage"),
    "F16": (2, "float16", "HalfStorage"),
    "BF16": (2, "bfloat16", "BFloat16Storage"),
    "F8_E4M3": (1, "float8_e4m3fn", ""),
    "F8_E5M2": (1, "float8_e5m2", ""),
    "I64": (8, "int64", "LongStorage"),
    "I32": (4, "int32", "IntStorage"),
    "I16": (2, "int16", "ShortStorage"),
    "I8": (1, "int8", "CharStorage"),
    "U64": (8, "uint64", ""),
    "U32": (4, "uint32", ""),
    "U16": (2, "uint16", ""),
    "U8": (1, "uint8", "ByteStorage"),
    "BOOL": (1, "bool", "BoolStorage"),
}
DTYPE_BYTES = {name: size for name, (size, _torch, _storage) in _TABLE.items()}
# Formats of quantized files, which are told and never read: bits of a value.
CODE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
CKPT_STORAGES = {name: storage for name, (_size, _torch, storage) in _TABLE.items() if storage}
OF_TORCH = {torch: name for name, (_size, torch, _storage) in _TABLE.items()}
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38, "F32": 3.4028234663852886e38}
# The bits of the smallest fp32 that rounds to infinity, as whole numbers, which sort as the values do.
_TOO_LARGE = {"F16": 0x477FF000, "BF16": 0x7F7F8000}
_INFINITE = 0x7F800000
# Values rounded at a time: what that takes stays in a processor's own cache, and is not asked of the system anew.
_BLOCK = 1 << 18
_MANY = 1 << 16  # values from which a piece is of a model large enough to import OpenCV for
_scratch = threading.local()


def cast_dtype(stored: str, wanted: str) -> str:
    """The safetensors dtype a tensor gets in the file: whole numbers are never cast.

    Raises:
        CheckpointError: `wanted` is none of keep, fp32, fp16, bf16.
    """
    if wanted not in DTYPES:
        raise CheckpointError(f"There is no dtype {wanted!r}.", f"Choose {', '.join(DTYPES)}.")
    return DTYPES[wanted] or stored if stored in FLOATS else stored


def is_small_float(dtype: str) -> bool:
    """Whether it is one of the 8-bit formats, which no checkpoint layout of these families has."""
    return dtype.startswith("F8_")


def cast(
    values: Any, stored: str, wanted: str, *, owner: Callable[[], str], finite: bool = False, out: Any = None
) -> Any:
    """Change a piece of a tensor into another dtype.

    Args:
        values: the bytes of the piece, little endian; a buffer.
        stored: safetensors' dtype names.
        wanted: safetensors' dtype names.
        owner: who is named when a value does not fit, such as "The VAE's tensor 'a'".
        finite: also refuse values that are infinite or not a number.
        out: a buffer of the result's size or more, which a 16-bit result is written to instead of a new one.

    Returns:
        A buffer with the piece in the new format; `values` itself where nothing changes.

    Raises:
        CheckpointError: a value becomes infinite; or with `finite`, is NaN or Inf.
    """
    if stored == wanted and not (finite and stored in FLOATS):
        return values
    if finite and count_not_finite(values, stored):
        raise CheckpointError(
            f"{owner()} contains NaN or Inf.",
            "Export an earlier checkpoint, or resume training from it with a lower learning rate.",
        )
    if stored == wanted:
        return values
    wide = _to_fp32(values, stored, wanted, owner)
    if wanted == "F32":
        return wide
    return _to_16_bits(wide, wanted, owner, out)


def count_not_finite(values: Any, stored: str) -> int:
    """How many values of a piece are infinite or not a number; 0 for whole numbers."""
    import numpy as np

    if stored in ("F64", "F32"):
        return int(np.count_nonzero(~np.isfinite(np.frombuffer(values, "<f8" if stored == "F64" else "<f4"))))
    masks = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F8_E5M2": ("u1", 0x7C)}
    if stored in masks:
        layout, exponent = masks[stored]
        bits = np.frombuffer(values, layout)
        return int(np.count_nonzero((bits & exponent) == exponent))
    if stored == "F8_E4M3":  # it has no infinity, and one not-a-number of either sign
        return int(np.count_nonzero((np.frombuffer(values, "u1") & 0x7F) == 0x7F))
    return 0


def _to_fp32(values: Any, stored: str, wanted: str, owner: Callable[[], str]) -> "np.ndarray":
    import numpy as np

    if stored == "F32":
        return np.frombuffer(values, "<f4")
    if stored == "F16":
        return _from_fp16(np.frombuffer(values, "<u2"))
    if stored == "BF16":
        bits = np.frombuffer(values, "<u2").astype("<u4")
        bits <<= 16
        return bits.view("<f4")
    if is_small_float(stored):
        return _small_floats(stored)[np.frombuffer(values, "u1")]
    wide = np.frombuffer(values, "<f8")
    with np.errstate(over="ignore"):
        narrow = wide.astype("<f4")
    if (np.isinf(narrow) & np.isfinite(wide)).any():
        raise _too_large(wide[np.isfinite(wide)], wanted, owner)
    return narrow


def _from_fp16(bits: "np.ndarray") -> "np.ndarray":
    import numpy as np

    if bits.size >= _MANY and (bits & 0x7FFF).max() < 0x7C00 and (faster := half_floats()) is not None:
        wide = np.empty(bits.size, "<f4")
        faster.widen(bits, wide)
        return wide
    return bits.view("<f2").astype("<f4")


def _small_floats(stored: str) -> "np.ndarray":
    """All 256 values of an 8-bit format. Source: OCP 8-bit Floating Point Specification, revision 1.0."""
    import numpy as np

    codes = np.arange(256, dtype=np.int64)
    mantissa_bits = 3 if stored == "F8_E4M3" else 2
    bias = 7 if stored == "F8_E4M3" else 15
    exponent, mantissa = (codes & 0x7F) >> mantissa_bits, codes & ((1 << mantissa_bits) - 1)
    fraction = mantissa / (1 << mantissa_bits)
    values = np.where(exponent == 0, fraction * 2.0 ** (1 - bias), (1 + fraction) * 2.0 ** (exponent - bias))
    if stored == "F8_E4M3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[(codes & 0x7F) == 0x7C] = np.inf
        values[(codes & 0x7F) > 0x7C] = np.nan
    return np.where(codes & 0x80, -values, values).astype("<f4")


def _to_16_bits(wide: "np.ndarray", wanted: str, owner: Callable[[], str], out: Any) -> "np.ndarray":
    import numpy as np

    narrow = np.empty(wide.size, "<u2") if out is None else np.frombuffer(out, "<u2", wide.size)
    if wanted == "F16" and wide.size >= _MANY and (faster := half_floats()) is not None:
        faster.narrow(wide, narrow)
        # Neither infinite nor not-a-number, before or afterwards; of either sign, and without another array.
        if narrow.max() < 0xFC00 and narrow.view("<i2").max() < 0x7C00:
            return narrow
    if not hasattr(_scratch, "arrays"):
        _scratch.arrays = np.empty((2, _BLOCK), "<u4")
    for first in range(0, wide.size, _BLOCK):
        block, made = wide[first : first + _BLOCK], narrow[first : first + _BLOCK]
        magnitude, rounded = _scratch.arrays[:, : block.size]
        np.bitwise_and(block.view("<u4"), 0x7FFFFFFF, out=magnitude)
        largest = magnitude.max()
        if largest >= _TOO_LARGE[wanted] and ((magnitude >= _TOO_LARGE[wanted]) & (magnitude < _INFINITE)).any():
            raise _too_large(wide[np.isfinite(wide)], wanted, owner)
        to_half = _to_bf16 if wanted == "BF16" else _to_fp16
        to_half(block, made, magnitude > _INFINITE if largest > _INFINITE else None, rounded)
    return narrow


def _too_large(finite: "np.ndarray", wanted: str, owner: Callable[[], str]) -> CheckpointError:
    choice = "fp32" if wanted != "F32" else "keep"
    return CheckpointError(
        f"{owner()} reaches {float(abs(finite).max()):.3g}; {_TABLE[wanted][1]} ends at {_LARGEST[wanted]:.3g}.",
        f"Choose {choice}.",
    )


def _to_bf16(wide: "np.ndarray", narrow: "np.ndarray", strange: "np.ndarray | None", rounded: "np.ndarray") -> None:
    """Round a block; `strange` tells which values are none, `rounded` is as long and free to use."""
    import numpy as np

    bits = wide.view("<u4")
    # Half of what is cut off, or a little less where the digit before it is even: ties go to the even one.
    np.right_shift(bits, 16, out=rounded)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    np.copyto(narrow, rounded, casting="unsafe")
    if strange is not None:
        narrow[strange] = 0xFFFF  # what torch's vector instructions write for every one of them


def _to_fp16(wide: "np.ndarray", narrow: "np.ndarray", strange: "np.ndarray | None", _rounded: "np.ndarray") -> None:
    import numpy as np

    with np.errstate(under="ignore", invalid="ignore"):
        np.copyto(narrow.view("<f2"), wide, casting="same_kind")
    if strange is not None:
        # As processors do: sign and upper digits stay, and it is a quiet one.
        bits = wide.view("<u4")[strange]
        narrow[strange] = ((bits >> 16) & 0x8000) | 0x7E00 | ((bits >> 13) & 0x3FF)
