"""What a LoRA file is: family, naming, kind, and the tensors of each module; told from names and shapes alone."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.foreign import foreign_by_names, foreign_by_widths, module_shape, real_sizes
from fastsd_helpers.checkpoints.lora.modules import LORA_FAMILIES, Module, Target, parts_of, spelled_paths
from fastsd_helpers.checkpoints.lora.spelling import Stem, by_stem, is_lora, read_stem
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import PART_WORDS
from fastsd_helpers.errors import CheckpointError

__all__ = [
    "ADAPTER_FILES",
    "ADAPTER_PARTS",
    "LORA_FILE",
    "LoraLayout",
    "LoraModule",
    "adapters_in",
    "is_lora",
    "is_lora_folder",
    "read_layout",
]

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ADAPTER_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")

Facts = Mapping[str, TensorFact]

_KINDS = {  # the roles of its tensors, the kind in words, and in short ones
    "lora": (re.compile("(down|up|mid)$"), "a LoRA", "LoRA"),
    "loha": (re.compile("hada_"), "a LoHa (LyCORIS)", "LoHa"),
    "lokr": (re.compile("lokr_"), "a LoKr (LyCORIS)", "LoKr"),
    "oft": (re.compile("oft_"), "an OFT (LyCORIS)", "OFT"),
    "boft": (re.compile("boft_"), "a BOFT (LyCORIS)", "BOFT"),
    "dora": (re.compile("(?!)"), "a DoRA", "DoRA"),  # a LoRA with one tensor more
    "glora": (re.compile("[ab][12]$"), "a GLoRA (LyCORIS)", "GLoRA"),
    "ia3": (re.compile("on_input$|ia3_l$"), "an IA3 (LyCORIS)", "IA3"),
    "full": (re.compile("diff|set_weight$"), "full weight differences (LyCORIS)", "weight differences"),
    "norm": (re.compile("[wb]_norm$"), "differences of norm layers (LyCORIS)", "differences of norm layers"),
}
_NAMING_WORDS = {
    "kohya": "kohya's names",
    "diffusers": "diffusers' names",
    "peft": "peft's names",
    "bfl": "Black Forest Labs' names",
    "original": "the original's names",
    "xlabs": "XLabs' names",
    "onetrainer": "OneTrainer's names",
    "simpletuner": "SimpleTuner's names",
}
_HINTS = (  # what writers say about the base model
    ("sd15", re.compile(r"sd_?v1|stable-diffusion-v1|sd_1\.5|sd1")),
    ("sd21", re.compile(r"sd_?v2|stable-diffusion-v2|sd_2\.|sd2")),
    ("sdxl", re.compile(r"sdxl|stable-diffusion-xl|sd_xl")),
    ("flux", re.compile(r"flux")),
)


@dataclass(frozen=True)
class LoraModule:
    """One adapted module as the file spells it.

    module: what it is, from modules.py.
    fused: the file's matrices are the original's: one for all of `module.paths`, and halves in the original's order.
        Otherwise they are Diffusers', for one of the paths.
    path: that Diffusers path; "" where fused.
    spelled: the path as the file has it, without the prefix of a part or an adapter and without an ending.
    tensors: role -> the tensor's name. Roles: down, up, mid, alpha, dora_scale, bias, and LyCORIS' own words as they
        stand in files (hada_w1_a, lokr_w1, oft_blocks, a1, on_input with weight, diff, w_norm, ...).
    """

    module: Module
    fused: bool
    path: str
    spelled: str
    tensors: Mapping[str, str]

    @property
    def place(self) -> str:
        """The module in words, for messages."""
        return f"{self.module.part}.{self.path or self.spelled}"


@dataclass(frozen=True)
class LoraLayout:
    """What a LoRA file is.

    family: sd15, sd21, sdxl or flux.
    naming: kohya, diffusers, peft, bfl, original, xlabs, onetrainer or simpletuner.
    words: the whole of it for people.
    kind: lora, loha, lokr, oft, boft, dora, glora, ia3, full, norm, or mixed.
    """

    family: str
    naming: str
    words: str
    kind: str
    modules: tuple[LoraModule, ...]


def read_layout(tensors: Facts, metadata: Mapping[str, str], *, part: str = "", family: str = "") -> LoraLayout:
    """Tell what a LoRA file is: its family, whose names it has, its kind, and the tensors of every module.

    Args:
        metadata: the file's; where the names fit several families, what it says of the base model decides.
        part: the Diffusers part of a file whose names do not say it (peft's folders).
        family: the one to take where names and published widths fit several, whatever the metadata say.

    Raises:
        CheckpointError: another family's LoRA, a layer that no model has, two layouts of one LoRA, or a tensor that
            belongs to no adapter.
    """
    stems = by_stem(tensors)
    foreign_by_names(stems, metadata)
    family, targets = _choose(stems, tensors, family or _hint(metadata), part)
    foreign_by_widths((stem, targets.get(stem), module_shape(stems[stem], tensors)) for stem in stems)
    for stem in stems:
        if stem not in targets:
            raise _unknown_layer(read_stem(stem), family if targets else "", part)
    modules = _modules(stems, targets)
    networks = {stem: target for stem, target in targets.items() if not target.module.part.startswith("text")}
    namings = Counter(_naming(read_stem(stem), target, family) for stem, target in (networks or targets).items())
    naming = namings.most_common(1)[0][0]
    kind, kind_words = _kind_of_all(modules, tensors)
    words = f"{kind_words} for {_base_words(family, modules)} in {_NAMING_WORDS[naming]}"
    return LoraLayout(family, naming, words, kind, modules)


# ------------------------------------------------------------------------------------------------ families


def _choose(
    stems: Mapping[str, Mapping[str, str]], tensors: Facts, hint: str, part: str
) -> tuple[str, dict[str, Target]]:
    """The family whose modules these are, and what each stem means.

    Where several have them all, published widths decide, then the hint, then which family is trained with such names,
    then the order of the families.
    """
    taken = {stem: read_stem(stem) for stem in stems}
    best: tuple[tuple[int, int, int, int], str, dict[str, Target]] = (-1, 0, 0, 0), "", {}
    for family in LORA_FAMILIES:
        for bare in _bare_parts(family, part):
            targets = {stem: target for stem, apart in taken.items() if (target := _target(family, apart, bare))}
            fits = _fitting(family, targets, stems, tensors)
            usual = sum(stem == target.module.kohya for stem, target in targets.items())
            score = len(targets), fits, int(family == hint), usual
            if score > best[0]:
                best = score, family, targets
    _, family, targets = best
    return family, targets


def _bare_parts(family: str, part: str) -> list[tuple[str, ...]]:
    """Which parts a path without a prefix may belong to: all such paths of a file to one."""
    parts = parts_of(family)
    if part:
        return [(part,)]
    both = (parts["denoiser"], "text_encoder")
    return [both, ("text_encoder_2",)] if "text_encoder_2" in parts else [both]


def _target(family: str, apart: Stem, bare: tuple[str, ...]) -> Target | None:
    parts = (parts_of(family).get(apart.part, ""),) if apart.part else bare
    for part in parts:
        if part in parts_of(family).values():
            target = spelled_paths(family, part)[apart.flat].get(apart.path)
            if target is not None:
                return target
    return None


def _fitting(family: str, targets: Mapping[str, Target], stems: Mapping[str, Mapping[str, str]], tensors: Facts) -> int:
    """How many sizes are those of the family's published models, less those that have another number of axes."""
    count = 0
    for stem, target in targets.items():
        shape = module_shape(stems[stem], tensors)
        real = real_sizes(family, target)
        if real is not None:
            count += sum(one == other for one, other in zip(shape, real, strict=True))
        down = stems[stem].get("down")
        count -= down is not None and len(tensors[down].shape) != max(len(target.module.row.sizes), 2)
    return count


def _hint(metadata: Mapping[str, str]) -> str:
    if metadata.get("ss_v2") == "True":
        return "sd21"
    for key in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name"):
        for family, pattern in _HINTS:
            if pattern.search(metadata.get(key, "").lower()):
                return family
    return ""


def _unknown_layer(apart: Stem, family: str, part: str) -> CheckpointError:
    where = apart.part or part
    if family:
        known = parts_of(family).get(where, where)
        words = f"of the {PART_WORDS[known]}, " if known in PART_WORDS else ""
        problem = f"The LoRA changes {apart.path!r} {words}which {find_family(family).title} models do not have."
    else:
        problem = f"The LoRA changes {apart.path!r}, a layer of no known model."
    return CheckpointError(problem, "Give a LoRA for Stable Diffusion 1.x, 2.x, SDXL or Flux.1.")


# ------------------------------------------------------------------------------------------------ modules and words


def _modules(stems: Mapping[str, Mapping[str, str]], targets: Mapping[str, Target]) -> tuple[LoraModule, ...]:
    found: dict[tuple[Module, str], LoraModule] = {}
    covered: dict[tuple[str, str], tuple[bool, str]] = {}
    for stem, target in targets.items():
        module = target.module
        for path in [target.path] if target.path else module.paths:
            fused, other = covered.setdefault((module.part, path), (not target.path, stem))
            if fused != (not target.path):
                raise _twice(other, stem)
        key = module, target.path
        before = found[key].tensors if key in found else {}
        if before.keys() & stems[stem].keys():
            raise _twice(covered[module.part, (target.path or module.paths[0])][1], stem)
        found[key] = LoraModule(module, not target.path, target.path, read_stem(stem).path, {**before, **stems[stem]})
    return tuple(found.values())


def _twice(one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"The file holds one LoRA in two layouts: {one!r} and {other!r} are the same layer.",
        "Keep the tensors of one layout and save them as a file of their own: programs that read both would "
        "apply the LoRA twice.",
    )


def _naming(apart: Stem, target: Target, family: str) -> str:
    if apart.naming:
        return apart.naming
    if "processor." in apart.path and not target.path:
        return "xlabs"
    if target.path:
        return "diffusers"
    return "bfl" if family == "flux" else "original"


def _kinds(module: LoraModule, tensors: Facts) -> set[str]:
    roles = module.tensors
    kinds = {next((kind for kind, (pattern, *_) in _KINDS.items() if pattern.match(role)), "") for role in roles} - {""}
    if "oft" in kinds and "oft_blocks" in roles and len(tensors[roles["oft_blocks"]].shape) == 4:
        kinds = {*kinds - {"oft"}, "boft"}
    if "lora" in kinds and "dora_scale" in roles:
        kinds = {*kinds - {"lora"}, "dora"}
    return kinds


def _kind_of_all(modules: tuple[LoraModule, ...], tensors: Facts) -> tuple[str, str]:
    kinds = set().union(*(_kinds(module, tensors) for module in modules)) or {"lora"}
    if kinds == {"lora", "dora"}:
        kinds = {"dora"}
    if len(kinds) == 1:
        (kind,) = kinds
        return kind, _KINDS[kind][1]
    listed = [short for kind, (_roles, _words, short) in _KINDS.items() if kind in kinds]
    return "mixed", f"an adapter of several kinds ({', '.join(listed)})"


def _base_words(family: str, modules: tuple[LoraModule, ...]) -> str:
    title = find_family(family).title
    parts = {module.module.part for module in modules}
    if any(part.startswith("text") for part in parts) and not any(not part.startswith("text") for part in parts):
        return f"the text encoder of {title}" if len(parts) == 1 else f"the text encoders of {title}"
    return title


# ------------------------------------------------------------------------------------------------ folders


def adapters_in(folder: Path) -> list[tuple[Path, str]]:
    """(file, part) of peft's adapters in a folder; an empty part is to be told from the names."""
    found = []
    for place, part in ((folder, ""), *((folder / part, part) for part in ADAPTER_PARTS)):
        for name in ADAPTER_FILES:
            if (place / name).is_file():
                found.append((place / name, part))
                break
    return found


def is_lora_folder(folder: Path) -> bool:
    """Whether a folder is a LoRA: one file of diffusers', or adapters of peft, perhaps one per part."""
    return bool(adapters_in(folder)) or (folder / LORA_FILE).is_file()
