"""The gate's connections: how long each may take, how many may be open, and what is said to a malformed request.

aiohttp answers the requests; this stands between it and the socket, and is the same whatever its version is.
"""

import asyncio
import contextlib
import logging
import threading
from collections import OrderedDict
from http import HTTPStatus
from typing import Any

from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels.gate.wire import LARGEST_HEAD_BYTES, Malformed, RequestReader

__all__ = ["Connection", "Doors", "keep_quiet", "make_server"]

HEAD_S = 20.0  # for the whole head of a request, and between two of them as long as nobody has logged in
IDLE_S = 120.0  # between two requests of somebody who is in: longer than the tunnels' programs keep a connection
ANSWER_S = 60.0  # for all that has to do with a request of somebody who is not in
LINGER_S = 2.0  # for a last answer to arrive
MOST_STRANGERS = 256


class Doors:
    """The open connections of a gate on which nobody has logged in: bounded, and the oldest makes room.

    So a stranger who opens one after another closes his own, and whoever comes to log in is let in: his is the
    latest.
    """

    def __init__(self) -> None:
        self._strangers: OrderedDict[Connection, None] = OrderedDict()

    def let_in(self, connection: "Connection") -> None:
        """Count a connection on which nobody has logged in as the newest; the oldest one beyond the bound is cut."""
        self._strangers[connection] = None
        self._strangers.move_to_end(connection)
        while len(self._strangers) > MOST_STRANGERS:
            self._strangers.popitem(last=False)[0].abort()

    def forget(self, connection: "Connection") -> None:
        """Count a connection no more: a visitor's, or a closed one."""
        self._strangers.pop(connection, None)


class Connection(asyncio.Protocol):
    """One connection to the gate. `inner` is aiohttp's own protocol, which sees well-formed requests alone."""

    def __init__(self, inner: asyncio.Protocol, doors: Doors) -> None:
        self._inner, self._doors, self._reader = inner, doors, RequestReader()
        self._transport: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._trusted = self._broken = self._held_back = self._idle = False
        self.answering = False

    @staticmethod
    def of(request: Any) -> "Connection | None":
        """The connection that a request came on; None when it is gone."""
        protocol = request.transport.get_protocol() if request.transport is not None else None
        return protocol if isinstance(protocol, Connection) else None

    # ----------------------------------------------------------------------------------- told by whoever answers

    def trust(self) -> None:
        """The request that is being answered is of somebody who may pass: it may take as long as it takes."""
        self._trusted = True
        self._doors.forget(self)
        self._set_timer(None)

    def say_go_on(self) -> None:
        """Tell a program that asks first (`Expect: 100-continue`) to send its body."""
        if not self._transport.is_closing():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def opened(self) -> None:
        """The WebSocket that was asked for stands."""
        self._pass(self._reader.opened())

    def answered(self) -> None:
        """The request was answered."""
        if self._broken or self._transport is None or self._transport.is_closing():
            return
        self.answering = False
        try:
            self._pass(self._reader.answered())
        except Malformed as problem:
            self._refuse(problem)
            return
        if self._held_back and self._reader.ahead_bytes <= LARGEST_HEAD_BYTES:
            self._held_back = False
            self._transport.resume_reading()
        if not self._reader.waiting:
            self._begin()
        else:
            self._idle = self._trusted and not self._reader.started
            self._set_timer(IDLE_S if self._idle else HEAD_S)

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    # ------------------------------------------------------------------------------------------ told by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._doors.let_in(self)
        self._inner.connection_made(transport)
        self._set_timer(HEAD_S)

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        was_waiting = self._reader.waiting
        try:
            self._pass(self._reader.feed(data))
        except Malformed as problem:
            self._refuse(problem)
            return
        if was_waiting and not self._reader.waiting:
            self._begin()
        elif self._idle and self._reader.started:
            self._idle = False
            self._set_timer(HEAD_S)
        if self._reader.ahead_bytes > LARGEST_HEAD_BYTES and not self._transport.is_closing():
            self._held_back = True  # more than one request ahead
            self._transport.pause_reading()

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_timer(None)
        self._doors.forget(self)
        self._inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # ------------------------------------------------------------------------------------------------------ inside

    def _pass(self, pieces: list[bytes]) -> None:
        if pieces:
            self._inner.data_received(pieces[0] if len(pieces) == 1 else b"".join(pieces))

    def _begin(self) -> None:
        """A head is whole: until it is known who asks, it is a stranger."""
        self._idle = self._trusted = False
        self._doors.let_in(self)
        self._set_timer(ANSWER_S)

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.abort) if seconds is not None else None

    def _refuse(self, problem: Malformed) -> None:
        """Say what is wrong, unless an answer is under way already, and close."""
        self._broken = True
        if self._reader.waiting and self._reader.in_body:
            self._transport.close()  # of a request that has its answer
        elif self._reader.waiting:
            self._say(problem)
        else:  # in a body: whoever refuses the request anyway gets a moment to say so
            asyncio.get_running_loop().call_later(0.3, self._say_or_abort, problem)

    def _say_or_abort(self, problem: Malformed) -> None:
        if self.answering:
            self.abort()
        elif not self._transport.is_closing():
            self._say(problem)

    def _say(self, problem: Malformed) -> None:
        body = f"{problem.text}\n".encode()
        head = (
            f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}\r\nContent-Type: text/plain\r\n"
            f"Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        with contextlib.suppress(OSError, RuntimeError):
            self._transport.write(head.encode() + body)
            if self._transport.can_write_eof():
                self._transport.write_eof()
        # Closed at once, with something still unread, the answer would be lost on its way.
        self._set_timer(LINGER_S)


def make_server(handler: Any, doors: Doors, **settings: Any) -> Any:
    """aiohttp's server with a Connection before each of its protocols."""
    from aiohttp import web

    class Terse(web.RequestHandler):
        """What aiohttp alone dislikes is refused in a word too; its own answer quotes the request."""

        __slots__ = ()

        def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: str | None = None) -> Any:
            answer = web.Response(status=400, text="This request is malformed.\n", headers={"Server": "fastsd"})
            answer.force_close()
            return answer

    class Server(web.Server):
        def __call__(self) -> Any:
            return Connection(Terse(self, loop=self._loop, **self._kwargs), doors)

    return Server(handler, **settings)


class _Quiet(logging.Filter):
    def __init__(self, thread: threading.Thread) -> None:
        super().__init__()
        self.thread = thread

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self.thread.ident or not self.thread.is_alive():
            return True
        logger.debug("The login gate: %s said %s.", record.name, record.msg)
        return False


def keep_quiet(thread: threading.Thread) -> None:
    """Let what aiohttp and asyncio log in this thread be seen with debugging only.

    They put tracebacks, and bytes that strangers have sent, into the owner's notebook.
    """
    for name in ("aiohttp.client", "aiohttp.internal", "aiohttp.server", "aiohttp.web", "asyncio"):
        found = logging.getLogger(name)
        for old in [one for one in found.filters if isinstance(one, _Quiet) and not one.thread.is_alive()]:
            found.removeFilter(old)
        found.addFilter(_Quiet(thread))
