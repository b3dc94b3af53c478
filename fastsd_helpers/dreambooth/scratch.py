"""Where a session keeps what belongs to this machine alone: copies on their way, and the news of a running training."""

from pathlib import Path

from fastsd_helpers.files import scratch_root
from fastsd_helpers.sessions import Session

__all__ = ["live_folder", "scratch_folder"]


def scratch_folder(session: Session, suffix: str = "") -> Path:
    """A local folder for this session alone; FASTSD_SCRATCH moves it. Nothing is created."""
    return scratch_root() / f"{session.record['id']}{suffix}"


def live_folder(session: Session) -> Path:
    """The local folder of a session's live files; FASTSD_SCRATCH moves it. Nothing is created."""
    return scratch_folder(session, "-live")
