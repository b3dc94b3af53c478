"""Many lines and several processes: killed and gone on, or shared out, the result is that of one run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import READING, START_TOGETHER, free_port
from installed import require_installed
from tiny_readers import noise_pictures, write_reader

require_installed("accelerate")

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

PART = 64
LINES = 4 * PART + 20  # four parts and a short one
# The command line, with parts that are written down more often.
READ = f"""
import sys
from fastsd_helpers.trocr.reading import folder
folder._PART = {PART}
from fastsd_helpers.cli import main
sys.exit(main())
"""
# What `accelerate launch` runs for several GPUs; for several processes on a CPU it wants MPI, which few machines have.
# In each process it is Accelerate that finds the others.
LAUNCH = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def run(*words, launch=(sys.executable,)):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *map(str, words)], capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny reader without dropout, and images of lines (60 different ones) in two folders."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "read.py").write_text(READ)
    write_reader(folder / "reader", seed=1, end=4.0, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    drawn = noise_pictures(60)
    for place in range(LINES):
        path = folder / "lines" / f"{place % 2}" / f"{place:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn[place % 60].save(path)
    return folder


def reading(world, out):
    # Noise looks like a page now and then, and each would be given to the line detector.
    limits = ("--no-pages", "--precision", "fp32", "--max-new-tokens", "6", "--device", "cpu")
    return (world / "read.py", "trocr", "read", world / "lines", "--out", out, "--model", world / "reader", *limits)


@pytest.fixture(scope="module")
def whole(world):
    done = run(*reading(world, world / "whole"))
    assert done.returncode == 0, done.stderr[-3000:]
    return (world / "whole" / "lines.jsonl").read_bytes()


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_between_and_within_parts_a_reading_ends_with_the_same_bytes(world, whole, forks):
    assert len(whole.splitlines()) == LINES
    out = world / "killed"
    done = forks(*READING).run(reading(world, out), env=os.environ | {"FASTSD_FAULT": "trocr.part:1"})
    assert done.returncode == -signal.SIGKILL
    assert len(list((out / "parts").glob("part-*.jsonl"))) == 1
    assert not (out / "lines.jsonl").exists()
    # And once more at a moment that nothing in the program chose.
    process = forks(*READING).start(reading(world, out))
    end = time.monotonic() + 600
    while len(list((out / "parts").glob("part-*.jsonl"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = forks(*READING).run([*reading(world, out), "--json"])
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["read_before"] >= 2 * PART
    assert said["read_before"] + said["read_now"] == LINES
    assert (out / "lines.jsonl").read_bytes() == whole


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_processes_through_accelerate_read_what_one_reads(world, whole):
    done = run(*reading(world, world / "two"), "--json", launch=LAUNCH)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(one["read_now"] for one in said) == [2 * PART, 2 * PART + 20], "each read its own parts"
    assert (world / "two" / "lines.jsonl").read_bytes() == whole


@pytest.fixture(scope="module")
def data(world):
    """Sixteen lines whose texts differ much in length, so that a mean of means is not the mean."""
    folder = world / "data"
    folder.mkdir()
    rows = ["file_name,text,group"]
    for place, picture in enumerate(noise_pictures(16, seed=3)):
        picture.save(folder / f"{place}.png")
        rows.append(f"{place}.png,{'the quick brown fox'[: 1 + (7 * place) % 19].strip()},w{place // 4}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


def weights_after(world, data, name, start, *flags):
    """What a fine-tuning with these flags made of the weights, and what it said; `start` runs the command."""
    from safetensors.torch import load_file

    quick = ("--epochs=3", "--lr=1e-3", "--no-augment", "--precision=fp32", "--patience=0", "--no-language", "--json")
    own = ("--model", world / "reader", "--held-out-data", data, "--out", world / name)
    said = json.loads(start("trocr", "finetune", data, *own, *quick, *flags).splitlines()[-1])
    assert said["steps"] == 6
    return load_file(world / name / "model" / "model.safetensors"), said


@pytest.fixture(scope="module")
def at_once(world, data):
    """The weights after steps of whole batches in one process, a new interpreter, and what was said of them."""

    def start(*words):
        done = run("-m", "fastsd_helpers", *words)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return weights_after(world, data, "at once", start, "--batch-size=8")


def apart(one, other, start):
    """How far two sets of weights are from each other, as a part of how far learning has moved them."""
    differences, moves = ([(one[name] - there[name]).pow(2).sum() for name in one] for there in (other, start))
    return float((sum(differences) / sum(moves)).sqrt())


@pytest.mark.numeric
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("way", ["accumulation", "two processes"])
def test_half_batches_learn_what_whole_ones_do(world, data, at_once, forks, way):
    from safetensors.torch import load_file

    start = load_file(world / "reader" / "model.safetensors")
    one, said = at_once
    count = 2 if way == "two processes" else 1

    def together(*words):
        done = forks(*READING).run(["-c", START_TOGETHER, count, free_port(), world / way, *words])
        assert done.returncode == 0, done.stderr[-3000:]
        return Path(f"{world / way}.0").read_text(encoding="utf-8")

    more = ("--accumulation=2",) if count == 1 else ()
    other, half = weights_after(world, data, f"by {way}", together, "--batch-size=4", *more)
    # Not nought: Adam gives weights without a gradient (biases of keys) a step by the last bit of their noise. With the
    # mean of each batch's mean instead of that of the whole step it is 0.23.
    assert apart(one, other, start) < 0.01
    assert [step for step, _rate in half["curve"]] == [step for step, _rate in said["curve"]] == [2, 4, 6]
