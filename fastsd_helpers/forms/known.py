"""Values that a form offers beside free text: the sessions there are, models, readers, checkpoints."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastsd_helpers.sessions import Session

__all__ = ["known_values"]

# Key -> "module:function" of this library; the function gets the open session, or None, and returns what
# `known_values` returns.
_SOURCES: dict[str, str] = {}


def known_values(key: str, session: "Session | None" = None) -> list[tuple[str, str]]:
    """List the known values of a setting as (what the form shows, value), the one to offer first at the front.

    Args:
        key: what the setting names with `option(known=...)`.
        session: the open session; None where there is none yet.

    Raises:
        KeyError: no such list; a fault of the settings class.
    """
    module, _, function = _SOURCES[key].partition(":")
    return getattr(importlib.import_module(module), function)(session)
