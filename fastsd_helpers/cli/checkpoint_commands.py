"""The commands `fastsd convert`, `fastsd inspect` and `fastsd bench ...`."""

import argparse
from pathlib import Path
from typing import Any

from fastsd_helpers import bench, options
from fastsd_helpers.checkpoints import converter, inspector
from fastsd_helpers.checkpoints.converter import ConvertConfig
from fastsd_helpers.checkpoints.inspector import InspectConfig
from fastsd_helpers.cli.answers import Answer, now_and_then, pairs, plain, section
from fastsd_helpers.cli.flags import add_flags, command, given_values, subcommands
from fastsd_helpers.files import size_in_words
from fastsd_helpers.runtime import logger

__all__ = ["add_checkpoints"]


def add_checkpoints(commands: Any) -> None:
    """Add `convert`, `inspect` and `bench` to the parser."""
    about = (
        "convert between a Diffusers folder and a single-file checkpoint, or a LoRA between diffusers and kohya keys"
    )
    converting = command(commands, "convert", convert, about)
    converting.add_argument(
        "src", metavar="SRC", type=Path, help="source: Diffusers folder, .safetensors, .ckpt or a LoRA"
    )
    converting.add_argument(
        "dst",
        metavar="DST",
        type=Path,
        help="destination: a name that ends in .safetensors or .ckpt for a single file, else a folder",
    )
    converting.add_argument(
        "--merge",
        metavar="LORA[:STRENGTH]",
        action="append",
        default=[],
        help=(
            "merge a LoRA (LoCon, LoHa, LoKr, DoRA, IA3) into the model's weights, with weight 1 or as given; "
            "repeatable"
        ),
    )
    add_flags(converting, ConvertConfig)
    inspecting = command(commands, "inspect", inspect, "identify a model file and list its problems")
    inspecting.add_argument("file", metavar="FILE", type=Path, help=".safetensors, .ckpt, or a Diffusers folder")
    add_flags(inspecting, InspectConfig)
    group = subcommands(commands.add_parser("bench", help="run the benchmarks this project reports"))
    groups: dict[str, Any] = {"": group}
    for name, row in bench.BENCHMARKS.items():
        parent, _blank, own = name.rpartition(" ")  # "trocr pages" goes on from trocr, which measures by itself too
        if parent and not isinstance(groups[parent], argparse._SubParsersAction):
            groups[parent] = groups[parent].add_subparsers(metavar="")
        groups[name] = measuring = command(groups[parent], own, measure, row.about)
        add_flags(measuring, bench.load_benchmark(name).Settings)
        measuring.set_defaults(benchmark=name)


def convert(chosen: argparse.Namespace) -> Answer:
    config = ConvertConfig(**given_values(chosen, ConvertConfig))
    values: dict[str, Any] = {name: value if value != "" else None for name, value in options.to_values(config).items()}
    values["hashes"] = config.hashes or chosen.json
    written = converter.convert(chosen.src, chosen.dst, merge=chosen.merge, **values)
    facts = {
        "size": size_in_words(written.bytes),
        "tensors": written.tensors,
        "family": written.family,
        "format": written.dtype,
        **({"sha256": written.sha256} if written.sha256 else {}),
        "beside it": [path.name for path in written.beside],
    }
    head = "Written and read back" if config.verify else "Written"
    lines = [f"{head}: {written.path}", *pairs(facts), *written.notes]
    return Answer({**plain(written), "verified": config.verify}, lines)


def inspect(chosen: argparse.Namespace) -> Answer:
    config = InspectConfig(**given_values(chosen, InspectConfig))
    found = inspector.inspect(chosen.file, hashes=config.hashes, scan=config.scan, progress=now_and_then(_look))
    facts = {
        "what": found.what,
        "family": found.family,
        "size": size_in_words(found.bytes),
        "parameters": f"{found.parameters / 1e6:,.1f} million in {found.tensors:,} tensors",
        "formats": {name: size_in_words(count) for name, count in found.dtypes.items()},
        "parts": {name: size_in_words(count) for name, count in found.parts.items()},
        "predicts": f"{found.prediction or 'unknown'} ({found.prediction_source})" if found.prediction_source else None,
        "A1111 hash": found.short_hash,
        "sha256": found.sha256,
    }
    missing = [f"  {name}" for name in found.missing[:10]]
    unexpected = [f"  {name}" for name in found.unexpected[:10]]
    lines = [
        str(found.path),
        *pairs(facts),
        *section("Metadata", [f"  {name}: {text[:100]}" for name, text in sorted(found.metadata.items())]),
        *section(f"Missing ({len(found.missing)})", missing),
        *section(f"Not of this layout ({len(found.unexpected)})", unexpected),
        *section("Problems", [f"  {problem.what}: {problem.effect}" for problem in found.problems]),
        *section("Advice", [f"  {sentence}" for sentence in found.advice]),
    ]
    return Answer(plain(found), lines if found.problems else [*lines, "No problems found."])


def _look(done: int, whole: int) -> None:
    logger.info("Looked at %s of %s ...", size_in_words(done), size_in_words(whole))


def measure(chosen: argparse.Namespace) -> Answer:
    module = bench.load_benchmark(chosen.benchmark)
    report = module.measure(module.Settings(**given_values(chosen, module.Settings)))
    return Answer(report.data, report.lines)
