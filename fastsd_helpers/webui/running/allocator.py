"""Google's memory allocator for AUTOMATIC1111 and Forge: loaded first, where it is installed and works.

With the allocator of the C library memory is not given back when a model is switched, so that the RAM of a small
machine ends after a few (AUTOMATIC1111's own webui.sh does the same as this).
"""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from fastsd_helpers.processes import environment_for

__all__ = ["find_allocator", "preload"]

_NAMES = re.compile(r"libtcmalloc(_minimal)?\.so\.\d+")  # not _debug, which is slow
_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/lib/x86_64-linux-gnu",
    "/usr/lib64",
    "/usr/lib",
    "/usr/local/lib",
)


def find_allocator(python: Path, folders: Sequence[str] = _FOLDERS) -> Path | None:
    """The library of this machine with which a Python starts; None where none is installed.

    None too where NO_TCMALLOC is set, or an allocator is loaded into this process's children anyway (Colab does so).

    Args:
        python: the interpreter that it is for.
        folders: where it is looked for.
    """
    if os.environ.get("NO_TCMALLOC") or re.search(r"tcmalloc|jemalloc|mimalloc", os.environ.get("LD_PRELOAD", "")):
        return None
    found = [path for folder in folders if Path(folder).is_dir() for path in Path(folder).iterdir()]
    found = sorted((path for path in found if _NAMES.fullmatch(path.name)), key=lambda path: len(path.name))
    return next((path for path in found if _works(python, path)), None)


def preload(library: Path) -> str:
    """The value of LD_PRELOAD with the library in front of what this process has there."""
    return " ".join(filter(None, [str(library), environment_for("web UI").get("LD_PRELOAD", "")]))


def _works(python: Path, library: Path) -> bool:
    # One for another processor or another C library is told by the loader, which then goes on without it.
    environment = {**environment_for("program"), "LD_PRELOAD": str(library)}
    command = [str(python), "-I", "-S", "-c", "import ctypes; ctypes.CDLL(None).tc_version"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0 and not done.stderr
