"""A session's identity: copied, renamed, moved and restored folders share nothing, and lose nothing."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.dreambooth.running.live import live_folder, scratch_folder
from fastsd_helpers.sessions import Session, SessionLock, local_holder
from fastsd_helpers.sessions.record import read_record


@pytest.fixture(autouse=True)
def _scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "Sessions"


def identity(folder: Path) -> str:
    return read_record(folder).record["id"]


def used(session: Session) -> Session:
    with session.lock():
        pass
    return session


def test_a_copy_beside_its_original_is_a_session_of_its_own_and_keeps_everything(root: Path) -> None:
    rex = used(Session.create("rex", root=root))
    (rex.checkpoints / "kept").write_text("here")
    rex.save(progress={"stage": "unet", "step": 5, "steps": 9})
    shutil.copytree(rex.folder, root / "rex2")
    copy = Session.open("rex2", root=root)
    assert scratch_folder(copy) != scratch_folder(rex)
    assert live_folder(copy) != live_folder(rex)
    assert (copy.checkpoints / "kept").read_text() == "here"
    assert copy.record["progress"]["step"] == 5
    assert copy.notices == ["'rex2' is a copy of 'rex': from now on it is a separate session."]
    again = Session.open("rex2", root=root)
    assert (again.record["id"], again.notices) == (copy.record["id"], [])
    assert Session.open("rex", root=root).record["id"] == rex.record["id"]


def test_a_copy_of_a_copy_and_a_chain_of_renames_are_told_apart(root: Path) -> None:
    Session.create("rex", root=root)
    for name in ("a", "b", "c"):
        shutil.copytree(root / "rex", root / name)
    shutil.copytree(root / "a", root / "a2")
    (root / "rex").rename(root / "z")
    names = ["c", "a2", "z", "b", "a"]
    ids = [Session.open(name, root=root).record["id"] for name in names]
    assert len(set(ids)) == 5
    assert [Session.open(name, root=root).record["id"] for name in names] == ids


def test_a_renamed_folder_keeps_its_identity_and_finds_its_scratch(root: Path) -> None:
    rex = used(Session.create("rex", root=root))
    (root / "rex").rename(root / "dog")
    dog = Session.open("dog", root=root)
    assert scratch_folder(dog) == scratch_folder(rex)
    assert (dog.record["name"], dog.notices) == ("dog", [])
    Session.create("rex", root=root)  # another one takes the name that is free now
    assert Session.open("dog", root=root).record["id"] == rex.record["id"]
    assert Session.open("rex", root=root).record["id"] != rex.record["id"]


def test_a_folder_that_was_moved_keeps_its_identity_and_a_copy_elsewhere_does_not(root: Path, tmp_path: Path) -> None:
    rex = used(Session.create("rex", root=root))
    other = tmp_path / "Other"
    other.mkdir()
    shutil.copytree(root / "rex", other / "rex")
    copy = Session.open("rex", root=other)
    assert copy.record["id"] != rex.record["id"]
    assert str(root / "rex") in copy.notices[0]
    shutil.rmtree(other)
    root.rename(other)
    assert Session.open("rex", root=other).record["id"] == rex.record["id"]


def test_a_restored_backup_is_the_session_and_a_backup_that_is_opened_is_not(root: Path) -> None:
    rex = used(Session.create("rex", root=root))
    shutil.copytree(root / "rex", root / "rex (backup)")
    shutil.rmtree(root / "rex")
    shutil.copytree(root / "rex (backup)", root / "rex")
    assert Session.open("rex", root=root).record["id"] == rex.record["id"]
    assert Session.open("rex (backup)", root=root).record["id"] != rex.record["id"]


def test_a_copy_that_another_machine_opened_first_is_no_trouble(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rex = used(Session.create("rex", root=root))
    shutil.copytree(root / "rex", root / "rex2")
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "other machine"))
    copy = used(Session.open("rex2", root=root))
    assert used(Session.open("rex", root=root)).record["id"] == rex.record["id"], "the original keeps its own"
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    assert Session.open("rex2", root=root).record["id"] == copy.record["id"]


def test_names_in_other_letters_of_unicode_and_shortcuts_are_the_same_session(root: Path, tmp_path: Path) -> None:
    zoe = used(Session.create("Zo\u00eb", root=root))
    (root / "Zo\u00eb").rename(root / "Zoe\u0308")  # as macOS hands the same name back
    same = Session.open("Zoe\u0308", root=root)
    assert (same.record["id"], same.record["sequence"]) == (zoe.record["id"], zoe.record["sequence"])
    os.symlink(root / "Zoe\u0308", root / "shortcut")
    assert Session.open("shortcut", root=root).record["id"] == zoe.record["id"]


def test_a_copy_in_a_folder_that_cannot_be_written_still_shares_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.errors import DriveReadOnly
    from fastsd_helpers.sessions import identity as module

    rex = Session.create("rex", root=root)
    shutil.copytree(root / "rex", root / "rex2")

    def refuse(*_: Any) -> None:
        raise DriveReadOnly("read only", "")

    monkeypatch.setattr(module, "write_record", refuse)
    assert scratch_folder(Session.open("rex2", root=root)) != scratch_folder(rex)
    assert identity(root / "rex2") == rex.record["id"], "nothing was written"


HOLD = """
import sys, time
from fastsd_helpers.sessions import Session
with Session.open("rex", root=sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_lock_that_was_copied_with_the_folder_holds_the_original_alone(root: Path) -> None:
    Session.create("rex", root=root)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        shutil.copytree(root / "rex", root / "rex2")
        copy = Session.open("rex2", root=root)
        assert local_holder(copy.folder, copy.record["id"]) is None
        began = time.monotonic()
        with copy.lock() as lock:
            assert not lock.lost
        assert time.monotonic() - began < 30, "it did not watch for a heartbeat"
        rex = Session.open("rex", root=root)
        assert local_holder(rex.folder, rex.record["id"]).pid == holder.pid
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_lock_tells_whose_it_is_and_one_that_does_not_counts(root: Path) -> None:
    rex = Session.create("rex", root=root)
    with rex.lock():
        assert json.loads((rex.folder / ".lock").read_text())["session"] == rex.record["id"]
    with SessionLock(rex.folder):
        assert "session" not in json.loads((rex.folder / ".lock").read_text())
        assert local_holder(rex.folder, rex.record["id"]).pid == os.getpid()


def test_an_object_that_was_opened_before_follows(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "Other"
    rex = Session.create("rex", root=root)
    shutil.copytree(root, other)
    early = Session.open("rex", root=other)  # neither was used on this machine yet, so nothing tells them apart
    assert early.record["id"] == rex.record["id"]
    used(rex)
    used(early)
    assert early.record["id"] != rex.record["id"]
    assert identity(other / "rex") == early.record["id"]
