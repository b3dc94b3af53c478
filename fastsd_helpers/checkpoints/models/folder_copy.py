"""A Diffusers folder once more with other numbers: every part, its weights under their names, and all that lies beside.

What diffusers loads from the copy is what it loaded from the source, rounded: nothing in it depends on what a part is
called or which model it belongs to.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastsd_helpers.checkpoints.formats.ckpt_writer import write_ckpt
from fastsd_helpers.checkpoints.formats.packed import refuse_packed_config, refuse_small_floats
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import Source, open_file, open_set
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, copied
from fastsd_helpers.checkpoints.formats.weight_sets import (
    WeightSet,
    choose_set,
    choose_variant,
    is_copy,
    is_for_others,
    weight_sets,
)
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.models.verifier import compare
from fastsd_helpers.checkpoints.models.writer import CheckpointFile, refuse_sources
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError, VerificationFailed
from fastsd_helpers.files import check_room, new_folder
from fastsd_helpers.inert import read_config
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import list_some

if TYPE_CHECKING:
    from fastsd_helpers.checkpoints.models.merge import Merging

__all__ = ["copy_folder", "walk_folders"]

# A program's own records of where files came from, which would be wrong about the copy.
_RECORDS = (".git", ".cache")
_SINGLE_FILES = (".ckpt", ".gguf")
# Parts that diffusers' pipelines do without, and that downloads often leave out.
_OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class _Plan:
    """One set of weights that will be written: file name -> its tensors, all of them read from `source`."""

    chosen: WeightSet
    source: Source
    files: dict[str, dict[str, Recipe]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def copy_folder(
    src: Path, dst: Path, *, family: str, dtype: str, verify: bool, merging: "Merging | None" = None
) -> CheckpointFile:
    """Write a Diffusers folder, a whole pipeline or one part, again in another dtype.

    Links are followed. Of several sets of weights in a part, the one that diffusers loads is written; what is left out
    is named in the notes.

    Args:
        src: was found inert: no link in it dangles or runs in a circle.
        merging: what is added to the weights on the way.

    Raises:
        CheckpointError: a part that model_index.json names is missing; weights are quantized, or contradict each
            other. DiskFull, DriveReadOnly, DriveError: nothing is left behind.
        VerificationFailed: a part has no weights in the result, or with `verify` others than it should have.
    """
    notes: list[str] = []
    if src.resolve() in dst.resolve().parents:
        raise CheckpointError(f"{dst} is inside the source model.", "Choose a folder outside it.")
    with ExitStack() as stack:
        folders = list(walk_folders(src))
        sets = {inside: weight_sets(src / inside) for inside in folders if inside.parts or not _is_pipeline(src)}
        sets = {inside: found for inside, found in sets.items() if found}
        _require_parts(src, sets, notes)
        variant = choose_variant(sets.values())
        plans = {}
        for inside, found in sets.items():
            chosen = choose_set(src / inside, found, variant)
            plans[inside] = _plan(src / inside, chosen, dtype, notes, stack)
            refuse_sources(dst, plans[inside].source.files)
        if any(plan.chosen.variant for plan in plans.values()):
            named = sorted({str(plan.chosen.variant) for plan in plans.values() if plan.chosen.variant})
            notes.append(f"The weights of the variant {', '.join(named)} were used; load the copy with that variant.")
        if merging:
            _merge(merging, family, plans)
        side = _side_files(src, folders, plans, notes)
        with new_folder(dst) as folder:
            recast = (recipe for plan in plans.values() for part in plan.files.values() for recipe in part.values())
            weights = sum(recipe.fact.bytes + 300 for recipe in recast)
            check_room(folder, weights + sum((src / inside).stat().st_size for inside in side))
            for inside in side:
                (folder / inside).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(src / inside, folder / inside)
            for inside, plan in plans.items():
                _write(plan, folder / inside, verify)
            _require_whole(src, folder, plans)
    tensors = sum(len(recipes) for plan in plans.values() for recipes in plan.files.values())
    size = sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())
    return CheckpointFile(dst, "", size, tensors, family, dtype, tuple(dict.fromkeys(notes)))


def _merge(merging: "Merging", key: str, plans: Mapping[Path, _Plan]) -> None:
    # A Flux.1 folder has its text encoders, which the table of its single file leaves out.
    family = find_family("flux-all-in-one" if key == "flux" and len(plans) > 1 else key)
    own = {str(inside) if inside.parts else family.parts[0]: plan for inside, plan in plans.items()}
    own = {part: plan for part, plan in own.items() if part in family.parts}
    change = merging.into_sources(family, {part: plan.source for part, plan in own.items()})
    for plan in own.values():
        changed = {name: change(recipes) for name, recipes in plan.files.items()}
        if changed != plan.files:
            plan.metadata = merging.metadata(plan.source.metadata)
        plan.files = changed


def _is_pipeline(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def walk_folders(src: Path, inside: Path = Path(), above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Every folder of a model, relative to it, links followed.

    Raises:
        CheckpointError: a link runs in a circle.
    """
    real = (src / inside).resolve()
    if real in above:
        raise CheckpointError(
            f"{src / inside} is a link to a folder that holds it.", "Remove it: it is a circular link."
        )
    yield inside
    for path in sorted((src / inside).iterdir()):
        if path.is_dir() and path.name not in _RECORDS:
            yield from walk_folders(src, inside / path.name, (*above, real))


def _require_parts(src: Path, sets: Mapping[Path, list[WeightSet]], notes: list[str]) -> None:
    """Every part that model_index.json names is there; a part has weights that a library finds, or none at all."""
    index = read_config(src / "model_index.json") if _is_pipeline(src) else {}
    for part, value in index.items():
        if not isinstance(value, list) or not value or value[0] is None or (src / part).is_dir():
            continue
        if part not in _OPTIONAL:
            raise CheckpointError(
                f"{src} lacks the part {part!r}, which its model_index.json names.",
                "Copy or download the folder again, with all its subfolders.",
            )
        notes.append(
            f"{part} is named in model_index.json and is not in the source: the copy lacks it too, and diffusers "
            f"loads either with {part}=None."
        )


def _plan(folder: Path, chosen: WeightSet, dtype: str, notes: list[str], stack: ExitStack) -> _Plan:
    refuse_packed_config(folder)
    source = open_set(chosen, folder.name)
    stack.callback(source.close)
    if not source.tensors:
        raise CheckpointError(f"{chosen.first} holds no tensors.", "Download the model again.")
    notes += refuse_small_floats(chosen.first, source, dtype)
    plan = _Plan(chosen, source)
    homes = json.loads(chosen.first.read_text(encoding="utf-8"))["weight_map"] if chosen.sharded else {}
    for name in source.tensors:
        plan.files.setdefault(homes.get(name, chosen.first.name), {})[name] = copied(source, name, dtype)
    if len(weight_sets(folder)) > 1:
        notes.append(f"Of several sets of weights in {folder.name}, {chosen.first.name} was used, as diffusers does.")
    return plan


def _side_files(src: Path, folders: list[Path], plans: Mapping[Path, _Plan], notes: list[str]) -> list[Path]:
    """What is copied as it is: everything but weights that are written anew, or that are the same once more."""
    copied_files: list[Path] = []
    left_out: list[Path] = []
    for inside in folders:
        plan = plans.get(inside)
        written = {*plan.files, plan.chosen.first.name} if plan else set()
        beside_parts = not inside.parts and _is_pipeline(src)
        for path in sorted((src / inside).iterdir()):
            if not path.is_file() or path.name in written:
                continue
            again = is_copy(path.name) if plan else is_for_others(path.name) or (beside_parts and _is_whole_model(path))
            (left_out if again else copied_files).append(path.relative_to(src))
    unchanged = [name for name in copied_files if name.suffix in (".safetensors", ".bin", ".pt", ".pth")]
    if unchanged:
        notes.append(f"Copied unchanged, not part of the model: {list_some(unchanged, 6)}.")
    if left_out:
        notes.append(f"Left out, duplicates of the same weights: {list_some(left_out, 6)}.")
    return copied_files


def _is_whole_model(path: Path) -> bool:
    """Whether a file beside the parts is the same model again as a single file; a LoRA is not."""
    if path.suffix.lower() != ".safetensors":
        return path.suffix.lower() in _SINGLE_FILES
    source = open_file(path)
    try:
        return detect(source.tensors).what == "checkpoint"
    finally:
        source.close()


def _write(plan: _Plan, folder: Path, verify: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, recipes in plan.files.items():
        logger.info("Writing %s (%d tensors) ...", f"{folder.name}/{name}", len(recipes))
        path = folder / name
        if path.suffix == ".bin":
            write_ckpt(path, recipes, hashes=False, bare=True)
        else:
            kept = {key: text for key, text in plan.source.metadata.items() if not key.startswith("modelspec.hash")}
            write_safetensors(
                path, recipes, metadata={"format": "pt", **kept, **plan.metadata}, read_back=False, hashes=False
            )
        if verify:
            compare(path, recipes)
    if plan.chosen.sharded:
        content = json.loads(plan.chosen.first.read_text(encoding="utf-8"))
        size = sum(recipe.fact.bytes for recipes in plan.files.values() for recipe in recipes.values())
        content["metadata"] = {**(content.get("metadata") or {}), "total_size": size}
        (folder / plan.chosen.first.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _require_whole(src: Path, folder: Path, plans: Mapping[Path, _Plan]) -> None:
    """Every part that had weights has them: names and shapes, read anew from what was written."""
    for part in read_config(src / "model_index.json") if _is_pipeline(src) else ():
        if (src / part).is_dir() and weight_sets(src / part) and not weight_sets(folder / part):
            raise VerificationFailed(f"The weights of {part} were not written.", _AGAIN)
    for inside, plan in plans.items():
        source = plan.source.tensors
        try:
            stored = open_set(WeightSet(folder / inside / plan.chosen.first.name, "", "", None), inside.name)
        except CheckpointError as err:
            raise VerificationFailed(f"{inside} was not written completely: {err.problem}", _AGAIN) from err
        try:
            same = {name: fact.shape for name, fact in stored.tensors.items()}
            if same != {name: fact.shape for name, fact in source.items()}:
                raise VerificationFailed(f"{inside} has other tensors than {src / inside}.", _AGAIN)
        finally:
            stored.close()


_AGAIN = "Convert it again; if the problem persists, check the disk."
