"""The login form as it arrives: read by hand, bounded in bytes and seconds, and never unpacked."""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from fastsd_helpers.tunnels.gate.wire import Malformed

__all__ = ["LARGEST_FORM_BYTES", "read_basic", "read_form"]

LARGEST_FORM_BYTES = 4096
_FORM_S = 10.0
_NO_FORM = "That is not a login form."


async def read_form(request: Any, names: Sequence[str]) -> dict[str, str]:
    """Read the fields of these names from the body of an aiohttp request; "" for one that is not there.

    Raises:
        Malformed: it is too large, too slow, or not what a browser sends for a form.
    """
    kind, _, rest = request.headers.get("Content-Type", "").partition(";")
    charset = re.fullmatch(r"\s*(?:charset\s*=\s*\"?utf-8\"?)?\s*", rest, re.IGNORECASE)
    length = request.headers.get("Content-Length", "")
    if (length.isdigit() and int(length) > LARGEST_FORM_BYTES) or not request.can_read_body:
        raise Malformed(413, _NO_FORM)
    coded = request.headers.get("Content-Encoding", "identity").lower() != "identity"
    if kind.strip().lower() != "application/x-www-form-urlencoded" or not charset or coded:
        raise Malformed(415, _NO_FORM)
    try:
        text = (await asyncio.wait_for(_read(request.content), _FORM_S)).decode("utf-8")
        pairs = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=20)
    except TimeoutError:
        raise Malformed(408, "The login form did not arrive in time.") from None
    except ValueError:
        raise Malformed(400, _NO_FORM) from None
    found = {name: [value for key, value in pairs if key == name] for name in names}
    if any(len(values) > 1 for values in found.values()):
        raise Malformed(400, _NO_FORM)
    return {name: values[0] if values else "" for name, values in found.items()}


async def _read(stream: Any) -> bytes:
    body = bytearray()
    while part := await stream.readany():
        body += part
        if len(body) > LARGEST_FORM_BYTES:
            raise Malformed(413, _NO_FORM)
    return bytes(body)


def read_basic(header: str) -> tuple[str, str] | None:
    """User and password of HTTP basic authentication; None when the header is something else."""
    kind, _, coded = header.partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        raw = base64.b64decode(coded.strip(), validate=True)
    except (binascii.Error, ValueError):
        return None
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    user, separator, password = text.partition(":")
    return (user, password) if separator else None
