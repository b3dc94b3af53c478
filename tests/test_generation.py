"""Manifests and weight files of checkpoints by themselves, and as an earlier version wrote them."""

import builtins
import errno
import json
import os
from pathlib import Path

import pytest

from fastsd_helpers.dreambooth.resume.generation import (
    FileEntry,
    NotWhole,
    describe,
    generation_name,
    list_generations,
    load_tensors,
    make_manifest,
    parse_name,
    read_generation,
    role_problem,
    save_tensors,
    summary_row,
    verify_files,
)
from fastsd_helpers.errors import CheckpointError

NAME = "000007-unet-000120-0123abcd"
EARLIER = "000003-unet-000040-89abcdef"
# Written by the first version: what a checkpoint's own hash is taken over must never change.
RECORDED = {
    "schema": 1, "seq": 7, "stage": "unet", "step": 120, "keep": False, "timeline": "t", "record": {"z": 1, "a": [0.5]},
    "files": [{"role": "unet", "path": f"{NAME}/unet.safetensors", "bytes": 3,
               "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", "carried": False}],
    "sha256": "a4f88ef8276de354b09dc3cbcdbbf5c25ffe83fa49973400699a014568effe4f",
}  # fmt: skip


def entry(role="unet", *, name=NAME, carried=False, data=b"abc", **changes):
    import hashlib

    made = {"role": role, "path": f"{name}/{role}.safetensors", "bytes": len(data), "carried": carried}
    return FileEntry(**{**made, "sha256": hashlib.sha256(data).hexdigest(), **changes})


def manifest(*files, **changes):
    values = {"seq": 7, "stage": "unet", "step": 120, "keep": False, "timeline": "t", "record": {"z": 1, "a": [0.5]}}
    return make_manifest(**{**values, "files": files or (entry(),), **changes})


def write(folder: Path, content: bytes, *, name: str = NAME, data: bytes | None = b"abc", role: str = "unet") -> None:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "manifest.json").write_bytes(content)
    if data is not None:
        (folder / name / f"{role}.safetensors").write_bytes(data)


def test_a_manifest_written_by_the_first_version_is_read(tmp_path):
    write(tmp_path, json.dumps(RECORDED).encode())
    found = read_generation(tmp_path, NAME)
    assert (found.seq, found.stage, found.step, found.keep, found.timeline) == (7, "unet", 120, False, "t")
    assert found.record == {"z": 1, "a": [0.5]}
    assert found.roles == ("unet",)
    assert repr(found) == f"Generation({NAME!r})"
    verify_files(found)
    assert json.loads(manifest()) == RECORDED
    shuffled = {key: RECORDED[key] for key in sorted(RECORDED, reverse=True)}
    write(tmp_path, json.dumps(shuffled, indent=3).encode())
    assert read_generation(tmp_path, NAME).seq == 7, "the order of its lines is nobody's business"


def test_every_changed_value_of_a_manifest_is_noticed(tmp_path):
    for key, value in {"seq": 8, "stage": "text_encoder", "step": 121, "keep": True, "timeline": "", "record": {},
                       "files": [], "sha256": "0" * 64, "more": 1, "schema": 0}.items():  # fmt: skip
        write(tmp_path, json.dumps({**RECORDED, key: value}).encode())
        with pytest.raises(NotWhole, match="does not match its own hash"):
            read_generation(tmp_path, NAME)


def test_a_manifest_of_another_checkpoint_is_not_this_ones(tmp_path):
    for name in ("000008-unet-000120-0123abcd", "000007-unet-000121-0123abcd", "000007-text_encoder-000120-0123abcd"):
        write(tmp_path, manifest(), name=name)
        with pytest.raises(NotWhole, match="belongs to another checkpoint"):
            read_generation(tmp_path, name)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"manifest\.json \(0 bytes\) is truncated or unreadable"),
        (b"[]", "truncated or unreadable"),
        (b"{}", "truncated or unreadable"),
        (b'"text"', "truncated or unreadable"),
        (b"[" * 100_000, "truncated or unreadable"),
        (json.dumps({**RECORDED, "schema": 2}).encode(), r"written by a newer fastsd_helpers \(schema 2\)"),
        (json.dumps({**RECORDED, "schema": "2"}).encode(), "does not match its own hash"),
        (None, r"is incomplete: its manifest\.json is missing"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_said(tmp_path, content, said):
    (tmp_path / NAME).mkdir()
    if content is not None:
        (tmp_path / NAME / "manifest.json").write_bytes(content)
    with pytest.raises(NotWhole, match=said):
        read_generation(tmp_path, NAME)
    if content is None:
        (tmp_path / NAME / "manifest.json").mkdir()
        with pytest.raises(NotWhole, match="cannot be read"):
            read_generation(tmp_path, NAME)


def test_a_record_that_json_cannot_hold_is_refused():
    for value in (float("nan"), float("inf"), {1}, Path("x")):
        with pytest.raises(CheckpointError, match="contains a value that JSON cannot store"):
            manifest(record={"value": value})


@pytest.mark.parametrize(
    "path", [f"{NAME}/a/b", f"{NAME}/..", "x/unet.safetensors", f"../{NAME}/x", NAME, f"{NAME}/a b"]
)
def test_a_path_that_leads_elsewhere_is_refused(tmp_path, path):
    if path == f"{NAME}/..":
        path = f"{NAME}/../x"
    write(tmp_path, manifest(entry(path=path)))
    with pytest.raises(NotWhole, match="it names a file outside of the checkpoints"):
        read_generation(tmp_path, NAME)


def test_the_local_manifest_and_the_local_file_come_first(tmp_path):
    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    write(folder, manifest(keep=False), data=b"old")
    assert read_generation(folder, NAME, scratch=scratch).keep is False
    write(scratch, manifest(keep=True), data=b"abc")
    found = read_generation(folder, NAME, scratch=scratch)
    assert found.keep is True
    assert found.find(found.files[0]) == scratch / NAME / "unet.safetensors"
    verify_files(found)
    (scratch / NAME / "unet.safetensors").unlink()
    assert found.find(found.files[0]) == folder / NAME / "unet.safetensors"
    assert read_generation(folder, NAME).keep is False
    with pytest.raises(NotWhole):
        verify_files(found)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, r"is incomplete: unet\.safetensors is missing"),
        (b"ab", r"is incomplete: unet\.safetensors has 2 of 3 bytes"),
        (b"abcd", r"is damaged: unet\.safetensors has 4 of 3 bytes"),
        (b"abd", "has the right size but a different SHA-256"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, data, said):
    write(tmp_path, manifest(), data=data)
    found = read_generation(tmp_path, NAME)
    with pytest.raises(NotWhole, match=said):
        verify_files(found)
    if data == b"abd":
        verify_files(found, hashes=False)
    else:
        with pytest.raises(NotWhole, match=said):
            verify_files(found, hashes=False)


def test_a_carried_file_is_looked_for_where_it_lies(tmp_path):
    write(tmp_path, manifest(entry(), entry("text_encoder", name=EARLIER, carried=True)))
    with pytest.raises(NotWhole, match=r"text_encoder\.safetensors is missing"):
        verify_files(read_generation(tmp_path, NAME))
    (tmp_path / EARLIER).mkdir()
    (tmp_path / EARLIER / "text_encoder.safetensors").write_bytes(b"abc")
    verify_files(read_generation(tmp_path, NAME))


def test_a_file_that_cannot_be_looked_at_or_read_is_said(tmp_path, monkeypatch):
    write(tmp_path, manifest(entry(), entry("text_encoder", name=EARLIER, carried=True)))
    (tmp_path / EARLIER).write_bytes(b"a file in the place of its folder")
    with pytest.raises(NotWhole, match=r"cannot be read: text_encoder\.safetensors: Not a directory"):
        verify_files(read_generation(tmp_path, NAME))
    write(tmp_path, manifest())
    found, real = read_generation(tmp_path, NAME), builtins.open

    def broken(path, *words, **named):
        if str(path).endswith("unet.safetensors"):
            raise OSError(errno.EIO, "Input/output error")
        return real(path, *words, **named)

    monkeypatch.setattr(builtins, "open", broken)
    with pytest.raises(NotWhole, match=r"cannot be read: Could not read .*unet\.safetensors.*Input/output error$"):
        verify_files(found)


def test_large_numbers_of_bytes_are_grouped(tmp_path):
    write(tmp_path, manifest(entry(bytes=1_234_567)))
    with pytest.raises(NotWhole, match=r"has 3 of 1 234 567 bytes"):
        verify_files(read_generation(tmp_path, NAME))


# --------------------------------------------------------------------------------------------------------- names


def test_names_are_read_as_they_are_made():
    name = generation_name(7, "unet", 120)
    assert parse_name(name) == (7, "unet", 120)
    assert name.startswith("000007-unet-000120-")
    assert name != generation_name(7, "unet", 120)
    assert parse_name(generation_name(1_234_567, "text_encoder2", 0)) == (1_234_567, "text_encoder2", 0)
    for stage, step in [("Unet", 1), ("un-et", 1), ("", 1), ("a/b", 1), ("unet", -1)]:
        with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
            generation_name(1, stage, step)
    for other in ("000007-unet-000120", "7-unet-120-0123abcd", f"{NAME}x", f"x{NAME}", "loaded"):
        assert parse_name(other) is None
    assert describe(NAME) == "000007 (unet, step 120)"
    assert describe("loaded") == "loaded"


def test_generations_are_listed_the_newest_first_whatever_their_names_width(tmp_path):
    names = ["000009-unet-000001-00000000", "1000000-unet-000001-00000000", "000010-unet-000001-ffffffff",
             "000010-unet-000001-00000000"]  # fmt: skip
    for name in [*names, "loaded", ".hidden"]:
        (tmp_path / name).mkdir()
    assert list_generations(tmp_path) == [names[1], names[2], names[3], names[0]]
    assert list_generations(tmp_path / "nowhere") == []


def test_a_role_is_a_plain_name():
    assert all(role_problem(role) is None for role in ("unet", "text_encoder_2", "7"))
    for role in ("", "Unet", "a b", "a/b", "a.b"):
        assert "cannot be the name" in role_problem(role)


def test_a_line_of_the_list_counts_what_a_checkpoint_has_of_its_own():
    row = summary_row(NAME, (entry(), entry("text_encoder", carried=True, bytes=99)), True, state="whole")
    assert (row["seq"], row["stage"], row["step"], row["keep"], row["bytes"]) == (7, "unet", 120, True, 3)
    assert (row["whole"], row["state"], row["name"], set(row["sha256s"])) == (
        True,
        "whole",
        NAME,
        {"unet", "text_encoder"},
    )
    assert summary_row(NAME, (), False, state="copying")["whole"] is False


# --------------------------------------------------------------------------------------------------- weight files


def test_only_what_shares_memory_is_copied_before_it_is_written(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    whole, part = torch.arange(12.0), torch.arange(6.0).reshape(2, 3)
    tensors = {
        "a": whole,
        "again": whole,
        "part": part[1],
        "turned": part.T,
        "own": torch.ones(3),
        "empty": torch.empty(0),
    }
    seen = {}
    real = safetensors.save_file
    monkeypatch.setattr(
        safetensors, "save_file", lambda given, *more, **named: (seen.update(given), real(given, *more, **named))
    )
    save_tensors(tensors, tmp_path / "x.safetensors")
    where = {name: tensor.data_ptr() for name, tensor in seen.items()}
    assert (where["a"], where["own"]) == (whole.data_ptr(), tensors["own"].data_ptr()), (
        "a copy of every weight is memory"
    )
    assert where["again"] != where["a"]
    assert all(tensor.is_contiguous() for tensor in seen.values())
    loaded = load_tensors(tmp_path / "x.safetensors")
    assert list(loaded) == list(tensors)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_without_our_order_is_read_and_one_that_is_none_is_named(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file({"b": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert set(load_tensors(tmp_path / "x.safetensors")) == {"a", "b"}
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError, match=r"is not a readable \.safetensors file"):
        load_tensors(tmp_path / "x.safetensors")


def test_a_role_is_loaded_through_a_checked_local_copy_that_does_not_stay(tmp_path):
    torch = pytest.importorskip("torch")
    from fastsd_helpers.errors import FastSDError

    folder, scratch = tmp_path / "folder", tmp_path / "scratch"
    (folder / NAME).mkdir(parents=True)
    file = folder / NAME / "unet.safetensors"
    save_tensors({"w": torch.ones(2)}, file)
    data = file.read_bytes()
    (folder / NAME / "manifest.json").write_bytes(manifest(entry(data=data)))
    found = read_generation(folder, NAME, scratch=scratch)
    assert found.load("unet")["w"].tolist() == [1, 1]
    assert list((scratch / "loaded").iterdir()) == []
    assert read_generation(folder, NAME).load("unet")["w"].tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="holds no 'vae'") as caught:
        found.load("vae")
    assert caught.value.hint == "It holds: unet."
    changed = bytearray(data)
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(FastSDError):
        found.load("unet")
    (scratch / NAME).mkdir()
    (scratch / NAME / "unet.safetensors").write_bytes(data)
    assert found.load("unet")["w"].tolist() == [1, 1], "what is on this machine is read where it lies"
    assert os.listdir(scratch / "loaded") == []
