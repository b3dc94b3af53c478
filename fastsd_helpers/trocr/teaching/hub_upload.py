"""Upload a recognition model to the Hugging Face Hub: its files, its card; private unless asked."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.errors import ModelError, SettingsError
from fastsd_helpers.files import sha256_of
from fastsd_helpers.inert import require_inert
from fastsd_helpers.model_lookup import list_reader
from fastsd_helpers.registry import models
from fastsd_helpers.uploads import HubUpload, UploadResult, card_for_the_hub, require_name, send_model

__all__ = ["ReaderUploadConfig", "card_head", "upload"]

_WEIGHTS = (".safetensors", ".bin")  # of graphs too


@dataclass(frozen=True)
class ReaderUploadConfig(HubUpload):
    """Settings for an upload of a recognition model to the Hub."""


def upload(config: ReaderUploadConfig, folder: Path) -> UploadResult:
    """Upload a fine-tuned or int8 model and its card in one commit, then compare them with the Hub's list.

    Args:
        folder: of the model, or of the run that fine-tuned it.

    Raises:
        SettingsError: no name was given, or there is no such folder.
        ModelError: the folder holds no whole model with a card, or another kind of model.
        DownloadError: the Hub cannot be reached, or refuses.
        VerificationFailed: it has other bytes than were sent.
    """
    require_name(config.repo)
    folder = folder.expanduser()
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if not folder.is_dir():
        raise SettingsError(f"There is no folder {folder}.", "Give the folder of a model that you made.")
    names, card = list_reader(folder), folder / "README.md"
    if not card.is_file():
        hint = "Write one: what it reads, what it was made from, its licence. Fine-tuning and quantizing write it."
        raise ModelError(f"{folder} has no model card (README.md).", hint)
    require_inert([folder])
    files: dict[str, Path | bytes] = {name: folder / name for name in names}
    files["README.md"] = card_for_the_hub(card.read_text(encoding="utf-8")).encode()
    weights = sorted((name for name in names if name.endswith(_WEIGHTS)), key=lambda name: _size(folder / name))
    hashes = {name: sha256_of(folder / name) for name in reversed(weights)}
    return send_model(config.repo, files, hashes, private=config.private, token=config.hf_token)


def _size(path: Path) -> int:
    return path.stat().st_size


def card_head(base: str) -> str:
    """The head of a model card in the Hub's format: what the model was made from, its licence.

    Args:
        base: key, Hub id or folder of the model it was made from; of a folder the last name alone is told.
    """
    local = Path(base).expanduser()
    name = local.resolve().name if local.is_absolute() or local.exists() else base
    known = {key: spec for spec in models("reader") for key in (spec.key, *(source.repo for source in spec.sources))}
    licence = known[name].licence if name in known else "that of the model it was made from"
    front = {"license": licence, "base_model": name, "pipeline_tag": "image-to-text"}
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    return "\n".join(["---", *lines, 'tags: ["trocr", "handwriting"]', "---", ""])
