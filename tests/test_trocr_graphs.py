"""int8 through OpenVINO: the graphs say what PyTorch says, and a quantised folder is a reader like any other."""

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
from closeness import assert_close_to, assert_same_lines, written
from tiny_readers import STEPS, judge_by, noise_pictures, write_reader

from fastsd_helpers.errors import DatasetError, DependencyMissing, ModelError, SettingsError
from fastsd_helpers.trocr import Reader
from fastsd_helpers.trocr.model import openvino_engine as graphs
from fastsd_helpers.trocr.model.checkpoint import open_checkpoint
from fastsd_helpers.trocr.model.openvino_engine import GraphEngine, write_graphs
from fastsd_helpers.trocr.model.torch_engine import TorchEngine
from fastsd_helpers.trocr.teaching.quantization import quantize

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
SETTINGS = {"max_new_tokens": 12, "batch_size": 4, "loop_guard": False}


@pytest.mark.numeric
@pytest.mark.parametrize("kind", ["base", "stage1", "small"])
def test_graphs_without_int8_give_the_tokens_of_pytorch(tmp_path, kind):
    pytest.importorskip("openvino")
    write_reader(tmp_path / kind, kind, seed=1, end=4.0)
    folder = write_graphs(open_checkpoint(tmp_path / kind, precision="fp32"), tmp_path / "graphs", method="none")
    pictures = noise_pictures(7)
    for beams in (1, 3):
        plain = Reader(tmp_path / kind, beams, "fp32", **SETTINGS)
        assert_same_lines(
            written(Reader(folder, beams, **SETTINGS).read(pictures)),
            written(plain.read(pictures)),
            of_largest=STEPS,
            judge=judge_by(plain, pictures),
            beams=beams,
        )
    assert_close_to(Reader(folder).embed(pictures, "columns"), plain.embed(pictures, "columns"), of_largest=STEPS)


@pytest.mark.numeric
def test_a_line_may_be_long(tmp_path):
    """OpenVINO's fused attention over keys that grow was wrong from the sixteenth step on."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("openvino")
    write_reader(tmp_path / "reader", "base", seed=1)
    checkpoint = open_checkpoint(tmp_path / "reader", precision="fp32")
    graphs = GraphEngine(write_graphs(checkpoint, tmp_path / "graphs", method="none"))
    expected = TorchEngine(checkpoint.model, device="cpu")
    chance = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, checkpoint.pixels.height, checkpoint.pixels.width, generator=chance)
    steps = min(48, expected.most_steps)
    assert steps > 40
    with torch.inference_mode():
        states = [(engine, engine.begin(engine.encode(pixels), 1, steps)) for engine in (expected, graphs)]
        for step in range(steps):
            tokens = torch.randint(4, 50, (len(pixels) if step < 20 else 2, 1), generator=chance)
            if step == 20:
                for engine, state in states:
                    engine.keep(state, torch.tensor([0, 2]))
            one, other = (engine.step(state, tokens) for engine, state in states)
            assert_close_to(other, one, of_largest=STEPS, about=step)


def test_ctrl_c_still_works_when_another_thread_has_thrown_the_graphs_away(tmp_path):
    pytest.importorskip("openvino")
    write_reader(tmp_path / "reader", "base", seed=1)
    folder = write_graphs(open_checkpoint(tmp_path / "reader", precision="fp32"), tmp_path / "graphs", method="none")
    script = """
import faulthandler, os, signal, sys, threading
from pathlib import Path
from fastsd_helpers.trocr.model.torch_engine import TorchEngine
from fastsd_helpers.trocr.model.openvino_engine import GraphEngine
faulthandler.enable()  # as Jupyter's kernel does; it gives the thread a signal stack
signal.signal(signal.SIGTERM, lambda *_: print("asked to stop"))
held = [GraphEngine(Path(sys.argv[1]))]
away = threading.Thread(target=held.clear)
away.start()
away.join()
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "asked to stop\n"), done.stderr


def test_graphs_of_another_version_are_refused_with_what_to_do(tmp_path):
    pytest.importorskip("openvino")
    write_reader(tmp_path / "reader", "base", seed=1)
    folder = write_graphs(open_checkpoint(tmp_path / "reader", precision="fp32"), tmp_path / "graphs", method="none")
    about = folder / "openvino" / "about.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "version": 1}))
    with pytest.raises(ModelError, match="another version") as caught:
        Reader(folder)
    assert "Quantize the model again" in caught.value.hint


@pytest.mark.parametrize("loaded_before", [False, True])
def test_nothing_is_reported_to_the_makers_of_openvino(loaded_before):
    pytest.importorskip("openvino")
    script = """
import sys
if sys.argv[1] == "True":
    import openvino
class Refuse:
    def __init__(self, *_args, **_settings):
        raise SystemExit("a report was about to be sent")
if sys.argv[1] == "True":
    import openvino_telemetry
    openvino_telemetry.Telemetry = Refuse
import torch
from fastsd_helpers.trocr.model import openvino_engine as graphs
(openvino,) = graphs._require("openvino")
with graphs._without_reports():
    openvino.convert_model(torch.nn.Linear(2, 2), example_input=torch.zeros(1, 2))
if sys.argv[1] == "False":
    assert "openvino_telemetry" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(loaded_before)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_reports_are_left_out_while_other_threads_import_and_leave_them_out_too(monkeypatch):
    real = ModuleType("openvino_telemetry")
    monkeypatch.setitem(sys.modules, "openvino_telemetry", real)
    done = threading.Event()

    def imports():
        while not done.is_set():
            names = [f"imported_{threading.get_ident()}_{number}" for number in range(200)]
            sys.modules.update(dict.fromkeys(names, real))
            for name in names:
                del sys.modules[name]

    def leaves_out(_number):
        for _ in range(100):
            with graphs._without_reports():
                assert sys.modules["openvino_telemetry"] is None
        return True

    other = threading.Thread(target=imports)
    other.start()
    try:
        with ThreadPoolExecutor(3) as pool:
            assert all(pool.map(leaves_out, range(3)))
    finally:
        done.set()
        other.join()
    assert sys.modules["openvino_telemetry"] is real


@pytest.mark.numeric
@pytest.mark.slow
def test_quantising_measures_both_methods_and_writes_a_reader(tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    write_reader(tmp_path / "base", "base", seed=1, end=4.0)
    reader = Reader(tmp_path / "base", precision="fp32", max_new_tokens=8)
    pictures = noise_pictures(12)
    # What the fp32 reader reads is taken for the truth: its own error rate is 0, and int8's is what int8 costs.
    labelled = [
        (picture, line.text or "x") for picture, line in zip(pictures[:6], reader.read(pictures[:6]), strict=True)
    ]
    with pytest.raises(DatasetError, match="is in the calibration set and, as line 1, in the evaluation set"):
        quantize(tmp_path / "base", tmp_path / "out", evaluate_on=labelled, calibrate_on=pictures[:2])
    result = quantize(tmp_path / "base", tmp_path / "out", evaluate_on=labelled, calibrate_on=pictures[6:])
    assert [trial.method for trial in result.trials] == ["fp32", "dynamic", "static"]
    assert result.trials[0].same_text == 1
    assert result.method in ("dynamic", "static")
    assert json.loads((result.path / "quantization.json").read_text())["chosen"] == result.method
    opened = Reader(result.path, max_new_tokens=8)
    assert isinstance(opened.engine, GraphEngine)
    assert len(opened.read(pictures)) == 12
    with pytest.raises(SettingsError, match="is there already"):
        quantize(tmp_path / "base", tmp_path / "out", evaluate_on=labelled)
    with pytest.raises(SettingsError, match="is int8 already"):
        quantize(result.path, tmp_path / "again", evaluate_on=labelled)
    again = quantize(tmp_path / "base", tmp_path / "out", evaluate_on=labelled, overwrite=True)
    assert [trial.method for trial in again.trials] == ["fp32", "dynamic"]
    assert not list(tmp_path.glob(".*")), "the reader that was there, and the trials, are gone"


def test_quantising_replaces_an_int8_reader_and_nothing_else(tmp_path):
    write_reader(tmp_path / "run" / "model")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    labelled = [(picture, "x") for picture in noise_pictures(2)]
    for out in (tmp_path, tmp_path / "run", tmp_path / "run" / "model", tmp_path / "run" / "notes.txt"):
        with pytest.raises(SettingsError, match="is not an int8 model, so it is not replaced"):
            quantize(tmp_path / "run" / "model", out, evaluate_on=labelled, overwrite=True)
    (tmp_path / "run" / "openvino").mkdir()
    (tmp_path / "run" / "openvino" / "about.json").write_text("{}")
    with pytest.raises(SettingsError, match="holds the model itself"):
        quantize(tmp_path / "run" / "model", tmp_path / "run", evaluate_on=labelled, overwrite=True)
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_readers_that_begin_together_make_the_int8_graphs_once(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    write_reader(tmp_path / "base")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = []

    def slowly(checkpoint, out, **_settings):
        made.append(out)
        time.sleep(0.5)
        out.mkdir(parents=True)

    monkeypatch.setattr(graphs, "write_graphs", slowly)
    monkeypatch.setattr(graphs, "GraphEngine", lambda folder: folder.is_dir())
    checkpoints = [open_checkpoint(tmp_path / "base", precision="int8", device="cpu") for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(graphs.int8_engine, checkpoints)) == [True] * 3
    assert len(made) == 1


def test_int8_without_its_package_says_what_is_missing_and_what_reads_without_it(tmp_path, monkeypatch):
    write_reader(tmp_path / "base")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(DependencyMissing, match="int8 on a CPU needs the package openvino") as missing:
        Reader(tmp_path / "base", precision="int8")
    assert "--precision bf16 or fp32" in missing.value.hint
    assert len(Reader(tmp_path / "base", max_new_tokens=4).read(noise_pictures(2))) == 2
    (tmp_path / "base" / "openvino").mkdir()
    (tmp_path / "base" / "openvino" / "decoder.xml").write_text("")
    with pytest.raises(DependencyMissing, match="needs the package openvino"):
        Reader(tmp_path / "base")
