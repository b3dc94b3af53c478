"""The handwriting notebook's later cells: Stop while reading, the list of readers, shrinking's choice, the page."""

import json
import shutil

import pytest
from test_forms import text_of
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers import background, forms
from fastsd_helpers.errors import Interrupted
from fastsd_helpers.forms.trocr import reading
from fastsd_helpers.forms.widgets import work_view
from fastsd_helpers.forms.widgets.known import known_values
from fastsd_helpers.options import options_of
from fastsd_helpers.trocr import ReadConfig, Reader
from fastsd_helpers.trocr.reading import rows, serve
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.teaching.quantization import Trial, choose_trial

pytest.importorskip("ipywidgets")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "reader"
    write_reader(folder, seed=1, end=4.0)
    return folder


@pytest.fixture
def lines(tmp_path):
    folder = tmp_path / "lines"
    folder.mkdir()
    for place, picture in enumerate(noise_pictures(40)):
        picture.save(folder / f"{place:02d}.png")
    return folder


def settings(lines, base, **more):
    return ReadPicturesConfig(
        images=str(lines), reader=str(base), pages="lines", max_new_tokens=6, batch_size=2, **more
    )


def test_stop_while_reading_keeps_the_lines_and_the_cell_run_again_reads_the_others_alone(
    tmp_path, base, lines, monkeypatch
):
    views, read = [], []
    made, read_before = work_view.WorkView.__init__, Reader.read

    def init(view, *args, **more):
        made(view, *args, **more)
        views.append(view)

    def counted(reader, images, **more):
        images = list(images)
        read.extend(images)
        return read_before(reader, images, **more)

    def press():
        if len(read) > 8 and not views[-1].stop_clicks:
            views[-1]._button.click()

    monkeypatch.setattr(work_view.WorkView, "__init__", init)
    monkeypatch.setattr(Reader, "read", counted)
    monkeypatch.setattr(reading, "answer_widgets", press)
    session = ReadingSession(tmp_path / "mine")
    with pytest.raises(Interrupted, match="the lines read so far are kept"):
        forms.read_pictures(settings(lines, base), session)
    before = len(read)
    assert 8 < before < 40
    assert "Stopped: run this cell again to resume." in views[-1]._head.value
    read.clear()
    monkeypatch.setattr(reading, "answer_widgets", lambda: None)
    forms.read_pictures(settings(lines, base), ReadingSession(tmp_path / "mine"))
    assert len(read) <= 40 - before + 4, "at most one group was on its way when it was stopped"
    assert "40 lines read" in views[-1]._head.value


def test_every_setting_of_the_form_reaches_the_model_and_a_languages_gain_is_told(
    tmp_path, base, lines, monkeypatch, caplog
):
    caplog.set_level("INFO", "fastsd_helpers")
    opened = []
    made = Reader.__init__

    def init(reader, model, **given):
        opened.append(given)
        made(reader, model, **given)

    monkeypatch.setattr(Reader, "__init__", init)
    (tmp_path / "text.txt").write_text("fox dog 0123 the lazy " * 5)
    session = ReadingSession(tmp_path / "mine")
    config = settings(lines, base, language=str(tmp_path / "text.txt"), allowed_characters="a-z", n_best=2)
    forms.read_pictures(config, session)
    assert opened[-1] == {item.name: getattr(config, item.name) for item in options_of(ReadConfig)}
    assert all(set(line.text) <= set("abcdefghijklmnopqrstuvwxyz ") for line in session.lines())
    assert all(line.read.alternatives for line in session.lines() if line.text)
    for line in session.lines()[:12]:
        session.correct(line.key, "fox dog")
    forms.read_pictures(config, session)
    assert "Language model, on 12 corrected lines, beam 4: CER" in caplog.text


def test_pictures_that_are_gone_leave_the_lines_and_corrections_as_they_were(tmp_path, base, lines, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    session = ReadingSession(tmp_path / "mine")
    forms.read_pictures(settings(lines, base), session)
    session.correct(session.lines()[0].key, "fox")
    shutil.rmtree(lines)
    again = ReadingSession(tmp_path / "mine")
    view = forms.read_pictures(settings(lines, base), again)
    assert "is not on this machine: these are the lines that were read before" in caplog.text
    assert "of 40" in text_of(view.box)
    assert again.lines()[0].right == "fox"


def test_a_form_lists_the_readers_of_every_session_and_the_published_ones(tmp_path):
    for name, rate in (("aunt", 0.031), ("uncle", 0.2)):
        model = tmp_path / "Sessions" / name / "fine-tuned" / "abc" / "model"
        model.mkdir(parents=True)
        (model / "config.json").write_text("{}")
        (model.parent / "result.json").write_text(json.dumps({"cer_after": rate, "train_lines": 80}))
        session = ReadingSession(tmp_path / "Sessions" / name)
        session.save(taught={"model": "x", "path": "fine-tuned/abc/model"})
    (tmp_path / "Sessions" / "aunt" / "int8").mkdir()
    (tmp_path / "Sessions" / "aunt" / "int8" / "quantization.json").write_text("{}")
    (tmp_path / "Sessions" / "broken").mkdir()
    (tmp_path / "Sessions" / "broken" / "session.json").write_text("no JSON")
    found = known_values("readers", session)
    assert found[0][1] == "auto"
    assert found[1][0] == "fine-tuned in uncle: 20.0 % CER, 80 lines", "one's own come first"
    assert ("quantized in aunt: int8, for a CPU", str(tmp_path / "Sessions" / "aunt" / "int8")) in found
    assert "trocr-base-handwritten" in [value for _shown, value in found]
    assert {option.name for option in options_of(ReadPicturesConfig) if option.known == "readers"} == {"reader"}


def trial(method, speed, cer, same, differs, size=10):
    return Trial(method, size, speed, cer, cer, cer, cer, same, differs)


FULL = trial("fp32", 17.9, 0.60, 1.0, 0.0, size=40)


@pytest.mark.parametrize(
    ("trials", "chosen", "said"),
    [
        # On four lines chance made the one that reads other text look better.
        (
            [trial("dynamic", 24, 0.60, 1, 0), trial("static", 13.9, 0.55, 0, 0.7)],
            "dynamic",
            "static is slower than fp32",
        ),
        ([trial("dynamic", 24, 0.60, 1, 0), trial("static", 30, 0.55, 0, 0.7)], "dynamic", "static is less reliable"),
        (
            [trial("dynamic", 24, 0.60, 1, 0), trial("static", 30, 0.60, 0.98, 0.001)],
            "static",
            "dynamic is as reliable",
        ),
        ([trial("dynamic", 15, 0.60, 1, 0)], "dynamic", "0.8 times its speed"),
        ([trial("dynamic", 15, 0.62, 0.9, 0.02), trial("static", 14, 0.7, 0, 0.5)], "fp32", "no copy is worth having"),
    ],
)
def test_shrinking_chooses_by_errors_agreement_and_speed_and_says_why(trials, chosen, said):
    found, why = choose_trial([FULL, *trials])
    assert found.method == chosen
    assert said in why
    assert "the same text as fp32 in" in why


def test_the_table_of_shrinking_shows_speed_beside_fp32_and_why_and_how_few_lines_there_were():
    trials = [vars(FULL), vars(trial("dynamic", 35.8, 0.60, 1, 0))]
    about = {"trials": trials, "chosen": "dynamic", "why": "dynamic is taken: <b>.", "lines": 4, "built_in": 24}
    shown = forms.ShrinkView(about)._repr_html_()
    assert "Dynamic is taken: &lt;b&gt;." in shown
    assert "35.8 (2.00 times fp32)" in shown
    assert "dynamic ✓ chosen" in shown
    assert "Only 4 lines" in shown
    assert "on 24 built-in lines too" in shown
    # A session of the version before has no reasons yet.
    assert (
        "static ✓ chosen"
        in forms.ShrinkView(
            {"trials": [vars(FULL), vars(trial("static", 9, 1, 0, 1))], "chosen": "static"}
        )._repr_html_()
    )


class Pages:
    """Stands in for the detector's answer: what matters here is who is asked, and for what."""

    def __init__(self, monkeypatch, lines):
        self.asked = []
        monkeypatch.setattr(rows, "open_detector", object)
        monkeypatch.setattr(rows, "cut_lines", self.read)
        self.lines = lines

    def read(self, _reader, picture, *, name="page", **_more):
        self.asked.append((name, picture.size))
        return serve_page(self.lines), []


def serve_page(lines):
    from fastsd_helpers.trocr.pages.page_reader import Page

    return Page("page", tuple(lines), 0.0, (1, 1))


@pytest.mark.parametrize(("size", "is_page"), [((900, 700), True), ((900, 120), False)])
@pytest.mark.parametrize("kind", ["picture", "file", "pdf"])
def test_the_shared_page_sees_by_itself_what_is_a_page_pictures_files_and_pdfs_alike(
    tmp_path, base, monkeypatch, size, is_page, kind
):
    gradio = pytest.importorskip("gradio")
    from PIL import Image, ImageDraw

    from fastsd_helpers.trocr.model.line import Line

    picture = Image.new("RGB", size, "white")
    for top in range(20, size[1] - 60, 110):
        ImageDraw.Draw(picture).text((20, top), "the fox and the dog", fill="black", font_size=60)
    pages = Pages(monkeypatch, [Line("first", 0.9), Line("second", 0.8)])
    blocks = serve.build_page(Reader(base, precision="fp32", max_new_tokens=4))
    functions = {function.name: function.fn for function in blocks.fns.values()}
    if kind == "picture":
        text, rows = functions["read"](picture, False)
    else:
        path = tmp_path / ("scan.pdf" if kind == "pdf" else "scan.png")
        picture.save(path)
        text, rows = functions["read_file"](str(path), False)
    assert bool(pages.asked) is is_page
    assert (text == "first\nsecond") is is_page
    assert len(rows) == (2 if is_page else 1)
    with pytest.raises(gradio.Error, match="Drop a file first"):
        functions["read_file"](None, False)


def test_nothing_is_counted_or_written_before_there_are_lines(tmp_path):
    session = ReadingSession(tmp_path / "mine")
    counting, vectors = forms.show_evaluator(session), forms.show_embedder(session)
    counting.go()
    assert "No line has been corrected yet" in text_of(counting.box)
    vectors.go()
    assert "No line has been read yet" in text_of(vectors.box)
    assert not (session.folder / "embeddings").exists()


class Presser:
    """Stands for somebody at the page, who presses Stop as soon as the work is seen to go on, so and so often."""

    def __init__(self, monkeypatch, presses=1):
        self.views, self.presses, self.commands = [], presses, []
        made, started = work_view.WorkView.__init__, background.Background.start.__func__

        def init(view, *args, **more):
            made(view, *args, **more)
            self.views.append(view)

        def start(cls, command, folder, **more):
            self.commands.append(command)
            return started(cls, command, folder, **more)

        monkeypatch.setattr(work_view.WorkView, "__init__", init)
        monkeypatch.setattr(background.Background, "start", classmethod(start))
        monkeypatch.setattr(work_view, "answer_widgets", self.look)

    def look(self):
        view = self.views[-1]
        if view.stop_clicks < self.presses:
            view._button.click()


@pytest.fixture
def read_session(tmp_path, base, lines):
    session = ReadingSession(tmp_path / "mine")
    forms.read_pictures(settings(lines, base), session)
    for line in session.lines()[:5]:
        session.correct(line.key, "fox")
    return session


def test_stop_ends_the_counting_of_errors_and_the_button_begins_anew(read_session, monkeypatch):
    pytest.importorskip("jiwer")
    page, view = Presser(monkeypatch), forms.show_evaluator(read_session)
    view.go()
    assert "Stopped; nothing was written or replaced. Press the button again" in text_of(view.box)
    assert not view._button.disabled
    assert not view._work.children, "there is nothing to stop any more"
    page.presses = 0
    view.go()
    shown = text_of(view.box)
    assert "Stopped" not in shown
    assert "character error rate (CER): " in shown
    assert "5 lines, " in shown
    assert len(page.commands) == 2


def test_stop_ends_the_writing_of_vectors_and_those_of_before_stay(read_session, monkeypatch):
    folder = read_session.folder / "embeddings"
    folder.mkdir()
    (folder / "embeddings.safetensors").write_bytes(b"of before")
    page, view = Presser(monkeypatch), forms.show_embedder(read_session)
    view.go()
    assert "Stopped; nothing was written or replaced. Press the button again" in text_of(view.box)
    assert [path.read_bytes() for path in folder.iterdir()] == [b"of before"]
    page.presses = 0
    view.go()
    assert "40 x 1 x" in text_of(view.box)
    assert len((folder / "index.csv").read_text().splitlines()) == 41


@pytest.mark.parametrize("presses", [1, 2])
def test_stop_ends_the_shrinking_and_a_copy_of_before_stays(tmp_path, base, read_session, monkeypatch, presses):
    run = read_session.folder / "fine-tuned" / "abc"
    shutil.copytree(base, run / "model")
    sets = {"learned": [], "held_out": []}
    for place, line in enumerate(read_session.corrected().lines):
        row = [line.name, str(line.picture), line.text, line.group]
        sets["held_out" if place < 2 else "learned"].append(row)
    (run / "lines.json").write_text(json.dumps(sets))
    read_session.save(taught={"model": str(base), "path": "fine-tuned/abc/model"})
    (read_session.folder / "int8").mkdir()
    (read_session.folder / "int8" / "quantization.json").write_text("{}")
    monkeypatch.setattr("fastsd_helpers.forms.trocr.quantization._require_int8", lambda: None)
    page = Presser(monkeypatch, presses)
    with pytest.raises(Interrupted, match="nothing was replaced") as caught:
        forms.shrink_reader(read_session)
    assert "Run this cell again" in caught.value.hint
    assert page.views[-1]._button.layout.display == "none"
    assert [path.name for path in (read_session.folder / "int8").iterdir()] == ["quantization.json"]
    assert "int8_report" not in read_session.record
