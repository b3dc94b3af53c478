"""Settings classes as command-line flags: names, limits, defaults and help all come from the class."""

import argparse
import contextlib
from dataclasses import MISSING
from typing import Any

from fastsd_helpers.cli.passwords import add_password_flags, given_password
from fastsd_helpers.cli.sharing import add_share_flag
from fastsd_helpers.options import Option, options_of, parse_value

__all__ = ["add_flags", "given_values"]


def add_flags(parser: argparse.ArgumentParser, settings: type) -> None:
    """Make a flag of every setting. A flag that is not given leaves no trace, so the model's default can step in."""
    plain = parser.add_argument_group("settings")
    advanced = parser.add_argument_group("more settings")
    for item in options_of(settings):
        if item.secret:
            if item.name == "password":
                add_password_flags(parser)
            continue
        group = advanced if item.advanced else plain
        about = f"{item.help}{_limits(item)}".replace("%", "%%")
        if item.name == "share":
            add_share_flag(group, about)
        elif item.kind is bool:
            action = argparse.BooleanOptionalAction
            group.add_argument(item.flag, dest=item.name, action=action, default=argparse.SUPPRESS, help=about)
        else:
            # Words are kept as they are: the settings class names every bad one of them at once.
            word = "|".join(item.choices) if item.choices else {int: "N", float: "X", str: "TEXT"}[item.kind]
            group.add_argument(item.flag, dest=item.name, metavar=word, default=argparse.SUPPRESS, help=about)


def _limits(item: Option) -> str:
    low, high = (
        None if limit is None else f"{limit:g}" if item.kind is float else str(limit) for limit in (item.low, item.high)
    )
    parts = []
    if low is not None and high is not None:
        parts.append(f"{low} to {high}")
    elif low is not None:
        parts.append(f"{low} or more")
    elif high is not None:
        parts.append(f"{high} or less")
    if item.default is MISSING:
        parts.append("required")
    elif item.default is None:
        parts += [] if "default:" in item.help else ["optional"]
    elif item.default != "":
        parts.append(f"default: {item.default if item.kind is not bool else ('no', 'yes')[item.default]}")
    return f" ({'; '.join(parts)})" if parts else ""


def given_values(chosen: argparse.Namespace, settings: type) -> dict[str, Any]:
    """The settings the user gave and no others; None for one that must be given, so that `check` names it too."""
    given: dict[str, Any] = {}
    for item in options_of(settings):
        if item.default is MISSING:
            given[item.name] = None
        if hasattr(chosen, item.name):
            value = getattr(chosen, item.name)
            # A word that cannot be read stays a word: the settings class says what it should have been.
            with contextlib.suppress(ValueError):
                value = value if isinstance(value, bool) else parse_value(item, value)
            given[item.name] = value
        elif item.secret and item.name == "password" and (password := given_password(chosen)) is not None:
            given[item.name] = password
    return given
