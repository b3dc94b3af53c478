"""Many workers: files claimed in blocks, each read and written once, in folders and at addresses; workers lost."""

import os
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from tiny_readers import write_reader

from fastsd_helpers.cli import main
from fastsd_helpers.errors import DatasetError, DependencyMissing, DriveError, SettingsError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.reading import cluster
from fastsd_helpers.trocr.reading.results import LocalResults, RemoteResults, is_remote
from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, transcribe

LINES = TranscribeConfig(("txt", "json", "csv"), pages="lines")
SETTINGS = {"precision": "fp32", "max_new_tokens": 6}


def draw(text):
    picture = Image.new("RGB", (300, 60), "white")
    ImageDraw.Draw(picture).text((10, 10), text, "black", ImageFont.load_default(28))
    return picture


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    write_reader(folder, "base", seed=1)
    return str(folder)


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    (folder / "deep").mkdir(parents=True)
    for number in range(1, 9):
        draw(f"line {number}").save(folder / f"scan{number}.png")
    draw("one").save(folder / "deep" / "fax.tiff", save_all=True, append_images=[draw("two"), draw("three")])
    for path in folder.rglob("*.*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture
def memory(scans):
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    for path in scans.rglob("*.*"):
        system.pipe_file(f"/archive/scans/{path.relative_to(scans).as_posix()}", path.read_bytes())
    yield system
    system.rm("/archive", recursive=True)


def files(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file() and ".fastsd-run" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def test_a_worker_reads_from_an_address_and_writes_to_one_what_a_local_run_writes(model, scans, memory, tmp_path):
    transcribe(Reader(model, **SETTINGS), [str(scans)], tmp_path / "whole", LINES)
    out = "memory://archive/scans/results"  # among the scans: what is written is no scan
    job = cluster._Job(model, SETTINGS, out, LINES)
    inputs = cluster._list_inputs(["memory://archive/scans"], out)
    assert [name for _place, name, _stem in inputs[:2]] == ["deep/fax.tiff", "scan1.png"]
    worker = cluster._Worker(job)
    assert worker.problem() is None
    done = worker.read(inputs[:4])
    assert (done.inputs, done.pages, done.read_now, done.problems) == (4, 6, 6, [])
    again = cluster._Worker(job)  # another one gets the block a second time, and those after it
    assert again.read(inputs[:4]).read_now == 0
    assert again.read(inputs[4:]).read_now == 5
    expected = files(tmp_path / "whole")
    found = {name: memory.cat_file(f"/archive/scans/results/{name}") for name in expected}
    texts = {name: data for name, data in found.items() if not name.endswith(".json")}  # that has the files' times
    assert texts == {name: expected[name] for name in texts}
    assert len(memory.find("/archive/scans/results")) == len(expected) + 9 + 1, "notes of each input, and the settings"
    assert [name for _place, name, _stem in cluster._list_inputs(["memory://archive/scans"], out)] == [
        name for _place, name, _stem in inputs
    ]


def test_a_worker_that_cannot_read_says_why_and_a_file_that_is_gone_is_a_problem(model, scans, memory, tmp_path):
    inputs = cluster._list_inputs([str(scans)], tmp_path / "out")
    config = TranscribeConfig(("txt",), pages="pages")
    transcribe(Reader(model, **SETTINGS), [str(scans / "deep")], tmp_path / "out", LINES)
    told = cluster._Worker(cluster._Job(model, SETTINGS, str(tmp_path / "out"), config)).read(inputs)
    assert isinstance(cluster._error_of(told), SettingsError)
    assert "other settings" in told["problem"]
    gone = [("memory://archive/scans/gone.png", "gone.png", "gone")]
    done = cluster._Worker(cluster._Job(model, SETTINGS, "memory://archive/out", LINES)).read(gone)
    assert len(done.problems) == 1
    assert "memory://archive/scans/gone.png cannot be read" in done.problems[0]


def test_files_of_many_places_are_divided_into_blocks_that_leave_no_worker_idle():
    inputs = [(f"/scans/{number}.png", f"{number}.png", str(number)) for number in range(1000)]
    for workers, size in ((1, 64), (2, 62), (50, 2), (900, 1)):
        blocks = cluster._blocks(inputs, workers)
        assert len(blocks[0]) == size
        assert [one for block in blocks for one in block] == inputs


@pytest.mark.parametrize(
    ("machines", "config", "expected"),
    [
        ([(2, 0)], {}, (False, 2, 1)),
        ([(16, 0)], {}, (False, 4, 4)),
        ([(16, 0)], {"workers": 2}, (False, 8, 2)),
        ([(16, 0)], {"workers": 5}, (False, 3, 5)),
        ([(16, 0)], {"cores": 1}, (False, 1, 16)),
        ([(3, 0)] * 4, {}, (False, 3, 4)),  # no worker is on two machines
        ([(3, 0)] * 4, {"cores": 4}, (False, 4, 0)),
        ([(16, 2), (64, 0)], {}, (True, 8, 2)),  # where there are GPUs, machines without one are left out
        ([(16, 2), (4, 1)], {}, (True, 4, 3)),
        ([(16, 2)], {"cores": 12}, (True, 12, 1)),
        ([(16, 2)], {"workers": 3}, (True, 8, 2)),
        ([], {}, (False, 1, 0)),
    ],
)
def test_workers_share_the_cores_and_gpus_of_machines_and_none_is_on_two(machines, config, expected):
    resources = [{"CPU": float(cores), **({"GPU": float(gpus)} if gpus else {})} for cores, gpus in machines]
    assert cluster._share(resources, cluster.ClusterConfig(**config)) == expected


def test_an_address_is_told_from_a_path_and_a_link():
    assert is_remote("s3://bucket/scans")
    assert not is_remote("https://example.org/scan.png")
    assert not is_remote(Path("scans"))
    assert not is_remote(r"C:\scans")


def test_results_keep_a_note_that_a_kill_cut_apart_from_the_next(tmp_path):
    pytest.importorskip("fsspec")
    for results in (LocalResults(tmp_path), RemoteResults("memory://notes")):
        assert results.read("run/a.jsonl") is None
        results.append("run/a.jsonl", b'{"cut')
        results.append("run/a.jsonl", b"{}")
        assert results.read("run/a.jsonl").split(b"\n") == [b"", b'{"cut', b"", b"{}", b""]
        assert results.has("run/a.jsonl")
        assert not results.has("run")
    with pytest.raises(DriveError, match=r"nowhere://a .*cannot be read or written"):
        RemoteResults("nowhere://a")


def test_what_ray_cannot_do_is_said_before_a_model_is_loaded(tmp_path, capsys, monkeypatch):
    draw("x").save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    for words, told in (
        (["--engine", "ray"], "writes into a folder"),
        (["--engine", "ray", "--out", str(tmp_path / "out"), "--shard", "1/2"], "do not go with --engine ray"),
        (["--out", str(tmp_path / "out"), "--workers", "2"], "Add --engine ray"),
        (["--out", "s3://bucket/out"], "no folder of this machine"),
    ):
        assert main(["trocr", "read", image, *words]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(DatasetError, match="no file or folder"):
        cluster._list_inputs([str(tmp_path / "gone")], tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(DependencyMissing, match="--engine ray needs the package ray"):
        cluster.transcribe_on_ray("demo-reader", {}, [image], tmp_path / "out")


@pytest.mark.slow
def test_workers_that_are_killed_again_and_again_end_with_the_same_files(model, scans, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    transcribe(Reader(model, **SETTINGS), [str(scans)], tmp_path / "whole", LINES)
    monkeypatch.setenv("FASTSD_FAULT", "trocr.page:4")  # every worker dies at its fourth page, and is started again
    done = cluster.transcribe_on_ray(
        model, SETTINGS, [str(scans)], tmp_path / "out", LINES, cluster.ClusterConfig(workers=2)
    )
    assert (done.inputs, done.problems) == (9, [])
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for notes in (tmp_path / "out" / ".fastsd-run").glob("*.jsonl"):
        assert notes.read_text().count('"end"') == 1
