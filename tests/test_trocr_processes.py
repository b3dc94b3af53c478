"""Teaching and reading on several processes: the bits of one process, told and ended as one."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from forked import READING, START_TOGETHER, free_port
from installed import require_installed
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers import forms, launching
from fastsd_helpers.cli import main
from fastsd_helpers.errors import FastSDError, Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.forms.trocr.finetuning import TeachConfig, run_values
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.pages.inputs import count_files, gather, gather_share
from fastsd_helpers.trocr.reading import processes as reading_processes
from fastsd_helpers.trocr.reading.session import ReadingSession, ReadPicturesConfig
from fastsd_helpers.trocr.teaching import processes as teaching_processes
from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, finetune

require_installed("accelerate")
pytest.importorskip("transformers")

_LINES = 34
READ = {"pages": "lines", "precision": "fp32", "max_new_tokens": 6}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model with dropout, and lines with texts of many lengths, some of them on one page."""
    folder = tmp_path_factory.mktemp("several")
    write_reader(folder / "model", seed=1, end=4.0)
    (folder / "lines").mkdir()
    rows = ["file_name,text,group"]
    for place, picture in enumerate(noise_pictures(_LINES, seed=3)):
        picture.save(folder / "lines" / f"{place}.png")
        if place < 14:
            rows.append(f"{place}.png,{'the quick brown fox'[: 1 + (7 * place) % 19].strip()},w{place // 4}")
    (folder / "lines" / "labels.csv").write_text("\n".join(rows))
    return folder


# ----------------------------------------------------------------------------------------------------- teaching


def teach(forks, world, name, *flags, count=1):
    """Fine-tune as `fastsd trocr finetune` does in so many processes that were started together."""
    quick = ["--batch-size=3", "--epochs=1", "--lr=1e-3", "--patience=0", "--no-language", "--precision=fp32"]
    own = ["trocr", "finetune", world / "lines", "--out", world / name, "--model", world / "model", *quick, *flags]
    out, env = world / f"{name}.out", os.environ | {"OMP_NUM_THREADS": "1", "FASTSD_SCRATCH": str(world / name)}
    words = ["-c", START_TOGETHER, count, free_port(), out, *own, "--held-out=0.3", "--json"]
    done = forks(*READING).run(words, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(Path(f"{out}.0").read_text(encoding="utf-8").splitlines()[-1])
    return (world / name / "model" / "model.safetensors").read_bytes(), answer


@pytest.mark.numeric
def test_two_processes_learn_what_one_does_with_accumulation_two_bit_for_bit(forks, world):
    # Ten lines are four batches of three: the last step of the epoch has one for each process, or none but one.
    one, said = teach(forks, world, "one", "--accumulation=2")
    two, told = teach(forks, world, "two", count=2)
    assert one == two
    assert (told["steps"], told["curve"], told["cer_after"]) == (said["steps"], said["curve"], said["cer_after"])
    assert (world / "two" / "model" / "README.md").read_text() == (world / "one" / "model" / "README.md").read_text()
    settings = json.loads((world / "two" / "settings.json").read_text())
    assert (settings["accumulation"], settings["parts"]) == (1, 2)


@pytest.mark.parametrize(
    ("gpus", "asked", "parts", "count"),
    [(0, None, None, 1), (2, None, None, 2), (2, 1, None, 1), (0, 3, None, 3), (2, None, 1, 1), (4, None, 6, 3)],
)
def test_a_fine_tuning_takes_every_gpu_that_can_share_its_steps(tmp_path, monkeypatch, gpus, asked, parts, count):
    monkeypatch.setattr(teaching_processes, "count_gpus", lambda: gpus)
    if parts:
        (tmp_path / "settings.json").write_text(json.dumps({"accumulation": 1, "parts": parts}))
    config = FineTuneConfig(processes=asked, batch_size=8)
    found, why = teaching_processes.choose_processes(config, tmp_path, by_paths=True)
    assert found == count
    assert why.startswith(f"{count} processes on " if count > 1 else f"1 of {gpus} GPUs" if parts == 1 else "")
    if count > 1 and not parts:
        assert why.endswith(f"it sees {8 * count} lines.")
    assert teaching_processes.choose_processes(FineTuneConfig(), tmp_path, by_paths=False)[0] == 1


def test_what_cannot_be_shared_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "settings.json").write_text(json.dumps({"accumulation": 3}))
    with pytest.raises(SettingsError, match=r"is 2, and each optimizer step of this run has 3 forward passes"):
        finetune(FineTuneConfig(accumulation=3, processes=2), "lines", tmp_path, model="model")
    with pytest.raises(SettingsError, match="objects of this process alone"):
        finetune(FineTuneConfig(processes=2), [("picture", "text")], tmp_path / "new", model="model")
    monkeypatch.setattr(teaching_processes, "count_gpus", lambda: 2)
    with pytest.raises(SettingsError, match="this machine has 2 GPUs"):
        finetune(FineTuneConfig(processes=4), "lines", tmp_path / "new", model="model")


def test_the_processes_are_no_part_of_what_a_run_is_told_apart_by():
    assert "processes" not in run_values(TeachConfig(processes=2))
    assert FineTuneConfig(processes="auto") == FineTuneConfig()
    assert teaching_processes.parts_of(FineTuneConfig(accumulation=2, processes=3)) == 6


# ------------------------------------------------------------------------------------------------------ reading


def test_shares_are_files_or_the_pages_of_one(world, tmp_path):
    from PIL import Image

    lines = str(world / "lines")
    names = [item.name for item in gather(lines)]
    shares = [[item.name for item in gather_share(lines, number, 3)] for number in range(3)]
    assert [shares[place % 3][place // 3] for place in range(_LINES)] == names
    drawn = [Image.new("RGB", (90, 30), (9 * place, 255, 255)) for place in range(5)]
    drawn[0].save(tmp_path / "five.tif", save_all=True, append_images=drawn[1:])
    pages = [[item.number for item in gather_share(tmp_path / "five.tif", number, 2)] for number in range(2)]
    assert pages == [[1, 3, 5], [2, 4]]
    assert count_files([lines, tmp_path / "five.tif"]) == (_LINES, 1)


@pytest.mark.parametrize(("gpus", "asked", "shares", "count"), [(2, None, 9, 2), (2, None, 1, 1), (0, 2, 1, 2)])
def test_a_reading_takes_every_gpu_that_gets_enough_to_do(monkeypatch, gpus, asked, shares, count):
    monkeypatch.setattr(reading_processes, "count_gpus", lambda: gpus)
    assert reading_processes.choose_processes(asked, lambda: shares) == count


@pytest.fixture(scope="module")
def read_by_one(world):
    session = ReadingSession(world / "by-one")
    session.read(Reader(world / "model", precision="fp32", max_new_tokens=6), str(world / "lines"), pages="lines")
    return session.folder


def assert_alike(folder, other):
    """The same lines with the same texts, and no other files; other batches may change a confidence by a last digit."""
    one, two = (ReadingSession(each).lines() for each in (folder, other))
    assert [(line.key, line.source, line.text) for line in one] == [(line.key, line.source, line.text) for line in two]
    assert [line.read.confidence for line in one] == pytest.approx([line.read.confidence for line in two], abs=1e-5)
    names = [{path.name for path in each.rglob("*")} - {"session.json"} for each in (folder, other)]
    assert names[0] == names[1]
    assert (folder / "text.txt").read_bytes() == (other / "text.txt").read_bytes()


@pytest.mark.numeric
def test_what_two_shares_read_a_session_finds_known_and_ends_as_one_that_read_alone(world, read_by_one, tmp_path):
    session, told = ReadingSession(tmp_path / "by-two"), []
    reader = Reader(world / "model", precision="fp32", max_new_tokens=6)
    for number in range(2):
        session.read_share(reader, str(world / "lines"), (number, 2), pages="lines", progress=told.append)
    assert max(told) == _LINES // 2
    reader.read = lambda *_given, **_named: pytest.fail("read again")
    session.read(reader, str(world / "lines"), pages="lines")
    assert_alike(session.folder, read_by_one)


def test_two_processes_that_are_watched_over_divide_the_pages_of_one_file(forks, world, tmp_path):
    drawn = noise_pictures(5, seed=4)
    drawn[0].save(tmp_path / "five.tif", save_all=True, append_images=drawn[1:])
    place, out = tmp_path / "ranks", tmp_path / "out"
    place.mkdir()
    (place / "watcher").write_text(str(os.getpid()))
    own = ["trocr", "read", tmp_path / "five.tif", "--out", out, "--model", world / "model", "--processes=2"]
    own += ["--format=txt", "--no-pages", "--precision=fp32", "--max-new-tokens=6", "--json"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "FASTSD_RANKS": str(place)}
    done = forks(*READING).run(["-c", START_TOGETHER, 2, free_port(), "", *own], env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads((place / "0.json").read_text().splitlines()[-1])
    assert (answer["inputs"], answer["pages"], answer["read_now"], answer["read_before"]) == (1, 5, 5, 0)
    told = [(place / f"news-{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [max(json.loads(row).get("counts", [0])[0] for row in rows) for rows in told] == [3, 2]
    read = Reader(world / "model", precision="fp32", max_new_tokens=6).read(tmp_path / "five.tif")
    assert (out / "five.txt").read_text().split() == " ".join(line.text for line in read).split()


def test_a_reading_cell_that_is_stopped_asks_the_processes_to_end(world, tmp_path, monkeypatch):
    def asked(_count, _words, _folder, **how):
        os.kill(os.getpid(), signal.SIGINT)  # the notebook's interrupt button
        assert how["asked"]()
        raise Interrupted("Stopped.", "Run the same command again to resume.")

    monkeypatch.setattr(reading_processes, "launch", asked)
    config = ReadPicturesConfig(images=str(world / "lines"), reader=str(world / "model"), processes=2, **READ)
    with pytest.raises(Interrupted) as caught:
        forms.read_pictures(config, ReadingSession(tmp_path / "stopped"))
    assert "Run the cell again" in caught.value.hint


@pytest.mark.numeric
def test_the_reading_cell_starts_a_process_for_each_of_two_gpus(world, read_by_one, tmp_path, monkeypatch, caplog):
    started = []

    def here(count, words, folder, **how):
        # The command itself, in one process: what several of them do is the test above.
        started.append((count, how["what"], how["asked"]()))
        how["tell"](0, {"counts": [3]})
        how["tell"](1, {"message": "Something to know.", "level": 20})
        with monkeypatch.context() as alone:
            alone.setattr(reading_processes, "count_gpus", lambda: 1)
            assert main([*words, "--processes=1"]) == 0
        return {}

    monkeypatch.setattr(reading_processes, "count_gpus", lambda: 2)
    monkeypatch.setattr(reading_processes, "launch", here)
    session = ReadingSession(tmp_path / "cell")
    config = ReadPicturesConfig(images=str(world / "lines"), reader=str(world / "model"), **READ)
    with caplog.at_level("INFO", "fastsd_helpers"):
        forms.read_pictures(config, session)
    assert started == [(2, "reading", False)]
    assert {"2 processes on 2 of 2 GPUs divide the reading.", "Something to know."} <= set(caplog.messages)
    assert_alike(session.folder, read_by_one)
    assert session.record["images"] == str(world / "lines")


def test_the_command_of_a_session_has_every_setting_of_the_form(tmp_path):
    chosen = {"beams": 3, "allowed_characters": "0-9", "device": "cpu", "loop_guard": False}
    config = ReadPicturesConfig(pages="pages", order="rtl", **chosen)
    words = reading_processes.session_division(ReadingSession(tmp_path / "all"), config, "scans", "model").words
    wanted = {"--beams=3", "--pages", "--order=rtl", "--allowed-characters=0-9", "--device=cpu", "--no-loop-guard"}
    assert wanted <= set(words)
    assert not any(word.startswith("--batch-size") for word in words), "what is left alone is left out"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--processes=2"], "--processes needs an output folder"),
        (["--processes=2", "--shard=1/2", "--out=o"], "--shard and --processes do not go together"),
        (["--session=s", "--out=o"], "do not go with --session"),
        (["--processes=2", "--engine=ray", "--out=o"], "do not go with --engine ray"),
        (["--processes=none"], "integer of 1 or more"),
    ],
)
def test_flags_that_exclude_each_other_are_named(world, capsys, words, sentence):
    assert main(["trocr", "read", str(world / "lines"), f"--model={world / 'model'}", *words]) == 2
    assert sentence in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- one that watches

# What a process of a launch leaves: news and an answer, or nothing where it was killed.
_LEAVES = """
import json, os, pathlib, sys
place, ends = pathlib.Path(os.environ["FASTSD_RANKS"]), json.loads(sys.argv[1])
for rank, answer in enumerate(ends):
    rows = [{"pid": 1}, {"counts": [rank + 1]}, {"message": f"of {rank}", "level": 30}]
    (place / f"news-{rank}.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
    (place / f"{rank}.json").write_text(json.dumps(answer) if answer else "")
"""
_LOST = {"error": f"{launching.LOST}: gone.", "hint": "", "exit_code": 1}
_STOPPED = {"error": "Stopped.", "hint": "Run it again.", "exit_code": 130}


@pytest.mark.parametrize(
    ("ends", "asked", "kind", "sentence"),
    [
        ([_LOST, None], False, TrainingFailed, "Process 2 of 2 of this reading was killed from outside"),
        ([_STOPPED, None], False, TrainingFailed, "Process 2 of 2"),
        ([_STOPPED, _LOST], True, Interrupted, r"Stopped\."),
        ([_LOST, {"error": "No page.", "hint": "", "exit_code": 2}], False, FastSDError, "No page"),
        ([_LOST, _LOST], True, Interrupted, "The reading was stopped"),
    ],
)
def test_how_several_processes_ended_is_one_sentence(tmp_path, monkeypatch, ends, asked, kind, sentence):
    monkeypatch.setattr(
        launching, "launch_command", lambda count, words: [sys.executable, "-c", _LEAVES, json.dumps(ends)]
    )
    told = []
    how = {"what": "reading", "model": "demo-reader", "asked": lambda: asked, "package": "trocr"}
    with pytest.raises(kind, match=sentence):
        launching.launch(2, ["words"], tmp_path / "local", tell=lambda rank, row: told.append((rank, *row)), **how)
    assert told == [(0, "counts"), (0, "message", "level"), (1, "counts"), (1, "message", "level")]
    assert list((tmp_path / "local").iterdir()) == [], "nothing is left"


def test_what_several_have_read_is_told_as_one_figure_and_once(caplog):
    told = []
    total = reading_processes._Total(lambda *counts: told.append(counts))
    with caplog.at_level("INFO", "fastsd_helpers"):
        for rank, row in ((0, [2]), (1, [3]), (0, [4]), (1, [256, 900]), (0, [512, 900])):
            total.tell(rank, {"counts": row})
        for rank in range(2):
            total.tell(rank, {"message": "The model is old.", "level": 30})
    assert told == [(2,), (5,), (7,), (256, 900), (512, 900)]
    assert caplog.messages == ["The model is old."]
