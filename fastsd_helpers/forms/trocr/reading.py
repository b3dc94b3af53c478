"""What the handwriting notebook's cells call: the session, the images and how they are read."""

import html
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.drive import mount_drive
from fastsd_helpers.errors import FastSDError, Interrupted
from fastsd_helpers.forms import desk, recent
from fastsd_helpers.forms.trocr.reading_view import ConfidenceView
from fastsd_helpers.forms.widgets.file_bridge import FileBridge
from fastsd_helpers.forms.widgets.form import Form, require
from fastsd_helpers.forms.widgets.polling import answer_widgets
from fastsd_helpers.forms.widgets.view import in_words, load_widgets, show_widget
from fastsd_helpers.forms.widgets.work_view import WorkView
from fastsd_helpers.options import Checked, option, options_of
from fastsd_helpers.processes import stop_signals
from fastsd_helpers.runtime import in_notebook, logger, where
from fastsd_helpers.trocr.model.checkpoint import quiet_transformers
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES
from fastsd_helpers.trocr.reading.dataset import LineSet
from fastsd_helpers.trocr.reading.processes import (
    Division,
    choose_processes,
    launch_reading,
    session_division,
    session_shares,
)
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig, SavedLine, choose_reader
from fastsd_helpers.trocr.reading.settings import ReadConfig
from fastsd_helpers.trocr.teaching.language import fit_language

__all__ = ["LinesForm", "ReadingSessionConfig", "open_reading", "read_pictures", "show_lines_form"]

_KINDS = "image/*,.heic,.heif,.tif,.tiff,.pdf,.zip"
_SAID = 6
_LOOK_EVERY_S = 0.5
_STOPPED = ("Reading was stopped; the lines read so far are kept.", "Run the cell again to read the others.")


@dataclass(frozen=True)
class ReadingSessionConfig(Checked):
    """Which reading session to work in."""

    session_name: str = option(
        "",
        help="name of a session to resume, or a new name; empty: the one used last",
        known="reading_sessions",
    )
    google_drive: bool = option(True, help="keep it on your Google Drive, where it survives a disconnect (Colab only)")
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)


def open_reading(config: ReadingSessionConfig) -> ReadingSession:
    """Open the reading session of that name or make it; in Colab it is on Google Drive unless switched off.

    Without a name it is the one that was used last in that place, and a new one only where there is none.

    Args:
        config: what the form shows, as its `config()` gives it.

    Returns:
        The session, which the cells below take.

    Raises:
        SettingsError: these are the settings of another form.
        SessionError: a name that cannot be a folder's name.
        SessionNotFound: one that was in the list is gone.
        DriveError: Drive was not mounted or cannot be written.
    """
    require(config, ReadingSessionConfig)
    desk.close_session()
    on_drive = config.google_drive and where() == "colab" and in_notebook()
    root = (mount_drive(shared_drive=config.shared_drive or None) if on_drive else Path.cwd()) / recent.READINGS
    name = "_".join(recent.choose_name(config.session_name, root, first=recent.FIRST_READING_NAME).split())
    there, used = (root / name).is_dir(), recent.last_time(name, root)
    session = ReadingSession(root / name)
    known = f" ({len(session.lines())} lines)" if session.lines() else ""
    begun = f"Resuming {session.name}{used}" if there else f"Created the session {session.name}"
    logger.info("%s, in %s%s", begun, session.folder, known)
    recent.say_twin(session.name, root, recent.READINGS)
    recent.remember(session.folder)
    desk.sit_down(session, config)
    return session


def show_lines_form(session: ReadingSession) -> "LinesForm":
    """Make the form for the images of a session; the last line of a cell displays it.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.
    """
    return LinesForm(ReadPicturesConfig, session=session)


class LinesForm(Form[ReadPicturesConfig]):
    """Settings of reading with an upload button; what is uploaded is kept in the session."""

    _session: ReadingSession

    def _draw(self) -> Any:
        widgets = load_widgets()
        self._report: list[str] = []
        self._added = self._there = 0
        self._bridge = FileBridge(_KINDS, self._keep)
        self._uploaded = widgets.HTML()
        about = widgets.HTML(
            "<div style='opacity:.85; line-height:1.4'>Images of lines or pages (HEIC too), PDFs, and zips of them; "
            "or name an image, a folder (one on Drive too), a PDF or a link below.</div>"
        )
        form = super()._draw()
        self._tell()
        return widgets.VBox([about, self._bridge.box, self._uploaded, form])

    def _keep(self, name: str, data: bytes) -> None:
        try:
            made = self._session.save_uploads(name, data)
        except FastSDError as err:
            self._report.append(f"{err.problem} {err.hint}")
        else:
            self._added, self._there = self._added + len(made.kept), self._there + len(made.there)
            self._report += made.lines()
            if made.kept or made.there:
                self.update(images=str(self._session.uploads))
        self._tell()

    def _tell(self) -> None:
        count = len(self._session.list_uploads())
        have = f"{count} uploaded file{'s' if count != 1 else ''} in this session" if count else "Nothing uploaded yet"
        now = [f"{self._added} added now"] if self._added else []
        now += [f"{self._there} already there, kept only once"] if self._there else []
        head = f"<b>{have}{': ' if now else ''}{', '.join(now)}.</b>"
        shown = self._report[-_SAID:]
        more = [f"… and {len(self._report) - _SAID} more."] if len(self._report) > _SAID else []
        self._uploaded.value = "<br>".join([head, *(html.escape(line) for line in [*shown, *more])])


def read_pictures(config: ReadPicturesConfig, session: ReadingSession) -> ConfidenceView:
    """Read the images into the session, or the built-in samples when there are none, and show how sure it is.

    What was read before is replaced, corrections stay with their lines; what the same model has read is not read
    again. Images that are no longer on this machine leave everything as it was.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_reading` gives it.

    Returns:
        The view; as a cell's last line it is displayed.

    Raises:
        SettingsError: these are the settings of another form.
        Interrupted: it was stopped; run again, it goes on.
        DatasetError: there is no image.
        ModelError: the model cannot be opened.
    """
    require(config, ReadPicturesConfig)
    images = config.images or (str(session.uploads) if session.list_uploads() else "")
    if gone := _gone(images, session):
        logger.info("%s", gone)
        return ConfidenceView(session)
    chosen, why = choose_reader(config.reader, own_pictures=bool(images))
    logger.info("Recognition model: %s (%s).", chosen, why)
    view = WorkView("Loading the model…", "progress of the reading")
    show_widget(view.box)
    watch = _Watch(view, _count_files(images))
    try:
        # A language model of a text is fitted here, to the session's corrections.
        may_divide = images and not _is_of_a_text(config.language)
        count = choose_processes(config.processes, lambda: session_shares(images)) if may_divide else 1
        if count > 1:
            division = session_division(session, config, images, chosen)
            lines, gain = _read_in_processes(count, division, session, watch), ""
        else:
            lines, gain = _read_here(config, session, images, chosen, watch)
    except KeyboardInterrupt as err:
        stopped = Interrupted(*_STOPPED)
        view.end_with(stopped)
        raise stopped from err
    except FastSDError as err:
        view.end_with(err)
        raise
    session.save(reader=chosen, demo=not images, images=images)
    unread = [line for line in lines if line.read.problem]
    told = f"{len(lines) - len(unread)} lines read{f', {len(unread)} could not be' if unread else ''}"
    view.end(f"{told}.{gain}", good=True)
    logger.info("%s. Text: %s", told, session.folder / "text.txt")
    return ConfidenceView(session)


def _read_here(
    config: ReadPicturesConfig, session: ReadingSession, images: str, chosen: str, watch: "_Watch"
) -> tuple[list[SavedLine], str]:
    """The lines, and what the language model gains, in words."""
    with quiet_transformers():
        settings: dict[str, Any] = {item.name: getattr(config, item.name) for item in options_of(ReadConfig)}
        reader = Reader(chosen, **settings)
        reader, gain = _with_language(reader, config.language, session, watch)
    watched = {"progress": watch.line, "between": watch.batch}
    if images:
        return session.read(reader, images, pages=config.pages, order=config.order, **watched), gain
    logger.info("No images were given, so the built-in sample lines are read.")
    return session.read_samples(reader, **watched), gain


def _with_language(reader: Reader, wanted: str, session: ReadingSession, watch: "_Watch") -> tuple[Reader, str]:
    """The reader, whose language model of a text counts as it helps on the corrected lines; and that in words."""
    if not _is_of_a_text(wanted):
        return reader, ""
    lines = session.corrected() if session.has_corrections else LineSet([])
    reader, gain = fit_language(reader, lines, progress=watch.batch)
    if gain is None:
        return reader, " Whether the language model helps is not known: correct ten lines or more, and read again."
    told = f"Language model, on {gain.lines} corrected lines, {gain.in_words()}."
    logger.info("%s", told)
    return reader, f" {told}"


def _is_of_a_text(language: str) -> bool:
    """Whether a language model is yet to be fitted; the file of one has weights that were chosen."""
    return language not in ("auto", "none") and not language.endswith(".safetensors")


def _read_in_processes(count: int, division: Division, session: ReadingSession, watch: "_Watch") -> list[SavedLine]:
    with stop_signals() as stop:  # the notebook's interrupt button: what was read is noted first
        try:
            launch_reading(count, division, watch.count, lambda: watch.is_stopped() or stop.is_set())
        except Interrupted as err:
            raise Interrupted(*_STOPPED) from err
    session.look_again()
    return session.lines()


class _Watch:
    """Shows how far the reading is, and ends it where Stop was pressed."""

    def __init__(self, view: WorkView, files: int) -> None:
        self._view, self._files, self._lines = view, files, 0
        self._began = self._looked = time.monotonic()

    def line(self, lines: int) -> None:
        """Look after a line; raises Interrupted after Stop."""
        self._lines = lines
        self.batch(0)
        if self._view.stop_clicks:
            raise Interrupted(*_STOPPED)

    def count(self, lines: int) -> None:
        """Note how many lines other processes have read."""
        self._lines = lines

    def is_stopped(self) -> bool:
        """Look, while other processes read; whether Stop was pressed."""
        self.batch(0)
        return self._view.stop_clicks > 0

    def batch(self, done: int) -> None:
        """Let the page speak, and show what is new twice a second; a second press of Stop does not wait for a line."""
        answer_widgets()
        if self._view.stop_clicks > 1:
            raise Interrupted(*_STOPPED)
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY_S:
            self._looked = now
            lines = self._lines + done
            speed = lines / (now - self._began)
            of = f" of {self._files}" if self._files else ""
            left = f", about {in_words((self._files - lines) / speed)} left" if self._files > lines and speed else ""
            self._view.show(f"{lines}{of} lines read{left}", lines, self._files or max(1, lines))


def _count_files(images: str) -> int:
    """How many lines a folder of images of single lines has; 0 where that cannot be told without opening them."""
    folder = Path(images).expanduser() if images else Path()
    if not images or not folder.is_dir():
        return 0
    found = [path.suffix.lower() for path in folder.rglob("*") if path.is_file()]
    return 0 if ".pdf" in found else sum(suffix in PICTURE_SUFFIXES for suffix in found)


def _gone(images: str, session: ReadingSession) -> str:
    """Why nothing is read, in words: the images are not on this machine, and their lines are in the session."""
    if not images or images.startswith(("http://", "https://")) or Path(images).expanduser().exists():
        return ""
    if not session.lines():
        return ""
    return f"{images} is not on this machine: these are the lines that were read before, with your corrections."
