"""The command line itself: which commands there are and which words they take."""

import argparse
import difflib
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastsd_helpers import __version__
from fastsd_helpers.cli import commands as run
from fastsd_helpers.cli import dreambooth_commands
from fastsd_helpers.cli.answers import Answer
from fastsd_helpers.cli.checkpoint_commands import add_checkpoints
from fastsd_helpers.cli.flags import add_flags
from fastsd_helpers.cli.machine_commands import add_machine
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
        raise SettingsError(f"`{prog}` takes no {word!r}.", f"{guess}See: {prog} --help")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands; help and limits come from the settings classes."""
    parser = _Parser(
        prog="fastsd", description="DreamBooth for Stable Diffusion: resumable, verified, safe by default."
    )
    parser.add_argument("--version", action="version", version=f"fastsd {__version__}")
    commands = _subcommands(parser)
    demo = _command(commands, "demo", run.run_demo, "complete DreamBooth example on the embedded model, with images")
    demo.add_argument(
        "--out", default="demo-output", metavar="DIR", type=Path, help="folder for all results (default: demo-output)"
    )
    _add_dreambooth(commands)
    add_checkpoints(commands, _subcommands, _command)
    add_trocr(commands, _subcommands, _command)
    add_webui(commands, _subcommands, _command)
    add_models(commands, _subcommands, _command)
    add_machine(commands, _command)
    return parser


def _add_dreambooth(commands: Any) -> None:
    from fastsd_helpers.dreambooth.learned import ExportConfig, SampleConfig
    from fastsd_helpers.dreambooth.prepare import PrepareConfig
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.dreambooth.upload import UploadConfig

    group = _subcommands(
        commands.add_parser("dreambooth", help="DreamBooth: fine-tune Stable Diffusion on a subject from 5-30 photos")
    )
    _session_command(
        group, "new", run.new_session, "create a session: the folder that keeps everything about one subject"
    )
    listing = _command(group, "list", run.list_sessions, "list the sessions with progress and disk usage")
    _add_root(listing)
    _session_command(group, "show", run.show_session, "show a session: progress, settings, images, checkpoints")
    prepare = _session_command(group, "prepare", run.prepare, "prepare the dataset: read, check and crop the photos")
    add_flags(prepare, PrepareConfig)
    train = _session_command(group, "train", run.train, "train, or resume an interrupted run")
    add_flags(train, DreamBoothConfig)
    train.add_argument("--restart", action="store_true", help="start again from step 0; settings may differ")
    train.add_argument(
        "--take-over", action="store_true", help="break the lock of a session that another machine still seems to use"
    )
    train.add_argument(
        "--more-steps",
        metavar="N",
        type=_count,
        default=0,
        help="after a finished run, train N more steps (1 or more), with the settings given "
        "now and the photos and captions as they are now",
    )
    train.add_argument(
        "--more-text-encoder-steps",
        metavar="N",
        type=_count,
        default=0,
        help="the same for the text encoder, N steps (1 or more) before those of --more-steps",
    )
    about = (
        "show the plan without training: steps, minutes, bytes, memory, chosen settings; times a few steps and "
        "discards them"
    )
    train.add_argument("--dry-run", action="store_true", help=about)
    sample = _session_command(group, "sample", run.sample, "generate images with a session's latest checkpoint")
    add_flags(sample, SampleConfig)
    export = _session_command(group, "export", run.export, "export a session's checkpoint to a single model file")
    add_flags(export, ExportConfig)
    delete = _session_command(group, "delete", run.delete, "delete a session, or one of its checkpoints, after asking")
    delete.add_argument("--checkpoint", metavar="NAME", help="delete only this checkpoint (`show` lists them)")
    delete.add_argument("--yes", action="store_true", help="do not ask")
    about = "import a session of the old fast-DreamBooth notebook, or somebody else's folder"
    importing = _session_command(group, "import", dreambooth_commands.import_session, about)
    importing.add_argument(
        "--from",
        dest="source",
        metavar="DIR",
        type=Path,
        help="source folder, which is only read; default: the folder of that name among the sessions",
    )
    about = "show and edit the captions: the exact prompt of every image"
    caption = _session_command(group, "caption", dreambooth_commands.caption, about)
    caption.add_argument("--set", metavar="FILE=WORDS", action="append", default=[], help="caption of one image")
    caption.add_argument(
        "--auto", action="store_true", help="caption the images that have no caption of their own with a BLIP model"
    )
    caption.add_argument(
        "--captioner", metavar="MODEL", default="", help="Hub id or folder of the BLIP model for --auto"
    )
    caption.add_argument(
        "--clear",
        metavar="FILE",
        action="append",
        default=[],
        help="remove the caption: the words of the file name are the prompt again",
    )
    about = "upload a finished model to the Hugging Face Hub, private unless --no-private (needs HF_TOKEN)"
    upload = _session_command(group, "upload", dreambooth_commands.upload, about)
    add_flags(upload, UploadConfig)


def _count(word: str) -> int:
    """A whole number from 1; argparse says what is wrong with another word."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number of 1 or more")
    return int(word)


def _subcommands(parser: argparse.ArgumentParser) -> Any:
    return parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)


def _command(group: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str) -> argparse.ArgumentParser:
    parser = group.add_parser(name, help=help, description=help[:1].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    # The flags are read when they are needed: most of them are added after this line.
    parser.set_defaults(run=run, prog=parser.prog, flags=parser._option_string_actions)
    return parser


def _session_command(
    group: Any, name: str, run: Callable[[argparse.Namespace], Answer], help: str
) -> argparse.ArgumentParser:
    parser = _command(group, name, run, help)
    parser.add_argument("session", metavar="SESSION", help="name of the session")
    _add_root(parser)
    return parser


def _add_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--root",
        metavar="DIR",
        type=Path,
        help="folder that holds the sessions (default: Fast-Dreambooth/Sessions on a mounted Drive, else here)",
    )
