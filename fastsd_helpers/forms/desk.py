"""The notebook's memory: the session that is open, the forms that were shown, and which cell makes which variable."""

import dis
import sys
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from fastsd_helpers.errors import Interrupted, SettingsError
from fastsd_helpers.runtime import in_notebook
from fastsd_helpers.wording import for_notebook

__all__ = [
    "MAKERS",
    "Maker",
    "attend_errors",
    "cell_of",
    "clear",
    "close_session",
    "keep_form",
    "last_form",
    "note_offered",
    "require_open",
    "say_missing",
    "session_here",
    "sit_down",
    "untick",
    "was_offered",
]


@dataclass(frozen=True)
class Maker:
    """The cell that makes a variable."""

    cell: str
    settings: str = ""  # the class whose form the variable is


# The variables that cells share. The same name is made by the cell of the same number in every notebook.
MAKERS = {
    "session_form": Maker("2a", "SessionConfig ReadingSessionConfig"),
    "session": Maker("2b"),
    "photos_form": Maker("3a", "PrepareConfig"),
    "lines_form": Maker("3a", "ReadPicturesConfig"),
    "pictures": Maker("3b"),
    "settings_form": Maker("4", "DreamBoothConfig"),
    "run_form": Maker("5a", "RunConfig"),
    "teach_form": Maker("5a", "TeachConfig"),
    "result": Maker("5b"),
    "try_form": Maker("7a", "PlaygroundConfig"),
    "file_form": Maker("8a", "ExportConfig"),
    "page_form": Maker("8a", "ServeConfig"),
    "hub_form": Maker("9a", "UploadConfig SessionUploadConfig"),
    "store_form": Maker("2a", "StoreConfig"),
    "webui": Maker("2b"),
    "ui_form": Maker("3a", "InstallConfig"),
    "models_form": Maker("4a", "ModelsConfig"),
    "controlnets_form": Maker("5a", "ControlNetConfig"),
    "start_form": Maker("6a", "LaunchConfig"),
    "link_form": Maker("7a", "TunnelConfig"),
    "model_file_form": Maker("10a", "ModelFileConfig"),
}


# Forms, by their class and the folder of their session.
_forms: dict[tuple[str, Path | None], Any] = {}
_offered: dict[str, Path] = {}
_open: Any = None  # the session
_opened_with: Any = None  # the settings
_used = False


# --------------------------------------------------------------------------------------------- the session


def sit_down(session: Any, asked: Any) -> None:
    """Note the session that is open from now on, and the settings that it was opened with."""
    global _open, _opened_with, _used
    _open, _opened_with, _used = session, asked, True


def close_session() -> None:
    """Note that none is open: the cell that opens one has begun, and it may fail."""
    global _open, _used
    _open, _used = None, True


def session_here() -> Any:
    """The session that is open; None when there is none."""
    return _open


def clear() -> None:
    """Forget everything, as a new kernel has."""
    global _open, _used
    _open, _used = None, False
    _forms.clear()
    _offered.clear()


def note_offered(name: str, root: Path) -> None:
    """Note that a list has offered a session as one that is there."""
    _offered[name] = root


def was_offered(name: str) -> Path | None:
    """Where a list saw the session that is not there any more; None for a new name."""
    return _offered.get(name)


def require_open(settings: type, folder: Path | None) -> None:
    """Check that a form belongs to the session that is open, which is the one that cell 2a shows.

    Args:
        settings: the form's class.
        folder: of the session that it was drawn for; None for a form that belongs to no session.

    Raises:
        SettingsError: with the cell to run.
    """
    if folder is None or not _used:
        return
    if _open is None:
        raise SettingsError("No session is open: the cell that opens it has failed or was stopped.", "Run cell 2b.")
    wanted = _wanted_now()
    if wanted:
        raise SettingsError(
            f"Cell 2a shows {wanted} now, and the session {_open.folder.name} is open.",
            "Run cell 2b, or choose the one that is open in cell 2a again.",
        )
    if folder != _open.folder:
        raise SettingsError(
            f"This form belongs to the session {folder.name}, and {_open.folder.name} is open now.",
            f"Run {cell_of(settings)} again: it then shows the settings of {_open.folder.name}.",
        )


def cell_of(settings: type) -> str:
    """Which cell shows the form of a settings class, in words."""
    cells = [maker.cell for maker in MAKERS.values() if settings.__name__ in maker.settings.split()]
    return f"cell {cells[0]}" if cells else "the cell that shows the form"


def _wanted_now() -> str:
    """What the user has changed in cell 2a since the session was opened, in words; "" for nothing."""
    form = _forms.get((type(_opened_with).__name__, None))
    if form is None:
        return ""
    values = form.values()
    for name in form.typed:
        now, then = values.get(name), getattr(_opened_with, name, None)
        if name == "session_name":
            if str(now or "").split() not in (str(then or "").split(), [_open.folder.name]):
                return f"the session {now}" if now else "another session"
        elif now != then:
            return "another place"
    return ""


# ----------------------------------------------------------------------------------------------- the forms


def keep_form(form: Any) -> None:
    """Remember the form of its class that was drawn last for its session."""
    _forms[form.settings.__name__, form.folder] = form


def last_form(settings: type, folder: Path | None) -> Any:
    """The form of a class that was drawn last for a session, or for none."""
    return _forms.get((settings.__name__, folder))


def untick(settings: type, **values: Any) -> None:
    """Show other values in the form that was drawn last: what was asked for once has been begun, and is not repeated.

    Args:
        settings: the form's class.
        values: what its fields show from now on.
    """
    form = _forms.get((settings.__name__, _open.folder if _open is not None else None))
    if form is not None:
        form.update(**values)


# ---------------------------------------------------------------------------------------------- the errors


def attend_errors() -> None:
    """In a notebook: a cell that lacks what another cell makes says which one to run, and one that was stopped says so.

    A stop is what somebody asked for: plain words, and no box of an error. Every other error is as it was. The cell
    fails all the same, so that "Run all" stops there.
    """
    if not in_notebook():
        return
    shell = sys.modules["IPython"].get_ipython()
    if getattr(shell.CustomTB, "of_fastsd", False):
        return
    before, handler_before = tuple(shell.custom_exceptions), shell.CustomTB

    def explain(shell: Any, kind: type, error: BaseException, trace: Any, tb_offset: int | None = None) -> None:
        if before and isinstance(error, before):
            handler_before(kind, error, trace, tb_offset=tb_offset)
            return
        if isinstance(error, Interrupted):
            shell._last_traceback = [for_notebook(str(error))]  # what the kernel answers for the cell
            sys.stdout.write(f"{shell._last_traceback[0]}\n")
            sys.stdout.flush()
            return
        sentence = _sentence(error, trace, shell.user_ns)
        if sentence:
            # What IPython asks an error for before it prints a traceback.
            error._render_traceback_ = lambda: [sentence]  # type: ignore[attr-defined]
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((*before, NameError, Interrupted), explain)
    shell.CustomTB.__func__.of_fastsd = True


def _sentence(error: BaseException, trace: Any, names: dict[str, Any]) -> str:
    missing = getattr(error, "name", None)
    # Of the cell itself: the same name within a function is somebody's own.
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_globals is not names:
        trace = trace.tb_next
    if missing not in MAKERS or missing in names or trace is None or trace.tb_next is not None:
        return ""
    return say_missing(_lacking(trace.tb_frame.f_code, names))


def _lacking(code: CodeType, names: dict[str, Any]) -> list[str]:
    loaded = {item.argval for item in dis.get_instructions(code) if item.opname in ("LOAD_NAME", "LOAD_GLOBAL")}
    read = [name for name in MAKERS if name in loaded and name not in names]
    for form, made in (("session_form", "session"), ("store_form", "webui")):
        if made in read and form not in names:
            read.append(form)
    return [name for name in MAKERS if name in read]


def say_missing(names: list[str]) -> str:
    """Which cells to run for variables that are not there: "Run cell 2b first: it makes `session`."."""
    cells = list(dict.fromkeys(MAKERS[name].cell for name in names))
    made = _joined([f"`{name}`" for name in names])
    if len(cells) == 1:
        return f"✗ Run cell {cells[0]} first: it makes {made}."
    return f"✗ Run cells {_joined(cells)} first: they make {made}."


def _joined(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
