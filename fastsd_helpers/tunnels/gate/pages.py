"""The pages of the login gate; they load nothing from elsewhere, and lead nobody elsewhere."""

import html
from collections.abc import Sequence
from urllib.parse import unquote

from fastsd_helpers.tunnels.gate.passing import ClosedPath, refusal

__all__ = ["login_page", "logout_page", "own_path"]

_LONGEST_PATH = 2048

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; background: #f4f4f6; color: #222; display: grid; place-items: center;
  min-height: 100vh; margin: 0 }}
form {{ background: #fff; padding: 2rem; border-radius: 12px; box-shadow: 0 2px 16px #0002; width: 18rem }}
h1 {{ font-size: 1.2rem; margin: 0 0 1rem }}
label {{ display: block; margin: .8rem 0 .2rem }}
input {{ width: 100%; box-sizing: border-box; font: inherit; padding: .5rem; border: 1px solid #bbb;
  border-radius: 6px }}
button {{ width: 100%; margin-top: 1.2rem; padding: .6rem; font: inherit; border: 0; border-radius: 6px;
  background: #3b5bdb; color: #fff; cursor: pointer }}
p {{ color: #b00020; margin: 0 }}
@media (prefers-color-scheme: dark) {{ body {{ background: #17181c; color: #eee }} form {{ background: #24262c }}
  input {{ background: #17181c; color: #eee; border-color: #555 }} p {{ color: #ff8a80 }} }}
</style></head><body><form method="post" action="{action}"><h1>{heading}</h1>{inside}</form></body></html>
"""

_FIELDS = """{message}
<label for="user">User</label><input id="user" name="user" autocomplete="username" autofocus required>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<input type="hidden" name="next" value="{next}"><button>Log in</button>"""


def login_page(action: str, next: str = "/", message: str = "") -> str:
    """Draw the login page as HTML.

    Args:
        action: path the form is sent to.
        next: path to go to after it; shown to nobody, escaped here.
        message: why the last try failed.
    """
    shown = f'<p role="alert">{html.escape(message)}</p>' if message else ""
    fields = _FIELDS.format(next=html.escape(next), message=shown)
    return _PAGE.format(title="Log in", action=html.escape(action), heading="This page needs a login", inside=fields)


def logout_page(action: str) -> str:
    """Draw the page that asks before it logs out, since a mere link would let any page log visitors out."""
    return _PAGE.format(
        title="Log out", action=html.escape(action), heading="Log out here?", inside="<button>Log out</button>"
    )


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
