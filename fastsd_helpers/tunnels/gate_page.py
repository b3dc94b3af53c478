"""The one page of the login gate; it loads nothing from elsewhere."""

import html

__all__ = ["login_page"]

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="robots" content="noindex"><title>Log in</title><style>
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
</style></head><body><form method="post" action="{action}"><h1>This page needs a login</h1>{message}
<label for="user">User</label><input id="user" name="user" autocomplete="username" autofocus required>
<label for="password">Password</label>
<input id="password" name="password" type="password" autocomplete="current-password" required>
<input type="hidden" name="next" value="{next}"><button>Log in</button></form></body></html>
"""


def login_page(action: str, next: str = "/", message: str = "") -> str:
    """Draw the login page as HTML.

    Args:
        action: path the form is sent to.
        next: path to go to after it; shown to nobody, escaped here.
        message: why the last try failed.
    """
    shown = f'<p role="alert">{html.escape(message)}</p>' if message else ""
    return _PAGE.format(action=html.escape(action), next=html.escape(next), message=shown)
