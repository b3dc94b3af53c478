"""Drive and local folders: mounted once, checked by really writing, and copies that are read back."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import FakeColab, full_disk, read_only, small_disk

from fastsd_helpers import drive
from fastsd_helpers.errors import DiskFull, DriveError, DriveReadOnly, VerificationFailed


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
    assert "sees no Shared drive" in caught.value.hint


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


# ------------------------------------------------------------------------------------------------ health


def test_a_writable_folder_is_created_and_left_empty(tmp_path):
    drive.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_read_only_folder_is_recognised_by_trying(tmp_path):
    with read_only(tmp_path), pytest.raises(DriveReadOnly, match="Read-only file system"):
        drive.check_writable(tmp_path)
    with read_only(tmp_path, code=errno.EACCES), pytest.raises(DriveReadOnly, match="Permission denied"):
        drive.check_writable(tmp_path / "new")


def test_a_full_or_broken_folder_is_recognised_by_trying(tmp_path):
    with full_disk(tmp_path), pytest.raises(DiskFull) as caught:
        drive.check_writable(tmp_path)
    assert "trash" in caught.value.hint
    with full_disk(tmp_path, code=errno.EIO), pytest.raises(DriveError, match="Input/output error"):
        drive.check_writable(tmp_path)
    assert list(tmp_path.glob(".fastsd*")) == []


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DriveError, match=r"File exists|Not a directory"):
        drive.check_writable(tmp_path / "file")


def test_a_real_read_only_and_a_real_full_file_system(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        assert drive.free_bytes(disk / "not" / "there" / "yet") <= 65536
        (disk / "ballast").write_bytes(b"x" * (drive.free_bytes(disk) - 4096))
        drive.check_writable(disk)
        with pytest.raises(DiskFull, match="No space left"):
            drive.write_atomic(disk / "record", b"y" * 8192)
        assert os.listdir(disk) == ["ballast"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
        with pytest.raises(DriveReadOnly, match="Read-only file system"):
            drive.check_writable(disk)


def test_a_file_size_limit_of_the_system_counts_as_full(tmp_path):
    program = (
        "import sys; from pathlib import Path; from fastsd_helpers import drive, errors\n"
        "try: drive.write_atomic(Path('record'), b'x' * 5000)\n"
        "except errors.DiskFull as err: print(err.problem)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert "File too large" in done.stdout
    assert os.listdir(tmp_path) == ["home"]


# ------------------------------------------------------------------------------------------------- files


def test_write_atomic_replaces_a_file_or_leaves_it(tmp_path):
    path = tmp_path / "record.json"
    drive.write_atomic(path, b"old")
    drive.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    for trouble in (full_disk(tmp_path, after_bytes=1), full_disk(tmp_path, code=errno.EIO)):
        with trouble, pytest.raises(DriveError):
            drive.write_atomic(path, b"other")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["record.json"]


@pytest.mark.parametrize("point", ["session.write", "session.after_rename"])
def test_a_kill_inside_an_atomic_write_leaves_the_old_or_the_new_file(tmp_path, point):
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    program = f"from fastsd_helpers import drive; drive.write_atomic({str(path)!r}, b'new', point='session')"
    environment = {**os.environ, "FASTSD_FAULT": f"{point}:1"}
    died = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"old" if point == "session.write" else b"new")


@pytest.mark.parametrize("size", [0, 1, 2, 9, 100_000, 17 * 2**20 + 3])
def test_a_verified_copy_has_the_same_bytes(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "source").write_bytes(data)
    drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(data))
    assert (tmp_path / "copy").read_bytes() == data
    assert drive.sha256_of(tmp_path / "copy") == sha256(data)


def test_bytes_are_on_the_disk_before_their_name_appears_and_the_name_after(tmp_path, monkeypatch):
    done = []

    def noted(name: str):
        original = getattr(os, name)

        def call(*args, **kwargs):
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}")) if name == "fsync" else Path(args[1])
            done.append((name, "folder" if path.is_dir() else "file"))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "replace", "rename"):
        noted(name)
    drive.write_atomic(tmp_path / "a", b"x")
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]
    done.clear()
    drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256=sha256(b"x"))
    assert done == [("fsync", "file"), ("rename", "file"), ("fsync", "folder")]


def test_a_copy_never_replaces_anything(tmp_path):
    (tmp_path / "source").write_bytes(b"new")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(DriveError, match="exists already and is never overwritten"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"new"))
    assert (tmp_path / "copy").read_bytes() == b"old"


def test_a_copy_that_reads_back_wrong_gets_no_name(tmp_path, monkeypatch):
    (tmp_path / "source").write_bytes(b"abcdef")
    with pytest.raises(VerificationFailed, match="read back as other bytes"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"ABCDEF"))
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:-1]) + 1)  # loses a byte
    with pytest.raises(VerificationFailed, match="bytes"):
        drive.copy_verified(tmp_path / "source", tmp_path / "copy", sha256=sha256(b"abcdef"))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["source"]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:7]))
    data = bytes(range(256))
    drive.write_atomic(tmp_path / "a", data)
    drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256=sha256(data))
    assert (tmp_path / "b").read_bytes() == data


def test_a_missing_source_is_an_error_with_its_name(tmp_path):
    with pytest.raises(DriveError, match="No such file"):
        drive.copy_verified(tmp_path / "none", tmp_path / "copy", sha256="0" * 64)
    with pytest.raises(DriveError, match="none"):
        drive.sha256_of(tmp_path / "none")
    assert not (tmp_path / "copy").exists()


def test_a_folder_that_cannot_be_synced_does_not_fail_the_write(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")  # as some FUSE mounts do
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    drive.write_atomic(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"
