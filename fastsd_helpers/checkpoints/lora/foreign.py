"""LoRA of families that have no conversion here: each is named, from its layers' names, its metadata or its widths.

Names and metadata are told by the patterns in foreign_models.toml. Widths that no published model has say nothing: such
a LoRA goes by its names alone. Source: comfy/lora.py and comfy/supported_models.py of ComfyUI, and the transformers'
default configurations in diffusers.
"""

import re
from collections.abc import Iterable, Mapping

from fastsd_helpers.checkpoints.formats.foreign_models import hint_of, lora_patterns
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.lora.modules import Target
from fastsd_helpers.checkpoints.names.layout import part_shapes
from fastsd_helpers.errors import CheckpointError

__all__ = ["foreign_by_names", "foreign_by_widths", "module_shape", "real_sizes"]

# Flux.1's layer width is 3072; these are others' with the same names.
_FLUX_WIDTHS = {
    1536: "Stable Diffusion 3 (medium)",
    2432: "Stable Diffusion 3.5 (large)",
    4096: "FLUX.2 klein 9B",
    6144: "FLUX.2 dev",
}
_FLUX_OTHER_COLUMNS = {  # where another width goes in
    ("context_embedder", 7680): "FLUX.2 klein 4B",
    ("context_embedder", 12288): "FLUX.2 klein 9B",
    ("context_embedder", 15360): "FLUX.2 dev",
    ("context_embedder", 3584): "Qwen-Image",
    ("proj_out", 12288): "FLUX.2 klein 4B",
    ("proj_out", 16384): "FLUX.2 klein 9B",
    ("proj_out", 24576): "FLUX.2 dev",
}
_SD_WIDTHS = {  # (width of the family's, what it is in another's)
    **{
        (width, columns): "the SDXL refiner" for width, columns in (("u0", 384), ("u1", 768), ("u2", 1536), ("x", 1280))
    },
    ("x", 4096): "Kolors",
}
_WIDTHS = {
    ("sd15", "unet"): {"u0": 320, "u1": 640, "u2": 1280, "u3": 1280, "x": 768},
    ("sd21", "unet"): {"u0": 320, "u1": 640, "u2": 1280, "u3": 1280, "x": 1024},
    ("sdxl", "unet"): {"u0": 320, "u1": 640, "u2": 1280, "x": 2048, "adm": 2816},
    ("flux", "transformer"): {
        **{"d": 3072, "fm": 12288, "hd": 128, "ins": 64, "outs": 64, "c": 4096, "p": 768, "guided": 1}
    },
    ("flux", "text_encoder_2"): {"h": 4096, "i": 4096, "m": 10240, "b": 32, "heads": 64, "vocab": 32128},
    **{
        (family, "text_encoder"): {"h": 768, "m": 3072, "vocab": 49408, "positions": 77}
        for family in ("sd15", "sdxl", "flux")
    },
    ("sd21", "text_encoder"): {"h": 1024, "m": 4096, "vocab": 49408, "positions": 77},
    ("sdxl", "text_encoder_2"): {"h": 1280, "m": 5120, "vocab": 49408, "positions": 77},
}

Size = tuple[int, int]


def foreign_by_names(stems: Iterable[str], metadata: Mapping[str, str]) -> None:
    """Refuse a LoRA that its layers' names or its metadata give away as another family's.

    Raises:
        CheckpointError: says which, and what reads it.
    """
    stems = list(stems)
    for pattern, what, hint in lora_patterns("names"):
        for stem in stems:
            if pattern.search(stem):
                raise _foreign(what, f"it changes {stem!r}", hint)
    third = next((stem for stem in stems if re.match(r"lora_te3_encoder_block|text_encoders\.t5xxl", stem)), None)
    if third and any(re.match(r"lora_te2_(text_model|encoder_layers)|text_encoders\.clip_g", stem) for stem in stems):
        raise _foreign("Stable Diffusion 3", f"it changes CLIP-G and T5 ({third!r})", hint_of("next"))
    for key in ("modelspec.architecture", "ss_base_model_version"):
        said = metadata.get(key, "")
        for pattern, what, hint in lora_patterns("metadata"):
            if pattern.search(said.lower()):
                raise _foreign(what, f"its metadata says {key} {said!r}", hint)


def foreign_by_widths(layers: Iterable[tuple[str, Target | None, Size]]) -> None:
    """Refuse a LoRA whose layers have the family's names and another published model's widths.

    Args:
        layers: (name, what it means in this family, (rows, columns) of the weight it changes).

    Raises:
        CheckpointError: says which model, and what reads it.
    """
    for name, target, size in layers:
        rows, columns = size
        what = ""
        if target is None:
            deep = re.search(r"(?:^|\.|lora_unet_|lora_transformer_|lycoris_)transformer_blocks[._](\d+)[._]", name)
            if deep and int(deep[1]) > 18 and ".attentions." not in name:  # Flux.1 has 19 of them, Qwen-Image 60
                what = _FLUX_WIDTHS.get(columns, "Qwen-Image" if columns == 3072 else "")
        elif target.module.part == "transformer" and target.module.row.sizes[1:] == ("d",):
            what = _FLUX_WIDTHS.get(columns, "")
            # FLUX.2 has gates in its inner layers, so that these are wider.
            original, wider = target.module.row.original, {"linear1": 27648, "img_mlp.0": 18432, "txt_mlp.0": 18432}
            if columns == 3072 and not target.path and any(end in original and rows == n for end, n in wider.items()):
                what = "FLUX.2 klein 4B"
        elif target.module.part == "transformer":
            what = _FLUX_OTHER_COLUMNS.get((target.module.paths[0].rpartition(".")[2], columns), "")
        elif target.module.part == "unet" and len(target.module.row.sizes) > 1:
            what = _SD_WIDTHS.get((target.module.row.sizes[1], columns), "")
        if what:
            raise _foreign(what, f"{name!r} changes a layer of {rows} x {columns}", hint_of("next"))


def module_shape(roles: Mapping[str, str], tensors: Mapping[str, TensorFact]) -> Size:
    """(rows, columns) of the weight that an adapter changes; 0 where its own matrices do not show it."""

    def size(role: str, axis: int) -> int:
        shape = tensors[roles[role]].shape if role in roles else ()
        return shape[axis] if len(shape) > axis else 0

    if "hada_w1_a" in roles or "hada_w1_b" in roles:
        return size("hada_w1_a", 0), size("hada_w1_b", 1)
    if any(role.startswith("lokr_") for role in roles):
        rows = (size("lokr_w1", 0) or size("lokr_w1_a", 0)) * (size("lokr_w2", 0) or size("lokr_w2_a", 0))
        return rows, (size("lokr_w1", 1) or size("lokr_w1_b", 1)) * (size("lokr_w2", 1) or size("lokr_w2_b", 1))
    return size("up", 0) or size("diff", 0), size("down", 1) or size("diff", 1)


def real_sizes(family: str, target: Target) -> Size | None:
    """(rows, columns) of the same weight in the family's published models."""
    module = target.module
    shapes = part_shapes(module.row, _WIDTHS[family, module.part]) if len(module.row.sizes) > 1 else []
    if not shapes:
        return None
    if target.path:
        shapes = [shapes[module.paths.index(target.path)]]
    return sum(shape[0] for shape in shapes), shapes[0][1]


def _foreign(what: str, why: str, hint: str) -> CheckpointError:
    return CheckpointError(f"The LoRA is for {what}, which is not converted: {why}.", hint)
