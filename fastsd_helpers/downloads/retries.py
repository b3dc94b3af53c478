"""Tries of one download or question: failures in a row, the pauses between them, and when it is given up."""

import email.utils
import errno
import http.client
import re
import time
import urllib.error
from urllib.parse import urlsplit

from fastsd_helpers.errors import DownloadError
from fastsd_helpers.runtime import logger, redact

__all__ = ["BUSY", "PAUSES_S", "Failures"]

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # after each failure in a row without a byte of progress
_LONGEST_WAIT_S = 120.0  # of what a server asks for in Retry-After
BUSY = (408, 425, 429, 500, 502, 503, 504)  # what a server answers that may answer better later


class Failures:
    """Counts failures in a row, pauses between tries, and gives up with a sentence."""

    def __init__(self, url: str, pauses_s: tuple[float, ...] | None = None) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self._pauses_s = PAUSES_S if pauses_s is None else pauses_s
        self.count = 0
        self.furthest = 0

    def pause(self, err: Exception) -> None:
        """Wait before the next try.

        Raises:
            DownloadError: there were too many tries, or the server asks for a longer wait than anybody has.
            OSError: `err` itself where it says that the disk is full.
        """
        if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise err
        asked = _retry_after(err)
        if asked is not None and asked > _LONGEST_WAIT_S:
            raise DownloadError(
                f"{self.host} is busy and asks you to wait for {asked / 60:.0f} minutes.",
                "Run this again then; the partial download is kept.",
            ) from err
        if self.count >= len(self._pauses_s):
            raise DownloadError(
                f"{self.host}: {self._reason(err)}, {self.count + 1} times in a row.", _hint(err)
            ) from err
        pause = asked if asked is not None else self._pauses_s[self.count]
        self.count += 1
        logger.info("%s: %s; trying again in %.0f s.", self.host, self._reason(err), pause)
        time.sleep(pause)

    def progressed(self, done: int) -> None:
        """More arrived than ever before: failures count from zero again."""
        if done > self.furthest:
            self.furthest, self.count = done, 0

    @staticmethod
    def _reason(err: Exception) -> str:
        if isinstance(err, urllib.error.HTTPError):
            return f"answer {err.code}"
        reason = getattr(err, "reason", err)
        if isinstance(err, http.client.IncompleteRead):
            return "the connection was interrupted"
        text = redact(" ".join(str(reason).split()))[:120]
        return f"no connection ({text or type(err).__name__})"


def _hint(err: Exception) -> str:
    if isinstance(err, urllib.error.HTTPError):
        return "Wait a few minutes and run this again; the partial download is kept."
    return "Check the network and the address, then run this again; the partial download is kept."


def _retry_after(err: Exception) -> float | None:
    """Seconds that a busy server asks for: a number or a date (RFC 9110, 10.2.3); None when it says nothing."""
    text = (
        (getattr(err, "headers", None) or {}).get("Retry-After", "") if isinstance(err, urllib.error.HTTPError) else ""
    )
    if re.fullmatch(r"\d{1,9}", text.strip()):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()) if text else None
    except (TypeError, ValueError):
        return None
