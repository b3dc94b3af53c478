"""The processes that divide a reading, one on each GPU: how many, their start, and what all of them did."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastsd_helpers.background import local_folder
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.launching import launch, log_to_watcher, news_writer
from fastsd_helpers.options import options_of, words_of
from fastsd_helpers.processes import (
    Ranks,
    choose_count,
    count_gpus,
    stop_signals,
    take_own_gpu,
    watched_over,
    world_here,
)
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.pages.inputs import count_files
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.reading.settings import ReadConfig
from fastsd_helpers.trocr.reading.transcription import ENOUGH

__all__ = [
    "Division",
    "choose_processes",
    "launch_reading",
    "read_divided",
    "read_into_session",
    "session_division",
    "session_shares",
    "share_here",
]

Found = TypeVar("Found")


@dataclass(frozen=True)
class Division:
    """How a reading is divided.

    Attributes:
        words: the command line after `fastsd` that does it.
        out: the folder of its results.
        model: as the user named it.
        asked: the number of processes; None for one on each GPU.
        shard: (number from 0, how many) of this process.
    """

    words: Sequence[str]
    out: Path
    model: str
    asked: int | None
    shard: tuple[int, int]


def choose_processes(asked: int | None, shares: Callable[[], int]) -> int:
    """Choose how many processes read: as many as are asked for, else one on each GPU that gets something to do.

    Args:
        asked: the number; None for one on each GPU.
        shares: finds out how many there are to give out.

    Raises:
        SettingsError: there are fewer GPUs.
    """
    gpus = count_gpus()
    count, idle = choose_count(asked, gpus, package="trocr", fewer="the result is the same")
    if idle:
        logger.info("%s", idle)
    if count > 1 and asked is None and world_here() == 1:
        count = max(1, min(count, shares()))
    if count > world_here():
        logger.info("%d processes on %s divide the reading.", count, f"{count} of {gpus} GPUs" if gpus else "the CPU")
    return count


def read_divided(
    division: Division,
    shares: Callable[[], int],
    work: Callable[[tuple[int, int], Callable[..., None]], Found],
    add: Callable[[list[Found]], Found],
    progress: Callable[..., None],
) -> Found | dict[str, Any]:
    """Read in this process, or in several that this one starts; call it again to go on after a stop.

    Args:
        division: see there.
        shares: finds out how many shares there are to give out.
        work: reads the shard it is given, and tells its progress.
        add: what several of them did together.
        progress: called as `work` calls its own: with what is done, and with all there is where that is known.

    Returns:
        What was done: what `work` or `add` returns, or the answer of the first of the processes.

    Raises:
        SettingsError: there are fewer GPUs, or a shard is divided again.
        Interrupted: they were asked to stop.
        TrainingFailed: one of the processes was killed or broke down.
    """
    if division.shard[1] > 1 and world_here() == 1:
        if division.asked not in (None, 1):
            raise SettingsError("--shard and --processes do not go together.", "Leave one of them out.")
        return work(division.shard, progress)
    count = choose_processes(division.asked, shares)
    if count > world_here():
        with stop_signals() as stop:
            return launch_reading(count, division, progress, stop.is_set)
    return share_here(division.shard, work, add, progress)


def launch_reading(
    count: int, division: Division, progress: Callable[..., None], asked: Callable[[], bool]
) -> dict[str, Any]:
    """Read in so many processes; returns the answer of the first of them.

    Args:
        count: of the processes.
        division: see there.
        progress: as of `read_divided`.
        asked: called ten times a second; whether they shall end.

    Raises:
        Interrupted: they were asked to stop.
        TrainingFailed: one of the processes was killed or broke down.
    """
    tell, folder = _Total(progress).tell, local_folder(division.out)
    how = {"what": "reading", "model": division.model, "package": "trocr"}
    return launch(count, division.words, folder, tell=tell, asked=asked, **how)


def session_division(session: ReadingSession, config: ReadPicturesConfig, images: str, model: str) -> Division:
    """The reading of images into a session as a command that several processes share."""
    words = ["trocr", "read", images, f"--session={session.folder}", f"--model={model}", f"--order={config.order}"]
    words += {"auto": [], "pages": ["--pages"], "lines": ["--no-pages"]}[config.pages]
    defaults = {item.name: item.default for item in options_of(ReadConfig)}
    words += words_of(config, {name for name, default in defaults.items() if getattr(config, name) != default})
    return Division(words, session.folder, model, config.processes, (0, 1))


def session_shares(images: Any) -> int:
    """How many processes get enough of these images to be worth their start; a file of pages counts as two."""
    single, several = count_files(images)
    return max(1, single // ENOUGH + 2 * several)


def read_into_session(
    session: ReadingSession,
    images: Any,
    division: Division,
    open_reader: Callable[[], Any],
    *,
    pages: str,
    order: Any,
    progress: Callable[..., None],
) -> None:
    """Do what `session.read` does, in this process or in several.

    Args:
        session: where to.
        images: as of `session.read`.
        division: see there.
        open_reader: opens the model.
        pages: as of `session.read`.
        order: as of `session.read`.
        progress: called with the number of lines done.

    Raises:
        FastSDError: as of `session.read` and `read_divided`.
    """
    how = {"pages": pages, "order": order}
    opened: list[Any] = []

    def work(shard: tuple[int, int], tell: Callable[..., None]) -> None:
        opened.append(open_reader())
        if shard[1] > 1:
            session.read_share(opened[0], images, shard, **how, progress=tell)
        else:
            session.read(opened[0], images, **how, progress=tell)

    def join(_done: list[None]) -> None:
        session.read(opened[0], images, **how)  # all of it is known by now

    if read_divided(division, lambda: session_shares(images), work, join, progress) is not None:
        session.look_again()
    if watched_over() is None:
        session.save(reader=division.model, demo=False)


def share_here(
    shard: tuple[int, int],
    work: Callable[[tuple[int, int], Callable[..., None]], Found],
    add: Callable[[list[Found]], Found],
    progress: Callable[..., None],
) -> Found:
    """Do the share of this process; where another one watches over it, return what all of them did.

    Args: as of `read_divided`.
    """
    if watched_over() is None:
        take_own_gpu()
        return work(shard, progress)
    writer = news_writer()

    def tell(*counts: int) -> None:
        if writer is not None:
            writer.append({"counts": counts})

    with Ranks.open(_AsCtrlC()) as ranks, log_to_watcher(writer, others=logging.WARNING):
        shares = ranks.gather(work((ranks.rank, ranks.size), tell))
        return ranks.share(lambda: add(shares))


class _AsCtrlC(threading.Event):
    """Ends a process that is asked to stop as Ctrl-C does: what was read is noted, so nothing is finished first."""

    def set(self) -> None:
        if not self.is_set():
            super().set()
            os.kill(os.getpid(), signal.SIGTERM)


class _Total:
    """Tells how far all processes are together, and what they log."""

    def __init__(self, progress: Callable[..., None]) -> None:
        self._progress = progress
        self._done: dict[int, int] = {}
        self._said: set[str] = set()

    def tell(self, rank: int, row: dict[str, Any]) -> None:
        """Take a row of one of them."""
        if "level" in row:
            if row["message"] not in self._said:  # of the model each of them says the same
                self._said.add(row["message"])
                logger.log(row["level"], "%s", row["message"])
            return
        done, *all_there_is = row["counts"]
        self._done[rank] = done
        # Where all is known, what is done is a place in it.
        together = max(self._done.values()) if all_there_is else sum(self._done.values())
        self._progress(together, *all_there_is)
