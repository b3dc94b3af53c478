"""Where a reader comes from: a registry key, a Hub id or a folder becomes a local folder with a TrOCR model in it."""

import importlib.resources
import logging
import os
import re
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads import read_json
from fastsd_helpers.errors import DependencyMissing, FastSDError, ModelError, ModelNotFound, WrongFamily
from fastsd_helpers.registry import find_model, models
from fastsd_helpers.runtime import secret

__all__ = ["GRAPHS", "find_reader", "reader_keys", "require_reader"]

logger = logging.getLogger("fastsd_helpers")

GRAPHS = "openvino"  # subfolder of a reader that was quantised: its graphs, instead of PyTorch weights
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}(@[\w./-]+)?")
_WANTED = ["*.json", "*.txt", "*.model", f"{GRAPHS}/*"]  # and one kind of weights


def reader_keys() -> list[str]:
    """The keys of models.toml that are readers."""
    return [spec.key for spec in models("reader")]


def find_reader(ref: str | Path, *, cache_dir: Path | None = None) -> Path:
    """Turn what a user typed as reader into a local folder, downloading it when needed.

    Args:
        ref: a registry key (`trocr-base-handwritten`), a folder, or a Hub id (`owner/name`, `owner/name@revision`).
        cache_dir: where downloads are kept; left alone, the Hugging Face cache.

    Raises:
        ModelNotFound: nothing of that name. WrongFamily: a model of another kind. ModelError: it cannot be had.
    """
    text = str(ref).strip()
    if text in reader_keys():
        return _of_key(text, cache_dir)
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        require_reader(path)
        return path.resolve()
    if path.is_file():
        raise ModelError(f"'{text}' is a file.", "Give the folder of the model (with config.json in it).")
    if text in {spec.key for spec in models()}:
        raise WrongFamily(f"'{text}' draws pictures; it does not read them.", _keys_hint())
    if not _HUB_ID.fullmatch(text):
        raise ModelNotFound(f"No reader '{text}': no key, no folder, and no Hub id (owner/name).", _keys_hint())
    repo, _, revision = text.partition("@")
    return _from_hub(repo, revision or None, cache_dir)


def _keys_hint() -> str:
    keys = reader_keys()
    known = f"one of the keys {', '.join(keys)}, " if keys else ""
    return f"Choose {known}a folder with a TrOCR model, or a Hub id such as microsoft/trocr-base-handwritten."


def _of_key(key: str, cache_dir: Path | None) -> Path:
    spec = find_model(key)
    if spec.folder:
        folder = Path(str(importlib.resources.files("fastsd_helpers"))).joinpath(*spec.folder.split("/"))
        if not folder.is_dir():
            raise ModelNotFound(
                f"The reader '{key}' is not in this installation: {folder} does not exist.",
                "Install fastsd_helpers again from its repository, whole; or choose another reader.",
            )
        return folder
    failures: list[FastSDError] = []
    for source in spec.sources:
        try:
            return _from_hub(source.repo, source.revision, cache_dir)
        except ModelError as err:
            failures.append(err)
            logger.warning("'%s' could not be fetched from %s: %s", key, source.repo, err.problem)
    raise ModelError(
        f"None of the sources of '{key}' worked. {' '.join(err.problem for err in failures)}",
        failures[-1].hint if failures else _keys_hint(),
    )


def _from_hub(repo: str, revision: str | None, cache_dir: Path | None) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as err:
        raise DependencyMissing(
            f"The reader {repo} is on the Hub, and the package huggingface_hub is not installed.",
            "Run: fastsd install trocr, or give a folder that is already here.",
        ) from err
    token = secret("HF_TOKEN")
    settings: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    try:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE") in ("1", "true")
        weights = "*.safetensors"
        if not offline:
            names = huggingface_hub.HfApi(token=token).list_repo_files(repo, revision=revision)
            # Both kinds hold the same weights, 1.3 GB each at base size; an int8 folder has neither.
            weights = "*.safetensors" if any(name.endswith(".safetensors") for name in names) else "*.bin"
        folder = huggingface_hub.snapshot_download(
            repo, allow_patterns=[*_WANTED, weights], local_files_only=offline, **settings
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as err:
        raise ModelNotFound(
            f"The Hub has no {repo}{f' at {revision}' if revision else ''}, or it is private.",
            "Check the spelling; for a private model set HF_TOKEN.",
        ) from err
    except errors.GatedRepoError as err:
        raise ModelError(f"{repo} asks for consent first.", "Accept its terms on its Hub page, set HF_TOKEN.") from err
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError, ValueError) as err:
        raise ModelError(
            f"{repo} could not be fetched from the Hub: {err}.", "Check the connection; try again."
        ) from err
    require_reader(Path(folder))
    return Path(folder)


def require_reader(folder: Path) -> dict[str, Any]:
    """Check that a folder holds a TrOCR model with its tokenizer and picture settings; return its config.json.

    Raises:
        WrongFamily: it is another kind of model. ModelError: a part of it is missing.
    """
    names = {entry.name for entry in folder.iterdir()}
    if "adapter_config.json" in names and "config.json" not in names:
        raise ModelError(
            f"{folder} is a LoRA adapter, not a whole reader.", "Merge it into its base model and save that."
        )
    if "config.json" not in names:
        raise ModelError(f"{folder} is no model: it has no config.json.", _keys_hint())
    config = read_json(folder, "config.json")
    kind = str(config.get("model_type") or (config.get("architectures") or ["unknown"])[0])
    decoder = str(config.get("decoder", {}).get("model_type", "none"))
    if kind != "vision-encoder-decoder" or decoder != "trocr":
        what = kind if kind != "vision-encoder-decoder" else f"reader with a {decoder} decoder"
        raise WrongFamily(f"{folder} is no TrOCR model but a {what}.", _keys_hint())
    weights = [name for name in names if name.endswith((".safetensors", ".bin"))]
    if not weights and not (folder / GRAPHS / "decoder.xml").is_file():
        raise ModelError(f"{folder} has no weights.", "Copy or download it again, whole.")
    if not names & {"tokenizer.json", "vocab.json", "sentencepiece.bpe.model"}:
        raise ModelError(
            f"{folder} has no tokenizer: without it token numbers cannot be turned into text.",
            "Copy tokenizer.json (or vocab.json and merges.txt, or sentencepiece.bpe.model) of the model it was "
            "trained from into the folder.",
        )
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise ModelError(
            f"{folder} has no preprocessor_config.json: the size and scaling of its pictures are unknown.",
            "Copy preprocessor_config.json of the model it was trained from into the folder.",
        )
    return config
