"""A Hugging Face Hub on 127.0.0.1 for tests: serves folders to the real huggingface_hub client.

It speaks the parts of the Hub's HTTP API that downloads use: model info, paged file tree, resolve with HEAD, GET and
ranges, the redirect of large files to another host (the CDN), tokens, gates, error codes; and it can misbehave on
request. What it answers follows the headers the client reads (X-Repo-Commit, X-Linked-Etag, X-Linked-Size,
X-Error-Code, X-Error-Message, Link); Xet storage is not offered, so the client downloads by plain HTTP.
"""

import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, quote, unquote, urlsplit

__all__ = ["Fault", "HubServer", "Request"]

_LARGE = (".safetensors", ".bin", ".ckpt")  # stored as LFS on the Hub: named by sha256, served by the CDN


@dataclass(frozen=True)
class Request:
    """One request as it arrived."""

    method: str
    path: str  # with the query
    host: str
    range: str | None
    token: str | None


@dataclass
class Fault:
    """How to answer the next `times` requests whose method and path match, instead of well."""

    path: str  # regular expression, searched in the path
    method: str = "GET"
    times: int = 1
    status: int | None = None  # answer with this status and no content
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # send this many bytes of the body, then drop the connection
    flip: bool = False  # invert one bit of the body
    html: bool = False  # a login page instead of the file


@dataclass(frozen=True)
class _Blob:
    path: Path
    size: int
    git_sha1: str
    sha256: str | None  # of large files


class HubServer:
    """Serve `{"owner/name": folder}`; use it as a context manager and give its `url` to the client as endpoint.

    Args:
        repos: Hub id -> folder with the files of its one commit. A folder changed later is read again: a new commit.
        gated: ids whose files need a token of `members`; their listing is public, as on the Hub.
        private: ids that exist only for a token of `members`.
        members: tokens with access. `strangers`: valid tokens without. Any other token is refused.
        page_size: entries of a file tree per answer.
    """

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        gated: Iterable[str] = (),
        private: Iterable[str] = (),
        members: Iterable[str] = (),
        strangers: Iterable[str] = (),
        page_size: int = 4,
    ) -> None:
        self.repos = dict(repos)
        self.gated, self.private = set(gated), set(private)
        self.members, self.strangers = set(members), set(strangers)
        self.page_size = page_size
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.connections: set[socket.socket] = set()
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._blobs: dict[tuple[Path, int, int], _Blob] = {}

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering, on connections that are open too; a second call does nothing."""
        if not self._thread.is_alive():
            return
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):  # the client may have closed it meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    @property
    def port(self) -> int:
        """The port the system chose."""
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        """What HF_ENDPOINT has to be."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def cdn(self) -> str:
        """Where large files come from: for the client another host, so a token must not follow."""
        return f"http://localhost:{self.port}/cdn"

    def downloaded(self) -> list[str]:
        """Names of the files whose content was asked for, sorted, each once."""
        found = set()
        for request in self.requests:
            match = re.match(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)|/cdn/[0-9a-f]{64}/(.+)", request.path)
            if match and request.method == "GET":
                found.add(unquote(match[1] or match[2]))
        return sorted(found)

    def files(self, repo: str) -> dict[str, _Blob]:
        """The files of a repository, by name."""
        folder = self.repos[repo]
        return {
            path.relative_to(folder).as_posix(): self._blob(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    def commit(self, repo: str) -> str:
        """The commit's id: it changes when a file changes."""
        names = "".join(f"{name} {blob.git_sha1}\n" for name, blob in self.files(repo).items())
        return hashlib.sha1(f"{repo}\n{names}".encode()).hexdigest()

    def _blob(self, path: Path) -> _Blob:
        state = path.stat()
        key = (path, state.st_size, state.st_mtime_ns)
        with self.lock:
            if key not in self._blobs:
                content = path.read_bytes()
                git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                sha256 = hashlib.sha256(content).hexdigest() if path.suffix in _LARGE else None
                self._blobs[key] = _Blob(path, len(content), git_sha1, sha256)
            return self._blobs[key]

    def take_fault(self, method: str, path: str) -> Fault | None:
        """Use up one turn of the first fault that fits this request."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.hub.connections.add(self.connection)

    def finish(self) -> None:
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *args: object) -> None:
        """Stay silent; `HubServer.requests` is the log."""

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        host = (self.headers.get("Host") or "").split(":")[0]
        self.hub.requests.append(Request(self.command, self.path, host, self.headers.get("Range"), token))
        self.fault = self.hub.take_fault(self.command, self.path)
        if self.fault and self.fault.status:
            self._send(self.fault.status, b"", self.fault.headers)
            return
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/cdn/([0-9a-f]{64})/(.+)", path):
            self._send_cdn(match[1])
        elif token and token not in self.hub.members | self.hub.strangers:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._with_repo(match[1], match[2] or "main", token, self._send_info)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.*))?", path):
            self._with_repo(match[1], match[2], token, self._send_tree)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._with_repo(match[1], match[2], token, lambda repo: self._resolve(repo, unquote(match[3]), token))
        else:
            self._refuse(404, "", "Not found")

    def _with_repo(self, repo: str, revision: str, token: str | None, answer: object) -> None:
        member = token in self.hub.members
        if repo not in self.hub.repos or (repo in self.hub.private and not member):
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif unquote(revision) not in ("main", self.hub.commit(repo)):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            answer(repo)

    def _send_info(self, repo: str) -> None:
        siblings = []
        for name, blob in self.hub.files(repo).items():
            sibling = {"rfilename": name, "size": blob.size, "blobId": blob.git_sha1}
            if blob.sha256:
                sibling["lfs"] = {"sha256": blob.sha256, "size": blob.size, "pointerSize": 134}
            siblings.append(sibling)
        about = {
            "_id": "0",
            "id": repo,
            "modelId": repo,
            "sha": self.hub.commit(repo),
            "private": repo in self.hub.private,
            "gated": "auto" if repo in self.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _send_tree(self, repo: str) -> None:
        entries = []
        for name, blob in self.hub.files(repo).items():
            entry = {"type": "file", "path": name, "size": blob.size, "oid": blob.git_sha1}
            if blob.sha256:
                entry["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
            entries.append(entry)
        parts = urlsplit(self.path)
        start = int(parse_qs(parts.query).get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if start + self.hub.page_size < len(entries):
            following = f"{self.hub.url}{parts.path}?recursive=true&cursor={start + self.hub.page_size}"
            headers["Link"] = f'<{following}>; rel="next"'
        self._send(200, json.dumps(entries[start : start + self.hub.page_size]).encode(), headers)

    def _resolve(self, repo: str, name: str, token: str | None) -> None:
        commit = {"X-Repo-Commit": self.hub.commit(repo)}
        blob = self.hub.files(repo).get(name)
        if repo in self.hub.gated and token not in self.hub.members:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        elif blob is None:
            self._refuse(404, "EntryNotFound", "Entry not found", commit)
        elif blob.sha256:
            location = f"{self.hub.cdn}/{blob.sha256}/{quote(name)}"
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(blob.size), "Location": location}
            self._send(302, b"", {**commit, **linked})
        else:
            self._send_file(blob, {**commit, "ETag": f'"{blob.git_sha1}"'})

    def _send_cdn(self, sha256: str) -> None:
        for repo in self.hub.repos:
            for blob in self.hub.files(repo).values():
                if blob.sha256 == sha256:
                    self._send_file(blob, {"ETag": f'"{sha256}"'})
                    return
        self._refuse(404, "", "Not found")

    def _send_file(self, blob: _Blob, headers: Mapping[str, str]) -> None:
        content = blob.path.read_bytes()
        if self.fault and self.fault.html:
            self._send(200, b"<!DOCTYPE html><title>Log in</title>", {"Content-Type": "text/html"})
            return
        if self.fault and self.fault.flip:
            content = content[:-1] + bytes([content[-1] ^ 1])
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self._send(200, content, {**headers, "Accept-Ranges": "bytes"})
            return
        first, last = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
        if first >= len(content):
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], headers)

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        named = {"X-Error-Code": code} if code else {}
        self._send(status, b"", {**named, "X-Error-Message": message, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut_after if self.fault else None
        self.wfile.write(body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.close_connection = True
