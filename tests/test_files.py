"""Files and folders of any disk: whole or not there, failures in words, and no leftovers of dead processes."""

import errno
import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fakes import full_disk, read_only, small_disk

from fastsd_helpers import drive, files
from fastsd_helpers.errors import DiskFull, DriveError, DriveReadOnly
from fastsd_helpers.processes import LocalProcess, boot_id


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------ trying


def test_a_writable_folder_is_created_and_left_empty(tmp_path):
    files.check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_read_only_folder_is_recognised_by_trying(tmp_path):
    with read_only(tmp_path), pytest.raises(DriveReadOnly, match="Read-only file system"):
        files.check_writable(tmp_path)
    with read_only(tmp_path, code=errno.EACCES), pytest.raises(DriveReadOnly, match="Permission denied"):
        files.check_writable(tmp_path / "new")


def test_a_full_or_broken_folder_is_recognised_by_trying(tmp_path):
    with full_disk(tmp_path), pytest.raises(DiskFull) as caught:
        files.check_writable(tmp_path)
    assert "trash" in caught.value.hint
    with full_disk(tmp_path, code=errno.EIO), pytest.raises(DriveError, match="Input/output error"):
        files.check_writable(tmp_path)
    assert list(tmp_path.glob(".fastsd*")) == []


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "er"):
        with pytest.raises(DriveError, match=r"file is a file, and results need a folder") as caught:
            files.check_writable(place)
        assert "move that file" in caught.value.hint


def test_a_real_read_only_and_a_real_full_file_system(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        assert files.free_bytes(disk / "not" / "there" / "yet") <= 65536
        (disk / "ballast").write_bytes(b"x" * (files.free_bytes(disk) - 4096))
        files.check_writable(disk)
        with pytest.raises(DiskFull, match="No space left"):
            files.write_atomic(disk / "record", b"y" * 8192)
        assert os.listdir(disk) == ["ballast"]
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
        with pytest.raises(DriveReadOnly, match="Read-only file system"):
            files.check_writable(disk)


def test_a_file_size_limit_of_the_system_counts_as_full(tmp_path):
    program = (
        "import sys; from pathlib import Path; from fastsd_helpers import files, errors\n"
        "try: files.write_atomic(Path('record'), b'x' * 5000)\n"
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
    files.write_atomic(path, b"old")
    files.write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    for trouble in (full_disk(tmp_path, after_bytes=1), full_disk(tmp_path, code=errno.EIO)):
        with trouble, pytest.raises(DriveError):
            files.write_atomic(path, b"other")
    assert path.read_bytes() == b"new"
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["record.json"]


@pytest.mark.parametrize("point", ["session.write", "session.after_rename"])
def test_a_kill_inside_an_atomic_write_leaves_the_old_or_the_new_file(tmp_path, point):
    path = tmp_path / "record.json"
    path.write_bytes(b"old")
    program = f"from fastsd_helpers import files; files.write_atomic({str(path)!r}, b'new', point='session')"
    environment = {**os.environ, "FASTSD_FAULT": f"{point}:1"}
    died = subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=False)
    assert died.returncode == -signal.SIGKILL
    assert path.read_bytes() == (b"old" if point == "session.write" else b"new")


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
    files.write_atomic(tmp_path / "a", b"x")
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]
    done.clear()
    drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256=sha256(b"x"))
    assert done == [("fsync", "file"), ("replace", "file"), ("fsync", "folder")]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data)[:7]))
    data = bytes(range(256))
    files.write_atomic(tmp_path / "a", data)
    drive.copy_verified(tmp_path / "a", tmp_path / "b", sha256=sha256(data))
    assert (tmp_path / "b").read_bytes() == data


def test_a_folder_that_cannot_be_synced_does_not_fail_the_write(tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse_folders(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")  # as some FUSE mounts do
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    files.write_atomic(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


# ------------------------------------------------------------------------------------------- what is unfinished


def _dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_run_left_is_removed_and_a_living_ones_is_kept(tmp_path):
    me, boot = LocalProcess.me(), boot_id()[:8]
    gone = [
        f".model.safetensors.{_dead()}.ab12.part",  # as version 0.1 named it
        f".model.safetensors.{_dead()}-77-{boot}.ab12cd34.part",
        f".model.safetensors.{me.pid}-1-{boot}.ab12cd34.part",  # another process has its number now
    ]
    kept = [
        f".model.safetensors.{me.pid}.ab12.part",
        f".model.safetensors.{me.pid}-{me.start}-{boot}.ab12cd34.part",
        f".model.safetensors.{_dead()}-77-00000000.ab12cd34.part",  # another machine's, just written
        f".other.safetensors.{_dead()}-77-{boot}.ab12cd34.part",
        ".model.safetensors.part",
    ]
    for name in gone + kept:
        (tmp_path / name).write_bytes(b"x")
    with files.new_file(tmp_path / "model.safetensors") as (file, _where):
        file.write(b"whole")
    assert (tmp_path / "model.safetensors").read_bytes() == b"whole"
    there = {path.name for path in tmp_path.iterdir()}
    assert there & {*gone, *kept} == set(kept)


@pytest.mark.parametrize(("age_s", "stays"), [(60, True), (2 * 3600, False)])
def test_what_another_machine_left_goes_when_nobody_writes_to_it(tmp_path, age_s, stays):
    left = tmp_path / f".folder.{os.getpid()}-1-00000000.ab12cd34.part"
    left.mkdir()
    (left / "weights").write_bytes(b"x")
    then = time.time() - 3 * 3600
    os.utime(left, (then, then))
    os.utime(left / "weights", (time.time() - age_s,) * 2)
    with files.new_folder(tmp_path / "folder") as folder:
        (folder / "a").write_bytes(b"x")
    assert left.exists() is stays
    assert os.listdir(tmp_path / "folder") == ["a"]


def test_a_name_as_long_as_the_system_takes_can_be_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        files.write_atomic(tmp_path / name, b"x")
        with files.new_file(tmp_path / name) as (file, _where):
            file.write(b"y")
        assert (tmp_path / name).read_bytes() == b"y"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "x"), ValueError("x"), KeyboardInterrupt()])
def test_a_folder_that_is_replaced_stays_when_the_new_one_fails(tmp_path, error):
    with files.new_folder(tmp_path / "model") as folder:
        (folder / "old").write_bytes(b"x")

    def fail() -> None:
        with files.new_folder(tmp_path / "model") as folder:
            (folder / "new").write_bytes(b"x")
            raise error

    with pytest.raises((type(error), DriveError)):
        fail()
    assert os.listdir(tmp_path / "model") == ["old"]
    with files.new_folder(tmp_path / "model") as folder:
        (folder / "new").write_bytes(b"x")
    assert os.listdir(tmp_path / "model") == ["new"]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "home"}


def test_a_link_is_replaced_at_once_and_follows_nothing(tmp_path):
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").mkdir()
    files.new_link(tmp_path / "link", tmp_path / "one")
    files.new_link(tmp_path / "link", tmp_path / "two")  # a link to a folder is a link, not a folder
    files.new_link(tmp_path / "link", tmp_path / "one")
    assert (tmp_path / "link").read_bytes() == b"1"
    assert os.listdir(tmp_path / "two") == []


# -------------------------------------------------------------------------------------------- room and hashes


@pytest.mark.parametrize(
    ("needed", "spare", "fits"), [(1000, 0, True), (1001, 0, False), (900, 100, True), (900, 101, False)]
)
def test_room_is_looked_for_before_anything_is_written(tmp_path, monkeypatch, needed, spare, fits):
    monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
    if fits:
        files.check_room(tmp_path, needed, spare=spare)
        return
    with pytest.raises(DiskFull, match=r"has 1\.0 kB left, and [\d.]+ k?B are needed for the model\.") as caught:
        files.check_room(tmp_path, needed, "the model", spare=spare)
    assert "trash" in caught.value.hint
    with pytest.raises(DiskFull) as caught:
        files.check_room(tmp_path, needed, "the model", spare=spare, hint="Another place.")
    assert caught.value.hint == "Another place."


def test_a_remembered_hash_is_read_again_when_the_file_changes(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert files.remembered_sha256(path) == sha256(b"one")
    path.write_bytes(b"more")
    assert files.remembered_sha256(path) == sha256(b"more")
    path.write_bytes(b"same")
    os.utime(path, ns=(1, 1))
    assert files.remembered_sha256(path) == sha256(b"same")
