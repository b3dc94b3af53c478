"""The login of a web UI's API, taken from the file of its page's login; see frame.py.

AUTOMATIC1111 and Forge take it by `--api-auth USER:PASSWORD` alone, which every user of the machine can read on the
command line, and everybody who may use the API in its answer to `/sdapi/v1/cmd-flags`.
"""

from typing import Any

from frame import missing, patch

__all__: list[str] = []

_OPTIONS, _API = "modules.shared_cmd_options", "modules.api.api"
_HIDDEN = ("api_auth", "gradio_auth")
_entered: list[bool] = []


@patch(_OPTIONS, "cmd_opts", None, optional=True)
def _(options: Any) -> Any:
    # Whether or not there is --api: other flags open the API too.
    if not hasattr(options, "api_auth") or not hasattr(options, "gradio_auth_path"):
        missing("cmd_opts", _OPTIONS, "has no api_auth or no gradio_auth_path")
    try:
        with open(options.gradio_auth_path, encoding="utf-8") as file:
            login = file.read().strip()
    except (OSError, ValueError, TypeError) as err:
        missing("cmd_opts", _OPTIONS, f"names no file of a login that can be read ({type(err).__name__})")
    if login.count(":") != 1 or "," in login:
        missing("cmd_opts", _OPTIONS, "names a file that does not hold one user and password")
    options.api_auth = login
    _entered.append(True)
    return options


@patch(_API, "Api.get_cmd_flags", "self", late=True, optional=True)
def _(original: Any) -> Any:
    if not _entered:
        missing("Api", _API, "was loaded before its options, which have its login")

    def get_cmd_flags(self: Any) -> dict[str, Any]:
        return {**original(self), **dict.fromkeys(_HIDDEN)}

    return get_cmd_flags
