"""Uploaded photos are shown with small images and removed one by one, after a second press."""

from typing import Any

import pytest
from test_second_visit import photo

from fastsd_helpers.dreambooth.photos.browser_uploads import list_uploads, save_uploads
from fastsd_helpers.forms import SessionConfig, open_session, show_photos_form
from fastsd_helpers.sessions import Session

pytest.importorskip("ipywidgets")


@pytest.fixture
def session() -> Session:
    made = open_session(SessionConfig(session_name="rex"))
    save_uploads(made, [(f"rex ({number}).png", photo(number)) for number in (1, 2, 3)])
    save_uploads(made, [("rex (2).txt", b"rex on a beach"), ("notes.txt", b"milk, eggs")])
    return made


def names(session: Session) -> list[str]:
    return [path.name for path in list_uploads(session)]


def opened(form: Any) -> Any:
    form._list.accordion.selected_index = 0
    return form._list


def tile_of(view: Any, name: str) -> Any:
    return next(tile for tile in view._tiles.children if name in tile.children[1].value)


def test_every_photo_has_a_picture_with_its_name_and_a_button_that_names_it(session: Session) -> None:
    form = show_photos_form(session)
    assert not form._list._tiles.children, "nothing is read before it is opened"
    view = opened(form)
    assert len(view._tiles.children) == 5
    tile = tile_of(view, "rex (2).png")
    assert 'alt="Uploaded photo rex (2).png"' in tile.children[0].value
    assert "data:image/jpeg" in tile.children[0].value
    assert "Remove rex (2).png" in tile.children[2].tooltip


def test_one_photo_goes_with_its_caption_after_a_second_press_and_the_others_stay(session: Session) -> None:
    view = opened(show_photos_form(session))
    tile_of(view, "rex (2).png").children[2].click()
    assert len(names(session)) == 5
    assert "Remove rex (2).png?" in view._message.value
    tile_of(view, "rex (2).png").children[2].click()
    assert names(session) == ["notes.txt", "rex (1).png", "rex (3).png"]
    assert "2 files removed" in view._message.value


def test_a_press_on_another_one_asks_again(session: Session) -> None:
    view = opened(show_photos_form(session))
    tile_of(view, "rex (1).png").children[2].click()
    tile_of(view, "rex (3).png").children[2].click()
    assert len(names(session)) == 5
    tile_of(view, "notes.txt").children[2].click()
    tile_of(view, "notes.txt").children[2].click()
    assert "notes.txt" not in names(session)
    assert len(names(session)) == 4


def test_all_go_after_a_second_press_and_the_form_names_none(session: Session) -> None:
    form = show_photos_form(session)
    form.update(images=str(session.folder / "uploads"))
    view = opened(form)
    view._all.click()
    assert len(names(session)) == 5
    view._sure.click()
    assert names(session) == []
    assert form.values()["images"] == ""
    assert "Nothing uploaded yet" in form._uploaded.value


def test_a_text_that_belongs_to_no_photo_is_no_caption(session: Session) -> None:
    said = show_photos_form(session)._uploaded.value
    assert "3 uploaded photos in this session, 1 with a caption." in said
    assert "notes.txt" in said


def test_a_photo_that_cannot_be_shown_can_be_removed_all_the_same(session: Session) -> None:
    (session.folder / "uploads" / "broken <b>.png").write_bytes(b"no picture")
    view = opened(show_photos_form(session))
    tile = tile_of(view, "broken &lt;b&gt;.png")
    assert "no image" in tile.children[0].value
    assert "<b>" not in tile.children[0].value.replace("<br>", "")
    tile.children[2].click()
    tile.children[2].click()
    assert "broken <b>.png" not in names(session)
