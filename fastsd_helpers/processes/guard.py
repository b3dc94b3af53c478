"""Runs one command and ends it, with all it started, when this program's own parent is gone.

A tunnel must not outlive the notebook that opened it, not even one that was killed: it would be a public link that
nobody watches. Run as `python guard.py COMMAND...`; end of standard input means that the parent is gone.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading

__all__ = ["run_guarded"]


def run_guarded(command: list[str]) -> int:
    """Run a command in this process group; returns its exit code, or ends the whole group with the parent."""
    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as err:
        sys.stdout.write(f"{command[0]} cannot be started: {err.strerror}\n")
        return 127
    threading.Thread(target=_wait_for_the_end_of, args=(sys.stdin.fileno(),), daemon=True).start()
    return child.wait()


def _wait_for_the_end_of(stdin: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(stdin, 4096):
            pass
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[1:]))
