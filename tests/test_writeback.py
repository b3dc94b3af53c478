"""Setting the disk to work early, with real files."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastsd_helpers.checkpoints.formats import writeback
from fastsd_helpers.checkpoints.formats.writeback import allocate, start_writeback


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the call is Linux's")
def test_the_system_takes_the_call(tmp_path: Path) -> None:
    call = writeback.find_call("sync_file_range")
    assert call is not None
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(os.urandom(1 << 20))
        assert call(file.fileno(), 0, 1 << 20, writeback.WRITE) == 0
        # Beyond 2 GB: the arguments must be 64 bits wide.
        assert call(file.fileno(), 5 << 30, 1 << 20, writeback.WRITE) == 0
        assert call(file.fileno(), -1, 1 << 20, writeback.WRITE) == -1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the call is Linux's")
def test_a_file_has_its_size_and_its_room_before_it_is_written(tmp_path: Path) -> None:
    other = shutil.which("fallocate")  # what the system's own program can, ours can
    if other and subprocess.run([other, "-l", "1", tmp_path / "other"], capture_output=True, check=False).returncode:
        pytest.skip("this file system does not offer it")
    with (tmp_path / "file").open("wb+", buffering=0) as file:
        allocate(file.fileno(), 1 << 20)
        found = os.fstat(file.fileno())
        assert (found.st_size, found.st_blocks >= (1 << 20) // 512) == (1 << 20, True)
        assert file.read() == bytes(1 << 20)


def test_a_room_that_there_is_not_is_found_when_it_is_written(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb", buffering=0) as file:
        allocate(file.fileno(), 1 << 60)
        allocate(file.fileno(), 0)
        file.write(b"a")
    assert (tmp_path / "file").read_bytes() == b"a"
    reader, writer = os.pipe()
    allocate(writer, 1)
    os.close(reader)
    os.close(writer)


def test_what_was_written_is_still_there(tmp_path: Path) -> None:
    data = os.urandom(1 << 20)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(data)
        start_writeback(file.fileno(), 0, len(data))
    assert (tmp_path / "file").read_bytes() == data


def test_a_file_that_cannot_be_written_early_is_no_error() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"a")
    start_writeback(writer, 0, 1)
    assert os.read(reader, 2) == b"a"
    os.close(reader)
    os.close(writer)
    start_writeback(writer, 0, 1)


def test_elsewhere_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    writeback.find_call.cache_clear()
    try:
        assert [writeback.find_call(name) for name in ("fallocate64", "sync_file_range")] == [None, None]
        with (tmp_path / "file").open("wb", buffering=0) as file:
            allocate(file.fileno(), 1)
            start_writeback(file.fileno(), 0, 1)
        assert (tmp_path / "file").read_bytes() == b""
    finally:
        writeback.find_call.cache_clear()
