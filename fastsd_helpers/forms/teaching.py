"""Teaching the reader in a notebook: learn from corrections or a data set, compare before and after, shrink to int8."""

import hashlib
import html
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, Interrupted
from fastsd_helpers.files import check_writable, write_atomic
from fastsd_helpers.forms.form import require
from fastsd_helpers.forms.reading_view import picture_tag
from fastsd_helpers.options import check, from_values, option, to_values
from fastsd_helpers.trocr.comparison import ComparedLine, Comparison, compare_readers
from fastsd_helpers.trocr.finetune import FineTuneConfig, FineTuneResult, finetune, split_lines
from fastsd_helpers.trocr.labels import LabelledLine, LineSet, read_lines
from fastsd_helpers.trocr.quantize import QuantizeResult, quantize
from fastsd_helpers.trocr.reading_session import ReadingSession, choose_reader

__all__ = ["CompareView", "ShrinkView", "TeachConfig", "compare_reading", "shrink_reader", "teach_reader"]

logger = logging.getLogger("fastsd_helpers")

_SHOWN = 20
_LINES = "lines.json"


@dataclass(frozen=True)
class _Data:
    data: str = option("", help="folder or table of lines with their text; empty: the lines corrected in this session")
    held_out_data: str = option("", help="lines to measure on; empty: a part of the others", advanced=True)


@dataclass(frozen=True)
class TeachConfig(FineTuneConfig, _Data):
    """What the reader learns from, and how."""

    def __post_init__(self) -> None:
        check(self)


def teach_reader(config: TeachConfig, session: ReadingSession, *, restart: bool = False) -> FineTuneResult | None:
    """Fine-tune the session's reader; stopped and called again, go on; None when there is nothing to learn from yet.

    Every choice of settings and lines has a folder of its own in the session, so nothing learned is written over.

    Args:
        config: settings and data.
        session: whose corrections are learned from when no data are named.
        restart: begin again where a run of these very settings has begun or ended.

    Raises:
        SettingsError: these are the settings of another form. Interrupted: it was stopped. And what `finetune` raises.
    """
    require(config, TeachConfig)
    try:
        data = read_lines(config.data) if config.data else session.corrected()
    except DatasetError as err:
        if config.data:
            raise
        logger.info("Nothing was learned: %s %s", err.problem, err.hint)
        return None
    held_out = read_lines(config.held_out_data) if config.held_out_data else None
    settings = from_values(
        FineTuneConfig, {name: value for name, value in to_values(config).items() if not hasattr(_Data, name)}
    )
    model = _reader_of(session)
    out = session.folder / "fine-tuned" / _mark(config, model, data)
    learned, held = split_lines(settings, data, held_out)
    # Written down, because another correction may divide the lines another way.
    sets = {"learned": _as_rows(learned, session), "held_out": _as_rows(held, session)}
    check_writable(out)
    write_atomic(out / _LINES, json.dumps(sets, ensure_ascii=False).encode())
    try:
        result = finetune(settings, learned, out, model=model, held_out=held, restart=restart)
    except KeyboardInterrupt as err:
        raise Interrupted(
            "The fine-tuning was stopped; what it had learned up to its last measurement is kept.",
            "Run the cell again to go on.",
        ) from err
    session.save(taught={"model": model, "path": str(result.path.relative_to(session.folder.absolute()))})
    logger.info("CER on %d lines that were not learned from: %.1f %% before, %.1f %% after. Reader: %s",
                result.held_out_lines, 100 * result.cer_before, 100 * result.cer_after, result.path)  # fmt: skip
    return result


def _reader_of(session: ReadingSession) -> str:
    return str(session.record.get("reader") or choose_reader("auto", own_pictures=True)[0])


def _mark(config: TeachConfig, model: str, data: LineSet) -> str:
    """A short name of the settings and the lines; another correction makes another name."""
    parts = [to_values(config), model, [[line.name, line.text] for line in data.lines]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _as_rows(lines: LineSet, session: ReadingSession) -> list[list[str]]:
    """Name, picture, text, group; pictures of the session by their place in it: it may be mounted elsewhere later."""
    rows = []
    for line in lines.lines:
        path = Path(line.picture).absolute()
        inside = path.is_relative_to(session.folder.absolute())
        shown = path.relative_to(session.folder.absolute()) if inside else path
        rows.append([line.name, str(shown), line.text, line.group])
    return rows


def _taught(session: ReadingSession) -> tuple[Path, str, LineSet, LineSet] | None:
    """(the fine-tuned reader, what it was made from, its lines, the lines it was measured on), when there is one."""
    entered: dict[str, Any] = session.record.get("taught") or {}
    model = session.folder / str(entered.get("path", ""))
    if not (model / "config.json").is_file() or not (model.parent / _LINES).is_file():
        return None
    sets = json.loads((model.parent / _LINES).read_text(encoding="utf-8"))
    learned, held = (
        LineSet(
            [LabelledLine(name, session.folder / picture, text, group) for name, picture, text, group in sets[part]]
        )
        for part in ("learned", "held_out")
    )
    return model, entered["model"], learned, held


def compare_reading(session: ReadingSession) -> "CompareView | None":
    """Read the held-out lines with the reader before and after fine-tuning and show both; None without a fine-tuning.

    Raises:
        DatasetError, ModelError: the lines or a reader cannot be opened any more.
    """
    taught = _taught(session)
    if taught is None:
        logger.info("Nothing to compare: no reader was fine-tuned in this session yet.")
        return None
    after, before, _learned, held = taught
    return CompareView(compare_readers(before, after, held))


class CompareView:
    """A table of held-out lines: picture, truth, before, after; above it the error rates of both.

    Attributes:
        comparison: what is shown.
    """

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison

    def _repr_html_(self) -> str:
        rates = [evaluation.scores.cer for evaluation in (self.comparison.before, self.comparison.after)]
        told = [f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})" for rate in rates]
        count = self.comparison.before.scores.lines
        head = (
            f"<p>Wrong characters in {count} lines that were not learned from: <b>{told[0]}</b> before, "
            f"<b>{told[1]}</b> after; in brackets where 95 % of samples of such lines lie.</p>"
        )
        names = ("line", "it says", "before", "after", "errors")
        heads = "".join(f"<th style='text-align:left;padding:2px 10px'>{name}</th>" for name in names)
        rows = "".join(f"<tr>{_compared(line)}</tr>" for line in self.comparison.lines[:_SHOWN])
        more = len(self.comparison.lines) - _SHOWN
        below = f"<p>{more} more lines changed less.</p>" if more > 0 else ""
        return f"{head}<table style='border-collapse:collapse'><tr>{heads}</tr>{rows}</table>{below}"


def _compared(line: ComparedLine) -> str:
    picture = picture_tag(Path(line.picture)) if isinstance(line.picture, (str, Path)) else ""
    texts = (html.escape(text) for text in (line.text, line.before, line.after))
    cells = [picture, *texts, f"{line.errors_before} → {line.errors_after}"]
    return "".join(f"<td style='text-align:left;padding:3px 10px;overflow-wrap:anywhere'>{cell}</td>" for cell in cells)


def shrink_reader(session: ReadingSession) -> "ShrinkView | None":
    """Make an int8 copy for the CPU of the fine-tuned reader and measure what it costs; None without known lines.

    The held-out lines measure, the learned ones calibrate. The copy is in the session's folder int8.

    Raises:
        InstallError, DependencyMissing: OpenVINO and nncf are not there and cannot be installed.
    """
    taught = _taught(session)
    if taught is None:
        logger.info("Nothing to shrink: no reader was fine-tuned in this session yet.")
        return None
    model, _before, learned, held = taught
    out = session.folder / "int8"
    # By the weights: the folder's name says nothing of a run that was begun again.
    made_of = {"path": model.name, "written": max(file.stat().st_mtime for file in model.glob("*.safetensors"))}
    if session.record.get("int8") == made_of and (out / "quantization.json").is_file():
        logger.info("It is there already: %s", out)
        return ShrinkView(json.loads((out / "quantization.json").read_text(encoding="utf-8")))
    _require_int8()
    result: QuantizeResult = quantize(
        model, out, evaluate_on=held, calibrate_on=[line.picture for line in learned.lines], overwrite=True
    )
    session.save(int8=made_of)
    logger.info("The %s copy is the better one: %s", result.method, result.path)
    return ShrinkView(json.loads((out / "quantization.json").read_text(encoding="utf-8")))


def _require_int8() -> None:
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")):
        from fastsd_helpers.wheels import install

        install("trocr-int8")


class ShrinkView:
    """What int8 costs: size, speed and errors of every way that was tried, and which was chosen."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about

    def _repr_html_(self) -> str:
        names = ("numbers", "size", "lines a second", "wrong characters", "same text as before")
        heads = "".join(f"<th style='text-align:left;padding:2px 10px'>{name}</th>" for name in names)
        rows = ""
        for trial in self.about["trials"]:
            chosen = " ✓" if trial["method"] == self.about["chosen"] else ""
            cells = (
                f"{html.escape(trial['method'])}{chosen}",
                f"{trial['bytes'] / 1e6:.1f} MB",
                f"{trial['lines_per_second']:.1f}",
                f"{100 * trial['cer']:.1f} % ({100 * trial['cer_low']:.1f} to {100 * trial['cer_high']:.1f})",
                f"{100 * trial['same_text']:.0f} % of lines",
            )
            rows += "<tr>" + "".join(f"<td style='padding:3px 10px'>{cell}</td>" for cell in cells) + "</tr>"
        return f"<table style='border-collapse:collapse'><tr>{heads}</tr>{rows}</table>"
