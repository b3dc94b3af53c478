"""Quantizing the model in a notebook: an int8 copy for computers without a GPU, and what it costs."""

import html
from pathlib import Path
from typing import Any

from fastsd_helpers import wheels
from fastsd_helpers.background import Background, command_of, local_folder
from fastsd_helpers.errors import Interrupted
from fastsd_helpers.forms.widgets.view import draw_table, show_widget
from fastsd_helpers.forms.widgets.work_view import WorkView, wait_for
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.reading.dataset import write_table
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.session_teaching import Taught, taught_reader

__all__ = ["ShrinkView", "int8_copy", "shrink_reader"]

_TRIALS = 3  # fp32, dynamic, static


def shrink_reader(session: ReadingSession) -> "ShrinkView | None":
    """Make an int8 copy for the CPU of the fine-tuned model and measure what it costs; None without known lines.

    The held-out lines measure, the learned ones calibrate. The copy is in the session's folder int8. It is made in a
    process of its own, which Stop ends; a copy from before stays then.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view with size, seconds and CER of both, or None without known lines.

    Raises:
        InstallError: OpenVINO and nncf are not there and cannot be installed.
        DependencyMissing: OpenVINO and nncf are not there and cannot be installed.
        Interrupted: it was stopped.
    """
    taught = taught_reader(session)
    if taught is None:
        logger.info("Nothing to quantize: no model was fine-tuned in this session yet.")
        return None
    copy, report = int8_copy(session, taught), session.record.get("int8_report") or {}
    if copy or (session.record.get("int8") == _made_of(session, taught) and report.get("chosen") == "fp32"):
        logger.info("It is there already: %s", copy or "fp32 remains the better one")
        return ShrinkView(report)
    _require_int8()
    made_of, answer = _made_of(session, taught), _make(taught, session.folder / "int8")
    report = {"trials": answer["trials"], "chosen": answer["method"], "why": answer["why"]}
    report |= {"lines": answer["evaluation_lines"], "built_in": answer["built_in_lines"]}
    session.save(int8=made_of, int8_report=report)
    return ShrinkView(report)


def int8_copy(session: ReadingSession, taught: Taught) -> Path | None:
    """The folder of the int8 copy of just this fine-tuned model; None where there is none, or it was not chosen.

    Args:
        session: whose copy.
        taught: what its copy must have been made of.
    """
    out, report = session.folder / "int8", session.record.get("int8_report") or {}
    chosen = report.get("chosen", "fp32") != "fp32"
    return out if chosen and out.is_dir() and session.record.get("int8") == _made_of(session, taught) else None


def _made_of(session: ReadingSession, taught: Taught) -> dict[str, Any]:
    # By the weights: the folder's name says nothing of a run that was begun again.
    written = max(file.stat().st_mtime for file in taught.path.glob("*.safetensors"))
    return {"path": str(taught.path.relative_to(session.folder)), "written": written}


def _make(taught: Taught, out: Path) -> dict[str, Any]:
    run = taught.path.parent
    measured = {line.name for line in taught.held_out.lines}
    words = ["trocr", "quantize", str(taught.path), str(out), "--overwrite"]
    words += [f"--evaluate={write_table(run / 'shrink-measured.jsonl', taught.held_out.lines)}"]
    if rest := [line for line in taught.learned.lines if line.name not in measured]:
        words.append(f"--calibrate={write_table(run / 'shrink-calibrated.jsonl', rest)}")
    view = WorkView("Quantizing to int8…", "progress of quantization", saves="Cancels it; nothing is replaced.")
    show_widget(view.box)
    folder = local_folder(out)
    child = Background.find(folder) or Background.start(command_of(words), folder, model=str(taught.path))

    def show() -> None:
        done = [line for line in child.log_lines(400) if " lines per second, " in line]
        view.show(f"Quantizing and evaluating: {len(done)} of {_TRIALS} done", len(done), _TRIALS, messages=done)

    try:
        answer = wait_for(child, view, show, "The quantization", log=run / "shrinking.log")
    except Interrupted as err:
        raise Interrupted(
            "Quantization was stopped; nothing was replaced.", "Run this cell again to start again."
        ) from err
    view.end(f"Done: {answer['why']}", good=answer["method"] != "fp32")
    return answer


def _require_int8() -> None:
    import importlib.util

    if any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")):
        wheels.install("trocr-int8")


class ShrinkView:
    """What int8 costs: size, speed and errors of every way that was tried, which was chosen, and why."""

    def __init__(self, about: dict[str, Any]) -> None:
        self.about = about

    def _repr_html_(self) -> str:
        names = ("precision", "size", "lines per second", "CER", "same text as the fp32 model")
        full, rows = self.about["trials"][0], []
        for trial in self.about["trials"]:
            chosen = " ✓ chosen" if trial["method"] == self.about["chosen"] else ""
            speed = trial["lines_per_second"] / full["lines_per_second"]
            rows.append(
                (
                    f"{html.escape(trial['method'])}{chosen}",
                    f"{trial['bytes'] / 1e6:.1f} MB",
                    f"{trial['lines_per_second']:.1f} ({speed:.2f} times fp32)",
                    f"{100 * trial['cer']:.1f} % ({100 * trial['cer_low']:.1f} to {100 * trial['cer_high']:.1f})",
                    f"{100 * trial['same_text']:.0f} % of lines",
                )
            )
        why = html.escape(self.about.get("why", ""))
        few = ""
        if built_in := self.about.get("built_in", 0):
            few = (
                f"<p>Only {self.about['lines']} lines with ground truth are available for evaluation, so speed and "
                f"agreement were measured on {built_in} built-in lines too. More corrected lines make this more "
                "reliable.</p>"
            )
        where = "<p>The int8 model is in the list <i>reader</i> above.</p>" if self.about["chosen"] != "fp32" else ""
        return f"<p>{why[:1].upper()}{why[1:]}</p>{few}{draw_table('the copies that were made', names, rows)}{where}"
