"""What a Diffusers pipeline folder holds: which files matter, whether it is whole, and its fingerprint."""

import functools
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import ModelError
from fastsd_helpers.files import remembered_sha256
from fastsd_helpers.inert import read_config

__all__ = [
    "CONVERT_HINT",
    "PARTS",
    "PIPELINE",
    "WEIGHT_PARTS",
    "Contents",
    "Listing",
    "list_files",
    "missing_parts",
    "model_hash",
    "not_a_pipeline",
    "pick_weights",
    "pipeline_files",
    "read_json",
    "require_pipeline",
    "variant_of",
    "wanted_files",
]

# The parts of a pipeline that training, sampling and export read. Everything else in a repository (safety checker,
# image processor, single files, ONNX, Flax, images) stays where it is.
WEIGHT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "unet", "vae")
PARTS = (*WEIGHT_PARTS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")

_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|pytorch_model|model)(\.(?P<variant>\w+?))?(-\d{5}-of-(?P<shards>\d{5}))?"
    r"(\.(?P<late_variant>\w+))?\.(?P<suffix>safetensors|bin)"
)
_ENDINGS = (".safetensors", ".bin")  # of the weights that are wanted
# Beside its weights a part needs descriptions and vocabularies; nothing else of it is fetched, programs least of all.
_SMALL_FILES = (".json", ".txt", ".model", ".spm", ".tiktoken")
_VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"vocab.txt"}, {"spiece.model"}, {"tokenizer.model"})
_SINGLE_FILES = (".ckpt", ".gguf", ".pt", ".pth", ".safetensors")
_NETWORKS = {  # what the name of a class says of the network
    "ControlNet": "a ControlNet",
    "Autoencoder": "only a VAE",
    "UNet": "only a U-Net",
    "Transformer2D": "only a transformer",
}
CONVERT_HINT = (
    "A base model is a Diffusers folder. Make one of a single file with `fastsd convert FILE FOLDER` and give that "
    "folder; or give a Hub id or a key such as 'sd15'."
)


@dataclass(frozen=True)
class Listing:
    """The files of a model, in a folder or on the Hub, before any large one of them is opened or fetched.

    where: names it at the start of a sentence. names: file -> bytes, 'unet/config.json' for one in a subfolder; the
    bytes are None where the Hub does not say. read: the JSON object in one of the small files.
    """

    where: str
    names: Mapping[str, int | None]
    read: Callable[[str], dict[str, Any]]

    @classmethod
    def of_folder(cls, folder: Path) -> "Listing":
        """The listing of a Diffusers folder."""
        return cls(str(folder), list_files(folder), functools.partial(read_json, folder))


@dataclass(frozen=True)
class Contents:
    """What is wanted of a repository of one kind, and when a folder with that in it is whole.

    noun: the kind, for sentences. wanted: the names to fetch, or an error when the listing is that of something else;
    it is asked before anything large is fetched. require: raises ModelError when a folder is not whole.
    """

    noun: str
    wanted: Callable[[Listing], list[str]]
    require: Callable[[Path], object]


def list_files(folder: Path) -> dict[str, int]:
    """List a model folder's files and those of its direct subfolders: 'unet/config.json' -> bytes.

    Deeper levels are not read: a user may have named a whole Drive.
    """
    found = {}
    try:
        for entry in sorted(folder.iterdir()):
            if entry.is_file():
                found[entry.name] = entry.stat().st_size
            elif entry.is_dir() and entry.name in PARTS:
                found |= {
                    f"{entry.name}/{file.name}": file.stat().st_size for file in entry.iterdir() if file.is_file()
                }
    except OSError as err:
        raise ModelError(
            f"The folder {folder} cannot be read: {err.strerror}.", "Check that it is mounted and readable."
        ) from err
    return found


def pick_weights(names: Iterable[str]) -> tuple[list[str], str | None]:
    """Choose one whole set of weights among the file names of one component.

    Full precision before a variant such as fp16, then safetensors before bin, then one file before shards.

    Args:
        names: the files of the component's folder.

    Returns:
        The file names (with the shards' index) and the variant's name, None for full weights; ([], None) when
        there is no whole set.
    """
    names = sorted(names)
    sets: dict[tuple[str, str, str, str], list[str]] = {}
    for name in names:
        match = _WEIGHTS.fullmatch(name)
        if match:
            variant = match["variant"] or match["late_variant"] or ""
            sets.setdefault((variant, match["suffix"], match["shards"] or "", match["stem"]), []).append(name)
    # non_ema weights are full precision; fp16 and bf16 are what a repository without full weights usually has.
    order = {"": 0, "non_ema": 1, "fp16": 2, "bf16": 3}
    for variant, suffix, shards, stem in sorted(sets, key=lambda s: (order.get(s[0], 4), s[1] != "safetensors", s[2])):
        files = sets[variant, suffix, shards, stem]
        if shards:
            index = [
                name
                for name in names
                if name.startswith(f"{stem}.")
                and f".{suffix}.index" in name
                and name.endswith(".json")
                and (f".{variant}." in name if variant else name == f"{stem}.{suffix}.index.json")
            ]
            if not index or len(files) != int(shards):
                continue
            files = files + index[:1]
        return files, variant or None
    return [], None


def variant_of(folder: Path, part: str) -> str | None:
    """Name the variant (`fp16`) that `from_pretrained(folder, subfolder=part)` must ask for; None for full weights.

    Args:
        folder: a Diffusers folder.
        part: a component's folder in it, such as `unet`.

    Returns:
        The variant, or None.
    """
    return pick_weights(name.removeprefix(f"{part}/") for name in list_files(folder) if name.startswith(f"{part}/"))[1]


def _parts_named(index: dict[str, Any]) -> list[str]:
    """The parts we need that a model_index.json says the pipeline has."""
    return [part for part in PARTS if isinstance(index.get(part), list) and index[part] and index[part][0]]


def wanted_files(names: Iterable[str], index: dict[str, Any]) -> list[str]:
    """Of a repository's files, those that training needs; raises nothing: see `missing_parts`."""
    names = list(names)
    wanted = ["model_index.json"]
    for part in _parts_named(index):
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        inside = [name for name in inside if "/" not in name]
        weights = pick_weights(inside)[0] if part in WEIGHT_PARTS else []
        rest = [name for name in inside if name.endswith(_SMALL_FILES) and ".index." not in name]
        wanted += [f"{part}/{name}" for name in sorted({*weights, *rest})]
    return wanted


def missing_parts(names: Iterable[str], index: dict[str, Any]) -> list[str]:
    """List what a Diffusers folder with these file names lacks of what its model_index.json names."""
    names = set(names)
    missing = [] if {"unet", "transformer"} & set(_parts_named(index)) else ["a unet or transformer"]
    for part in _parts_named(index):
        inside = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        if part in WEIGHT_PARTS:
            missing += [] if "config.json" in inside else [f"{part}/config.json"]
            missing += [] if pick_weights(inside)[0] else [f"the weights in {part}/"]
        elif part == "scheduler":
            missing += [] if "scheduler_config.json" in inside else ["scheduler/scheduler_config.json"]
        else:  # without its config a tokenizer loads, but with no limit on the length of a prompt
            missing += [] if "tokenizer_config.json" in inside else [f"{part}/tokenizer_config.json"]
            whole = any(set(inside) >= needed for needed in _VOCABULARIES)
            missing += [] if whole else [f"the vocabulary in {part}/"]
    return missing


def pipeline_files(listing: Listing) -> list[str]:
    """Of the files of a Diffusers pipeline, those that training needs.

    Raises:
        ModelError: it is something else, or a part of it is missing; the sentence says which.
    """
    index, missing = _parts_of(listing)
    if missing:
        raise ModelError(
            f"{listing.where} is not a complete Diffusers model: {', '.join(missing)} missing.",
            "Choose another repository, or a key such as 'sd15'.",
        )
    return wanted_files(listing.names, index)


def require_pipeline(folder: Path) -> dict[str, Any]:
    """Check that a folder is a whole Diffusers pipeline and return its model_index.json; raises as `pipeline_files`.

    Args:
        folder: a Diffusers folder.

    Returns:
        Its model_index.json.
    """
    listing = Listing.of_folder(folder)
    index, missing = _parts_of(listing)
    if missing:
        raise ModelError(
            f"The Diffusers folder {folder} is incomplete: {', '.join(missing)} missing.",
            "Copy or download it again with all its subfolders.",
        )
    wanted = wanted_files(listing.names, index)
    empty = [name for name in wanted if listing.names.get(name) == 0 and name.endswith(_ENDINGS)]
    if empty:
        raise ModelError(
            f"The Diffusers folder {folder} is incomplete: {', '.join(empty)} empty.",
            "A mounted Drive may not have synced it yet: wait and try again, or copy it again.",
        )
    return index


def _parts_of(listing: Listing) -> tuple[dict[str, Any], list[str]]:
    """What model_index.json says, and what lacks of it."""
    if "model_index.json" not in listing.names:
        raise not_a_pipeline(listing.where, listing.names, listing.read)
    index = listing.read("model_index.json")
    return index, missing_parts(listing.names, index)


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Read a JSON object of a model folder; ModelError when it is none, or could make a library load code.

    Args:
        folder: of the model.
        name: of the file in it, such as `model_index.json`.

    Returns:
        The object.
    """
    return read_config(folder / name)


def not_a_pipeline(where: str, names: Iterable[str], read: Callable[[str], dict[str, Any]]) -> ModelError:
    """Say what a folder or repository without model_index.json is instead, and what is needed."""
    names = list(names)
    top = [name for name in names if "/" not in name]
    needs = "Give a complete Diffusers model (a folder with model_index.json, unet/, vae/, text_encoder/, ...)"
    if not names:
        return ModelError(f"{where} is empty.", f"{needs}, or a key such as 'sd15'.")
    loras = [name for name in top if "lora" in name.lower() and name.endswith((".safetensors", ".bin", ".pt"))]
    if "adapter_config.json" in top or loras:
        return ModelError(f"{where} is a LoRA, not a base model.", f"{needs}: the one this LoRA was made for.")
    if "config.json" in top:
        config = read("config.json")
        kind = str(config.get("_class_name") or next(iter(config.get("architectures") or []), "unknown kind"))
        what = next((words for part, words in _NETWORKS.items() if part in kind), "a single network")
        return ModelError(f"{where} is {what} ({kind}), not a base model.", f"{needs}: the one it belongs to.")
    if any(name.split("/")[0] in WEIGHT_PARTS for name in names if "/" in name):
        return ModelError(
            f"{where} has model parts but no model_index.json.", "Copy or download the complete Diffusers folder again."
        )
    singles = [name for name in top if name.endswith(_SINGLE_FILES)]
    if singles:
        return ModelError(
            f"{where} holds single files ({', '.join(singles[:3])}), not a Diffusers model.", CONVERT_HINT
        )
    return ModelError(
        f"{where} is not a Diffusers model: it has no model_index.json.", f"{needs}, or a key such as 'sd15'."
    )


# ----------------------------------------------------------------------------------------------------- hashes


def model_hash(folder: Path) -> str:
    """Fingerprint a Diffusers folder: sha256 over the names and sha256 of the weights that are loaded.

    The first call reads every weight file once; later calls in this process answer from memory unless a file changed.

    Args:
        folder: a Diffusers folder.

    Returns:
        64 lower-case hex digits.
    """
    index = require_pipeline(folder)
    names = [name for name in wanted_files(list_files(folder), index) if name.endswith(_ENDINGS)]
    lines = [f"{name} {remembered_sha256(folder / name)}\n" for name in sorted(names)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


PIPELINE = Contents("base model", pipeline_files, require_pipeline)
