"""A web server on 127.0.0.1 for download tests: serves bytes, and misbehaves as it is told, request by request.

It suffices because what breaks downloads (cut connections, wrong lengths, redirects, login pages, busy answers) happens
in the HTTP answer itself, which it writes byte by byte.
"""

import contextlib
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

__all__ = ["Behaviour", "FileServer", "Seen"]


@dataclass
class Behaviour:
    """How to answer one request; the defaults are an honest server with ranges and an ETag."""

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None  # instead of the file
    cut_after: int | None = None  # send so many bytes of the body, then drop the connection
    announce: int | None = None  # added to the announced length
    redirect: str | None = None
    ranges: bool = True
    etag: str | None = '"one"'
    stall_s: float = 0.0  # pause after every 64 kB


@dataclass(frozen=True)
class Seen:
    """One request as it arrived."""

    path: str
    host: str
    headers: Mapping[str, str]


class FileServer:
    """Serve `files` (path -> bytes); `queue` holds the behaviours of the next requests, then all is well."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.queue: list[Behaviour] = []
        self.seen: list[Seen] = []
        self.default = Behaviour()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port the system chose."""
        return self._server.server_address[1]

    def url(self, path: str = "", *, host: str = "127.0.0.1") -> str:
        """An address here; `host="localhost"` is another host for the client."""
        return f"http://{host}:{self.port}{path}"

    def stop(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    site: FileServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Stay silent; `FileServer.seen` is the log."""

    def do_GET(self) -> None:
        site = self.site
        site.seen.append(Seen(self.path, (self.headers.get("Host") or "").split(":")[0], dict(self.headers)))
        how = site.queue.pop(0) if site.queue else site.default
        if how.redirect:
            self._send(302, {"Location": how.redirect}, b"", how)
            return
        content = (
            how.body if how.body is not None else site.files.get(self.path, site.files.get(urlsplit(self.path).path))
        )
        if content is None:
            self._send(404, {}, b"nothing here", how)
            return
        if how.status is not None:
            self._send(how.status, how.headers, content if how.body is not None else b"", how)
            return
        headers = {"Content-Type": "application/octet-stream", **how.headers}
        if how.etag:
            headers["ETag"] = how.etag
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        unchanged = self.headers.get("If-Range") in (None, how.etag)
        if match and how.ranges and unchanged:
            first = int(match[1])
            if first >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}"}, b"", how)
                return
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            self._send(206, headers, content[first:], how)
        else:
            self._send(200, headers, content, how)

    def _send(self, status: int, headers: Mapping[str, str], body: bytes, how: Behaviour) -> None:
        with contextlib.suppress(ConnectionError):  # the client may hang up, as after refusing a length
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body) + (how.announce or 0)))
            self.end_headers()
            body = body[: how.cut_after]
            for start in range(0, len(body), 65536):
                self.wfile.write(body[start : start + 65536])
                if how.stall_s:
                    self.wfile.flush()
                    time.sleep(how.stall_s)
            self.wfile.flush()
            if how.cut_after is not None or how.announce:
                self.close_connection = True
