"""fetch(): one file from the Hub, CivitAI, Google Drive, GitHub or any address becomes a whole, checked local file."""

import concurrent.futures
import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastsd_helpers.downloads.content import PAGE_HINT, SUFFIXES, look_at_arrived
from fastsd_helpers.downloads.hub_files import fetch_hub_file
from fastsd_helpers.downloads.links import (
    HubFile,
    Link,
    confirm_drive,
    find_link,
    is_link,
    safe_name,
    show_typed,
    show_url,
)
from fastsd_helpers.downloads.table import models_table
from fastsd_helpers.downloads.transfer import Answer, Remote, discard, part_name, transfer
from fastsd_helpers.drive import copy_verified
from fastsd_helpers.errors import DiskFull, DownloadError, FastSDError, ModelNotFound, UnsafeModel
from fastsd_helpers.files import check_room, file_errors, placed, sha256_of
from fastsd_helpers.processes import LockHeld, file_lock
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import size_in_words

__all__ = ["Wanted", "fetch", "fetch_all", "models_folder", "wanted_file"]


@dataclass(frozen=True)
class Wanted:
    """One file for `fetch_all`: the arguments of `fetch`."""

    source: str | HubFile | Path
    folder: Path | None = None
    name: str | None = None
    size: int | None = None
    sha256: str | None = None
    mirrors: tuple[str | HubFile, ...] = ()


class _AlreadyHere(Exception):
    """The server's name for the file is that of a whole file in the folder."""


def models_folder() -> Path:
    """Where files go when no folder is named: FASTSD_MODELS, else `fastsd/models` in the user's cache."""
    named = os.environ.get("FASTSD_MODELS")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastsd" / "models"


def fetch(
    source: str | HubFile | Path,
    folder: Path | None = None,
    *,
    name: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    mirrors: Sequence[str | HubFile] = (),
    overwrite: bool = False,
    models_only: bool = True,
) -> Path:
    """The path of one file that is brought onto this machine; a whole copy from before is kept.

    It arrives under another name (`.….part`), is compared with the expected size and sha256, looked into, and only
    then gets its own: a file with its own name is always whole. A stopped download goes on where it stopped.

    Args:
        source: a registry key (its single-file checkpoint), a web address (Hub, CivitAI page or download, Google Drive,
            GitHub, any other), a HubFile, or a file that is here already.
        folder: where it goes; `models_folder()` when left alone.
        name: its name there; the site's own when left alone.
        size: expected bytes.
        sha256: expected hash, in hex.
        mirrors: further sources of the same file, tried in order.
        overwrite: replace an existing file of that name that differs.
        models_only: refuse what is not a model file (a web page, a program, text).

    Raises:
        UnsafeModel: it could run code; what was fetched of it is removed.
        DownloadError: no source gave the file; the sentences say why.
        ModelNotFound: no such key or path.
        DiskFull: there is no room for it.
        DriveReadOnly: the folder cannot be written to.
        DriveError: the folder cannot be used.
    """
    sha256 = _checked_hash(sha256) if sha256 is not None else None
    if isinstance(source, Path) or (isinstance(source, str) and not is_link(source)):
        found = _not_a_link(str(source).strip())
        if isinstance(found, Path):
            return found
        source, size, sha256 = found.source, found.size, found.sha256
        name, mirrors = name or found.name, (*mirrors, *found.mirrors)
    folder = Path(folder).expanduser() if folder is not None else models_folder()
    if name is not None:
        safe_name(name)
    with file_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
    failures: list[FastSDError] = []
    for item in (source, *mirrors):
        try:
            return _fetch_one(Wanted(item, name=name, size=size, sha256=sha256), folder, overwrite, models_only)
        except (DownloadError, ModelNotFound) as err:
            failures.append(err)
            if len(mirrors) >= len(failures):
                logger.warning("%s Trying the next source.", err.problem)
    if len(failures) == 1:
        raise failures[0]
    problems = " ".join(err.problem for err in failures)
    raise DownloadError(f"None of the {len(failures)} sources worked. {problems}", failures[0].hint) from failures[-1]


def _checked_hash(sha256: str) -> str:
    sha256 = sha256.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise DownloadError(
            f"'{sha256[:80]}' is not a SHA-256 hash, which has 64 hexadecimal digits.",
            "Copy all of it, or leave it out.",
        )
    return sha256


def fetch_all(wanted: Sequence[Wanted], *, at_once: int = 3) -> list[Path | FastSDError]:
    """Fetch several files, a few at a time; one that fails does not stop the others.

    Args:
        wanted: each file with its source, folder, size and hash.
        at_once: how many at the same time, 1 or more.

    Returns:
        For each, in the given order, its path or the error that a single `fetch` would have raised.
    """
    known = sum(item.size or 0 for item in wanted)
    place = next((item.folder for item in wanted if item.folder), None) or models_folder()
    check_room(place, known, f"these {len(wanted)} files", hint="Choose fewer, or a folder on a larger disk.")
    stopped = threading.Event()

    def one(item: Wanted) -> Path | FastSDError:
        if stopped.is_set():
            return DownloadError("Stopped before it began.", "Run this again.")
        try:
            return fetch(
                item.source, item.folder, name=item.name, size=item.size, sha256=item.sha256, mirrors=item.mirrors
            )
        except DiskFull as err:
            stopped.set()  # the others would fill what is left
            return err
        except FastSDError as err:
            return err

    with concurrent.futures.ThreadPoolExecutor(max_workers=max(1, at_once)) as pool:
        return list(pool.map(one, wanted))


def wanted_file(about: dict[str, Any], folder: Path | None = None) -> Wanted:
    """What to ask `fetch_all` for to get the single file of a row of models.toml, its table `checkpoint`.

    Args:
        about: the row, as a dict.
        folder: where it goes; `models_folder()` when left alone.
    """
    return Wanted(
        HubFile(about["repo"], about["file"], about.get("revision")),
        folder,
        name=about.get("save_as"),
        size=about.get("bytes"),
        sha256=about.get("sha256"),
        mirrors=tuple(HubFile(row["repo"], row["file"], row.get("revision")) for row in about.get("mirrors", ())),
    )


def _not_a_link(text: str) -> Path | Wanted:
    row = models_table().get(text)
    if row and "checkpoint" in row:
        return wanted_file(row["checkpoint"])
    path = Path(text).expanduser()
    if text and path.is_file():
        return path.resolve()
    if row:
        raise ModelNotFound(
            f"'{text}' has no single file to download.",
            "Use it as a base model: it is fetched as a folder when needed.",
        )
    keys = ", ".join(key for key, row in models_table().items() if "checkpoint" in row)
    raise ModelNotFound(
        f"'{show_typed(text)}' is not a file here, a link or the key of a single-file model.",
        f"Paste a link, or choose one of {keys}.",
    )


def _fetch_one(wanted: Wanted, folder: Path, overwrite: bool, models_only: bool) -> Path:
    source, name, size, sha256 = wanted.source, wanted.name, wanted.size, wanted.sha256
    found = source if isinstance(source, HubFile) else find_link(str(source))
    if isinstance(found, HubFile):
        target = folder / safe_name(name or found.file.rsplit("/", 1)[-1])
        if (size or sha256) is not None and _is_here(target, size, sha256, overwrite):
            return target
        try:
            kept = fetch_hub_file(found, size=size, sha256=sha256, name=target.name, models_only=models_only)
        except DownloadError as err:
            if size is None and sha256 is None and target.is_file():
                logger.warning("%s is kept unchanged, not verified: %s", target, err.problem)
                return target
            raise
        # Many files of the Hub have one name: without a size or a hash, only the Hub's own tells which one is here.
        if target.exists() and (
            target.samefile(kept) or _is_here(target, kept.stat().st_size, sha256_of(kept), overwrite)
        ):
            return target
        return _place(kept, target, overwrite)
    found = replace(found, name=name or found.name, size=size or found.size, sha256=sha256 or found.sha256)
    if found.name and _is_here(folder / safe_name(found.name), found.size, found.sha256, overwrite):
        return folder / found.name
    return _fetch_link(found, folder, overwrite, models_only)


def _is_here(target: Path, size: int | None, sha256: str | None, overwrite: bool) -> bool:
    """Whether a whole copy is there already; one with other content is refused unless it may be replaced."""
    if not target.exists():
        return False
    if not target.is_file():
        raise DownloadError(f"{target} is a folder.", "Choose another name.")
    if (size is None or target.stat().st_size == size) and (sha256 is None or sha256_of(target) == sha256):
        how = "" if sha256 else " (only its size was checked)" if size is not None else " (not verified)"
        logger.info("%s is here already%s.", target, how)
        return True
    if overwrite:
        return False
    raise DownloadError(
        f"{target} exists already, but differs from the source.",
        "Move it, choose another name, or allow it to be replaced (--overwrite).",
    )


def _fetch_link(link: Link, folder: Path, overwrite: bool, models_only: bool) -> Path:
    part = folder / part_name(safe_name(link.name or "download"), link.url)
    shown = show_url(link.url)
    chosen: list[Path] = []

    def begun(remote: Remote) -> None:
        target = folder / safe_name(link.name or remote.name or unquote(urlsplit(link.url).path.rsplit("/", 1)[-1]))
        if link.name is None and _is_here(target, remote.total, link.sha256, overwrite):
            chosen[:] = [target]
            raise _AlreadyHere
        chosen[:] = [target]
        about = f", {size_in_words(remote.total)}" if remote.total else ""
        logger.info("Downloading %s%s from %s.", target.name, about, shown)

    with _only_one(part):
        try:
            remote = _transfer(link, part, begun)
        except _AlreadyHere:
            discard(part)
            return chosen[0]
        problem = _problem_with(part, link, remote)
        if problem:
            logger.warning("%s %s; fetching it again from the start.", shown, problem)
            discard(part)
            problem = _problem_with(part, link, _transfer(link, part, begun))
        if problem:
            discard(part)
            raise DownloadError(
                f"{shown} {problem}, twice.",
                "The source has another version, or a proxy in between changes files: use another source.",
            )
        target = chosen[0]
        if models_only:
            try:
                kind = look_at_arrived(part, target.name, shown)
            except UnsafeModel as err:
                discard(part)
                raise UnsafeModel(
                    err.problem.replace(str(part), shown), f"The partial download was deleted. {err.hint}"
                ) from err
            except DownloadError:
                discard(part)
                raise
            if target.suffix == "" and kind in SUFFIXES:
                target = target.with_name(safe_name(target.name + SUFFIXES[kind]))
        if target.exists() and not overwrite:
            if _is_here(target, part.stat().st_size, sha256_of(part), overwrite):
                discard(part)
            return target
        with file_errors(target, "write"):
            os.replace(part, target)
        part.with_name(part.name + ".json").unlink(missing_ok=True)
        return target


def _transfer(link: Link, part: Path, begun: Any) -> Remote:
    remote = transfer(
        link.url, part, token=link.token, cookies=link.cookies, size=link.size, sha256=link.sha256, begun=begun
    )
    if remote.is_page and link.site == "drive" and remote.status == 200:
        link = confirm_drive(link, Answer(200, remote.head, {}, remote.cookies))
        remote = transfer(link.url, part, cookies=link.cookies, size=link.size, sha256=link.sha256, begun=begun)
    if remote.status in (200, 206) and not remote.is_page:
        return remote
    raise _refusal(link, remote)


def _refusal(link: Link, remote: Remote) -> DownloadError:
    shown = show_url(link.url)
    name = "CIVITAI_TOKEN" if link.site == "civitai" else None
    if remote.status in (401, 403):
        if name and link.token:
            return DownloadError(
                f"{shown} refuses the token given in {name} (HTTP {remote.status}).",
                "It may be wrong or expired, or the model is in early access: open its page while logged in.",
            )
        if name:
            return DownloadError(
                f"{shown} requires a login (HTTP {remote.status}).",
                f"Make an API key in your account there and set it as {name} (environment variable, or a Colab or "
                "Kaggle secret).",
            )
        return DownloadError(
            f"{shown} refuses access (HTTP {remote.status}).",
            "It requires a login: download it in a browser, put it on your Drive and give the path.",
        )
    if remote.status == 407:
        return DownloadError(
            "A proxy on the network requires a login (HTTP 407).",
            "Put its user name and password into HTTPS_PROXY (http://user:password@host:port), or unset that variable.",
        )
    if remote.status in (404, 410):
        return DownloadError(f"{shown} was not found (HTTP {remote.status}).", "Check the link in a browser.")
    if remote.is_page:
        hint = f"It requires a login: set an API key of your account as {name}." if name else PAGE_HINT
        return DownloadError(f"{shown} returned a web page instead of a file.", hint)
    return DownloadError(f"{shown} answered {remote.status}.", "Check the link in a browser.")


def _problem_with(part: Path, link: Link, remote: Remote) -> str | None:
    found = part.stat().st_size
    for wanted in (link.size, remote.total):
        if wanted is not None and found != wanted:
            return f"sent {found} of {wanted} bytes"
    if link.sha256 is not None and sha256_of(part) != link.sha256:
        return "sent a file that does not match its SHA-256"
    return None


@contextlib.contextmanager
def _only_one(part: Path) -> Iterator[None]:
    """Refuse a second download of the same file into the same folder at the same time."""
    with contextlib.ExitStack() as held:
        with file_errors(part, "write"):
            try:
                held.enter_context(file_lock(part, wait_s=0))
            except LockHeld as err:
                raise DownloadError(
                    "The same file is being downloaded to the same folder right now.",
                    "Wait for it, then run this again.",
                ) from err
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if part.stat().st_size == 0:
                    discard(part)


def _place(kept: Path, target: Path, overwrite: bool) -> Path:
    """Give a file of the Hub's cache its name in a folder: a hard link where the disk allows, else a copy."""
    kept = kept.resolve()
    # Under another name first: what is to be replaced stays until the new file is whole.
    with placed(target) as unfinished:
        try:
            os.link(kept, unfinished)
        except OSError as err:
            logger.debug("%s cannot be linked to %s (%s): it is copied.", kept, target, err)
            check_room(target.parent, kept.stat().st_size, target.name)
            copy_verified(kept, unfinished, sha256=sha256_of(kept), point=None)
    return target
