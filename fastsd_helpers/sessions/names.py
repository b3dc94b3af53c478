"""Session names: what a folder may be called on Drive, Windows and Linux alike."""

import unicodedata

from fastsd_helpers.errors import SessionError

__all__ = ["check_name", "clean_name"]

_MOST_CHARACTERS = 80
_MOST_BYTES = 180  # a file name holds 255 bytes, and exports add a suffix to the session's name
_RESERVED = {"con", "prn", "aux", "nul", *(f"{port}{digit}" for port in ("com", "lpt") for digit in "123456789")}


def check_name(name: str) -> str:
    """Return the folder name for a new session: the name given, with blanks turned into `_` as the old notebook did.

    Letters and digits of any script, `-`, `_` and `.` are allowed.

    Args:
        name: as the user typed it.

    Returns:
        The folder's name.

    Raises:
        SessionError: anything else, with a name that would do.
    """
    folder = _normalise(name)
    problem = _problem_with(folder)
    if problem:
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise SessionError(f"The session name {shown!r} {problem}.", f"Use for example {clean_name(name)!r}.")
    return folder


def clean_name(name: str) -> str:
    """Make an allowed session name out of any text.

    Args:
        name: any text.

    Returns:
        A name that `check_name` takes.
    """
    kept = "".join(char if _is_allowed(char) else "_" for char in _normalise(name))
    while "__" in kept:
        kept = kept.replace("__", "_")
    kept = _cut(kept.lstrip("._-")).rstrip("._-")
    if not kept:
        return "my_subject"
    return _cut(f"my_{kept}").rstrip("._-") if _problem_with(kept) else kept


def _normalise(name: str) -> str:
    # NFC, because Drive and macOS hand the same letter back composed or in two parts.
    return "_".join(unicodedata.normalize("NFC", name).split())


def _is_allowed(char: str) -> bool:
    # Letters, digits and the marks that many scripts write vowels with; U+FE00-FE0F only dress up emoji.
    return char in "-_." or (unicodedata.category(char)[0] in "LMN" and not "\ufe00" <= char <= "\ufe0f")


def _problem_with(folder: str) -> str | None:
    if not folder:
        return "is empty"
    if len(folder) > _MOST_CHARACTERS:
        return f"has {len(folder)} characters; {_MOST_CHARACTERS} are allowed"
    if len(folder.encode()) > _MOST_BYTES:
        return f"needs {len(folder.encode())} bytes; {_MOST_BYTES} are allowed"
    bad = "".join(dict.fromkeys(char for char in folder if not _is_allowed(char)))
    if bad:
        return f"has characters that folder names cannot have everywhere: {bad[:10]!r}"
    if folder[0] in ".-":
        return f"begins with {folder[0]!r}"
    if folder[-1] == ".":
        return "ends with a dot"
    if folder.split(".")[0].lower() in _RESERVED:
        return "is reserved by Windows"
    return None


def _cut(text: str) -> str:
    text = text[:_MOST_CHARACTERS]
    while len(text.encode()) > _MOST_BYTES:
        text = text[:-1]
    return text
