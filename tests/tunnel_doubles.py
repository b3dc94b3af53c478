"""What tests put in place of the far ends of a tunnel: a site behind it, the public side, and the services' programs.

The programs are real child processes that print what the real ones print (recorded lines, in the comments), because
what is tested is the reading of their output, their deadlines and their ending.
"""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "FORWARD",
    "Forwarder",
    "LocaltunnelServer",
    "free_port",
    "keep",
    "make_program",
    "processes_of",
    "serve",
    "site_handler",
]


def free_port() -> int:
    """A port of this machine where nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextlib.contextmanager
def serve(handler: Any, port: int = 0) -> Iterator[int]:
    """Run an aiohttp handler as a server of its own in a thread; gives its port."""
    from aiohttp import web

    started, box = threading.Event(), {}

    async def run() -> None:
        runner = web.ServerRunner(web.Server(handler, handler_cancellation=True), shutdown_timeout=0.2)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        box["port"], box["loop"], box["stop"] = (
            site._server.sockets[0].getsockname()[1],
            asyncio.get_running_loop(),
            (asyncio.Event()),
        )
        started.set()
        await box["stop"].wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield box["port"]
    finally:
        box["loop"].call_soon_threadsafe(box["stop"].set)
        thread.join(10)


async def site_handler(request: Any) -> Any:
    """A site with one path for each way that a web UI talks."""
    from aiohttp import WSMsgType, web

    if request.path == "/headers":
        return web.json_response(
            {"path": request.raw_path, "headers": [list(pair) for pair in request.headers.items()]}
        )
    if request.path == "/upload":
        digest, count = hashlib.sha256(), 0
        async for chunk in request.content.iter_any():
            digest.update(chunk)
            count += len(chunk)
        return web.json_response({"bytes": count, "sha256": digest.hexdigest()})
    if request.path == "/download":
        response = web.StreamResponse(headers={"Content-Length": request.query["bytes"]})
        await response.prepare(request)
        left, block = int(request.query["bytes"]), bytes(2**18)
        while left:
            await response.write(block[: min(left, len(block))])
            left -= min(left, len(block))
        return response
    if request.path == "/events":
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(3):
            await response.write(f"data: {number} {time.monotonic()}\n\n".encode())
            await asyncio.sleep(0.3)
        return response
    if request.path == "/socket":
        socket = web.WebSocketResponse(protocols=("graphql-ws",), max_msg_size=0)
        await socket.prepare(request)
        async for message in socket:
            if message.type == WSMsgType.TEXT and message.data == "bye":
                await socket.close(code=4001)
            elif message.type == WSMsgType.TEXT:
                await socket.send_str(f"you said {message.data}")
            elif message.type == WSMsgType.BINARY:
                await socket.send_bytes(message.data[::-1])
        return socket
    if request.path == "/cookies":
        response = web.Response(text="ok")
        response.set_cookie("one", "1")
        response.set_cookie("two", "2")
        return response
    if request.path == "/elsewhere":
        return web.Response(status=302, headers={"Location": f"http://127.0.0.1:{request.query['port']}/headers"})
    if request.path == "/half":
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"x" * 10)
        request.transport.abort()
        return response
    if request.path == "/chunks":
        response = web.StreamResponse(headers={"Content-Type": request.query["kind"]})
        response.enable_chunked_encoding()
        await response.prepare(request)
        for _ in range(int(request.query["parts"])):
            await response.write(b"part")
        if "cut" in request.query:
            await asyncio.sleep(0.05)  # what was written must have left before the connection breaks
            request.transport.abort()
        return response
    return web.Response(text="hello from behind")


class Forwarder:
    """The public side of a service: a port that pipes bytes to another."""

    def __init__(self, target: int) -> None:
        self.target, self.connections = target, 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._server.accept()
            except OSError:
                return
            self.connections += 1
            try:
                far = socket.create_connection(("127.0.0.1", self.target), timeout=10)
            except OSError:
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pipe, args=(source, sink), daemon=True).start()

    def _pipe(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._server.close()


def make_program(folder: Path, name: str, body: str) -> Path:
    """An executable Python script of that name, to be found on the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{body}", encoding="utf-8")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def keep(
    monkeypatch: Any, name: str, data: bytes, *, url: str = "", size: int | None = None, kept: bool = True
) -> Path:
    """Let these bytes be the one right program of that name, and put them where it is kept; gives that place."""
    from fastsd_helpers.tunnels.services import programs

    machine = programs.this_machine()
    row = programs.Program(name, "1", machine, url or "http://127.0.0.1:9/", hashlib.sha256(data).hexdigest(), size)
    others = [one for one in programs.known_programs() if one.name != name]
    monkeypatch.setattr(programs, "known_programs", lambda: [row, *others])
    place = programs.programs_folder() / f"{name}-1-{machine.replace(' ', '-')}"
    if kept:
        place.write_bytes(data)
    return place


# The start of a fake program: `forward(port)` opens the public side inside the program's own process, so that it
# dies with it, as the real link does.
FORWARD = f"""
import os, sys, time, threading, json
sys.path.insert(0, {str(Path(__file__).resolve().parent)!r})
def say(*lines):
    for line in lines:
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()
def forward(port):
    from tunnel_doubles import Forwarder
    return Forwarder(port).port
def stay():
    time.sleep(600)
"""


class LocaltunnelServer:
    """The two endpoints of localtunnel's server: `GET /?new` gives a name and a port, clients connect to that port, and
    what visitors send to the name goes through one of those connections.

    It suffices because the real client decides everything else: how many sockets, to where, and when to reconnect.
    Source: localtunnel/server, README and lib/TunnelAgent.js.
    """

    def __init__(self) -> None:
        self.status, self.made = 200, 0
        self._idle: list[socket.socket] = []
        self._have = threading.Condition()
        self._clients = socket.create_server(("127.0.0.1", 0))
        self._public = socket.create_server(("127.0.0.1", 0))
        self._api = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._api.getsockname()[1]}"
        self.public_url = f"http://127.0.0.1:{self._public.getsockname()[1]}"
        for server, work in ((self._clients, self._keep), (self._public, self._visit), (self._api, self._answer)):
            threading.Thread(target=self._accept, args=(server, work), daemon=True).start()

    def _accept(self, server: socket.socket, work: Any) -> None:
        while True:
            try:
                one, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=work, args=(one,), daemon=True).start()

    def _answer(self, one: socket.socket) -> None:
        with one:
            one.recv(65536)
            self.made += 1
            about = {
                "id": "calm-fox-12",
                "port": self._clients.getsockname()[1],
                "max_conn_count": 5,
                "url": self.public_url,
            }
            body = json.dumps(about).encode()
            head = f"HTTP/1.1 {self.status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            one.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)

    def _keep(self, one: socket.socket) -> None:
        with self._have:
            self._idle.append(one)
            self._have.notify()

    def _visit(self, near: socket.socket) -> None:
        with self._have:
            if not self._have.wait_for(lambda: self._idle, timeout=10):
                near.close()
                return
            far = self._idle.pop()
        helper = Forwarder.__new__(Forwarder)
        back = threading.Thread(target=helper._pipe, args=(far, near), daemon=True)
        back.start()
        helper._pipe(near, far)

    def close(self) -> None:
        for server in (self._clients, self._public, self._api):
            server.close()
        for one in self._idle:
            one.close()


def processes_of(marker: str) -> list[int]:
    """Ids of the running processes whose command line holds a text."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if re.search(re.escape(marker), line):
                    found.append(int(entry.name))
    return found
