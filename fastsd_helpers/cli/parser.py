"""The command line itself: which commands there are and which words they take.

A command's module is imported when its command is given: training, web UIs and recognition would make each other wait.
"""

import argparse
import difflib
import importlib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastsd_helpers import __version__
from fastsd_helpers.cli.flags import subcommands
from fastsd_helpers.cli.passwords import refuse_typed_secrets
from fastsd_helpers.errors import SettingsError

__all__ = ["build_parser", "parse"]

# Module of this package -> the commands that its `add_commands` adds.
_MODULES = {
    "demo_command": ("demo",),
    "dreambooth_commands": ("dreambooth",),
    "checkpoint_commands": ("convert", "inspect"),
    "bench_commands": ("bench",),
    "trocr_commands": ("trocr",),
    "webui_commands": ("webui", "tunnel", "playground"),
    "model_commands": ("models", "controlnet"),
    "machine_commands": ("doctor", "install"),
}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)
        # argparse takes -1e-6 for a flag; here it is a number, and the settings class says that it is too small.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$|^-(inf|nan)$", re.IGNORECASE)

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message[:1].upper() + message[1:] + ".", f"See: {self.prog} --help")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((100, 24)).columns
        super().__init__(prog, max_help_position=34, width=min(120, max(60, columns)))


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; `run` of what comes back is the command's function, and `words` are what was read.

    Raises:
        SettingsError: a word that no command takes; the hint names the flag that was probably meant.
    """
    words = list(sys.argv[1:] if words is None else words)
    refuse_typed_secrets(words)
    chosen, unknown = build_parser(words[0] if words else None).parse_known_args(words)
    if unknown:
        prog, flags = chosen.prog, chosen.flags
        word = unknown[0].partition("=")[0] if unknown[0].startswith("-") else unknown[0]
        # Without their hyphens, in which all flags are alike.
        names = {flag.lstrip("-"): flag for flag in flags}
        close = difflib.get_close_matches(word.lstrip("-"), names, n=1)
        guess = f"Did you mean {names[close[0]]}? " if close else ""
        raise SettingsError(f"`{prog}` does not accept {word!r}.", f"{guess}See: {prog} --help")
    chosen.words = words
    return chosen


def build_parser(word: str | None = None) -> argparse.ArgumentParser:
    """Make the parser of all commands, or of those in the module of one; a word that is no command makes it of all.

    Help and limits come from the settings classes.
    """
    parser = _Parser(
        prog="fastsd",
        description="Teach Stable Diffusion a subject, run web UIs behind a login, read handwriting: resumable, "
        "verified, safe by default.",
    )
    parser.add_argument("--version", action="version", version=f"fastsd {__version__}")
    commands = subcommands(parser)
    asked = [module for module, names in _MODULES.items() if word in names]
    for module in asked or _MODULES:
        importlib.import_module(f"fastsd_helpers.cli.{module}").add_commands(commands)
    return parser
