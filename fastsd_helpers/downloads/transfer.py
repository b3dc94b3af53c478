"""Move bytes over HTTP: ranges, resume, retries with pauses, and a token that never follows a redirect elsewhere."""

import email.utils
import errno
import hashlib
import http.client
import json
import logging
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastsd_helpers.errors import DownloadError
from fastsd_helpers.files import check_room, file_errors
from fastsd_helpers.runtime import redact

__all__ = ["Answer", "Remote", "ask", "part_name", "transfer"]

logger = logging.getLogger("fastsd_helpers")

_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 15.0)  # after each failure in a row without a byte of progress
_LONGEST_WAIT_S = 120.0  # of what a server asks for in Retry-After
_TIMEOUT_S = 60.0  # without a byte
_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 200 * 2**20  # room left over, so that the machine stays usable
_REPORT_S = 10.0
_BUSY = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Answer:
    """A small answer, read whole."""

    status: int
    body: bytes
    headers: Any = field(repr=False)
    cookies: str | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Remote:
    """What a server says of a file before it arrives."""

    status: int
    name: str | None  # of Content-Disposition, not yet checked
    total: int | None  # bytes of the whole file
    is_page: bool  # an HTML page, not a file
    head: bytes = b""  # of a page
    cookies: str | None = field(default=None, repr=False)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to web addresses only, and leave the token behind when the host changes."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Decide about one redirect."""
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is None:
            return None
        here, there = urlsplit(req.full_url), urlsplit(newurl)
        if there.scheme not in ("http", "https"):
            raise DownloadError("The link redirects to something that is no web address.", "Use another link.")
        if (here.scheme, here.hostname, here.port) != (there.scheme, there.hostname, there.port):
            for name in ("Authorization", "Cookie"):
                new.headers.pop(name, None)
                new.unredirected_hdrs.pop(name, None)
        return new


def _open(url: str, token: str | None, headers: dict[str, str], cookies: str | None = None) -> Any:
    request = urllib.request.Request(url, headers={"User-Agent": "fastsd_helpers", "Accept-Encoding": "identity"})
    for name, value in headers.items():
        request.add_header(name, value)
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    if cookies:
        request.add_header("Cookie", cookies)
    # No cookie jar: a cookie goes where it came from, and only where it is needed.
    try:
        return urllib.request.build_opener(_Redirects).open(request, timeout=_TIMEOUT_S)
    except ValueError:
        # A host, a port or a character that makes no sense, mostly in a redirect; its own text holds what was sent.
        raise DownloadError(
            f"The link to {urlsplit(url).hostname} leads to something that is no web address.", "Use another link."
        ) from None


def _cookies_of(headers: Any) -> str | None:
    found = [value.partition(";")[0] for value in headers.get_all("Set-Cookie") or []]
    return "; ".join(found) or None


_NETWORK = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


def ask(url: str, *, token: str | None = None, limit: int = 1_000_000) -> Answer:
    """Fetch a small answer, whatever its status; a busy server and a broken connection are tried again.

    Raises:
        DownloadError: nobody answered.
    """
    failures = _Failures(url)
    while True:
        try:
            with _open(url, token, {}) as answer:
                return Answer(answer.status, answer.read(limit), answer.headers, _cookies_of(answer.headers))
        except urllib.error.HTTPError as err:
            if err.code not in _BUSY:
                with err:
                    return Answer(err.code, err.read(limit), err.headers)
            failures.pause(err)
        except _NETWORK as err:
            failures.pause(err)


class _Failures:
    """Counts failures in a row, pauses between tries, and gives up with a sentence."""

    def __init__(self, url: str, pauses_s: tuple[float, ...] | None = None) -> None:
        parts = urlsplit(url)
        self.host = parts.hostname or ""
        self._pauses_s = _PAUSES_S if pauses_s is None else pauses_s
        self.count = 0
        self.furthest = 0

    def pause(self, err: Exception) -> None:
        """Wait before the next try.

        Raises:
            DownloadError: there were too many tries, or the server asks for a longer wait than anybody has.
        """
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


# -------------------------------------------------------------------------------------------------- one file


def transfer(
    url: str,
    part: Path,
    *,
    token: str | None = None,
    cookies: str | None = None,
    size: int | None = None,
    sha256: str | None = None,
    begun: Callable[[Remote], None] | None = None,
    most: int | None = None,
    pauses_s: tuple[float, ...] | None = None,
) -> Remote:
    """Bring a file to `part`, going on where an earlier try stopped when that is safe.

    What a stopped try left is used only if the server's own mark of the version (ETag) is still the same, or the
    file's sha256 is known beforehand. The bytes are all there when this returns; whether they are right is for the
    caller, who knows what the file should be.

    Args:
        url: a web address.
        part: where the bytes go; beside it `{part}.json` notes which version they are of.
        token: sent as bearer token to this host only.
        cookies: sent to this host only.
        size: bytes that are expected; another announced length is refused at once, and no more are taken.
        sha256: known beforehand; makes it safe to go on without an ETag.
        begun: called once when the server has answered, before bytes are kept; it may refuse by raising.
        most: bytes that are taken at most, of a file whose size is not known.
        pauses_s: seconds to wait after each failure in a row, as many as there are further tries; None: the usual.

    Returns:
        What the server said; `is_page` when it answered with an HTML page, and then nothing was kept.

    Raises:
        DownloadError, DiskFull, DriveError: it failed; the partial download is kept for the next try.
    """
    failures = _Failures(url, pauses_s)
    told = False
    while True:
        note = _Note.read(part, sha256)
        have = part.stat().st_size if note and part.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        if note is not None and have and note.etag:
            headers["If-Range"] = note.etag
        try:
            with _open(url, token, headers, cookies) as answer:
                remote, start = _read_head(answer, have)
                if remote.is_page:
                    return remote
                if size is not None and remote.total is not None and remote.total != size:
                    raise DownloadError(
                        f"{failures.host} offers {remote.total} bytes; {size} were expected.",
                        "The file there is another version or incomplete: use another source.",
                    )
                if begun and not told:
                    begun(remote)
                    told = True
                check_room(part.parent, (remote.total or 0) - start, "the rest of the download", spare=_SPARE_BYTES)
                _Note(_strong_etag(answer.headers), sha256).write(part)
                if most is not None and (remote.total or 0) > most:
                    raise _too_large(failures.host, most)
                bound = size if remote.total is None and size is not None else most
                whole = _append(answer, part, start, remote.total, failures, bound)
            if whole:
                return remote
            raise http.client.IncompleteRead(b"")
        except urllib.error.HTTPError as err:
            with err:
                if err.code == 416:  # the part is longer than the file: it is of another version
                    _discard(part)
                    failures.pause(err)
                elif err.code in _BUSY:
                    failures.pause(err)
                else:
                    page = b"html" in (err.headers.get("Content-Type") or "").lower().encode()
                    return Remote(err.code, None, None, page, err.read(100_000))
        except _NETWORK as err:
            if isinstance(err, OSError) and err.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            failures.pause(err)


@dataclass(frozen=True)
class _Note:
    """Which version the bytes of a part file are of."""

    etag: str | None
    sha256: str | None

    @classmethod
    def read(cls, part: Path, sha256: str | None) -> "_Note | None":
        """The note, when it shows that going on is safe."""
        try:
            said = json.loads(_note_path(part).read_text(encoding="utf-8"))
            note = cls(said.get("etag"), said.get("sha256"))
        except (OSError, ValueError, AttributeError):
            return None
        if sha256 is not None and note.sha256 == sha256:
            return note
        return note if note.etag and note.sha256 == sha256 else None

    def write(self, part: Path) -> None:
        """Put the note beside the part file."""
        with file_errors(part, "write"):
            _note_path(part).write_text(json.dumps({"etag": self.etag, "sha256": self.sha256}), encoding="utf-8")


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_path(part).unlink(missing_ok=True)


def _strong_etag(headers: Any) -> str | None:
    etag = headers.get("ETag") or ""
    return etag if re.fullmatch(r'"[^"]*"', etag) else None  # a weak one does not promise equal bytes


def _read_head(answer: Any, have: int) -> tuple[Remote, int]:
    """What is coming, and from which byte on."""
    headers = answer.headers
    start, total = 0, None
    if answer.status == 206:
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", headers.get("Content-Range") or "")
        if match is None or int(match[1]) != have:
            raise http.client.HTTPException("the server sent a different range than requested")
        start = have
        total = int(match[3]) if match[3] != "*" else None
    elif (headers.get("Content-Length") or "").isdigit():
        total = int(headers["Content-Length"])
    kind = (headers.get("Content-Type") or "").lower()
    if "html" in kind and answer.status == 200:
        return Remote(200, None, None, True, answer.read(100_000), _cookies_of(headers)), 0
    return Remote(answer.status, _name_in(headers), total, False), start


def _name_in(headers: Any) -> str | None:
    """The file name of Content-Disposition (RFC 6266)."""
    text = headers.get("Content-Disposition") or ""
    if match := re.search(r"filename\*\s*=\s*[\w-]*'[^']*'([^;]+)", text, re.IGNORECASE):
        return unquote(match[1].strip().strip('"'))
    match = re.search(r'filename\s*=\s*("(?P<quoted>[^"]*)"|(?P<plain>[^;]+))', text, re.IGNORECASE)
    return (match["quoted"] if match["quoted"] is not None else match["plain"].strip()) if match else None


def _too_large(host: str, most: int) -> DownloadError:
    return DownloadError(
        f"{host} sends more than {most} bytes.", "The file there is a different one: use another source."
    )


def _append(
    answer: Any, part: Path, start: int, total: int | None, failures: _Failures, most: int | None = None
) -> bool:
    """Write what arrives; False when the connection broke before the end."""
    with file_errors(part, "write"):
        out = os.open(part, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    done = start
    try:
        with file_errors(part, "write"):
            os.ftruncate(out, start)
            os.lseek(out, start, os.SEEK_SET)
        with _reporting(part, start, total) as report:
            while True:
                try:
                    # read1 gives what is there, so that a slow line loses little when it breaks.
                    chunk = answer.read1(_CHUNK_BYTES)
                except (http.client.HTTPException, OSError) as err:
                    if getattr(err, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                        raise
                    logger.debug("The connection broke after %d bytes: %s.", done, err)
                    return False
                if not chunk:
                    break
                with file_errors(part, "write"):
                    rest = memoryview(chunk)
                    while rest:
                        rest = rest[os.write(out, rest) :]
                done += len(chunk)
                failures.progressed(done)
                report(done)
                if total is not None and done > total:
                    break
                if most is not None and done > most:
                    _discard(part)
                    raise _too_large(failures.host, most)
        with file_errors(part, "write"):
            os.fsync(out)
    finally:
        os.close(out)
    if total is not None and done > total:
        _discard(part)
        return False
    # Without an announced length the end of the connection is the end of the file.
    return total is None or done == total


@contextmanager
def _reporting(part: Path, start: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Say now and then how far a download is, how fast, and how long it will take."""
    began = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < _REPORT_S:
            return
        last = now
        speed = (done - start) / (now - began)
        name = re.sub(r"^\.|\.[0-9a-f]{8}\.part$", "", part.name)
        if total and speed:
            left = (total - done) / speed
            logger.info(
                "%s: %.2f of %.2f GB, %.1f MB/s, %s left.", name, done / 1e9, total / 1e9, speed / 1e6, _duration(left)
            )
        else:
            logger.info("%s: %.2f GB, %.1f MB/s.", name, done / 1e9, speed / 1e6)

    yield report


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def part_name(name: str, source: str) -> str:
    """The name of an unfinished download: the same for the same file, so that the next try finds it."""
    return f".{name}.{hashlib.sha256(source.encode()).hexdigest()[:8]}.part"
