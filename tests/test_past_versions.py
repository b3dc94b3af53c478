"""What version 0.1 left on a disk opens, goes on and is exported; scripts/make_past_fixtures.py made it once."""

import hashlib
import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PAST = Path(__file__).parent / "data" / "v0.1"
ABOUT = json.loads((PAST / "about.json").read_text(encoding="utf-8"))
SESSIONS = ("full-cut", "full-done", "lora-cut", "lora-done")
LETTERS = ["0", "1", "2", "3"]


def unpack(*names: str) -> None:
    """Lay archives into the current folder, which is a new one for each test; times come out as they were."""
    for name in names:
        with tarfile.open(PAST / f"{name}.tar.xz") as archive:
            archive.extractall(filter="data")


@pytest.fixture
def sessions(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The four sessions in their usual place, with the base model where they were begun with it."""
    for package in ("torch", "diffusers", "transformers", "PIL"):
        pytest.importorskip(package)
    from dreambooth_runs import draw_quickly

    from fastsd_helpers.dreambooth.prior import class_images

    steps = class_images._STEPS
    draw_quickly(monkeypatch)
    monkeypatch.setattr(class_images, "_STEPS", steps)  # class pictures are known by what they were drawn with
    monkeypatch.setenv("FASTSD_SCRATCH", "scratch")
    monkeypatch.setenv("FASTSD_MODELS", "models")
    unpack("base", *(f"sessions-{name}" for name in SESSIONS))
    return Path("Fast-Dreambooth", "Sessions")


@pytest.fixture
def readers() -> Path:
    """The readers, their lines and runs, in the current folder."""
    for package in ("torch", "transformers", "PIL"):
        pytest.importorskip(package)
    unpack("readers")
    return Path()


def squares() -> Iterator[Any]:
    from fastsd_helpers.trocr.pages.inputs import gather

    return gather([f"lines/{place:02}.png" for place in range(4)])


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of our log."""
    records = [each for each in caplog.records if each.name.startswith("fastsd_helpers")]
    return [each.getMessage() for each in records if each.levelname in ("WARNING", "ERROR")]


def checkpoint_bytes(session: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in (session / "checkpoints").rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------------------- sessions


def test_every_session_is_listed_and_opens_without_a_word(sessions: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fastsd_helpers import Session, list_sessions

    assert [item.name for item in list_sessions()] == list(SESSIONS)
    for name in SESSIONS:
        session = Session.open(name)
        assert session.notices == []
        assert session.record["name"] == name
        assert "a photo of zib robot on a table" in session.record["prompts"], "a caption that was written by hand"
        given = ABOUT["settings"][name]
        assert {key: session.record["settings"][key] for key in given} == given
    assert warnings_in(caplog) == []


def test_every_session_is_shown_by_the_command_line(sessions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastsd_helpers.cli import main

    steps = {}
    for name in SESSIONS:
        assert main(["dreambooth", "show", name, "--json"]) == 0
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert len(shown["checkpoints"]) == 2
        assert shown["notices"] == []
        steps[name] = shown["progress"]["step"]
    assert steps == {"full-cut": 4, "full-done": 6, "lora-cut": 3, "lora-done": 6}


def change_lock(lock: Path, **changes: Any) -> dict[str, Any]:
    """Write the lock that version left with other values, as it would have; its file stays as old as it is."""
    holder = json.loads(lock.read_text(encoding="utf-8")) | changes
    del holder["sum"]
    times = lock.stat().st_mtime_ns
    lock.write_text(json.dumps({**holder, "sum": zlib.crc32(json.dumps(holder, sort_keys=True).encode())}))
    os.utime(lock, ns=(times, times))
    return holder


def own_holder(session: Any) -> dict[str, Any]:
    """Who this process is in a lock."""
    with session.lock():
        found = json.loads((session.folder / ".lock").read_text(encoding="utf-8"))
    return {name: found[name] for name in ("machine", "pid", "start")}


def without_settings(content: bytes) -> bytes:
    """A safetensors file whose header has no `fastsd.settings`, as it would have been written without."""
    length = int.from_bytes(content[:8], "little")
    header, found = re.subn(rb'"fastsd\.settings":"(?:[^"\\]|\\.)*",', b"", content[8 : 8 + length].rstrip(b" "))
    assert found == 1
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@pytest.mark.parametrize("where", ["as it is", "of this machine, its number in use again", "of another machine"])
def test_the_lock_of_a_dead_run_is_taken_over_and_its_child_is_not_found(
    sessions: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from fastsd_helpers import Session
    from fastsd_helpers.dreambooth.running.child_process import find_training
    from fastsd_helpers.sessions import local_holder

    session = Session.open("full-cut")
    lock, child = session.folder / ".lock", Path("scratch", f"{session.record['id']}-live", "child.json")
    changes: dict[str, Any] = {}
    if where.startswith("of this machine"):
        changes = own_holder(Session.open("full-done")) | {"start": "1"}
        child.write_text(json.dumps(json.loads(child.read_text()) | {"pid": os.getpid()}))
    elif where == "of another machine":
        changes = {"machine": "another/pid:[1]"}
    holder = change_lock(lock, **changes)
    # Now and for ever after that lock was made, whatever this machine's clock says.
    later = max(time.time(), holder["time"] + 3600)
    monkeypatch.setattr(time, "time", lambda: later)
    assert local_holder(session.folder) is None
    assert child.is_file()
    assert find_training(session) is None
    began = time.monotonic()
    with session.lock() as held:
        assert not held.lost
        mine = json.loads(lock.read_text(encoding="utf-8"))
        assert (mine["pid"], mine["replaces"]) == (os.getpid(), holder["token"])
    assert time.monotonic() - began < 5
    assert not lock.exists()


def test_a_lock_as_that_version_writes_it_is_respected_while_its_process_lives(sessions: Path) -> None:
    from fastsd_helpers import Session
    from fastsd_helpers.errors import SessionBusy

    session = Session.open("full-cut")
    change_lock(session.folder / ".lock", **own_holder(Session.open("full-done")))
    with pytest.raises(SessionBusy, match=f"process {os.getpid()} on this machine"):
        session.lock().acquire()


@pytest.mark.parametrize("again", ["with the same settings", "with none"])
def test_a_full_run_that_was_killed_goes_on_to_its_end(
    sessions: Path, caplog: pytest.LogCaptureFixture, again: str
) -> None:
    from dreambooth_runs import learned, same

    from fastsd_helpers import DreamBoothConfig, Session, train

    session = Session.open("full-cut")
    before, said = learned(session, "text_encoder"), []
    given = ABOUT["settings"]["full-cut"] if again == "with the same settings" else {}
    result = train(
        DreamBoothConfig(**given), session, take_over=True, report=lambda progress: said.append(progress.message)
    )
    assert (result.first_step, result.steps) == (2 + 4, 2 + 6)
    assert same(before, learned(session, "text_encoder")), "the finished stage's weights are those that were saved"
    assert not any(word in text for text in said for word in ("incomplete", "damaged", "resuming from"))
    assert warnings_in(caplog) == []
    assert_loads(result.path)
    assert Session.open("full-cut").record["progress"] == {"stage": "unet", "step": 6, "steps": 6}


def assert_loads(path: Path) -> None:
    """A finished file is what its family's files are, with finite numbers."""
    from fastsd_helpers.checkpoints import inspect

    found = inspect(path, scan=True)
    assert (found.family, found.problems, found.not_finite) == ("sd15", (), {})


def test_where_the_newest_checkpoint_is_damaged_the_older_one_is_gone_on_from(sessions: Path) -> None:
    from fastsd_helpers import DreamBoothConfig, Session, train

    newest = next((sessions / "full-cut" / "checkpoints").glob("*-unet-*"))
    (newest / "unet.safetensors").write_bytes(b"\0" * 100)
    said: list[str] = []
    session = Session.open("full-cut")
    result = train(DreamBoothConfig(), session, take_over=True, report=lambda each: said.append(each.message))
    assert (result.first_step, result.steps) == (2, 2 + 6)
    assert any("is incomplete" in text and "resuming from 000001 (text_encoder, step 2)" in text for text in said)


def test_a_finished_full_run_is_known_exported_and_lengthened(sessions: Path, caplog: pytest.LogCaptureFixture) -> None:
    from tiny_models import load_file, same_bits

    from fastsd_helpers import DreamBoothConfig, ExportConfig, Session, train
    from fastsd_helpers.dreambooth import export

    session = Session.open("full-done")
    kept = sessions / "full-done" / "exports" / "full-done.safetensors"
    before = kept.read_bytes()
    result = train(DreamBoothConfig(**ABOUT["settings"]["full-done"]), session)
    assert (result.first_step, result.path, result.seconds) == (8, kept.absolute(), 0.0)
    made = export(ExportConfig(), session)
    one, other = load_file(made.path), load_file(kept)
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)
    longer = train(DreamBoothConfig(), session, more_steps=1)
    assert (longer.first_step, longer.steps) == (8, 9)
    assert longer.path != kept.absolute()
    assert_loads(longer.path)
    assert kept.read_bytes() == before
    assert warnings_in(caplog) == []


def test_a_lora_run_with_class_pictures_goes_on_by_the_command_line(
    sessions: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from fastsd_helpers.cli import main

    drawn = {path.name: path.read_bytes() for path in (sessions / "lora-cut" / "class_images").rglob("*.png")}
    assert len(drawn) == 2
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in ABOUT["settings"]["lora-cut"].items()]
    assert main(["dreambooth", "train", "lora-cut", *flags, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (answer["first_step"], answer["steps"]) == (2 + 3, 2 + 6)
    again = {path.name: path.read_bytes() for path in (sessions / "lora-cut" / "class_images").rglob("*.png")}
    assert again == drawn, "class images that are there are not drawn again"
    assert main(["dreambooth", "export", "lora-cut", "--out", "whole.safetensors", "--json"]) == 0
    assert_loads(Path("whole.safetensors"))
    assert warnings_in(caplog) == []


def test_a_finished_lora_run_that_began_with_a_file_is_exported_and_lengthened(
    sessions: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tiny_models import load_file, same_bits

    from fastsd_helpers import DreamBoothConfig, ExportConfig, Session, train
    from fastsd_helpers.dreambooth import export

    folders = {path: path.stat().st_mtime_ns for path in Path("models").rglob("*")}
    session = Session.open("lora-done")
    kept = next((sessions / "lora-done" / "exports").glob("*-unet-6-lora.safetensors"))
    one = load_file(export(ExportConfig(format="lora", out="again.safetensors"), session).path)
    other = load_file(kept)
    assert one.keys() == other.keys()
    assert all(same_bits(one[name], other[name]) for name in one)
    result = train(DreamBoothConfig(**ABOUT["settings"]["lora-done"]), session, more_steps=1)
    assert (result.first_step, result.steps) == (8, 9)
    # The folder that was made of the file is found by the file's hash: nothing is made or fetched again.
    assert {path: path.stat().st_mtime_ns for path in Path("models").rglob("*")} == folders
    assert warnings_in(caplog) == []


def test_another_base_model_in_the_same_place_is_refused(sessions: Path) -> None:
    from fastsd_helpers import DreamBoothConfig, Session, train
    from fastsd_helpers.errors import SettingsError

    path = Path("base", "vae", "diffusion_pytorch_model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    before = checkpoint_bytes(sessions / "full-cut")
    with pytest.raises(SettingsError, match="The base model changed"):
        train(DreamBoothConfig(), Session.open("full-cut"), take_over=True)
    assert checkpoint_bytes(sessions / "full-cut") == before


# ------------------------------------------------------------------------------------------------ conversions


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("single.safetensors", "keep"),
        ("half.safetensors", "fp16"),
        ("brain.safetensors", "bf16"),
        ("single.ckpt", "keep"),
    ],
)
def test_a_converted_file_has_the_same_bytes(name: str, dtype: str) -> None:
    pytest.importorskip("torch")
    from fastsd_helpers import convert

    unpack("base")
    made = convert("base", Path("again") / name, dtype=dtype).path
    # Only the date of the conversion may differ, in the header, and that it tells the folder's own settings since.
    content = made.read_bytes() if name.endswith(".ckpt") else without_settings(made.read_bytes())
    content = re.sub(rb'("modelspec\.date": ?")[^"]*"', rb'\1"', content, count=1)
    assert hashlib.sha256(content).hexdigest() == ABOUT["converted"][name]


def test_a_folder_made_of_a_file_has_the_same_bytes() -> None:
    from fastsd_helpers import convert

    unpack("base")
    convert("single.safetensors", "folder", base="base")
    found = {path.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in Path("folder").rglob("*.safe*")}
    assert found == {name: digest for name, digest in ABOUT["converted"].items() if name.startswith("folder/")}


# ------------------------------------------------------------------------------------------------------ readers


@pytest.mark.parametrize("name", ["reader", "int8-dynamic", "int8-static"])
def test_a_reader_and_its_int8_copies_read_the_same_text(readers: Path, name: str) -> None:
    from fastsd_helpers.trocr import Reader

    if name != "reader":
        pytest.importorskip("openvino")
    precision = "fp32" if name == "reader" else "auto"
    lines = Reader(name, precision=precision, device="cpu").read(squares())
    # They were made so sure of their letters that rounding decides nothing; int8 sums differ by processor.
    assert [line.text for line in lines] == [text for text, _ in ABOUT["texts"][name]] == LETTERS
    recorded = [sure for _, sure in ABOUT["texts"][name]]
    assert [line.confidence for line in lines] == pytest.approx(recorded, rel=1e-3 if name == "reader" else 0.05)


def test_a_reading_session_opens_with_its_corrections_and_they_stay_when_it_is_read_again(readers: Path) -> None:
    from fastsd_helpers.forms import ReadingSessionConfig, open_reading
    from fastsd_helpers.trocr import Reader

    session = open_reading(ReadingSessionConfig(session_name="squares"))
    assert session.record == {"version": 1, "reader": "reader", "demo": False, "images": "lines"}
    assert [line.read.text for line in session.lines()] == LETTERS
    assert [line.right for line in session.lines()] == [None, "eins", None, "drei drei"]
    assert all(line.picture.is_file() for line in session.lines())
    assert [line.text for line in session.corrected().lines] == ["eins", "drei drei"]
    text = session.folder / "text.txt"
    assert text.read_text(encoding="utf-8") == "0\neins\n2\ndrei drei\n"
    session.correct(session.lines()[0].key, "null")
    assert text.read_text(encoding="utf-8") == "null\neins\n2\ndrei drei\n"
    # The journal of a reading that was cut is of another reader: it is no obstacle, and corrections find their lines.
    lines = session.read(Reader("reader", precision="fp32", device="cpu"), "lines", pages="lines")
    assert [line.text for line in lines] == ["null", "eins", "2", "drei drei"] * 6
    again = open_reading(ReadingSessionConfig(session_name="squares"))
    assert [line.text for line in again.lines()] == [line.text for line in lines]


def teaching(**changes: Any) -> Any:
    from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig

    return FineTuneConfig(**{**ABOUT["teaching"], "augment": False, **changes})


def test_teaching_that_was_killed_goes_on_and_what_it_writes_is_a_reader(readers: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("jiwer")
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.teaching.finetuning import finetune

    result = finetune(teaching(), "lines", Path("taught-cut"), model="plain")
    assert result.first_step == 2
    assert result.steps > result.first_step
    assert result.curve[0][0] == 2, "the measurement before the kill is remembered"
    assert len(Reader(result.path, precision="fp32", device="cpu").read(squares())) == 4
    assert not Path("taught-cut", "checkpoints").exists()


def test_teaching_that_had_ended_is_known_and_does_nothing(readers: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("jiwer")
    from fastsd_helpers.trocr.teaching.finetuning import finetune

    weights = Path("taught-done", "model", "model.safetensors")
    before = weights.stat().st_mtime_ns
    result = finetune(teaching(epochs=500.0, measure_every=500), "lines", Path("taught-done"), model="plain")
    assert (result.first_step, result.steps, result.cer_after) == (0, 1000, 0.0)
    assert result.after.scores.cer.rate == 0.0
    assert weights.stat().st_mtime_ns == before


def test_teaching_with_other_settings_is_still_refused(readers: Path) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("jiwer")
    from fastsd_helpers.errors import SettingsError
    from fastsd_helpers.trocr.teaching.finetuning import finetune

    with pytest.raises(SettingsError, match=r"lr was 0\.005 and is 0\.1"):
        finetune(teaching(lr=0.1), "lines", Path("taught-cut"), model="plain")
    assert next(Path("taught-cut", "checkpoints").iterdir()).name == "checkpoint-2"


def test_a_folder_that_was_read_in_part_is_read_to_its_end(readers: Path) -> None:
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading.folder import read_folder

    reader = Reader("reader", precision="fp32", device="cpu", batch_size=8)
    result = read_folder(reader, Path("many"), Path("bulk"))
    assert (result.read_before, result.read_now, result.problems) == (256, 1, 0)
    rows = [json.loads(row) for row in result.path.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [str(place % 4) for place in range(257)]
    assert [row["name"] for row in rows] == [f"{place:03}.png" for place in range(257)]


# ------------------------------------------------------------------------------------------------------- others


def download_content() -> bytes:
    """The file whose download was cut, as scripts/make_past_fixtures.py made it."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [65536], "data_offsets": [0, 65536]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(range(256)) * 256


def test_a_download_that_was_cut_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from file_server import FileServer

    from fastsd_helpers import fetch

    unpack("others")
    url, cut_at = ABOUT["download"]["url"], ABOUT["download"]["cut_at"]
    server = FileServer({url: download_content()})
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", server.url())
    try:
        path = fetch(url, Path("downloads"))
    finally:
        server.stop()
    assert path.read_bytes() == download_content()
    assert [(seen.headers.get("Range"), seen.headers.get("If-Range")) for seen in server.seen] == [
        (f"bytes={cut_at}-", '"one"')
    ]
    assert sorted(each.name for each in Path("downloads").iterdir()) == ["weights.safetensors"]


def test_a_web_ui_that_was_killed_counts_as_ended_even_if_its_number_is_in_use() -> None:
    from fastsd_helpers import webui

    unpack("others")
    places = {"folder": "webui/program", "store": "webui/store"}
    path = next(Path("webui").rglob("state.json"))
    recorded = json.loads(path.read_text(encoding="utf-8"))
    for pid in (recorded["pid"], os.getpid()):
        path.write_text(json.dumps(recorded | {"pid": pid}), encoding="utf-8")
        state, alive = webui.status("a1111", **places)
        assert (state.pid, state.command, alive) == (pid, ["sleep", "60"], False)
        assert webui.stop("a1111", **places) is False


def test_a_package_that_was_not_proved_is_remembered() -> None:
    from fastsd_helpers.wheels.unproved import read_unproved

    unpack("others")
    notes = read_unproved(Path("site"))
    assert {name: (note.version, note.whole) for name, note in notes.items()} == {"pillow-heif": ("1.1.1", False)}


def test_the_kept_files_stay_small() -> None:
    files = [path for path in PAST.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_800_000
    assert max(path.stat().st_size for path in files) < 1_000_000
