"""What the gate reads from a connection, before anything else sees it: one strict request at a time.

The HTTP parsers of different versions disagree about odd requests, and a request that two programs cut at different
places carries a second one past the login. So requests are cut here, by the letter of RFC 9112, and what goes on is
written anew: one head with plain lines, and a body whose length leaves no choice. The next request waits until the
one before it is answered. Whatever is odd is refused with a status and a short sentence of ours.
"""

import re

__all__ = ["LARGEST_HEAD_BYTES", "Malformed", "RequestReader"]

LARGEST_HEAD_BYTES = 65536
_MOST_HEADERS = 200
_LONGEST_CHUNK_LINE = 256
_LARGEST_TRAILER_BYTES = 8192
_METHODS = {b"GET", b"HEAD", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"}
# Source: RFC 9110, 5.3. Of two, one program takes the first and another one the last.
_ONCE = {
    *(b"content-encoding", b"content-location", b"content-range", b"content-type", b"etag", b"max-forwards"),
    *(b"sec-websocket-key", b"sec-websocket-version", b"server", b"user-agent"),
}
_REQUEST_LINE = re.compile(rb"([A-Z-]{1,20}) ([\x21-\x7e]+) HTTP/1\.([01])")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\t\x20-\x7e\x80-\xff]*)")
_HOST = re.compile(rb"[A-Za-z0-9._\[\]:-]{0,255}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
_LONE_LINE_END = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)")


class Malformed(Exception):
    """A request that is not taken: the status to answer with, and a sentence that holds nothing of the request."""

    def __init__(self, status: int, text: str = "This request is malformed.") -> None:
        super().__init__(text)
        self.status, self.text = status, text


class RequestReader:
    """Cuts the bytes of one connection into requests; holds at most one head of LARGEST_HEAD_BYTES, and what is ahead.

    Attributes:
        waiting: no head is complete that has not been answered.
        upgrade: the request that is being answered asks for a WebSocket.
    """

    def __init__(self) -> None:
        self._state = self._head
        self._held = bytearray()
        self._left = self._seen = 0
        self._line_is_good = False
        self.waiting, self.upgrade = True, False

    @property
    def started(self) -> bool:
        """Some of the next head has come."""
        return self.waiting and bool(self._held)

    @property
    def in_body(self) -> bool:
        """More of the body of a request is to come."""
        return self._state not in (self._head, self._between, self._open)

    @property
    def ahead_bytes(self) -> int:
        """How much has come that must wait until the request before it is answered."""
        return 0 if self.waiting else len(self._held)

    def feed(self, data: bytes) -> list[bytes]:
        """Take what has come; gives what may go on, in order.

        Raises:
            Malformed: nothing of this connection may be read any more.
        """
        if not self._held and self._state == self._body and len(data) <= self._left:
            self._left -= len(data)  # most of an upload: nothing is copied
            self._end_when(self._left == 0)
            return [data]
        if not self._held and self._state == self._open:
            return [data]
        self._held += data
        return self._go_on()

    def answered(self) -> list[bytes]:
        """The request was answered: read the next one; gives what may go on of it."""
        self.waiting = True
        return self._go_on() if self._state == self._between else []

    def opened(self) -> list[bytes]:
        """The WebSocket that was asked for stands: from here on every byte may go on."""
        self._state = self._open
        return self._go_on()

    # ------------------------------------------------------------------------------------------------- states
    # Each takes what it can from `_held`, and gives that, or None when it has to wait for more.

    def _go_on(self) -> list[bytes]:
        pieces = []
        while (piece := self._state()) is not None:
            if piece:
                pieces.append(piece)
        return pieces

    def _head(self) -> bytes | None:
        held = self._held
        if held.startswith(b"\r\n"):  # RFC 9112, 2.2: one empty line before a request is no harm
            del held[:2]
            self._seen = 0
        end = held.find(b"\r\n\r\n", max(0, self._seen - 3))
        lone = _LONE_LINE_END.search(held, max(0, self._seen - 1), end if end >= 0 else len(held))
        self._seen = len(held)
        if lone or held.startswith((b"\r\n", b"\n")):
            raise Malformed(400)
        if not self._line_is_good and b"\r\n" in held:
            self._look_at_request_line(bytes(held[: held.find(b"\r\n")]))
        if max(end, 0 if end >= 0 else len(held)) > LARGEST_HEAD_BYTES:
            raise Malformed(431, "The headers of this request are too large.")
        if end < 0:
            return None
        lines = bytes(held[:end]).split(b"\r\n")
        del held[: end + 4]
        self._seen, self._line_is_good = 0, False
        anew = self._written_anew(lines)
        self.waiting = False
        return anew

    def _look_at_request_line(self, line: bytes) -> None:
        found = _REQUEST_LINE.fullmatch(line)
        if not found:
            raise Malformed(400)
        method, target, _ = found.groups()
        if not target.startswith(b"/"):  # CONNECT, OPTIONS * and the absolute addresses of a forward proxy
            raise Malformed(400, "This is not a forward proxy.")
        if method not in _METHODS:
            raise Malformed(405, "This method is not allowed.")
        if b"#" in target:
            raise Malformed(400)
        self._line_is_good = True

    def _written_anew(self, lines: list[bytes]) -> bytes:
        if len(lines) - 1 > _MOST_HEADERS:
            raise Malformed(431, "This request has too many headers.")
        kept: list[tuple[bytes, bytes]] = []
        values: dict[bytes, list[bytes]] = {}
        for line in lines[1:]:
            found = _HEADER_LINE.fullmatch(line)
            if not found:
                raise Malformed(400)
            name, value = found[1].lower(), found[2].rstrip(b" \t")
            kept.append((name, found[1] + b": " + value))
            values.setdefault(name, []).append(value)
        if any(len(values.get(name, [])) > 1 for name in _ONCE):
            raise Malformed(400)
        method, _target, version = lines[0].split(b" ")
        self._look_at_host(values.get(b"host", []), version)
        self._choose_body(values.get(b"content-length", []), values.get(b"transfer-encoding", []), version)
        tokens = [token.strip() for line in values.get(b"connection", []) for token in line.split(b",")]
        self.upgrade = (
            method == b"GET"
            and version == b"HTTP/1.1"
            and self._state == self._between
            and [value.lower() for value in values.get(b"upgrade", [])] == [b"websocket"]
            and b"upgrade" in [token.lower() for token in tokens]
        )
        if not self.upgrade:  # what is not offered here (h2c) is passed over, as RFC 9110, 7.8 has it
            kept = [(name, line) for name, line in kept if name not in (b"upgrade", b"http2-settings", b"connection")]
            rest = [token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings")]
            kept += [(b"connection", b"Connection: " + b", ".join(rest))] if rest else []
        return b"\r\n".join([lines[0], *(line for _name, line in kept), b"", b""])

    def _look_at_host(self, hosts: list[bytes], version: bytes) -> None:
        wrong_count = len(hosts) != 1 and not (version == b"HTTP/1.0" and not hosts)
        if wrong_count or not all(_HOST.fullmatch(host) for host in hosts):
            raise Malformed(400)

    def _choose_body(self, lengths: list[bytes], codings: list[bytes], version: bytes) -> None:
        if codings:
            if lengths or version != b"HTTP/1.1" or len(codings) != 1:
                raise Malformed(400)
            if codings[0].lower() != b"chunked":
                raise Malformed(400, "This transfer coding is not supported.")
            self._state = self._chunk_line
            return
        if lengths and (len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,15}", lengths[0])):
            raise Malformed(400)
        self._left = int(lengths[0]) if lengths else 0
        self._state = self._body
        self._end_when(self._left == 0)

    def _body(self) -> bytes | None:
        piece = bytes(self._held[: self._left])
        del self._held[: self._left]
        self._left -= len(piece)
        self._end_when(self._left == 0)
        return piece or None

    def _chunk_line(self) -> bytes | None:
        line = self._line(_LONGEST_CHUNK_LINE)
        if line is None:
            return None
        found = _CHUNK_LINE.fullmatch(line)
        if not found:
            raise Malformed(400)
        self._left = int(found[1], 16)
        if self._left == 0:
            self._left, self._state = _LARGEST_TRAILER_BYTES, self._trailer
            return b""
        self._state = self._chunk
        return b"%x\r\n" % self._left  # an extension of the chunk goes no further

    def _chunk(self) -> bytes | None:
        piece = bytes(self._held[: self._left])
        del self._held[: self._left]
        self._left -= len(piece)
        if self._left == 0:
            self._state = self._chunk_end
        return piece or None

    def _chunk_end(self) -> bytes | None:
        if len(self._held) < 2:
            if self._held and self._held[0] != 13:
                raise Malformed(400)
            return None
        if self._held[:2] != b"\r\n":
            raise Malformed(400)
        del self._held[:2]
        self._state = self._chunk_line
        return b"\r\n"

    def _trailer(self) -> bytes | None:
        line = self._line(self._left)
        if line is None:
            return None
        if line:  # what comes after a body concerns nobody here, and goes no further
            if not _HEADER_LINE.fullmatch(line):
                raise Malformed(400)
            self._left -= len(line)
            return b""
        self._end_when(True)
        return b"0\r\n\r\n"

    def _between(self) -> bytes | None:
        if not self.waiting:
            return None
        self._state = self._head
        return b"" if self._held else None

    def _open(self) -> bytes | None:
        piece = bytes(self._held)
        self._held.clear()
        return piece or None

    def _line(self, longest: int) -> bytes | None:
        end = self._held.find(b"\r\n")
        if end > longest or (end < 0 and len(self._held) > longest + 1):
            raise Malformed(400)
        if _LONE_LINE_END.search(self._held, 0, end if end >= 0 else len(self._held)):
            raise Malformed(400)
        if end < 0:
            return None
        line = bytes(self._held[:end])
        del self._held[: end + 2]
        return line

    def _end_when(self, done: bool) -> None:
        if done:
            self._state = self._between
