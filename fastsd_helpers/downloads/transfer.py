"""Move bytes over HTTP: ranges, resume, retries with pauses, and a token that never follows a redirect elsewhere."""

import errno
import hashlib
import http.client
import json
import os
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from fastsd_helpers.downloads.retries import BUSY, Failures
from fastsd_helpers.errors import DownloadError
from fastsd_helpers.files import check_room, file_errors, write_all
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import logger

__all__ = ["Answer", "Remote", "ask", "discard", "part_name", "transfer"]

_TIMEOUT_S = 60.0  # without a byte
_CHUNK_BYTES = 1 << 20
_SPARE_BYTES = 200 * 2**20  # room left over, so that the machine stays usable
_REPORT_S = 10.0


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
            raise DownloadError("The link redirects to something that is not a web address.", "Use another link.")
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
            f"The link to {urlsplit(url).hostname} leads to something that is not a web address.", "Use another link."
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
    failures = Failures(url)
    while True:
        try:
            with _open(url, token, {}) as answer:
                return Answer(answer.status, answer.read(limit), answer.headers, _cookies_of(answer.headers))
        except urllib.error.HTTPError as err:
            if err.code not in BUSY:
                with err:
                    return Answer(err.code, err.read(limit), err.headers)
            failures.pause(err)
        except _NETWORK as err:
            failures.pause(err)


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
    file's sha256 is known beforehand. The bytes are all there when this returns; the caller knows what they should be.

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
        DownloadError: it failed; the partial download is kept for the next try.
        DriveError: the disk does not take it, DiskFull for one; the partial download is kept.
    """
    failures = Failures(url, pauses_s)
    while True:
        have, headers = _what_is_here(part, sha256)
        try:
            with _open(url, token, headers, cookies) as answer:
                remote, start = _read_head(answer, have)
                if remote.is_page:
                    return remote
                _require_size(remote.total, size, most, failures.host)
                begun = begun(remote) if begun is not None else None  # once
                check_room(part.parent, (remote.total or 0) - start, "the rest of the download", spare=_SPARE_BYTES)
                _Note(_strong_etag(answer.headers), sha256).write(part)
                bound = size if remote.total is None and size is not None else most
                if _append(answer, part, start, remote.total, failures, bound):
                    return remote
            raise http.client.IncompleteRead(b"")
        except urllib.error.HTTPError as err:
            with err:
                if err.code not in (416, *BUSY):
                    return _refused(err)
                if err.code == 416:  # the part is longer than the file: it is of another version
                    discard(part)
                failures.pause(err)
        except _NETWORK as err:
            failures.pause(err)


def _refused(err: urllib.error.HTTPError) -> Remote:
    page = "html" in (err.headers.get("Content-Type") or "").lower()
    return Remote(err.code, None, None, page, err.read(100_000))


def _what_is_here(part: Path, sha256: str | None) -> tuple[int, dict[str, str]]:
    """How many bytes of an earlier try can be used, and the headers that ask for the rest."""
    note = _Note.read(part, sha256)
    have = part.stat().st_size if note is not None and part.exists() else 0
    if note is None or not have:
        return 0, {}
    return have, {"Range": f"bytes={have}-", **({"If-Range": note.etag} if note.etag else {})}


def _require_size(total: int | None, size: int | None, most: int | None, host: str) -> None:
    if size is not None and total is not None and total != size:
        raise DownloadError(
            f"{host} offers {total} bytes; {size} were expected.",
            "The file there is another version or incomplete: use another source.",
        )
    if most is not None and (total or 0) > most:
        raise _too_large(host, most)


@dataclass(frozen=True)
class _Note:
    """Which version the bytes of a part file are of."""

    etag: str | None
    sha256: str | None

    @classmethod
    def read(cls, part: Path, sha256: str | None) -> "_Note | None":
        """The note, when it shows that going on is safe."""
        said = read_object(_note_path(part))
        note = cls(said.get("etag"), said.get("sha256"))
        if sha256 is not None and note.sha256 == sha256:
            return note
        return note if note.etag and note.sha256 == sha256 else None

    def write(self, part: Path) -> None:
        """Put the note beside the part file."""
        with file_errors(part, "write"):
            _note_path(part).write_text(json.dumps({"etag": self.etag, "sha256": self.sha256}), encoding="utf-8")


def _note_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def discard(part: Path) -> None:
    """Delete a part file and its note."""
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
    answer: Any, part: Path, start: int, total: int | None, failures: Failures, most: int | None = None
) -> bool:
    """Write what arrives; False when the connection broke before the end."""
    with file_errors(part, "write"):
        out = os.open(part, os.O_WRONLY | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    done = start
    try:
        with file_errors(part, "write"):
            os.ftruncate(out, start)
            os.lseek(out, start, os.SEEK_SET)
        report = _reporter(part, start, total)
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
                write_all(out, chunk)
            done += len(chunk)
            failures.progressed(done)
            report(done)
            if total is not None and done > total:
                break
            if most is not None and done > most:
                discard(part)
                raise _too_large(failures.host, most)
        with file_errors(part, "write"):
            os.fsync(out)
    finally:
        os.close(out)
    if total is not None and done > total:
        discard(part)
        return False
    # Without an announced length the end of the connection is the end of the file.
    return total is None or done == total


def _reporter(part: Path, start: int, total: int | None) -> Callable[[int], None]:
    """What says now and then how far a download is, how fast, and how long it will take."""
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
            left_s = (total - done) / speed
            left = f"{left_s:.0f} s" if left_s < 90 else f"{left_s / 60:.0f} min"
            logger.info("%s: %.2f of %.2f GB, %.1f MB/s, %s left.", name, done / 1e9, total / 1e9, speed / 1e6, left)
        else:
            logger.info("%s: %.2f GB, %.1f MB/s.", name, done / 1e9, speed / 1e6)

    return report


def part_name(name: str, source: str) -> str:
    """The name of an unfinished download: the same for the same file, so that the next try finds it."""
    return f".{name}.{hashlib.sha256(source.encode()).hexdigest()[:8]}.part"
