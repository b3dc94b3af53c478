"""Run one `fastsd` command: errors become one sentence and a hint, and the exit code tells whose fault it was."""

import argparse
import contextlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from fastsd_helpers.cli.answers import plain
from fastsd_helpers.cli.parser import parse
from fastsd_helpers.errors import DependencyMissing, FastSDError
from fastsd_helpers.files import outage
from fastsd_helpers.runtime import REPOSITORY, logger, redact, show_log

__all__ = ["main"]

_OLDEST_PYTHON = (3, 11)
ISSUES = f"{REPOSITORY}/issues"


def main(words: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    Args:
        words: the command line after `fastsd`; the process's own when None.

    Returns:
        The exit status: 0 done, 2 something to correct, 1 a failure of the program, 130 after Ctrl-C.
    """
    as_json = "--json" in (sys.argv[1:] if words is None else words)
    if sys.version_info < _OLDEST_PYTHON:
        here = ".".join(map(str, sys.version_info[:3]))
        problem = f"fastsd needs Python {'.'.join(map(str, _OLDEST_PYTHON))} or newer, and this is Python {here}."
        return _report(problem, "Run it with a newer one (in Colab: Runtime > Change runtime type).", 2, as_json)
    # A name with an accent must not end a command on a terminal that cannot show it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with _sigterm_as_ctrl_c(), show_log(sys.stderr), _what_is_logged() as logged:
        chosen = None
        try:
            chosen = parse(words)
            answer = chosen.run(chosen)
            lines = [line for line in answer.lines if not (line in logged and _streams_end_in_one_place())]
            print(redact(json.dumps(plain(answer.data)) if as_json else "\n".join(lines)), flush=True)
            return 0
        except KeyboardInterrupt:
            return _report("Stopped.", "Run the same command again to resume.", 130, as_json)
        except BrokenPipeError:
            # The reader (`| head`) has gone; Python would complain once more while it shuts down.
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
            return 1
        except FastSDError as err:
            _show_traceback_if_asked()
            return _report(err.problem, _with_own_flag(err.hint, chosen), err.exit_code, as_json)
        except ModuleNotFoundError as err:
            if (err.name or "").startswith("fastsd_helpers"):
                return _report_failure_of_ours(err, as_json)
            _show_traceback_if_asked()
            missing = DependencyMissing(f"The package {err.name!r} is not installed.", "Run: fastsd install dreambooth")
            return _report(missing.problem, missing.hint, missing.exit_code, as_json)
        except Exception as err:
            told = outage(err) if isinstance(err, OSError) else None
            if told is None:
                return _report_failure_of_ours(err, as_json)
            _show_traceback_if_asked()
            return _report(told.problem, _with_own_flag(told.hint, chosen), told.exit_code, as_json)


def _with_own_flag(hint: str, chosen: argparse.Namespace | None) -> str:
    """A hint about the folder of results, which is --root where there are sessions, and --out where there are none."""
    return hint.replace("--root", "--out") if hasattr(chosen, "out") and not hasattr(chosen, "root") else hint


def _report_failure_of_ours(err: Exception, as_json: bool) -> int:
    _show_traceback_if_asked()
    text = " ".join(str(err).split()) or "no message"
    hint = f"Run it again with FASTSD_DEBUG=1 in front, and report what it prints at {ISSUES}"
    return _report(f"fastsd itself failed: {type(err).__name__}: {text}.", hint, 1, as_json)


def _show_traceback_if_asked() -> None:
    if os.environ.get("FASTSD_DEBUG") == "1":
        print(redact(traceback.format_exc()), file=sys.stderr)


def _report(problem: str, hint: str, exit_code: int, as_json: bool) -> int:
    problem, hint = redact(problem), redact(hint)
    print(f"✋ {problem}" + (f"\n   → {hint}" if hint else ""), file=sys.stderr)
    if as_json:
        print(json.dumps({"error": problem, "hint": hint, "exit_code": exit_code}))
    return exit_code


@contextlib.contextmanager
def _what_is_logged() -> Iterator[set[str]]:
    """Collect the lines of the log: a report is logged where it is made, and can be a command's answer too."""
    logged: set[str] = set()

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.add(record.getMessage())

    collector = Collector()
    logger.addHandler(collector)
    try:
        yield logged
    finally:
        logger.removeHandler(collector)


def _streams_end_in_one_place() -> bool:
    """Whether standard output and standard error are one terminal or one file, where a line must not appear twice."""
    try:
        out, err = (os.fstat(stream.fileno()) for stream in (sys.stdout, sys.stderr))
    except (OSError, ValueError):  # a stream that is not a file, as in a test or a notebook
        return False
    return (out.st_dev, out.st_ino) == (err.st_dev, err.st_ino)


@contextlib.contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Let a polite `kill` end a command as Ctrl-C does: save, then return."""

    def interrupt(_number: int, _frame: Any) -> NoReturn:
        raise KeyboardInterrupt

    try:
        earlier = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread, where Python allows no handler
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, earlier)
