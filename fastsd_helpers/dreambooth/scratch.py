"""A session's folder on the machine's own disk."""

import os
import tempfile
from pathlib import Path

from fastsd_helpers.sessions import Session

__all__ = ["scratch_folder"]


def scratch_folder(session: Session, suffix: str = "") -> Path:
    """A local folder for this session alone; FASTSD_SCRATCH moves it. Nothing is created."""
    user = getattr(os, "getuid", lambda: 0)()
    root = os.environ.get("FASTSD_SCRATCH") or Path(tempfile.gettempdir()) / f"fastsd-scratch-{user}"
    return Path(root) / f"{session.record['id']}{suffix}"
