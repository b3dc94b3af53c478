"""The commands `fastsd bench ...`."""

import argparse
from typing import Any

from fastsd_helpers import bench
from fastsd_helpers.cli.answers import Answer
from fastsd_helpers.cli.flags import command, command_group, given_values

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add the group `bench` to the parser."""
    group = command_group(commands, "bench")
    groups: dict[str, Any] = {"": group}
    for name, row in bench.BENCHMARKS.items():
        parent, _blank, own = name.rpartition(" ")  # "trocr pages" goes on from trocr, which measures by itself too
        if parent and not isinstance(groups[parent], argparse._SubParsersAction):
            groups[parent] = groups[parent].add_subparsers(metavar="")
        groups[name] = measuring = command(
            groups[parent], own, measure, bench.load_benchmark(name).Settings, help=row.about
        )
        measuring.set_defaults(benchmark=name)


def measure(chosen: argparse.Namespace) -> Answer:
    module = bench.load_benchmark(chosen.benchmark)
    report = module.measure(module.Settings(**given_values(chosen, module.Settings)))
    return Answer(report.data, report.lines)
