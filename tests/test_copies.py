"""Verified copies of large files: in pieces, whatever their size."""

import hashlib
import os
from pathlib import Path

import pytest

from fastsd_helpers.drive import copy_verified


def test_a_copy_holds_little_of_a_large_file_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 40_000_000
    data = os.urandom(1000) * (size // 1000)
    (tmp_path / "src").write_bytes(data)
    written, write = [], os.write
    monkeypatch.setattr(os, "write", lambda handle, piece: (written.append(len(piece)), write(handle, piece))[1])
    copy_verified(tmp_path / "src", tmp_path / "dst", sha256=hashlib.sha256(data).hexdigest())
    assert (tmp_path / "dst").stat().st_size == size
    assert max(written) <= 16 << 20
    assert len(written) < 100
