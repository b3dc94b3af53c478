"""The sets of weights a folder of one network can hold: one file or shards, safetensors or .bin, full or a variant.

Source: the names that diffusers' ModelMixin and transformers' PreTrainedModel look for, and the order they do it in.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.inert import read_config

__all__ = ["WeightSet", "choose_set", "choose_variant", "is_copy", "is_for_others", "weight_sets"]

_STEM = r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)"
_FILE = re.compile(_STEM + r"(?:\.(?P<variant>\w+))?\.(?P<kind>safetensors|bin)")
_INDEX = re.compile(_STEM + r"\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")
_SHARD = re.compile(_STEM + r"(?:\.\w+)?-\d{5}-of-\d{5}(?:\.\w+)?\.(?:safetensors|bin)")
# The same weights once more, for other programs.
_OTHERS = re.compile(
    r"(diffusion_)?flax_model.*|tf_model.*|(openvino|ov)_\w*model.*|rust_model\.ot"
    r"|.*\.(onnx|onnx_data|msgpack|h5|gguf|pb|tflite|ckpt)"
)


@dataclass(frozen=True)
class WeightSet:
    """One set of weights of a network.

    first: the file that is opened: the weights, or the index of shards.
    """

    first: Path
    stem: str
    kind: str
    variant: str | None

    @property
    def sharded(self) -> bool:
        """Whether it is several files with an index."""
        return self.first.suffix == ".json"


def weight_sets(folder: Path) -> list[WeightSet]:
    """Every set whose first file lies in a folder; shards without an index are none, as no library finds them."""
    found = []
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name) or _INDEX.fullmatch(path.name)
        if match is not None and path.is_file():
            found.append(WeightSet(path, match["stem"], match["kind"], match["variant"]))
    return found


def is_copy(name: str) -> bool:
    """Whether a file beside a network's weights is the same weights once more: shards, a variant, another format."""
    return is_for_others(name) or any(pattern.fullmatch(name) for pattern in (_FILE, _INDEX, _SHARD))


def is_for_others(name: str) -> bool:
    """Whether a file is weights for other programs than diffusers and transformers with PyTorch."""
    return _OTHERS.fullmatch(name) is not None


def choose_variant(parts: Iterable[list[WeightSet]]) -> str | None:
    """The variant that a whole model is loaded with: none where every part has full weights, else the one all have.

    As in diffusers, a part without the variant is loaded from its full weights.
    """
    offered = [{found.variant for found in sets} for sets in parts if sets]
    order = {"non_ema": 0, "fp16": 1, "bf16": 2}
    all_of_them = {variant for names in offered for variant in names if variant}
    every = sorted(all_of_them, key=lambda variant: (order.get(variant, 3), variant))
    for variant in (None, *every):
        if all({variant, None} & names for names in offered):
            return variant
    return every[0] if every else None


def choose_set(folder: Path, sets: list[WeightSet], variant: str | None = None) -> WeightSet:
    """The set that the network's library loads from a folder.

    Args:
        variant: of the whole model; where the part lacks it the full weights are taken, else its only variant.

    Raises:
        CheckpointError: there are several variants, and nothing says which one counts.
    """
    for wanted in dict.fromkeys((variant, None, "fp16", "bf16")):
        taken = [found for found in sets if found.variant == wanted]
        if taken:
            break
    else:
        if len({found.variant for found in sets}) > 1:
            raise CheckpointError(
                f"{folder} holds several variants: {', '.join(found.first.name for found in sets)}.",
                "Give the path of the file you want, or remove the others.",
            )
        taken = list(sets)
    config = folder / "config.json"
    of_diffusers = "_class_name" in read_config(config) if config.is_file() else None
    own = [found for found in taken if (found.stem == "diffusion_pytorch_model") == of_diffusers] or taken
    best = [found for found in own if found.kind == "safetensors"] or own
    if of_diffusers is not None:
        # Of a single file and shards, diffusers looks for the index first, transformers for the file.
        best = [found for found in best if found.sharded == of_diffusers] or best
    if len(best) > 1:
        raise CheckpointError(
            f"{folder} holds both {best[0].first.name} and {best[1].first.name}.",
            "Remove the wrong one.",
        )
    return best[0]
