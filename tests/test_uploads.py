"""Uploads: a photo and its caption stay together, whatever comes twice, under one name, or in a zip."""

import io
import os
import random
import zipfile
from pathlib import Path

import pytest

from fastsd_helpers.dreambooth.photos.browser_uploads import (
    count_uploads,
    list_uploads,
    remove_uploads,
    save_uploads,
    uploads_folder,
)
from fastsd_helpers.dreambooth.photos.finding import open_photos
from fastsd_helpers.sessions import Session

Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.create("rex", root=tmp_path / "sessions")


def photo(seed: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", (48, 40), random.Random(seed).randbytes(48 * 40 * 3)).save(data, kind)
    return data.getvalue()


def zip_of(members: dict[str, bytes | str]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def captions(session: Session) -> dict[bytes, str | None]:
    """What `prepare` would find: each uploaded photo's bytes with its caption."""
    with open_photos(uploads_folder(session)) as photos:
        return {photos.read(name): photos.caption(name) for name in photos.names}


def test_two_folders_with_the_same_names_in_one_zip_stay_apart(session: Session) -> None:
    two = {"beach/IMG_0001.png": photo(1), "beach/IMG_0001.txt": "at the beach"}
    two |= {"home/IMG_0001.png": photo(2), "home/IMG_0001.txt": "at home"}
    save_uploads(session, [("photos.zip", zip_of(two))])
    assert captions(session) == {photo(1): "at the beach", photo(2): "at home"}


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("ending", [".png", ".webp"])
def test_two_selections_with_the_same_names_stay_apart(session: Session, one_by_one: bool, ending: str) -> None:
    kind = {".png": "PNG", ".webp": "WEBP"}[ending]
    for seed, words in ((1, b"at the beach"), (2, b"at home")):
        files = [(f"IMG_0001{ending}", photo(seed, kind)), ("IMG_0001.txt", words)]
        for call in [[file] for file in files] if one_by_one else [sorted(files, reverse=True)]:
            save_uploads(session, call)
    assert captions(session) == {photo(1, kind): "at the beach", photo(2, kind): "at home"}


def test_a_caption_that_comes_first_waits_for_its_photo(session: Session) -> None:
    save_uploads(session, [("dog.txt", b"a dog")])
    assert count_uploads(session)[:2] == (0, 0)
    save_uploads(session, [("dog.png", photo(1))])
    save_uploads(session, [("dog.png", photo(2))])
    assert captions(session) == {photo(1): "a dog", photo(2): None}


def test_a_caption_under_a_number_is_not_another_photos(session: Session) -> None:
    save_uploads(session, [("dog.png", photo(1)), ("dog (2).txt", b"of another photo")])
    save_uploads(session, [("dog.png", photo(2))])
    assert captions(session) == {photo(1): None, photo(2): None}


def test_a_newer_caption_of_a_photo_replaces_the_one_before_which_is_kept_out_of_sight(session: Session) -> None:
    save_uploads(session, [("dog.png", photo(1)), ("dog.txt", b"first")])
    report = save_uploads(session, [("dog.png", photo(1)), ("dog.txt", b"second")])
    assert report.saved == ("dog.txt",)
    assert captions(session) == {photo(1): "second"}
    kept = [path.read_bytes() for path in uploads_folder(session).iterdir() if path.name.startswith(".dog")]
    assert kept == [b"first\n"]


def test_a_name_that_differs_only_in_the_ending_shares_the_caption(session: Session) -> None:
    save_uploads(session, [("dog.png", photo(1)), ("dog.jpg", photo(2, "JPEG")), ("dog.txt", b"a dog")])
    assert set(captions(session).values()) == {"a dog"}


def test_forty_photos_that_come_twice_are_kept_once_and_said_once(session: Session) -> None:
    files = [(f"IMG_{number:04}.png", photo(number)) for number in range(40)]
    files += [("IMG_0003.txt", b"the third")]
    save_uploads(session, files)
    report = save_uploads(session, files)
    assert (report.saved, report.twins) == ((), 41)
    assert report.lines() == ["0 files added.", "41 files were here already, and are kept only once."]
    again = save_uploads(session, [("all.zip", zip_of(dict(files)))])
    assert again.saved == ()
    assert count_uploads(session)[:2] == (40, 1)


def test_a_folder_a_subject_keeps_its_words_and_repeats_are_said(session: Session) -> None:
    report = save_uploads(
        session, [("a.zip", zip_of({"10_zib dog/IMG_1.png": photo(1), "5_zob cat/IMG_1.png": photo(2)}))]
    )
    assert sorted(report.saved) == ["zib dog (1).png", "zob cat (1).png"]
    assert any("Repeats" in line for line in report.lines())


def test_only_captions_of_a_photo_are_counted_and_others_are_named(session: Session) -> None:
    save_uploads(session, [("a.png", photo(1)), ("b.png", photo(2)), ("a.txt", b"a"), ("notes.txt", b"buy milk")])
    photos, with_caption, notes = count_uploads(session)
    assert (photos, with_caption) == (2, 1)
    assert any("notes.txt" in note and "not used" in note for note in notes)


def test_a_table_of_captions_is_kept_and_one_that_matches_nothing_is_said(session: Session) -> None:
    save_uploads(session, [("a.png", photo(1)), ("metadata.csv", b"file_name,text\na.png,from the table\n")])
    assert captions(session) == {photo(1): "from the table"}
    save_uploads(session, [("metadata.csv", b"file_name,text\nx.png,words\n")])
    notes = count_uploads(session)[2]
    assert any(
        "metadata (2).csv has 1 caption, but none of the files it names is here (x.png)" in note for note in notes
    )


def test_zips_by_any_name_and_in_each_other_are_read(session: Session) -> None:
    inner = zip_of({"zib (1).png": photo(1), "zib (1).txt": "words"})
    save_uploads(session, [("outer.zip", zip_of({"photos.zip": inner})), ("photos.jpg", zip_of({"c.png": photo(3)}))])
    assert captions(session) == {photo(1): "words", photo(3): None}
    report = save_uploads(session, [("empty.zip", zip_of({"readme.md": "x"}))])
    assert report.skipped == (("empty.zip", "holds no images"),)


def test_what_is_no_photo_is_named_with_what_to_do(session: Session) -> None:
    files = [
        ("a.jxl", b"\xff\x0a" + os.urandom(50)),
        ("b.dng", b"II*\0" + os.urandom(50)),
        ("c.mp4", b"\0\0\0\x18ftypmp42"),
    ]
    files += [("d", photo(4)), ("e.dat", photo(5))]
    report = save_uploads(session, files)
    reasons = dict(report.skipped)
    assert "convert it to PNG or JPEG" in reasons["a.jxl"]
    assert "export it as JPEG" in reasons["b.dng"]
    assert "save single frames" in reasons["c.mp4"]
    assert len(report.saved) == 2, "their content decides where the ending says nothing"


def test_removing_uploads_leaves_no_memory_of_names(session: Session) -> None:
    save_uploads(session, [("a.png", photo(1)), ("a.png", photo(2)), ("a.txt", b"x")])
    assert remove_uploads(session) == len([1, 2, 3]) + 1
    assert list_uploads(session) == []
    save_uploads(session, [("a.png", photo(3)), ("a.txt", b"new")])
    assert captions(session) == {photo(3): "new"}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 5}', '{"a": ["../../x"]}'])
def test_a_damaged_memory_of_names_costs_nothing_and_leads_nowhere(session: Session, text: str, tmp_path: Path) -> None:
    save_uploads(session, [("a.png", photo(1))])
    (uploads_folder(session) / ".arrived.json").write_text(text)
    save_uploads(session, [("a.txt", b"words")])
    assert not list(tmp_path.glob("x*"))
    assert not list(session.folder.parent.glob("x*"))
    assert captions(session)[photo(1)] in ("words", None)
