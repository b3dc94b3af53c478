"""Fine-tuning the model in a notebook: on corrections or a dataset, and a comparison before and after."""

import html
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, FastSDError, Interrupted
from fastsd_helpers.forms import desk
from fastsd_helpers.forms.trocr.reading_view import picture_tag
from fastsd_helpers.forms.widgets.form import Form, require
from fastsd_helpers.forms.widgets.loss_curve import draw_rate_curve
from fastsd_helpers.forms.widgets.view import draw_notice, draw_table, in_words, load_widgets, show_widget
from fastsd_helpers.forms.widgets.work_view import WorkView, wait_for
from fastsd_helpers.options import check, from_values, option, to_values
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.evaluation import ComparedLine, Comparison, compare_readers
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, FineTuneResult
from fastsd_helpers.trocr.teaching.language import LanguageGain
from fastsd_helpers.trocr.teaching.progress import TeachingNews, steps_in_words
from fastsd_helpers.trocr.teaching.session_teaching import TeachingRun, choose_run, divide, open_run, taught_reader

__all__ = [
    "CompareView",
    "TeachConfig",
    "TeachForm",
    "compare_reading",
    "learning_settings",
    "run_values",
    "show_teach_form",
    "teach_reader",
    "words_of_end",
    "words_of_news",
]

_SHOWN = 20
_RELOADED = (
    "You can reload the page: the fine-tuning continues. If this view is gone then, interrupt the cell (it saves "
    "first) and run it again."
)


@dataclass(frozen=True)
class _Going:
    more_steps: int = option(
        0, help="continue fine-tuning the latest model for this many steps, with the corrections made since", low=0,
        high=1_000_000,
    )  # fmt: skip
    start_over: bool = option(False, help="start again at step 0; a model that was finished before is kept")


@dataclass(frozen=True)
class _Data:
    data: str = option(
        "",
        help="ground truth: folder or table of lines with their text; empty: the lines corrected in this session",
    )
    held_out_data: str = option(
        "", help="validation set: lines to evaluate on; empty: a share of the others", advanced=True
    )
    text: str = option(
        "",
        help=(
            "more text of the kind that is to be read, for the language model: file or folder; empty: the training "
            "texts alone"
        ),
        advanced=True,
    )


@dataclass(frozen=True)
class TeachConfig(FineTuneConfig, _Going, _Data):
    """What the model learns from, and how."""

    def __post_init__(self) -> None:
        wrong = ["more_steps and start_over: choose one of them"] if self.more_steps and self.start_over else []
        wrong += ["text is for the language model, and language is off: empty the one or switch on the other"] * bool(
            self.text and not self.language
        )
        check(self, wrong)


def show_teach_form(session: ReadingSession) -> "TeachForm":
    """Make the form for fine-tuning the model of a session; the last line of a cell displays it.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The form; as a cell's last line it is displayed, and its `config()` gives the settings.
    """
    return TeachForm(session)


class TeachForm(Form[TeachConfig]):
    """Settings of the teaching; above them how many lines there are, and who chose those that are held out."""

    _session: ReadingSession

    def __init__(self, session: ReadingSession) -> None:
        self._about = load_widgets().HTML()
        super().__init__(TeachConfig, session=session)
        self._tell()

    def _draw(self) -> Any:
        form = super()._draw()
        return load_widgets().VBox([self._about, form])

    def _on_change(self, *changed: Any) -> None:
        super()._on_change(*changed)
        self._tell()

    def _tell(self) -> None:
        try:
            settings = learning_settings(TeachConfig(**{name: field.read() for name, field in self._fields.items()}))
            self._about.value = draw_notice(_division(self._session, settings, self.values()))
        except FastSDError:  # a bad value is said at its field
            self._about.value = ""


def _division(session: ReadingSession, settings: FineTuneConfig, values: Any) -> str:
    """In words: what is learned from, what is held out, and who chose that."""
    if values.get("data"):
        return (
            f"About {100 * settings.held_out:.0f} % of the dataset is held out for validation, entire writers or "
            "pages, chosen at random by 'seed'; name lines of your own in 'held out data', or set 'held out' to 0 for "
            "none."
        )
    try:
        lines = session.corrected()
    except DatasetError:
        return "No line has been corrected yet; the table above is where that is done."
    count = len(lines.lines)
    if not settings.held_out:
        return f"{count} corrected lines, all of them for training; none is held out."
    before, logger.disabled = logger.disabled, True  # it would be said here and once more when the run begins
    try:
        learned, held = divide(settings, lines, taught=taught_reader(session))
    except FastSDError as err:
        return f"{count} corrected lines. {err.problem} {err.hint}"
    finally:
        logger.disabled = before
    return (
        f"{count} corrected lines: {len(learned.lines)} for training, {len(held.lines)} held out for validation. They "
        "were chosen at random by 'seed', entire pages or five lines in a row, and they stay held out; 'held out' is "
        "the share, 0 for none."
    )


def learning_settings(config: TeachConfig) -> FineTuneConfig:
    """The settings of the fine-tuning itself, without what only the form has."""
    own = {name for part in (_Data, _Going) for name in part.__dataclass_fields__}
    return from_values(FineTuneConfig, {name: value for name, value in to_values(config).items() if name not in own})


def run_values(config: TeachConfig) -> dict[str, Any]:
    """What a run is told apart by: all settings but those that say how to go on, and on how many GPUs."""
    values = {name: value for name, value in to_values(config).items() if not hasattr(_Going, name)}
    left_out = ["processes"] if values["text"] else ["processes", "text"]  # runs of before it could be named go on
    return {name: value for name, value in values.items() if name not in left_out}


def teach_reader(config: TeachConfig, session: ReadingSession, *, restart: bool = False) -> FineTuneResult | None:
    """Fine-tune the session's model in a process of its own; stopped and called again, go on.

    Every choice of settings and lines has a folder of its own in the session, so nothing learned is written over. A
    run that is unfinished goes on with what it began with; one that is running already is watched.

    Args:
        config: settings and data.
        session: whose corrections are learned from when no data are named.
        restart: as `start_over` in the settings.

    Returns:
        What was made; None when there is nothing to learn from yet.

    Raises:
        SettingsError: these are the settings of another form.
        Interrupted: it was stopped.
        FastSDError: what `finetune` raises.
    """
    require(config, TeachConfig)
    values = run_values(config)
    try:
        run = choose_run(
            session,
            learning_settings(config),
            values,
            data=config.data,
            held_out_data=config.held_out_data,
            text=config.text,
            more_steps=config.more_steps,
            start_over=config.start_over or restart,
        )
    except DatasetError as err:
        if config.data or session.has_corrections:
            raise
        logger.info("Nothing was trained: %s %s", err.problem, err.hint)
        return None
    if run.why:
        logger.info("%s", run.why)
    _take_back(session)
    if run.result() is None:
        _watch(run, run.find() or _start(run))
    made = run.finish()
    logger.info("CER on %d lines that %s: %.1f %% before, %.1f %% after %s. Model: %s", made.held_out_lines,
                _how_measured(run.settings), 100 * made.cer_before, 100 * made.cer_after,
                steps_in_words(made.steps, made.curve), made.path)  # fmt: skip
    return made


def _how_measured(settings: FineTuneConfig) -> str:
    return "were held out" if settings.held_out else "it was trained on"


def _take_back(session: ReadingSession) -> None:
    """'More steps' and 'start over' count once: they are taken back in the form, and in what it has saved."""
    none: dict[str, Any] = {"more_steps": 0, "start_over": False}
    form = desk.last_form(TeachConfig, session.folder)
    if form is not None:
        form.update(**none)
    saved = session.record.get("forms", {})
    entered = saved.get("TeachConfig")
    if entered and any(entered.get(name) for name in none):
        session.save_if_possible(forms=saved | {"TeachConfig": entered | none})


def _start(run: TeachingRun) -> Any:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the other process needs what this one keeps for later
    return run.start()


def _watch(run: TeachingRun, child: Any) -> None:
    view = WorkView(
        "Loading the model…", "progress of the fine-tuning", saves="Finishes the step and saves; run again to resume."
    )
    show_widget(view.box)
    news = run.news()

    def show() -> None:
        live = news.look()
        if live.process not in (None, child.process):  # of an earlier run of this folder
            return
        drawing = draw_rate_curve(live.curve, live.steps, "character error rate (CER)") if live.steps else ""
        view.show(
            words_of_news(live), live.step, live.steps or 1, drawing=drawing, messages=[*live.messages, _RELOADED]
        )

    try:
        answer = wait_for(child, view, show, "The fine-tuning", log=run.folder / "teaching.log")
    except Interrupted as err:
        raise Interrupted(err.problem, "Run this cell again to resume, in a new kernel too.") from err
    text, better = words_of_end(answer)
    view.end(text, good=better)


def words_of_end(answer: Mapping[str, Any]) -> tuple[str, bool]:
    """What became of a fine-tuning, and whether it is for the better."""
    better = answer["cer_after"] <= answer["cer_before"]
    told = [f"Done: {100 * answer['cer_before']:.1f} % CER before, "
            f"{100 * answer['cer_after']:.1f} % after {steps_in_words(answer['steps'], answer['curve'])}."]  # fmt: skip
    told += [] if better else ["The CER is higher than before: use more lines, or a lower learning rate."]
    told += [f"Language model, {LanguageGain(**gain).in_words()}." for gain in answer["language"]]
    return " ".join(told), better


def words_of_news(live: TeachingNews) -> str:
    """Where a fine-tuning is, in one sentence."""
    if live.stage == "teaching":
        left = f", about {in_words(live.seconds_left)} left" if live.seconds_left is not None else ""
        return f"Step {live.step} of {live.steps}{left}"
    return {
        "before": "Evaluating on the held-out lines before training…",
        "after": "All steps are done: evaluating on the held-out lines…",
    }.get(live.stage, "Loading the model…")


def compare_reading(session: ReadingSession) -> "CompareView | None":
    """Read the held-out lines with the model before and after fine-tuning and show both; None without a fine-tuning.

    Args:
        session: the session, as `open_reading` gives it.

    Returns:
        The view, or None without a fine-tuning.

    Raises:
        DatasetError: the lines or a model cannot be opened any more.
        ModelError: the lines or a model cannot be opened any more.
    """
    taught = taught_reader(session)
    if taught is None:
        run = open_run(session)
        unfinished = " The fine-tuning is not finished: run its cell again to resume." if run is not None else ""
        logger.info("Nothing to compare: no model was fine-tuned in this session yet.%s", unfinished)
        return None
    learned = {line.name for line in taught.learned.lines} & {line.name for line in taught.held_out.lines}
    return CompareView(compare_readers(taught.base, taught.path, taught.held_out), learned=bool(learned))


class CompareView:
    """A table of held-out lines: image, truth, before, after; above it the error rates of both.

    Attributes:
        comparison: what is shown.
    """

    def __init__(self, comparison: Comparison, *, learned: bool = False) -> None:
        self.comparison = comparison
        self._lines = "that it was trained on (none were held out)" if learned else "that were held out"

    def _repr_html_(self) -> str:
        rates = [evaluation.scores.cer for evaluation in (self.comparison.before, self.comparison.after)]
        told = [f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f} to {100 * rate.high:.1f})" for rate in rates]
        count = self.comparison.before.scores.lines
        head = (
            f"<p>CER on {count} lines {self._lines}: <b>{told[0]}</b> before, "
            f"<b>{told[1]}</b> after; in brackets the 95 % confidence interval.</p>"
        )
        names = ("line", "ground truth", "before", "after", "errors")
        table = draw_table("lines that were compared", names, map(_compared, self.comparison.lines[:_SHOWN]))
        more = len(self.comparison.lines) - _SHOWN
        below = f"<p>{more} more lines changed less.</p>" if more > 0 else ""
        return f"{head}{table}{below}"


def _compared(line: ComparedLine) -> list[str]:
    about = "a line that was compared"
    picture = picture_tag(Path(line.picture), about) if isinstance(line.picture, (str, Path)) else ""
    texts = [
        f"<span style='overflow-wrap:anywhere'>{html.escape(text)}</span>"
        for text in (line.text, line.before, line.after)
    ]
    return [picture, *texts, f"{line.errors_before} → {line.errors_after}"]
