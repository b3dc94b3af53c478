"""What a Diffusers folder is, a whole pipeline or one network, told from the files themselves; half known ones too."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.packed import refuse_packed, refuse_packed_config
from fastsd_helpers.checkpoints.formats.prediction import prediction_of_folder, read_config
from fastsd_helpers.checkpoints.formats.sources import Source, open_set
from fastsd_helpers.checkpoints.formats.weight_sets import choose_set, choose_variant, weight_sets
from fastsd_helpers.checkpoints.given import Given
from fastsd_helpers.checkpoints.models.folder_copy import walk_folders
from fastsd_helpers.checkpoints.names.layout import PART_WORDS
from fastsd_helpers.errors import CheckpointError, FastSDError
from fastsd_helpers.registry import detect_family

__all__ = ["folder_facts"]


def folder_facts(given: Given, scan: Callable[[Source], dict[str, int]] | None) -> dict[str, Any]:
    """The fields of an `Inspection` of a folder; its problems as pairs of the fact and its effect.

    Args:
        scan: counts the values of a source that are not finite (NaN or Inf); None where nobody asked.
    """
    root, problems = given.path, []
    index = read_config(root / "model_index.json") if given.what == "pipeline" else {}
    folders = [root / part for part in index if (root / part).is_dir()] if index else [root]
    sets = {folder: found for folder in folders if (found := weight_sets(folder))}
    variant = choose_variant(sets.values())
    sizes: dict[str, int] = {}
    not_finite: dict[str, int] = {}
    dtypes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for folder, found in sets.items():
        part = given.part if folder == root else folder.name
        words = PART_WORDS.get(part, part)
        with ExitStack() as stack:
            try:
                source = open_set(choose_set(folder, found, variant), words)
            except CheckpointError as err:
                problems.append((err.problem.rstrip("."), "the part cannot be loaded"))
                continue
            stack.callback(source.close)
            problems += _packed(folder, source.tensors)
            sizes[words] = sum(fact.bytes for fact in source.tensors.values())
            for fact in source.tensors.values():
                dtypes[fact.dtype] += fact.bytes
            counts["parameters"] += sum(fact.count for fact in source.tensors.values())
            counts["tensors"] += len(source.tensors)
            if scan is not None:
                not_finite |= {f"{folder.name}/{name}": bad for name, bad in scan(source).items()}
    missing = [part for part, value in index.items() if _named(value) and not (root / part).is_dir()]
    problems += _whole_problems(missing, not_finite)
    family, words = _family(given, index, problems)
    prediction = prediction_of_folder(root) if index and family else None
    files = [path for folder in walk_folders(root) for path in (root / folder).iterdir() if path.is_file()]
    return {
        "path": root,
        "format": "folder",
        "kind": "pipeline" if index else "diffusers part",
        "what": words,
        "family": family,
        "bytes": sum(path.stat().st_size for path in files),
        **{name: counts[name] for name in ("tensors", "parameters")},
        "parts": sizes,
        "dtypes": dict(dtypes.most_common()),
        "prediction": prediction.kind if prediction else None,
        "prediction_source": prediction.source if prediction else "",
        **dict.fromkeys(("sha256", "short_hash")),
        "metadata": {key: value for key, value in index.items() if isinstance(value, str)},
        "missing": tuple(missing),
        "unexpected": (),
        "not_finite": not_finite if scan is not None else None,
        "problems": problems,
        "advice": (*given.notes, *([f"It is read with the variant {variant}."] if variant else [])),
    }


def _whole_problems(missing: list[str], not_finite: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    if missing:
        fact = f"model_index.json names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there"
        yield fact, "diffusers loads it only when told to leave that out"
    if not_finite:
        yield f"{len(not_finite)} tensors contain NaN or Inf", "generated images are black"


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and value[0] is not None


def _packed(folder: Path, tensors: Mapping[str, Any]) -> list[tuple[str, str]]:
    try:
        refuse_packed_config(folder)
        refuse_packed(folder, tensors)
    except FastSDError as err:
        return [(err.problem.rstrip("."), "it can only be used with its own library, and not converted")]
    return []


def _family(given: Given, index: Mapping[str, Any], problems: list[tuple[str, str]]) -> tuple[str | None, str]:
    if not index:
        return None, f"{'a' if given.what == 'network' else 'the'} {PART_WORDS.get(given.part, given.part)} " + (
            "in a folder of its own" if given.what == "network" else "of a Diffusers folder"
        )
    kind = str(index.get("_class_name", "an unknown kind"))
    try:
        family = detect_family(given.path)
    except FastSDError as err:
        problems.append((err.problem.rstrip("."), "it cannot be converted or trained here"))
        return None, f"a Diffusers folder ({kind})"
    return family, f"a Diffusers folder of {family} ({kind})"
