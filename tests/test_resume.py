"""Checkpoints that survive: whatever a kill or a mount leaves, a run goes on from a whole generation."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fakes import WriteBackMount, full_disk, read_only, small_disk

from fastsd_helpers import drive, files, runtime
from fastsd_helpers.dreambooth.resume import CheckpointStore, Snapshot, generation, store
from fastsd_helpers.dreambooth.resume import mount as shelf
from fastsd_helpers.errors import CheckpointError, FastSDError

torch = pytest.importorskip("torch")


FAULTS = (
    "checkpoint.begin",
    "checkpoint.write",
    "checkpoint.fsync",
    "checkpoint.hash",
    "copy.begin",
    "copy.half",
    "copy.before_rename",
    "copy.before_manifest",
    "copy.after_manifest",
    "prune",
)


def made_up(role: str, step: int, *, width: int = 16) -> dict[str, torch.Tensor]:
    """Tensors that only this role has at this step, in an order that is not the alphabet's."""
    source = torch.Generator().manual_seed(1000 * step + len(role))
    return {
        "z.weight": torch.randn(width, 3, generator=source),
        "a.count": torch.tensor(step),
        "m.half": torch.randn(width, generator=source).half(),
    }


def snapshot(stage: str, step: int, *, first: bool = False, keep: bool = False) -> Snapshot:
    """As the engine saves: stage 1 trains the text encoder; in stage 2 it is carried over after the first time."""
    if stage == "text_encoder":
        tensors = {"text_encoder": made_up("text_encoder", step), "optimizer": made_up("optimizer", step)}
        return Snapshot(stage, step, tensors, {"at": [stage, step]}, keep=keep)
    tensors = {"unet": made_up("unet", step), "optimizer": made_up("optimizer", step)}
    if first:
        tensors["text_encoder"] = made_up("text_encoder", 0)
    carried = () if first else ("text_encoder",)
    return Snapshot(stage, step, tensors, {"at": [stage, step]}, carried, keep)


def open_store(folder: Path, scratch: Path, said: list[str] | None = None, **options) -> CheckpointStore:
    return CheckpointStore(folder, scratch=scratch, report=(said if said is not None else []).append, **options)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def places(tmp_path):
    return tmp_path / "checkpoints", tmp_path / "scratch"


# -------------------------------------------------------------------------------------------- the normal


def test_a_saved_generation_comes_back_bit_for_bit_and_in_order(places, tmp_path):
    with open_store(*places) as saving:
        assert saving.newest() == (None, [])
        name = saving.save(snapshot("unet", 10, first=True))
        assert saving.flush() == []
    generation, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert (generation.name, generation.stage, generation.step) == (name, "unet", 10)
    assert generation.record == {"at": ["unet", 10]}
    assert passed_over == []
    assert set(generation.roles) == {"unet", "optimizer", "text_encoder"}
    assert_same(generation.load("unet"), made_up("unet", 10))
    assert_same(generation.load("optimizer"), made_up("optimizer", 10))


def test_loaded_tensors_can_be_trained_on_without_changing_the_file(places, tmp_path):
    with open_store(*places) as saving:
        saving.save(snapshot("unet", 10, first=True))
    with open_store(places[0], tmp_path / "elsewhere") as store:
        generation, _ = store.newest()
        loaded = generation.load("unet")
        loaded["z.weight"].add_(1)
        assert_same(generation.load("unet"), made_up("unet", 10))


def test_tensors_of_every_kind_are_kept(places, tmp_path):
    shared = torch.arange(12.0)
    tensors = {
        "tied.b": shared,
        "tied.a": shared,
        "part": shared[2:5],
        "turned": torch.randn(3, 4).T,
        "none": torch.empty(0, 3),
        "scalar": torch.tensor(1.5),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "bf16": torch.randn(4).bfloat16(),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "grad": torch.nn.Parameter(torch.randn(2)),
    }
    with open_store(*places) as store:
        store.save(Snapshot("unet", 1, {"odd": tensors, "nothing": {}}))
    generation, _ = open_store(places[0], tmp_path / "elsewhere").newest()
    loaded = generation.load("odd")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        plain = tensor.detach().contiguous()
        assert (
            loaded[name].contiguous().view(-1).numpy(force=True).tobytes() == plain.view(-1).numpy().tobytes()
            if (tensor.dtype != torch.bfloat16)
            else torch.equal(loaded[name], plain)
        )
    assert generation.load("nothing") == {}


def test_carried_roles_are_referenced_and_not_written_again(places, tmp_path):
    with open_store(*places) as store:
        first = store.save(snapshot("unet", 0, first=True))
        store.save(snapshot("unet", 1))
        last = store.save(snapshot("unet", 2))
    assert files_of(places[0]).count(f"{first}/text_encoder.safetensors") == 1
    assert f"{last}/text_encoder.safetensors" not in files_of(places[0])
    with open_store(places[0], tmp_path / "elsewhere") as store:
        generation, _ = store.newest()
        assert generation.name == last
        assert_same(generation.load("text_encoder"), made_up("text_encoder", 0))
        assert store.can_carry("text_encoder")
        assert not store.can_carry("vae")
        store.save(snapshot("unet", 3))  # goes on carrying what an earlier process wrote
    generation, _ = open_store(places[0], tmp_path / "third").newest()
    assert generation.step == 3
    assert_same(generation.load("text_encoder"), made_up("text_encoder", 0))


def test_only_the_newest_whole_generations_are_kept_and_what_they_carry(places):
    with open_store(*places, keep_last=2) as store:
        names = [store.save(snapshot("unet", step, first=step == 0, keep=step == 1)) for step in range(6)]
        store.flush()
        assert [row["name"] for row in store.generations()] == [names[1], names[4], names[5]]
        assert files_of(places[0] / names[0]) == ["text_encoder.safetensors"]
        assert all(
            row["whole"] and set(row["sha256s"]) == {"unet", "optimizer", "text_encoder"} for row in store.generations()
        )
        assert not (places[0] / names[2]).exists()
    assert files_of(places[1]) == []  # nothing is left on the local disk


def test_a_role_that_is_no_longer_saved_does_not_stay_for_ever(places):
    with open_store(*places, keep_last=1) as store:
        first = store.save(snapshot("text_encoder", 5))
        store.save(snapshot("unet", 0, first=True))
        store.save(snapshot("unet", 1))
    assert not (places[0] / first).exists()


def test_an_unsettled_mount_keeps_one_generation_that_has_had_time_to_arrive(places):
    with open_store(*places, keep_last=1, settle_s=3600) as store:
        names = [store.save(snapshot("text_encoder", step)) for step in range(3)]
        assert store.flush() == []
    assert sorted(os.listdir(places[0])) == names
    with open_store(*places, keep_last=1, settle_s=3600) as store:
        store.newest()  # read from a mount made later: names[2] has arrived
        names.append(store.save(snapshot("text_encoder", 3)))
    assert sorted(os.listdir(places[0])) == names[2:]


def test_saving_returns_before_the_copy_is_made_and_waits_when_copies_pile_up(places, monkeypatch):
    go, said = threading.Event(), []
    copy = shelf.copy_verified
    monkeypatch.setattr(shelf, "copy_verified", lambda *args, **named: (go.wait(20), copy(*args, **named)))
    store = open_store(*places, said=said)
    names = [store.save(snapshot("unet", step, first=True)) for step in range(2)]
    assert files_of(places[0]) == []
    assert said == []
    assert [row["state"] for row in store.generations()] == ["copying", "copying"]
    threading.Timer(0.3, go.set).start()
    started = time.monotonic()
    names.append(store.save(snapshot("unet", 2, first=True)))
    assert time.monotonic() - started > 0.1
    assert "The training waits: 2 checkpoints are still being copied" in said[0]
    store.close()
    assert [row["name"] for row in store.generations()] == names[1:]


def test_a_mount_that_hangs_does_not_hold_the_training_for_ever(places, monkeypatch):
    go, said = threading.Event(), []
    copy = shelf.copy_verified
    monkeypatch.setattr(shelf, "copy_verified", lambda *args, **named: (go.wait(20), copy(*args, **named)))
    store = open_store(*places, said=said, patience_s=0.2)
    for step in range(3):
        store.save(snapshot("unet", step, first=True))
    assert "(unet, step 1) was dropped for a newer one" in said[-1]
    go.set()
    store.close()
    assert [row["step"] for row in store.generations()] == [0, 2]


class Turnstile:
    """A mount that takes nothing of a checkpoint until it is told to let it in, or to refuse it as a full one does."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._write = folder, os.write
        self._change = threading.Condition()
        self._open: dict[str, bool] = {}  # checkpoint -> whether it may come in
        self._all = False
        monkeypatch.setattr(os, "write", self._pass)

    def let_in(self, name: str, *, refuse: bool = False) -> None:
        with self._change:
            self._open[name] = not refuse
            self._change.notify_all()

    def let_all_in(self) -> None:
        with self._change:
            self._all = True
            self._change.notify_all()

    def _pass(self, handle: int, data: bytes) -> int:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_relative_to(self._folder):
            name = path.relative_to(self._folder).parts[0]
            with self._change:
                assert self._change.wait_for(lambda: self._all or name in self._open, timeout=60), name
                if not (self._all or self._open[name]):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(handle, data)


def test_a_role_is_carried_as_it_was_last_saved_while_older_copies_are_still_on_their_way(
    places, tmp_path, monkeypatch
):
    mount = Turnstile(places[0], monkeypatch)
    with open_store(*places, keep_last=9) as store:
        first, second = (store.save(Snapshot("unet", step, {"unet": made_up("unet", step)})) for step in (1, 2))
        mount.let_in(first)
        wait_for(lambda: store.generations()[0]["state"] == "whole")
        third = store.save(Snapshot("unet", 3, {"optimizer": made_up("optimizer", 3)}, carried=("unet",)))
        mount.let_all_in()
        assert store.flush() == []
    found, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert (found.name, passed_over) == (third, [])
    assert_same(found.load("unet"), made_up("unet", 2))
    assert [entry.path.partition("/")[0] for entry in found.files if entry.carried] == [second]


@pytest.mark.parametrize("seed", range(8))
def test_every_generation_holds_what_was_saved_last_whatever_waits_fails_and_is_carried(
    places, tmp_path, monkeypatch, seed
):
    """Roles change, are carried, are left out and come again, while the mount is late and refuses some."""
    chance, mount = random.Random(seed), Turnstile(places[0], monkeypatch)
    roles = ("text_encoder", "unet", "optimizer", "raw")
    held: dict[str, int] = {}  # role -> the step at which it was saved
    wanted: dict[str, dict[str, int]] = {}
    waiting: list[str] = []
    with open_store(*places, keep_last=99, retry_s=3600) as store:
        for step in range(1, 13):
            new = {role for role in roles if step == 1 or chance.random() < 0.4}
            carried = {role for role in held if role not in new and chance.random() < 0.9}
            held = {**{role: held[role] for role in carried}, **dict.fromkeys(new, step)}
            while len(waiting) > chance.randrange(2):  # at most two may wait
                mount.let_in(waiting.pop(0), refuse=chance.random() < 0.3)
            tensors = {role: made_up(role, step) for role in sorted(new)}
            name = store.save(Snapshot("unet", step, tensors, carried=tuple(sorted(carried))))
            waiting.append(name)
            wanted[name] = dict(held)
        mount.let_all_in()
        assert store.flush() == []
        rows = store.generations(verify=True)
    assert rows[-1]["name"] == name
    assert all(row["whole"] for row in rows)
    assert len(rows) > 3
    for row in rows:
        found = generation.read_generation(places[0], row["name"])
        assert set(found.roles) == set(wanted[row["name"]])
        for role, step in wanted[row["name"]].items():
            assert_same(found.load(role), made_up(role, step))


def test_names_never_repeat_whatever_was_seen_of_earlier_runs(places, tmp_path):
    (places[0] / "000041-unet-000400-0123abcd").mkdir(parents=True)  # never finished
    (places[0] / "000099-notes").mkdir()  # not ours
    with open_store(*places) as store:
        assert store.newest()[0] is None
        name = store.save(snapshot("unet", 1, first=True))
    assert name.startswith("000042-unet-000001-")
    assert (places[0] / "000099-notes").is_dir()


def test_another_timeline_is_not_resumed_from(places, tmp_path):
    with open_store(*places, timeline="first") as store:
        store.save(snapshot("unet", 50, first=True))
    with open_store(places[0], tmp_path / "elsewhere", timeline="second") as store:
        assert store.newest() == (None, [])
        store.save(snapshot("unet", 1, first=True))
    with open_store(places[0], tmp_path / "third", timeline="second") as store:
        assert store.newest()[0].step == 1


# ------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (Snapshot("unet", 1, {}, carried=("vae",)), "vae cannot be carried over"),
        (Snapshot("unet", 1, {"../unet": {}}), "'../unet' cannot be the name"),
        (Snapshot("U-Net", 1, {}), "'U-Net' at step 1 cannot name a checkpoint"),
        (Snapshot("unet", -1, {}), "at step -1 cannot name"),
        (Snapshot("unet", 1, {}, {"loss": float("nan")}), "contains a value that JSON cannot store"),
        (Snapshot("unet", 1, {}, {"path": Path()}), "contains a value that JSON cannot store"),
    ],
)
def test_a_snapshot_that_cannot_be_stored_is_refused_at_once(places, bad, expected):
    with open_store(*places) as store, pytest.raises(CheckpointError, match=expected):
        store.save(bad)


def test_a_closed_store_takes_nothing_more(places):
    store = open_store(*places)
    store.close()
    store.close()
    with pytest.raises(CheckpointError, match="closed"):
        store.save(snapshot("unet", 1, first=True))


# ------------------------------------------------------------------------------------------------ damage


def two_generations(places) -> tuple[Path, Path]:
    with open_store(*places) as store:
        names = [store.save(snapshot("unet", step, first=True)) for step in (1, 2)]
    return places[0] / names[0], places[0] / names[1]


def flip_bit(path: Path, *, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "truncated": (
        lambda new: os.truncate(new / "unet.safetensors", 100),
        "is incomplete: unet.safetensors has 100 of ",
    ),
    "empty": (lambda new: os.truncate(new / "optimizer.safetensors", 0), "optimizer.safetensors has 0 of "),
    "longer": (lambda new: (new / "unet.safetensors").open("ab").write(b"x"), "is damaged: unet.safetensors has "),
    "one bit": (
        lambda new: flip_bit(new / "unet.safetensors"),
        "unet.safetensors has the right size but a different SHA-256",
    ),
    "file missing": (lambda new: (new / "unet.safetensors").unlink(), "is incomplete: unet.safetensors is missing"),
    "manifest missing": (lambda new: (new / "manifest.json").unlink(), "is incomplete: its manifest.json is missing"),
    "manifest empty": (lambda new: os.truncate(new / "manifest.json", 0), "(0 bytes) is truncated"),
    "manifest cut": (lambda new: os.truncate(new / "manifest.json", 300), "(300 bytes) is truncated"),
    "manifest bit": (lambda new: flip_bit(new / "manifest.json", at=60), "manifest.json"),
    "all gone": (lambda new: [path.unlink() for path in new.iterdir()], "manifest.json is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_generation_is_passed_over_in_one_sentence(places, tmp_path, damage):
    older, newer = two_generations(places)
    spoil, expected = DAMAGE[damage]
    spoil(newer)
    store = open_store(places[0], tmp_path / "elsewhere")
    generation, passed_over = store.newest()
    assert generation.name == older.name
    assert_same(generation.load("unet"), made_up("unet", 1))
    assert len(passed_over) == 1
    assert passed_over[0].startswith("Checkpoint 000002 (unet, step 2) ")
    assert passed_over[0].endswith("; resuming from 000001 (unet, step 1).")
    assert expected in passed_over[0]
    assert not [row for row in store.generations(verify=True) if row["name"] == newer.name and row["whole"]]


def test_when_nothing_is_whole_the_run_starts_over_and_says_so(places, tmp_path):
    for damaged in two_generations(places):
        flip_bit(damaged / "unet.safetensors")
    generation, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert generation is None
    assert [sentence.rpartition("; ")[2] for sentence in passed_over] == ["starting from the beginning."] * 2


def test_a_generation_is_not_whole_when_what_it_carries_is_damaged(places, tmp_path):
    with open_store(*places) as store:
        first = store.save(snapshot("unet", 0, first=True))
        store.save(snapshot("unet", 1))
    flip_bit(places[0] / first / "text_encoder.safetensors")
    generation, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert generation is None
    assert len(passed_over) == 2


@pytest.mark.parametrize("path", ["../../secret", "/etc/hostname", "000001-unet-000001-00000000/../../x", "x/y", ""])
def test_a_manifest_cannot_lead_out_of_the_checkpoints(places, tmp_path, path):
    entry = generation.FileEntry("unet", path, 1, "0" * 64, carried=True)
    name = "000001-unet-000001-00000000"
    (places[0] / name).mkdir(parents=True)
    manifest = generation.make_manifest(seq=1, stage="unet", step=1, keep=False, timeline="", record={}, files=(entry,))
    (places[0] / name / "manifest.json").write_bytes(manifest)
    found, passed_over = open_store(*places).newest()
    assert found is None
    assert "names a file outside of the checkpoints" in passed_over[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        b"{}",
        b'{"schema": 1}',
        b'{"sha256": null}',
        b"\xff\xfe",
        b"[" * 9999,
    ],
    ids=["empty", "cut", "null", "list", "number", "text", "no fields", "no sum", "sum alone", "no text", "deep"],
)
def test_a_manifest_that_is_something_else_is_passed_over(places, tmp_path, content):
    older, newer = two_generations(places)
    (newer / "manifest.json").write_bytes(content)
    found, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert found.name == older.name
    assert len(passed_over) == 1
    assert "is damaged: its manifest.json" in passed_over[0]
    states = [row["state"] for row in open_store(places[0], tmp_path / "elsewhere").generations()]
    assert states[0] == "whole"
    assert "is damaged" in states[1]


@pytest.mark.parametrize("field", ["schema", "seq", "stage", "step", "keep", "timeline", "record", "files", "sha256"])
def test_a_manifest_that_lacks_any_field_is_passed_over(places, tmp_path, field):
    older, newer = two_generations(places)
    body = json.loads((newer / "manifest.json").read_bytes())
    del body[field]
    (newer / "manifest.json").write_text(json.dumps(body))
    found, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert found.name == older.name
    assert "is damaged: its manifest.json" in passed_over[0]


def test_a_manifest_of_a_newer_version_is_passed_over(places, tmp_path):
    older, newer = two_generations(places)
    body = json.loads((newer / "manifest.json").read_bytes())
    (newer / "manifest.json").write_text(json.dumps({**body, "schema": 9}))
    found, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert found.name == older.name
    assert "written by a newer fastsd_helpers (schema 9)" in passed_over[0]


def test_a_file_damaged_between_finding_and_loading_is_an_error_not_garbage(places, tmp_path):
    two_generations(places)
    found, _ = open_store(places[0], tmp_path / "elsewhere").newest()
    flip_bit(places[0] / found.name / "unet.safetensors")
    with pytest.raises(FastSDError, match="was read back with other bytes"):
        found.load("unet")
    with pytest.raises(CheckpointError, match="holds no 'vae'"):
        found.load("vae")


def test_remains_of_a_cut_copy_are_removed_once_a_later_generation_is_whole(places, tmp_path):
    two_generations(places)
    orphan = places[0] / "000003-unet-000003-00c0ffee"
    orphan.mkdir()
    (orphan / ".unet.safetensors.12345678.part").write_bytes(b"half")
    store = open_store(places[0], tmp_path / "elsewhere")
    assert store.newest()[0].step == 2
    assert orphan.is_dir()
    store.save(snapshot("unet", 3))
    store.close()
    assert not orphan.exists()


# --------------------------------------------------------------------------- full disks and broken mounts


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (lambda folder: full_disk(folder), "the disk or Drive is full (No space left on device)"),
        (lambda folder: full_disk(folder, after_bytes=700), "the disk or Drive is full"),
        (lambda folder: full_disk(folder, code=errno.EIO), "Input/output error"),
        (lambda folder: full_disk(folder, code=errno.ENOTCONN), "Transport endpoint is not connected"),
        (lambda folder: read_only(folder), "it cannot be written to (Read-only file system)"),
    ],
    ids=["full", "full half way", "EIO", "mount lost", "read-only"],
)
def test_training_goes_on_when_the_mount_fails_and_the_checkpoint_is_written_later(places, tmp_path, trouble, expected):
    said: list[str] = []
    with open_store(*places) as store:
        before = store.save(snapshot("unet", 1, first=True))
    with open_store(*places, said=said) as store:
        store.newest()
        with trouble(places[0]):
            store.save(snapshot("unet", 2))
            store.save(snapshot("unet", 3))
            (problem,) = store.flush()
            assert "Checkpoint 000003 (unet, step 3) was not written" in problem
            assert expected in problem
        assert len([sentence for sentence in said if expected in sentence]) == 1  # once per kind
        assert open_store(places[0], tmp_path / "other").newest()[0].name == before
        assert store.flush() == []
        assert said[-1].startswith("Checkpoint 000003 (unet, step 3) is in ")
    assert not [path for path in files_of(places[0]) if path.endswith(".part")]
    found, passed_over = open_store(places[0], tmp_path / "third").newest()
    assert (found.step, passed_over) == (3, [])
    assert_same(found.load("text_encoder"), made_up("text_encoder", 0))


def test_a_failed_copy_is_tried_again_by_itself(places):
    said: list[str] = []
    with open_store(*places, said=said, retry_s=0.05) as store:
        with full_disk(places[0]):
            store.save(snapshot("unet", 1, first=True))
            wait_for(lambda: said)
        wait_for(lambda: any(row["whole"] for row in store.generations()))
        assert "copying works again" in said[-1]


def test_a_carried_file_that_never_arrived_is_copied_again(places, tmp_path):
    with open_store(*places) as store:
        with full_disk(places[0]):
            store.save(snapshot("unet", 1, first=True))  # has the text encoder, and is superseded
            store.flush()
            store.save(snapshot("unet", 2))
            assert store.flush()
        assert store.can_carry("text_encoder")
        name = store.save(snapshot("unet", 3))
        assert store.flush() == []
    assert (places[0] / name / "text_encoder.safetensors").is_file()
    found, _ = open_store(places[0], tmp_path / "elsewhere").newest()
    assert found.step == 3
    assert_same(found.load("text_encoder"), made_up("text_encoder", 0))


def test_a_carried_file_that_somebody_deleted_is_said_to_be_gone(places):
    with open_store(*places) as store:
        name = store.save(snapshot("unet", 1, first=True))
        store.flush()
        (places[0] / name / "text_encoder.safetensors").unlink()
        assert not store.can_carry("text_encoder")
        store.save(snapshot("unet", 2))
        assert "text_encoder.safetensors is missing from" in store.flush()[0]
        store.save(snapshot("unet", 3, first=True))
        assert store.flush() == []


def test_a_mount_that_changes_bytes_is_noticed_before_the_name_appears(places, monkeypatch):
    said: list[str] = []
    write = os.write
    spoilt = []

    def spoil(handle: int, data: bytes) -> int:
        path = os.readlink(f"/proc/self/fd/{handle}")
        if not spoilt and ".unet.safetensors" in path:
            spoilt.append(path)
            data = bytes(data)[:-1] + bytes([data[-1] ^ 1])
        return write(handle, data)

    monkeypatch.setattr(os, "write", spoil)
    with open_store(*places, said=said) as store:
        store.save(snapshot("unet", 1, first=True))
        wait_for(lambda: said)
        assert "was read back with other bytes" in said[0]
        assert "unet.safetensors" not in "".join(files_of(places[0]))
        assert store.flush() == []
    assert open_store(*places).newest()[0].step == 1


def test_what_never_reached_the_mount_is_found_again_on_the_same_machine(places, tmp_path):
    said: list[str] = []
    with open_store(*places) as store:
        store.save(snapshot("unet", 1, first=True))
    killed = open_store(*places, retry_s=3600)
    killed.newest()
    with full_disk(places[0]):
        killed.save(snapshot("unet", 2))
        killed.flush()
    with open_store(*places, said=said) as store:
        found, passed_over = store.newest()
        assert (found.step, passed_over) == (2, [])
        assert_same(found.load("unet"), made_up("unet", 2))
        assert "was found on this machine" in said[0]
        assert store.flush() == []
    found, _ = open_store(places[0], tmp_path / "another machine").newest()
    assert found.step == 2
    assert_same(found.load("text_encoder"), made_up("text_encoder", 0))


def test_a_full_local_disk_is_reported_and_the_training_goes_on(places, monkeypatch):
    said: list[str] = []
    with open_store(*places, said=said) as store:
        monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 10)
        assert store.save(snapshot("unet", 1, first=True)) is None
        assert "has 10 B left" in said[0]
        assert "was not saved" in store.flush()[0]
        monkeypatch.undo()
        assert store.save(snapshot("unet", 2, first=True)).startswith("000002-")
        assert store.flush() == []


@pytest.mark.parametrize("failing", ["text_encoder", "unet", "optimizer"])
def test_a_file_that_the_system_does_not_let_grow_is_reported_and_never_taken_for_whole(places, tmp_path, failing):
    """The free room is enough, and it is the writing of one file, inside safetensors, that fails."""
    said: list[str] = []
    widths = {role: 40_000 if role == failing else 10 for role in ("text_encoder", "unet", "optimizer")}
    tensors = {role: {"w": torch.randn(width)} for role, width in widths.items()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_store(*places, said=said) as store:
        before = store.save(Snapshot("unet", 1, {"unet": {"w": torch.zeros(10)}}))
        assert store.flush() == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            assert store.save(Snapshot("unet", 2, tensors)) is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert len(said) == 1
        assert "(unet, step 2) was not saved: " in said[0]
        assert "File too large" in said[0]
        assert "The training continues." in said[0]
        assert "was not saved" in store.flush()[0]
        assert files_of(places[1]) == []
        assert [row["name"] for row in store.generations(verify=True)] == [before]
        after = store.save(Snapshot("unet", 3, tensors))
        assert store.flush() == []
    found, passed_over = open_store(places[0], tmp_path / "elsewhere").newest()
    assert (found.name, passed_over) == (after, [])
    assert torch.equal(found.load(failing)["w"], tensors[failing]["w"])


def test_a_disk_with_room_for_the_values_alone_fills_up_inside_the_library(tmp_path):
    said: list[str] = []
    with small_disk(tmp_path / "disk", "200k") as disk:
        store = open_store(tmp_path / "roomy", disk / "scratch", said)
        values = torch.zeros(100 * 1024 // 4)
        ballast = files.free_bytes(disk / "scratch") - values.nbytes
        (disk / "ballast").write_bytes(b"x" * ballast)
        assert files.free_bytes(disk / "scratch") == values.nbytes, "the file's header is what does not fit"
        assert store.save(Snapshot("unet", 1, {"unet": {"w": values}})) is None
        assert "No space left on device" in said[0]
        (disk / "ballast").unlink()
        assert files_of(disk) == []
        assert store.save(Snapshot("unet", 2, {"unet": {"w": values}}))
        store.close()
    assert open_store(tmp_path / "roomy", tmp_path / "elsewhere").newest()[0].step == 2


def test_a_really_full_disk_under_the_local_writes_and_under_the_mount(tmp_path):
    said: list[str] = []
    with small_disk(tmp_path / "disk", "200k") as disk:
        store = open_store(tmp_path / "roomy", disk / "scratch", said)
        (disk / "ballast").write_bytes(b"x" * 150_000)
        big = Snapshot("unet", 1, {"unet": {"w": torch.zeros(12_000)}, "optimizer": {"w": torch.zeros(2_000)}})
        assert store.save(big) is None
        assert "was not saved" in said[0]
        assert files_of(disk / "scratch") == []
        (disk / "ballast").unlink()
        assert store.save(big)
        store.close()
    said.clear()
    with small_disk(tmp_path / "mount", "200k") as disk:
        store = open_store(disk / "checkpoints", tmp_path / "scratch", said, retry_s=3600)
        (disk / "ballast").write_bytes(b"x" * 150_000)
        store.save(Snapshot("unet", 1, {"unet": {"w": torch.zeros(50_000)}}))
        assert "No space left on device" in store.flush()[0]
        assert files_of(disk / "checkpoints") == []
        (disk / "ballast").unlink()
        store.save(Snapshot("unet", 2, {"unet": {"w": torch.zeros(20_000)}}))
        assert store.flush() == []
        assert [row["step"] for row in store.generations()] == [2]
        store.close()


def store_module():
    return store


def wait_for(condition, *, timeout_s: float = 15.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ------------------------------------------------------------------------------- mounts that lose things


class Run:
    """A training on a simulated mount that dies and is resumed, and what must be true of every resume."""

    def __init__(self, root: Path, seed: int, monkeypatch, *, modes: tuple[str, ...], settle_s: float) -> None:
        self.root, self.modes, self.settle_s = root, modes, settle_s
        self.cloud = root / "cloud"
        self.random = random.Random(seed)
        self.saved: dict[str, dict[str, bytes]] = {}  # name -> every file it needs, as it was written
        self.monkeypatch = monkeypatch
        self.newest: list[str | None] = []  # what each resume found

    def live(self, lives: int) -> "Run":
        for life in range(lives):
            base = self.root / f"life{life}"
            view = base / "view"
            WriteBackMount(base / "unused", self.cloud, 0).fresh_view(view)
            mount = WriteBackMount(view, self.cloud, self.random.randrange(10**9), modes=self.modes)
            self._one_life(view, base / "scratch", mount)
        return self

    def _one_life(self, view: Path, scratch: Path, mount: WriteBackMount) -> None:
        expected = self._newest_delivered(view)
        store = open_store(view, scratch, settle_s=self.settle_s)
        found, _ = store.newest()
        assert (found.name if found else None) == expected, "the newest whole generation, no older and no other"
        if found is not None:
            self._assert_true(found)
        self.newest.append(expected)
        step = found.step if found else 0
        # Deliveries fall in the middle of copies, manifests and deletions too.
        with self.monkeypatch.context() as patch:
            for module in (drive, files, shelf):
                patch.setattr(module, "fault_point", lambda name: self.random.random() < 0.3 and mount.step())
            for _ in range(self.random.randint(1, 4)):
                step += 1
                name = store.save(snapshot("unet", step, first=not store.can_carry("text_encoder")))
                assert store.flush() == []
                self._note(view, name)
        mount.crash()
        store.close()

    def _note(self, view: Path, name: str) -> None:
        manifest = json.loads((view / name / "manifest.json").read_bytes())
        paths = [f"{name}/manifest.json", *(entry["path"] for entry in manifest["files"])]
        self.saved[name] = {path: (view / path).read_bytes() for path in paths}

    def _newest_delivered(self, view: Path) -> str | None:
        """The answer by plain comparison of bytes, without manifests or hashes."""
        whole = [
            name
            for name, needed in self.saved.items()
            if all((view / path).is_file() and (view / path).read_bytes() == data for path, data in needed.items())
        ]
        return max(whole, default=None)

    def _assert_true(self, found: generation.Generation) -> None:
        assert found.record == {"at": [found.stage, found.step]}
        assert_same(found.load("unet"), made_up("unet", found.step))
        assert_same(found.load("optimizer"), made_up("optimizer", found.step))
        assert_same(found.load("text_encoder"), made_up("text_encoder", 0))


HARSH = (*WriteBackMount.MODES, "flipped")


@pytest.mark.parametrize("settle_s", [0, 3600])
def test_after_every_one_of_250_crashes_the_newest_delivered_generation_is_found(tmp_path, monkeypatch, settle_s):
    found = 0
    for seed in range(25):
        run = Run(tmp_path / str(seed), seed, monkeypatch, modes=HARSH, settle_s=settle_s).live(5)
        found += sum(name is not None for name in run.newest)
        if settle_s:
            # What a mount has shown once stays: an older generation only goes after a newer one had time to arrive.
            ever = [name for name in run.newest if name is not None]
            assert run.newest == [None] * (len(run.newest) - len(ever)) + sorted(ever)
    assert found >= 25  # else nothing was tested


def test_a_mount_that_is_only_late_is_no_trouble_either(tmp_path, monkeypatch):
    modes = ("late", "out_of_order", "missing")
    for seed in range(6):
        assert any(Run(tmp_path / str(seed), seed, monkeypatch, modes=modes, settle_s=3600).live(4).newest)


# ------------------------------------------------------------------------------------------- real kills


def train_until_killed(view: Path, scratch: Path, steps: int) -> None:
    """What a killed process does: go on from the newest generation and save every step."""
    store = open_store(view, scratch)
    found, _ = store.newest()
    for step in range((found.step if found else 0) + 1, steps + 1):
        store.save(snapshot("unet", step, first=not store.can_carry("text_encoder")))
    problems = store.flush()
    store.close()
    assert problems == []


def in_a_child(work) -> int:
    """Run `work` in a forked process and return its wait status; torch is imported already, so this is quick."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            runtime._passings.clear()
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("passing", [1, 4])
@pytest.mark.parametrize("fault", FAULTS)
def test_kill_9_at_every_fault_point_leaves_a_whole_generation(tmp_path, monkeypatch, fault, passing):
    cloud, view = tmp_path / "cloud", tmp_path / "view"
    with open_store(view, tmp_path / "scratch0") as store:
        store.save(snapshot("unet", 1, first=True))
    mount = WriteBackMount(view, cloud, passing * 100 + len(fault))
    mount.settle()
    mount.start(0.005)
    monkeypatch.setenv("FASTSD_FAULT", f"{fault}:{passing}")
    status = in_a_child(lambda: train_until_killed(view, tmp_path / "scratch1", 8))
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    mount.crash()
    monkeypatch.delenv("FASTSD_FAULT")

    fresh = mount.fresh_view(tmp_path / "fresh")
    with open_store(fresh, tmp_path / "scratch2") as store:
        found, _ = store.newest()
        if found is not None:
            assert 1 <= found.step <= 8
            assert_same(found.load("unet"), made_up("unet", found.step))
            assert_same(found.load("text_encoder"), made_up("text_encoder", 0))
    # On the same machine nothing is lost that was read back: its own view is whole up to the kill.
    with open_store(view, tmp_path / "scratch1") as store:
        found, _ = store.newest()
        assert found is not None
        assert_same(found.load("unet"), made_up("unet", found.step))
    train_until_killed(fresh, tmp_path / "scratch3", 8)
    with open_store(fresh, tmp_path / "scratch4") as store:
        found, passed_over = store.newest()
        assert (found.step, passed_over) == (8, [])
        assert_same(found.load("unet"), made_up("unet", 8))


def test_kill_9_of_a_fresh_process_in_the_middle_of_a_copy(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_resume as t; from pathlib import Path;"
        "t.train_until_killed(Path('view'), Path('scratch'), 3)"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    died = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "FASTSD_FAULT": "copy.half:5"}, timeout=120, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert [path for path in files_of(tmp_path / "view") if path.endswith(".part")]
    with open_store(tmp_path / "view", tmp_path / "other machine") as store:
        assert store.newest()[0].step == 1
