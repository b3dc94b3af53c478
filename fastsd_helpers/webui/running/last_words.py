"""A web UI's log as data: the error that ended it, where that came from, and the lines that mean nothing to a user."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Error", "find_crash_signal", "find_crash_site", "find_last_error", "is_noise", "name_extension"]

_TRACEBACK = re.compile(r"^( *)Traceback \(most recent call last\):$")
_ERROR = re.compile(
    r"^(?:[A-Za-z_]\w*\.)*(?:[A-Z]\w*)?(?:Error|Exception|Exit|Interrupt|Buffer|Failure|Iteration)\b(?::|$)"
)
_ANY_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?::|$)")
# A web UI reports what it goes on after in these ways; the traceback that follows has ended nothing but a thread.
_SURVIVED = re.compile(
    r"^\*\*\* |^Exception in thread |^Exception ignored in|never retrieved$|^Exception in callback|^Error calling: |"
    r"^Error completing request|^(?:loading|changing) .*: \w+$|^Exception in ASGI application|^ERROR: +Exception in "
)
_FRAME = re.compile(r'^ *File "([^"]+)", line \d+')
# What the owner of an installation added; built-in extensions belong to the web UI.
_EXTENSION = re.compile(r"[/\\](?:extensions|custom_nodes)[/\\]([^/\\]+)[/\\]")
# Advice that does not hold here (a link is made another way; a newer torch wants a newer driver than rented machines
# have), and git's words about a copy without its history.
_NOISE = re.compile(
    r"To create a public link, set `share=True`|^fatal: No (?:names found, cannot describe anything|tags can describe)|"
    r"pytorch (?:with|to) cu\d+ or higher|^(?:WARNING ?){3}$"
)
_NOISE_ON_CPU = re.compile(r"Found no NVIDIA driver|memory monitor disabled|No CUDA GPUs are available")
# What Python's faulthandler writes. Source: Modules/faulthandler.c and Python/traceback.c of CPython.
_FATAL = re.compile(r"Fatal Python error: (.+)")  # behind a progress bar, which ends no line
_FATAL_SIGNALS = {
    "Bus error": signal.SIGBUS,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Illegal instruction": signal.SIGILL,
    "Floating point exception": signal.SIGFPE,
}
_OF_CRASH = re.compile(
    r"^(?:  (?:File |Binary file |<|\.\.\.)|(?:Current t|T)hread |Stack \(most|Extension modules: |"
    r"Current thread's C stack|<)|^\s*$"
)
_MOST_AFTER = 8  # lines of the error's own text, and what other threads say while the process ends


@dataclass(frozen=True)
class Error:
    """An error that a log ends with."""

    text: str  # "RuntimeError: CUDA error ...", with the lines that follow it
    files: tuple[str, ...]  # of the stack, the innermost last
    after: int  # lines of the log after it

    @property
    def line(self) -> str:
        """Its first line."""
        return self.text.splitlines()[0]

    @property
    def extension(self) -> str | None:
        """The innermost extension in whose code it happened; None when it was in none."""
        return name_extension(self.files)


def find_last_error(lines: Sequence[str], *, near_end: bool = True) -> Error | None:
    """The last error of a log; None when there is none.

    Args:
        lines: the end of the log, without empty lines.
        near_end: only one that can have ended the process: not caught, and nearly the last that was said.
    """
    found = None
    for number, line in enumerate(lines):
        head = _TRACEBACK.match(line)
        if head is None:
            continue
        survived = bool(head[1]) or (number > 0 and bool(_SURVIVED.search(lines[number - 1])))
        # After one that was caught the process went on, whatever had been said before.
        found = None if survived and near_end else _read_traceback(lines, number, len(head[1])) or found
    if lines and _ERROR.match(lines[-1]) and (found is None or found.after > _MOST_AFTER):
        return Error(lines[-1], found.files if found else (), 0)  # such as the text of an exit
    if found is not None and near_end and found.after > _MOST_AFTER:
        return None
    return found


def _read_traceback(lines: Sequence[str], start: int, indent: int) -> Error | None:
    files = []
    for number in range(start + 1, len(lines)):
        line = lines[number]
        if len(line) - len(line.lstrip(" ")) > indent:
            frame = _FRAME.match(line)
            files += [frame[1]] if frame else []
            continue
        if not _ANY_ERROR.match(line.strip()):
            return None  # another thread wrote in between: what ended it is not told
        end = number + 1
        while end < len(lines) and lines[end].startswith((" " * (indent + 1), "\t")):
            end += 1  # a text of several lines
        return Error("\n".join(lines[number:end]).strip(), tuple(files), len(lines) - end)
    return None  # cut in the middle


def find_crash_site(lines: Sequence[str]) -> tuple[str, ...]:
    """The files of the Python stack at a crash of compiled code, the innermost last; none when Python told none.

    Source: the output of Python's faulthandler.
    """
    begin = max((at for at, line in enumerate(lines) if _FATAL.search(line)), default=None)
    if begin is None:
        return ()
    files: list[str] = []
    current = False
    for line in lines[begin + 1 :]:
        if line.startswith(("Current thread", "Thread 0x", "Stack (most recent")):
            current = line.startswith(("Current thread", "Stack"))
        elif current and (frame := _FRAME.match(line)):
            files.insert(0, frame[1])
    return tuple(files)


def find_crash_signal(lines: Sequence[str]) -> signal.Signals | None:
    """The signal that ended a process, told by its log alone: the last that it wrote is Python's word of that crash."""
    fatal = [(at, found[1]) for at, line in enumerate(lines) if (found := _FATAL.search(line))]
    if not fatal or not all(_OF_CRASH.match(line) for line in lines[fatal[-1][0] + 1 :]):
        return None  # such as a program of its own that crashed, after which it went on
    return _FATAL_SIGNALS.get(fatal[-1][1].strip().replace("-", " "))


def name_extension(files: Sequence[str]) -> str | None:
    """The extension that the innermost of these files belongs to; None when none of them is of one."""
    names = [found[1] for file in files if (found := _EXTENSION.search(file))]
    return names[-1] if names else None


def is_noise(line: str, *, on_cpu: bool) -> bool:
    """Whether a line of the log only worries who reads it; it stays in the log.

    Args:
        on_cpu: it was started to compute without a GPU, so that it finds none is known.
    """
    return bool(_NOISE.search(line)) or (on_cpu and bool(_NOISE_ON_CPU.search(line)))
