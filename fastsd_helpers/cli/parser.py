"""The command line itself: which commands there are and which words they take."""

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastsd_helpers import __version__
from fastsd_helpers.cli.checkpoint_commands import add_checkpoints
from fastsd_helpers.cli.dreambooth_commands import add_dreambooth
from fastsd_helpers.cli.flags import command, subcommands
from fastsd_helpers.cli.machine_commands import add_machine, run_demo
from fastsd_helpers.cli.model_commands import add_models
from fastsd_helpers.cli.passwords import refuse_typed_secrets
from fastsd_helpers.cli.trocr_commands import add_trocr
from fastsd_helpers.cli.webui_commands import add_webui
from fastsd_helpers.errors import SettingsError

__all__ = ["build_parser", "parse"]


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
    """Read a command line; `run` of what comes back is the command's function.

    Raises:
        SettingsError: a word that no command takes; the hint names the flag that was probably meant.
    """
    refuse_typed_secrets(sys.argv[1:] if words is None else words)
    chosen, unknown = build_parser().parse_known_args(words)
    if unknown:
        prog, flags = chosen.prog, chosen.flags
        word = unknown[0].partition("=")[0] if unknown[0].startswith("-") else unknown[0]
        # Without their hyphens, in which all flags are alike.
        names = {flag.lstrip("-"): flag for flag in flags}
        close = difflib.get_close_matches(word.lstrip("-"), names, n=1)
        guess = f"Did you mean {names[close[0]]}? " if close else ""
        raise SettingsError(f"`{prog}` does not accept {word!r}.", f"{guess}See: {prog} --help")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; help and limits come from the settings classes."""
    parser = _Parser(
        prog="fastsd", description="DreamBooth for Stable Diffusion: resumable, verified, safe by default."
    )
    parser.add_argument("--version", action="version", version=f"fastsd {__version__}")
    commands = subcommands(parser)
    command(commands, "demo", run_demo)
    for add in (add_dreambooth, add_checkpoints, add_trocr, add_webui, add_models, add_machine):
        add(commands)
    return parser
