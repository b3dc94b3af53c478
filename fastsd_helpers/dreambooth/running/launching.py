"""A training as a command line, and on several processes of this machine; the one that starts them holds the lock."""

import threading
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastsd_helpers import launching
from fastsd_helpers.device import peak_memory_bytes
from fastsd_helpers.dreambooth.presets import BASE_ON_A_GPU
from fastsd_helpers.dreambooth.results.finishing import TrainResult
from fastsd_helpers.dreambooth.running.live import Progress, Report, live_folder
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, given_values
from fastsd_helpers.dreambooth.training.beginning import MoreSteps
from fastsd_helpers.errors import FastSDError, SessionBusy
from fastsd_helpers.launching import news_writer
from fastsd_helpers.options import words_of
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record

__all__ = ["launch", "model_named", "reporter", "result_from", "train_words"]


def train_words(
    config: DreamBoothConfig, session: Session, *, restart: bool = False, take_over: bool = False, more: MoreSteps
) -> list[str]:
    """The words after `fastsd` that train with these settings; settings left alone are left out, as a person would."""
    words = ["dreambooth", "train", session.name, "--root", str(session.folder.parent)]
    words += words_of(config, given_values(config))
    words += ["--restart"] * restart + ["--take-over"] * take_over
    counts = {"--more-steps": more.last, "--more-text-encoder-steps": more.text_encoder}
    return [*words, *(f"{flag}={count}" for flag, count in counts.items() if count)]


def model_named(config: DreamBoothConfig, session: Session) -> str:
    """What the run will start from, as far as it can be told without looking at the machine."""
    record = session.record
    if config.base_model != "auto":
        return config.base_model
    if ref := (record.get("base_model") or {}).get("ref"):
        return ref
    return "demo" if (record.get("dataset") or {}).get("demo") else BASE_ON_A_GPU


def launch(
    count: int,
    words: Sequence[str],
    session: Session,
    report: Report,
    *,
    model: str,
    stop: threading.Event,
    lock: Any,
) -> TrainResult:
    """Train on so many processes; returns what the first of them made.

    Args:
        words: the command line after `fastsd` that trains.
        session: what it trains; its lock is held by the caller.
        report: gets every Progress of the first process.
        model: what they open, for the tokens they may need.
        stop: when it is set, they are asked to save and end.
        lock: when it is lost, they are asked so too.

    Raises:
        Interrupted: they were asked to stop.
        SessionBusy: another run has broken the lock.
        TrainingFailed: one of them was killed or broke down.
        FastSDError: what one of them says.
    """
    try:
        answer = launching.launch(
            count, words, live_folder(session), what="training", model=model, package="dreambooth",
            tell=lambda _rank, row: report(Progress(**row)), asked=lambda: stop.is_set() or lock.lost,
        )  # fmt: skip
    except FastSDError:
        if lock.lost:
            raise SessionBusy(
                "Another run has broken this session's lock.",
                "This run stopped; the other one resumes from the last checkpoint.",
            ) from None
        raise
    finally:
        session.record.update(read_record(session.folder).record)
    return result_from(answer)


def reporter(report: Report) -> Report:
    """Where the first process reports to: the process that watches over it, which passes it on; alone, `report`."""
    writer = news_writer()
    if writer is None:
        return report

    def write(progress: Progress) -> None:
        held = {"host_bytes": peak_memory_bytes("host"), "gpu_bytes": peak_memory_bytes("cuda")}
        writer.append({**vars(progress), **held})

    return write


def result_from(answer: Mapping[str, Any]) -> TrainResult:
    """The result as another process's own `train` returned it: the command prints every field of it."""
    kinds = typing.get_type_hints(TrainResult)
    values: dict[str, Any] = {}
    for item in fields(TrainResult):
        if item.name in answer:
            value = answer[item.name]
            values[item.name] = Path(value) if kinds[item.name] is Path else value
    return TrainResult(**values)
