"""The commands about this machine: `fastsd doctor` and `fastsd install`."""

import argparse
from typing import Any

from fastsd_helpers import doctor, wheels
from fastsd_helpers.cli.answers import Answer, plain
from fastsd_helpers.cli.flags import command
from fastsd_helpers.errors import SettingsError

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    command(commands, "doctor", examine)
    command(commands, "install", install)


def examine(chosen: argparse.Namespace) -> Answer:
    found = doctor.examine(root=chosen.root)
    return Answer({**plain(found), "problems": found.problems}, found.lines())


def install(chosen: argparse.Namespace) -> Answer:
    if chosen.wheels and chosen.cache:
        raise SettingsError("--wheels and --cache both set the source of the wheels.", "Give one of them.")
    report = wheels.install(chosen.workflow, wheel_folder=chosen.wheels, cache=chosen.cache, dry_run=chosen.dry_run)
    return Answer(plain(report), report.lines())
