"""Commands: their words are those of commands.toml, and the flags of their settings come from the settings classes."""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from pathlib import Path
from typing import Any

from fastsd_helpers.cli.answers import Answer
from fastsd_helpers.cli.passwords import add_password_flags, given_password
from fastsd_helpers.cli.sharing import add_link_flags, add_share_flag
from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.options import Option, options_of, parse_value

__all__ = ["add_flags", "command", "command_group", "given_values", "subcommands"]

_TABLE = "cli/commands.toml"


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


def subcommands(parser: argparse.ArgumentParser) -> Any:
    """Make a group of commands of a parser."""
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True)


def command_group(commands: Any, name: str) -> Any:
    """Add a group of commands, such as `fastsd dreambooth`; its help is that of commands.toml."""
    return subcommands(commands.add_parser(name, help=read_table(_TABLE)[name]["help"]))


def command(
    group: Any,
    name: str,
    run: Callable[[argparse.Namespace], Answer],
    *settings: type,
    help: str = "",
    choices: Mapping[str, Sequence[str]] | None = None,
) -> argparse.ArgumentParser:
    """Add a command to a group, with the words of commands.toml and a flag of every setting; `run` does it.

    Args:
        help: of a command that is not in commands.toml.
        choices: what a word takes that a table of another room lists.
    """
    about: Any = read_table(_TABLE)
    for word in [*group._prog_prefix.split()[1:], name]:
        about = about.get(word, {})
    help = about.get("help", help)
    parser = group.add_parser(name, help=help, description=help[:1].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    # The flags are read when they are needed: most of them are added after this line.
    parser.set_defaults(run=run, prog=parser.prog, flags=parser._option_string_actions)
    words = {word: row for word, row in about.items() if word != "help"}
    _add_words(parser, words if "settings" in words else {**words, "settings": "here"}, settings, choices or {})
    return parser


def _add_words(
    parser: argparse.ArgumentParser,
    words: Mapping[str, Any],
    settings: Sequence[type],
    choices: Mapping[str, Sequence[str]],
) -> None:
    for word, row in words.items():
        if row == "shared":
            _add_words(parser, read_table(_TABLE)["shared"][word], settings, choices)
        elif word == "settings":
            for each in settings:
                add_flags(parser, each)
        elif word == "share":
            add_share_flag(parser, row)
        elif row == "here":
            {"link": add_link_flags, "password": add_password_flags}[word](parser)
        else:
            parser.add_argument(word, **_as_argument(row, choices.get(word, ())))


def _as_argument(row: Mapping[str, Any], choices: Sequence[str]) -> dict[str, Any]:
    """A row of commands.toml as argparse takes it."""
    made = {**row, **({"choices": choices} if choices else {})}
    made["help"] = row["help"].replace("{choices}", ", ".join(word for word in choices if word != "auto"))
    if "type" in row:
        made["type"] = {"path": Path, "int": int, "float": float, "count": _count, "count-or-auto": _count_or_auto}[
            row["type"]
        ]
    if row.get("action") == "yes-or-no":
        made["action"] = argparse.BooleanOptionalAction
    return made


def _count(word: str) -> int:
    """A whole number from 1; argparse says what is wrong with another word."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not an integer of 1 or more")
    return int(word)


def _count_or_auto(word: str) -> int | None:
    return None if word == "auto" else _count(word)
