"""The command `fastsd demo`, which tries it all."""

import argparse
from pathlib import Path
from typing import Any

from fastsd_helpers import story
from fastsd_helpers.cli.answers import Answer, pairs, plain
from fastsd_helpers.cli.flags import command

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the command to the parser."""
    demo = command(commands, "demo", run_demo, "complete DreamBooth example on the embedded model, with images")
    demo.add_argument(
        "--out", default="demo-output", metavar="DIR", type=Path, help="folder for all results (default: demo-output)"
    )


def run_demo(chosen: argparse.Namespace) -> Answer:
    data = plain(story.run_demo(chosen.out))
    return Answer(data, pairs(data))
