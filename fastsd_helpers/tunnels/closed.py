"""Paths that are closed on every link to a page made with Gradio, and to a program that is not known."""

from fastsd_helpers.tunnels.gate.passing import ClosedPath

__all__ = ["GRADIO_CLOSED", "UNKNOWN_CLOSED"]

_FETCHES = "reads addresses of other machines"

# Harmless to any other program: nobody else has such paths.
UNKNOWN_CLOSED: tuple[ClosedPath, ...] = (
    # Before version 4.11 Gradio asks the address itself, and all versions lead visitors there.
    ClosedPath(r"/file[=/]\s*[a-z][a-z0-9+.-]+:/.*", _FETCHES),
    ClosedPath(r"/file=\s*//.*", _FETCHES),  # a share of another machine, on Windows
    ClosedPath(r"/proxy=.*", _FETCHES),
)

# Source: gradio/routes.py of 3.41.2, 4.40.0 and 6.31.0.
GRADIO_CLOSED: tuple[ClosedPath, ...] = (
    *UNKNOWN_CLOSED,
    # The gate logs in for all visitors at once.
    ClosedPath(r"/logout", "would log everybody out"),
    ClosedPath(r"/token", "shows the program's own login"),
    ClosedPath(r"/monitoring(/.*)?", "shows what others do"),
    ClosedPath(r"/(runs|run-history(/.*)?)", "shows what others did"),
    ClosedPath(r"/profiling/.*", "shows how the program works inside"),
    ClosedPath(r"/(undo-)?vibe-.*", "changes the program"),
    ClosedPath(r"/dev/reload", "is for changing the program"),
    ClosedPath(r"/process_recording", "runs a program on a file that is sent"),
)
