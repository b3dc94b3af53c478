"""A single file opened for conversion: its family known, every name accounted for, every shape checked."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fastsd_helpers.checkpoints.formats.packed import refuse_small_floats
from fastsd_helpers.checkpoints.formats.prediction import MARKS
from fastsd_helpers.checkpoints.formats.sources import Source, open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, copied, part_recipes
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family, check_original, match_original, measure_original
from fastsd_helpers.errors import CheckpointError

__all__ = ["SingleFile", "averaged_names", "open_single"]

_AVERAGES = "model_ema."


@dataclass(frozen=True)
class SingleFile:
    """An open file whose tensors are exactly those of the family at these widths.

    names: original name of the table -> the name in the source.
    notes: what was chosen or left out, one sentence each.
    change: what is done to every plan, such as merging a LoRA; `metadata` is what a header then says of it.
    """

    family: Family
    source: Source
    names: Mapping[str, str]
    widths: Mapping[str, int]
    notes: tuple[str, ...]
    change: Callable[[dict[str, Recipe]], dict[str, Recipe]] = dict
    metadata: Mapping[str, str] = field(default_factory=dict)

    def part(self, part: str, dtype: str, *, prefix: str = "") -> dict[str, Recipe]:
        """Plan one part of a Diffusers folder: name -> how it is made."""
        widths, source, names = self.widths, self.source, self.names
        return self.change(part_recipes(self.family, part, widths, source, names, dtype, prefix=prefix))

    def whole(self, dtype: str) -> dict[str, Recipe]:
        """Plan another single file in the table's own names; extras of the family are kept."""
        recipes = {name: copied(self.source, theirs, dtype) for name, theirs in self.names.items()}
        for name in self.source.tensors:
            if self.family.is_extra(name):
                recipes[name] = copied(self.source, name, dtype)
        return self.change(recipes)


@contextmanager
def open_single(path: Path, key: str, *, ema: bool = True, dtype: str = "keep") -> Iterator[SingleFile]:
    """Open a file of a known family; it closes with the `with` block.

    Args:
        ema: take the averaged weights (`model_ema.`) where the file has them.

    Raises:
        CheckpointError: an unknown, missing or misshapen tensor; 8-bit weights with `keep`.
    """
    family = find_family(key)
    opened = open_file(path)
    try:
        source = tidy(opened)
        notes = (*source.notes, *refuse_small_floats(path, source, dtype))
        plain = [name for name in source.tensors if not name.startswith(_AVERAGES)]
        found, unknown = match_original(family, plain)
        if unknown:
            raise CheckpointError(
                f"{path} has a tensor {unknown[0]!r} that {family.title} does not have"
                + (f" (and {len(unknown) - 1} more)." if len(unknown) > 1 else "."),
                "Give a plain model: without an adapter or a second model in the same file.",
            )
        notes += _left_out(family, plain)
        averages = {name for name in source.tensors if name.startswith(_AVERAGES)}
        notes += _use_averages(family, found, averages, ema)
        present = {family.to_diffusers[name].part for name in found}
        lacking = " and no ".join(PART_WORDS[part] for part in family.parts if part not in present)
        if lacking:
            raise CheckpointError(
                f"{path} is a file of {family.title} that has no {lacking}.",
                "Give the complete model; web UIs load this one if the missing part is selected too.",
            )
        shapes = {name: source.tensors[theirs].shape for name, theirs in found.items()}
        widths = measure_original(family, shapes)
        check_original(family, shapes, widths)
        yield SingleFile(family, source, found, widths, notes)
    finally:
        opened.close()


def _left_out(family: Family, names: list[str]) -> tuple[str, ...]:
    """A note on what the file has and nothing that reads models needs."""
    gone = sorted(
        name for name in names if family.is_left_out(name) and not family.is_extra(name) and name not in MARKS
    )
    if not gone:
        return ()
    shown = ", ".join(gone[:3]) + (", ..." if len(gone) > 3 else "")
    return (f"{len(gone)} tensors that no program needs for inference were left out: {shown}.",)


def averaged_names(family: Family) -> dict[str, str]:
    """Name of an averaged U-Net weight in old training checkpoints -> the table's original name.

    Source: LitEma in CompVis/stable-diffusion ldm/modules/ema.py, which takes the dots out of the names.
    """
    return {
        _AVERAGES + row.original.removeprefix("model.").replace(".", ""): row.original
        for row in family.rows
        if row.part == "unet"
    }


def _use_averages(family: Family, found: dict[str, str], averages: set[str], ema: bool) -> tuple[str, ...]:
    known = averaged_names(family)
    usable = {original: name for name, original in known.items() if name in averages}
    unknown = sorted(averages - known.keys() - {"model_ema.decay", "model_ema.num_updates"})
    if not usable:
        return ()
    if not ema:
        return (f"{len(usable)} EMA weights were left out.",)
    lacking = sorted(name for name in found if name.startswith("model.diffusion_model.") and name not in usable)
    if unknown or lacking:
        raise CheckpointError(
            f"The EMA weights are not complete: {(unknown or lacking)[0]!r} has no counterpart.",
            "Leave them out with --no-ema.",
        )
    found.update(usable)
    return (f"{len(usable)} EMA weights were used instead of the last ones.",)
