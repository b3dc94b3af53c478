"""Turn what a user typed as base model into a local Diffusers folder: a key, folder, Hub id, single file or link."""

import importlib.resources
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.downloads.files import fetch, models_folder
from fastsd_helpers.downloads.hub import fetch_repo
from fastsd_helpers.downloads.links import is_link, show_typed
from fastsd_helpers.downloads.pipeline import CONVERT_HINT, require_pipeline
from fastsd_helpers.downloads.table import base_keys, models_table
from fastsd_helpers.drive import drive_errors, sha256_of
from fastsd_helpers.errors import FastSDError, ModelError, ModelNotFound

__all__ = ["fetch_model"]

logger = logging.getLogger("fastsd_helpers")

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(@(?P<revision>[\w./-]+))?")
_HUB_PAGE = re.compile(
    r"https?://(www\.)?(huggingface\.co|hf\.co)/(?P<repo>[\w.-]+/[\w.-]+)(/tree/(?P<revision>[^/?#]+))?/?"
)


def fetch_model(
    ref: str | Path, *, cache_dir: Path | None = None, convert: Callable[[Path, Path], object] | None = None
) -> Path:
    """Turn what a user typed as base model into a local Diffusers folder, downloading it when needed.

    Args:
        ref: a registry key (`sd15`), a folder, a Hub id (`owner/name`, `owner/name@revision`) or its page's address;
            with `convert` also a single file or a link to one.
        cache_dir: where downloads are kept; left alone, the Hugging Face cache (`HF_HOME`, `HF_HUB_CACHE`).
        convert: makes a Diffusers folder (second argument, not there yet) of a single file (first argument), as
            `checkpoints.convert` does. The folder is kept beside the downloads and found again by the file's hash.

    Raises:
        ModelNotFound: nothing of that name; ModelError: it is there but cannot be had or is not a Diffusers
        pipeline; DiskFull, DriveReadOnly: it does not fit or may not be written.
    """
    text = str(ref).strip()
    if text in base_keys():
        return _fetch_key(text, cache_dir)
    if text in models_table():
        raise ModelError(
            f"'{text}' ({models_table()[text]['title']}) is no base model.", f"Choose one of {', '.join(base_keys())}."
        )
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        require_pipeline(Path(path))
        return Path(path).resolve()
    if os.path.isfile(path):
        if convert is None:
            raise ModelError(f"'{text}' is a single file.", CONVERT_HINT)
        return _converted(Path(path), convert)
    match = _HUB_ID.fullmatch(text) or _HUB_PAGE.fullmatch(text)
    if match is None and convert is not None and is_link(text):
        return _converted(fetch(text), convert)
    if match is None:
        raise _nothing_called(text)
    repo, revision = match["repo"], match["revision"]
    for key, row in models_table().items():
        if repo in row.get("former", ()):
            logger.warning("%s is gone from the Hub; its living copy is used instead (key '%s').", repo, key)
            return _fetch_key(key, cache_dir)
    return fetch_repo(repo, revision=revision, cache_dir=cache_dir)


def _converted(file: Path, convert: Callable[[Path, Path], object]) -> Path:
    """The Diffusers folder of a single file, made once."""
    folder = models_folder() / "converted" / f"{file.stem[:60]}-{sha256_of(file)[:12]}"
    if folder.is_dir():
        require_pipeline(folder)
        return folder
    with drive_errors(folder.parent, "write to"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    logger.info("Making a Diffusers folder of %s (once).", file.name)
    try:
        convert(file, unfinished)
        require_pipeline(unfinished)
        with drive_errors(folder, "write"):
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _nothing_called(text: str) -> FastSDError:
    keys = f"the keys {', '.join(base_keys())}"
    if not text:
        return ModelNotFound(
            "No base model was named.", f"Choose one of {keys}, a Hub id such as owner/name, or a folder."
        )
    if re.match(r"https?://", text):
        return ModelError(
            f"'{show_typed(text)}' is a link that cannot be used as a base model.",
            f"Give the Hub id of a Diffusers model (owner/name), a folder, or one of {keys}.",
        )
    return ModelNotFound(
        f"No base model '{show_typed(text)}': there is no folder of that name, it is no registry key, and it is no Hub "
        "id (owner/name).",
        f"Check the spelling, or choose one of {keys}.",
    )


def _fetch_key(key: str, cache_dir: Path | None) -> Path:
    row = models_table()[key]
    if "folder" in row:
        return _packaged_folder(key, row["folder"])
    failures: list[FastSDError] = []
    for source in row["sources"]:
        try:
            return fetch_repo(source["repo"], revision=source.get("revision"), cache_dir=cache_dir, pinned_by_us=True)
        except ModelError as err:  # a full disk is a DriveError: another mirror would not help
            failures.append(err)
            logger.warning("'%s' could not be fetched from %s: %s", key, source["repo"], err.problem)
    if len(failures) == 1:
        raise failures[0]
    kind = ModelNotFound if all(isinstance(err, ModelNotFound) for err in failures) else ModelError
    sentences = " ".join(err.problem for err in failures)
    problem = f"None of the {len(failures)} sources of '{key}' worked. {sentences}"
    raise kind(problem, failures[0].hint) from failures[-1]


def _packaged_folder(key: str, inside: str) -> Path:
    folder = Path(str(importlib.resources.files("fastsd_helpers"))).joinpath(*inside.split("/"))
    if not folder.is_dir():
        raise ModelNotFound(
            f"The model '{key}' is not in this installation: {folder} does not exist.",
            "Install fastsd_helpers again from its repository, whole; or choose another base model.",
        )
    require_pipeline(folder)
    return folder
