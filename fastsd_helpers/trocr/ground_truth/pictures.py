"""Find the image a table or a transcription means: Windows paths, other case, other Unicode form, no ending."""

import contextlib
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES

__all__ = ["PictureFinder", "plain_name"]

_SUBFOLDERS = ("", "images", "image", "img", "imgs", "lines")
_DRIVE = re.compile(r"^[A-Za-z]:(?=[/\\])")
_ADDRESS = re.compile(r"^[a-zA-Z][a-zA-Z+.-]+://")


def plain_name(name: str) -> str:
    """A file's name to compare by: composed letters, one case."""
    return unicodedata.normalize("NFC", name).casefold()


class PictureFinder:
    """Looks for images in a folder and the subfolders that data sets keep them in; listings are read once."""

    def __init__(self, folder: Path, more: Iterable[Path] = ()) -> None:
        self.folders = [folder / name if name else folder for name in _SUBFOLDERS]
        self.folders += list(more)
        self._listed: dict[Path, dict[str, list[Path]]] = {}

    def find(self, name: str) -> Path | None:
        """The file that is meant, or None: exactly that, else the only one whose name differs in form alone.

        Of an absolute path from another machine, its last folders and name are looked for here; nothing else is
        shortened, for `page2/01.png` must never become `01.png`.
        """
        with contextlib.suppress(
            OSError, ValueError
        ):  # names may be longer than names can be, or hold what they cannot
            for folder in self.folders:
                if (folder / name).is_file():
                    return folder / name
            return self._find_alike(name)
        return None

    def find_last(self, name: str) -> Path | None:
        """As `find`, by the last part of the name alone: for files that name an image where it lay elsewhere."""
        last = re.split(r"[/\\]", name.strip())[-1]
        # Written as in an address: "page%201.jpg", "page1.jpg?download=1".
        return self.find(last) or self.find(unquote(last)) or self.find(unquote(last.partition("?")[0]))

    def _find_alike(self, name: str) -> Path | None:
        elsewhere = bool(_DRIVE.match(name) or _ADDRESS.match(name) or name.startswith(("/", "\\")))
        bare = _ADDRESS.sub("", _DRIVE.sub("", name)).replace("\\", "/")
        parts = [part for part in bare.split("/") if part not in ("", ".")]
        if not parts or ".." in parts:
            return None
        for first in range(len(parts) if elsewhere else 1):
            for folder in self.folders:
                if (found := self._walk(folder, parts[first:])) is not None:
                    return found
        return None

    def _walk(self, folder: Path, parts: list[str]) -> Path | None:
        for part in parts[:-1]:
            inside = [path for path in self._list(folder).get(plain_name(part), []) if path.is_dir()]
            if len(inside) != 1:
                return None
            (folder,) = inside
        wanted = plain_name(parts[-1])
        stem, dot, suffix = wanted.rpartition(".")
        # An ending that lost letters (.jp), or belongs to the file before it was converted.
        known = dot and len(suffix) > 1 and any(ending[1:].startswith(suffix) for ending in PICTURE_SUFFIXES)
        for name in (wanted, wanted + ".", *([stem + "."] if known else [])):
            found = [path for path in self._list(folder).get(name, []) if path.is_file()]
            if len(found) == 1:
                return found[0]
        return None

    def _list(self, folder: Path) -> dict[str, list[Path]]:
        """The files of a folder by their plain names; images also by what comes before the ending, and a point."""
        if folder not in self._listed:
            listed: dict[str, list[Path]] = {}
            with contextlib.suppress(OSError):
                for path in sorted(folder.iterdir()):
                    name = plain_name(path.name)
                    listed.setdefault(name, []).append(path)
                    stem, _dot, suffix = name.rpartition(".")
                    if f".{suffix}" in PICTURE_SUFFIXES:
                        listed.setdefault(f"{stem}.", []).append(path)
            self._listed[folder] = listed
        return self._listed[folder]
