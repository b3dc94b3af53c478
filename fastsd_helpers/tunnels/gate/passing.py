"""What passes the gate: which requests are refused for what they ask, and which headers answers get.

Pure functions: the gate asks them for every request and every answer. A web UI's own list of closed paths is data of
its catalogue; what is here holds whatever stands behind the gate.
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

__all__ = ["ClosedPath", "answer_headers", "is_user_file", "refusal"]

# Encoded more often than this is not an honest address.
_MOST_ROUNDS = 8

# What follows these is an argument, such as the name of a file, and no path of the program behind.
_TAKES_ARGUMENT = re.compile(
    r"file|file=.*|proxy=.*|view|userdata|static|assets|extensions|webui-assets|workflow_templates|models|run|call|svelte"
)
# No program is mounted deeper than this.
_MOST_PREFIXES = 8

# Where web UIs serve files that visitors have put there: the path itself or what is below it.
_USER_FILES = re.compile(r"file=.*|file|view|userdata|stream|viewvideo|viewaudio|run-history")
_USER_FILES_BELOW = re.compile(
    r".*/(assets/[^/]+/content|sd_extra_networks/thumb|experiment/models/preview/.*)", re.DOTALL
)
_OWN_FILES = {"static", "assets", "extensions", "webui-assets", "svelte"}  # below these the program's own
_UPLOADED = re.compile(r"[0-9a-f]{40,64}")  # Gradio's folders for uploads are named by a hash
# Opened as a page, these run scripts as the link's own page. Office files match too and are downloaded, as always.
_PAGE_TYPES = re.compile(r"html|xml|svg|xsl|multipart|rfc822")
_SCRIPT_TYPES = re.compile(r"javascript|ecmascript|jscript|livescript|wasm")
_TYPE = re.compile(r"[a-z0-9!#$&^_.+-]+/[a-z0-9!#$&^_.+-]+\s*(;.*)?")


@dataclass(frozen=True)
class ClosedPath:
    """One path that no visitor may use.

    Attributes:
        pattern: for the whole path, from its first slash and in small letters; it holds below any prefix too.
        why: what it would do, in a few words that end the sentence "Closed on this link, since it ...".
        methods: HTTP methods that are closed; none named: all of them.
    """

    pattern: str
    why: str = "is for the owner"
    methods: tuple[str, ...] = ()


def refusal(method: str, raw_path: str, closed: Sequence[ClosedPath]) -> str | None:
    """Say in one sentence why a request must not pass; None where it may.

    Path and query are decoded until they stay the same, since servers decode once, twice or not at all. Refused
    whatever is closed: what cannot be decoded, control characters, and `..` as a part of the path or of a value.

    Args:
        method: HTTP method, in any case.
        raw_path: path and query as they came, percent-encoded.
        closed: the paths of this web UI that are closed.
    """
    raw, _, query = raw_path.partition("?")
    if not raw.startswith("/") or "#" in raw_path:
        return "This is not an address of this link."
    path = _decode(raw)
    decoded = [_decode(part.replace("+", " "), errors="replace") for part in re.split("[&;=]", query)]
    values = [value for value in decoded if value is not None]
    if path is None or len(values) < len(decoded):
        return "This address cannot be read."
    # Lines and tabs are honest in a value, such as a prompt, and nowhere else.
    text = path + re.sub(r"[\t\r\n]", "", "".join(values))
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):
        return "This address holds control characters."
    path = _plain(path)
    if any(part.count(".") > 1 and not part.strip(". ") for part in re.split("[/=:;]", path)):
        return "A path with .. in it does not pass."
    if any(_climbs(_plain(value)) for value in values):
        return "A value with .. in its path does not pass."
    places = list(_places(path))
    for row in closed:
        meant = not row.methods or method.strip().upper() in row.methods
        if meant and any(map(_compiled(row.pattern).fullmatch, places)):
            return f"Closed on this link, since it {row.why}."
    return None


def answer_headers(raw_path: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that a passed answer gets, each in place of the server's own; an empty text: without that header.

    No other origin may frame the page, embed or read anything of it, or learn its address; and a file that a visitor
    has put there is never opened as a page of the link. A header of the server stays where it is the stricter one.

    Args:
        raw_path: path and query as they came, percent-encoded.
        headers: of the answer; a multidict may hold one several times.
    """
    given: dict[str, list[str]] = {}
    for name, value in headers.items():
        given.setdefault(name.lower(), []).append(value.strip())

    def stricter(name: str, *kept: str) -> bool:
        return [value.lower() for value in given.get(name, [])] in [[value] for value in kept]

    found = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
    # Not `no-referrer` either: a browser then says `Origin: null` of the forms on the link's own pages.
    if not stricter("referrer-policy", "same-origin"):
        found["Referrer-Policy"] = "same-origin"
    if not stricter("cross-origin-opener-policy", "same-origin"):
        found["Cross-Origin-Opener-Policy"] = "same-origin-allow-popups"
    framed = "'self'"
    if stricter("x-frame-options", "deny"):
        framed = "'none'"  # a browser that reads frame-ancestors heeds this header no more
    else:
        found["X-Frame-Options"] = "SAMEORIGIN"
    # Several policies all count, so ours takes nothing away from the server's.
    policies = [*given.get("content-security-policy", []), f"frame-ancestors {framed}"]
    # The link's own pages need none of these; a program asks no browser.
    found |= {name: "" for name in given if name.startswith(("access-control-allow-", "access-control-expose-"))}
    found |= {name: "" for name in given if name == "timing-allow-origin"}

    parts, served = _served(raw_path)
    if served:
        kind = ", ".join(given.get("content-type", [])).lower()
        # Below /file= AUTOMATIC1111 serves its own scripts too, but those have never been uploaded.
        viewed = parts[-1] in ("view", "viewvideo", "viewaudio")
        sent = served == "userdata" or viewed or any(map(_UPLOADED.fullmatch, parts))
        if _opens_as_page(kind, given):
            policies.append("sandbox")
            shown = given.get("content-disposition", ["attachment"])[0]
            found["Content-Disposition"] = re.sub(r"^[^;]*", "attachment", shown)
        elif _SCRIPT_TYPES.search(kind) and sent:
            found["Content-Type"] = "text/plain; charset=utf-8"
        if "service-worker-allowed" in given:
            found["Service-Worker-Allowed"] = ""
    found["Content-Security-Policy"] = ", ".join(policy for policy in policies if policy)
    return found


def is_user_file(raw_path: str) -> bool:
    """Whether a path, as it came, is one where web UIs serve files that visitors have put there."""
    return bool(_served(raw_path)[1])


def _served(raw_path: str) -> tuple[list[str], str]:
    """The parts of a path, and the one below which visitors' files are served; "" where none are."""
    parts = _tidy(_plain(_decode(raw_path.partition("?")[0], errors="replace") or "/file="))
    served = next((part for part in parts if part in _OWN_FILES or _USER_FILES.fullmatch(part)), "")
    if served in _OWN_FILES:
        served = ""
    return parts, served or ("/" if _USER_FILES_BELOW.fullmatch("/" + "/".join(parts)) else "")


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE | re.DOTALL)


def _opens_as_page(kind: str, given: Mapping[str, list[str]]) -> bool:
    if not kind:
        # "Not modified" has no type either, and must not change what the browser keeps.
        return "content-length" in given or not {"etag", "last-modified"} & set(given)
    return bool(_PAGE_TYPES.search(kind)) or not _TYPE.fullmatch(kind)


def _decode(text: str, errors: str = "strict") -> str | None:
    """Take percent-encoding off until nothing changes; None where that does not end or is not UTF-8."""
    try:
        data = text.encode("utf-8", "surrogateescape")
        for _ in range(_MOST_ROUNDS):
            data, before = unquote_to_bytes(data), data
            if data == before:
                return data.decode("utf-8", errors)
    except UnicodeError:
        return None
    return None


def _plain(text: str) -> str:
    """The same in the spelling that is compared: small letters, wide signs as usual ones, backslashes as slashes."""
    return unicodedata.normalize("NFKC", text).casefold().replace("\\", "/")


def _climbs(value: str) -> bool:
    """Whether a value as a whole is a path that goes up. Text about "../x" or with "..." in it is none."""
    signs = "[/:&=\"'\n\r]" if value.lstrip().startswith(("{", "[", '"', "'")) else "[/:&=\n\r]"
    together = re.sub(r"[\t\r\n]", "", value)  # as Python's own reader of addresses does
    return any(part.strip() == ".." for text in (value, together) for part in re.split(signs, text))


def _places(path: str) -> Iterator[str]:
    """Where in a path that of the program behind may begin: servers are mounted below prefixes of any name."""
    for parts in (path.removeprefix("/").split("/"), _tidy(path)):
        for start, part in enumerate(parts[:_MOST_PREFIXES]):
            yield "/" + "/".join(parts[start:])
            if _TAKES_ARGUMENT.fullmatch(part):
                break


def _tidy(path: str) -> list[str]:
    # Without parameters, double slashes and what some systems drop at the end of a name.
    parts = (part.partition(";")[0].strip().rstrip(". ") for part in path.split("/"))
    return [part for part in parts if part]
