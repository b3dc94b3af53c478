"""What a user gave: a pipeline, one part, a LoRA, or a single file; one order of judgement for every command.

A folder with model_index.json is a pipeline, whatever lies beside its parts. A Hub cache stands for its snapshot. A
folder with one model file stands for that file. What it is not is said in a sentence.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fastsd_helpers.checkpoints.formats.file_content import is_safetensors_file, refuse_other_content
from fastsd_helpers.checkpoints.formats.pickled import PICKLE_ENDINGS
from fastsd_helpers.checkpoints.formats.prediction import read_config
from fastsd_helpers.checkpoints.formats.weight_sets import weight_sets
from fastsd_helpers.checkpoints.lora.layouts import is_lora_folder
from fastsd_helpers.downloads.hub_cache import snapshot_of
from fastsd_helpers.downloads.pipeline import not_a_pipeline, read_json
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.wording import list_some

__all__ = ["Given", "identify", "part_of"]

_PARTS_BY_CLASS = {
    "AutoencoderKL": "vae",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
    "FluxTransformer2DModel": "transformer",
    "T5EncoderModel": "text_encoder_2",
}
_MODEL_FILES = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")


@dataclass(frozen=True)
class Given:
    """What was found.

    path: what is to be read, which may lie deeper than what was named.
    part: which one `part` is in a model; of a `network`, which is none that is converted, its class.
    notes: what was chosen, one sentence each.
    """

    what: Literal["pipeline", "part", "lora", "network", "file"]
    path: Path
    part: str = ""
    notes: tuple[str, ...] = ()


def identify(path: Path) -> Given:
    """Tell what a file or folder is, by what it holds; weights are not opened.

    Raises:
        CheckpointError: it is not a model, or several, of which one has to be named.
        ModelError: it is not a model, or several, of which one has to be named.
    """
    if path.is_file():
        refuse_other_content(path)
        return Given("file", path, notes=_misnamed(path))
    if not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a folder.", "Give a model.")
    if (path / "model_index.json").is_file():
        return Given("pipeline", path)
    snapshot = snapshot_of(path)
    if snapshot is not None:
        found = identify(snapshot)
        return replace(
            found, notes=(f"The Hub cache {snapshot.parent.parent.name} was read at {snapshot.name}.", *found.notes)
        )
    part = part_of(path)
    if part and weight_sets(path):
        return Given("part", path, part)
    if is_lora_folder(path):
        return Given("lora", path)
    if part:
        return Given("part", path, part)
    kind = _class_of(path)
    return Given("network", path, kind) if kind and weight_sets(path) else _only_file(path)


def _misnamed(path: Path) -> tuple[str, ...]:
    if path.suffix.lower() not in PICKLE_ENDINGS or not is_safetensors_file(path):
        return ()
    return (f"{path.name} has the ending {path.suffix} but is a safetensors file: it was read as one.",)


def part_of(folder: Path) -> str:
    """The part that a folder is, where its config.json is that of one part of a model; else nothing."""
    return "" if (folder / "model_index.json").exists() else _PARTS_BY_CLASS.get(_class_of(folder), "")


def _class_of(folder: Path) -> str:
    config = read_config(folder / "config.json")
    return str(config.get("_class_name") or next(iter(config.get("architectures") or [""]), ""))


def _only_file(folder: Path) -> Given:
    inside = sorted(folder.iterdir())
    files = [path for path in inside if path.suffix.lower() in _MODEL_FILES and path.is_file()]
    deeper = [file for path in inside if path.is_dir() for file in path.iterdir()]
    # An empty config.json counts downloads on the Hub; any other describes a network of its own.
    described = bool(read_config(folder / "config.json"))
    parts = any(file.name == "config.json" or file.suffix.lower() in _MODEL_FILES for file in deeper)
    if not described and not parts:
        if len(files) == 1:
            alone = f"{files[0].name} is the only model file in {folder}."
            return Given("file", files[0], notes=(alone, *_misnamed(files[0])))
        if files:
            raise CheckpointError(
                f"{folder} holds {len(files)} model files: {list_some([path.name for path in files], 5)}.",
                "Specify one of them.",
            )
    names = [path.name for path in inside if path.is_file()] + [f"{file.parent.name}/{file.name}" for file in deeper]
    raise not_a_pipeline(str(folder), names, lambda name: read_json(folder, name))
