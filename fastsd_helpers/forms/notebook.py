"""The two choices a notebook's cells need besides settings: which session, and the demo when no pictures were given."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from fastsd_helpers import demo
from fastsd_helpers.dreambooth.prepare import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.drive import mount_drive, sessions_root
from fastsd_helpers.errors import SessionNotFound, SettingsError
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.sessions import Session

__all__ = ["SessionConfig", "open_session", "prepare_pictures"]

logger = logging.getLogger("fastsd_helpers")


@dataclass(frozen=True)
class SessionConfig:
    """Which session to work in."""

    session_name: str = option("my-subject", help="a new name, or one of your sessions to go on with it")
    google_drive: bool = option(True, help="keep it on your Google Drive, where it survives a disconnect (Colab only)")
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)

    def __post_init__(self) -> None:
        check(self)


def open_session(config: SessionConfig) -> Session:
    """Open the session of that name, or create it; in Colab it is on Google Drive unless that is switched off.

    Raises:
        SettingsError: these are the settings of another form. SessionError: a name that cannot be a folder's name.
        DriveError: Drive was not mounted or cannot be written.
    """
    _require(config, SessionConfig)
    on_drive = config.google_drive and where() == "colab" and in_notebook()
    if on_drive:
        mount_drive(shared_drive=config.shared_drive or None)
    root = sessions_root(shared_drive=config.shared_drive) if on_drive else sessions_root("Fast-Dreambooth/Sessions")
    try:
        session = Session.open(config.session_name, root=root)
        logger.info("Opened the session %s in %s", session.name, session.folder)
    except SessionNotFound:
        session = Session.create(config.session_name, root=root)
        logger.info("Made the session %s in %s", session.name, session.folder)
    return session


def prepare_pictures(config: PrepareConfig, session: Session) -> PrepareResult:
    """Prepare the user's photos, or the demo's pictures of a robot at the demo model's size when none were given.

    The session remembers which it was: only for the demo's own pictures does base model "auto" mean the demo model.

    Raises:
        SettingsError: these are the settings of another form. And what `dreambooth.prepare` raises.
    """
    _require(config, PrepareConfig)
    use_demo = not config.images
    if use_demo:
        folder = demo.SUBJECTS_FOLDER / "robot"
        logger.info("No photos were given, so the built-in pictures of a robot are used: %s", folder)
        held_out = demo.SUBJECTS_FOLDER / "held_out" / "robot"
        config = dataclasses.replace(config, images=str(folder), held_out=str(held_out), size=128)
    result = prepare(config, session)
    session.save(dataset=session.record["dataset"] | {"demo": use_demo})
    return result


def _require(config: Any, expected: type) -> None:
    # The cells share the name `form`: a cell that is run again after a later form was shown gets that one.
    if not isinstance(config, expected):
        raise SettingsError(
            f"The form shown last is for {type(config).__name__}, and this cell needs {expected.__name__}.",
            "Run the cell just above this one first.",
        )
