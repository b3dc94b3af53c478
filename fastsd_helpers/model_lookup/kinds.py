"""The kinds of models that are looked up: which files of one are wanted, and how they are checked."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fastsd_helpers.downloads import pick_weights, read_json
from fastsd_helpers.downloads.pipeline import PIPELINE, Contents, Listing
from fastsd_helpers.errors import FastSDError, ModelError, WrongFamily
from fastsd_helpers.registry import ModelSpec, models

__all__ = ["BASE_MODEL", "CAPTIONER", "CONTROLNET", "LORA", "ModelKind", "base_model", "list_flat", "lora_file"]


@dataclass(frozen=True)
class ModelKind:
    """One kind of model, as `find_folder` looks for it.

    contents: which files of a repository are wanted, and when a folder is whole. registry: the kind of the keys that
    name it; None when no key does. accept: raises WrongFamily for a key of the kind that does not serve, before
    anything is fetched. examples: what else to give, at the end of a hint.
    """

    contents: Contents
    registry: str | None
    examples: str
    accept: Callable[[ModelSpec], object] | None = None

    @property
    def noun(self) -> str:
        """The kind in words."""
        return self.contents.noun

    def keys(self) -> list[str]:
        """The keys that name a model of this kind that serves."""
        return [spec.key for spec in models(self.registry) if self._takes(spec)] if self.registry else []

    def _takes(self, spec: ModelSpec) -> bool:
        if self.accept is None:
            return True
        try:
            self.accept(spec)
        except FastSDError:
            return False
        return True

    def choices(self) -> str:
        """The keys and everything else that can be given, for a hint."""
        keys = self.keys()
        return f"one of the keys {', '.join(keys)}, {self.examples}" if keys else self.examples


BASE_MODEL = ModelKind(PIPELINE, "base", "a Hub id such as owner/name, or a folder with a Diffusers model")


def base_model(accept: Callable[[ModelSpec], object], check: Callable[[Listing], object]) -> ModelKind:
    """A base model that serves a purpose.

    Args:
        accept: raises WrongFamily for the registry row of a key that does not serve.
        check: the same for a folder or repository, told from its small files alone.
    """

    def wanted(listing: Listing) -> list[str]:
        names = PIPELINE.wanted(listing)
        check(listing)
        return names

    def require(folder: Path) -> None:
        PIPELINE.require(folder)
        check(Listing.of_folder(folder))

    return replace(BASE_MODEL, contents=replace(PIPELINE, wanted=wanted, require=require), accept=accept)


def list_flat(folder: Path) -> Listing:
    """The files of a folder that has no subfolders of interest."""
    names = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return Listing(str(folder), names, functools.partial(read_json, folder))


def _flat(noun: str, wanted: Callable[[Listing], list[str]]) -> Contents:
    """Contents of a kind whose folder is judged as its repository is."""
    return Contents(noun, wanted, lambda folder: wanted(list_flat(folder)))


def _captioner_files(listing: Listing) -> list[str]:
    hint = f"Give {CAPTIONER.examples}; or write the captions by hand."
    if "config.json" not in listing.names:
        raise ModelError(f"{listing.where} is not a model: it has no config.json.", hint)
    kind = listing.read("config.json").get("model_type", "unknown")
    if kind != "blip":
        raise WrongFamily(f"{listing.where} is a {kind} model, not a BLIP captioning model.", hint)
    weights, _variant = pick_weights(name for name in listing.names if name.endswith((".safetensors", ".index.json")))
    if not weights:
        raise ModelError(f"{listing.where} has no weights in .safetensors files.", hint)
    return [*(name for name in listing.names if "/" not in name and name.endswith((".json", ".txt"))), *weights]


CAPTIONER = ModelKind(
    _flat("captioning model", _captioner_files),
    None,
    "a folder or a Hub id of a BLIP model, such as Salesforce/blip-image-captioning-base",
)


def _lora_files(listing: Listing) -> list[str]:
    files = [name for name in listing.names if "/" not in name and name.endswith(".safetensors")]
    known = [name for name in files if name in ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")]
    if len(known or files) != 1:
        said = f"holds {len(files)} files ({', '.join(files[:4])})" if files else "holds no .safetensors file"
        raise ModelError(f"{listing.where} {said}: which one is the LoRA?", "Give the file itself, or a link to it.")
    return [*(known or files), *(name for name in ("adapter_config.json",) if name in listing.names)]


LORA = ModelKind(_flat("LoRA", _lora_files), None, "a .safetensors file, a link to one, a folder or a Hub id")


def lora_file(folder: Path) -> Path:
    """The weights in the folder of a LoRA.

    Args:
        folder: as peft or diffusers write it.
    """
    return folder / _lora_files(list_flat(folder))[0]


def _controlnet_files(listing: Listing) -> list[str]:
    hint = f"Give {CONTROLNET.examples}."
    if "config.json" not in listing.names:
        raise ModelError(f"{listing.where} is not a ControlNet: it has no config.json.", hint)
    kind = str(listing.read("config.json").get("_class_name", "unknown"))
    if "ControlNet" not in kind:
        raise WrongFamily(f"{listing.where} is not a ControlNet but a {kind}.", hint)
    weights, _variant = pick_weights(name for name in listing.names if "/" not in name)
    if not weights:
        raise ModelError(f"{listing.where} has no weights.", "Copy or download all of it again.")
    return ["config.json", *weights]


CONTROLNET = ModelKind(_flat("ControlNet", _controlnet_files), None, "a task, a file, a Diffusers folder or a Hub id")
