"""The processes that share a fine-tuning, one on each GPU: how many, what a step's parts are, and their start."""

import contextlib
import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.background import local_folder
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.launching import launch, log_to_watcher, news_writer
from fastsd_helpers.options import options_of, to_values, words_of
from fastsd_helpers.processes import Ranks, choose_count, count_gpus, world_here
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.teaching.progress import TeachingProgress, TeachingReport
from fastsd_helpers.trocr.teaching.schedule import FineTuneConfig

__all__ = ["SETTINGS", "begun_parts", "choose_processes", "finetune_words", "launch_finetune", "open_ranks", "parts_of"]

SETTINGS = "settings.json"  # in the folder of a run


def begun_parts(out: Path) -> int | None:
    """The batches of each optimizer step of the run that was begun in this folder; None without one.

    Args:
        out: the run's folder.
    """
    path = out / SETTINGS
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    return int(kept.get("parts", kept["accumulation"]))


def choose_processes(config: FineTuneConfig, out: Path, *, by_paths: bool, restart: bool = False) -> tuple[int, str]:
    """Choose how many processes share a run.

    Args:
        config: with `processes`.
        out: the run's folder.
        by_paths: whether other processes can read the lines; else it is this one alone.
        restart: what the folder holds does not count.

    Returns:
        The number, and a sentence for the user where there is something to know.

    Raises:
        SettingsError: there are fewer GPUs, or they cannot share the steps of the run equally.
    """
    gpus, parts = count_gpus(), None if restart else begun_parts(out)
    if not by_paths and (config.processes or 1) > world_here():
        raise SettingsError(
            f"processes (--processes) is {config.processes}, and these lines are objects of this process alone.",
            "Give the data as paths, or leave it out.",
        )
    asked = config.processes or (None if by_paths or world_here() > 1 else 1)
    count, idle = choose_count(asked, gpus, package="trocr", parts=parts)
    if count > 1:
        where = f"{count} of {gpus} GPUs" if gpus else "the CPU"
        more = "" if parts else f": it sees {config.accumulation * count * config.batch_size} lines"
        return count, f"{count} processes on {where} share the batches of each optimizer step{more}."
    if parts and gpus > 1 and not config.processes:
        return count, f"1 of {gpus} GPUs is used: each step of this run has {parts} batches, as it was begun."
    return count, idle


def parts_of(config: FineTuneConfig) -> int:
    """The batches of each optimizer step of a run that begins with these settings on this machine."""
    return config.accumulation * choose_count(config.processes, count_gpus(), package="trocr")[0]


def finetune_words(
    config: FineTuneConfig, data: Any, out: Path, *, model: Any, held_out: Any, restart: bool, texts: Sequence[Path]
) -> list[str]:
    """The words after `fastsd` that fine-tune so; settings at their defaults are left out."""
    words = ["trocr", "finetune", str(data), "--out", str(out), f"--model={model}"]
    words += ["--held-out-data", str(held_out)] if held_out is not None else []
    defaults = {item.name: item.default for item in options_of(FineTuneConfig)}
    words += words_of(config, {name for name, value in to_values(config).items() if value != defaults[name]})
    words += ["--restart"] * restart
    return [*words, *(["--text", *map(str, texts)] if texts else [])]


def launch_finetune(
    count: int,
    words: Sequence[str],
    out: Path,
    *,
    model: str,
    report: TeachingReport,
    stop: threading.Event | None,
) -> None:
    """Run the command in so many processes, and pass on what the first of them says; `out` has the result then.

    Raises:
        FastSDError: as `launching.launch`.
    """

    def tell(_rank: int, row: dict[str, Any]) -> None:
        if "level" in row:
            logger.log(row["level"], "%s", row["message"])
        else:
            report(TeachingProgress(**row))

    launch(
        count, words, local_folder(out), what="fine-tuning", model=model, tell=tell, package="trocr",
        asked=lambda: stop is not None and stop.is_set(),
    )  # fmt: skip


@contextlib.contextmanager
def open_ranks(report: TeachingReport, stop: threading.Event | None) -> Iterator[tuple[Ranks, TeachingReport]]:
    """Meet the other processes of a run, and find out where to report to: nowhere but in the first.

    Yields:
        This process as one of them, and the report.
    """
    with Ranks.open(stop or threading.Event()) as ranks:
        if ranks.size == 1:
            yield ranks, report
            return
        writer = news_writer() if ranks.is_first else None

        def tell(progress: TeachingProgress) -> None:
            if writer is not None:
                writer.append(vars(progress))
            elif ranks.is_first:  # nobody watches over it
                report(progress)

        with log_to_watcher(writer):
            yield ranks, tell
