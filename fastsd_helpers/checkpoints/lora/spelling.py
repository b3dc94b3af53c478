"""The name of a LoRA's tensor taken apart: which module it belongs to, in whose names, and what it is there.

Every spelling is a row of a table: the endings tell what a tensor is, the prefixes tell the part. Source: the files
named in modules.py, and KohakuBlueleaf/LyCORIS lycoris/modules/.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.errors import CheckpointError

__all__ = ["Stem", "by_stem", "is_lora", "read_stem"]

Facts = Mapping[str, TensorFact]

# An adapter's name of peft's may stand in the middle.
_OWN = r"(?:\.(?!weight$|bias$)[^.]+)?"
_ENDINGS = tuple(
    (re.compile(rf"(?P<stem>.*[^.])(?:{ending})", re.DOTALL), role)
    for ending, role in (
        (rf"\.lora_down\.weight|\.lora_A{_OWN}\.weight|\.lora_A", "down"),
        (rf"\.lora_up\.weight|\.lora_B{_OWN}\.weight|\.lora_B", "up"),
        (
            r"\.lora(?:_linear|_conv)?(?:_layer)?\.down\.weight|(?<=_lora)\.down\.weight|(?<=_lora[12])\.down\.weight",
            "down",
        ),
        (r"\.lora(?:_linear|_conv)?(?:_layer)?\.up\.weight|(?<=_lora)\.up\.weight|(?<=_lora[12])\.up\.weight", "up"),
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
# What torch.compile and FSDP put into names, before a part or within a path.
_WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)[._]")
# Adapters of peft's that are neither LoRA nor LyCORIS'.
_OTHER_ADAPTERS = re.compile(
    r".*\.(?P<kind>lora_E|ranknum|vera_lambda|vera_[AB]|fourierft_spectrum|hra_u|bone_|miss_|randlora_|vblora_)"
)
_LONGEST_FIRST = tuple(sorted(_PREFIXES, key=len, reverse=True))


@dataclass(frozen=True)
class Stem:
    """A module's name in the file, taken apart: whose prefix, what it stands before, and the path behind it."""

    naming: str
    part: str
    flat: bool
    path: str


def is_lora(tensors: Facts) -> bool:
    """Whether a file holds an adapter's tensors, and not a model with an adapter inside."""
    if any(".base_layer." in name for name in tensors):
        return False
    return any(
        role not in ("", "alpha", "scalar") or _OTHER_ADAPTERS.match(name)
        for name in tensors
        for role in [_taken_apart(name)[1]]
    )


def by_stem(tensors: Facts) -> dict[str, dict[str, str]]:
    """Sort the tensors of a LoRA: module as the file spells it -> role -> tensor name.

    Raises:
        CheckpointError: a tensor that belongs to no adapter, or two adapters for one layer.
    """
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
        raise CheckpointError("The file holds no tensors of a LoRA.", "Download it again, or choose another file.")
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
            f"The LoRA contains an embedding (textual inversion): {name!r}.",
            "Use it in the web UI as it is; or save the LoRA without the bundled embedding.",
        )
    if name.endswith(("query_norm.scale", "key_norm.scale")):
        return CheckpointError(
            f"The LoRA is a control LoRA of Flux.1 (Depth or Canny): it contains its own weights, such as {name!r}.",
            "ComfyUI and diffusers read it as it is.",
        )
    if _OTHER_ADAPTERS.match(name):
        return CheckpointError(
            f"The file is not a LoRA but another adapter of peft's (AdaLoRA, VeRA or the like): it has {name!r}.",
            "Merge it into its model with peft, and convert the model.",
        )
    if "lora_embedding_" in name:
        return CheckpointError(
            f"The LoRA changes token embeddings ({name!r}), for which no conversion exists.",
            "Use it with peft as it is, or save it without them.",
        )
    if re.search(r"\.lora_(down|up)\.\d+\.weight$", name):
        return CheckpointError(
            f"The LoRA is an intermediate training file with split layers ({name!r}).",
            "Give the file that the trainer saves at the end.",
        )
    if name.endswith((".weight", ".bias")):
        return CheckpointError(
            f"The LoRA contains full weights besides its matrices, such as {name!r} (peft: modules_to_save or bias), "
            "for which no conversion exists.",
            "Use it with the program that made it, or train it without them.",
        )
    return CheckpointError(
        f"The LoRA has {name!r}, which is not a tensor of a LoRA or LyCORIS adapter.",
        "Give the LoRA alone, as its trainer saved it.",
    )


def read_stem(stem: str) -> Stem:
    """Take a module's name apart."""
    naming, part, flat = "", "", False
    stem = _WRAPPERS.sub("", stem)
    while True:
        prefix = next((prefix for prefix in _LONGEST_FIRST if stem.startswith(prefix)), "")
        if not prefix or flat:
            return Stem(naming, part, flat, stem)
        whose, before, flat = _PREFIXES[prefix]
        naming, part = naming or whose, before or part
        stem = stem.removeprefix(prefix)
