"""A model of a kind brought here: from a key, folder, file, link or repository of the Hub to a local folder."""

import difflib
import importlib.resources
import re
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.downloads import HubFile, fetch, fetch_repo, models_folder
from fastsd_helpers.downloads.hub_cache import snapshot_of
from fastsd_helpers.downloads.hub_files import fetch_hub_file
from fastsd_helpers.downloads.links import show_typed
from fastsd_helpers.downloads.pipeline import CONVERT_HINT
from fastsd_helpers.errors import FastSDError, ModelError, ModelNotFound, WrongFamily
from fastsd_helpers.files import file_errors, placed, sha256_of
from fastsd_helpers.inert import require_inert
from fastsd_helpers.model_lookup.kinds import BASE_MODEL, ModelKind
from fastsd_helpers.model_lookup.names import FILE_ENDINGS, Name, known_model, understand
from fastsd_helpers.registry import ModelSpec, models
from fastsd_helpers.runtime import logger

__all__ = ["fetch_model", "find_folder"]


def fetch_model(
    ref: str | Path, *, cache_dir: Path | None = None, convert: Callable[[Path, Path], object] | None = None
) -> Path:
    """Turn what a user typed as base model into a local Diffusers folder, downloading it when needed.

    Args:
        ref: as for `find_folder`, which says what is raised too.
        cache_dir: see `ref`.
        convert: see `ref`.

    Returns:
        The folder, whole and looked through.
    """
    return find_folder(ref, BASE_MODEL, cache_dir=cache_dir, convert=convert)


def find_folder(
    ref: str | Path,
    kind: ModelKind,
    *,
    cache_dir: Path | None = None,
    convert: Callable[[Path, Path], object] | None = None,
) -> Path:
    """Turn what a user typed into a local folder with a whole model of a kind, downloading it when needed.

    Args:
        ref: a registry key (`sd15`), a folder, a Hub id (`owner/name`, `owner/name@revision`) or its page's address;
            with `convert` also a single file or a link to one.
        kind: what it shall be; something else is refused, a key without any request.
        cache_dir: where downloads are kept; left alone, the Hugging Face cache (`HF_HOME`, `HF_HUB_CACHE`).
        convert: makes a Diffusers folder (second argument, not there yet) of a single file (first argument), as
            `checkpoints.convert` does. The folder is kept beside the downloads and found again by the file's hash.

    Returns:
        The folder, whole and looked through.

    Raises:
        WrongFamily: a model of another kind or family.
        ModelNotFound: nothing of that name.
        ModelError: it cannot be had, or is not whole.
        DiskFull: it does not fit.
        DriveReadOnly: it may not be written.
    """
    name = understand(ref)
    folder = _find(name, kind, cache_dir, convert)
    require_inert([folder])
    return folder


def _find(name: Name, kind: ModelKind, cache_dir: Path | None, convert: Callable[[Path, Path], object] | None) -> Path:
    if name.spec is not None:
        return _of_key(name.spec, kind, cache_dir, convert)
    known = known_model(name.text) if name.what in ("hub", "link") else None
    if known is not None and kind.accept is not None and known.kind == kind.registry:
        # Its repository is in the table of models: nobody has to be asked whether it serves.
        kind.accept(known)
    if name.what == "folder" and name.path is not None:
        with file_errors(name.path, "read"):
            snapshot_of(name.path)  # a cache with several says which there are
            kind.contents.require(name.path)
            return name.path.resolve()
    if name.what == "file" and name.path is not None:
        if convert is None:
            hint = CONVERT_HINT if kind.registry == "base" else "Give the folder of the model, with config.json in it."
            raise ModelError(f"'{name.text}' is a single file.", hint)
        return _converted(name.path, kind, convert)
    if name.what == "link" and convert is not None:
        return _converted(fetch(name.text), kind, convert)
    if name.what == "hub":
        return _of_hub(name, kind, cache_dir)
    raise _nothing_called(name, kind)


def _of_hub(name: Name, kind: ModelKind, cache_dir: Path | None) -> Path:
    for spec in models(kind.registry) if kind.registry else ():
        if name.repo in spec.former:
            logger.warning(
                "%s is gone from the Hub; a mirror that still exists is used instead (key '%s').", name.repo, spec.key
            )
            return _of_key(spec, kind, cache_dir)
    return fetch_repo(name.repo, contents=kind.contents, revision=name.revision, cache_dir=cache_dir)


def _of_one_file(spec: ModelSpec, kind: ModelKind, convert: Callable[[Path, Path], object] | None) -> Path:
    """A model that is published as one file alone; its bytes and hash are compared where they are known."""
    about = spec.checkpoint or {}
    if convert is None:
        raise ModelError(
            f"'{spec.key}' ({spec.title}) is published as a single file, {about.get('file')} of {about.get('repo')}.",
            CONVERT_HINT,
        )
    wanted = HubFile(about["repo"], about["file"], about.get("revision"))
    file = fetch_hub_file(wanted, size=about.get("bytes"), sha256=about.get("sha256"))
    return _converted(file, kind, convert)


def _of_key(
    spec: ModelSpec, kind: ModelKind, cache_dir: Path | None, convert: Callable[[Path, Path], object] | None = None
) -> Path:
    if spec.kind != kind.registry:
        raise WrongFamily(f"'{spec.key}' ({spec.title}) is not a {kind.noun}.", f"Choose {kind.choices()}.")
    if kind.accept is not None:
        kind.accept(spec)
    if spec.folder is not None:
        return _packaged_folder(spec, spec.folder, kind)
    if not spec.sources:
        return _of_one_file(spec, kind, convert)
    failures: list[FastSDError] = []
    for source in spec.sources:
        try:
            return fetch_repo(
                source.repo, contents=kind.contents, revision=source.revision, cache_dir=cache_dir, pinned_by_us=True
            )
        except ModelError as err:  # a full disk is a DriveError: another mirror would not help
            failures.append(err)
            logger.warning("'%s' could not be fetched from %s: %s", spec.key, source.repo, err.problem)
    if len(failures) == 1:
        raise failures[0]
    error = ModelNotFound if all(isinstance(err, ModelNotFound) for err in failures) else ModelError
    sentences = " ".join(err.problem for err in failures)
    problem = f"None of the {len(failures)} sources of '{spec.key}' worked. {sentences}"
    raise error(problem, failures[0].hint) from failures[-1]


def _packaged_folder(spec: ModelSpec, place: str, kind: ModelKind) -> Path:
    folder = Path(str(importlib.resources.files("fastsd_helpers"))).joinpath(*place.split("/"))
    if not folder.is_dir():
        raise ModelNotFound(
            f"The {kind.noun} '{spec.key}' is not in this installation: {folder} does not exist.",
            f"Install the complete fastsd_helpers again from its repository; or choose another {kind.noun}.",
        )
    kind.contents.require(folder)
    return folder


def _converted(file: Path, kind: ModelKind, convert: Callable[[Path, Path], object]) -> Path:
    """The folder of a single file, made once."""
    require_inert([file])
    folder = models_folder() / "converted" / f"{file.stem[:60]}-{sha256_of(file)[:12]}"
    if folder.is_dir():
        kind.contents.require(folder)
        return folder
    logger.info("Making a Diffusers folder of %s (once).", file.name)
    with file_errors(folder.parent, "write to"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with placed(folder) as unfinished:
        convert(file, unfinished)
        kind.contents.require(unfinished)
    return folder


def _nothing_called(name: Name, kind: ModelKind) -> FastSDError:
    if not name.text:
        return ModelNotFound(f"No {kind.noun} was named.", f"Choose {kind.choices()}.")
    shown = show_typed(name.text)
    if name.what == "link":
        return ModelError(f"'{shown}' is a link that cannot be used as a {kind.noun}.", f"Give {kind.choices()}.")
    if scheme := re.match(r"(\w+):/", name.text):
        return ModelNotFound(
            f"'{shown}' is not a link: {scheme[1]}:// is not supported.", "Links begin with https://: correct it."
        )
    if re.match(r"(?:www\.)?[\w-]+(?:\.[\w-]+)*\.(?:com|co|org|net|io|ai|cn|de|app|dev)/", name.text):
        return ModelNotFound(f"'{shown}' looks like a link without https://.", f"Write all of it: https://{shown}")
    if name.text.lower().endswith(FILE_ENDINGS):
        return ModelNotFound(
            f"There is no file '{shown}'.",
            f"Check the path, from {Path.cwd()}; names are case-sensitive. Or choose {kind.choices()}.",
        )
    close = difflib.get_close_matches(name.text.lower()[:100], kind.keys(), n=1)
    guess = f"Did you mean '{close[0]}'? " if close else ""
    return ModelNotFound(
        f"No {kind.noun} '{shown}': there is no folder of that name, it is not a registry key, and it is not a Hub id "
        "(owner/name).",
        f"{guess}Check the spelling, or choose {kind.choices()}.",
    )
