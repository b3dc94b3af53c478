"""What the handwriting notebook shows: confidences, the correction table, teaching, comparing, the shared page."""

import shutil
from dataclasses import replace

import pytest
from contrast import contrast
from test_forms import text_of
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers import forms
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.forms import ReadingSessionConfig, TeachConfig
from fastsd_helpers.forms.trocr import finetuning, reading_view
from fastsd_helpers.forms.widgets.loss_curve import draw_rate_curve
from fastsd_helpers.forms.widgets.view import draw_table
from fastsd_helpers.trocr.model.line import Line, Token
from fastsd_helpers.trocr.reading.serve import ServeConfig
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.teaching.progress import steps_in_words

pytest.importorskip("ipywidgets")
pytest.importorskip("transformers")

TINY = TeachConfig(epochs=1, batch_size=8, augment=False, precision="fp32", patience=0, held_out=0.25)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that writes lines of few tokens."""
    folder = tmp_path_factory.mktemp("tiny") / "reader"
    write_reader(folder, seed=1, end=4.0, max_position_embeddings=16)
    return folder


@pytest.fixture(scope="module")
def begun(tmp_path_factory, base):
    """A session with 24 lines of 4 pages that were read; copied by each test."""
    home = tmp_path_factory.mktemp("home")
    pictures = home / "pictures"
    pictures.mkdir()
    for place, picture in enumerate(noise_pictures(24)):
        picture.save(pictures / f"page{place // 6}-{place}.png")
    session = ReadingSession(home / "my_lines")
    read = {"images": str(pictures), "reader": str(base), "pages": "lines", "precision": "fp32", "max_new_tokens": 6}
    forms.read_pictures(ReadPicturesConfig(**read), session)
    return session


@pytest.fixture(scope="module")
def taught(begun, tmp_path_factory):
    """That session with all lines corrected and learned from, and what came of it; copied by each test."""
    pytest.importorskip("jiwer")
    pytest.importorskip("accelerate")
    session = ReadingSession(shutil.copytree(begun.folder, tmp_path_factory.mktemp("taught") / "my_lines"))
    for line in session.lines():
        session.correct(line.key, "fox")
    return session, forms.teach_reader(TINY, session)


@pytest.fixture
def session(tmp_path, begun):
    """A session with 24 lines of 4 pages that were read, where a notebook finds it."""
    shutil.copytree(begun.folder, tmp_path / "Fast-TrOCR" / "Sessions" / "my_lines")
    return forms.open_reading(ReadingSessionConfig("my lines"))


def rows_of(table):
    """The field, its buttons and its state, of every line that is shown."""
    columns = [row.children[1].children for row in table._rows.children]
    return [(field, *below.children) for field, _doubted, below in columns]


def test_a_session_is_opened_below_the_current_folder_and_found_again(tmp_path, session):
    assert session.folder == tmp_path / "Fast-TrOCR" / "Sessions" / "my_lines"
    assert len(forms.open_reading(ReadingSessionConfig("my lines")).lines()) == 24
    with pytest.raises(SettingsError, match=r"the form of cell 5a .* needs the one of cell 2a"):
        forms.open_reading(TeachConfig())


def test_the_view_shows_pictures_confidence_and_the_least_sure_first(session):
    view = forms.show_confidence(session)
    shown = text_of(view.box)
    assert "lines 1 to 20 of 24" in shown
    assert ">confidence</th>" in shown
    assert shown.count("data:image/jpeg") == 20
    view._next.click()
    assert "lines 21 to 24 of 24" in text_of(view.box)
    assert view._next.disabled
    view._order.value = "doubt"
    least = min(session.lines(), key=lambda line: line.read.confidence)
    first = view._table.value.split("<tr>")[2]
    assert f"{100 * least.read.confidence:.0f} %" in first


@pytest.mark.parametrize("cell", ["65 %", "100 %", "3 → 1", "12.5 MB", "1,024", "7", "&lt;1 %"])
def test_a_figure_and_its_unit_stay_on_one_line_of_a_table(cell):
    assert f"white-space:nowrap'>{cell}</td>" in draw_table("figures", ["one"], [[cell]])


@pytest.mark.parametrize(
    "cell", ["", "fp32 ✓ chosen", "12 apples and a pear", "<b>65 %</b> of a long line", "1 2 3 4 5 6"]
)
def test_text_in_a_table_wraps(cell):
    assert "nowrap" not in draw_table("texts", ["one"], [[cell]])


@pytest.mark.parametrize(
    ("curve", "drawn", "said"),
    [
        ([(60, 0.108), (120, 0.18)], "18.0 % at step 120; best: 10.8 % at step 60", "120 steps (best at step 60"),
        ([(60, 0.2), (120, 0.18)], "18.0 % at step 120<", "120 steps"),
        ([(60, 0.1), (90, 0.1), (120, 0.2)], "best: 10.0 % at step 60", "120 steps (best at step 60"),
        ([(60, 0.1), (120, 0.1)], "10.0 % at step 120<", "120 steps (best at step 60"),
        ([(60, float("nan")), (120, 0.3)], "30.0 % at step 120<", "120 steps"),
        ([], "not measured yet", "120 steps"),
    ],
)
def test_the_best_step_is_told_where_it_is_not_the_last(curve, drawn, said):
    assert drawn in draw_rate_curve(curve, 120, "CER").rpartition("<text")[2]
    told = steps_in_words(120, curve)
    assert told.startswith(said)
    assert ("best" in told) == ("best" in said)


def test_doubted_words_are_marked_as_words_and_markup_stays_text():
    tokens = (Token(5, "a<b>", 0.99), Token(6, " qu", 0.98), Token(7, "ick", 0.4), Token(8, " fox", 0.8))
    line = Line("a<b> quick fox", 0.9, tokens)
    assert reading_view.words_of(line) == [("a<b>", 0.99), (" ", 1.0), ("quick", 0.4), (" ", 1.0), ("fox", 0.8)]
    shown = reading_view.draw_doubt(line)
    assert shown.startswith("a&lt;b&gt; <mark title='very low confidence: 40 %'")
    assert ">quick</mark> <mark title='low confidence: 80 %'" in shown
    assert "<b>" not in shown
    # Tokens that are halves of a letter cannot be shown one by one.
    halves = Line("é", 0.5, (Token(5, "\ufffd", 0.5), Token(6, "\ufffd", 0.5)))
    assert reading_view.draw_doubt(halves).count("<mark") == 1


@pytest.mark.parametrize("degree", list(reading_view.DOUBT_COLOURS))
def test_a_marked_word_brings_its_background_and_is_easy_to_read_on_it(degree):
    ink, paper = reading_view.DOUBT_COLOURS[degree]
    assert contrast(ink, paper) >= 4.5
    line = Line("x", 0.5, (Token(5, "x", 0.7 if degree == "low confidence" else 0.3),))
    assert f"color:{ink};background:{paper}" in reading_view.draw_doubt(line)


def test_a_correction_is_kept_at_once_and_can_be_taken_back(session):
    table = forms.correct_lines(session)
    assert "0 of 24 lines reviewed" in text_of(table.box)
    field, right, undo, state = rows_of(table)[0]
    field.value = "the brown fox"
    assert ReadingSession(session.folder).lines()[0].right == "the brown fox"
    assert "corrected; read as" in state.value
    rows_of(table)[1][1].click()
    assert session.lines()[1].right == session.lines()[1].read.text
    assert "accepted" in rows_of(table)[1][3].value
    undo.click()
    assert session.lines()[0].right is None
    assert field.value == session.lines()[0].read.text
    assert "1 of 24 lines reviewed" in text_of(table.box)
    field.value = " "
    assert "cannot be trained on" in text_of(table.box)
    assert right is not None


def test_a_page_of_lines_is_marked_right_and_what_is_open_can_be_shown(session):
    table = forms.correct_lines(session)
    fields = [field for field, *_ in rows_of(table)]
    for place, field in enumerate(fields):
        if place == 3:
            field.value = ""
        elif not field.value.strip():
            field.value = "x"
    table._rest.click()
    assert "9 of 24 lines reviewed" in text_of(table.box)
    assert "1 of them have no text" in text_of(table.box)
    assert 'role="alert"' in table._message.value
    rows_of(table)[3][0].value = "y"
    assert "10 of 24 lines reviewed; lines 1 to 10" in text_of(table.box).replace("</b>", "")
    table._which.value = "open"
    assert [field.value for field, *_ in rows_of(table)] == [line.text for line in session.lines()[10:20]]
    table._next.click()
    assert len(rows_of(table)) == 4
    table._back.click()
    assert len(rows_of(table)) == 10


def test_every_line_has_its_name_and_a_picture_with_words_and_a_label(session):
    table = forms.correct_lines(session)
    row = table._rows.children[0]
    shown = text_of(row)
    assert "page0-0.png" in shown
    assert 'alt="line 1 of page0-0.png"' in shown
    assert rows_of(table)[0][0].description == "line 1"


def test_the_table_drawn_again_shows_the_lines_it_showed_last_in_a_new_kernel_too(session):
    table = forms.correct_lines(session)
    table._which.value = "doubt"
    table._next.click()
    shown = [line.key for line in table._shown]
    again = forms.correct_lines(ReadingSession(session.folder))
    assert again._which.value == "doubt"
    assert [line.key for line in again._shown] == shown
    session.save(correcting={"which": "of a later version", "first": 7000})
    assert forms.correct_lines(session)._which.value == "all"


def test_the_next_lines_not_looked_at_are_those_after_the_ones_that_are_done(session):
    table = forms.correct_lines(session)
    table._which.value = "open"
    first = [line.key for line in table._shown]
    for field, right, _undo, _state in rows_of(table):
        field.value = "fox"
        right.click()
    table._next.click()
    second = [line.key for line in table._shown]
    every = [line.key for line in session.lines()]
    assert (first, second) == (every[:10], every[10:20]), "none is passed over"
    assert len([line for line in session.lines() if line.right]) == 10


def test_a_correction_that_arrives_after_the_table_has_turned_is_kept(session):
    table = forms.correct_lines(session)
    field, key = rows_of(table)[2][0], table._shown[2].key
    table._next.click()
    field.value = "late, but kept"
    assert next(line for line in session.lines() if line.key == key).right == "late, but kept"


def test_uploads_become_what_is_read(session):
    form = forms.show_lines_form(session)
    form._keep("a scan.png", b"x")
    assert "1 uploaded file in this session" in form._uploaded.value
    assert form.config().images == str(session.uploads)


def test_without_corrections_there_is_nothing_to_learn_compare_or_shrink(session, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    assert forms.teach_reader(TeachConfig(), session) is None
    assert "No line has been corrected yet" in caplog.text
    assert forms.compare_reading(session) is None
    assert forms.shrink_reader(session) is None
    assert "Nothing to quantize" in caplog.text


def test_the_end_of_a_fine_tuning_says_when_it_is_worse_and_what_its_language_model_gains():
    gain = {"beams": 1, "way": "greedy", "weight": 0.2, "bonus": 0.0, "cer_without": 0.1, "cer_with": 0.08, "lines": 40}
    answer = {"cer_before": 0.2, "cer_after": 0.1, "steps": 60, "curve": [], "language": [gain]}
    text, better = finetuning.words_of_end(answer)
    assert better
    assert text.startswith("Done: 20.0 % CER before, 10.0 % after 60 steps")
    assert text.endswith("Language model, greedy: CER 10.00 % without, 8.00 % with.")
    text, better = finetuning.words_of_end(answer | {"cer_after": 0.21, "language": []})
    assert not better
    assert text.endswith("The CER is higher than before: use more lines, or a lower learning rate.")


@pytest.fixture
def learned(taught, tmp_path):
    """A copy of the session that was taught, as a new kernel finds it, and what came of it where it was taught."""
    return ReadingSession(shutil.copytree(taught[0].folder, tmp_path / "my_lines")), taught[1]


def test_corrections_are_learned_from_compared_and_every_choice_has_its_folder(taught, learned, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    session, there = learned
    assert (there.train_lines, there.held_out_lines) == (18, 6)
    assert there.path.parent.parent == taught[0].folder / "fine-tuned"
    # The settings outlive the kernel, and so does what was learned.
    first = forms.teach_reader(TINY, session)
    assert replace(first, path=there.path) == there
    assert "already finished" in caplog.text
    again = ReadingSession(session.folder)
    shown = forms.compare_reading(again)
    assert shown.comparison.before.scores == first.before.scores
    assert shown.comparison.after.scores == first.after.scores
    assert len(shown.comparison.lines) == 6
    markup = shown._repr_html_()
    assert markup.count("data:image/jpeg") == 6
    assert "CER on 6 lines that were held out" in markup
    # What was measured on stays so, whatever is corrected later.
    for line in session.lines()[:12]:
        session.correct(line.key, None)
    assert forms.compare_reading(session).comparison.before.scores == first.before.scores
    session.correct(session.lines()[0].key, "another")
    other = forms.teach_reader(TINY, session)
    assert "Writing model shards" not in caplog.text
    assert other.path != first.path
    assert first.path.is_dir()


@pytest.mark.slow
def test_the_taught_reader_is_shrunk_once_and_measured(learned, caplog):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    caplog.set_level("INFO", "fastsd_helpers")
    session, _made = learned
    shown = forms.shrink_reader(session)._repr_html_()
    assert "fp32" in shown
    assert "dynamic" in shown
    assert "static" in shown
    # Of a model this small it is chance which is the fastest; whatever is chosen is what is there.
    chosen = session.record["int8_report"]["chosen"]
    assert (session.folder / "int8" / "openvino" / "decoder.xml").is_file() is (chosen != "fp32")
    assert forms.shrink_reader(ReadingSession(session.folder)) is not None
    assert "It is there already" in caplog.text


def test_the_shared_page_opens_with_a_login_and_closes(session, base):
    pytest.importorskip("gradio")
    view = forms.share_reader(ServeConfig(port=0), session)
    assert view.page is None
    view.open()
    try:
        shown = text_of(view.box)
        assert view.page.url in shown
        assert f"user reader, password {view.page.password}" in shown
    finally:
        view.close()
    assert "Closed." in text_of(view.box)
    broken = forms.share_reader(ServeConfig(port=0), session)
    session.save(reader="no/such/reader/at/all")
    broken.open()
    assert "✗ No reader" in text_of(broken.box)
