"""Merging adapters into a model while it is converted: which, how strongly, and what is said of it.

The result is `W + strength * change` for each of them, computed in fp32 from the model's own weights, so that the order
in which several are given makes no difference.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from fastsd_helpers.checkpoints.formats.sources import Source, open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe
from fastsd_helpers.checkpoints.given import identify
from fastsd_helpers.checkpoints.lora.changes import changed_tensors, read_change, read_scales, refuse_unmergeable
from fastsd_helpers.checkpoints.lora.layers import Lora, open_lora
from fastsd_helpers.checkpoints.lora.layouts import LORA_FILE, LoraModule, is_lora, is_lora_folder, read_layout
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.models.merge_places import Tensor, find_in_parts, find_in_single, spans_of
from fastsd_helpers.checkpoints.models.merged_source import Addition, Merged
from fastsd_helpers.checkpoints.models.parts import Parts
from fastsd_helpers.checkpoints.models.single_file import SingleFile
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family, match_names
from fastsd_helpers.errors import CheckpointError, ModelError
from fastsd_helpers.model_lookup import how_to_get, require_inert

__all__ = ["Adapter", "Merging", "open_adapters"]

Change = Callable[[Mapping[str, Recipe]], dict[str, Recipe]]

# Which LoRA fit the parts that are files of their own.
_FAMILIES_OF_PARTS = {
    "clip-l": ("sd15", "sdxl", "flux"),
    "clip-h": ("sd21",),
    "clip-g": ("sdxl",),
    "t5": ("flux",),
}
_FORM = "Write --merge LORA or --merge LORA:0.7, with the path of the LoRA before the last colon."


@dataclass(frozen=True)
class Adapter:
    """An open LoRA that will be merged.

    scales: what each of its modules' factors count, alpha / rank.
    """

    path: Path
    strength: float
    lora: Lora
    scales: tuple[float, ...]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ what is asked for


def open_adapters(asked: Iterable[str], stack: ExitStack) -> tuple[Adapter, ...]:
    """Open every `LORA[:strength]`; `stack` closes them.

    Raises:
        CheckpointError: there is no such file, it is not an adapter or one that is not merged, or the strength is not a
            number other than 0.
    """
    adapters = [_open_adapter(*_read_request(str(text)), stack) for text in asked]
    for place, adapter in enumerate(adapters):
        same = [one for one in adapters[:place] if one.path.samefile(adapter.path)]
        if same:
            together = adapter.strength + sum(one.strength for one in same)
            note = f"{adapter.path.name} is given {len(same) + 1} times: the combined strength is {together:g}."
            adapters[place] = replace(adapter, notes=(*adapter.notes, note))
    return tuple(adapters)


def _read_request(text: str) -> tuple[Path, float]:
    if not text.strip():
        raise CheckpointError("--merge names no LoRA.", _FORM)
    whole = Path(text).expanduser()
    head, colon, tail = text.rpartition(":")
    named = Path(head).expanduser() if colon and head else None
    strength = _number(tail)
    if whole.exists():
        if named is not None and strength is not None and named.exists():
            raise CheckpointError(
                f"{text!r} is ambiguous: there is {named} and {whole.name}.",
                f"Write {text}:1 for the latter, or another form of the number, such as {head}:{strength:.3f}.",
            )
        return whole, 1.0
    if named is None or (strength is None and not named.exists()):
        raise CheckpointError(f"There is no LoRA at {whole}.", how_to_get(whole))
    if strength is None:
        comma = " with a dot, such as 0.7" if "," in tail else ", such as 0.7"
        raise CheckpointError(
            f"The strength {tail!r} of {named.name} is not a number.", f"Write a number{comma}. {_FORM}"
        )
    if not named.exists():
        raise CheckpointError(f"There is no LoRA at {named}.", how_to_get(named))
    if not math.isfinite(strength):
        raise CheckpointError(f"The strength of {named.name} is {tail}.", f"Write a number, such as 0.7. {_FORM}")
    if strength == 0:
        raise CheckpointError(f"The strength of {named.name} is 0: nothing would be merged.", f"Omit it. {_FORM}")
    return named, strength


def _number(text: str) -> float | None:
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def _open_adapter(path: Path, strength: float, stack: ExitStack) -> Adapter:
    require_inert([path])
    path, notes_of_path = _adapter_at(path)
    try:
        lora = open_lora(path, stack)
        refuse_unmergeable(lora)
        scales, notes = read_scales(lora)
    except CheckpointError as err:
        named = path.name in err.problem
        raise CheckpointError(err.problem if named else f"{path.name}: {err.problem}", err.hint) from err
    said = [*notes_of_path, *(f"{path.name}: {note}" for note in notes)]
    if strength < 0:
        said.append(f"{path.name}: the strength {strength:g} is negative: it has the opposite effect.")
    return Adapter(path, strength, lora, scales, tuple(said))


def _adapter_at(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder or file that is read as a LoRA, and what was chosen; a folder may hold one under a name of its own."""
    notes: tuple[str, ...] = ()
    if path.is_dir():
        if is_lora_folder(path):
            return path, notes
        try:
            given = identify(path)
        except ModelError:
            given = None
        if given is None or given.what != "file":
            raise CheckpointError(
                f"{path} is a folder without a LoRA: it has neither {LORA_FILE} nor adapter_model.safetensors.",
                "Give the LoRA's file.",
            )
        path, notes = given.path, given.notes
    source = open_file(path)
    try:
        if not is_lora(source.tensors):
            raise CheckpointError(
                f"{path} is {detect(source.tensors).words}, not a LoRA: it cannot be merged into a model.",
                "Give a LoRA, LoHa, LoKr or DoRA.",
            )
    finally:
        source.close()
    return path, notes


# ------------------------------------------------------------------------------------------------ where they belong


class Merging:
    """Adapters on their way into one model.

    Attributes:
        notes: what a person should know, one sentence each; more come as models are opened.

    Args:
        base: the model's name, for the header of the result.
    """

    def __init__(self, adapters: Sequence[Adapter] = (), base: str = "") -> None:
        self.adapters, self._base = tuple(adapters), base
        self.notes: list[str] = []

    def __bool__(self) -> bool:
        return bool(self.adapters)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files they are read from."""
        return tuple(file for adapter in self.adapters for file in adapter.lora.source.files)

    def into_parts(self, opened: Parts) -> Parts:
        """An opened Diffusers folder whose plan has the changed weights."""
        return replace(opened, change=self._plan(opened.family, partial(find_in_parts, opened))) if self else opened

    def into_single(self, single: SingleFile) -> SingleFile:
        """An opened single file whose plans have the changed weights."""
        if not self:
            return single
        change = self._plan(single.family, partial(find_in_single, single))
        return replace(single, change=change, metadata=self.metadata(single.source.metadata))

    def into_sources(self, family: Family, sources: Mapping[str, Source]) -> Change:
        """What changes the plan of a folder whose parts were not opened as one model (part -> its tensors)."""
        names = {part: match_names(family, part, source.tensors) for part, source in sources.items()}
        opened = Parts(replace(family, parts=tuple(sources)), sources, names, {})
        return self._plan(opened.family, partial(find_in_parts, opened))

    def _plan(self, family: Family, find: Callable[[str, str], Tensor | None]) -> Change:
        merged = Merged()
        for adapter in (_for_family(one, family) for one in self.adapters):
            self.notes += [*adapter.notes, *_add(adapter, family, find, merged)]
        return merged.recipes

    def metadata(self, before: Mapping[str, str]) -> dict[str, str]:
        """What the header of the result says of where it comes from.

        Source: the ModelSpec standard, Stability-AI/ModelSpec: `merged_from`, names with commas between them.

        Args:
            before: the header's strings of the model, which may be a merge itself.
        """
        if not self:
            return {}
        names = [before.get("modelspec.merged_from") or _plain(before.get("modelspec.title") or self._base)]
        names += [_plain(one.lora.source.metadata.get("modelspec.title") or one.path.stem) for one in self.adapters]
        try:
            earlier = json.loads(before.get("fastsd.merged") or "[]")
        except (ValueError, RecursionError):
            earlier = []
        own = [
            {"lora": one.path.name, "strength": one.strength, "kind": one.lora.layout.words} for one in self.adapters
        ]
        return {
            "modelspec.merged_from": ", ".join(names),
            "fastsd.merged": json.dumps([*(earlier if isinstance(earlier, list) else []), *own]),
        }


def _plain(name: str) -> str:
    return name.replace(",", " ").strip()


def _for_family(adapter: Adapter, family: Family) -> Adapter:
    """The adapter as one of the model's family; a LoRA of a text encoder alone may fit several."""
    fits = _FAMILIES_OF_PARTS.get(family.key) or (family.key.removesuffix("-inpaint").removesuffix("-all-in-one"),)
    if adapter.lora.layout.family in fits:
        return adapter
    source = adapter.lora.source
    for key in fits:
        layout = read_layout(source.tensors, source.metadata, family=key)
        if layout.family == key:
            return replace(adapter, lora=replace(adapter.lora, layout=layout))
    raise CheckpointError(
        f"{adapter.path.name} is {adapter.lora.layout.words}; the model is {family.title}.",
        "Give a LoRA and a model of the same family.",
    )


def _add(adapter: Adapter, family: Family, find: Callable[[str, str], Tensor | None], merged: Merged) -> Iterator[str]:
    """Plan every change of an adapter; gives what a person should know."""
    absent: Counter[str] = Counter()
    for module, scale in zip(adapter.lora.layout.modules, adapter.scales, strict=True):
        if module.module.part not in family.parts:
            absent[module.module.part] += 1
            continue
        for tensor in changed_tensors(module):
            merged.add(_addition(adapter, module, tensor, scale, find))
    words = " and ".join(f"the {PART_WORDS[part]} ({count} layers)" for part, count in absent.items())
    if absent.total() == len(adapter.scales):
        raise CheckpointError(
            f"{adapter.path.name} changes {words}, and nothing in {family.title}.",
            "Give a model that has it: a whole Diffusers folder, or that part alone.",
        )
    yield (
        f"{adapter.path.name} was merged with strength {adapter.strength:g}: "
        f"{len(adapter.scales) - absent.total()} layers."
    )
    if absent:
        yield (
            f"{adapter.path.name} also changes {words}, which this file does not hold: merge it into that part too, "
            "with the same strength."
        )


def _addition(
    adapter: Adapter, module: LoraModule, tensor: str, scale: float, find: Callable[[str, str], Tensor | None]
) -> Addition:
    found: list[Tensor] = []
    for path in module.module.paths if module.fused else (module.path,):
        one = find(module.module.part, f"{path}.{tensor}")
        if one is None:
            raise CheckpointError(
                f"{adapter.path.name} changes {module.module.part}.{path}.{tensor}, which this model does not have.",
                "Give the model that it was trained for.",
            )
        found.append(one)
    shape = (sum(one.shape[0] for one in found), *found[0].shape[1:])
    build = partial(read_change, adapter.lora, module, tensor, scale, shape)
    try:
        build()  # looked at before anything is written, and let go of: it is read again when its turn comes
    except CheckpointError as err:
        raise CheckpointError(f"{adapter.path.name}: {err.problem}", err.hint) from err
    swapped = module.fused and module.module.row.form == "swapped"
    return Addition(adapter.strength, build, tuple(spans_of(found, swapped=swapped)))
