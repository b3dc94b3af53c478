"""Drive and local folders: mounted once, checked by really writing, and copies that are read back."""

import errno
import hashlib
import os
import sys

import pytest
from fakes import FakeColab

from fastsd_helpers import drive
from fastsd_helpers.errors import DriveError, VerificationFailed
from fastsd_helpers.files import sha256_of


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def colab(tmp_path, monkeypatch):
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    content = tmp_path / "content"
    return FakeColab(shared=("Family", "Lab")).install(monkeypatch, (content / "drive", content / "gdrive"))


# ------------------------------------------------------------------------------------------------- mount


def test_drive_is_mounted_once_and_then_left_alone(colab, tmp_path):
    expected = tmp_path / "content" / "drive" / "MyDrive"
    assert drive.mount_drive() == expected
    assert drive.mount_drive() == expected
    assert colab.mounts == [str(tmp_path / "content" / "drive")]


def test_a_drive_mounted_where_the_old_notebook_did_is_used(colab, tmp_path):
    old = tmp_path / "content" / "gdrive" / "MyDrive"
    old.mkdir(parents=True)
    assert drive.mount_drive() == old
    assert colab.mounts == []
    assert drive.sessions_root() == old / "Fast-Dreambooth" / "Sessions"


def test_a_shared_drive_is_found_by_name_and_a_missing_one_lists_those_there_are(colab, tmp_path):
    assert drive.mount_drive(shared_drive="Lab") == tmp_path / "content" / "drive" / "Shareddrives" / "Lab"
    assert drive.sessions_root(shared_drive="Lab").parts[-3:] == ("Lab", "Fast-Dreambooth", "Sessions")
    with pytest.raises(DriveError, match="No Shared drive named 'lab '") as caught:
        drive.mount_drive(shared_drive="lab ")
    assert "Family, Lab" in caught.value.hint


def test_an_account_without_shared_drives_is_told_so(colab):
    colab.shared = ()
    with pytest.raises(DriveError) as caught:
        drive.mount_drive(shared_drive="Lab")
    assert "has no Shared drive" in caught.value.hint


def test_outside_of_colab_the_error_says_where_sessions_go(tmp_path):
    with pytest.raises(DriveError, match="only be mounted in Google Colab") as caught:
        drive.mount_drive()
    assert "Fast-Dreambooth/Sessions" in caught.value.hint


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("mount failed"), "mount failed"),
        (RuntimeError("credential propagation was unsuccessful"), "credential propagation"),
        (NotImplementedError("google.colab.drive is unsupported in this environment."), "this kind of Colab"),
        (Exception(), "was not mounted: Exception"),
    ],
)
def test_refusals_of_colab_become_one_sentence(colab, error, expected):
    colab.error = error
    with pytest.raises(DriveError, match=expected) as caught:
        drive.mount_drive()
    assert caught.value.hint
    assert caught.value.__cause__ is error


def test_files_in_the_mount_point_are_named(colab, tmp_path):
    (tmp_path / "content" / "drive").mkdir(parents=True)
    (tmp_path / "content" / "drive" / "left.txt").write_text("x")
    with pytest.raises(DriveError, match=r"holds left\.txt"):
        drive.mount_drive()
    assert colab.mounts == []


def test_a_dead_mount_is_recognised_everywhere(colab, tmp_path, monkeypatch):
    drive.mount_drive()
    stat, listdir = os.stat, os.listdir
    gone = OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))

    def dead(original):
        def call(path=".", *args, **kwargs):
            if "MyDrive" in str(path) or str(path).endswith("drive"):
                raise gone
            return original(path, *args, **kwargs)

        return call

    monkeypatch.setattr(os, "stat", dead(stat))
    monkeypatch.setattr(os, "listdir", dead(listdir))
    for use in (drive.mount_drive, drive.sessions_root, lambda: drive.check_health(tmp_path / "content" / "drive")):
        with pytest.raises(DriveError, match="Transport endpoint is not connected") as caught:
            use()
        assert "run the cell that connects Drive again" in caught.value.hint


def test_the_sessions_root_is_what_was_given_else_drive_else_here(colab, tmp_path, monkeypatch):
    assert drive.sessions_root("~/mine") == tmp_path / "home" / "mine"
    assert drive.sessions_root("mine") == tmp_path / "mine"
    assert drive.sessions_root() == tmp_path / "Fast-Dreambooth" / "Sessions"  # in Colab, before Drive is mounted
    drive.mount_drive()
    assert drive.sessions_root() == tmp_path / "content" / "drive" / "MyDrive" / "Fast-Dreambooth" / "Sessions"
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    for module in ("google.colab.drive", "google.colab"):
        monkeypatch.delitem(sys.modules, module)
    assert drive.sessions_root() == tmp_path / "Fast-Dreambooth" / "Sessions"
    assert not (tmp_path / "Fast-Dreambooth").exists()


def test_late_mounts_are_told_from_local_folders(colab, tmp_path, monkeypatch):
    assert drive.delivers_late(drive.mount_drive() / "Fast-Dreambooth")
    assert not drive.delivers_late(tmp_path)


# ------------------------------------------------------------------------------------------------ copies


@pytest.mark.parametrize("size", [0, 1, 2, 9, 100_000, 17 * 2**20 + 3])
def test_a_verified_copy_has_the_same_bytes(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert sha256_of(tmp_path / "copy") == sha256(data)


def test_a_copy_never_replaces_anything(tmp_path):
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(DriveError, match="exists already and is never overwritten"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"new"))
    assert (tmp_path / "copy").read_bytes() == b"old"


def test_a_copy_that_reads_back_wrong_gets_no_name(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"abcdef")
    with pytest.raises(VerificationFailed, match="was read back with other bytes"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"ABCDEF"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:-1]) + 1)  # loses a byte
    with pytest.raises(VerificationFailed, match="bytes"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"abcdef"))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["source"]


def test_a_missing_source_is_an_error_with_its_name(tmp_path):
    with pytest.raises(DriveError, match="No such file"):
        drive.copy_verified(tmp_path / "none", tmp_path / "copy", sha256="0" * 64)
    with pytest.raises(DriveError, match="none"):
        sha256_of(tmp_path / "none")
    assert not (tmp_path / "copy").exists()
