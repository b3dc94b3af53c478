"""Sessions of the old fast-DreamBooth notebook, and of other accounts, become sessions here."""

import errno
import hashlib
import io
import os
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from fakes import full_disk

from fastsd_helpers.cli import main
from fastsd_helpers.drive import shared_folder
from fastsd_helpers.errors import DatasetError, DiskFull, DriveError, SessionError, SessionExists
from fastsd_helpers.sessions import Session, import_session, is_old_session, list_sessions

Image = pytest.importorskip("PIL.Image")


def picture(colour: int) -> bytes:
    data = io.BytesIO()
    Image.frombytes("RGB", (96, 80), random.Random(colour).randbytes(96 * 80 * 3)).save(data, "JPEG")
    return data.getvalue()


def old_session(
    folder: Path, *, zipped: bool = False, step: int | None = None, captions: bool = True, trained: bool = True
) -> Path:
    """A session as the old notebook leaves it: see the table of its cells in its own documentation.

    `{name}.ckpt` or `{name}_step_N.ckpt`; instance_images/ with the prompt in the file names (blanks became dashes),
    captions/ with the words after the prompt; both as zips beside them; no record of any kind.
    """
    folder.mkdir(parents=True)
    images = {f"zib-dog-({number}).jpg": picture(number) for number in (1, 2, 3)}
    texts = {"zib-dog-(1).txt": "on a beach", "zib-dog-(2).txt": "zib dog in the snow"} if captions else {}
    for name, files in (("instance_images", images), ("captions", texts)):
        with zipfile.ZipFile(folder / f"{name}.zip", "w") as archive:
            for file, data in files.items():
                archive.writestr(f"{name}/{file}", data)
        if not zipped:
            (folder / name).mkdir()
            for file, data in files.items():
                content = data if isinstance(data, bytes) else data.encode()
                (folder / name / file).write_bytes(content)
    if trained:
        (folder / f"{folder.name}.ckpt").write_bytes(b"finished weights")
    if step:
        (folder / f"{folder.name}_step_{step}.ckpt").write_bytes(b"weights of a step")
    return folder


def content_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("zipped", [False, True])
def test_an_old_session_is_copied_and_its_own_folder_only_read(tmp_path: Path, zipped: bool) -> None:
    origin = old_session(tmp_path / "their drive" / "my_dog", zipped=zipped, step=500)
    before = content_of(origin)
    result = import_session("rex", source=origin, root=tmp_path / "sessions")
    assert content_of(origin) == before
    session = Session.open("rex", root=tmp_path / "sessions")
    assert session.notices == []
    assert (result.pictures, result.captions) == (3, 2)
    names = sorted(path.name for path in session.instance_images.iterdir())
    assert names == [f"zib-dog-({number}).jpg" for number in (1, 2, 3)]
    assert (session.instance_images / names[1]).read_bytes() == picture(2)
    assert session.record["imported"]["by"] == "fast-DreamBooth"
    assert result.checkpoint == session.exports / "my_dog.ckpt"
    assert result.checkpoint.read_bytes() == b"finished weights"
    assert "my_dog_step_500.ckpt" in " ".join(result.notes)
    assert [item.name for item in list_sessions(tmp_path / "sessions")] == ["rex"]


def test_its_captions_become_whole_prompts(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "old" / "my_dog")
    session = import_session("rex", source=origin, root=tmp_path / "sessions").session
    assert (session.captions / "zib-dog-(1).txt").read_text() == "zib dog on a beach\n"
    assert (session.captions / "zib-dog-(2).txt").read_text() == "zib dog in the snow\n", "not said twice"
    assert not (session.captions / "zib-dog-(3).txt").exists()


def test_prepare_and_the_prompts_need_nothing_more(tmp_path: Path) -> None:
    from fastsd_helpers.dreambooth.dataset.prepared import prompt_table
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare

    origin = old_session(tmp_path / "old" / "my_dog")
    session = import_session("rex", source=origin, root=tmp_path / "sessions").session
    assert prepare(PrepareConfig(size=64), session).train == 3
    prompts = {row.image: row.prompt for row in prompt_table(session)}
    assert sorted(prompts.values()) == ["zib dog", "zib dog in the snow", "zib dog on a beach"]


def test_among_our_sessions_it_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = old_session(tmp_path / "sessions" / "my_dog", step=500)
    kept = {name: sha for name, sha in content_of(folder).items() if not name.startswith("captions/")}
    assert is_old_session(folder)
    result = import_session("my_dog", root=tmp_path / "sessions")
    assert not is_old_session(folder)
    assert result.checkpoint == folder / "my_dog.ckpt"
    there = content_of(folder)
    assert {name: there.get(name) for name in kept} == kept, "nothing was moved, changed or deleted"
    assert Session.open("my_dog", root=tmp_path / "sessions").notices == []
    with pytest.raises(SessionError, match="imported already"):
        import_session("my_dog", root=tmp_path / "sessions")


def test_a_damaged_session_of_ours_is_not_taken_for_an_old_one(tmp_path: Path) -> None:
    session = Session.create("rex", root=tmp_path)
    assert not is_old_session(session.folder)
    (session.instance_images / "a.png").write_bytes(picture(1))
    (session.folder / "session.json").unlink()
    for twin in (session.folder / ".record").iterdir():
        twin.unlink()
    (session.folder / ".record").rmdir()
    assert not is_old_session(session.folder), "it is rebuilt from its checkpoints when it is opened"
    (tmp_path / "empty" / "instance_images").mkdir(parents=True)
    assert not is_old_session(tmp_path / "empty")


def test_captions_that_lie_beside_the_pictures_count_too(tmp_path: Path) -> None:
    from fastsd_helpers.dreambooth.dataset.prepared import prompt_table
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare

    folder = old_session(tmp_path / "sessions" / "my_dog", captions=False)
    (folder / "instance_images" / "zib-dog-(3).txt").write_text("at night")
    session = import_session("my_dog", root=tmp_path / "sessions").session
    prepare(PrepareConfig(size=64), session)
    assert "zib dog at night" in {row.prompt for row in prompt_table(session)}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["my_dog.ckpt", "my_dog_step_900.ckpt"], "my_dog.ckpt"),
        (["my_dog_step_900.ckpt", "my_dog_step_1000.ckpt"], "my_dog_step_1000.ckpt"),
        (["renamed.ckpt", "my_dog_step_1000.ckpt"], "renamed.ckpt"),
    ],
)
def test_the_finished_model_is_chosen_else_the_latest_step(tmp_path: Path, names: list[str], expected: str) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", trained=False)
    for name in names:
        (origin / name).write_bytes(name.encode())
    result = import_session("rex", source=origin, root=tmp_path / "sessions")
    assert result.checkpoint is not None
    assert result.checkpoint.name == expected
    assert "fastsd convert" in " ".join(result.notes), "how to go on from it"


def test_a_session_without_pictures_says_so(tmp_path: Path) -> None:
    origin = tmp_path / "old" / "bare"
    origin.mkdir(parents=True)
    (origin / "bare.ckpt").write_bytes(b"weights")
    result = import_session("bare", source=origin, root=tmp_path / "sessions")
    assert result.pictures == 0
    assert "no images" in " ".join(result.lines())


# ------------------------------------------------------------------------------------------- bad input


def test_a_folder_that_is_no_session_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "film.mp4").write_bytes(b"x")
    with pytest.raises(SessionError, match="is not a session") as caught:
        import_session("rex", source=tmp_path / "holiday", root=tmp_path / "sessions")
    assert "instance_images.zip" in caught.value.hint
    assert not (tmp_path / "sessions" / "rex").exists()
    with pytest.raises(SessionError, match="is not a session"):
        import_session("rex", source=tmp_path / "nowhere", root=tmp_path / "sessions")


def test_a_name_that_is_taken_is_refused_and_what_is_there_stays(tmp_path: Path) -> None:
    Session.create("rex", root=tmp_path / "sessions").save(seed=5)
    with pytest.raises(SessionExists):
        import_session("rex", source=old_session(tmp_path / "old" / "my_dog"), root=tmp_path / "sessions")
    assert Session.open("rex", root=tmp_path / "sessions").record["seed"] == 5


LEADS_OUT = ["../rex", "..", ".", "", "a/../../rex", "sub/rex", "rex/", "/", "{outside}/rex"]
NOT_ALLOWED = [
    *LEADS_OUT,
    "   ",
    "a\\b",
    ".hidden",
    "-rf",
    "rex.",
    "CON",
    "nul.txt",
    "what?",
    "a\0b",
    "x" * 300,
    "\u202erex",
]


@pytest.mark.parametrize("name", NOT_ALLOWED)
def test_a_name_that_cannot_be_a_sessions_is_refused_at_every_way_in(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever makes a session: created, copied from the old notebook's or from one of ours, in Python and typed."""
    root = tmp_path / "ours" / "sessions"
    Session.create("bello", root=root)
    theirs = Session.create("theirs", root=tmp_path / "account")
    (theirs.instance_images / "a (1).jpg").write_bytes(picture(1))
    old = old_session(tmp_path / "old" / "my_dog")
    name = name.format(outside=tmp_path / "outside")
    before = {path: content_of(path) for path in (tmp_path / "ours", tmp_path / "account", tmp_path / "old")}
    there = sorted(tmp_path.iterdir())
    with pytest.raises(SessionError, match=r"^The session name "):
        Session.create(name, root=root)
    for origin in (old, theirs.folder):
        with pytest.raises(SessionError, match=r"^The session name ") as caught:
            import_session(name, source=origin, root=root)
        assert "Use for example" in caught.value.hint
    for words in (["new", name], ["import", name, "--from", str(old)]):
        if not name.startswith("-"):  # that is a flag
            assert main(["dreambooth", *words, "--root", str(root)]) == 2
            assert "The session name" in capsys.readouterr().err
    assert {path: content_of(path) for path in before} == before
    assert sorted(tmp_path.iterdir()) == there


@pytest.mark.parametrize("name", LEADS_OUT)
def test_a_session_in_place_is_one_of_the_folders_there_and_no_other(tmp_path: Path, name: str) -> None:
    root = tmp_path / "ours" / "sessions"
    for folder in (root / "rex", root / "sub" / "rex", tmp_path / "ours" / "rex", tmp_path / "outside" / "rex"):
        old_session(folder)
    (tmp_path / "ours" / "loose.ckpt").write_bytes(b"makes the parent look like a session")
    (root / "loose.ckpt").write_bytes(b"and the folder itself")
    before = content_of(tmp_path)
    with pytest.raises(SessionError, match="is not the name of a folder in"):
        import_session(name.format(outside=tmp_path / "outside"), root=root)
    assert content_of(tmp_path) == before
    with pytest.raises(SessionError):
        Session.open(name.format(outside=tmp_path / "outside"), root=root)


@pytest.mark.parametrize("name", ["My dog (2)!", "rex.", "CON", "what;", "zib's dog", "x" * 200])
def test_an_old_session_in_place_keeps_a_name_that_would_be_refused_today(tmp_path: Path, name: str) -> None:
    root = tmp_path / "sessions"
    old_session(root / name)
    result = import_session(name, root=root)
    assert result.session.folder == root / name
    assert Session.open(name, root=root).record["name"] == name
    with pytest.raises(SessionError):
        Session.create(name, root=tmp_path / "elsewhere")


def test_an_imported_sessions_name_is_made_a_folders_as_a_new_ones_is(tmp_path: Path) -> None:
    result = import_session(" my old  dog ", source=old_session(tmp_path / "old" / "x"), root=tmp_path / "sessions")
    assert result.session.name == result.session.folder.name == "my_old_dog"
    assert Session.create(" my old  cat ", root=tmp_path / "sessions").name == "my_old_cat"


@pytest.mark.parametrize("name", ["../evil.jpg", "/etc/evil.jpg", "a/../../evil.jpg", "..\\evil.jpg"])
def test_an_unsafe_zip_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", zipped=True)
    with zipfile.ZipFile(origin / "instance_images.zip", "w") as archive:
        archive.writestr(name, picture(1))
    with pytest.raises(DatasetError, match="unsafe name"):
        import_session("rex", source=origin, root=tmp_path / "sessions")
    assert not list(tmp_path.rglob("evil.jpg"))
    assert not (tmp_path / "sessions" / "rex").exists()


def test_a_damaged_zip_is_a_sentence(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", zipped=True)
    (origin / "instance_images.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DatasetError, match=r"instance_images\.zip is damaged"):
        import_session("rex", source=origin, root=tmp_path / "sessions")


def test_room_is_asked_for_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = old_session(tmp_path / "old" / "my_dog")
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10)
    with pytest.raises(DiskFull, match="needed for the import"):
        import_session("rex", source=origin, root=tmp_path / "sessions")


def test_an_import_that_was_cut_leaves_no_half_session_and_is_done_again(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "old" / "my_dog")
    root = tmp_path / "sessions"
    root.mkdir()
    with pytest.raises(DriveError), full_disk(root, after_bytes=9_000, code=errno.EIO):
        import_session("rex", source=origin, root=root)
    assert list_sessions(root) == []
    assert import_session("rex", source=origin, root=root).pictures == 3
    assert sorted(os.listdir(root)) == ["rex"]


# ------------------------------------------------------------------------------- somebody else's session of ours


def test_a_session_of_another_account_is_copied_with_its_record_and_compared(tmp_path: Path) -> None:
    theirs = Session.create("their-dog", root=tmp_path / "shared")
    theirs.save(seed=77, dataset={"images": []}, progress={"stage": "unet", "step": 5, "steps": 9})
    (theirs.checkpoints / "000001-unet").mkdir()
    (theirs.checkpoints / "000001-unet" / "weights.safetensors").write_bytes(b"w" * 1000)
    (theirs.folder / ".lock").write_text("{}")
    before = content_of(theirs.folder)
    session = import_session("rex", source=theirs.folder, root=tmp_path / "sessions").session
    assert content_of(theirs.folder) == before
    assert (session.record["seed"], session.record["progress"]["step"]) == (77, 5)
    assert session.record["id"] != theirs.record["id"], "two sessions must not share scratch folders"
    assert session.record["name"] == "rex"
    assert (session.checkpoints / "000001-unet" / "weights.safetensors").read_bytes() == b"w" * 1000
    assert not (session.folder / ".lock").exists()


class Shortcuts:
    """A mounted Drive with one shortcut to a shared folder, as Colab shows it; the mount itself is Google's."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.point = tmp_path / "drive"
        (self.point / "MyDrive").mkdir(parents=True)
        monkeypatch.setattr("fastsd_helpers.drive.MOUNT_POINTS", (self.point,))
        monkeypatch.setattr("fastsd_helpers.drive.where", lambda: "colab")


def test_the_link_of_a_shared_folder_leads_to_its_shortcut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Shortcuts(tmp_path, monkeypatch)
    folder = drive.point / ".shortcut-targets-by-id" / "1AbCdEfGhIjK_-x" / "my_dog"
    folder.mkdir(parents=True)
    for link in (
        "https://drive.google.com/drive/folders/1AbCdEfGhIjK_-x?usp=sharing",
        "https://drive.google.com/drive/u/1/folders/1AbCdEfGhIjK_-x",
        "https://drive.google.com/open?id=1AbCdEfGhIjK_-x",
    ):
        assert shared_folder(link) == folder


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ("https://drive.google.com/drive/folders/1ZzZzZzZzZzZ", "Add shortcut"),
        ("https://drive.google.com/file/d/1AbCdEfGhIjK/view", "It looks like"),
    ],
)
def test_a_link_that_leads_nowhere_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str, words: str
) -> None:
    Shortcuts(tmp_path, monkeypatch)
    with pytest.raises(DriveError) as caught:
        shared_folder(link)
    assert words in caught.value.hint


# -------------------------------------------------------------------------------------------- command line


def test_the_command_imports_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    from fastsd_helpers.cli import main

    origin = old_session(tmp_path / "old" / "my_dog")
    root = str(tmp_path / "sessions")
    assert main(["dreambooth", "import", "rex", "--from", str(origin), "--root", root, "--json"]) == 0
    answer: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["session"], answer["pictures"], answer["captions"]) == ("rex", 3, 2)
    assert answer["path"] == str(tmp_path / "sessions" / "rex")
    assert main(["dreambooth", "import", "rex", "--from", str(origin), "--root", root]) == 2
    assert "Choose another name" in capsys.readouterr().err


def test_the_command_shows_and_changes_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastsd_helpers.cli import main
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare

    origin = old_session(tmp_path / "old" / "my_dog")
    root = tmp_path / "sessions"
    prepare(PrepareConfig(size=64), import_session("rex", source=origin, root=root).session)
    words = ["dreambooth", "caption", "rex", "--root", str(root)]
    names = sorted(path.stem for path in Session.open("rex", root=root).instance_images.iterdir())
    assert main([*words, "--set", f"{names[2]}=zib dog asleep", "--clear", f"{names[0]}.png"]) == 0
    shown = capsys.readouterr().out
    assert "zib dog asleep" in shown
    assert "zib dog on a beach" in shown, "what the photo came with"
    assert main([*words, "--set", "cat.png=a cat", "--clear", names[1]]) == 2
    said = capsys.readouterr().err
    assert "No prepared image is named 'cat.png'" in said
    assert names[0] in said
    assert main([*words, "--set", "no equals sign"]) == 2
    assert "FILE=WORDS" in capsys.readouterr().err
    assert "in the snow" in "".join(path.read_text() for path in Session.open("rex", root=root).captions.iterdir())


# --------------------------------------------------------------------------- zips, captions and models, one by one


def zip_of(path: Path, members: dict[str, bytes], *, modes: dict[str, int] | None = None) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (modes or {}).get(name, 0o100644) << 16
            archive.writestr(info, data)


def leave_free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(2**40, 2**40 - count, count))


@pytest.fixture
def zipped(tmp_path: Path) -> Path:
    """An old session whose images and captions are zips; to be written over."""
    return old_session(tmp_path / "old" / "my_dog", zipped=True)


def test_of_a_zip_only_pictures_are_taken_whatever_folder_they_lie_in(zipped: Path, tmp_path: Path) -> None:
    members = {
        "instance_images/deep/a.JPG": picture(1),
        "b.png": picture(2),
        "win\\c.webp": picture(3),
        "notes.txt": b"x",
        ".hidden.jpg": picture(4),
        "__MACOSX/._b.png": b"x",
        "__MACOSX/b2.png": b"x",
    }
    zip_of(zipped / "instance_images.zip", members, modes={"b.png": 0})
    session = import_session("rex", source=zipped, root=tmp_path / "sessions").session
    assert sorted(path.name for path in session.instance_images.iterdir()) == ["a.JPG", "b.png", "c.webp"]
    assert (session.instance_images / "a.JPG").read_bytes() == picture(1)
    assert (session.instance_images / "c.webp").read_bytes() == picture(3)


def test_a_link_in_a_zip_is_refused(zipped: Path, tmp_path: Path) -> None:
    import stat

    members = {"a.jpg": b"/etc/passwd", "b.jpg": picture(1)}
    zip_of(zipped / "instance_images.zip", members, modes={"a.jpg": stat.S_IFLNK | 0o777})
    with pytest.raises(DatasetError, match=r"holds an unsafe name: 'a\.jpg'"):
        import_session("rex", source=zipped, root=tmp_path / "sessions")
    zip_of(zipped / "instance_images.zip", members, modes={"a.jpg": stat.S_IFREG | 0o644})
    assert import_session("rex", source=zipped, root=tmp_path / "sessions").pictures == 2


def test_a_name_that_ends_early_for_some_is_refused(zipped: Path, tmp_path: Path) -> None:
    """Programs in C read a name up to its first zero byte: they and we would unpack different files."""
    zip_of(zipped / "instance_images.zip", {"ab.exe_.jpg": picture(1)})
    data = (zipped / "instance_images.zip").read_bytes()
    assert data.count(b"ab.exe_.jpg") == 2
    (zipped / "instance_images.zip").write_bytes(data.replace(b"ab.exe_.jpg", b"ab.exe\0.jpg"))
    with pytest.raises(DatasetError, match="holds an unsafe name"):
        import_session("rex", source=zipped, root=tmp_path / "sessions")


def test_zips_of_too_much_are_refused_at_their_bounds(
    zipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.sessions import importing

    pictures = {f"{number}.jpg": picture(number) for number in range(3)}
    zip_of(zipped / "instance_images.zip", pictures)
    largest = max(len(data) for data in pictures.values())
    for most, least_bytes, said in [(2, 10**9, "holds 3 files"), (3, largest - 1, "MiB")]:
        monkeypatch.setattr(importing, "_MOST_MEMBERS", most)
        monkeypatch.setattr(importing, "_MOST_BYTES", least_bytes)
        with pytest.raises(DatasetError, match=said):
            import_session("rex", source=zipped, root=tmp_path / "sessions")
    monkeypatch.setattr(importing, "_MOST_BYTES", largest)
    assert import_session("rex", source=zipped, root=tmp_path / "sessions").pictures == 3


def test_captions_come_from_the_zip_the_pictures_folder_and_the_captions_folder_the_last_wins(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", captions=False)
    zip_of(
        origin / "captions.zip",
        {
            "captions/zib-dog-(1).txt": b"zip one",
            "zib-dog-(2).txt": b"zip two",
            "cat.txt": b"nobody",
            "zib-dog-(3).md": b"x",
        },
    )
    (origin / "instance_images" / "zib-dog-(2).txt").write_text("beside two")
    (origin / "instance_images" / "zib-dog-(3).txt").write_text("beside three")
    (origin / "captions").mkdir(exist_ok=True)
    (origin / "captions" / "zib-dog-(3).txt").write_text("ZIB Dog three")
    (origin / "captions" / "zib-dog-(1).txt").write_text("  ")
    result = import_session("rex", source=origin, root=tmp_path / "sessions")
    texts = {path.name: path.read_text().strip() for path in result.session.captions.iterdir()}
    assert texts == {
        "zib-dog-(1).txt": "zib dog zip one",
        "zib-dog-(2).txt": "zib dog beside two",
        "zib-dog-(3).txt": "ZIB Dog three",
    }
    assert result.captions == 3
    assert result.lines()[0] == "Imported rex: 3 images and 3 captions."
    assert any("Each caption became the whole prompt" in note for note in result.notes)


def test_in_place_nothing_is_written_to_a_caption_and_prepare_makes_it_whole(tmp_path: Path) -> None:
    folder = old_session(tmp_path / "sessions" / "my_dog", captions=False, trained=False)
    (folder / "instance_images" / "zib-dog-(3).txt").write_text("at night")
    result = import_session("my_dog", root=tmp_path / "sessions")
    assert (folder / "instance_images" / "zib-dog-(3).txt").read_text() == "at night"
    assert not (folder / "instance_images" / "zib-dog-(1).txt").exists()
    assert result.lines()[0] == "Imported my_dog: 3 images and 1 captions."
    assert result.checkpoint is None
    assert "checkpoint" not in result.session.record["imported"]


def test_what_else_lies_there_is_said(tmp_path: Path) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", step=500, captions=False)
    plain = import_session("plain", source=origin, root=tmp_path / "sessions")
    assert plain.lines()[0] == "Imported plain: 3 images."
    assert "Not imported: my_dog_step_500.ckpt." in plain.notes
    assert not any("concept images" in note or "prompt" in note for note in plain.notes)
    about = plain.session.record["imported"]
    assert (about["checkpoint"], about["bytes"]) == ("exports/my_dog.ckpt", len(b"finished weights"))
    assert about["sha256"] == hashlib.sha256(b"finished weights").hexdigest()
    assert about["from"] == str(origin)
    for make in (lambda path: path.mkdir(), lambda path: path.with_suffix(".zip").write_bytes(b"x")):
        other = old_session(tmp_path / f"old-{make.__code__.co_firstlineno}-{len(list(tmp_path.iterdir()))}" / "my_cat")
        make(other / "concept_images")
        result = import_session(other.parent.name, source=other, root=tmp_path / "sessions")
        assert any("concept images are not imported" in note for note in result.notes)
        assert not any("Not imported" in note for note in result.notes)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["my_dog_step_5.ckpt", "other_step_40.ckpt"], "other_step_40.ckpt"),
        (["a.ckpt", "b.ckpt"], "b.ckpt"),
        (["z.ckpt", "my_dog.ckpt"], "my_dog.ckpt"),
        (["my_dog_step_0.ckpt"], "my_dog_step_0.ckpt"),
        (["my_dog_step_7x.ckpt", "my_dog_step_9.ckpt"], "my_dog_step_7x.ckpt"),
    ],
)
def test_of_several_models_the_finished_one_of_its_name_comes_first(
    tmp_path: Path, names: list[str], expected: str
) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", trained=False)
    (origin / "folder.ckpt").mkdir()
    for name in names:
        (origin / name).write_bytes(name.encode())
    result = import_session("rex", source=origin, root=tmp_path / "sessions")
    assert result.checkpoint is not None
    assert result.checkpoint.read_bytes() == expected.encode()
    left = [note for note in result.notes if note.startswith("Not imported")]
    assert len(left) == (len(names) > 1)


@pytest.mark.parametrize(
    ("made", "old"),
    [
        (["instance_images.zip"], True),
        (["captions.zip"], True),
        (["any.ckpt"], True),
        (["instance_images/a.JPEG"], True),
        (["instance_images/a.txt"], False),
        (["instance_images/.a.jpg"], False),
        (["instance_images/folder.jpg/a.jpg"], False),
        (["any.ckpt", "session.json"], False),
        (["any.ckpt", ".record/1"], False),
        (["any.ckpt", "checkpoints/x"], False),
        (["any.ckpt", "exports/x"], False),
        (["any.ckpt", "samples/x"], False),
        (["any.ckpt", "held_out_images/x"], False),
        (["film.mp4"], False),
        ([], False),
    ],
)
def test_an_old_session_is_known_by_what_lies_in_it(tmp_path: Path, made: list[str], old: bool) -> None:
    for name in made:
        (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / name).write_bytes(b"x")
    assert is_old_session(tmp_path / "x") is old


def test_room_is_asked_for_all_that_is_copied_and_a_little_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five per cent more: at exactly that much room the import goes through, with a byte less it does not."""
    origin = old_session(tmp_path / "old" / "my_dog")
    copied = [*(origin / "instance_images").iterdir(), origin / "instance_images.zip", origin / "my_dog.ckpt"]
    with open(origin / "my_dog.ckpt", "ab") as model:
        model.write(bytes(-sum(path.stat().st_size for path in copied) % 400))
    needed = sum(path.stat().st_size for path in copied)
    room = needed * 21 // 20
    assert needed * 1.05 == room
    leave_free(monkeypatch, room - 1)
    with pytest.raises(DiskFull, match="needed for the import"):
        import_session("rex", source=origin, root=tmp_path / "sessions")
    assert not (tmp_path / "sessions").exists()
    leave_free(monkeypatch, room)
    assert import_session("rex", source=origin, root=tmp_path / "sessions").pictures == 3
    in_place = old_session(tmp_path / "sessions" / "bello", zipped=True)
    (in_place / "bello.ckpt").write_bytes(bytes(10 * needed))
    assert import_session("bello", root=tmp_path / "sessions").pictures == 3, "its model is not copied"


@pytest.mark.parametrize("what", ["pictures", "zip", "model"])
def test_each_kind_of_what_is_copied_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    origin = old_session(tmp_path / "old" / "my_dog", zipped=what == "zip", trained=what == "model")
    if what == "model":
        (origin / "my_dog.ckpt").write_bytes(bytes(2_000_000))
    elif what == "zip":
        with zipfile.ZipFile(origin / "instance_images.zip", "a") as archive:
            archive.writestr("notes.bin", bytes(2_000_000))
    else:
        (origin / "instance_images" / "large.jpg").write_bytes(bytes(2_000_000))
    leave_free(monkeypatch, 1_000_000)
    with pytest.raises(DiskFull, match="needed for the import"):
        import_session("rex", source=origin, root=tmp_path / "sessions")


def test_of_a_session_of_ours_everything_but_hidden_files_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Session.create("their-dog", root=tmp_path / "shared")
    theirs.save(settings={"unet_steps": 9}, prompts={"instance_prompt": "zib"})
    for name in (
        "instance_images/a.png",
        "captions/a.txt",
        "samples/deep/b.png",
        "logs/c.txt",
        "exports/.part",
        "own/d",
    ):
        (theirs.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (theirs.folder / name).write_bytes(name.encode() * 100)
    left_over = tmp_path / "sessions" / ".import-rex"
    (left_over / "instance_images").mkdir(parents=True)
    (left_over / "instance_images" / "of a cut import.png").write_bytes(b"x")
    result = import_session("rex", source=theirs.folder, root=tmp_path / "sessions")
    there = {name for name in content_of(result.session.folder) if not name.startswith((".", "session.json"))}
    assert there == {"instance_images/a.png", "captions/a.txt", "samples/deep/b.png", "logs/c.txt"}
    assert (result.pictures, result.captions, result.checkpoint) == (1, 1, None)
    assert result.notes[0].startswith("4 files (0 MiB) were copied and compared")
    record = result.session.record
    assert (record["settings"], record["prompts"]) == ({"unet_steps": 9}, {"instance_prompt": "zib"})
    assert record["imported"] == {"from": str(theirs.folder), "by": "fastsd_helpers", "notes": []}
    assert (record["name"], record["sequence"] >= 1) == ("rex", True)
    assert record["id"] != theirs.record["id"]
    leave_free(monkeypatch, 100)
    with pytest.raises(DiskFull):
        import_session("max", source=theirs.folder, root=tmp_path / "sessions")


def test_names_in_its_zips_are_decoded_and_equal_ones_are_kept_apart(tmp_path: Path) -> None:
    origin = tmp_path / "old" / "my_dog"
    origin.mkdir(parents=True)
    (origin / "my_dog.ckpt").write_bytes(b"weights")
    for kind, ending in (("instance_images", ".jpg"), ("captions", ".txt")):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            for number, folder in enumerate(("a", "b")):
                content = picture(number) if ending == ".jpg" else f"in {folder}".encode()
                archive.writestr(f"{folder}/xxxx (1){ending}", content)
        # As Windows writes it: the code page's bytes, and no flag.
        (origin / f"{kind}.zip").write_bytes(data.getvalue().replace(b"xxxx", "子犬".encode("cp932")))
    result = import_session("rex", source=origin, root=tmp_path / "sessions")
    assert sorted(path.name for path in result.session.instance_images.iterdir()) == [
        "子犬 (1) (2).jpg",
        "子犬 (1).jpg",
    ]
    assert sorted(path.read_text() for path in result.session.captions.iterdir()) == ["子犬 in a\n", "子犬 in b\n"]
    assert any("Japanese (cp932)" in note for note in result.notes)
