"""Take a full-size SD 1.5 model with random weights through everything: prepare, train, kill, resume, export.

    python scripts/full_size_run.py WORK_FOLDER [--images DIR] [--resolution 512] [--write]

It needs about 24 GB of memory and 50 GB of disk in WORK_FOLDER. The weights mean nothing; names, shapes, bytes and
times are those of the real model. The run is killed (SIGKILL) right after the first U-Net step and before it is saved,
so the resumed run takes that step again. --write records the figures in benchmarks/results/full_size.md.
"""

import argparse
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import full_size_export

from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.device import describe_device

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "full_size.md"
SESSION = "full-size"


@dataclass
class Phase:
    """One command and what it took."""

    name: str
    seconds: float
    peak_gb: float
    disk_gb: float  # of the session's folder afterwards
    status: int
    lines: list[str]


def main() -> int:
    """Run every phase; 0 when the finished file has exactly the original's names and shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for the model, the session and the results")
    parser.add_argument("--images", type=Path, default=SUBJECTS_FOLDER / "robot", help="photos to train on")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--write", action="store_true", help=f"record the figures in {RESULTS.name}")
    options = parser.parse_args()
    base, root = options.work / "sd15-random", options.work / "sessions"
    if not (base / "model_index.json").exists():
        full_size_export.make_folder(base, "fp32", seed=0)
    train = ["train", SESSION, "--base-model", str(base), "--resolution", str(options.resolution)]
    train += ["--text-encoder-steps", "2", "--unet-steps", "2", "--save-every", "1", "--sample-every", "0"]
    train += ["--gradient-checkpointing", "--batch-size", "1", "--json"]
    phases = [
        run("new", ["new", SESSION], root),
        run("prepare", ["prepare", SESSION, "--images", str(options.images), "--size", str(options.resolution)], root),
        run("train, killed after U-Net step 1", train, root, fault="step.unet:1"),
        run("train again: resume, finish, export", train, root),
    ]
    last = json.loads(phases[-1].lines[-1]) if phases[-1].status == 0 else {}
    equal = bool(last) and names_equal(Path(last["path"]))
    going_on = [line for line in phases[-1].lines if line.startswith("Resuming")]
    rows = "\n".join(
        f"| {phase.name} | {phase.seconds:.0f} | {phase.peak_gb:.1f} | {phase.disk_gb:.1f} | {phase.status} |"
        for phase in phases
    )
    text = (
        "# A full-size SD 1.5 model, random weights, from photos to file\n\n"
        f"`python scripts/full_size_run.py WORK --resolution {options.resolution} --write`, {date.today()}, "
        f"{describe_device().name}, {os.cpu_count()} cores, {platform.machine()}.\n\n"
        "| command | seconds | peak memory, GB | session on disk, GB | exit status |\n|---|---:|---:|---:|---:|\n"
        f"{rows}\n\n"
        "Full fine-tuning, 2 steps a stage, AdamW, gradient checkpointing, a checkpoint after each step.\n"
        f"It went on with: {' '.join(going_on) or 'nothing said'}\n\n"
        f"Names and shapes of the finished file equal those of the original checkpoint: {'yes' if equal else 'NO'}.\n"
    )
    print(text)
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")
    return 0 if equal else 1


def run(name: str, words: list[str], root: Path, *, fault: str = "") -> Phase:
    """Run one `fastsd dreambooth` command, its output passed on and kept."""
    environment = {**os.environ, "FASTSD_FAULT": fault, "FASTSD_SCRATCH": str(root.parent / "scratch")}
    start = "import sys; from fastsd_helpers.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "dreambooth", *words, "--root", str(root)]
    started, peak = time.monotonic(), 0
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []

    def pass_on() -> None:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)

    reader = threading.Thread(target=pass_on)
    reader.start()
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            found = re.search(r"VmHWM:\s+(\d+) kB", status)
            peak = max(peak, int(found[1])) if found else peak
        except OSError:
            pass
        time.sleep(0.2)
    reader.join()
    disk = sum(path.stat().st_size for path in (root / words[1]).rglob("*") if path.is_file())
    return Phase(name, time.monotonic() - started, peak * 1024 / 1e9, disk / 1e9, process.returncode, lines)


def names_equal(file: Path) -> bool:
    """Whether the file has exactly the required tensors of the original checkpoint, with their shapes."""
    from safetensors import safe_open

    recorded = json.loads(gzip.decompress(full_size_export.REFERENCE.read_bytes()))
    wanted = {name: shape for name, shape in recorded["tensors"].items() if recorded["class"][name] == "required"}
    with safe_open(file, "pt") as stored:
        return {name: stored.get_slice(name).get_shape() for name in stored.keys()} == wanted  # noqa: SIM118


if __name__ == "__main__":
    sys.exit(main())
