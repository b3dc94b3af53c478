"""Runs that are killed, stopped or damaged end with the weights of a run that nothing happened to.

The 40 seeded moments are scripts/kill_and_resume.py, recorded in benchmarks/results/kill_and_resume.md; 4 are here.
"""

import json
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
from installed import require_installed

pytest.importorskip("torch")

from trash_mount import Drive, TrashMount

from faults.fingerprints import fingerprint, hash_file
from faults.kill_resume import (
    SESSION,
    VARIANTS,
    Moment,
    Place,
    choose_moments,
    count_passings,
    kill_and_resume,
    make_world,
    train_in_new_interpreter,
)

require_installed("diffusers")

pytestmark = [
    pytest.mark.numeric,
    pytest.mark.timeout(900),  # about 10 s each on a core of their own; a busy machine needs far longer
]
TEXT_STEPS, UNET_STEPS = VARIANTS["short"][1]["text_encoder_steps"], VARIANTS["short"][1]["unet_steps"]
STEPS = TEXT_STEPS + UNET_STEPS
STOPPED_AT, SAVED_BEFORE = 7, 6  # steps of the U-Net's stage


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:  # also for the server that runs are forked from
        patch.setenv("HOME", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield make_world(folder, "short")


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    return count_passings(world, tmp_path_factory.mktemp("uninterrupted") / "run")


@pytest.fixture(scope="module")
def expected(uninterrupted):
    return uninterrupted[1]


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A sessions root: stopped at a step of stage 2, everything delivered; and what the run said."""
    place = Place(world, tmp_path_factory.mktemp("stopped") / "run", seed=1)
    run = place.begin(signal_at=("unet", STOPPED_AT, signal.SIGTERM))
    assert run.wait() == 3
    place.leave()
    return place.cloud, run.last()


def generations(root: Path) -> list[Path]:
    """The generations' folders that have a manifest, oldest first."""
    return sorted(path.parent for path in root.glob(f"{SESSION}/checkpoints/*/manifest.json"))


def finish(place: Place) -> tuple[dict[str, str], list[str]]:
    """Go on in a fresh process to the end: what was made, and what was said."""
    run = place.begin()
    assert run.wait() == 0, run.said()[-3:]
    place.leave()
    return fingerprint(place.cloud / SESSION, UNET_STEPS), run.said()


# ------------------------------------------------------------------------------------------ killed


def test_a_run_killed_while_its_checkpoint_is_copied_ends_with_the_same_weights(world, stopped, expected, tmp_path):
    # Killed in the copy of step 8. What the mount delivered of it depends on the clock; step 7 was there before.
    outcome = kill_and_resume(
        world, tmp_path / "place", Moment("copy.half:2", 4, 120.0, 0.3), expected, start=stopped[0]
    )
    assert outcome.equal, outcome.problem
    assert outcome.reached == f"unet {UNET_STEPS}"
    assert outcome.resumed_from == f"step {TEXT_STEPS + STOPPED_AT} of {STEPS}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        Moment("step.text_encoder:5", 1, 1.0, 1.0),
        Moment("checkpoint.hash:14", 2, 120.0, 0.3),
        Moment("export.tensor:300", 3, 1.0, 0.03),
    ],
    ids=lambda moment: moment.fault,
)
def test_a_run_killed_at_a_named_point_ends_with_the_same_weights(world, expected, tmp_path, moment):
    outcome = kill_and_resume(world, tmp_path / "place", moment, expected)
    assert outcome.equal, outcome.problem


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_weights(world, expected, tmp_path):
    place = Place(world, tmp_path / "place", seed=5, delivery_s=0.3)
    for fault in ("step.text_encoder:3", "copy.before_manifest:2", "checkpoint.fsync:4", "step.unet:3"):
        assert place.begin(fault=fault, settle_s=120.0).wait() == -signal.SIGKILL
        place.crash()
    assert finish(place)[0] == expected


@pytest.mark.slow
def test_the_command_line_in_a_new_interpreter_ends_with_the_same_weights(world, expected, tmp_path):
    place = Place(world, tmp_path / "place", seed=6)
    assert place.begin(fault="step.text_encoder:3").wait() == -signal.SIGKILL
    place.crash()
    assert train_in_new_interpreter(place) == 0
    place.leave()
    assert fingerprint(place.cloud / SESSION, UNET_STEPS) == expected


# ----------------------------------------------------------------------------------------- damaged


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        ("unet.safetensors", cut, "is incomplete: unet.safetensors has"),
        ("unet.safetensors", flip_a_bit, "is damaged: unet.safetensors has the right size but a different SHA-256"),
        ("optimizer.safetensors", Path.unlink, "is incomplete: optimizer.safetensors is missing"),
        ("manifest.json", cut, "is damaged: its manifest.json"),
    ],
    ids=["truncated", "bit-flipped", "partly missing", "manifest cut"],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_said_so(
    world, stopped, expected, tmp_path, file, damage, words
):
    root = shutil.copytree(stopped[0], tmp_path / "root")
    newest = generations(root)[-1]
    assert f"-unet-{STOPPED_AT:06d}-" in newest.name
    damage(newest / file)
    made, said = finish(Place(world, tmp_path / "place", seed=2, start=root))
    sentence = next(line for line in said if line.startswith("Checkpoint"))
    assert f"(unet, step {STOPPED_AT}) {words}" in sentence
    assert sentence.endswith(f"(unet, step {SAVED_BEFORE}).")
    assert f"Resuming after step {TEXT_STEPS + SAVED_BEFORE} of {STEPS}." in said
    assert made == expected


@pytest.mark.slow
@pytest.mark.parametrize("twins", ["whole", "gone"])
def test_a_session_json_cut_in_half_stops_nothing(world, stopped, expected, tmp_path, twins):
    root = shutil.copytree(stopped[0], tmp_path / "root")
    cut(root / SESSION / "session.json")
    if twins == "gone":
        shutil.rmtree(root / SESSION / ".record")
    made, said = finish(Place(world, tmp_path / "place", seed=3, start=root))
    assert any(line.startswith("session.json of 'robot' is truncated") for line in said)
    assert f"Resuming after step {TEXT_STEPS + STOPPED_AT} of {STEPS}." in said
    assert made == expected


# ----------------------------------------------------------------------------------------- stopped


@pytest.mark.slow
def test_sigterm_saves_everything_and_the_run_goes_on_from_there(world, stopped, expected, tmp_path):
    root, last = stopped
    assert (last["kind"], last["error"]) == (
        "Interrupted",
        f"Stopped at unet step {STOPPED_AT} of {UNET_STEPS}, after step "
        f"{TEXT_STEPS + STOPPED_AT} of {STEPS}; everything is saved.",
    )
    made, said = finish(Place(world, tmp_path / "place", seed=4, start=root))
    assert f"Resuming after step {TEXT_STEPS + STOPPED_AT} of {STEPS}." in said
    assert made == expected


@pytest.mark.slow
def test_ctrl_c_in_stage_1_saves_everything_and_the_run_goes_on_from_there(world, expected, tmp_path):
    place = Place(world, tmp_path / "place", seed=5)
    run = place.begin(signal_at=("text_encoder", 3, signal.SIGINT))
    assert run.wait() == 3
    assert (run.last()["kind"], run.last()["error"]) == (
        "Interrupted",
        f"Stopped at text encoder step 3 of {TEXT_STEPS}, after step 3 of {STEPS}; everything is saved.",
    )
    place.leave()
    place.move()
    made, said = finish(place)
    assert f"Resuming after step 3 of {STEPS}." in said
    assert made == expected


@pytest.mark.slow
def test_a_changed_setting_is_refused_and_listed(world, stopped, tmp_path):
    place = Place(world, tmp_path / "place", seed=6, start=stopped[0])
    before = {path.name for path in generations(place.view)}
    run = place.begin(settings={"seed": 6, "unet_steps": 20})
    assert run.wait() == 3
    last = run.last()
    assert last["kind"] == "SettingsError"
    assert "seed was 5 and is now 6" in last["error"]
    assert f"unet_steps was {UNET_STEPS} and is now 20" in last["error"]
    assert "text_encoder_steps" not in last["error"]
    assert "--restart" in last["hint"]
    assert {path.name for path in generations(place.view)} == before
    place.leave()


@pytest.mark.slow
def test_a_second_run_on_the_session_is_refused_while_the_first_goes_on(world, expected, tmp_path):
    place = Place(world, tmp_path / "place", seed=7)
    first = place.begin(signal_at=("unet", 4, signal.SIGSTOP))
    try:
        first.wait_for('"stage": "unet", "step": 4')
        second = place.begin()
        assert second.wait() == 3
        assert second.last()["kind"] == "SessionBusy"
        first.signal(signal.SIGCONT)
        assert first.wait() == 0
    finally:
        first.process.kill()
    place.leave()
    assert fingerprint(place.cloud / SESSION, UNET_STEPS) == expected


# ------------------------------------------------------------------------------- the harness itself


def test_any_40_moments_hold_enough_of_each_kind():
    passings = dict.fromkeys(("prune", "session.write", "session.after_rename", "checkpoint.begin"), 9)
    passings |= dict.fromkeys(("copy.before_manifest", "copy.after_manifest"), 9)
    passings |= dict.fromkeys(("finish.begin", "export.rename", "export.written"), 1)
    passings |= dict.fromkeys(("checkpoint.write", "checkpoint.fsync", "checkpoint.hash", "export.tensor"), 27)
    passings |= dict.fromkeys(("copy.begin", "copy.half", "copy.before_rename"), 27)
    passings |= {"step.text_encoder": 12, "step.unet": 14}
    for seed in range(20):
        moments = choose_moments(passings, count=40, seed=seed)
        points = Counter(moment.point for moment in moments)
        parts = Counter(moment.point.partition(".")[0] for moment in moments)
        assert len({moment.fault for moment in moments}) == 40
        assert points["step.text_encoder"] >= 10
        assert points["step.unet"] >= 10
        assert parts["checkpoint"] >= 5
        assert parts["copy"] >= 5
    assert choose_moments(passings, count=40, seed=1) == choose_moments(passings, count=40, seed=1)
    assert choose_moments(passings, count=40, seed=1) != choose_moments(passings, count=40, seed=2)


def test_the_fingerprint_sees_names_order_types_shapes_and_bytes(tmp_path):
    plain = {"a": ("F32", [2, 1], b"12345678"), "b": ("F32", [1], b"abcd")}
    others = [
        {"a": ("F32", [2, 1], b"12345678"), "c": ("F32", [1], b"abcd")},
        {"b": ("F32", [1], b"abcd"), "a": ("F32", [2, 1], b"12345678")},
        {"a": ("I32", [2, 1], b"12345678"), "b": ("F32", [1], b"abcd")},
        {"a": ("F32", [1, 2], b"12345678"), "b": ("F32", [1], b"abcd")},
        {"a": ("F32", [2, 1], b"12345679"), "b": ("F32", [1], b"abcd")},
    ]

    def hash_of(tensors: dict, note: str = "") -> str:
        header, data = {"__metadata__": {"note": note}}, b""
        for name, (kind, shape, values) in tensors.items():
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
            data += values
        text = json.dumps(header).encode()
        path = tmp_path / "file.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        return hash_file(path)

    assert hash_of(plain, note="another date") == hash_of(plain)
    assert len({hash_of(plain), *map(hash_of, others)}) == 6


# ------------------------------------------------------------------------------------------- on a full Drive


def on_drive(lag_s: float, overtaken: float = 0.0) -> Drive:
    """A Drive for two checkpoints and the finished file, where all that is ever written takes over twice that."""
    return Drive(20_000_000, lag_s, overtaken)


def test_a_run_killed_while_it_empties_an_old_checkpoint_ends_with_the_same_weights(world, expected, tmp_path):
    # What goes first is the text encoder's; the 40 moments are scripts/kill_on_full_drive.py.
    outcome = kill_and_resume(
        world, tmp_path / "place", Moment("emptied.after:2", 11, 0.2, 0.03), expected, drive=on_drive(0.2)
    )
    assert outcome.equal, outcome.problem
    assert outcome.most > 10_000_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "drive"),
    [
        (Moment("emptied.before:1", 12, 0.2, 0.1), on_drive(0.0)),
        (Moment("prune.removed:3", 13, 0.2, 0.1), on_drive(0.5, 1 / 3)),
        (Moment("copy.half:9", 14, 0.2, 0.3), on_drive(float("inf"))),
        (Moment("emptied.after:2", 1020, 0.2, 1.0), on_drive(0.2, 1 / 3)),
    ],
    ids=lambda value: getattr(value, "fault", None),
)
def test_a_run_killed_on_a_drive_with_little_room_ends_with_the_same_weights(world, expected, tmp_path, moment, drive):
    outcome = kill_and_resume(world, tmp_path / "place", moment, expected, drive=drive)
    assert outcome.equal, outcome.problem


def test_a_file_that_was_renamed_is_never_counted_twice_and_emptying_the_trash_makes_room(tmp_path):
    mount = TrashMount(
        tmp_path / "view", tmp_path / "cloud", 1, drive=Drive(1500), notes=tmp_path / "notes", modes=("out_of_order",)
    )
    (mount.view / ".a.x.part").write_bytes(bytes(1000))
    mount.step()
    (mount.view / ".a.x.part").rename(mount.view / "a")
    mount._deliver("a")  # the new name first
    assert not mount.refused
    assert (mount.used, mount.most) == (1000, 1000)
    assert json.loads((mount.notes / "arrived").read_text()) == [".a.x.part"]
    mount.step()
    assert json.loads((mount.notes / "arrived").read_text()) == ["a"]
    (mount.view / "a").unlink()
    mount.step()
    assert mount.trash == 1000
    mount.empty_trash()
    assert (mount.used, (mount.notes / "free").read_text()) == (0, "1500")


@pytest.mark.parametrize(("overtaken", "left"), [(0.0, 0), (1.0, 1000)])
def test_the_drive_counts_what_was_not_emptied_before_it_was_deleted(tmp_path, overtaken, left):
    drive = Drive(3000, overtaken=overtaken)
    mount = TrashMount(tmp_path / "view", tmp_path / "cloud", 1, drive=drive, notes=tmp_path / "notes", modes=())
    for name in ("kept", "plain", "emptied"):
        (mount.view / name).write_bytes(bytes(1000))
    mount.step()
    assert (mount.used, (mount.notes / "free").read_text()) == (3000, "0")
    (mount.view / "more").write_bytes(b"x")
    mount.settle()
    assert mount.refused == {"more"}
    (mount.view / "more").unlink()
    (mount.notes / "emptied").write_text("emptied\n")
    (mount.view / "emptied").unlink()
    (mount.view / "plain").unlink()
    (mount.view / "kept").rename(mount.view / "renamed")
    mount.step()
    assert (mount.trash, mount.used) == (1000 + left, 2000 + left)
    assert (mount.cloud / "renamed").stat().st_size == 1000


def test_the_drives_report_is_as_late_as_it_says(tmp_path):
    drive = Drive(3000, lag_s=float("inf"))
    mount = TrashMount(tmp_path / "view", tmp_path / "cloud", 1, drive=drive, notes=tmp_path / "notes", modes=())
    (mount.view / "a").write_bytes(bytes(1000))
    mount.step()
    assert (mount.used, (mount.notes / "free").read_text()) == (1000, "3000")
