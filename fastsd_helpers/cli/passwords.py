"""How a password comes in on the command line: by a file, by standard input, by a question; never as a word.

A command line can be read by every program of the machine, and is kept in the shell's history.
"""

import argparse
import os
import re
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.runtime import logger

__all__ = ["add_password_flags", "given_password", "refuse_typed_secrets"]

_LONGEST_BYTES = 4096
_WAYS = "--password-file FILE (- for standard input), --ask-password, or FASTSD_PASSWORD in the environment"
_PASSWORD_WORDS = re.compile(r"--?(pass|passwd|password|pw|pwd|api-auth|auth|gradio-auth)")
_TOKEN_WORDS = re.compile(r"--?(([a-z]+-)?(auth)?token|api-?key|(civitai|hf|ngrok)-?(api-?)?key|secret)")


def add_password_flags(parser: Any) -> None:
    """Add the two flags that lead to a password; a parser that has them already stays as it is."""
    if "--password-file" in parser._option_string_actions:
        return
    parser.add_argument(
        "--password-file",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file whose first line is the password; - for standard input (default: FASTSD_PASSWORD in the "
        "environment; without it a strong one is generated)",
    )
    parser.add_argument(
        "--ask-password", action="store_true", default=argparse.SUPPRESS, help="ask for the password on the terminal"
    )


def given_password(chosen: argparse.Namespace) -> str | None:
    """The password that a command was given by file or on being asked; None when it was given neither way.

    It is read once, since standard input and the user answer only once.

    Raises:
        SettingsError: both ways at once, nobody to ask, a file that cannot be read or has no usable password.
    """
    file, ask = getattr(chosen, "password_file", None), getattr(chosen, "ask_password", False)
    if file is not None and ask:
        raise SettingsError("--password-file and --ask-password both set the password.", "Give one of them.")
    if not hasattr(chosen, "_password"):
        chosen._password = _ask() if ask else None if file is None else _read(file)
    return chosen._password


def _ask() -> str:
    import getpass

    if not sys.stdin.isatty():
        raise SettingsError("There is no terminal to ask for a password.", f"Give it another way: {_WAYS}.")
    return _checked(getpass.getpass("Password (it is not shown): "), "What was typed")


def _read(file: str) -> str:
    if file == "-":
        return _checked(_first_line(sys.stdin.buffer.readline(_LONGEST_BYTES), "Standard input"), "Standard input")
    path = Path(file).expanduser()
    try:
        with open(path, "rb") as opened:
            _warn_of_readers(os.fstat(opened.fileno()), path)
            line = opened.readline(_LONGEST_BYTES)
    except OSError as err:
        raise SettingsError(
            f"The password file {path} cannot be read: {os.strerror(err.errno or 0)}.", "Check its path."
        ) from err
    return _checked(_first_line(line, str(path)), str(path))


def _first_line(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError:
        raise SettingsError(
            f"{place} is not UTF-8 text, so it holds no password.", "Write the password alone into it, as one line."
        ) from None


def _warn_of_readers(facts: os.stat_result, path: Path) -> None:
    if os.name == "posix" and stat.S_ISREG(facts.st_mode) and facts.st_mode & 0o077:
        logger.warning("Other users of this machine can read the password in %s. Run: chmod 600 %s", path, path)


def _checked(password: str, place: str) -> str:
    from fastsd_helpers.runtime import remember_secret
    from fastsd_helpers.tunnels import make_login

    if not password:
        raise SettingsError(f"{place} has no password in its first line.", "Write one there, of 8 characters or more.")
    remember_secret(password)
    try:
        return make_login(password=password).password
    except SettingsError as err:
        raise SettingsError(f"{place}: {err.problem}", err.hint) from None


def refuse_typed_secrets(words: Sequence[str]) -> None:
    """Refuse a command line with a password or token on it, without repeating it.

    Raises:
        SettingsError: there is one; the hint says how it is given instead.
    """
    for word in words:
        if word == "--":
            return
        flag = word.partition("=")[0].lower().replace("_", "-")
        another = "It may be in your shell's history now: choose another one."
        where = "is not accepted on the command line, which every program on this machine can read"
        if _PASSWORD_WORDS.fullmatch(flag):
            raise SettingsError(f"A password {where}.", f"Give it with {_WAYS}. {another}")
        if _TOKEN_WORDS.fullmatch(flag):
            raise SettingsError(
                f"A token {where}.",
                f"Set it in the environment, or as a secret of Colab or Kaggle: HF_TOKEN, CIVITAI_TOKEN, "
                f"NGROK_AUTHTOKEN. {another}",
            )
