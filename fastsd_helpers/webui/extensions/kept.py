"""Extensions that outlast the machine: a list of what the owner installed, its code and its settings, in the store.

An extension is a program. Only what the owner has named at an installation is on the list, at the commit that was
fetched then; whatever else lies in the folder of extensions is neither kept nor brought back.
"""

import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fastsd_helpers.errors import FastSDError, WebUIError
from fastsd_helpers.files import file_errors, placed, unfinished_name, write_atomic
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import Repository
from fastsd_helpers.webui.extensions.repositories import commit_of, list_own_files, pack, unpack
from fastsd_helpers.webui.places import Places
from fastsd_helpers.wording import size_in_words

__all__ = [
    "KeptExtension",
    "bring_back",
    "is_shared",
    "keep",
    "keep_settings",
    "read_kept",
    "restore_settings",
    "write_kept",
]

_SCHEMA = 1
_NAME = re.compile(r"\w[\w.-]*")
_ADDRESS = re.compile(r"https://[\w.-]+(:\d+)?/[\w./~+-]+|/.*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Settings and what the owner typed. Code and models come back from where they are from, or not at all.
_TEXT = (".json", ".jsonl", ".txt", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".conf", ".md", ".xml")
_OTHER = (".html", ".css", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".db", ".sqlite", ".sqlite3")
_SETTINGS = {*_TEXT, *_OTHER}
_NEVER = {"__pycache__", ".git", "node_modules", "venv", ".venv", "site-packages"}
_MOST_BYTES = 20 * 10**6  # of one file
_MOST_FILES = 2000
_MOST_CODE_BYTES = 200 * 10**6


@dataclass(frozen=True)
class KeptExtension:
    """One extension of the owner's."""

    name: str
    address: str  # https, or a folder of the machine it was added on
    revision: str  # what was asked for, such as HEAD
    commit: str  # what that was
    added: str = ""  # a day
    shallow: list[str] = field(default_factory=list)  # commits whose parents its kept code lacks

    @property
    def repository(self) -> Repository:
        """Where its code comes from, at its commit."""
        return Repository(self.name, f"extension/{self.name}", (self.address,), self.commit)

    def line(self) -> str:
        """In words for people."""
        return f"{self.name} ({self.address} at {self.commit[:10]}{f', added {self.added}' if self.added else ''})"


def is_shared(store: Path) -> bool:
    """Whether other people can write to the store: a Shared drive, or a folder that is shared with this user."""
    parts = {*store.parts, *store.resolve().parts}
    return bool(parts & {"Shareddrives", "Shared drives", ".shortcut-targets-by-id", "Shared with me"})


def read_kept(places: Places) -> list[KeptExtension]:
    """The list of the store; empty when nothing was ever kept.

    Raises:
        WebUIError: it cannot be read, or has something that is not an extension.
        DriveError: the store does not answer.
    """
    path = places.kept_extensions / "list.json"
    with file_errors(path, "read"):
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    if not text:
        return []
    try:
        found = [KeptExtension(**row) for row in json.loads(text)["extensions"]]
        for item in found:
            words = ((_NAME, item.name), (_ADDRESS, item.address), (_COMMIT, item.commit), (_NAME, item.revision))
            if not all(pattern.fullmatch(word) for pattern, word in words):
                raise ValueError(item.name)
            if not all(_COMMIT.fullmatch(word) for word in item.shallow):
                raise ValueError(item.name)
        return found
    except (ValueError, TypeError, KeyError) as err:
        raise WebUIError(
            f"{path}, the list of your extensions, is damaged ({str(err)[:80]}).",
            "Move that file and run this again, with the extensions given again.",
        ) from err


def write_kept(places: Places, kept: Iterable[KeptExtension]) -> None:
    """Write the list of the store."""
    rows = [asdict(item) for item in sorted(kept, key=lambda item: item.name)]
    data = json.dumps({"schema": _SCHEMA, "extensions": rows}, indent=1) + "\n"
    with file_errors(places.kept_extensions, "write to"):
        places.kept_extensions.mkdir(parents=True, exist_ok=True)
    write_atomic(places.kept_extensions / "list.json", data.encode())


def keep(extension: Repository, folder: Path, places: Places) -> KeptExtension:
    """Put an extension that was just fetched on the list, and its code and settings beside it.

    Raises:
        WebUIError: git cannot pack it. DriveError, DiskFull: the store cannot be written to.
    """
    kept = {item.name: item for item in read_kept(places)}
    before, commit = kept.get(extension.name), commit_of(folder) or ""
    bundle = _bundle(places, extension.name)
    if before is not None and (before.commit, before.address) == (commit, extension.urls[0]) and bundle.exists():
        item = replace(before, revision=extension.revision)
    else:
        shallow = _keep_code(extension.name, folder, bundle)
        added = before.added if before is not None else time.strftime("%Y-%m-%d")
        item = KeptExtension(extension.name, extension.urls[0], extension.revision, commit, added, shallow)
    write_kept(places, [*(other for name, other in kept.items() if name != item.name), item])
    _keep_settings_of(item, folder, places)
    return item


def _keep_code(name: str, folder: Path, bundle: Path) -> list[str]:
    with tempfile.TemporaryDirectory(prefix="fastsd-extension-") as work:
        packed = Path(work) / "code.bundle"
        shallow = pack(folder, packed)
        with file_errors(bundle.parent, "write to"):
            bundle.parent.mkdir(parents=True, exist_ok=True)
            bundle.unlink(missing_ok=True)
        if packed.stat().st_size > _MOST_CODE_BYTES:
            logger.warning(
                "The code of the extension %s takes %s, too much to keep: on the next machine it is fetched from its "
                "address.",
                name,
                size_in_words(packed.stat().st_size),
            )
            return shallow
        with placed(bundle) as new:
            shutil.copyfile(packed, new)
    return shallow


def bring_back(item: KeptExtension, folder: Path, places: Places) -> bool:
    """Bring the code of a kept extension to a folder that is not there, from the store, and then its settings.

    Returns:
        Whether the store had its code; else it has to be fetched, and `restore_settings` gives it its settings.

    Raises:
        WebUIError: what the store has is not what the list says.
    """
    bundle = _bundle(places, item.name)
    if not bundle.exists():
        return False
    temporary = unfinished_name(folder)
    with file_errors(folder, "write to"):
        temporary.mkdir(parents=True)
    try:
        unpack(bundle, temporary, item.repository, item.shallow)
        restore_settings(item.name, temporary, places)
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def restore_settings(name: str, folder: Path, places: Places) -> int:
    """Put the kept settings of an extension into its folder; how many files that were."""
    count, source = 0, _settings_folder(places, name)
    with file_errors(source, "read"):
        for path in sorted(source.rglob("*")) if source.is_dir() else ():
            inner = path.relative_to(source)
            target = folder / inner
            inside = target.parent.resolve().is_relative_to(folder.resolve()) and not target.is_symlink()
            if path.is_file() and not path.is_symlink() and _is_setting(inner) and inside:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
                count += 1
    return count


def keep_settings(places: Places, *, quiet: bool = False) -> bool:
    """Copy what the kept extensions have written since to the store; False when that failed, which ends no run.

    Args:
        quiet: a failure was said before.
    """
    name = ""
    try:
        for item in read_kept(places):
            name, folder = item.name, places.extensions / item.name
            if folder.is_dir():
                _keep_settings_of(item, folder, places)
    except (FastSDError, OSError, subprocess.SubprocessError) as err:
        if not quiet:
            logger.warning("The settings of the extension %s could not be kept: %s", name, err)
        return False
    return True


def _keep_settings_of(item: KeptExtension, folder: Path, places: Places) -> None:
    target = _settings_folder(places, item.name)
    for source in _own_settings(folder):
        copy, found = target / source.relative_to(folder), source.stat()
        with file_errors(copy, "write to"):
            with contextlib.suppress(FileNotFoundError):
                there = copy.stat()
                if (there.st_size, int(there.st_mtime)) == (found.st_size, int(found.st_mtime)):
                    continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            with placed(copy) as new:
                shutil.copy2(source, new)


def _own_settings(folder: Path) -> Iterator[Path]:
    count = 0
    for name in list_own_files(folder):
        path = folder / name
        if not _is_setting(Path(name)) or path.is_symlink() or not path.is_file():
            continue
        if path.stat().st_size <= _MOST_BYTES and count < _MOST_FILES:
            count += 1
            yield path


def _is_setting(name: Path) -> bool:
    return name.suffix.lower() in _SETTINGS and not set(name.parts) & {*_NEVER, ".."}


def _bundle(places: Places, name: str) -> Path:
    return places.kept_extensions / f"{name}.bundle"


def _settings_folder(places: Places, name: str) -> Path:
    return places.kept_extensions / f"{name}.settings"
