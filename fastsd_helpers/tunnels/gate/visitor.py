"""Who asks: the link's own page, a page of somewhere else, a person who follows a link, or a program.

A browser sends the visitor's cookie, and often HTTP basic authentication, with whatever any page makes it ask, so
being logged in does not say that the visitor wants it. What does: `Origin` and `Sec-Fetch-Site`, which a browser sets
itself and no page can change.

The rule:

- `Origin` is there: it must be the link's own address. `null` (a sandbox, a file), a sibling on the share service,
  another port, http where the link is https: foreign. `Sec-Fetch-Site`, where it is there too, must be `same-origin`.
- Only `Sec-Fetch-Site` is there: `same-origin` is the own page. `none` (typed, a bookmark) may look: GET and HEAD.
  Any other value is foreign, but for a link that is followed at the top of a window (GET, navigate, document), since
  links are made to be shared. Frames, images, scripts, `fetch` and event streams are no such thing, so a page of
  somewhere else can start none of the GET requests that do something.
- Of who does not say how it is asked (`Sec-Fetch-Mode` and `-Dest`: older browsers), a GET that starts no event stream
  passes, since it changes nothing, and no other page can read the answer.
- Neither is there: a program, which acts by a password in a header or by a cookie of its own.

Source: Fetch Metadata Request Headers (W3C), RFC 6454.
"""

import ipaddress
from collections.abc import Collection
from enum import Enum
from typing import Any
from urllib.parse import urlsplit

__all__ = ["Visitor", "address_of", "origin_of", "who_asks"]

_INSIDE = [
    ipaddress.ip_network(text)
    for text in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
        *("192.168.0.0/16", "::/127", "fc00::/7", "fe80::/10"),
    )
]


class Visitor(Enum):
    """Who asks. OWN_PAGE and PROGRAM may do everything, LOOKS may have a page, FOREIGN nothing."""

    OWN_PAGE = "own page"
    PROGRAM = "program"
    LOOKS = "looks"
    FOREIGN = "foreign page"


def who_asks(request: Any, own: Collection[str], local: Collection[str] = ()) -> Visitor:
    """Tell by the headers of a request who asks.

    Args:
        request: an aiohttp request.
        own: origins of the link.
        local: origins on this machine; one counts only where the request was sent to that very name.
    """
    origins, sites = request.headers.getall("Origin", []), request.headers.getall("Sec-Fetch-Site", [])
    socket = bool(request.headers.getall("Upgrade", []))
    if origins:
        host = request.headers.get("Host", "").lower()
        here = {*own, *(origin for origin in local if urlsplit(origin).netloc == host)}
        if all(origin in here for origin in origins) and all(site == "same-origin" for site in sites):
            return Visitor.OWN_PAGE
    elif not sites:
        return Visitor.PROGRAM
    elif sites == ["same-origin"]:
        return Visitor.OWN_PAGE
    if socket or request.method not in ("GET", "HEAD"):
        return Visitor.FOREIGN
    how = [request.headers.getall(f"Sec-Fetch-{name}", []) for name in ("Mode", "Dest")]
    if how == [[], []]:
        starts = any("text/event-stream" in line.lower() for line in request.headers.getall("Accept", []))
        return Visitor.FOREIGN if starts else Visitor.LOOKS
    followed = request.method == "GET" and how == [["navigate"], ["document"]] and not origins
    return Visitor.LOOKS if followed or (sites == ["none"] and not origins) else Visitor.FOREIGN


def origin_of(url: str) -> str:
    """The origin of an address, as a browser writes it; "" for what is not an address."""
    try:
        parts = urlsplit(url.strip())
        port, host = parts.port, (parts.hostname or "").lower()
    except ValueError:
        return ""
    scheme = parts.scheme.lower()
    if not host or scheme not in ("http", "https"):
        return ""
    host = f"[{host}]" if ":" in host else host
    usual = {"http": 80, "https": 443}[scheme]
    return f"{scheme}://{host}" if port in (None, usual) else f"{scheme}://{host}:{port}"


def address_of(request: Any, header: str | None) -> str | None:
    """The visitor's address as the service vouches for it; None when it vouches for none.

    Args:
        request: an aiohttp request.
        header: what the service sets itself. Of a list the last entry is its own; an address of an inside network is
            that of a machine before the service, not of a visitor. An IPv6 visitor has a whole /64 to choose from, so
            that is the address.
    """
    if not header:
        return None
    lines = request.headers.getall(header, [])
    if not lines or (len(lines) > 1 and header.lower() != "x-forwarded-for"):
        return None
    try:
        found = ipaddress.ip_address(lines[-1].rsplit(",", 1)[-1].strip())
    except ValueError:
        return None
    found = getattr(found, "ipv4_mapped", None) or found
    if any(found.version == network.version and found in network for network in _INSIDE):
        return None
    return str(found) if found.version == 4 else str(ipaddress.ip_network((int(found), 64), strict=False))
