"""The login of a web UI's API, taken from the file of its page's login; runs inside the web UI's own process.

AUTOMATIC1111 and Forge take it by `--api-auth USER:PASSWORD` alone, which every user of the machine can read on the
command line, and everybody who may use the API in its answer to `/sdapi/v1/cmd-flags`.
"""

import sys
from collections.abc import Callable
from typing import Any

__all__ = ["patches"]

_HIDDEN = ("api_auth", "gradio_auth")
_entered: list[bool] = []


def patches() -> dict[str, Callable[[Any], None]]:
    """What to do with each module of the web UI right after it was imported."""
    return {"modules.shared_cmd_options": _enter, "modules.api.api": _hide}


def _enter(module: Any) -> None:
    # Whether or not there is --api: other flags open the API too.
    options = getattr(module, "cmd_opts", None)
    if not hasattr(options, "api_auth") or not hasattr(options, "gradio_auth_path"):
        _refuse("its options have no api_auth or no gradio_auth_path")
    try:
        with open(options.gradio_auth_path, encoding="utf-8") as file:
            login = file.read().strip()
    except (OSError, ValueError, TypeError) as err:
        _refuse(f"the file of its login cannot be read ({type(err).__name__})")
    if login.count(":") != 1 or "," in login:
        _refuse("the file of its login does not hold one user and password")
    options.api_auth = login
    _entered.append(True)


def _hide(module: Any) -> None:
    if not _entered:
        _refuse("its options were not read before its API")
    api = getattr(module, "Api", None)
    told = getattr(api, "get_cmd_flags", None)
    if told is None:
        _refuse("its API has no get_cmd_flags")

    def get_cmd_flags(self: Any) -> dict[str, Any]:
        return {**told(self), **dict.fromkeys(_HIDDEN)}

    api.get_cmd_flags = get_cmd_flags


def _refuse(reason: str) -> None:
    # An API without a login, or one that tells it, is worse than no start.
    sys.exit(f"The login of the API cannot be set: {reason}.")
