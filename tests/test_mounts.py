"""Mounted Drives at their edges: what is flushed, what counts as delivering late, what a shortcut leads to."""

import builtins
import errno
import hashlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeColab

from fastsd_helpers import drive
from fastsd_helpers.errors import DiskFull, DriveError, DriveReadOnly, VerificationFailed
from fastsd_helpers.runtime import fault_point


@pytest.fixture
def colab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeColab:
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release-colab_20260819")
    content = tmp_path / "content"
    return FakeColab(shared=("Lab", "Attic")).install(monkeypatch, (content / "drive", content / "gdrive"))


@pytest.fixture
def flushed(colab: FakeColab) -> list[str]:
    """How often Colab was told to flush."""
    from google.colab import drive as theirs

    asked: list[str] = []
    theirs.flush_and_unmount = lambda: asked.append("flushed")
    return asked


def test_a_mounted_drive_is_flushed_and_none_where_there_is_none(
    flushed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drive.flush_drive() is False
    assert flushed == []
    drive.mount_drive()
    assert drive.flush_drive() is True
    assert flushed == ["flushed"]
    monkeypatch.delenv("COLAB_RELEASE_TAG")
    for module in ("google.colab.drive", "google.colab"):
        monkeypatch.delitem(sys.modules, module)
    assert drive.flush_drive() is False, "whatever is mounted here, it is not Colab's"


@pytest.mark.parametrize(
    ("error", "said"), [(ValueError("drive is busy."), "drive is busy"), (TimeoutError(), "TimeoutError")]
)
def test_a_drive_that_does_not_take_everything_is_said(flushed: list[str], error: Exception, said: str) -> None:
    from google.colab import drive as theirs

    def refuse() -> None:
        raise error

    theirs.flush_and_unmount = refuse
    drive.mount_drive()
    with pytest.raises(DriveError) as caught:
        drive.flush_drive()
    assert caught.value.problem == f"Google Drive has not synced everything yet: {said}."
    assert "the machine is kept" in caught.value.hint


def test_the_shared_drives_are_listed_by_name(colab: FakeColab, tmp_path: Path) -> None:
    point = drive.mount_drive().parent
    (point / "Shareddrives" / "notes.txt").write_text("x")
    assert drive.shared_drives(point) == ["Attic", "Lab"]
    assert drive.shared_drives(tmp_path / "nowhere") == []


def test_a_shared_folder_is_the_first_in_its_shortcut(colab: FakeColab) -> None:
    point = drive.mount_drive().parent
    place = point / ".shortcut-targets-by-id" / "1AbCdEfGhI"
    place.mkdir(parents=True)
    link = "https://drive.google.com/drive/folders/1AbCdEfGhI"
    (place / "a file").write_text("x")
    with pytest.raises(DriveError, match="is not in your Drive yet"):
        drive.shared_folder(link)
    for name in ("b", "a"):
        (place / name).mkdir()
    assert drive.shared_folder(link) == place / "a"
    with pytest.raises(DriveError, match="is not a link to a Drive folder"):
        drive.shared_folder("https://drive.google.com/drive/folders/1AbCdEfGh")


MOUNTS = """\
/dev/vda / ext4 rw 0 0
overlay /data overlay rw 0 0
remote: /data/my\\040cloud fuse.rclone rw 0 0
x /data/plain fuse rw 0 0
y /data/layers fuse.fuse-overlayfs rw 0 0
z /data/my\\040cloud/inner ext4 rw 0 0
first /data/twice fuse.gcsfuse rw 0 0
second /data/twice ext4 rw 0 0
"""


@pytest.fixture
def mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.open

    def look(path: Any, *words: Any, **named: Any) -> Any:
        return io.StringIO(MOUNTS) if path == "/proc/self/mounts" else real(path, *words, **named)

    monkeypatch.setattr(builtins, "open", look)


@pytest.mark.parametrize(
    ("folder", "late"),
    [
        ("/data/my cloud/sessions", True),
        ("/data/my cloud", True),
        ("/data/plain/x/y", True),
        ("/data/layers/x", False),
        ("/data/my cloud/inner/x", False),
        ("/data/twice/x", False),
        ("/data/my cloudy/x", False),
        ("/data", False),
        ("/srv", False),
        ("/content/drive/MyDrive", True),
        ("/content/gdrive", True),
        ("/content/drives", False),
    ],
)
def test_what_is_written_to_a_fuse_mount_may_arrive_late(mounts: None, folder: str, late: bool) -> None:
    assert drive.delivers_late(folder) is late
    assert drive.delivers_late(Path(folder)) is late


def test_where_the_mounts_cannot_be_listed_nothing_is_late(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_words: Any, **_named: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(builtins, "open", refuse)
    assert drive.delivers_late(tmp_path) is False
    assert drive.delivers_late("/content/drive") is True


# ------------------------------------------------------------------------------------------------------ sizes


def test_what_a_folder_takes_is_the_sum_of_its_files(tmp_path: Path) -> None:
    from fastsd_helpers.sessions import Session, list_sessions

    session = Session.create("rex", root=tmp_path / "sessions")
    before = list_sessions(tmp_path / "sessions")[0].bytes
    (session.exports / "deep").mkdir()
    (session.exports / "deep" / "a").write_bytes(bytes(1000))
    (session.exports / "b").write_bytes(bytes(500))
    (session.exports / "link").symlink_to("b")
    assert list_sessions(tmp_path / "sessions")[0].bytes == before + 1000 + 500 + len("b")


@pytest.mark.parametrize("deep", [".", "not/there/yet"])
def test_room_is_that_of_the_disk_a_folder_will_be_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deep: str
) -> None:
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.sessions import import_session

    asked: list[Path] = []

    def usage(path: Any) -> Any:
        asked.append(Path(path))
        return shutil._ntuple_diskusage(100, 99, 1)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    (tmp_path / "old" / "instance_images").mkdir(parents=True)
    (tmp_path / "old" / "instance_images" / "a.jpg").write_bytes(b"xx")
    with pytest.raises(FastSDError):
        import_session("rex", source=tmp_path / "old", root=tmp_path / deep)
    assert asked == [tmp_path]


# ----------------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize(
    ("code", "kind"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EFBIG, DiskFull), (errno.EROFS, DriveReadOnly),
     (errno.EACCES, DriveReadOnly), (errno.EPERM, DriveReadOnly), (errno.EIO, DriveError), (errno.ENOTCONN, DriveError),
     (errno.ESTALE, DriveError), (errno.ETIMEDOUT, DriveError)],
)  # fmt: skip
def test_every_failure_of_the_system_is_one_of_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type
) -> None:
    def fail(*_words: Any) -> int:
        raise OSError(code, os.strerror(code))

    (tmp_path / "a").write_bytes(b"x")
    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(DriveError) as caught:
        drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256="")
    assert type(caught.value) is kind
    assert f"Could not write {tmp_path / 'b'}" in caught.value.problem
    assert os.strerror(code) in caught.value.problem
    lost = code in (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT)
    assert ("connects Drive again" in caught.value.hint) is lost
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "home"]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000])
def test_the_points_of_a_copy_are_passed_once_each_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    passed: list[str] = []
    for module in list(sys.modules.values()):  # each that uses it has its own name for it
        if getattr(module, "fault_point", None) is fault_point:
            monkeypatch.setattr(module, "fault_point", passed.append)
    (tmp_path / "a").write_bytes(b"x" * size)
    digest = hashlib.sha256(b"x" * size).hexdigest()
    drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256=digest, point="p")
    assert passed == ["p.begin", *(["p.half"] if size else []), "p.before_rename"]
    passed.clear()
    drive.copy_verified(tmp_path / "a", tmp_path / "c", sha256=digest, point=None)
    assert passed == []
    with pytest.raises(VerificationFailed, match="was read back with other bytes"):
        drive.copy_verified(tmp_path / "a", tmp_path / "d", sha256="0" * 64)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a", "b", "c"]
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for taken in ("b", "dangling"):
        with pytest.raises(DriveError, match="exists already and is never overwritten"):
            drive.copy_verified(tmp_path / "a", tmp_path / taken, sha256=digest)
