"""Fetch a model repository from the Hugging Face Hub: only what is wanted of it, checked against the Hub's hashes."""

import contextlib
import errno
import functools
import glob
import hashlib
import importlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads.hub_cache import removed_when_refused
from fastsd_helpers.downloads.pipeline import PIPELINE, Contents, Listing, read_json
from fastsd_helpers.downloads.table import base_keys
from fastsd_helpers.errors import (
    DependencyMissing,
    DiskFull,
    DriveReadOnly,
    FastSDError,
    ModelError,
    ModelNotFound,
    UnsafeModel,
    WrongFamily,
    proxy_problem,
)
from fastsd_helpers.files import check_room, remembered_sha256
from fastsd_helpers.inert import require_inert
from fastsd_helpers.runtime import logger, redact, secret
from fastsd_helpers.wording import size_in_words

__all__ = [
    "CHANGED_ON_THE_WAY",
    "PAUSES_S",
    "HubRepo",
    "client_errors",
    "fetch_repo",
    "network_errors",
    "offline",
    "with_retries",
]

_SPARE_BYTES = 200 * 2**20  # room left over after a download, so that the machine stays usable
PAUSES_S = (1.0, 4.0)  # before the second and the third question, when the Hub names no time
CHANGED_ON_THE_WAY = "A proxy or mirror between this machine and the Hub changes downloads: check HF_ENDPOINT."
_TOKEN_HINT = (
    "Make a read token at https://huggingface.co/settings/tokens and set it as HF_TOKEN "
    "(environment variable, or a Colab or Kaggle secret)."
)


def fetch_repo(
    repo: str,
    *,
    contents: Contents = PIPELINE,
    revision: str | None = None,
    cache_dir: Path | None = None,
    pinned_by_us: bool = False,
) -> Path:
    """Download what is wanted of a Hub repository and check every file against the Hub's hashes.

    `HF_ENDPOINT` and `HF_HUB_OFFLINE` are read now, `HF_TOKEN` through `runtime.secret`. A connection that breaks is
    taken up again where it broke; after a stop, whole files are kept and only the one under way starts again.

    Args:
        repo: `owner/name`.
        contents: the kind of model it is; one of another kind is refused before a large file is fetched.
        revision: branch, tag or commit; left alone, `main`.
        cache_dir: where downloads are kept; left alone, the Hugging Face cache.
        pinned_by_us: the revision comes from our table: a mirror without it gives its `main`, with a warning.

    Returns:
        The folder with the files, as the Hub has them.
    """
    hub = HubRepo(repo, revision, cache_dir, contents)
    wanted = [hub, HubRepo(repo, None, cache_dir, contents)] if pinned_by_us and revision else [hub]
    if offline():
        folder = _first_cached(wanted)
        if folder is None:
            raise ModelError(f"{repo} is not on this machine and HF_HUB_OFFLINE is set.", "Unset it to download once.")
        logger.info("Offline: %s is used as downloaded before, from %s.", repo, folder)
        return folder
    try:
        return hub.download()
    except (_Damaged, UnsafeModel, WrongFamily):
        raise
    except ModelError as err:
        gone = isinstance(err, _RevisionMissing)
        folder = _first_cached([hub] if gone else wanted)
        if folder is not None:
            logger.warning("%s The copy downloaded before is used: %s", err.problem, folder)
            return folder
        if gone and pinned_by_us:
            logger.warning("%s Its newest version is used instead.", err.problem)
            return fetch_repo(repo, contents=contents, cache_dir=cache_dir)
        raise


def offline() -> bool:
    """Whether the user wants the Hub not to be asked; read now, while the client reads it when it is imported."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().lower() in ("1", "true", "yes", "on")


def _first_cached(hubs: Iterable["HubRepo"]) -> Path | None:
    return next((folder for hub in hubs if (folder := hub.cached_folder()) is not None), None)


class _RevisionMissing(ModelNotFound):
    """The repository is there, the revision asked for is not."""


class _Damaged(ModelError):
    """What arrives is not what the Hub announced: nothing of it may be used."""


class HubRepo:
    """One repository at one revision, asked for through huggingface_hub."""

    def __init__(self, repo: str, revision: str | None, cache_dir: Path | None, contents: Contents = PIPELINE) -> None:
        if importlib.util.find_spec("huggingface_hub") is None:
            raise DependencyMissing(
                f"The {contents.noun} {repo} is on the Hub, and the package huggingface_hub is not installed.",
                "Install it (pip install huggingface_hub), or give a folder that is already here.",
            )
        self.repo = repo
        self.revision = revision
        self.contents = contents
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
        if not re.match(r"https?://[^\s/]+", self.endpoint):
            raise ModelError(
                f"HF_ENDPOINT is '{self.endpoint}', which is not a web address.", "Unset it, or set it to https://..."
            )
        self.token = secret("HF_TOKEN")
        if self.token is not None and not re.fullmatch(r"[!-~]+", self.token):
            raise ModelError("The Hugging Face token (HF_TOKEN) contains a space or an unusual character.", _TOKEN_HINT)
        from huggingface_hub import constants

        self.cache_dir = Path(constants.HF_HUB_CACHE if cache_dir is None else cache_dir).expanduser()
        # What every question to the client names.
        self.access: dict[str, Any] = {"cache_dir": self.cache_dir, "endpoint": self.endpoint, "token": self.token}

    def cached_file(self, name: str, revision: str | None) -> Path | None:
        """A file as it was downloaded before; None when it was not."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.repo, name, cache_dir=self.cache_dir, revision=revision)
        return Path(found) if isinstance(found, str) else None

    def cached_folder(self) -> Path | None:
        """Find a whole copy downloaded before, without the network; None when there is none."""
        # Where the client keeps a snapshot. Source: huggingface.co/docs/huggingface_hub/guides/manage-cache
        kept = self.cache_dir / f"models--{self.repo.replace('/', '--')}"
        with contextlib.suppress(OSError):
            commit = (kept / "refs" / (self.revision or "main")).read_text(encoding="utf-8").strip()
            return self._if_whole(kept / "snapshots" / commit)
        if self.revision is not None:
            return self._if_whole(kept / "snapshots" / self.revision)
        # Of a repository without a small file that was asked for by its branch, the client notes no branch.
        found = sorted((kept / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
        return self._if_whole(found[-1]) if found else None

    def _if_whole(self, folder: Path) -> Path | None:
        if not folder.is_dir():
            return None
        here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        read = functools.partial(read_json, folder)
        try:
            self.contents.require(folder)
            listed = dict.fromkeys(self._cached_listing(folder.name) or here)
            wanted = self.contents.wanted(Listing(str(folder), listed, read))
        except (UnsafeModel, WrongFamily):
            raise
        except ModelError as err:
            logger.warning("The cached copy of %s cannot be used: %s", self.repo, err.problem)
            return None
        missing = set(wanted) - here
        if missing:
            logger.warning("The cached copy of %s cannot be used: %s missing.", self.repo, ", ".join(sorted(missing)))
            return None
        # In the Hub's cache a large file is stored under its sha256, so a copy can be checked with no network.
        for name in wanted:
            sha256 = _blob_of(folder / name).name
            if re.fullmatch(r"[0-9a-f]{64}", sha256) and remembered_sha256(folder / name) != sha256:
                logger.warning("The cached copy of %s cannot be used: %s is damaged.", self.repo, name)
                return None
        return folder

    def _cached_listing(self, commit: str) -> list[str]:
        """The names of the commit's files as the client noted them before it downloaded; none by older clients."""
        import huggingface_hub

        ask = getattr(huggingface_hub, "get_cached_repo_tree", None)
        if ask is None:
            return []
        try:
            return [file.path for file in ask(self.repo, revision=commit, cache_dir=self.cache_dir)]
        except huggingface_hub.errors.CachedRepoTreeNotFoundError:  # downloaded file by file, or by an older client
            return []

    def download(self) -> Path:
        """Fetch, check and return the snapshot folder; every failure is translated."""
        try:
            return self._download()
        except client_errors() as err:
            raise self.translate(err) from err

    def _download(self) -> Path:
        from huggingface_hub import HfApi

        api = HfApi(endpoint=self.endpoint, token=self.token)
        info = with_retries(lambda: api.model_info(self.repo, revision=self.revision, files_metadata=True))
        listed = {file.rfilename: file for file in info.siblings or []}
        sizes = {name: file.size for name, file in listed.items()}
        listing = Listing(f"The Hub's {self.repo}", sizes, self._small_json)
        with removed_when_refused(self.cache_dir, self.repo, at=(ModelError,), kept_at=(_Damaged,)):
            wanted = {name: listed[name] for name in self.contents.wanted(listing)}
            return self._fetch(wanted, info.sha)

    def _fetch(self, wanted: dict[str, Any], commit: str) -> Path:
        """Bring the wanted files here, whole and inert."""
        lacking = [file for name, file in wanted.items() if self.cached_file(name, commit) is None]
        if needed := sum(file.size or 0 for file in lacking):
            self.check_room(needed, self.repo)
            logger.info("Downloading %s: %s to %s.", self.repo, size_in_words(needed), self.cache_dir)
        for last_try in (False, True):
            folder = with_retries(functools.partial(self._snapshot, commit, wanted), also=network_errors())
            logger.info("Comparing the files of %s with the Hub's hashes.", self.repo)
            damaged = [name for name, file in wanted.items() if not _is_as_listed(folder / name, file)]
            if not damaged:
                require_inert(folder)
                return folder
            for name in damaged:
                for path in ((folder / name).resolve(), _blob_of(folder / name), folder / name):
                    path.unlink(missing_ok=True)
            logger.warning("%s arrived damaged%s.", ", ".join(damaged), "" if last_try else "; fetching it again")
        raise _Damaged(
            f"{', '.join(damaged)} of {self.repo} arrived damaged twice: it does not match the Hub's hash.",
            CHANGED_ON_THE_WAY,
        )

    def _small_json(self, name: str) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(self.repo, name, revision=self.revision, **self.access)
        return read_json(Path(path).parent, Path(name).name)

    def _snapshot(self, commit: str, wanted: Iterable[str]) -> Path:
        from huggingface_hub import snapshot_download

        names = [glob.escape(name) for name in wanted]
        return Path(snapshot_download(self.repo, revision=commit, allow_patterns=names, **self.access))

    def check_room(self, needed: int, what: str) -> None:
        """Refuse a download that does not fit; raises DiskFull."""
        hint = "Free some space, or set HF_HOME to a folder on a larger disk."
        check_room(self.cache_dir, needed, what, spare=_SPARE_BYTES, hint=hint)

    def translate(self, err: Exception) -> FastSDError:
        """The sentence and hint for a failure of the client, the Hub, the network or the disk."""
        from huggingface_hub import errors
        from huggingface_hub.utils import HFValidationError

        endpoint = re.sub(r"//[^/@]*@", "//", self.endpoint)  # an address may hold a password
        page = f"{endpoint}/{self.repo}"
        if isinstance(err, errors.GatedRepoError):
            problem = (
                f"{self.repo} is gated and this token has no access to it."
                if self.token
                else f"{self.repo} is gated: its licence has to be accepted first, and no token with access was given."
            )
            return ModelError(problem, f"Open {page}, log in and accept the licence. {_TOKEN_HINT}")
        if isinstance(err, errors.RevisionNotFoundError):
            return _RevisionMissing(
                f"{self.repo} has no revision '{self.revision}'.",
                f"See {page}/tree/main, or leave '@{self.revision}' out.",
            )
        if isinstance(err, errors.RepositoryNotFoundError):
            return ModelNotFound(
                f"The Hub has no model '{self.repo}', or it is private; no folder and no key has that name either.",
                f"Check the spelling at {endpoint}, choose one of the keys {', '.join(base_keys())}, "
                "or give HF_TOKEN if it is private.",
            )
        if isinstance(err, HFValidationError):
            return ModelNotFound(f"'{self.repo}' is not a valid Hub id.", "A Hub id looks like owner/name.")
        status = getattr(getattr(err, "response", None), "status_code", None)
        if status in (401, 403):
            if self.token:
                problem = f"The Hub refused the Hugging Face token for {self.repo} (HTTP {status})."
                return ModelError(problem, f"The token may be wrong, expired or without read access. {_TOKEN_HINT}")
            return ModelError(f"The Hub refused access to {self.repo} (HTTP {status}).", _TOKEN_HINT)
        if status == 429:
            return ModelError(
                f"The Hub answered 'too many requests' for {self.repo} (429).",
                "Wait a few minutes and run this again; a Hugging Face token in HF_TOKEN raises the limit.",
            )
        if status is not None and status >= 500:
            return ModelError(
                f"The Hub has a problem with {self.repo} (HTTP {status}).",
                "Wait and run this again: the partial download is kept.",
            )
        return self._translate_local(err, status, endpoint)

    def _translate_local(self, err: Exception, status: int | None, endpoint: str) -> FastSDError:
        """Failures of the network or of this machine's disk, which arrive under many types."""
        from huggingface_hub.errors import LocalEntryNotFoundError

        code = getattr(err, "errno", None)
        if code in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(
                f"The disk of {self.cache_dir} filled up while {self.repo} was downloaded.",
                "Free some space, or set HF_HOME to a folder on a larger disk; then run this again.",
            )
        if code in (errno.EROFS, errno.EACCES, errno.EPERM):
            return DriveReadOnly(
                f"Downloads cannot be written to {self.cache_dir}.", "Set HF_HOME to a folder you can write to."
            )
        if (proxy := proxy_problem(err)) is not None:
            return ModelError(redact(proxy[0]), proxy[1])
        detail = redact(f"{type(err).__name__}: {err}".split("\n")[0])
        broken = isinstance(err, network_errors(LocalEntryNotFoundError))
        if (
            broken and status is None and not isinstance(err, json.JSONDecodeError)
        ):  # requests counts that one as its own
            return ModelError(
                f"The Hub at {endpoint} cannot be reached, or the connection to it broke, while {self.repo} was "
                f"fetched ({detail}).",
                "Check the network and run this again: the partial download is kept.",
            )
        return ModelError(
            f"{self.repo} could not be fetched from {endpoint} ({detail}).",
            "Run this again: the partial download is kept. If it fails again, check HF_ENDPOINT and the network.",
        )


def network_errors(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """`more` and the transport errors of whatever HTTP client this huggingface_hub uses: requests, httpx or httpx2."""
    found: list[type[Exception]] = [*more, ConnectionError, TimeoutError]
    for module, name in (("httpx2", "TransportError"), ("httpx", "TransportError"), ("requests", "RequestException")):
        if importlib.util.find_spec(module):
            found.append(getattr(importlib.import_module(module), name))
    return tuple(found)


def client_errors() -> tuple[type[Exception], ...]:
    """Everything that the Hub's client raises for the network, the disk, the Hub, or a proxy that is named wrongly."""
    # hf_xet raises RuntimeError, httpx ImportError.
    return network_errors(OSError, ValueError, RuntimeError, ImportError)


def with_retries(ask: Callable[[], Any], *, also: tuple[type[Exception], ...] = ()) -> Any:
    """Ask again when the Hub is busy, or after the errors of `also`; older clients do not do so, newer ones partly.

    The client itself goes on with a file where it broke off, when it kept what had arrived.
    """
    from huggingface_hub.errors import HfHubHTTPError

    for pause_s in PAUSES_S:
        try:
            return ask()
        except (HfHubHTTPError, *also) as err:
            response = getattr(err, "response", None)
            status = getattr(response, "status_code", None)
            if isinstance(err, HfHubHTTPError) and status not in (429, 500, 502, 503, 504):
                raise
            asked_for = response.headers.get("Retry-After", "") if response is not None else ""
            pause_s = min(float(asked_for), 60.0) if asked_for.isdecimal() else pause_s
            what = f"The Hub is busy (HTTP {status})" if status else "The connection to the Hub broke"
            logger.warning("%s; asking again in %.0f s.", what, pause_s)
            time.sleep(pause_s)
    return ask()


def _blob_of(path: Path) -> Path:
    """The file of the Hub's cache that a name in a snapshot leads to; the name itself where links are not possible."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _is_as_listed(path: Path, listed: Any) -> bool:
    """Compare a file with the size and hash the Hub announced: sha256 for large files, git's own for small ones."""
    if not path.is_file() or (listed.size is not None and path.stat().st_size != listed.size):
        return False
    sha256 = getattr(listed.lfs, "sha256", None)
    if sha256:
        return remembered_sha256(path) == sha256
    if listed.blob_id:
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == listed.blob_id
    return True
