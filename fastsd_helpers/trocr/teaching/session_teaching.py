"""What a reading session teaches: which run, from which model, with which lines, and what became of it.

A run is a folder in the session. What it began with (settings, lines, which of them are held out) is written down
there and stays: a stopped run goes on with just that, whatever was corrected since.
"""

import hashlib
import itertools
import json
import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.background import Background, command_of, local_folder
from fastsd_helpers.errors import DatasetError
from fastsd_helpers.files import check_writable, write_atomic
from fastsd_helpers.options import options_of, to_values
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.ground_truth.labels import texts_of
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet, read_lines, with_files
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, FineTuneResult, finished_result, split_lines
from fastsd_helpers.trocr.teaching.processes import finetune_words, parts_of
from fastsd_helpers.trocr.teaching.progress import JOURNAL, TeachingNews

__all__ = ["Taught", "TeachingRun", "choose_run", "divide", "open_run", "taught_reader"]


_LINES, _RUNS = "lines.json", "fine-tuned"


@dataclass(frozen=True)
class TeachingRun:
    """One run of a session.

    Attributes:
        folder: where it lies. model: the model it begins with. base: what that one was made from in its turn, or
            itself. settings: how it learns. text: a file or folder of more text for the language model, or "".
            restart: forget what the folder holds. why: why this run and no other, in words for the user.
    """

    session: ReadingSession
    folder: Path
    model: str
    base: str
    settings: FineTuneConfig
    text: str = ""
    restart: bool = False
    why: str = ""

    def result(self) -> FineTuneResult | None:
        """What it made; None before its end."""
        return None if self.restart else finished_result(self.folder)

    def news(self) -> TeachingNews:
        """What it says about itself; `look` brings it up to date."""
        return TeachingNews(local_folder(self.folder) / JOURNAL)

    def find(self) -> Background | None:
        """Its process, when it runs on this machine."""
        return Background.find(local_folder(self.folder))

    def start(self) -> Background:
        """Start it in a process of its own, and return at once."""
        learned, held_out = self.folder / "learned.jsonl", self.folder / "held-out.jsonl"
        texts = [Path(self.text).expanduser().absolute()] if self.text else []
        words = finetune_words(
            self.settings, learned, self.folder, model=self.model, held_out=held_out, restart=self.restart, texts=texts
        )
        return Background.start(command_of(words), local_folder(self.folder), model=self.model)

    def finish(self) -> FineTuneResult:
        """Note the model it made as the session's, and return what it made.

        Raises:
            DatasetError: the run's folder lacks its result.
        """
        made = finished_result(self.folder)
        if made is None:
            raise DatasetError(f"{self.folder} holds no finished run.", "Run the cell again.")
        if self.base != self.model and made.cer_after > made.cer_before:
            logger.warning("The further steps raised the CER, so the session keeps the earlier fine-tuned model.")
        else:
            self.session.save(taught={"model": self.base, "path": _inside(self.session, made.path)})
        return made


@dataclass(frozen=True)
class Taught:
    """The model a session taught last: its folder, what it was made from, and its lines."""

    path: Path
    base: str
    learned: LineSet
    held_out: LineSet


def taught_reader(session: ReadingSession) -> Taught | None:
    """The fine-tuned model last, when there is one and its lines are known."""
    entered: Mapping[str, Any] = session.record.get("taught") or {}
    model = session.folder / str(entered.get("path", ""))
    if not (model / "config.json").is_file() or not (model.parent / _LINES).is_file():
        return None
    return Taught(model, entered["model"], *_read_sets(session, model.parent))


def divide(
    settings: FineTuneConfig, data: LineSet, held_out: LineSet | None = None, *, taught: Taught | None = None
) -> tuple[LineSet, LineSet]:
    """The lines for training and those to measure on.

    Args:
        settings: how large a part is held out.
        data: all lines.
        held_out: lines to measure on that were given.
        taught: the model to begin with, when it was taught here: what it was measured on stays held out, and what it
            was trained on never is, or the measure would be of what it knows by heart.
    """
    if held_out is None and taught is not None and settings.held_out > 0:
        known = {line.name for line in taught.learned.lines}
        kept = [line for line in taught.held_out.lines if line.name not in known]
        names = {line.name for line in kept}
        if kept:
            # As they are corrected now; where those corrections were taken back, as they were.
            held = [line for line in data.lines if line.name in names] or kept
            rest = [line for line in data.lines if line.name not in names]
            return LineSet(rest, source=data.source), LineSet(held, source=data.source)
        logger.warning("This model was trained on all lines before: its measured error rates are too low.")
    return split_lines(settings, data, held_out)


def choose_run(
    session: ReadingSession,
    settings: FineTuneConfig,
    values: Mapping[str, Any],
    *,
    data: str = "",
    held_out_data: str = "",
    text: str = "",
    more_steps: int = 0,
    start_over: bool = False,
) -> TeachingRun:
    """Find the run to go on with, or begin another.

    Args:
        settings: how to learn.
        values: all that was entered, data included: another choice is another run.
        data: a dataset to learn from; empty: the corrected lines.
        held_out_data: validation set: lines to evaluate on; empty: a share of the others.
        text: a file or folder of more text for the language model; empty: the lines alone.
        more_steps: when nothing is unfinished, begin so many further steps from the fine-tuned model last.
        start_over: begin at step 0, whatever is there; a finished run's model is kept.

    Raises:
        DatasetError: there is nothing to learn from.
        FastSDError: what `split_lines` raises.
    """
    pending = open_run(session)
    if pending is not None:  # on as many GPUs as there are now
        pending = replace(pending, settings=replace(pending.settings, processes=settings.processes))
    if pending is not None and pending.find() is not None:
        return replace(pending, why="It is running already; this cell shows it.")
    entered = session.record.get("teaching") or {}
    # A setting that came with a later version was at its default before.
    defaults = {item.name: item.default for item in options_of(FineTuneConfig)}
    before = entered.get("values")
    same = before is not None and {name: defaults[name] for name in values if name in defaults} | before == {**values}
    unfinished = pending is not None and pending.result() is None
    if pending is not None and same and unfinished and not start_over:
        changed = not data and _digest(_all_lines(session, pending.folder)) != _digest(_corrected_or_none(session))
        since = " with the lines it began with; what was corrected since counts from 'more steps' or 'start over'"
        return replace(pending, why=f"The unfinished fine-tuning continues{since * changed}.")
    if text:
        texts_of([Path(text)])  # what is wrong with it is said before the run is begun
    lines = read_lines(data) if data else session.corrected()
    done = same and not (unfinished or start_over or more_steps)
    if pending is not None and done and _digest(_all_lines(session, pending.folder)) == _digest(lines):
        return replace(pending, why="This fine-tuning is already finished; 'more steps' continues from its model.")
    taught = taught_reader(session)
    extra = more_steps if taught is not None and not start_over else 0
    model = str(taught.path) if taught is not None and extra else session.untaught_reader
    taught = taught if taught is not None and Path(model).resolve() == taught.path.resolve() else None
    if unfinished and not same:
        logger.info("An unfinished fine-tuning with other settings is kept; enter them again to resume it.")
    folder = session.folder / _RUNS / _mark(values, _inside(session, Path(model)) if extra else model, lines, extra)
    if start_over and finished_result(folder) is not None:
        others = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
        folder = next(path for path in others if finished_result(path) is None)
    learned, held = divide(settings, lines, read_lines(held_out_data) if held_out_data else None, taught=taught)
    settings = _with_steps(settings, extra, len(learned.lines)) if extra else settings
    run = TeachingRun(session, folder, model, taught.base if taught else model, settings, text, restart=start_over)
    if run.result() is None:
        _write_sets(session, folder, learned, held)
    _note(run, values, own=taught is not None)
    return run


def _note(run: TeachingRun, values: Mapping[str, Any], *, own: bool) -> None:
    """Write down what the run is, so that it is found again; `own` says that its model is one of the session's."""
    model = _inside(run.session, Path(run.model)) if own else run.model
    noted = {"folder": _inside(run.session, run.folder), "values": dict(values), "model": model, "base": run.base}
    run.session.save(teaching=noted | {"settings": to_values(run.settings)})


def open_run(session: ReadingSession) -> TeachingRun | None:
    """The run that was begun last, finished or not; None when there is none."""
    entered: Mapping[str, Any] = session.record.get("teaching") or {}
    folder = session.folder / str(entered.get("folder", ""))
    if not entered or not (folder / _LINES).is_file():
        return None
    known = {item.name for item in options_of(FineTuneConfig)}
    settings = FineTuneConfig(**{name: value for name, value in entered["settings"].items() if name in known})
    model = str(entered["model"])
    inside = session.folder / model
    if (inside / "config.json").is_file():  # a model of this session, which may be mounted elsewhere now
        model = str(inside)
    text = str((entered.get("values") or {}).get("text", ""))
    return TeachingRun(session, folder, model, str(entered.get("base", model)), settings, text)


def _corrected_or_none(session: ReadingSession) -> LineSet:
    try:
        return session.corrected()
    except DatasetError:
        return LineSet([])


def _all_lines(session: ReadingSession, folder: Path) -> LineSet:
    learned, held = _read_sets(session, folder)
    return LineSet([*learned.lines, *(line for line in held.lines if line not in learned.lines)])


def _digest(lines: LineSet) -> list[tuple[str, str]]:
    return sorted((line.name, line.text) for line in lines.lines)


def _mark(values: Mapping[str, Any], model: str, data: LineSet, extra: int) -> str:
    """A short name of the settings and the lines; another correction makes another name."""
    parts: list[Any] = [dict(values), model, [[line.name, line.text] for line in data.lines]]
    parts += [extra] if extra else []
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _with_steps(settings: FineTuneConfig, steps: int, lines: int) -> FineTuneConfig:
    """The settings with as many epochs as this many steps are."""
    an_epoch = math.ceil(math.ceil(lines / settings.batch_size) / parts_of(settings))
    # A step's half less, because the trainer rounds up.
    return replace(settings, epochs=min(1000.0, max(0.01, (steps - 0.5) / an_epoch)))


def _inside(session: ReadingSession, path: Path) -> str:
    """A path by its place in the session, which may be mounted elsewhere later; another one as it is."""
    own, path = session.folder.absolute(), path.absolute()
    return str(path.relative_to(own) if path.is_relative_to(own) else path)


def _write_sets(session: ReadingSession, folder: Path, learned: LineSet, held: LineSet) -> None:
    """Write down which lines are learned from and which are held out: another correction may divide them otherwise."""
    check_writable(folder)
    sets = {}
    for name, file, lines in (("learned", "learned", learned), ("held_out", "held-out", held)):
        kept = with_files(lines.lines, folder / file)
        sets[name] = [[line.name, _inside(session, path), line.text, line.group] for line, path in kept]
        rows = [
            {"fastsd_line": name, "file_name": _from(folder, session, picture), "text": text, "group": group}
            for name, picture, text, group in sets[name]
        ]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomic(folder / f"{file}.jsonl", content.encode())
    write_atomic(folder / _LINES, json.dumps(sets, ensure_ascii=False).encode())


def _from(folder: Path, session: ReadingSession, picture: str) -> str:
    path = session.folder / picture
    return picture if Path(picture).is_absolute() else os.path.relpath(path, folder)


def _read_sets(session: ReadingSession, folder: Path) -> tuple[LineSet, LineSet]:
    sets = json.loads((folder / _LINES).read_text(encoding="utf-8"))
    learned, held = (
        LineSet(
            [LabelledLine(name, session.folder / picture, text, group) for name, picture, text, group in sets[part]]
        )
        for part in ("learned", "held_out")
    )
    return learned, held
