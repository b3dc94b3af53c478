"""The safetensors format at its bounds: lengths, shapes, files that are cut at any place, reads in pieces."""

import json
import os
import struct
from pathlib import Path

import pytest

np = pytest.importorskip("numpy")

from fastsd_helpers.checkpoints.formats import safetensors_file  # noqa: E402
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact, fill  # noqa: E402
from fastsd_helpers.checkpoints.formats.sources import read_whole  # noqa: E402
from fastsd_helpers.errors import CheckpointError  # noqa: E402


def file_of(path, header, data=b"", *, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


GOOD = {
    "__metadata__": {"format": "pt"},
    "b": entry("F32", [2, 3], 4, 28),
    "a": entry("I16", [2], 0, 4),
    "none": entry("F16", [0, 7], 28, 28),
    "one": entry("BF16", [], 28, 30),
}
DATA = bytes(range(30))


def test_what_a_header_says_is_read_in_the_order_of_the_data(path):
    with SafetensorsFile(file_of(path, GOOD, DATA)) as file:
        assert list(file.tensors) == ["a", "b", "none", "one"]
        assert file.metadata == {"format": "pt"}
        assert file.bytes == path.stat().st_size
        assert file.tensors["b"] == TensorFact("F32", (2, 3))
        assert {name: (fact.count, fact.bytes) for name, fact in file.tensors.items()} == {
            "a": (2, 4), "b": (6, 24), "none": (0, 0), "one": (1, 2),
        }  # fmt: skip
        assert [bytes(read_whole(file, name)) for name in file.tensors] == [DATA[:4], DATA[4:28], b"", DATA[28:]]
        part = bytearray(5)
        file.read_into("b", 3, part)
        assert part == DATA[7:12]
        descriptor, place = file.locate("b")
        assert os.pread(descriptor, 4, place) == DATA[4:8]
        file.forget_cached()
        assert bytes(read_whole(file, "a")) == DATA[:4]
    file.close()


def one(dtype, shape, start, stop):
    return {"a": entry(dtype, shape, start, stop)}


@pytest.mark.parametrize(
    ("header", "count"),
    # Each has as many bytes as it promises: what is wrong is in the header alone.
    [
        (one("F32", [1], 0, 5), 5),
        (one("F32", [1], 0, 3), 3),
        (one("F32", [1], 1, 5), 5),
        ({**one("F32", [1], 0, 4), "b": entry("F32", [1], 5, 9)}, 9),
        ({**one("F32", [1], 0, 4), "b": entry("F32", [1], 3, 7)}, 7),
        ({**one("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, 4),
        (one("F32", 1, 0, 4), 4),
        (one("F32", "1", 0, 4), 4),
        (one("F32", [1] * 17, 0, 4), 4),
        (one("F32", [True], 0, 4), 4),
        (one("F32", [1.0], 0, 4), 4),
        (one("F32", [-1, -1], 0, 4), 4),
        (one("F32", [1 << 48, 0], 0, 0), 0),
        (one("U8", [4], 0.0, 4.0), 4),
        (one("U8", [4], 0, None), 4),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4),
        ({"__metadata__": {"a": 1}}, 0),
        ({"__metadata__": ["x"]}, 0),
        ({"__metadata__": "x"}, 0),
        ([1, 2], 0),
        (b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]},'
         b' "a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}', 4),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', 0),
        (b"{", 0),
        (b"", 0),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_itself_is_refused(path, header, count):
    with pytest.raises(CheckpointError, match="its header is not that of a safetensors file"):
        SafetensorsFile(file_of(path, header, bytes(count)))


@pytest.mark.parametrize("extra", [-1, 1, 100])
def test_more_or_fewer_bytes_than_the_header_promises_are_refused(path, extra):
    with pytest.raises(
        CheckpointError, match=r"is not a complete safetensors file: it has .* where its header promises"
    ):
        SafetensorsFile(file_of(path, GOOD, bytes(30 + extra)))


def test_shapes_at_the_bounds_are_taken(path):
    large = (1 << 48) - 1
    header = {"a": entry("F32", [1] * 16, 0, 4), "b": entry("U8", [large, 0], 4, 4)}
    with SafetensorsFile(file_of(path, header, bytes(4))) as file:
        assert file.tensors["a"].shape == (1,) * 16
        assert file.tensors["b"].shape == (large, 0)
    with SafetensorsFile(file_of(path, {"__metadata__": None})) as file:
        assert (file.metadata, file.tensors) == ({}, {})


def test_a_format_that_nobody_knows_is_named(path):
    with pytest.raises(CheckpointError, match=r"holds the tensor 'a' in the unknown format 'F3'"):
        SafetensorsFile(file_of(path, {"a": entry("F3", [1], 0, 4)}, bytes(4)))


@pytest.mark.parametrize("more", [1, 8, 16, 10**6, 2**63])
def test_a_length_beyond_the_files_end_is_said_before_anything_is_read(path, more):
    file_of(path, b"{}", length=2 + more)
    with pytest.raises(CheckpointError, match="or the file is truncated"):
        SafetensorsFile(path)


@pytest.mark.parametrize("length", range(8))
def test_a_file_without_a_length_is_named_with_its_own(path, length):
    path.write_bytes(bytes(length))
    with pytest.raises(CheckpointError, match=f"it is only {length} bytes long"):
        SafetensorsFile(path)


def test_every_cut_of_a_file_is_noticed_and_so_is_a_byte_too_many(path):
    file_of(path, GOOD, DATA)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="is not a complete safetensors file"):
            SafetensorsFile(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=f"it has {len(whole) + 1} bytes where its header promises {len(whole)}"):
        SafetensorsFile(path)


def test_a_header_is_taken_up_to_its_bound(path, monkeypatch):
    text = json.dumps({}).encode().ljust(100)
    monkeypatch.setattr(safetensors_file, "HEADER_LIMIT", 100)
    SafetensorsFile(file_of(path, text)).close()
    with pytest.raises(CheckpointError, match="its header has 101 bytes; the limit is 100"):
        SafetensorsFile(file_of(path, text + b" "))


def test_a_file_that_shrinks_while_its_header_is_read_is_refused_and_closed(path, monkeypatch):
    file_of(path, GOOD, DATA)
    real, opened = os.fstat, []

    def fstat(handle):
        found = real(handle)
        opened.append(handle)
        os.truncate(path, 40)
        return found

    monkeypatch.setattr(safetensors_file.os, "fstat", fstat)
    with pytest.raises(CheckpointError, match="it ends inside its header"):
        SafetensorsFile(path)
    with pytest.raises(OSError, match="Bad file descriptor"):
        real(opened[0])


def test_a_file_that_shrinks_afterwards_is_noticed_at_the_tensor(path):
    with SafetensorsFile(file_of(path, GOOD, DATA)) as file:
        os.truncate(path, path.stat().st_size - 1)
        assert bytes(read_whole(file, "b")) == DATA[4:28]
        with pytest.raises(CheckpointError, match="it ends inside the tensor 'one'"):
            read_whole(file, "one")


def test_a_file_that_is_not_there_or_may_not_be_opened_is_named(path):
    with pytest.raises(CheckpointError, match="cannot be opened: No such file"):
        SafetensorsFile(path)
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot be (opened|read)"):
        SafetensorsFile(path)


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file whose first bytes cannot be read")
def test_a_header_that_cannot_be_read_is_named():
    with pytest.raises(CheckpointError, match="mem cannot be read at its header: Input/output error"):
        SafetensorsFile(Path("/proc/self/mem"))


def test_reads_that_give_little_at_a_time_are_gone_on_with(path, monkeypatch):
    real = os.preadv
    monkeypatch.setattr(safetensors_file.os, "preadv", lambda fd, buffers, at: real(fd, [buffers[0][:5]], at))
    with SafetensorsFile(file_of(path, GOOD, DATA)) as file:
        assert bytes(read_whole(file, "b")) == DATA[4:28]
        buffer = bytearray(4)
        assert not fill(file.locate("one")[0], memoryview(buffer), file.locate("one")[1])
        assert buffer == DATA[28:] + bytes(2)
