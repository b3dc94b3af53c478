"""Which files a visitor's request may name: what was uploaded, the images that were made, the page's own files."""

import contextlib
import os
import re
import shutil
import tempfile
from urllib.parse import unquote

from frame import inside, setting

__all__ = ["DATA", "OUTPUTS", "PICTURES", "STORE", "UPLOADS", "may_be_served", "may_be_shown", "plain_path", "uploaded"]

PICTURES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff"))
_PAGE = PICTURES | {".js", ".mjs", ".css", ".map", ".svg", ".ico", ".woff", ".woff2", ".ttf", ".otf", ".wasm"}

DATA: str = setting("data", "") or os.getcwd()
STORE: str = setting("store", "") or DATA


def _new_uploads() -> str:
    """A folder of this start alone: other programs' uploads lie in the usual one. Those of ended starts are removed."""
    root = tempfile.gettempdir()
    for name in os.listdir(root):
        mark = re.fullmatch(r"fastsd-uploads-(\d+)-\w+", name)
        if mark and not os.path.exists(f"/proc/{mark[1]}") and not os.path.islink(os.path.join(root, name)):
            with contextlib.suppress(OSError):
                if os.stat(os.path.join(root, name)).st_uid == os.getuid():
                    shutil.rmtree(os.path.join(root, name))
    return tempfile.mkdtemp(prefix=f"fastsd-uploads-{os.getpid()}-")


UPLOADS: str = _new_uploads()
os.environ["GRADIO_TEMP_DIR"] = UPLOADS
OUTPUTS: list[str] = [os.path.join(DATA, "outputs")]


def uploaded(path: object) -> bool:
    """Whether a path named by a request is a file below the folder of uploads, links followed."""
    return isinstance(path, (str, os.PathLike)) and "\0" not in str(path) and inside(path, [UPLOADS])


def may_be_shown(path: object) -> bool:
    """Whether a path is an uploaded file or an image that was made here; "?" and what follows is no part of it."""
    if uploaded(path):
        return True
    if not isinstance(path, str) or "\0" in path:
        return False
    plain = path.rsplit("?", 1)[0]
    return uploaded(plain) or (_suffix(os.path.realpath(plain)) in PICTURES and inside(plain, OUTPUTS))


def may_be_served(path: str) -> bool:
    """Whether the page may load a file by its path: uploads, outputs, and what a page is made of from the code."""
    if "\0" in path or "://" in path:
        return False
    real = os.path.realpath(path)
    if uploaded(path) or (inside(path, OUTPUTS) and not _hidden(real, OUTPUTS)):
        return True
    code = [os.getcwd(), os.path.join(DATA, "extensions")]
    own_css = os.path.realpath(os.path.join(DATA, "user.css"))
    return real == own_css or (_suffix(real) in _PAGE and inside(path, code) and not _hidden(real, code))


def plain_path(path: str) -> str:
    """A request's path with every layer of %-encoding taken off; one that does not end after eight is refused."""
    for _ in range(8):
        plain = unquote(path)
        if plain == path:
            return plain
        path = plain
    return "/file=://"


def _hidden(real: str, roots: list[str]) -> bool:
    for root in map(os.path.realpath, roots):
        if real.startswith(root + os.sep):
            return any(part.startswith(".") for part in real[len(root) + 1 :].split(os.sep))
    return True


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()
