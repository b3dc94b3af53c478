"""The command `fastsd demo`, which tries it all."""

import argparse
from typing import Any

from fastsd_helpers import story
from fastsd_helpers.cli.answers import Answer, pairs, plain
from fastsd_helpers.cli.flags import command

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    command(commands, "demo", run_demo)


def run_demo(chosen: argparse.Namespace) -> Answer:
    data = plain(story.run_demo(chosen.out))
    return Answer(data, pairs(data))
