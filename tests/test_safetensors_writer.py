"""Values that the system copies from file to file, beside those that pass through this process."""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numpy")
import numpy as np

from fastsd_helpers.checkpoints.formats import safetensors_writer
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource, Source, open_file, read_whole
from fastsd_helpers.checkpoints.formats.tensor_plan import Piece, Recipe, copied
from fastsd_helpers.errors import CheckpointError, DiskFull, VerificationFailed

pytestmark = pytest.mark.skipif(not hasattr(os, "copy_file_range"), reason="the call is Linux's")
_KINDS = {"keep": "<f4", "fp16": "<f2"}


@pytest.fixture
def values() -> dict[str, Any]:
    rng = np.random.default_rng(3)
    sizes = {"large": 900_001, "small": 7, "whole": 262_144, "empty": 0}
    return {name: rng.standard_normal(size).astype("<f4") for name, size in sizes.items()}


@pytest.fixture
def source(values: dict[str, Any], tmp_path: Path) -> Source:
    made = BytesSource({name: (TensorFact("F32", part.shape), part.tobytes()) for name, part in values.items()})
    path = tmp_path / "source.safetensors"
    write_safetensors(path, {name: copied(made, name) for name in values}, metadata={}, read_back=False)
    return open_file(path)


def recipes_of(source: Source, dtype: str = "keep") -> dict[str, Recipe]:
    """All tensors, and one that is put together from the middles of two."""
    joined = (Piece(source, "large", 1001, 700_000), Piece(source, "whole", 3, 5))
    recipes = {name: copied(source, name, dtype) for name in source.tensors}
    kind = {"keep": "F32", "fp16": "F16"}[dtype]
    return {**recipes, "joined": Recipe(TensorFact(kind, (700_005,)), joined)}


def check(path: Path, values: dict[str, Any], dtype: str = "keep") -> None:
    wanted = {**values, "joined": np.concatenate([values["large"][1001:701_001], values["whole"][3:8]])}
    with SafetensorsFile(path) as file:
        assert set(file.tensors) == set(wanted)
        for name, array in wanted.items():
            assert bytes(read_whole(file, name)) == array.astype(_KINDS[dtype]).tobytes(), name


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many bytes the system copies and how many are written from here."""
    seen = {"copied": 0, "written": 0}
    copy, write = os.copy_file_range, os.pwrite

    def copying(*arguments: Any) -> int:
        seen["copied"] += (count := copy(*arguments))
        return count

    def writing(*arguments: Any) -> int:
        seen["written"] += (count := write(*arguments))
        return count

    monkeypatch.setattr(os, "copy_file_range", copying)
    monkeypatch.setattr(os, "pwrite", writing)
    return seen


@pytest.mark.parametrize("hashes", [False, True])
def test_the_same_format_does_not_pass_through_this_process(
    source: Source, values: dict[str, Any], tmp_path: Path, counted: dict[str, int], hashes: bool
) -> None:
    path = tmp_path / "a.safetensors"
    sha256, size = write_safetensors(path, recipes_of(source), metadata={}, read_back=False, hashes=hashes)
    content = path.read_bytes()
    assert (size, sha256) == (len(content), hashlib.sha256(content).hexdigest() if hashes else "")
    check(path, values)
    data = 4 * (sum(map(len, values.values())) + 700_005)
    assert counted == {"copied": data, "written": len(content) - data}


@pytest.mark.parametrize("settings", [{"read_back": True}, {"read_back": False, "finite": True}])
def test_what_is_looked_at_is_read(
    source: Source, values: dict[str, Any], tmp_path: Path, counted: dict[str, int], settings: dict[str, bool]
) -> None:
    write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={}, hashes=False, **settings)
    check(tmp_path / "a.safetensors", values)
    assert counted["copied"] == 0


def test_a_disk_that_returns_other_bytes_than_were_written_is_noticed(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(descriptor: int) -> None:  # what the memory still holds is forgotten, and the disk has something else
        with open(f"/proc/self/fd/{descriptor}", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(bytes([255 - content[-1]]))

    path = tmp_path / "a.safetensors"
    sha256, _size = write_safetensors(path, recipes_of(source), metadata={})
    content = path.read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(safetensors_writer, "forget_cached", spoil)
    with pytest.raises(VerificationFailed, match="returned different bytes than were written"):
        write_safetensors(tmp_path / "b.safetensors", recipes_of(source), metadata={})
    assert not (tmp_path / "b.safetensors").exists()


def test_another_format_is_read(
    source: Source, values: dict[str, Any], tmp_path: Path, counted: dict[str, int]
) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, recipes_of(source, "fp16"), metadata={}, read_back=False, hashes=False)
    check(path, values, "fp16")
    assert counted["copied"] == 0


@pytest.mark.parametrize("hashes", [False, True])
def test_short_copies_go_on(
    source: Source, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: bool
) -> None:
    copy = os.copy_file_range
    monkeypatch.setattr(os, "copy_file_range", lambda src, dst, count, *at: copy(src, dst, min(count, 99_999), *at))
    write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={}, read_back=False, hashes=hashes)
    check(tmp_path / "a.safetensors", values)


@pytest.mark.parametrize("fault", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, 0])
@pytest.mark.parametrize("after", [0, 2])
def test_where_the_system_does_not_copy_it_is_written_from_here(
    source: Source, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int, after: int
) -> None:
    copy, calls = os.copy_file_range, []

    def failing(src: int, dst: int, count: int, *at: int) -> int:
        calls.append(count)
        if len(calls) <= after:
            return copy(src, dst, count // 2, *at)
        if fault:
            raise OSError(fault, os.strerror(fault))
        return 0

    monkeypatch.setattr(os, "copy_file_range", failing)
    path = tmp_path / "a.safetensors"
    sha256, _size = write_safetensors(path, recipes_of(source), metadata={}, read_back=False)
    check(path, values)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    assert len(calls) > after


def test_without_the_call_it_is_written_from_here(
    source: Source, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")
    write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={}, read_back=False, hashes=False)
    check(tmp_path / "a.safetensors", values)


@pytest.mark.parametrize("hashes", [False, True])
def test_a_source_that_is_cut_short_meanwhile_is_named(source: Source, tmp_path: Path, hashes: bool) -> None:
    os.truncate(source.files[0], 2_000_000)
    with pytest.raises(CheckpointError, match=r"source\.safetensors"):
        write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={}, read_back=False, hashes=hashes)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["source.safetensors"]


def test_a_disk_that_is_full_is_named(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_arguments: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *rest: full() if len(rest[1]) > 100_000 else write(*rest))
    with pytest.raises(DiskFull):
        write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={}, read_back=False, hashes=False)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["source.safetensors"]


def test_a_disk_that_gives_back_other_bytes_is_found_out(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.pwrite

    def damaging(descriptor: int, buffer: Any, place: int) -> int:
        data = bytearray(buffer)
        data[-1] ^= len(data) > 100_000
        return write(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", damaging)
    with pytest.raises(VerificationFailed):
        write_safetensors(tmp_path / "a.safetensors", recipes_of(source), metadata={})
