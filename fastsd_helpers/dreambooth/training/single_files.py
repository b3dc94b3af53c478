"""A single model file becomes a folder that can be trained: its weights, and a tokenizer, which no such file holds."""

import json
import shutil
from pathlib import Path

from fastsd_helpers.checkpoints import convert
from fastsd_helpers.checkpoints.formats.sources import open_file
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.downloads import HubFile
from fastsd_helpers.downloads.hub_files import fetch_hub_file
from fastsd_helpers.dreambooth.families import family_named
from fastsd_helpers.errors import DownloadError, ModelError, WrongFamily
from fastsd_helpers.model_lookup import fetch_model
from fastsd_helpers.registry import TRAINABLE_FAMILIES, ModelSpec, models
from fastsd_helpers.runtime import logger

__all__ = ["make_base"]

_TOKENIZER = ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")


def make_base(file: Path, folder: Path) -> None:
    """Write the Diffusers folder of a .safetensors or .ckpt file, for `fetch_model(..., convert=make_base)`.

    The tokenizer is that of a known model of the same family with as many words: a packaged one, or a published one
    whose four small files are fetched from the Hub.

    Raises:
        WrongFamily: it is not a whole model, or its family cannot be trained.
        ModelError: no known tokenizer fits, or it cannot be fetched.
        CheckpointError: the file cannot be read safely.
        DiskFull: there is no room for the folder.
        DriveError: the folder cannot be written.
    """
    family, words = _look(file)
    lender = _packaged(family, words)
    files = {} if lender else _published(family, words, file.name)
    written = convert(file, folder, base=lender)
    if files:
        _add_tokenizers(folder, files)
    for note in written.notes:
        # What it predicts is asked about before anything is trained: what Diffusers would take does not matter.
        if "tokenizer" not in note and "Diffusers takes epsilon" not in note:
            logger.warning("%s: %s", file.name, note)


def _look(file: Path) -> tuple[str, int]:
    """The family, and how many words its text encoders know."""
    source = open_file(file)
    try:
        kind = detect(source.tensors)
        shapes = [fact.shape for name, fact in source.tensors.items() if name.endswith("token_embedding.weight")]
    finally:
        source.close()
    if kind.what != "checkpoint" or kind.family not in TRAINABLE_FAMILIES or not shapes:
        keys = ", ".join(f"'{spec.key}'" for spec in models() if spec.trainable)
        raise WrongFamily(
            f"{file.name} is {kind.words}, which DreamBooth here cannot train.",
            f"Choose a whole Stable Diffusion 1.5, 2.1 or XL model, or one of the keys {keys}.",
        )
    return kind.family, shapes[0][0]


def _packaged(family: str, words: int) -> Path | None:
    for spec in models():
        if spec.family == family and spec.folder is not None:
            folder = fetch_model(spec.key)
            if len(json.loads((folder / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))) == words:
                return folder
    return None


def _published(family: str, words: int, name: str) -> dict[str, list[Path]]:
    """The tokenizers' files, by folder, from the first model of the family that can be had."""
    by_hand = "Create the folder yourself: fastsd convert FILE FOLDER --base A_DIFFUSERS_FOLDER_OF_THAT_MODEL."
    failures: list[DownloadError] = []
    for source in (source for spec in models() if _lends(spec, family) for source in spec.sources):
        try:
            files = {
                part: [fetch_hub_file(HubFile(source.repo, f"{part}/{name}", source.revision)) for name in _TOKENIZER]
                for part in family_named(family).encoders.values()
            }
        except DownloadError as err:
            failures.append(err)
            continue
        first = next(iter(files.values()))
        known = len(json.loads(first[_TOKENIZER.index("vocab.json")].read_text(encoding="utf-8")))
        if known == words:
            return files
        raise ModelError(
            f"The text encoder of {name} has a vocabulary of {words} tokens, and the tokenizer of {source.repo} has "
            f"{known}: they do not match.",
            by_hand,
        )
    raise ModelError(
        f"{name} has no tokenizer (single-file checkpoints have none), and none could be downloaded: "
        f"{failures[0].problem}",
        f"{failures[0].hint} Or {by_hand[0].lower()}{by_hand[1:]}",
    ) from failures[0]


def _lends(spec: ModelSpec, family: str) -> bool:
    return spec.family == family and bool(spec.sources)


def _add_tokenizers(folder: Path, files: dict[str, list[Path]]) -> None:
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for part, paths in files.items():
        (folder / part).mkdir(exist_ok=True)
        for path in paths:
            shutil.copyfile(path, folder / part / path.name)
        index[part] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
