"""What the handwriting notebook's cells call: the session, the pictures and how they are read."""

import html
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.drive import mount_drive
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms import desk, recent
from fastsd_helpers.forms.file_bridge import FileBridge
from fastsd_helpers.forms.form import Form, require
from fastsd_helpers.forms.reading_view import ConfidenceView
from fastsd_helpers.forms.view import load_widgets
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import in_notebook, where
from fastsd_helpers.trocr.reading_session import ReadingSession, ReadPicturesConfig, choose_reader

__all__ = ["LinesForm", "ReadingSessionConfig", "open_reading", "read_pictures", "show_lines_form"]

logger = logging.getLogger("fastsd_helpers")

_KINDS = "image/*,.heic,.heif,.tif,.tiff,.pdf"
_SAID = 6


@dataclass(frozen=True)
class ReadingSessionConfig:
    """Which reading session to work in."""

    session_name: str = option(
        "",
        help="one of your sessions to go on with it, or a new name; empty: the one used last",
        known="reading_sessions",
    )
    google_drive: bool = option(True, help="keep it on your Google Drive, where it survives a disconnect (Colab only)")
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)

    def __post_init__(self) -> None:
        check(self)


def open_reading(config: ReadingSessionConfig) -> ReadingSession:
    """Open the reading session of that name or make it; in Colab it is on Google Drive unless switched off.

    Without a name it is the one that was used last in that place, and a new one only where there is none.

    Raises:
        SettingsError: these are the settings of another form. SessionError: a name that cannot be a folder's name.
        SessionNotFound: one that was in the list is gone. DriveError: Drive was not mounted or cannot be written.
    """
    require(config, ReadingSessionConfig)
    desk.close_session()
    on_drive = config.google_drive and where() == "colab" and in_notebook()
    root = (mount_drive(shared_drive=config.shared_drive or None) if on_drive else Path.cwd()) / recent.READINGS
    name = "_".join(recent.choose_name(config.session_name, root, first=recent.FIRST_READING_NAME).split())
    there, used = (root / name).is_dir(), recent.last_time(name, root)
    session = ReadingSession(root / name)
    known = f" ({len(session.lines())} lines)" if session.lines() else ""
    begun = f"Going on with {session.name}{used}" if there else f"Made the session {session.name}"
    logger.info("%s, in %s%s", begun, session.folder, known)
    recent.say_twin(session.name, root, recent.READINGS)
    recent.remember(session.folder)
    desk.sit_down(session, config)
    return session


def show_lines_form(session: ReadingSession) -> "LinesForm":
    """Make the form for the pictures of a session; the last line of a cell displays it."""
    return LinesForm(session)


class LinesForm(Form[ReadPicturesConfig]):
    """Settings of reading with an upload button; what is uploaded is kept in the session."""

    def __init__(self, session: ReadingSession) -> None:
        self._reading = session
        super().__init__(ReadPicturesConfig, session=session)  # type: ignore[arg-type]

    def _draw(self) -> Any:
        widgets = load_widgets()
        self._report: list[str] = []
        self._bridge = FileBridge(_KINDS, self._keep)
        self._uploaded = widgets.HTML()
        about = widgets.HTML(
            "<div style='opacity:.7; line-height:1.4'>Pictures of lines or pages, and PDFs; or name a picture, a "
            "folder (one on Drive too), a PDF or a link below.</div>"
        )
        form = super()._draw()
        self._tell()
        return widgets.VBox([about, self._bridge.box, self._uploaded, form])

    def _keep(self, name: str, data: bytes) -> None:
        try:
            path = self._reading.save_upload(name, data)
        except FastSDError as err:
            self._report.append(f"✋ {err.problem} {err.hint}")
        else:
            if path.name != name:
                self._report.append(f"{name} is kept as {path.name}.")
            self.update(images=str(self._reading.uploads))
        self._tell()

    def _tell(self) -> None:
        count = len(self._reading.list_uploads())
        have = f"{count} uploaded file{'s' if count != 1 else ''} in this session" if count else "Nothing uploaded yet"
        lines = [f"<b>{have}.</b>", *(html.escape(line) for line in self._report[-_SAID:])]
        self._uploaded.value = "<br>".join(lines)


def read_pictures(config: ReadPicturesConfig, session: ReadingSession) -> ConfidenceView:
    """Read the pictures into the session, or the built-in samples when there are none, and show how sure it is.

    What was read before is replaced; corrections stay with their lines.

    Raises:
        SettingsError: these are the settings of another form. DatasetError: there is no picture. ModelError and its
        kin: the reader cannot be opened.
    """
    from fastsd_helpers.trocr.reader import Reader

    require(config, ReadPicturesConfig)
    images = config.images or (str(session.uploads) if session.list_uploads() else "")
    chosen, why = choose_reader(config.reader, own_pictures=bool(images))
    logger.info("Reader: %s (%s).", chosen, why)
    reader = Reader(
        chosen,
        config.beams,
        config.precision,
        config.min_new_tokens,
        config.max_new_tokens,
        config.loop_guard,
        config.device,
        batch_size=config.batch_size,
    )
    if images:
        lines = session.read(reader, images, pages=config.pages)
    else:
        logger.info("No pictures were given, so the built-in sample lines are read.")
        lines = session.read_samples(reader)
    session.save(reader=chosen, demo=not images)
    unread = [line for line in lines if line.read.problem]
    logger.info("%d lines read%s. Text: %s", len(lines) - len(unread),
                f", {len(unread)} could not be" if unread else "", session.folder / "text.txt")  # fmt: skip
    return ConfidenceView(session)
