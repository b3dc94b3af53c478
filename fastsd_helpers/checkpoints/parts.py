"""The parts of one model (U-Net, VAE, text encoder), opened together and found complete."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.checkpoints.layout import (
    PART_WORDS,
    Family,
    Row,
    check_shapes,
    expected_shapes,
    match_names,
    measure,
)
from fastsd_helpers.checkpoints.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.sources import Source, open_source
from fastsd_helpers.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPES", "Parts", "cast_dtype", "open_parts", "tensor_bytes"]

DTYPES = {"keep": None, "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Parts:
    """Open sources whose tensors are exactly those of the family at these widths.

    names: part -> the table's Diffusers name -> the name in the source.
    """

    family: Family
    sources: Mapping[str, Source]
    names: Mapping[str, Mapping[str, str]]
    widths: Mapping[str, int]

    def fact(self, row: Row) -> TensorFact:
        """What the source holds for a table row, without reading its values."""
        return self.sources[row.part].tensors[self.names[row.part][row.diffusers]]

    def read(self, row: Row) -> "torch.Tensor":
        """Read a table row's tensor from its source, as it is there, onto the CPU."""
        return self.sources[row.part].read(self.names[row.part][row.diffusers])

    def expected(self, dtype: str) -> dict[str, TensorFact]:
        """List what the single file must hold: original name -> dtype and shape."""
        shapes = expected_shapes(self.family, self.widths)
        return {
            name: TensorFact(cast_dtype(self.fact(self.family.to_diffusers[name]).dtype, dtype), shape)
            for name, shape in shapes.items()
        }


@contextmanager
def open_parts(family: Family, given: "Mapping[str, Path | str | Mapping[str, torch.Tensor]]") -> Iterator[Parts]:
    """Open every part and check names and shapes; the sources close with the `with` block.

    Raises:
        CheckpointError: a part is absent, incomplete, of another family, or does not fit the others.
    """
    if set(given) != set(family.parts):
        wanted = ", ".join(family.parts)
        raise CheckpointError(
            f"The parts given are {', '.join(sorted(given)) or 'none'}; {family.title} has {wanted}.",
            "Give each of them once.",
        )
    with ExitStack() as stack:
        sources, names, shapes = {}, {}, {}
        for part in family.parts:
            sources[part] = source = open_source(part, given[part])
            stack.callback(source.close)
            if not source.tensors:
                raise CheckpointError(f"The {PART_WORDS[part]} holds no tensors.", "Give the whole model.")
            names[part] = match_names(family, part, source.tensors)
            shapes[part] = {name: source.tensors[theirs].shape for name, theirs in names[part].items()}
        widths = measure(family, shapes)
        for part in family.parts:
            check_shapes(family, part, shapes[part], widths)
        yield Parts(family, sources, names, widths)


def cast_dtype(stored: str, wanted: str) -> str:
    """The safetensors dtype a tensor gets in the file: whole numbers are never cast.

    Raises:
        CheckpointError: `wanted` is none of keep, fp32, fp16, bf16.
    """
    if wanted not in DTYPES:
        raise CheckpointError(f"There is no number format {wanted!r}.", f"Choose {', '.join(DTYPES)}.")
    return DTYPES[wanted] or stored if stored in _FLOATS else stored


def tensor_bytes(tensor: "torch.Tensor") -> memoryview:
    """View a CPU tensor's values as bytes, in the order of a contiguous tensor."""
    import torch

    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
