"""What is wrong with a model file, or worth knowing, and what each web UI does about it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastsd_helpers.checkpoints.formats.dtypes import is_small_float
from fastsd_helpers.checkpoints.formats.packed import refuse_packed, refuse_packed_config
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.models.single_file import averaged_names
from fastsd_helpers.checkpoints.names.layout import (
    PART_WORDS,
    Family,
    expected_shapes,
    match_original,
    measure_original,
)
from fastsd_helpers.errors import CheckpointError, FastSDError

__all__ = [
    "TWO_NAMES",
    "Layout",
    "Problem",
    "against_layout",
    "general_problems",
    "missing_problems",
    "packed_folder",
    "packed_problem",
    "problem_of",
]

TWO_NAMES = "no web UI reads both; which one is used is undefined"
_MOST_SHAPES = 8  # that differ and are named: with others than the first, the file is of another model


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong or worth knowing: the fact, and what each web UI does about it."""

    what: str
    effect: str


def problem_of(err: FastSDError, effect: str) -> Problem:
    """The problem that an error tells."""
    return Problem(err.problem.rstrip("."), effect)


@dataclass(frozen=True)
class Layout:
    """What a file is against its family's layout; `parts` as in `Inspection`."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    parts: dict[str, int] = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()


def against_layout(family: Family, source: Source) -> Layout:
    """What a file has and lacks of its family's layout."""
    plain = [name for name in source.tensors if not name.startswith("model_ema.")]
    try:
        found, unexpected = match_original(family, plain)
    except CheckpointError as err:
        return Layout(problems=(problem_of(err, TWO_NAMES),))
    averages = {
        row: name for name, row in averaged_names(family).items() if name in source.tensors and row not in found
    }
    found |= averages
    facts = {name: source.tensors[theirs] for name, theirs in found.items()}
    shapes = {name: fact.shape for name, fact in facts.items()}
    problems = []
    if averages:
        said = f"{len(averages)} U-Net tensors are there as averages (EMA) alone"
        problems.append(Problem(said, "no web UI loads them; convert makes a model of them that every one loads"))
    try:
        wanted = expected_shapes(family, measure_original(family, shapes))
        missing = sorted(wanted.keys() - shapes.keys())
        others = [name for name in sorted(wanted.keys() & shapes.keys()) if shapes[name] != wanted[name]]
        for name in others[:_MOST_SHAPES]:
            left = len(others) - _MOST_SHAPES if name == others[:_MOST_SHAPES][-1] else 0
            more = f", and {left} more differ" if left > 0 else ""
            fact = f"{name} has the shape {list(shapes[name])}; {family.title} has {list(wanted[name])}{more}"
            problems.append(Problem(fact, "loading stops with a size mismatch in every web UI"))
    except CheckpointError as err:
        missing = sorted(row.original for row in family.rows if row.original not in shapes and not row.unless_equal)
        problems.append(problem_of(err, "the file is incomplete"))
    problems += missing_problems(family, missing)
    if unexpected:
        problems.append(
            Problem(
                f"{len(unexpected)} tensors are not of this layout, such as {unexpected[0]!r}",
                "ComfyUI and Forge ignore them; AUTOMATIC1111 refuses extra U-Net tensors in SD 2.x files",
            )
        )
    respelled = sum(name != theirs for name, theirs in found.items() if name not in averages)
    if respelled and family.key.startswith(("sd15", "sdxl")):
        effect = (
            "no web UI renames them: the first text encoder keeps random weights"
            if family.key.startswith("sdxl")
            else "web UIs rename them; diffusers' own loader stops at them"
        )
        problems.append(Problem(f"{respelled} text encoder tensors lack 'text_model.' in their names", effect))
    sizes: Counter[str] = Counter()
    for name in facts:
        sizes[PART_WORDS[family.to_diffusers[name].part]] += facts[name].bytes
    return Layout(tuple(missing), tuple(unexpected), dict(sizes), tuple(problems))


def missing_problems(family: Family, missing: Sequence[str]) -> list[Problem]:
    """The problems that missing tensors make, one for each part of the model."""
    groups: dict[str, list[str]] = {}
    for name in missing:
        part = family.to_diffusers[name].part
        groups.setdefault("text encoder" if part.startswith("text") else PART_WORDS[part], []).append(name)
    effects = {
        "U-Net": "the model cannot be loaded",
        "transformer": "the model cannot be loaded",
        "VAE": "web UIs use another VAE if one is chosen, otherwise images are noise",
        "text encoder": "the text encoder has random weights: images do not follow the prompt",
    }
    return [
        Problem(
            f"{len(names)} {part} tensors are missing, such as {names[0]!r}",
            effects.get(part, "the file is incomplete"),
        )
        for part, names in groups.items()
    ]


def packed_problem(source: Source) -> Problem | None:
    """The problem of a file whose weights are packed in another library's codes; None for every other."""
    try:
        refuse_packed("It", source.tensors)
    except CheckpointError as err:
        effect = "only programs that know this format read it right, and nothing of it can be converted or trained"
        return problem_of(err, effect)
    return None


def general_problems(family: Family | None, source: Source, not_finite: Mapping[str, int] | None) -> Iterator[Problem]:
    """The problems that any file may have."""
    halves = [
        name for name, fact in source.tensors.items() if name.endswith("position_ids") and fact.dtype[0] not in "IU"
    ]
    if halves:
        yield Problem(
            f"{halves[0]} is stored as floats, not integers",
            "AUTOMATIC1111 uses wrong token positions where the numbers were rounded; the others recompute it",
        )
    schedule = source.tensors.get("alphas_cumprod")
    if family is not None and schedule is not None and schedule.dtype != "F32":
        yield Problem(
            "the noise schedule (alphas_cumprod) is stored rounded",
            "AUTOMATIC1111 uses it instead of the exact one; the others compute their own",
        )
    second = re.compile(r"conditioner\.embedders\.(1|0\.model)\.(.*\.)?text_projection\.weight", re.DOTALL)
    if any(second.fullmatch(name) for name in source.tensors):
        yield Problem(
            "the second text encoder has 'text_projection.weight' instead of 'text_projection'",
            "ComfyUI and Forge take it untransposed, AUTOMATIC1111 ignores it: wrong images in all of them",
        )
    if small := sum(is_small_float(fact.dtype) for fact in source.tensors.values()):
        yield Problem(
            f"{small} tensors are in an 8-bit format",
            "ComfyUI and Forge read them; AUTOMATIC1111 upcasts them; they cannot be trained",
        )
    if not_finite:
        worst = max(not_finite, key=lambda name: not_finite[name])
        yield Problem(
            f"{len(not_finite)} tensors contain NaN or Inf, most of them {worst!r}",
            "generated images are black",
        )


def packed_folder(folder: Path, source: Source) -> list[Problem]:
    """As `packed_problem`, of a part of a Diffusers folder, whose config may say so too."""
    try:
        refuse_packed_config(folder)
        refuse_packed(folder, source.tensors)
    except FastSDError as err:
        return [problem_of(err, "it can only be used with its own library, and not converted")]
    return []
