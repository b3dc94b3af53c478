"""What a notebook shows of a session: the prepared images, the finished model, and the button that ends the machine.

All of it comes from the session's record, so that it is the same after a restart.
"""

from pathlib import Path

from fastsd_helpers.dreambooth.dataset.preparing import PrepareResult
from fastsd_helpers.dreambooth.results.finishing import finished_result
from fastsd_helpers.errors import FastSDError, SessionUnfinished
from fastsd_helpers.forms.dreambooth.exporting import disconnect_when_safe, unfinished
from fastsd_helpers.forms.widgets.view import View, draw_notice, draw_picture, load_widgets, make_button, make_frame
from fastsd_helpers.runtime import where
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record
from fastsd_helpers.wording import size_in_words

__all__ = ["DisconnectView", "PicturesView", "show_disconnect", "show_prepared", "show_result"]

_WIDE_PX = 1400


class PicturesView(View):
    """Images with their words, below sentences.

    Attributes:
        lines: the sentences.
    """

    def __init__(self, lines: list[str], pictures: list[tuple[Path, str]]) -> None:
        widgets = load_widgets()
        self.lines = lines
        self._message = widgets.HTML(draw_notice("\n".join(lines)))
        drawn = [
            widgets.HTML(draw_picture(path, alt, _WIDE_PX, style="max-width:100%;height:auto;"))
            for path, alt in pictures
        ]
        self.box = make_frame(self._message, *drawn)


def show_prepared(pictures: PrepareResult) -> PicturesView:
    """Show the contact sheet of the prepared images; a cell's last line displays it.

    Args:
        pictures: as `prepare_pictures` gives them.

    Returns:
        The view; as a cell's last line it is displayed.
    """
    count = pictures.train + pictures.held_out
    alt = f"Contact sheet of the {count} prepared images with their prompts"
    return PicturesView([], [(pictures.contact_sheet, alt)])


def show_result(session: Session) -> PicturesView:
    """Show what the session's finished training made: before and after, how the loss went, and the file.

    It is read from the session, so it is there after a restart too, and never another session's.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view; as a cell's last line it is displayed.

    Raises:
        SessionUnfinished: the training has not come to its end, with the cell to run.
    """
    session.require_here()
    record = read_record(session.folder).record
    session.record.update(record)
    made = finished_result(session, int(record.get("run", 1)))
    if made is None and record.get("result", {}).get("path"):
        name = session.folder / record["result"]["path"]
        raise SessionUnfinished(
            f"{name} or an image next to it is missing, or is not what the training wrote.",
            "Run cell 5b: it writes them again from the last checkpoint.",
        )
    if made is None:
        raise unfinished(session)
    before, after = made["loss_before"], made["loss_after"]
    # Earlier versions did not note it.
    judged = record["result"].get("judged_on")
    on = f" on {judged}" if judged else ""
    lines = [
        f"{session.name}: {made['path'].name}, {size_in_words(made['path'].stat().st_size)}, read back and compared.",
        f"It is in {made['path'].parent}",
        f"Loss{on}: {before:.4f} before, {after:.4f} after. sha256 {made['sha256']}",
    ]
    alt = f"The same prompts and noise before and after the training of {session.name}"
    curve = f"Loss of {session.name}: {before:.4f} before, {after:.4f} after{on}"
    return PicturesView(lines, [(made["grid"], alt), (made["loss_plot"], curve)])


def show_disconnect(session: Session) -> "DisconnectView":
    """Check the finished model once more, and offer a button that gives Colab's machine back.

    Args:
        session: the session, as `open_session` gives it.

    Returns:
        The view; as a cell's last line it is displayed.

    Raises:
        SessionUnfinished: there is no finished model yet.
        VerificationFailed: the file is not what training wrote.
    """
    disconnect_when_safe(session)
    return DisconnectView(session)


class DisconnectView(View):
    """The button that ends the machine."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._button = make_button(
            "Disconnect the runtime",
            icon="power-off",
            about="Waits until everything is on Google Drive, then disconnects",
        )
        self._button.on_click(lambda _button: self._end())
        self._message = load_widgets().HTML()
        self.box = make_frame(self._button, self._message)
        if where() != "colab":
            self._button.layout.display = "none"
            self._say("There is no runtime to disconnect here: shut down the kernel when you are done.")

    def _end(self) -> None:
        try:
            gone = disconnect_when_safe(self._session, disconnect=True)
        except FastSDError as err:
            self._say_error(err)
            return
        self._say(
            "Everything is safe, and the runtime disconnects now."
            if gone
            else "The runtime could not be disconnected from here."
        )
