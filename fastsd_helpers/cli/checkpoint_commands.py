"""The commands `fastsd convert` and `fastsd inspect`."""

import argparse
from typing import Any

from fastsd_helpers import options
from fastsd_helpers.checkpoints import converter, inspector
from fastsd_helpers.checkpoints.converter import ConvertConfig
from fastsd_helpers.checkpoints.inspector import InspectConfig
from fastsd_helpers.cli.answers import Answer, now_and_then, pairs, plain, section
from fastsd_helpers.cli.flags import command, given_values
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import count_in_words, size_in_words

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add `convert` and `inspect` to the parser."""
    command(commands, "convert", convert, ConvertConfig)
    command(commands, "inspect", inspect, InspectConfig)


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
        "parameters": f"{count_in_words(found.parameters)} in {found.tensors:,} tensors",
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
