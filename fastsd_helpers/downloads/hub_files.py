"""One file of a Hub repository, through huggingface_hub (its cache, tokens, Xet storage and HF_ENDPOINT)."""

import functools
from pathlib import Path

from fastsd_helpers.downloads.content import look_at_arrived
from fastsd_helpers.downloads.hub import (
    CHANGED_ON_THE_WAY,
    HubRepo,
    client_errors,
    network_errors,
    offline,
    with_retries,
)
from fastsd_helpers.downloads.hub_cache import removed_when_refused
from fastsd_helpers.downloads.links import HubFile
from fastsd_helpers.errors import DownloadError, ModelError, ModelNotFound, UnsafeModel
from fastsd_helpers.files import remembered_sha256
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import size_in_words

__all__ = ["fetch_hub_file"]


def fetch_hub_file(
    wanted: HubFile,
    *,
    size: int | None = None,
    sha256: str | None = None,
    cache_dir: Path | None = None,
    name: str | None = None,
    models_only: bool = True,
) -> Path:
    """Download one file into the Hub's cache, compare it with the Hub's hash and with ours, and return it.

    Args:
        name: what it will be called; its own name when left alone.
        models_only: look into it, and remove what this call fetched of a file that is not an inert model.

    Raises:
        UnsafeModel: it could run code.
        DownloadError: it is not there, may not be had, or is not what was expected. DiskFull, DriveReadOnly: the disk.
    """
    hub = HubRepo(wanted.repo, wanted.revision, cache_dir)
    if not models_only:
        return _fetch(hub, wanted, size, sha256)
    with removed_when_refused(hub.cache_dir, wanted.repo, at=(UnsafeModel, _NoModel)):
        path = _fetch(hub, wanted, size, sha256)
        try:
            called = name or wanted.file.rsplit("/", 1)[-1]
            look_at_arrived(path, called, f"{wanted.file} of {wanted.repo}", beside=True)
        except DownloadError as err:
            raise _NoModel(err.problem, err.hint) from err
    return path


class _NoModel(DownloadError):
    """What arrived is not a model."""


def _fetch(hub: HubRepo, wanted: HubFile, size: int | None, sha256: str | None) -> Path:
    if offline():
        path = hub.cached_file(wanted.file, wanted.revision)
        if path is None:
            raise DownloadError(
                f"{wanted.file} of {wanted.repo} is not on this machine and HF_HUB_OFFLINE is set.",
                "Unset it to download once.",
            )
        if (size is not None and path.stat().st_size != size) or sha256 not in (None, remembered_sha256(path)):
            raise DownloadError(
                f"The copy of {wanted.file} in the cache is damaged.", "Unset HF_HUB_OFFLINE to fetch it again."
            )
        return path
    try:
        for last_try in (False, True):
            path, announced = _download(hub, wanted, size, sha256)
            expected = sha256 or announced
            if expected is None or remembered_sha256(path) == expected:
                return path
            for damaged in {path, path.resolve()}:
                damaged.unlink(missing_ok=True)
            logger.warning("%s arrived damaged%s.", wanted.file, "" if last_try else "; fetching it again")
    except client_errors() as err:
        raise _translate(hub, wanted, err) from err
    raise DownloadError(
        f"{wanted.file} of {wanted.repo} arrived damaged twice: it does not match its SHA-256.",
        CHANGED_ON_THE_WAY,
    )


def _download(hub: HubRepo, wanted: HubFile, size: int | None, sha256: str | None) -> tuple[Path, str | None]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(wanted.repo, wanted.file, revision=wanted.revision, endpoint=hub.endpoint)
    about = with_retries(lambda: get_hf_file_metadata(url, token=hub.token), also=network_errors())
    announced = about.etag if about.etag and len(about.etag) == 64 else None
    if size is not None and about.size is not None and about.size != size:
        raise DownloadError(
            f"{wanted.file} of {wanted.repo} has {about.size} bytes; {size} were expected.",
            "The repository has another version now; report it, or use another source.",
        )
    if sha256 is not None and announced is not None and announced != sha256:
        raise DownloadError(
            f"{wanted.file} of {wanted.repo} is not the expected version (its SHA-256 differs).",
            "The repository has changed; report it, or use another source.",
        )
    if hub.cached_file(wanted.file, wanted.revision) is None:
        hub.check_room(about.size or 0, f"{wanted.file} of {wanted.repo}")
        said = f" ({size_in_words(about.size)})" if about.size else ""
        logger.info("Downloading %s of %s%s.", wanted.file, wanted.repo, said)

    download = functools.partial(hf_hub_download, wanted.repo, wanted.file, revision=wanted.revision, **hub.access)
    return Path(with_retries(download, also=network_errors())), announced


def _translate(hub: HubRepo, wanted: HubFile, err: Exception) -> Exception:
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    if isinstance(err, EntryNotFoundError) and not isinstance(err, LocalEntryNotFoundError):
        return DownloadError(
            f"{wanted.repo} has no file '{wanted.file}'.", f"See its files at {hub.endpoint}/{wanted.repo}/tree/main."
        )
    said = hub.translate(err)
    if isinstance(said, (ModelError, ModelNotFound)):
        return DownloadError(said.problem, said.hint)
    return said
