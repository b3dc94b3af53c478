"""Files that come with photos and are none: what they are, and how they become photos."""

import re
from pathlib import PurePosixPath

__all__ = ["is_other_kind", "why_no_photo"]

_CONVERT = (
    (
        re.compile(r"\.(?:mp4|mov|avi|mkv|webm|m4v|3gp|mpg|mpeg|wmv)"),
        "a video: save single frames of it as PNG or JPEG",
    ),
    (
        re.compile(r"\.(?:dng|cr2|cr3|crw|nef|nrw|arw|srf|orf|rw2|raf|pef|srw|x3f|raw|3fr|iiq|erf)"),
        "a camera's raw file: export it as JPEG from your photo program, or send it from the phone as JPEG",
    ),
    (re.compile(r"\.jxl"), "a JPEG XL image: convert it to PNG or JPEG"),
    (re.compile(r"\.(?:psd|psb|xcf|kra|ai|eps|svg|pdf|jp2|j2k|tga|exr|hdr|ico)"), "save it as PNG or JPEG"),
)


def why_no_photo(name: str) -> str:
    """Say why a file of this name is not a photo here, and where that helps how it becomes one."""
    suffix = PurePosixPath(name).suffix.lower()
    advice = next((f": {text}" for pattern, text in _CONVERT if pattern.fullmatch(suffix)), "")
    return f"is not an image ({suffix or 'no ending'}){advice}"


def is_other_kind(name: str) -> bool:
    """Whether a name's ending says that it is not a photo here, though its first bytes may be those of one."""
    return any(pattern.fullmatch(PurePosixPath(name).suffix.lower()) for pattern, _ in _CONVERT)
