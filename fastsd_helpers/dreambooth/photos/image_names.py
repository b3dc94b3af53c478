"""File names of prepared images: safe on every drive, unique, and with the words of the photo's own name."""

import re
import unicodedata

__all__ = ["printable", "safe_stem", "unique_stem"]

_STEM_BYTES = 80
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com\d|lpt\d)(?:\..*)?", re.IGNORECASE)


def safe_stem(stem: str) -> str:
    """Turn any file name's stem into one that every drive can hold, at most 80 bytes of UTF-8; never empty."""
    stem = unicodedata.normalize("NFC", printable(stem))
    stem = re.sub(r'[\x00-\x1f\x7f<>:"/\\|?*]+', " ", stem)
    stem = " ".join(stem.split()).strip(". ")
    stem = stem.encode()[:_STEM_BYTES].decode(errors="ignore").strip(". ")
    return f"_{stem}" if _RESERVED.fullmatch(stem) else stem or "picture"


def unique_stem(stem: str, taken: set[str]) -> str:
    """Number a stem that is in `taken` already; adds what it returns to `taken`, in lower case."""
    # Compared as Drive on Windows and macOS does: without case.
    candidate, number = stem, 1
    while candidate.casefold() in taken:
        number += 1
        candidate = f"{stem} ({number})"
    taken.add(candidate.casefold())
    return candidate


def printable(name: str) -> str:
    """Replace every character that cannot be shown or written with a question mark."""
    # Names that are not UTF-8 come with surrogates, which neither JSON nor a terminal can write.
    return "".join(c if c.isprintable() else "?" for c in name.encode("utf-8", "replace").decode())
