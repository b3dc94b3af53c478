"""Things to do beside reading, each behind a button of its own: count a reader's errors, write its vectors."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.forms.form import show_form
from fastsd_helpers.forms.polling import answer_widgets
from fastsd_helpers.forms.tools import ToolView
from fastsd_helpers.options import check, option
from fastsd_helpers.trocr.reading_session import ReadingSession, choose_reader
from fastsd_helpers.trocr.teaching import taught_reader

__all__ = ["EmbedConfig", "EvaluateConfig", "show_embedder", "show_evaluator"]

_WORST = 5


@dataclass(frozen=True)
class EvaluateConfig:
    """Which reader to measure, and on what."""

    reader: str = option("auto", help="key, folder or Hub id; auto: the one this session uses", known="readers")
    data: str = option("", help="folder or table of lines with their text; empty: the lines corrected in this session")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class EmbedConfig:
    """Which pictures to write the encoder's vectors of, and how."""

    reader: str = option("auto", help="key, folder or Hub id; auto: the one this session uses", known="readers")
    images: str = option("", help="picture, folder, PDF or link; empty: the lines of this session")
    pool: Literal["mean", "columns", "none"] = option(
        "mean", help="one vector a line, one a column of patches, or one a patch"
    )

    def __post_init__(self) -> None:
        check(self)


def show_evaluator(session: ReadingSession) -> ToolView:
    """Offer to count a reader's errors on lines whose text is known; a cell's last line displays it."""
    return _Evaluator(session)


def show_embedder(session: ReadingSession) -> ToolView:
    """Offer to write the encoder's vectors of lines into the session's folder; a cell's last line displays it."""
    return _Embedder(session)


def _reader_for(session: ReadingSession, wanted: str) -> str:
    taught = taught_reader(session)
    if wanted != "auto":
        return wanted
    if taught is not None:
        return str(taught.path)
    return str(session.record.get("reader") or choose_reader("auto", own_pictures=True)[0])


class _Evaluator(ToolView):
    def __init__(self, session: ReadingSession) -> None:
        self._session = session
        form = show_form(EvaluateConfig, restore=session)  # type: ignore[arg-type]
        super().__init__("Count the errors", "The lines are read and compared with their text…", form=form)

    def _do(self) -> Iterable[str]:
        from fastsd_helpers.trocr.evaluate import evaluate
        from fastsd_helpers.trocr.labels import read_lines
        from fastsd_helpers.trocr.reader import Reader

        assert self._form is not None
        config = self._form.config()
        lines = read_lines(config.data) if config.data else self._session.corrected()
        result = evaluate(Reader(_reader_for(self._session, config.reader)), lines, progress=_let_the_page_speak)
        rates = (("wrong characters (CER)", result.scores.cer), ("wrong words (WER)", result.scores.wer))
        told = [
            f"{name}: {100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f} %)" for name, rate in rates
        ]
        told.append(f"{result.scores.lines} lines, {100 * result.scores.exact:.0f} % of them without an error")
        told += [f"left out: {problem}" for problem in result.left_out[:_WORST]]
        return [*told, *(f"{row['name']}: {row['text']} — read as {row['read']}" for row in result.worst[:_WORST])]


class _Embedder(ToolView):
    def __init__(self, session: ReadingSession) -> None:
        self._session = session
        form = show_form(EmbedConfig, restore=session)  # type: ignore[arg-type]
        super().__init__("Write the vectors", "The pictures are looked at…", form=form)

    def _do(self) -> Iterable[str]:
        from fastsd_helpers.trocr.embeddings import write_embeddings
        from fastsd_helpers.trocr.reader import Reader

        assert self._form is not None
        config = self._form.config()
        images = config.images or [str(line.picture) for line in self._session.lines() if line.key]
        if not images:
            raise SettingsError("No line is read yet.", "Read some pictures in cell 3b, or name some in 'images'.")
        out = Path(self._session.folder) / "embeddings"
        result = write_embeddings(Reader(_reader_for(self._session, config.reader)), images, out, pool=config.pool)
        shape = " x ".join(map(str, result.shape))
        return [
            f"Written: {result.path} ({shape}: lines, vectors, numbers), and what each row is in {result.index.name}.",
            *result.left_out[:_WORST],
        ]


def _let_the_page_speak(_done: int) -> None:
    answer_widgets()
