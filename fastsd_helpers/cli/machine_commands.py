"""The commands about this machine: `fastsd doctor` and `fastsd install`."""

import argparse
from pathlib import Path
from typing import Any

from fastsd_helpers import doctor, wheels
from fastsd_helpers.cli.answers import Answer, plain
from fastsd_helpers.cli.flags import command
from fastsd_helpers.errors import SettingsError

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the commands to the parser."""
    examining = command(
        commands,
        "doctor",
        examine,
        "environment report: hardware, versions, what is missing and how to fix it (no secrets)",
    )
    examining.add_argument("--root", metavar="DIR", type=Path, help="the sessions folder whose disk is checked")
    about = "install the packages a workflow needs and this Python lacks, hash-checked"
    installing = command(commands, "install", install, about)
    installing.add_argument("workflow", metavar="{dreambooth,webui,trocr,trocr-int8}", help="workflow to install")
    installing.add_argument("--dry-run", action="store_true", help="only show what would be installed")
    installing.add_argument(
        "--wheels", metavar="DIR", type=Path, help="install from this folder of wheels, with no network"
    )
    about = (
        "wheel cache: keep the wheels in one archive in this folder (on Drive, for example) and install from it the "
        "next time"
    )
    installing.add_argument("--cache", metavar="DIR", type=Path, help=about)


def examine(chosen: argparse.Namespace) -> Answer:
    found = doctor.examine(root=chosen.root)
    return Answer({**plain(found), "problems": found.problems}, found.lines())


def install(chosen: argparse.Namespace) -> Answer:
    if chosen.wheels and chosen.cache:
        raise SettingsError("--wheels and --cache both set the source of the wheels.", "Give one of them.")
    report = wheels.install(chosen.workflow, wheel_folder=chosen.wheels, cache=chosen.cache, dry_run=chosen.dry_run)
    return Answer(plain(report), report.lines())
