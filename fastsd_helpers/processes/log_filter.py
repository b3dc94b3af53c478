"""Copies standard input to standard output line by line, without the texts in FASTSD_HIDE; a program of its own.

It stands between a child process and its log, because AUTOMATIC1111 prints its whole command line, passwords and all.
It lives as long as that child, also when the notebook that started both has ended.
"""

import os
import sys

__all__ = ["copy_lines"]


def copy_lines(source: int, log: int, hidden: list[str]) -> None:
    """Copy from one descriptor to another until the end, a line at a time so that no hidden text is cut in two."""
    words = [word.encode() for word in hidden if word]
    with os.fdopen(source, "rb") as lines:
        for line in lines:
            for word in words:
                line = line.replace(word, "•••".encode())
            while line:
                try:
                    line = line[os.write(log, line) :]
                except OSError:
                    break  # a full disk must not end the program that is being watched


if __name__ == "__main__":
    copy_lines(sys.stdin.fileno(), sys.stdout.fileno(), os.environ.get("FASTSD_HIDE", "").split("\n"))
