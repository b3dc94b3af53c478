"""The gate's connections to the server behind it: nothing is added, unpacked or followed, and heads are bounded."""

import functools
from typing import Any

__all__ = ["LARGEST_ANSWER_HEAD_BYTES", "open_session"]

LARGEST_ANSWER_HEAD_BYTES = 2**18


def open_session() -> Any:
    """An aiohttp client for a reverse proxy; to be called in the loop that it works in."""
    import asyncio

    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    connector._factory = functools.partial(_bounded_protocol(), loop=asyncio.get_running_loop())
    # Every header is the visitor's own and every byte passes as it is: no cookies, no decompression, no limit.
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
        skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        read_bufsize=2**18,
        max_line_size=65536,
        max_field_size=65536,
    )


@functools.cache
def _bounded_protocol() -> type:
    from aiohttp import ClientPayloadError
    from aiohttp.client_proto import ResponseHandler

    class BoundedResponse(ResponseHandler):
        """aiohttp bounds each header of an answer but not, in every version, how many come."""

        _head_left: int | None = None
        _end_of_last = b""

        def set_response_params(self, **settings: Any) -> None:
            self._head_left, self._end_of_last = LARGEST_ANSWER_HEAD_BYTES, b""
            super().set_response_params(**settings)

        def data_received(self, data: bytes) -> None:
            if self._head_left is not None:
                seam = self._end_of_last + data[:3]
                if b"\r\n\r\n" in seam or b"\n\n" in seam or b"\r\n\r\n" in data or b"\n\n" in data:
                    self._head_left = None
                else:
                    self._head_left -= len(data)
                    self._end_of_last = (self._end_of_last + data)[-3:]
                    if self._head_left < 0:
                        self.set_exception(ClientPayloadError("The head of an answer has no end."))
                        self.close()
                        return
            super().data_received(data)

    return BoundedResponse
