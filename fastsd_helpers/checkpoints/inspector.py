"""Say what a model file is without loading it: family, dtypes, prediction type, hashes, problems, advice."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.dtypes import CODE_BITS, count_not_finite
from fastsd_helpers.checkpoints.formats.file_content import is_safetensors_file
from fastsd_helpers.checkpoints.formats.prediction import (
    Prediction,
    prediction_of_file,
    prediction_of_folder,
    read_config,
)
from fastsd_helpers.checkpoints.formats.sources import Source, open_file, open_set
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.formats.tensor_stream import stream
from fastsd_helpers.checkpoints.formats.weight_sets import choose_set, choose_variant, weight_sets
from fastsd_helpers.checkpoints.given import Given, identify
from fastsd_helpers.checkpoints.models.detect import Kind, detect_file
from fastsd_helpers.checkpoints.models.folder_copy import walk_folders
from fastsd_helpers.checkpoints.models.folder_settings import settings_of_file, vae_family
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.models.problems import (
    TWO_NAMES,
    Layout,
    Problem,
    against_layout,
    general_problems,
    missing_problems,
    packed_folder,
    packed_problem,
    problem_of,
)
from fastsd_helpers.checkpoints.names.families import FAMILY_KEYS, find_family
from fastsd_helpers.checkpoints.names.layout import (
    PART_WORDS,
    Family,
)
from fastsd_helpers.errors import CheckpointError, FastSDError
from fastsd_helpers.files import sha256_of
from fastsd_helpers.inert import require_inert
from fastsd_helpers.model_lookup import how_to_get, lora_file
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import detect_family

__all__ = ["InspectConfig", "Inspection", "Problem", "inspect"]


@dataclass(frozen=True)
class InspectConfig:
    """Settings of `inspect` as flags."""

    hashes: bool = option(True, help="compute the SHA-256 and AUTOMATIC1111's short hash, which reads the entire file")
    scan: bool = option(False, help="look for NaN and Inf in the weights, which reads the entire file")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What a model file is.

    kind: such as `checkpoint`, `part`, `lora`, `controlnet`; `what` is the same in words.
    parts: part -> bytes of its weights.
    dtypes: dtype -> bytes.
    prediction, prediction_source: what the model predicts, and how that is known.
    short_hash: the first ten digits of the SHA-256, which AUTOMATIC1111 shows; None where hashing was not wanted.
    missing, unexpected: against the original layout of the family.
    not_finite: tensor -> count of values that are infinite or not a number; None where it was not looked.
    """

    path: Path
    format: str
    kind: str
    what: str
    family: str | None
    bytes: int
    tensors: int
    parameters: int
    parts: dict[str, int]
    dtypes: dict[str, int]
    prediction: str | None
    prediction_source: str
    sha256: str | None = None
    short_hash: str | None = None
    metadata: dict[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...] = ()
    not_finite: dict[str, int] | None
    problems: tuple[Problem, ...]
    advice: tuple[str, ...]


def inspect(
    path: Path | str,
    *,
    hashes: bool = True,
    scan: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at a .safetensors or .ckpt file, or a folder. Nothing in it is run; tensors are read only to hash or scan.

    Args:
        path: a .safetensors, .ckpt or .bin file, or a Diffusers or LoRA folder.
        hashes: compute the SHA-256, which reads the whole file.
        scan: look for values that are infinite or not a number, which reads the whole file.
        progress: called with (bytes scanned, bytes in all).

    Returns:
        Kind, family, layout, dtypes, prediction, hashes, and `problems` as sentences: () for a file that is in order.

    Raises:
        CheckpointError: the file cannot be read safely.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"There is no file {path}.", how_to_get(path))
    given = identify(path)
    require_inert(given.path)
    if given.what in ("pipeline", "part", "network"):
        return _look_at_folder(given, scan, progress)
    path = lora_file(given.path) if given.what == "lora" else given.path
    source = open_file(path)
    try:
        found = _look(path, source, hashes, scan, progress)
        return replace(found, advice=(*given.notes, *found.advice))
    finally:
        source.close()


def _look(
    path: Path, source: Source, hashes: bool, scan: bool, progress: Callable[[int, int], None] | None
) -> Inspection:
    kind = detect_file(path, source.tensors, source.metadata)
    tidied: Source = source
    problems: list[Problem] = []
    try:
        tidied = tidy(source)
    except CheckpointError as err:
        problems = [problem_of(err, TWO_NAMES)]
    family = find_family(kind.family) if kind.family and kind.what in ("checkpoint", "part") else None
    layout = against_layout(family, tidied) if family else Layout()
    packed = packed_problem(source)
    # Codes have shapes of their own, and scales beside them: what they are is the one thing to say.
    if packed is None:
        problems += layout.problems
    else:
        problems += [packed, *(missing_problems(family, layout.missing) if family else ())]
    not_finite = _scan(source, progress) if scan else None
    problems += general_problems(family, source, not_finite)
    prediction = None
    try:
        prediction = prediction_of_file(path, kind.family or "", tidied) if family else None
    except CheckpointError as err:
        problems.append(problem_of(err, "what the model predicts is unknown"))
    # Nearly every SDXL file says nothing and predicts noise; of SD 2.x as many predict velocity.
    if family is not None and family.key == "sd21" and prediction is not None and prediction.kind is None:
        problems.append(
            Problem(
                "SD 2.x models predict noise (epsilon) or velocity (v), and nothing says which this one does",
                "AUTOMATIC1111 runs the U-Net once to find out, ComfyUI looks at one weight, Forge takes noise",
            )
        )
    sha256 = sha256_of(path) if hashes else None
    facts = source.tensors.values()
    dtypes: Counter[str] = Counter()
    for fact in facts:
        dtypes[fact.dtype] += fact.bytes
    return Inspection(
        path=path,
        format="safetensors" if is_safetensors_file(path) else "pickle",
        kind=kind.what,
        what=kind.words,
        family=kind.family,
        bytes=path.stat().st_size,
        tensors=len(source.tensors),
        parameters=sum(fact.count for fact in facts),
        parts=layout.parts,
        dtypes=dict(dtypes.most_common()),
        prediction=prediction.kind if prediction and kind.family in FAMILY_KEYS else None,
        prediction_source=prediction.source if prediction and kind.family in FAMILY_KEYS else "",
        sha256=sha256,
        short_hash=sha256[:10] if sha256 else None,
        metadata=dict(source.metadata),
        missing=layout.missing,
        unexpected=layout.unexpected,
        not_finite=not_finite,
        problems=tuple(problems),
        advice=(*getattr(tidied, "notes", ()), *_advice(path, kind, family, tidied, layout.missing, prediction)),
    )


def _advice(
    path: Path,
    kind: Kind,
    family: Family | None,
    source: Source,
    missing: tuple[str, ...],
    prediction: Prediction | None,
) -> list[str]:
    advice = []
    if not is_safetensors_file(path) and kind.family:
        advice.append("Convert it to .safetensors: that format cannot contain code and loads faster.")
    averages = sum(fact.bytes for name, fact in source.tensors.items() if name.startswith("model_ema."))
    if averages:
        advice.append(
            f"It holds EMA weights of {averages / 1e9:.2f} GB, which no web UI reads: convert uses "
            "them instead of the last weights, or leaves them out with --no-ema."
        )
    if kind.what == "checkpoint" and family is not None and not missing:
        wide = sum(fact.bytes for fact in source.tensors.values() if fact.dtype == "F32")
        if wide > 100_000_000:
            advice.append("For generating images, fp16 is enough and half the size: fastsd convert --dtype fp16.")
    velocity = prediction is not None and prediction.kind == "v_prediction"
    needs_yaml = velocity and family is not None and family.key.startswith(("sd15", "sd21"))
    if needs_yaml and not path.with_suffix(".yaml").exists():
        advice.append(f"Put a {path.stem}.yaml with `parameterization: v` next to it for AUTOMATIC1111 and Forge.")
    if kind.what == "lora peft" and kind.family:
        advice.append("For AUTOMATIC1111, convert it to kohya's names: fastsd convert.")
    if kind.hint:
        advice.append(kind.hint)
    if kind.what == "part" and kind.family in ("vae", "flux-ae") and family is not None:
        settings = settings_of_file(source.metadata).get("vae", {})
        if not vae_family(family, "", source.metadata) and "scaling_factor" not in settings:
            advice.append("Its scaling factor is not in it: when converting it to a folder, specify --family.")
    if kind.what in ("unknown", "unet"):
        advice.append("It cannot be used as a checkpoint.")
    return advice


def _scan(source: Source, progress: Callable[[int, int], None] | None) -> dict[str, int]:
    whole = sum(fact.bytes for fact in source.tensors.values())
    done = 0
    found: dict[str, int] = {}
    readable = [name for name, fact in source.tensors.items() if fact.dtype not in CODE_BITS]
    for name, values, _last in stream((name, copied(source, name)) for name in readable):
        bad = count_not_finite(values, source.tensors[name].dtype)
        if bad:
            found[name] = found.get(name, 0) + bad
        done += len(values)
        if progress is not None:
            progress(done, whole)
    return found


# ------------------------------------------------------------------------------------------------ a folder


def _look_at_folder(given: Given, scan: bool, progress: Callable[[int, int], None] | None) -> Inspection:
    """A whole pipeline or one network, told from the files themselves; half known ones too."""
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
                problems.append(problem_of(err, "the part cannot be loaded"))
                continue
            stack.callback(source.close)
            problems += packed_folder(folder, source)
            sizes[words] = sum(fact.bytes for fact in source.tensors.values())
            for fact in source.tensors.values():
                dtypes[fact.dtype] += fact.bytes
            counts["parameters"] += sum(fact.count for fact in source.tensors.values())
            counts["tensors"] += len(source.tensors)
            if scan:
                not_finite |= {f"{folder.name}/{name}": bad for name, bad in _scan(source, progress).items()}
    named = [part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None]
    missing = [part for part in named if not (root / part).is_dir()]
    if missing:
        said = f"model_index.json names {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not there"
        problems.append(Problem(said, "diffusers loads it only when told to leave that out"))
    if not_finite:
        problems.append(Problem(f"{len(not_finite)} tensors contain NaN or Inf", "generated images are black"))
    family, words = _family_of(given, index, problems)
    prediction = prediction_of_folder(root, family) if index and family else None
    files = [path for folder in walk_folders(root) for path in (root / folder).iterdir() if path.is_file()]
    return Inspection(
        path=root,
        format="folder",
        kind="pipeline" if index else "diffusers part",
        what=words,
        family=family,
        bytes=sum(path.stat().st_size for path in files),
        tensors=counts["tensors"],
        parameters=counts["parameters"],
        parts=sizes,
        dtypes=dict(dtypes.most_common()),
        prediction=prediction.kind if prediction else None,
        prediction_source=prediction.source if prediction else "",
        metadata={key: value for key, value in index.items() if isinstance(value, str)},
        missing=tuple(missing),
        not_finite=not_finite if scan else None,
        problems=tuple(problems),
        advice=(*given.notes, *([f"It is read with the variant {variant}."] if variant else [])),
    )


def _family_of(given: Given, index: Mapping[str, Any], problems: list[Problem]) -> tuple[str | None, str]:
    if not index:
        return None, f"{'a' if given.what == 'network' else 'the'} {PART_WORDS.get(given.part, given.part)} " + (
            "in a folder of its own" if given.what == "network" else "of a Diffusers folder"
        )
    kind = str(index.get("_class_name", "an unknown kind"))
    try:
        family = detect_family(given.path)
    except FastSDError as err:
        problems.append(problem_of(err, "it cannot be converted or trained here"))
        return None, f"a Diffusers folder ({kind})"
    return family, f"a Diffusers folder of {family} ({kind})"
