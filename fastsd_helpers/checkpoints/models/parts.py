"""The parts of one model (U-Net, VAE, text encoder), opened together and found complete."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.checkpoints.formats.packed import refuse_packed, refuse_packed_config
from fastsd_helpers.checkpoints.formats.sources import PartGiven, Source, open_source
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, original_recipes
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family, check_shapes, match_names, measure
from fastsd_helpers.errors import CheckpointError

__all__ = ["Parts", "open_parts"]


@dataclass(frozen=True)
class Parts:
    """Open sources whose tensors are exactly those of the family at these widths.

    names: part -> the table's Diffusers name -> the name in the source.
    notes: what was taken off the names or left out, one sentence each.
    change: what is done to the plan of a file, such as merging a LoRA.
    """

    family: Family
    sources: Mapping[str, Source]
    names: Mapping[str, Mapping[str, str]]
    widths: Mapping[str, int]
    notes: tuple[str, ...] = ()
    change: Callable[[dict[str, Recipe]], dict[str, Recipe]] = dict

    def find(self, part: str, name: str) -> tuple[Source, str]:
        """The source that has a tensor of the table, and the name there."""
        return self.sources[part], self.names[part][name]

    def recipes(self, dtype: str) -> dict[str, Recipe]:
        """Plan the single file: original name -> how it is made."""
        return self.change(original_recipes(self.family, self.widths, self.find, dtype))


@contextmanager
def open_parts(family: Family, given: Mapping[str, PartGiven]) -> Iterator[Parts]:
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
        sources: dict[str, Source] = {}
        names, shapes = {}, {}
        notes: list[str] = []
        for part in family.parts:
            opened = open_source(part, given[part])
            stack.callback(opened.close)
            _refuse_packed(part, given[part], opened)
            sources[part] = source = tidy(opened)
            notes += source.notes
            if not source.tensors:
                raise CheckpointError(f"The {PART_WORDS[part]} holds no tensors.", "Give the whole model.")
            names[part] = match_names(family, part, source.tensors)
            shapes[part] = {name: source.tensors[theirs].shape for name, theirs in names[part].items()}
        widths = measure(family, shapes)
        for part in family.parts:
            check_shapes(family, part, shapes[part], widths)
        yield Parts(family, sources, names, widths, tuple(notes))


def _refuse_packed(part: str, given: object, source: Source) -> None:
    """Before names are compared: packed weights have other names too, and that is not what is wrong with them."""
    folder = Path(given) if isinstance(given, (str, Path)) else None
    if folder is not None and folder.is_dir():
        refuse_packed_config(folder)
    refuse_packed(folder or f"The {PART_WORDS[part]}", source.tensors)
