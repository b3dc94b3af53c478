"""The pages of the login gate; they load nothing from elsewhere, and lead nobody elsewhere."""

import functools
import html
from collections.abc import Sequence
from pathlib import Path
from string import Template
from urllib.parse import unquote

from fastsd_helpers.tunnels.gate.passing import ClosedPath, refusal

__all__ = ["login_page", "logout_page", "own_path"]

_LONGEST_PATH = 2048

_FIELDS = """{message}
<label for="user">User</label>
<input id="user" name="user" value="{user}" autocomplete="username"{first} required>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password"{second} required>
<input type="hidden" name="next" value="{next}"><button>Log in</button>"""


def login_page(action: str, next: str = "/", message: str = "", user: str = "") -> str:
    """Draw the login page as HTML.

    Args:
        action: path the form is sent to.
        next: path to go to after it; shown to nobody, escaped here.
        message: why the last try failed.
        user: who tried it, so that only the password is typed again.
    """
    shown = f'<p role="alert">{html.escape(message)}</p>' if message else ""
    first, second = ("", " autofocus") if user else (" autofocus", "")
    values = {"next": html.escape(next), "user": html.escape(user)}
    fields = _FIELDS.format(message=shown, first=first, second=second, **values)
    return _draw("Log in", action, "This page needs a login", fields)


def logout_page(action: str) -> str:
    """Draw the page that asks before it logs out, since a mere link would let any page log visitors out."""
    return _draw("Log out", action, "Log out here?", "<button>Log out</button>")


@functools.cache
def _page() -> Template:
    return Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def _draw(title: str, action: str, heading: str, inside: str) -> str:
    return _page().substitute(title=title, action=html.escape(action), heading=heading, inside=inside)


def own_path(place: str, closed: Sequence[ClosedPath] = ()) -> str:
    """A path of this very link to go to after the login; "/" for everything else.

    However it is encoded, it may hold no address of somewhere else, since some web UIs lead on to one in their path;
    no path that is closed; and none of the gate's own pages.
    """
    seen, decoded = "", place
    for _ in range(10):
        seen, decoded = decoded, unquote(decoded, errors="replace")
        strange = any(ord(sign) < 32 or 127 <= ord(sign) < 160 or 0xD800 <= ord(sign) < 0xE000 for sign in decoded)
        if strange or any(sign in decoded for sign in ("\\", "//", ":")) or not decoded.startswith("/"):
            return "/"
        if decoded.startswith("/.fastsd"):
            return "/"
        if decoded == seen:
            break
    else:
        return "/"
    return place if len(place) <= _LONGEST_PATH and refusal("GET", place.partition("#")[0], closed) is None else "/"
