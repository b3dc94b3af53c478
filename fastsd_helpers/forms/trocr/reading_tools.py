"""Things to do beside reading, each behind a button of its own: count a model's errors, write its vectors."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from fastsd_helpers.background import local_folder
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.files import file_errors
from fastsd_helpers.forms.widgets.form import show_form
from fastsd_helpers.forms.widgets.tools import CommandTool, ToolView
from fastsd_helpers.options import Checked, option
from fastsd_helpers.trocr.reading.dataset import read_lines, write_table
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.evaluation import Evaluation, evaluation_from

__all__ = ["EmbedConfig", "EvaluateConfig", "show_embedder", "show_evaluator"]

_WORST = 5
_MOST_BYTES = 1_500_000  # of a command line, which Linux limits to 2 MiB with the environment


@dataclass(frozen=True)
class _WithReader(Checked):
    reader: str = option(
        "auto",
        help="recognition model: key, folder or Hub id; auto: the one this session uses",
        known="readers",
    )


@dataclass(frozen=True)
class EvaluateConfig(_WithReader):
    """Which model to measure, and on what."""

    data: str = option(
        "",
        help="ground truth: folder or table of lines with their text; empty: the lines corrected in this session",
    )


@dataclass(frozen=True)
class EmbedConfig(_WithReader):
    """Which images to write the encoder's vectors of, and how."""

    images: str = option("", help="image, folder, PDF or link; empty: the lines of this session")
    pool: Literal["mean", "columns", "none"] = option(
        "mean", help="pooling: one embedding per line (mean), per column of patches, or per patch token (none)"
    )


def _reader_for(session: ReadingSession, wanted: str) -> str:
    return session.reader if wanted == "auto" else wanted


def _place_of(session: ReadingSession, words: list[str]) -> Path:
    """What stands for one piece of work: the same settings on the same lines are found again, others are not."""
    return session.folder / hashlib.sha256("\0".join(words).encode()).hexdigest()[:12]


def show_evaluator(session: ReadingSession) -> ToolView:
    """Offer to count a model's errors on lines whose text is known; a cell's last line displays it.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    form = show_form(EvaluateConfig, restore=session)
    problems: list[str] = []

    def command() -> tuple[list[str], str, Path, int]:
        config = form.config()
        lines = read_lines(config.data) if config.data else session.corrected()
        reader, data = _reader_for(session, config.reader), config.data
        problems[:] = [] if data else lines.problems
        if not data:
            folder = local_folder(session.folder)
            with file_errors(folder, "write to"):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            data = str(write_table(folder / "evaluated.jsonl", lines.lines))
        words = ["trocr", "evaluate", data, f"--model={reader}"]
        marks = [*words, *(f"{line.name} {line.text}" for line in lines.lines)]
        return words, reader, _place_of(session, marks), len(lines.lines)

    def told(answer: Mapping[str, Any]) -> Iterable[str]:
        result = evaluation_from({item.name: answer[item.name] for item in fields(Evaluation) if item.name in answer})
        rates = (("character error rate (CER)", result.scores.cer), ("word error rate (WER)", result.scores.wer))
        told = [
            f"{name}: {100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f} %)" for name, rate in rates
        ]
        told.append(f"{result.scores.lines} lines, {100 * result.scores.exact:.0f} % of them without an error")
        told += [f"left out: {problem}" for problem in [*problems, *result.left_out][:_WORST]]
        return [*told, *(f"{row['name']}: {row['text']} — read as {row['read']}" for row in result.worst[:_WORST])]

    busy = "The lines are read and compared with the ground truth…"
    return CommandTool("Evaluate", busy, "The evaluation", form, command, told)


def show_embedder(session: ReadingSession) -> ToolView:
    """Offer to write the encoder's vectors of lines into the session's folder; a cell's last line displays it.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view with its button; as a cell's last line it is displayed.
    """
    form = show_form(EmbedConfig, restore=session)

    def command() -> tuple[list[str], str, Path, int]:
        config = form.config()
        images = [config.images] if config.images else [str(line.picture) for line in session.lines() if line.key]
        if not images:
            raise SettingsError("No line has been read yet.", "Read some images in cell 3b, or name some in 'images'.")
        if sum(len(image.encode()) + 9 for image in images) > _MOST_BYTES:
            raise SettingsError(f"{len(images)} lines are too many at once.", "Name a folder of them in 'images'.")
        reader, out = _reader_for(session, config.reader), Path(session.folder) / "embeddings"
        named = [f"./{image}" if image.startswith("-") else image for image in images]  # else it would be a flag
        words = ["trocr", "embed", *named, f"--out={out}", f"--pool={config.pool}", f"--model={reader}"]
        return words, reader, _place_of(session, words), len(images)

    def told(answer: Mapping[str, Any]) -> Iterable[str]:
        shape = " x ".join(map(str, answer["shape"]))
        index = Path(answer["index"]).name
        return [
            f"Written: {answer['path']} ({shape}: lines, vectors, numbers), and what each row is in {index}.",
            *answer["left_out"][:_WORST],
        ]

    return CommandTool("Write the embeddings", "The images are encoded…", "The writing", form, command, told)
