"""How far uv or pip is, from what they say: which large package has arrived, and that all of them are unpacked."""

import contextlib
import re
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from fastsd_helpers.runtime import logger

__all__ = ["Progress", "run_told"]

_UNITS = {"B": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
# "Downloading torch (846.8MiB)", and pip's "Downloading torch-2.8.0-cp311-...whl (899.8 MB)".
_BEGUN = re.compile(r"^\s*Downloading (\S+?)(?:-\d\S*)? \(([\d.]+) ?([kKMG]?)i?B\)")
_ARRIVED = re.compile(r"^\s*Downloaded (\S+)$")
_ALL = re.compile(r"^(?:Prepared (\d+) packages?|Installing collected packages: )")
_LARGE_BYTES = 20e6  # pip names every small one too, and tells of none that it has arrived
_LAST_WORDS_S = 5.0  # what a tool that has ended wrote is read within


class Progress:
    """Says what has arrived as the lines of an installer come."""

    def __init__(self) -> None:
        self._sizes: dict[str, float] = {}
        self._arrived: set[str] = set()

    def take(self, line: str) -> bool:
        """Read a line; whether it was one about progress, which is not part of any error."""
        begun, arrived, done = _BEGUN.match(line), _ARRIVED.match(line), _ALL.match(line)
        if begun:
            name, number, unit = begun.groups()
            self._sizes[name] = float(number) * _UNITS[unit or "B"]
            if self._sizes[name] > _LARGE_BYTES:
                logger.info("  downloading %s (%.0f MB)", name, self._sizes[name] / 1e6)
        elif arrived and arrived[1] in self._sizes:
            self._arrived.add(arrived[1])
            so_far = sum(self._sizes[name] for name in self._arrived)
            rest = [name for name in self._sizes if name not in self._arrived]
            if self._sizes[arrived[1]] > _LARGE_BYTES:
                more = f"; still downloading: {', '.join(rest[:5])}" if rest else ""
                logger.info("  %s is here, %.0f MB of the large ones so far%s", arrived[1], so_far / 1e6, more)
        elif done:
            logger.info("  everything is downloaded and is being installed")
        return bool(begun or arrived or done)


def run_told(
    command: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout_s: float
) -> "subprocess.CompletedProcess[str]":
    """Run uv or pip to its end, and say meanwhile how far it is; the rest of what it says is the result's `stdout`.

    Raises:
        OSError: it cannot be started. subprocess.TimeoutExpired: it took too long, and was ended.
    """
    progress = Progress()
    said: list[str] = []

    def listen(stream: TextIO) -> None:
        with contextlib.suppress(ValueError):  # closed from the other side, after its time was over
            said.extend(line for line in stream if not progress.take(line))

    running = subprocess.Popen(
        command,
        cwd=cwd,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    # Not read here: what it started and left behind may hold its output open for ever.
    reader = threading.Thread(target=listen, args=(running.stdout,), daemon=True)
    reader.start()
    try:
        code = running.wait(timeout_s)
    finally:
        running.kill()
        running.wait()
        reader.join(_LAST_WORDS_S)
    return subprocess.CompletedProcess(list(command), code, "".join(said))
