"""Copies standard input to a log file line by line, without the texts in FASTSD_HIDE; run as a program of its own.

It stands between a web UI and its log, because AUTOMATIC1111 prints its whole command line, passwords and all. It lives
as long as the web UI, also when the notebook that started both has ended.
"""

import os
import sys

__all__ = ["copy_lines"]


def copy_lines(source: int, path: str, hidden: list[str]) -> None:
    """Copy until the end, a line at a time so that no hidden text is cut in two."""
    words = [word.encode() for word in hidden if word]
    with open(path, "ab", buffering=0) as log, os.fdopen(source, "rb") as lines:
        for line in lines:
            for word in words:
                line = line.replace(word, "•••".encode())
            try:
                log.write(line)
            except OSError:
                continue  # a full disk must not end the program that is being watched


if __name__ == "__main__":
    copy_lines(sys.stdin.fileno(), sys.argv[1], os.environ.get("FASTSD_HIDE", "").split("\n"))
