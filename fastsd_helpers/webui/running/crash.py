"""Why a web UI ended: first how its process ended, then the error it ended with; a table only explains that error."""

import re
import signal
from collections.abc import Sequence

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.errors import WebUICrashed
from fastsd_helpers.webui.running.circumstances import Circumstances
from fastsd_helpers.webui.running.last_words import (
    Error,
    find_crash_signal,
    find_crash_site,
    find_last_error,
    name_extension,
)

__all__ = ["explain_crash", "explain_refusal"]

_LATER = "Start it again."
_LESS = "Choose a smaller model or a machine with more RAM; for SDXL, a GPU of 12 GB and more with --lowram."
_DISK = ("the disk is full", "Free some space on this machine's disk, then start it again.")
_STORE = (
    "the folder of its models does not answer: the connection to Drive was lost, or it was moved away",
    "Run the cell that connects Drive again, or bring the folder back; then start it again.",
)
_GUARD = r"fastsd guard: ((\S+) of (\S+) [^;\n]+)"

_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_CRASHES = {
    signal.SIGSEGV: "segmentation fault",
    signal.SIGABRT: "aborted",
    signal.SIGILL: "illegal CPU instruction",
    signal.SIGFPE: "arithmetic error",
    signal.SIGSYS: "forbidden system call",
    signal.SIGTRAP: "trap",
}
_SAID_LINES = 4  # of the end, in which the table for what is said looks
_HARMLESS = re.compile(r"(?i)^\s*(\[?warning|warnings?\.warn|info\b|debug\b)|warning:")


def explain_crash(
    title: str, code: int | None, lines: Sequence[str], *, around: Circumstances | None = None
) -> WebUICrashed:
    """Turn the end of a process and of its log into an error.

    Lines that a log has anyway explain nothing: first comes how the process ended, then the error it ended with.

    Args:
        title: the web UI's name.
        code: as subprocess gives it (negative: the signal that ended it); None when it is not known.
        lines: the last lines of its log.
        around: what the machine had left then.
    """
    around = around or Circumstances()
    lines = [line for line in lines if line.strip()]
    number = _signal_of(code) if code is not None else find_crash_signal(lines)
    if number is not None:
        return _by_signal(title, -number if code is None else code, number, lines, around)
    last = lines[-1].strip() if lines else ""
    if code == 0:
        if re.search(r"Interrupted with signal \d+", "\n".join(lines[-_SAID_LINES:])):
            return WebUICrashed(f"{title} was stopped from outside (exit 0).", _LATER)
        return WebUICrashed(f"{title} ended without an error (exit 0).{_quote(last)}", _LATER)
    found = re.search(_GUARD, "\n".join(lines[-_SAID_LINES:]))
    if found:
        return WebUICrashed(
            f"{title} ended: its guard does not fit this version of its code ({found[1]}), and it is not started "
            "without.",
            "Run `fastsd webui install` again: it brings its code and packages to the versions the guard knows. If you "
            "added an extension recently, remove it.",
        )
    # Python ends with 1 for an error that nothing caught; with another code the program ended itself.
    error = find_last_error(lines) if code in (1, None) else None
    explained = _look_up(error, lines)
    if explained is not None:
        return _with_extension(title, *explained, error)
    if around.killed_for_memory and code is None:
        return WebUICrashed(f"{title} was ended by the system: the machine's RAM was not enough.", _LESS)
    for happened, (what, hint) in ((around.disk_full, _DISK), (around.store_lost, _STORE)):
        if happened:
            return WebUICrashed(f"{title} ended{_how(code)}: {what}.", hint)
    if error is not None:
        of = f" in the extension {error.extension}" if error.extension else ""
        hint = _without(error.extension) if error.extension else "See the full log: fastsd webui log"
        return WebUICrashed(f"{title} ended by an error{of}{_how(code)}: {error.line[:200]}", hint)
    return WebUICrashed(
        " ".join(filter(None, [f"{title} ended by itself{_how(code)}.{_quote(last)}", around.sentence()])),
        "See the full log: fastsd webui log",
    )


def explain_refusal(title: str, lines: Sequence[str], refused: str) -> WebUICrashed:
    """Say why a running web UI refused its model: by the error that it told just before.

    Args:
        refused: pattern of the line that says so.
    """
    ends = [at for at, line in enumerate(lines) if re.search(refused, line)]
    before = [line for line in lines[: ends[-1]] if line.strip()] if ends else list(lines)
    if any("No checkpoints found" in line for line in lines):
        return WebUICrashed(
            f"{title} is running, but has no model yet.",
            "Place one in its folder: fastsd webui place sd15 (in the notebook: cell 4b), then start it again.",
        )
    error = find_last_error(before, near_end=False)
    explained = _look_up(error, before)
    what, hint = explained or (error.line[:200] if error else "", "Look at it with `fastsd inspect FILE`.")
    return WebUICrashed(f"{title} runs, but it refused the model{f': {what}' if what else ''}.", hint)


def _signal_of(code: int | None) -> signal.Signals | None:
    # A shell in between says 128 + the number.
    number = -code if code is not None and code < 0 else code - 128 if code is not None and code > 128 else None
    try:
        return signal.Signals(number) if number is not None else None
    except ValueError:
        return None


def _by_signal(
    title: str, code: int, number: signal.Signals, lines: Sequence[str], around: Circumstances
) -> WebUICrashed:
    if number in _FROM_OUTSIDE:
        return WebUICrashed(f"{title} was stopped from outside (exit {code}).", _LATER)
    left = around.sentence()
    if number == signal.SIGKILL:
        if around.killed_for_memory is False:
            return WebUICrashed(
                f"{title} was killed (exit {code}), although the system reports no out-of-memory kill. {left}",
                f"Start it again. If it is killed again while it loads a model, it is out of RAM anyway: {_LESS}",
            )
        sure = "" if around.killed_for_memory else "most likely "
        return WebUICrashed(
            f"{title} was ended by the system (exit {code}): {sure}the machine's RAM was not enough.", _LESS
        )
    if around.disk_full and number in (signal.SIGBUS, signal.SIGABRT, signal.SIGXFSZ):
        return WebUICrashed(f"{title} ended (exit {code}): {_DISK[0]}.", _DISK[1])
    if around.store_lost and number == signal.SIGBUS:
        return WebUICrashed(f"{title} ended (exit {code}): {_STORE[0]}.", _STORE[1])
    if number == signal.SIGBUS:
        # Models are read where they lie, as they are asked for: what is cut off there is missed only then.
        return WebUICrashed(
            f"{title} ended (exit {code}): most likely a model was overwritten while it was in use. {left}".strip(),
            f"{_LATER} Put a new version of a model under another name, or stop the web UI first: fastsd webui stop",
        )
    if number in _CRASHES:
        # C++ says what it could not go on with: "terminate called after throwing ...", "what():  CUDA error ...".
        thrown = re.search(r"what\(\): +(.+)", "\n".join(lines[-30:])) if number == signal.SIGABRT else None
        explained = _look_up(Error(thrown[1], find_crash_site(lines), 0), ()) if thrown else None
        extension = name_extension(find_crash_site(lines))
        if explained is not None:
            return _with_extension(title, *explained, None)
        where = f"in the extension {extension}" if extension else "in compiled code"
        more = f" It said: {thrown[1][:200]}." if thrown else ""
        hint = (
            _without(extension)
            if extension
            else f"{_LATER} If the problem persists, see the full log: fastsd webui log"
        )
        return WebUICrashed(f"{title} crashed {where} ({_CRASHES[number]}, exit {code}).{more} {left}".strip(), hint)
    return WebUICrashed(f"{title} was ended by the signal {number.name} (exit {code}). {left}".strip(), _LATER)


def _look_up(error: Error | None, lines: Sequence[str]) -> tuple[str, str] | None:
    table = read_table("webui/running/crashes.toml")
    said = [line for line in lines[-_SAID_LINES:] if not _HARMLESS.search(line)]
    # What was said after the error is nearer to the end than the error itself.
    sources = [("\n".join(said), table["said"])]
    if error is not None:
        sources.insert(len(sources) if error.after else 0, (error.text, [*table["error"], *table["said"]]))
    for text, rows in sources:
        for row in rows:
            if found := re.search(row["pattern"], text):
                return row["what"].format(*found.groups()), row["hint"]
    return None


def _with_extension(title: str, what: str, hint: str, error: Error | None) -> WebUICrashed:
    name = error.extension if error is not None else None
    if name is None:
        return WebUICrashed(f"{title} ended: {what}.", hint)
    # Where the machine or a file is at fault, the extension only met it.
    hint = _without(name) if "the module" in what else hint
    return WebUICrashed(f"{title} ended by an error in the extension {name}: {what}.", hint)


def _without(extension: str | None) -> str:
    return (
        "Run `fastsd webui install`: it installs what its extensions ask for. If the problem persists, leave this one "
        f"out: fastsd webui install --remove-extensions {extension}"
    )


def _how(code: int | None) -> str:
    return f" (exit {code})" if code is not None else ""


def _quote(last: str) -> str:
    return f" Its last line: {last[:200]}" if last else " It printed nothing."
