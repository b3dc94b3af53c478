"""Teaching from a notebook: which run it is, what it goes on with, what stays held out, and Stop at any moment."""

import dataclasses
import json
import time
from dataclasses import replace

import pytest
from installed import require_installed
from test_forms import text_of
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers import forms
from fastsd_helpers.errors import DatasetError, Interrupted, SettingsError
from fastsd_helpers.forms import TeachConfig
from fastsd_helpers.forms.trocr import finetuning
from fastsd_helpers.forms.widgets import work_view
from fastsd_helpers.trocr.reading.dataset import LabelledLine, LineSet, read_lines
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.teaching import session_teaching as runs
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, finetune, split_lines
from fastsd_helpers.trocr.teaching.progress import TeachingNews, TeachingProgress, note_progress

require_installed("accelerate")

pytest.importorskip("ipywidgets")
pytest.importorskip("transformers")
pytest.importorskip("jiwer")

TINY = TeachConfig(epochs=3, batch_size=6, augment=True, precision="fp32", patience=0, held_out=0.25, measure_every=4)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "reader"
    write_reader(folder, seed=1, end=4.0)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory, base):
    """A session with 24 lines of 4 pages, read and corrected; copied by each test."""
    home = tmp_path_factory.mktemp("home")
    pictures = home / "pictures"
    pictures.mkdir()
    for place, picture in enumerate(noise_pictures(24)):
        picture.save(pictures / f"page{place // 6}-{place}.png")
    session = ReadingSession(home / "hand")
    config = ReadPicturesConfig(images=str(pictures), reader=str(base), pages="lines", max_new_tokens=6)
    forms.read_pictures(config, session)
    for line in session.lines():
        session.correct(line.key, "fox")
    return session


@pytest.fixture
def session(begun, tmp_path):
    import shutil

    shutil.copytree(begun.folder, tmp_path / "hand")
    return ReadingSession(tmp_path / "hand")


def choose(session, config=TINY, **more):
    values = {name: getattr(config, name) for name in ("epochs", "lr", "batch_size", "data", "held_out")}
    return runs.choose_run(session, finetuning.learning_settings(config), values, **more)


def finish(run, cer=0.5):
    """What a run leaves when it has ended, without the hours in between."""
    (run.folder / "model").mkdir(parents=True)
    (run.folder / "model" / "config.json").write_text("{}")
    score = {"rate": cer, "low": cer, "high": cer, "edits": 1, "symbols": 2}
    scores = {name: score for name in ("cer", "wer", "cer_normalised", "wer_normalised")} | {"exact": 0, "lines": 6}
    found = {"scores": scores, "confidence": 0.5, "looped": 0, "cut": 0, "worst": [], "left_out": []}
    row = {"cer_before": 0.9, "cer_after": cer, "before": found, "after": found, "steps": 9, "first_step": 0}
    row |= {"seconds": 1.0, "train_lines": 18, "held_out_lines": 6, "added_letters": "", "curve": [[9, cer]]}
    (run.folder / "result.json").write_text(json.dumps(row))
    return run.finish()


def test_an_unfinished_run_goes_on_with_what_it_began_with_whatever_was_corrected_since(session):
    first = choose(session)
    session.correct(session.lines()[0].key, "dog")
    again = choose(ReadingSession(session.folder))
    assert again.folder == first.folder
    assert "continues with the lines it began with" in again.why
    assert choose(session, replace(TINY, processes=2)).settings.processes == 2, "on the GPUs that are there now"
    assert "dog" not in (first.folder / "learned.jsonl").read_text() + (first.folder / "held-out.jsonl").read_text()
    anew = choose(session, start_over=True)
    assert anew.folder != first.folder, "other lines are another run"
    assert "dog" in (anew.folder / "learned.jsonl").read_text() + (anew.folder / "held-out.jsonl").read_text()


def test_other_settings_are_another_run_and_the_unfinished_one_is_kept_and_found_again(session, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    first = choose(session)
    other = choose(session, dataclasses.replace(TINY, epochs=5))
    assert other.folder != first.folder
    assert "unfinished fine-tuning with other settings is kept" in caplog.text
    assert choose(session).folder == first.folder


def test_a_finished_run_is_not_taught_again_until_more_steps_or_start_over_are_asked_for(session):
    first = choose(session)
    assert first.result() is None
    finish(first)
    assert choose(session).result().cer_after == 0.5
    assert "already finished" in choose(session).why
    further = choose(session, more_steps=30)
    assert further.model == str(first.folder / "model")
    assert further.base == first.model
    # 18 lines in batches of 6 are 3 steps an epoch.
    assert further.settings.epochs == pytest.approx(29.5 / 3)
    assert choose(session).folder == further.folder, "the choice counts once; the run that it began goes on"
    assert choose(session).model == further.model
    made = finish(further, cer=0.4)
    assert session.record["taught"] == {"model": first.model, "path": f"fine-tuned/{further.folder.name}/model"}
    assert choose(session).result() == made
    anew = choose(session, start_over=True)
    assert anew.model == first.model
    assert (first.folder / "model").is_dir(), "what was finished before is kept"
    assert anew.folder not in (first.folder, further.folder)


def test_further_steps_that_read_worse_leave_the_better_reader_in_its_place(session, caplog):
    first = choose(session)
    finish(first)
    further = choose(session, more_steps=30)
    result = json.loads((first.folder / "result.json").read_text())
    assert result["cer_after"] == 0.5
    finish(further, cer=0.95)
    assert session.record["taught"]["path"] == f"fine-tuned/{first.folder.name}/model"
    assert "the session keeps the earlier fine-tuned model" in caplog.text


@pytest.mark.parametrize("part", ["learned", "held_out"])
def test_what_was_measured_on_stays_held_out_when_the_reader_learns_on(session, part):
    first = choose(session)
    finish(first)
    taught = runs.taught_reader(session)
    assert len(taught.held_out.lines) == 6
    # Corrections taken back and others made would divide anew, and what was learned would be measured on.
    keys = [line.name.removesuffix(".png") for line in getattr(taught, part).lines]
    for key in keys[:6]:
        session.correct(key, None)
    further = choose(session, more_steps=3)
    held = {line.name for line in read_lines(further.folder / "held-out.jsonl").lines}
    learned = {line.name for line in read_lines(further.folder / "learned.jsonl").lines}
    assert held
    assert held <= {line.name for line in taught.held_out.lines}
    assert not held & learned
    assert not learned & {line.name for line in taught.held_out.lines}


def test_the_lines_of_a_run_are_found_after_the_session_has_moved(session, tmp_path):
    run = choose(session)
    before = read_lines(run.folder / "learned.jsonl")
    (tmp_path / "drive").mkdir()
    session.folder.rename(tmp_path / "drive" / "hand")
    moved = ReadingSession(tmp_path / "drive" / "hand")
    again = choose(moved)
    after = read_lines(again.folder / "learned.jsonl")
    assert [(line.name, line.text, line.group) for line in after.lines] == [
        (line.name, line.text, line.group) for line in before.lines
    ]
    assert all(line.picture.is_file() for line in after.lines)


def test_nothing_held_out_is_measured_on_what_is_learned_and_says_so(caplog):
    lines = LineSet([LabelledLine(f"{place}.png", None, "fox", "one page") for place in range(120)])
    learned, held = split_lines(FineTuneConfig(held_out=0), lines)
    assert len(learned.lines) == 120
    assert len(held.lines) == 50
    assert "No line is held out" in caplog.text
    with pytest.raises(SettingsError, match="held_out"):
        FineTuneConfig(held_out=-0.1)


def test_the_form_says_how_many_lines_are_held_out_and_who_chose_them(session):
    form = forms.show_teach_form(session)
    form.update(held_out=0.25)
    assert "24 corrected lines: 18 for training, 6 held out for validation. They were chosen at random" in text_of(
        form.box
    )
    form.update(held_out=0)
    assert "24 corrected lines, all of them for training; none is held out" in text_of(form.box)
    form.update(data="/some/folder")
    assert "About 0 %" in text_of(form.box)


def test_more_text_reaches_the_language_model_and_one_that_is_missing_is_named_before_a_run_begins(
    session, tmp_path, monkeypatch
):
    started = []

    def start(words, *_folder, **_more):
        started.append(words)
        raise Interrupted("Begun.", "")

    monkeypatch.setattr(runs, "command_of", list)
    monkeypatch.setattr(runs.Background, "start", start)
    form = forms.show_teach_form(session)
    form.update(text=str(tmp_path / "more.txt"))
    with pytest.raises(DatasetError, match=r"There is no file or folder .*more\.txt"):
        forms.teach_reader(form.config(), session)
    assert runs.open_run(session) is None
    (tmp_path / "more.txt").write_text("the quick brown fox")
    for kernel in (session, ReadingSession(session.folder)):
        with pytest.raises(Interrupted, match="Begun"):
            forms.teach_reader(form.config(), kernel)
    assert [words[-2:] for words in started] == [["--text", str(tmp_path / "more.txt")]] * 2
    with_text = runs.open_run(session).folder
    with pytest.raises(Interrupted, match="Begun"):
        forms.teach_reader(TeachConfig(), session)
    assert "--text" not in started[-1]
    assert runs.open_run(session).folder != with_text
    assert "text" not in finetuning.run_values(TeachConfig()), "a run of before it could be named goes on"


def test_the_choice_to_start_over_or_go_further_is_taken_back_once_it_counts(session):
    form = forms.show_teach_form(session)
    form.update(more_steps=20)
    assert form.config().more_steps == 20
    finetuning._take_back(session)
    assert form.config().more_steps == 0
    assert ReadingSession(session.folder).record["forms"]["TeachConfig"]["more_steps"] == 0
    with pytest.raises(SettingsError, match="choose one of them"):
        TeachConfig(more_steps=3, start_over=True)


def test_text_without_a_language_model_is_said_at_its_field_and_bad_text_before_lines_are_divided(
    session, tmp_path, caplog
):
    form = forms.show_teach_form(session)
    form.update(text=str(tmp_path / "more.txt"), language=False)
    with pytest.raises(SettingsError, match="language is off") as caught:
        form.config()
    assert list(caught.value.fields) == ["text"]
    (tmp_path / "more.txt").write_text(" \n\n")
    form.update(language=True)
    caplog.clear()
    with pytest.raises(DatasetError, match=r"There is no text in .*more\.txt"):
        forms.teach_reader(form.config(), session)
    assert "held out" not in caplog.text


class Pressed:
    """Stands for somebody at the page: looks at the run whenever the cell lets the page speak, and presses Stop."""

    def __init__(self, monkeypatch, at):
        self.views, self.at, self.seen = [], at, []
        made = work_view.WorkView.__init__

        def init(view, *args, **more):
            made(view, *args, **more)
            self.views.append(view)

        monkeypatch.setattr(work_view.WorkView, "__init__", init)
        monkeypatch.setattr(work_view, "answer_widgets", self.look)

    def look(self):
        view = self.views[-1]
        words = view._head.value
        self.seen.append(words)
        step = words.partition("Step ")[2].partition(" of")[0]
        if step.isdigit() and int(step) >= self.at and not view.stop_clicks:
            view._button.click()


def test_the_time_left_is_said_through_a_measurement_until_the_steps_are_done(tmp_path):
    note, news = note_progress(tmp_path / "journal"), TeachingNews(tmp_path / "journal")
    note(TeachingProgress("teaching", 1, 240, 90.0))
    assert finetuning.words_of_news(news.look()).startswith("Step 1 of 240, about ")
    note(TeachingProgress("teaching", 2, 240, cer=0.5))
    assert "left" in finetuning.words_of_news(news.look())
    note(TeachingProgress("after", 240, 240))
    assert "left" not in finetuning.words_of_news(news.look())
    assert news.seconds_left is None


@pytest.mark.slow
def test_stop_in_the_teaching_cell_saves_and_running_it_again_ends_as_if_there_had_been_none(
    session, begun, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "fastsd_helpers")
    long = dataclasses.replace(TINY, epochs=40, measure_every=40)
    page = Pressed(monkeypatch, at=5)
    with pytest.raises(Interrupted, match=r"stopped at step \d+ of 120; everything up to there is saved") as caught:
        forms.teach_reader(long, session)
    stopped_at = int(caught.value.problem.partition("at step ")[2].partition(" of")[0])
    assert "Run this cell again to resume" in caught.value.hint
    assert page.views[-1]._button.layout.display == "none"
    page.at = 10_000
    # A new kernel has nothing but the session's folder.
    made = forms.teach_reader(long, ReadingSession(session.folder))
    assert made.first_step == stopped_at
    assert "The unfinished fine-tuning continues" in caplog.text
    assert "svg" in page.views[-1]._drawing.value
    assert "character error rate" in page.views[-1]._drawing.value
    assert "Done: " in page.views[-1]._head.value
    import shutil

    shutil.copytree(begun.folder, tmp_path / "other")
    other = choose(ReadingSession(tmp_path / "other"), long)
    sets = (other.folder / f"{name}.jsonl" for name in ("learned", "held-out"))
    whole = finetune(other.settings, next(sets), other.folder, model=other.model, held_out=next(sets))
    assert whole.curve == made.curve
    one, other = ((made.path / "model.safetensors").read_bytes(), (whole.path / "model.safetensors").read_bytes())
    assert one == other


@pytest.mark.slow
def test_a_new_kernel_finds_the_teaching_that_runs_and_watches_it(session, monkeypatch, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    config = finetuning.run_values(TINY)
    run = runs.choose_run(session, finetuning.learning_settings(TINY), config)
    child = run.start()
    made = forms.teach_reader(TINY, ReadingSession(session.folder))
    assert "It is running already; this cell shows it." in caplog.text
    for _ in range(200):  # its threads may end a moment after it
        if not child.is_running():
            break
        time.sleep(0.05)
    assert not child.is_running()
    assert made.steps == 9
    assert made.first_step == 0


@pytest.mark.slow
def test_an_unfinished_run_of_the_version_before_goes_on_where_it_was(session, monkeypatch):
    # It taught in the notebook's own process, and kept nothing of the run but its folder.
    import hashlib
    import threading

    lines = session.corrected()
    values = finetuning.run_values(TINY)
    model = session.record["reader"]
    parts = [values, model, [[line.name, line.text] for line in lines.lines]]
    folder = session.folder / "fine-tuned" / hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    learned, held = split_lines(finetuning.learning_settings(TINY), lines)
    stop = threading.Event()

    def watch(progress):
        if progress.stage == "teaching" and progress.step == 4:
            stop.set()

    with pytest.raises(Interrupted):
        finetune(
            finetuning.learning_settings(TINY), learned, folder, model=model, held_out=held, report=watch, stop=stop
        )
    made = forms.teach_reader(TINY, session)
    assert made.path.parent == folder.absolute()
    assert made.first_step == 4
