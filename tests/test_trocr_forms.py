"""What the handwriting notebook shows: confidences, the correction table, teaching, comparing, the shared page."""

import pytest
from test_forms import text_of
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers import forms
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.forms import ReadingSessionConfig, TeachConfig, reading_view
from fastsd_helpers.trocr.line import Line, Token
from fastsd_helpers.trocr.reading_session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.serve import ServeConfig

pytest.importorskip("ipywidgets")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "reader"
    write_reader(folder, seed=1, end=4.0)
    return folder


@pytest.fixture
def session(tmp_path, base):
    """A session with 24 lines of 4 pages that were read."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for place, picture in enumerate(noise_pictures(24)):
        picture.save(folder / f"page{place // 6}-{place}.png")
    session = forms.open_reading(ReadingSessionConfig("my lines"))
    config = ReadPicturesConfig(images=str(folder), reader=str(base), pages="lines", precision="fp32", max_new_tokens=6)
    forms.read_pictures(config, session)
    return session


def rows_of(table):
    return [row.children[1].children for row in table._rows.children]


def test_a_session_is_opened_below_the_current_folder_and_found_again(tmp_path, session):
    assert session.folder == tmp_path / "Fast-TrOCR" / "Sessions" / "my_lines"
    assert len(forms.open_reading(ReadingSessionConfig("my lines")).lines()) == 24
    with pytest.raises(SettingsError, match="this cell needs ReadingSessionConfig"):
        forms.open_reading(TeachConfig())


def test_the_view_shows_pictures_confidence_and_the_least_sure_first(session):
    view = forms.show_confidence(session)
    shown = text_of(view.box)
    assert "lines 1 to 20 of 24" in shown
    assert shown.count("data:image/jpeg") == 20
    view._next.click()
    assert "lines 21 to 24 of 24" in text_of(view.box)
    assert view._next.disabled
    view._order.value = "doubt"
    least = min(session.lines(), key=lambda line: line.read.confidence)
    first = view._table.value.split("<tr>")[2]
    assert f"{100 * least.read.confidence:.0f} %" in first


def test_doubtful_tokens_have_a_colour_and_markup_stays_text():
    line = Line("a<b> c", 0.9, (Token(5, "a<b>", 0.99), Token(6, " c", 0.4)))
    shown = reading_view._coloured(line)
    assert shown.startswith("a&lt;b&gt;<span title='40 %'")
    assert "<b>" not in shown
    # Tokens that are halves of a letter cannot be shown one by one.
    halves = Line("é", 0.5, (Token(5, "\ufffd", 0.5), Token(6, "\ufffd", 0.5)))
    assert reading_view._coloured(halves).count("<span") == 1


def test_a_correction_is_kept_at_once_and_can_be_taken_back(session):
    table = forms.correct_lines(session)
    assert "0 of 24 lines looked at" in text_of(table.box)
    field, right, undo, state = rows_of(table)[0]
    field.value = "the brown fox"
    assert ReadingSession(session.folder).lines()[0].right == "the brown fox"
    assert "corrected; read as" in state.value
    rows_of(table)[1][1].click()
    assert session.lines()[1].right == session.lines()[1].read.text
    assert "right as read" in rows_of(table)[1][3].value
    undo.click()
    assert session.lines()[0].right is None
    assert field.value == session.lines()[0].read.text
    assert "1 of 24 lines looked at" in text_of(table.box)
    field.value = " "
    assert "nothing to learn from" in text_of(table.box)
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
    assert "9 of 24 lines looked at" in text_of(table.box)
    assert "1 of them have no text" in text_of(table.box)
    rows_of(table)[3][0].value = "y"
    assert "10 of 24 lines looked at; lines 1 to 10" in text_of(table.box).replace("</b>", "")
    table._which.value = "open"
    assert [field.value for field, *_ in rows_of(table)] == [line.text for line in session.lines()[10:20]]
    table._next.click()
    assert len(rows_of(table)) == 4
    table._back.click()
    assert len(rows_of(table)) == 10


def test_uploads_become_what_is_read(session):
    form = forms.show_lines_form(session)
    form._keep("a scan.png", b"x")
    assert "1 uploaded file in this session" in form._uploaded.value
    assert form.config().images == str(session.uploads)


def test_without_corrections_there_is_nothing_to_learn_compare_or_shrink(session, caplog):
    caplog.set_level("INFO", "fastsd_helpers")
    assert forms.teach_reader(TeachConfig(), session) is None
    assert "No line is corrected yet" in caplog.text
    assert forms.compare_reading(session) is None
    assert forms.shrink_reader(session) is None
    assert "Nothing to shrink" in caplog.text


TINY = TeachConfig(epochs=1, batch_size=8, augment=False, precision="fp32", patience=0, held_out=0.25)


def test_corrections_are_learned_from_compared_and_every_choice_has_its_folder(session, caplog):
    pytest.importorskip("jiwer")
    pytest.importorskip("accelerate")
    caplog.set_level("INFO", "fastsd_helpers")
    for line in session.lines():
        session.correct(line.key, "fox")
    first = forms.teach_reader(TINY, session)
    assert (first.train_lines, first.held_out_lines) == (18, 6)
    assert first.path.parent.parent == session.folder / "fine-tuned"
    # The settings outlive the kernel, and so does what was learned.
    again = ReadingSession(session.folder)
    assert forms.teach_reader(TINY, again) == first
    assert "finished already" in caplog.text
    assert "Writing model shards" not in caplog.text
    shown = forms.compare_reading(again)
    assert shown.comparison.before.scores == first.before.scores
    assert shown.comparison.after.scores == first.after.scores
    assert len(shown.comparison.lines) == 6
    markup = shown._repr_html_()
    assert markup.count("data:image/jpeg") == 6
    assert "Wrong characters in 6 lines that were not learned from" in markup
    # What was measured on stays so, whatever is corrected later.
    for line in session.lines()[:12]:
        session.correct(line.key, None)
    assert forms.compare_reading(session).comparison.before.scores == first.before.scores
    session.correct(session.lines()[0].key, "another")
    other = forms.teach_reader(TINY, session)
    assert other.path != first.path
    assert first.path.is_dir()


@pytest.mark.slow
def test_the_taught_reader_is_shrunk_once_and_measured(session, caplog):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    caplog.set_level("INFO", "fastsd_helpers")
    for line in session.lines():
        session.correct(line.key, "fox")
    forms.teach_reader(TINY, session)
    shown = forms.shrink_reader(session)._repr_html_()
    assert "fp32" in shown
    assert "dynamic" in shown
    assert "static" in shown
    assert (session.folder / "int8" / "openvino" / "decoder.xml").is_file()
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
    assert "✋ No reader" in text_of(broken.box)
