"""Copies standard input to standard output line by line, without the texts that its first line names.

A program of its own, which takes the hidden texts from its input: its environment and command line can be read.

It stands between a child process and its log, because AUTOMATIC1111 prints its whole command line, passwords and all.
It lives as long as that child, also when the notebook that started both has ended.
"""

import json
import os
import sys
from collections.abc import Sequence

__all__ = ["copy_lines", "first_line"]


def first_line(hidden: Sequence[str]) -> bytes:
    """The line that tells this program, before anything else, which texts it has to hide."""
    return json.dumps(list(hidden)).encode() + b"\n"


def copy_lines(source: int, log: int) -> None:
    """Copy from one descriptor to another until the end, a line at a time so that no hidden text is cut in two."""
    with os.fdopen(source, "rb") as lines:
        words = [word.encode(errors="surrogateescape") for word in json.loads(lines.readline() or "[]") if word]
        for line in lines:
            for word in words:
                line = line.replace(word, "•••".encode())
            while line:
                try:
                    line = line[os.write(log, line) :]
                except OSError:
                    break  # a full disk must not end the program that is being watched


if __name__ == "__main__":
    copy_lines(sys.stdin.fileno(), sys.stdout.fileno())
