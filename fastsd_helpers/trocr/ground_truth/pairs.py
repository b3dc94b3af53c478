"""Pairs of files: an image, and a text of the same name (`0001.png` with `0001.gt.txt` or `0001.txt`)."""

from collections.abc import Iterator
from pathlib import Path

from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.ground_truth.labels import label_text, read_texts
from fastsd_helpers.trocr.ground_truth.pictures import plain_name
from fastsd_helpers.trocr.ground_truth.rows import LeftOut, Row
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES

__all__ = ["rows_of_pairs"]

# Versions of one image that OCR4all, Calamari and kraken keep beside each other; the first that is there counts.
_VERSIONS = ("", ".nrm", ".raw", ".dew", ".desp", ".despeckled", ".ocrd", ".bin")
# The truth, then what may be a program's guess.
_TEXTS = (".gt.txt", ".txt")


def rows_of_pairs(folder: Path) -> Iterator[Row | LeftOut]:
    """The images below a folder with the text beside each; without any image, nothing."""
    files: dict[tuple[Path, str], Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            files.setdefault((path.parent, plain_name(path.name)), path)
    chosen: dict[tuple[Path, str], tuple[int, Path]] = {}
    for (place, name), path in files.items():
        if path.suffix.lower() in PICTURE_SUFFIXES:
            stem, version = _stem_and_version(name)
            if (place, stem) not in chosen or version < chosen[place, stem][0]:
                chosen[place, stem] = (version, path)
    texts = {
        path: next((files[place, stem + end] for end in _TEXTS if (place, stem + end) in files), None)
        for (place, stem), (_version, path) in chosen.items()
    }
    other = sum(
        text is not None and text.name.lower().endswith(".gt.txt") and _has_guess(text) for text in texts.values()
    )
    if other:
        logger.info("%d .txt files are not used: a .gt.txt beside each is the ground truth.", other)
    written = read_texts([text for text in texts.values() if text is not None])
    for path in sorted(texts):
        text, name = texts[path], path.relative_to(folder).as_posix()
        if text is None:
            yield LeftOut(f"{name} has no {path.stem}.txt beside it.", "no text")
            continue
        words = written[text]
        if isinstance(words, LeftOut):
            yield LeftOut(f"{name}: {words}", words.reason)
            continue
        label = label_text(words, name)
        yield label if isinstance(label, LeftOut) else Row(name, path, label)


def _stem_and_version(name: str) -> tuple[str, int]:
    """The name without its ending and version, and the version's place; a name that is only a version is a name."""
    stem = name.rpartition(".")[0]
    for place, version in enumerate(_VERSIONS):
        if version and stem.endswith(version) and stem != version:
            return stem.removesuffix(version), place
    return stem, 0


def _has_guess(text: Path) -> bool:
    return text.with_name(f"{text.name[: -len('.gt.txt')]}.txt").is_file()
