"""A user's own photos and captions are never deleted or replaced, and what was made here is never taken for one."""

import hashlib
import io
import os
import random
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fakes import WriteBackMount

from fastsd_helpers.dreambooth.dataset import originals
from fastsd_helpers.dreambooth.dataset import prepared as dataset_module
from fastsd_helpers.dreambooth.dataset.captioning import set_caption
from fastsd_helpers.dreambooth.dataset.prepared import load_dataset
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.dreambooth.photos.finding import open_photos
from fastsd_helpers.errors import DatasetError, DiskFull
from fastsd_helpers.sessions import Session, delete_session, import_session

Image = pytest.importorskip("PIL.Image")


def photo(seed: int, size: tuple[int, int] = (120, 90), kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    coarse = Image.frombytes("RGB", (12, 9), random.Random(seed).randbytes(12 * 9 * 3))
    coarse.resize(size, Image.Resampling.NEAREST).save(data, kind)
    return data.getvalue()


def lay(folder: Path, count: int = 3, name: str = "zib dog ({}).jpg", first: int = 1) -> set[str]:
    """Put photos into a folder; returns their hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    found = set()
    for number in range(first, first + count):
        (folder / name.format(number)).write_bytes(photo(number))
        found.add(hashlib.sha256(photo(number)).hexdigest())
    return found


def hashes(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def run(session: Session, images: Path | str = "", **settings: Any) -> PrepareResult:
    return prepare(PrepareConfig(images=str(images), **{"size": 64, **settings}), session)


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.create("rex", root=tmp_path / "sessions")


@pytest.fixture
def old(tmp_path: Path) -> tuple[Session, set[str]]:
    """A session of the old notebook that lies among ours, with its photos' and captions' hashes."""
    folder = tmp_path / "sessions" / "old"
    known = lay(folder / "instance_images")
    (folder / "captions").mkdir()
    (folder / "captions" / "zib dog (1).txt").write_text("on a beach")
    (folder / "instance_images" / "zib dog (2).txt").write_text("at night")
    (folder / "old.ckpt").write_bytes(b"weights")
    known |= {hashlib.sha256(text).hexdigest() for text in (b"on a beach", b"at night", b"weights")}
    return import_session("old", root=tmp_path / "sessions").session, known


# ------------------------------------------------------------------------------------- an output that is the input


def test_a_session_that_was_taken_over_keeps_its_photos_and_is_prepared_from_them_again(
    old: tuple[Session, set[str]],
) -> None:
    session, known = old
    assert known <= hashes(session.folder)
    first = run(session)
    assert first.train == 3
    assert any("originals" in note for note in first.notes)
    assert known <= hashes(session.folder)
    prompts = sorted(image.prompt for image in load_dataset(session).train)
    assert prompts == ["zib dog", "zib dog at night", "zib dog on a beach"]
    larger = run(session, size=128)
    assert larger.train == 3
    assert not any("enlarged to 128" in line and "64 px" in line for line in larger.lines()), "not crops of crops"
    assert known <= hashes(session.folder)
    assert sorted(image.prompt for image in load_dataset(session).train) == prompts
    assert Path(session.record["dataset"]["settings"]["images"]).parent.name == "originals"


def test_photos_dropped_beside_prepared_pictures_are_set_aside_with_their_captions(
    session: Session, tmp_path: Path
) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    dropped = lay(session.instance_images, 2, "IMG_{}.jpg", first=7) | lay(
        session.held_out_images, 1, "h{}.jpg", first=20
    )
    (session.captions / "IMG_7.txt").write_text("seven")
    (session.captions / "poem.txt").write_text("of nothing here")
    result = run(session, size=128)
    assert result.train == 3
    assert dropped <= hashes(session.folder)
    home = session.folder / "originals"
    assert (home / "instance_images" / "IMG_7.txt").read_text() == "seven"
    assert (home / "captions" / "poem.txt").read_text() == "of nothing here"
    assert sorted(path.name for path in session.instance_images.iterdir()) == [
        f"zib dog ({number}).png" for number in (1, 2, 3)
    ]
    # Named, they are what is prepared.
    assert run(session, session.instance_images).train == 2
    assert "seven" in [image.prompt for image in load_dataset(session).train]


def test_a_prepared_picture_that_somebody_replaced_is_theirs(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    mine = photo(99, kind="PNG")
    (session.instance_images / "zib dog (2).png").write_bytes(mine)
    run(session, size=128)
    assert hashlib.sha256(mine).hexdigest() in hashes(session.folder / "originals")


def test_a_caption_written_for_a_photo_that_is_gone_is_kept(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    set_caption(session, "zib dog (2).png", "my own words")
    (tmp_path / "photos" / "zib dog (2).jpg").unlink()
    result = run(session, tmp_path / "photos")
    assert any("captions" in note for note in result.notes)
    assert "my own words\n" in [path.read_text() for path in (session.folder / "originals").rglob("*.txt")]


def test_a_caption_of_ones_own_lasts_through_any_number_of_prepares_and_clear_gives_the_photos_own(
    session: Session, tmp_path: Path
) -> None:
    lay(tmp_path / "photos")
    (tmp_path / "photos" / "zib dog (1).txt").write_text("came with it")
    run(session, tmp_path / "photos")
    set_caption(session, "zib dog (1).png", "mine")
    for size in (64, 128, 64):
        run(session, size=size)
        assert "mine" in [image.prompt for image in load_dataset(session).train]
    set_caption(session, "zib dog (1).png", None)
    assert "came with it" in [image.prompt for image in load_dataset(session).train]
    set_caption(session, "zib dog (2).png", " ")
    assert [image.prompt for image in load_dataset(session).train].count("zib dog") == 2


@pytest.mark.parametrize("how", ["instance_images", "the session", "a link to it", "nothing named"])
def test_whatever_way_the_sessions_own_folder_is_reached_its_photos_stay(
    session: Session, tmp_path: Path, how: str
) -> None:
    known = lay(session.instance_images)
    link = tmp_path / "link"
    link.symlink_to(session.instance_images)
    images = {"instance_images": session.instance_images, "the session": session.folder, "a link to it": link}
    for size in (64, 128):
        assert run(session, images.get(how, ""), size=size).train == 3
        assert known <= hashes(session.folder)


def test_photos_reached_by_links_in_the_folder_are_copied_and_what_they_lead_to_stays(
    session: Session, tmp_path: Path
) -> None:
    known = lay(tmp_path / "elsewhere")
    for path in (tmp_path / "elsewhere").iterdir():
        (session.instance_images / path.name).symlink_to(path)
    assert run(session).train == 3
    assert hashes(tmp_path / "elsewhere") == known <= hashes(session.folder)


def test_two_photos_of_one_name_are_both_kept(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    for seed in (50, 51):
        (session.instance_images / "IMG_1.jpg").write_bytes(photo(seed))
        run(session, tmp_path / "photos")
    assert {hashlib.sha256(photo(seed)).hexdigest() for seed in (50, 51)} <= hashes(session.folder / "originals")


def test_a_photo_that_is_dropped_while_others_are_read_is_kept(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    module = sys.modules[prepare.__module__]
    draw = module.draw_contact_sheet

    def drop(*arguments: Any, **named: Any) -> None:
        (session.instance_images / "late.jpg").write_bytes(photo(33))
        draw(*arguments, **named)

    monkeypatch.setattr(module, "draw_contact_sheet", drop)
    run(session, tmp_path / "photos", size=128)
    assert hashlib.sha256(photo(33)).hexdigest() in hashes(session.folder)


def test_without_room_for_the_copies_nothing_changes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    known = lay(session.instance_images)
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10)
    with pytest.raises(DiskFull, match="copies of your photos"):
        run(session)
    assert hashes(session.instance_images) == known


def test_a_session_that_was_copied_or_imported_has_its_own_originals(old: tuple[Session, set[str]]) -> None:
    session, known = old
    root = session.folder.parent
    run(session)
    shutil.copytree(session.folder, root / "twin")
    twin = Session.open("twin", root=root)
    run(twin, size=128)
    assert str(root / "twin") in twin.record["dataset"]["settings"]["images"]
    imported = import_session("third", source=session.folder, root=root).session
    assert {each for each in known if each in hashes(session.folder / "originals")} <= hashes(imported.folder)
    delete_session("old", root=root)
    for name in ("twin", "third"):
        assert run(Session.open(name, root=root), size=192).train == 3


# -------------------------------------------------------------------------------------------- cut anywhere


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("point", ["prepare.between", "prepare.before_record", "prepare.after_record"])
def test_a_prepare_cut_anywhere_loses_no_photo_and_is_done_again(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, late: bool
) -> None:
    class Cut(BaseException):
        pass

    def cut(name: str) -> None:
        if name == point:
            raise Cut

    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    before = sorted(image.sha256 for image in load_dataset(session).train)
    dropped = lay(session.instance_images, 2, "IMG_{}.jpg", first=7)
    monkeypatch.setattr(originals, "delivers_late", lambda folder: late)
    monkeypatch.setattr(dataset_module, "fault_point", cut)
    monkeypatch.setattr(dataset_module, "_remove", lambda folder: None)  # as a kill does no clearing up
    monkeypatch.setattr(sys.modules[prepare.__module__], "finish_exchange", lambda session: None)
    finish = dataset_module.finish_exchange
    monkeypatch.setattr(dataset_module, "finish_exchange", lambda session: None)
    with pytest.raises(Cut):
        run(session, size=128)
    monkeypatch.undo()
    monkeypatch.setattr(originals, "delivers_late", lambda folder: late)
    again = Session.open("rex", root=session.folder.parent)
    assert dropped <= hashes(session.folder)
    after = sorted(image.sha256 for image in load_dataset(again).train)
    assert (after == before) == (point != "prepare.after_record")
    finish(again)
    assert sorted(image.sha256 for image in load_dataset(again).train) == after
    assert run(again, size=192).train == 3
    assert dropped <= hashes(session.folder)


@pytest.mark.parametrize("seed", [0, 4, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 15))])
def test_a_mount_that_delivers_late_never_loses_a_photo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    view, cloud = tmp_path / "view", tmp_path / "cloud"
    known = lay(view / "old" / "instance_images")
    (view / "old" / "captions").mkdir()
    (view / "old" / "captions" / "zib dog (1).txt").write_text("on a beach")
    known.add(hashlib.sha256(b"on a beach").hexdigest())
    mount = WriteBackMount(view, cloud, seed)
    mount._delivered = {}
    mount.settle()
    monkeypatch.setattr(originals, "delivers_late", lambda folder: True)
    session = import_session("old", root=view).session
    for size in (64, 128):
        run(session, size=size)
        mount.step()
    mount.crash()
    assert known <= hashes(cloud)
    fresh = mount.fresh_view(tmp_path / "fresh")
    again = Session.open("old", root=fresh) if (fresh / "old" / "session.json").exists() else None
    if again is not None:
        # Where even the record was lost, nothing tells prepared pictures from a user's: they are kept too.
        assert run(again, size=64).train >= 3
        assert known <= hashes(fresh)


def test_on_such_a_mount_the_first_ones_go_once_the_copies_have_been_there_for_a_while(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = lay(session.instance_images)
    monkeypatch.setattr(originals, "delivers_late", lambda folder: True)
    run(session)
    assert len(list(session.instance_images.glob("*.jpg"))) == 3
    assert len(load_dataset(session).train) == 3
    for copy in (session.folder / "originals").rglob("*.jpg"):
        os.utime(copy, (copy.stat().st_atime - 500, copy.stat().st_mtime - 500))
    run(session, size=128)
    assert not list(session.instance_images.glob("*.jpg"))
    assert known <= hashes(session.folder)
    assert len(load_dataset(session).train) == 3


# -------------------------------------------------------------------------------------------- own output as input


def test_prepare_in_the_folder_where_the_sessions_are_reads_the_photos_alone(tmp_path: Path) -> None:
    lay(tmp_path)
    session = Session.create("rex", root=tmp_path / "Fast-Dreambooth" / "Sessions")
    other = Session.create("other", root=tmp_path / "Fast-Dreambooth" / "Sessions")
    lay(other.folder / "uploads", 2, "cat{}.jpg", first=30)
    for size in (64, 128, 64):
        (session.logs / "before-after.png").write_bytes(photo(60, kind="PNG"))
        (session.samples / "unet-1.png").write_bytes(photo(61, kind="PNG"))
        result = run(session, tmp_path, size=size)
        assert [item["source"] for item in result.images] == [f"zib dog ({number}).jpg" for number in (1, 2, 3)]
        assert result.skipped == ()
    assert any("are sessions" in note for note in result.notes)


@pytest.mark.parametrize("inside", ["samples", "logs", "exports", "class_images", "checkpoints", "instance_images"])
def test_a_folder_of_a_session_is_refused_with_where_the_photos_are(
    session: Session, tmp_path: Path, inside: str
) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    (session.folder / inside / "a.png").write_bytes((session.instance_images / "zib dog (1).png").read_bytes())
    other = Session.create("other", root=session.folder.parent)
    link = tmp_path / "link"
    link.symlink_to(session.folder / inside)
    for images in (session.folder / inside, link):
        with pytest.raises(DatasetError, match="part of the session rex"):
            run(other, images)
    if inside != "instance_images":  # what lies there beside the prepared pictures is a user's
        with pytest.raises(DatasetError, match="part of the session rex") as caught:
            run(session, session.folder / inside)
        assert str(tmp_path / "photos") in caught.value.hint


def test_copies_and_links_of_what_was_made_here_are_no_photos(session: Session, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    lay(folder)
    run(session, folder)
    (folder / "contact-sheet.png").write_bytes((session.logs / "contact-sheet.png").read_bytes())
    (folder / "before-after (1).png").write_bytes(photo(70, kind="PNG"))
    (folder / "copy of a crop.png").write_bytes((session.instance_images / "zib dog (1).png").read_bytes())
    other = Session.create("other", root=session.folder.parent)
    (other.samples / "drawn.png").write_bytes(photo(71, kind="PNG"))
    (folder / "a link.png").symlink_to(other.samples / "drawn.png")
    result = run(session, folder)
    assert result.train == 3
    assert [item["source"] for item in result.skipped] == ["copy of a crop.png"]
    assert "prepared here" in result.skipped[0]["reason"]


def test_of_a_zipped_session_only_what_a_person_gave_is_read(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    run(session, tmp_path / "photos")
    lay(session.folder / "uploads", 2, "zob cat ({}).jpg", first=30)
    shutil.make_archive(str(tmp_path / "all"), "zip", session.folder.parent)
    other = Session.create("other", root=tmp_path / "others")
    result = run(other, tmp_path / "all.zip")
    assert sorted(Path(item["source"]).name for item in result.images) == ["zob cat (30).jpg", "zob cat (31).jpg"]


def test_what_a_person_put_into_a_session_beside_its_own_folders_is_read(session: Session, tmp_path: Path) -> None:
    lay(session.folder / "my photos")
    for size in (64, 128):
        assert run(session, session.folder / "my photos", size=size).train == 3
    assert run(session, session.folder).train == 3
    (session.samples / "drawn.png").write_bytes(photo(71, kind="PNG"))
    other = Session.create("other", root=tmp_path / "others")
    assert run(other, session.folder).train == 3


def test_a_folder_with_a_session_json_of_another_program_is_read(tmp_path: Path) -> None:
    lay(tmp_path / "photos" / "set")
    (tmp_path / "photos" / "set" / "session.json").write_text('{"tabs": []}')
    with open_photos(tmp_path / "photos") as photos:
        assert len(photos.names) == 3


# ------------------------------------------------------------------------------- zips, tables and what is said


def test_a_folder_that_holds_only_a_zip_and_a_zip_in_a_zip_are_read(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    (tmp_path / "photos" / "zib dog (1).txt").write_text("words")
    inner = Path(shutil.make_archive(str(tmp_path / "holder" / "inner"), "zip", tmp_path / "photos"))
    assert run(session, inner.parent).train == 3
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as archive:
        archive.write(inner, "photos/inner.zip")
    assert run(session, tmp_path / "outer.zip").train == 3
    assert "words" in [image.prompt for image in load_dataset(session).train]
    shutil.copy(inner, tmp_path / "photos" / "again.zip")
    result = run(session, tmp_path / "photos")
    assert ("again.zip", True) in [(item["source"], "is a zip" in item["reason"]) for item in result.skipped]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "b.zip").write_bytes(b"PK\3\4 cut")
    with pytest.raises(DatasetError, match=r"b\.zip is damaged or not a zip file"):
        run(session, tmp_path / "broken")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "metadata.jsonl",
            '{"file_name": "a/IMG_1.jpg", "text": "one"}\n{"file_name": "a/IMG_2.jpg", "text": "two"}\n',
        ),
        ("metadata.csv", "file_name,caption\nIMG_1.jpg,one\nIMG_2.jpg,two\n"),
        ("captions.tsv", "image\tprompt\nIMG_1.jpg\tone\nIMG_2.jpg\ttwo\n"),
        ("meta_cap.json", '{"a/IMG_1": {"caption": "one"}, "IMG_2": {"caption": "two"}}'),
        ("a/IMG_1.caption", "one"),
        ("a/IMG_1.jpg.txt", "one"),
    ],
)
def test_captions_in_tables_and_other_trainers_files_are_read(
    session: Session, tmp_path: Path, name: str, text: str
) -> None:
    lay(tmp_path / "photos" / "a", 2, "IMG_{}.jpg")
    (tmp_path / "photos" / name).write_text(text)
    run(session, tmp_path / "photos")
    prompts = [image.prompt for image in load_dataset(session).train]
    assert prompts[0] == "one"
    assert len(prompts) == 2


def test_a_table_that_matches_nothing_and_captions_of_no_photo_are_said(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos")
    (tmp_path / "photos" / "metadata.jsonl").write_text('{"file_name": "x.jpg", "text": "words"}\n')
    (tmp_path / "photos" / "notes.txt").write_text("buy milk")
    said = " ".join(run(session, tmp_path / "photos").lines())
    assert "metadata.jsonl has 1 caption, but none of the files it names is here (x.jpg)" in said
    assert "1 caption file that match no photo, so not used: notes.txt" in said


def test_a_photo_that_is_given_twice_keeps_the_caption_of_either_and_is_said_once(
    session: Session, tmp_path: Path
) -> None:
    for folder in ("one", "two"):
        lay(tmp_path / "photos" / folder, 6)
    (tmp_path / "photos" / "two" / "zib dog (4).txt").write_text("with words")
    result = run(session, tmp_path / "photos")
    assert result.train == 6
    assert [line for line in result.lines() if "given twice" in line] == [
        "6 photos were given twice and are taken once (such as two/zib dog (1).jpg, which is the same image as "
        "one/zib dog (1).jpg)."
    ]
    assert "with words" in [image.prompt for image in load_dataset(session).train]


def test_a_link_to_a_drive_is_called_one(session: Session) -> None:
    with pytest.raises(DatasetError, match=r"from a link: https://drive\.google\.com/x") as caught:
        run(session, "https://drive.google.com/x")
    assert "Add shortcut" in caught.value.hint


def test_a_link_to_a_folder_on_drive_is_that_folder_where_drive_is(
    session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.dreambooth.dataset import photo_places

    lay(tmp_path / "shared")
    monkeypatch.setattr(photo_places, "shared_folder", lambda link: tmp_path / "shared")
    assert run(session, "https://drive.google.com/drive/folders/1AbC").train == 3
    assert session.record["dataset"]["settings"]["images"] == str(tmp_path / "shared")


@pytest.mark.parametrize(("name", "advice"), [("a.jxl", "convert it"), ("b.dng", "export it"), ("c.mp4", "frames")])
def test_other_kinds_of_files_are_named_with_how_they_become_photos(
    session: Session, tmp_path: Path, name: str, advice: str
) -> None:
    lay(tmp_path / "photos")
    (tmp_path / "photos" / name).write_bytes(b"II*\0" + bytes(100))
    assert any(advice in item["reason"] for item in run(session, tmp_path / "photos").skipped)


# ---------------------------------------------------------------------------------- prompts, hold-out, the report


def test_the_exact_prompts_are_shown_and_that_they_differ(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos", 3, "rex{}.jpg")
    assert "Prompt of all 3 images: rex" in run(session, tmp_path / "photos").lines()
    lay(tmp_path / "photos", 1, "max.jpg", first=9)
    lines = run(session, tmp_path / "photos").lines()
    place = lines.index("4 images with 2 different prompts:")
    assert lines[place + 1 : place + 3] == ["  3 x rex", "  1 x max"]
    assert "one prompt" in lines[place + 3]


def test_a_subjects_only_photo_is_trained_on_and_hold_out_can_be_switched_off(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos", 9)
    lay(tmp_path / "photos", 1, "zob fish.jpg", first=40)
    result = run(session, tmp_path / "photos")
    assert result.held_out == 1
    assert "zob fish" in [image.prompt for image in load_dataset(session).train]
    assert any(note.startswith("Held out: zib dog (9).png") for note in result.notes)
    assert run(session, tmp_path / "photos", hold_out="none").held_out == 0


def test_what_a_name_says_and_a_held_out_photo_stay_as_recorded_under_another_name(
    session: Session, tmp_path: Path
) -> None:
    lay(tmp_path / "photos", 10, "IMG_{}.jpg")
    run(session, tmp_path / "photos")
    before = [(image.path.name, image.prompt) for image in load_dataset(session).train]
    session.folder.rename(session.folder.with_name("max"))
    renamed = Session.open("max", root=session.folder.parent)
    assert [(image.path.name, image.prompt) for image in load_dataset(renamed).train] == before
    assert {prompt for _name, prompt in before} == {"rex"}


def test_a_session_prepared_by_the_version_before_has_the_prompts_it_had(session: Session, tmp_path: Path) -> None:
    lay(tmp_path / "photos", 3, "IMG_{}.jpg")
    run(session, tmp_path / "photos")
    dataset = session.record["dataset"]
    names = ["rex1.png", "Capture d’écran 1.png", "IMG_3.png"]
    for item, name in zip(dataset["images"], names, strict=True):
        os.rename(session.folder / item["file"], session.instance_images / name)
        item["file"] = f"instance_images/{name}"
        for key in ("stem_words", "came_with"):
            del item[key]
    del dataset["unnamed"]
    session.save(dataset=dataset)
    assert [image.prompt for image in load_dataset(session).train] == ["rex1", "Capture d’écran 1", "rex"]


def test_cells_that_are_run_again_keep_what_a_run_began_with_and_the_next_prepare_takes_the_new_rules(
    session: Session, tmp_path: Path
) -> None:
    from fastsd_helpers.forms.dreambooth.notebook import prepare_pictures

    lay(tmp_path / "photos", 4, "rex{}.jpg")
    config = PrepareConfig(images=str(tmp_path / "photos"), size=64)
    prepare_pictures(config, session)
    dataset = session.record["dataset"]
    for item in dataset["images"]:  # as the version before prepared them
        item["stem_words"] = Path(item["source"]).stem
    del dataset["settings"]["hold_out"]
    session.save(dataset=dataset, run=1, progress={"stage": "unet", "step": 3, "steps": 9})
    before = [image.prompt for image in load_dataset(session).train]
    assert "rex2" in before
    kept = prepare_pictures(config, session)
    assert [image.prompt for image in load_dataset(session).train] == before
    assert ("rex2", 1) in kept.prompts
    again = prepare(config, session)
    assert again.prompts == (("rex", 4),)
    assert any("Training has started on other images or prompts" in note for note in again.notes)
    session.save(dataset=dataset)
    (tmp_path / "photos" / "rex2.txt").write_text("a caption of its own")
    prepare_pictures(config, session)
    assert "a caption of its own" in [image.prompt for image in load_dataset(session).train]
