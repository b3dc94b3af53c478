"""What a LoRA file is: each tensor's module and role in it, whoever wrote the file; told from names and shapes alone.

Every spelling is a row of a table here: the endings that tell a tensor's role, the prefixes that tell the part, and
lora_names.py for the paths between them. Source: the files named there, and KohakuBlueleaf/LyCORIS lycoris/modules/.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fastsd_helpers.checkpoints.families import find_family
from fastsd_helpers.checkpoints.layout import PART_WORDS
from fastsd_helpers.checkpoints.lora_foreign import foreign_by_names, foreign_by_widths, module_shape, real_sizes
from fastsd_helpers.checkpoints.lora_names import LORA_FAMILIES, Module, Target, spelled_paths
from fastsd_helpers.checkpoints.safetensors_file import TensorFact
from fastsd_helpers.errors import CheckpointError

__all__ = ["LoraLayout", "LoraModule", "is_lora", "read_layout"]

Facts = Mapping[str, TensorFact]

# An adapter's name of peft's may stand in the middle.
_OWN = r"(?:\.(?!weight$|bias$)[^.]+)?"
_ENDINGS = tuple(
    (re.compile(rf"(?P<stem>.*[^.])(?:{ending})", re.DOTALL), role)
    for ending, role in (
        (rf"\.lora_down\.weight|\.lora_A{_OWN}\.weight|\.lora_A", "down"),
        (rf"\.lora_up\.weight|\.lora_B{_OWN}\.weight|\.lora_B", "up"),
        (r"\.lora(?:_linear_layer)?\.down\.weight|(?<=_lora)\.down\.weight|(?<=_lora[12])\.down\.weight", "down"),
        (r"\.lora(?:_linear_layer)?\.up\.weight|(?<=_lora)\.up\.weight|(?<=_lora[12])\.up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (rf"\.lora_up\.bias|\.lora_B{_OWN}\.bias", "bias"),
        (r"\.alpha", "alpha"),
        (rf"\.dora_scale|\.lora_magnitude_vector{_OWN}(?:\.weight)?", "dora_scale"),
        (rf"\.(?P<role>hada_(?:w[12]_[ab]|t[12])){_OWN}(?:\.weight)?", ""),
        (rf"\.(?P<role>lokr_(?:w[12](?:_[ab])?|t[12])){_OWN}(?:\.weight)?", ""),
        (r"\.oft_R\.(?P<role>scaled_oft)", ""),
        (rf"\.(?P<role>oft_blocks|oft_diag|oft_[rR]|boft_[RsS]|rescale){_OWN}(?:\.weight)?", ""),
        (r"\.(?P<role>a1|a2|b1|b2|bm)\.weight", ""),
        (rf"\.(?P<role>on_input|ia3_l){_OWN}", ""),
        (r"\.(?P<role>diff|diff_b|set_weight|reshape_weight|w_norm|b_norm|scalar)", ""),
    )
)
# Prefix -> whose names they are, what they stand before, and whether underscores follow. Several may stand in one name,
# and the longest fits first. "" tells nothing, "denoiser" is the U-Net or transformer.
_PREFIXES = {
    "base_model.model.": ("peft", "", False),
    "_orig_mod.": ("", "", False),
    "module.": ("", "", False),
    "model.diffusion_model.": ("", "denoiser", False),
    "diffusion_model.": ("", "denoiser", False),
    "unet.": ("", "denoiser", False),
    "transformer.": ("", "denoiser", False),
    "text_encoder.": ("", "text_encoder", False),
    "text_encoder_2.": ("", "text_encoder_2", False),
    "text_encoders.clip_l.transformer.": ("", "clip_l", False),
    "text_encoders.clip_l.": ("", "clip_l", False),
    "text_encoders.clip_h.transformer.": ("", "clip_h", False),
    "text_encoders.clip_g.transformer.": ("", "clip_g", False),
    "text_encoders.clip_g.": ("", "clip_g", False),
    "text_encoders.t5xxl.transformer.": ("", "t5", False),
    "text_encoders.t5xxl.": ("", "t5", False),
    "clip_l.": ("", "clip_l", False),
    "clip_h.": ("", "clip_h", False),
    "clip_g.": ("", "clip_g", False),
    "t5.": ("", "t5", False),
    "t5xxl.": ("", "t5", False),
    "lora_unet_": ("kohya", "denoiser", True),
    "lora_te_": ("kohya", "text_encoder", True),
    "lora_te1_": ("kohya", "text_encoder", True),
    "lora_te2_": ("kohya", "text_encoder_2", True),
    "lora_te3_": ("kohya", "t5", True),
    "lora_transformer_": ("onetrainer", "denoiser", True),
    "lycoris_": ("simpletuner", "", True),
}
_LONGEST_FIRST = tuple(sorted(_PREFIXES, key=len, reverse=True))
_PARTS = {
    "sd15": {"denoiser": "unet", "text_encoder": "text_encoder", "clip_l": "text_encoder"},
    "sd21": {"denoiser": "unet", "text_encoder": "text_encoder", "clip_h": "text_encoder"},
    "sdxl": {
        **{"denoiser": "unet", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
        **{"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    },
    "flux": {
        **{"denoiser": "transformer", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"},
        **{"clip_l": "text_encoder", "t5": "text_encoder_2"},
    },
}
_KINDS = (  # the first that fits
    ("loha", re.compile("hada_")),
    ("lokr", re.compile("lokr_")),
    ("boft", re.compile("boft_")),
    ("oft", re.compile("oft_")),
    ("glora", re.compile("[ab][12]$")),
    ("ia3", re.compile("on_input$|ia3_l$")),
    ("lora", re.compile("(down|up|mid)$")),
    ("norm", re.compile("[wb]_norm$")),
    ("full", re.compile("diff|set_weight$")),
)
_KIND_WORDS = {
    "lora": "a LoRA",
    "loha": "a LoHa (LyCORIS)",
    "lokr": "a LoKr (LyCORIS)",
    "oft": "an OFT (LyCORIS)",
    "boft": "a BOFT (LyCORIS)",
    "dora": "a DoRA",
    "glora": "a GLoRA (LyCORIS)",
    "ia3": "an IA3 (LyCORIS)",
    "full": "full weight differences (LyCORIS)",
    "norm": "differences of norm layers (LyCORIS)",
}
_SHORT_WORDS = {"lora": "LoRA", "full": "weight differences", "norm": "differences of norm layers"}
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

    module: what it is, from lora_names.
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


@dataclass(frozen=True)
class _Stem:
    """A module's name in the file, taken apart: whose prefix, what it stands before, and the path behind it."""

    naming: str
    part: str
    flat: bool
    path: str


def is_lora(tensors: Facts) -> bool:
    """Whether a file holds an adapter's tensors, and not a model with an adapter inside."""
    if any(".base_layer." in name for name in tensors):
        return False
    return any(role not in ("alpha", "scalar") for name in tensors if (role := _taken_apart(name)[1]))


def read_layout(tensors: Facts, metadata: Mapping[str, str], *, part: str = "") -> LoraLayout:
    """Tell what a LoRA file is: its family, whose names it has, its kind, and the tensors of every module.

    Args:
        metadata: the file's; where the names fit several families, what it says of the base model decides.
        part: the Diffusers part of a file whose names do not say it (peft's folders).

    Raises:
        CheckpointError: another family's LoRA, a layer that no model has, two layouts of one LoRA, or a tensor that
            belongs to no adapter.
    """
    stems = _by_stem(tensors)
    foreign_by_names(stems, metadata)
    family, targets = _choose(stems, tensors, metadata, part)
    foreign_by_widths((stem, targets.get(stem), module_shape(stems[stem], tensors)) for stem in stems)
    for stem in stems:
        if stem not in targets:
            raise _unknown_layer(_stem(stem), family if targets else "", part)
    modules = _modules(stems, targets)
    namings = Counter(_naming(_stem(stem), target, family) for stem, target in targets.items() if _inside(target))
    namings = namings or Counter(_naming(_stem(stem), target, family) for stem, target in targets.items())
    naming = namings.most_common(1)[0][0]
    kind, kind_words = _kind_of_all(modules, tensors)
    words = f"{kind_words} for {_base_words(family, modules)} in {_NAMING_WORDS[naming]}"
    return LoraLayout(family, naming, words, kind, modules)


# ------------------------------------------------------------------------------------------------ taking names apart


def _by_stem(tensors: Facts) -> dict[str, dict[str, str]]:
    """Stem -> role -> tensor name."""
    stems: dict[str, dict[str, str]] = {}
    left = []
    for name in tensors:
        stem, role = _taken_apart(name)
        if not role:
            left.append(name)
            continue
        roles = stems.setdefault(stem, {})
        if role in roles:
            raise CheckpointError(
                f"The file holds two adapters for one layer: {roles[role]!r} and {name!r}.",
                "Save one adapter alone, or download a file that holds one LoRA.",
            )
        roles[role] = name
    for name in left:
        stem = name.removesuffix(".weight")
        if stem == name or "on_input" not in stems.get(stem, {}):  # IA3's own vector is called `weight`
            raise _no_adapter(name)
        stems[stem]["weight"] = name
    if not stems:
        raise CheckpointError("The file holds no tensors of a LoRA.", "Download it again, or pick another file.")
    return stems


def _taken_apart(name: str) -> tuple[str, str]:
    """(stem, role) of a tensor; no role where it is none of an adapter's."""
    for pattern, role in _ENDINGS:
        match = pattern.fullmatch(name)
        if match:
            return match["stem"], role or match["role"]
    return name, ""


def _no_adapter(name: str) -> CheckpointError:
    if name.startswith(("bundle_emb.", "emb_params", "string_to_param")):
        return CheckpointError(
            f"The LoRA brings an embedding (textual inversion) of its own: {name!r}.",
            "Use it in the web UI as it is; or save the LoRA without the bundled embedding.",
        )
    if name.endswith(("query_norm.scale", "key_norm.scale")):
        return CheckpointError(
            f"The LoRA is a control LoRA of Flux.1 (Depth or Canny): it brings weights of its own, such as {name!r}.",
            "ComfyUI and diffusers read it as it is.",
        )
    if "lora_embedding_" in name:
        return CheckpointError(
            f"The LoRA changes token embeddings ({name!r}), for which no conversion exists.",
            "Use it with peft as it is, or save it without them.",
        )
    if re.search(r"\.lora_(down|up)\.\d+\.weight$", name):
        return CheckpointError(
            f"The LoRA is a training's intermediate file, with split layers ({name!r}).",
            "Give the file that the trainer saves at the end.",
        )
    return CheckpointError(
        f"The LoRA has {name!r}, which is no tensor of a LoRA or LyCORIS adapter.",
        "Give the LoRA alone, as its trainer saved it.",
    )


def _stem(stem: str) -> _Stem:
    naming, part, flat = "", "", False
    while True:
        prefix = next((prefix for prefix in _LONGEST_FIRST if stem.startswith(prefix)), "")
        if not prefix or flat:
            return _Stem(naming, part, flat, stem)
        whose, before, flat = _PREFIXES[prefix]
        naming, part = naming or whose, before or part
        stem = stem.removeprefix(prefix)


# ------------------------------------------------------------------------------------------------ families


def _choose(
    stems: Mapping[str, Mapping[str, str]], tensors: Facts, metadata: Mapping[str, str], part: str
) -> tuple[str, dict[str, Target]]:
    """The family whose modules these are, and what each stem means.

    Where several have them all, real widths decide, then what the metadata says, then which family is trained with
    such names, then the order of the families.
    """
    taken = {stem: _stem(stem) for stem in stems}
    hint = _hint(metadata)
    best: tuple[tuple[int, int, int, int], str, dict[str, Target]] | None = None
    for family in LORA_FAMILIES:
        for bare in _bare_parts(family, part):
            targets = {stem: target for stem, apart in taken.items() if (target := _target(family, apart, bare))}
            fits = _fitting(family, targets, stems, tensors)
            usual = sum(stem == target.module.kohya for stem, target in targets.items())
            score = len(targets), fits, int(family == hint), usual
            if best is None or score > best[0]:
                best = score, family, targets
    _, family, targets = best
    return family, targets


def _bare_parts(family: str, part: str) -> list[tuple[str, ...]]:
    """Which parts a path without a prefix may belong to: all such paths of a file to one."""
    parts = _PARTS[family]
    if part:
        return [(part,)]
    both = (parts["denoiser"], "text_encoder")
    return [both, ("text_encoder_2",)] if "text_encoder_2" in parts else [both]


def _target(family: str, apart: _Stem, bare: tuple[str, ...]) -> Target | None:
    parts = (_PARTS[family].get(apart.part, ""),) if apart.part else bare
    for part in parts:
        if part in _PARTS[family].values():
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
    said = " ".join(
        metadata.get(key, "") for key in ("ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")
    ).lower()
    return next((family for family, pattern in _HINTS if pattern.search(said)), "")


def _unknown_layer(apart: _Stem, family: str, part: str) -> CheckpointError:
    where = apart.part or part
    if family:
        known = _PARTS[family].get(where, where)
        words = f"of the {PART_WORDS[known]}, " if known in PART_WORDS else ""
        problem = f"The LoRA changes {apart.path!r} {words}which {find_family(family).title} models do not have."
    else:
        problem = f"The LoRA changes {apart.path!r}, a layer of no model we know."
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
        found[key] = LoraModule(module, not target.path, target.path, _stem(stem).path, {**before, **stems[stem]})
    return tuple(found.values())


def _twice(one: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"The file holds one LoRA in two layouts: {one!r} and {other!r} are the same layer.",
        "Keep the tensors of one layout and save them as a file of their own: programs that read both would add the "
        "LoRA twice.",
    )


def _inside(target: Target) -> bool:
    return target.module.part in ("unet", "transformer")


def _naming(apart: _Stem, target: Target, family: str) -> str:
    if apart.naming:
        return apart.naming
    if "processor." in apart.path and not target.path:
        return "xlabs"
    if target.path:
        return "diffusers"
    return "bfl" if family == "flux" else "original"


def _kind(module: LoraModule, tensors: Facts) -> Iterator[str]:
    roles = module.tensors
    kinds = {name for role in roles for name in [next((kind for kind, p in _KINDS if p.match(role)), "")] if name}
    if "oft" in kinds and "oft_blocks" in roles and len(tensors[roles["oft_blocks"]].shape) == 4:
        kinds = {*kinds - {"oft"}, "boft"}
    if "lora" in kinds and "dora_scale" in roles:
        kinds = {*kinds - {"lora"}, "dora"}
    # A weight's difference takes its bias along; a norm layer's too.
    yield from sorted(kinds)


def _kind_of_all(modules: tuple[LoraModule, ...], tensors: Facts) -> tuple[str, str]:
    kinds = {kind for module in modules for kind in _kind(module, tensors)} or {"lora"}
    if kinds == {"lora", "dora"}:
        kinds = {"dora"}
    if len(kinds) == 1:
        (kind,) = kinds
        return kind, _KIND_WORDS[kind]
    shorts = [_SHORT_WORDS.get(kind, kind) for kind in _KIND_WORDS if kind in kinds]
    names = {"loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "dora": "DoRA"}
    listed = [names.get(short, short.upper() if short in _KIND_WORDS else short) for short in shorts]
    return "mixed", f"an adapter of several kinds ({', '.join(listed)})"


def _base_words(family: str, modules: tuple[LoraModule, ...]) -> str:
    title = find_family(family).title
    parts = {module.module.part for module in modules}
    if any(part.startswith("text") for part in parts) and not any(not part.startswith("text") for part in parts):
        return f"the text encoder of {title}" if len(parts) == 1 else f"the text encoders of {title}"
    return title
