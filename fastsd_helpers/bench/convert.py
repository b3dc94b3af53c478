"""How long a conversion takes beside `cat` of the same bytes to a new file, and how much memory it holds.

A full-size SD 1.5 folder with random weights is made once (4.3 GB); the weights mean nothing, everything else is as in
the model. Reads come from the page cache, every written file is synced to the disk within its time, and Python's own
start counts too.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastsd_helpers.bench import Report
from fastsd_helpers.checkpoints.formats.prediction import Prediction
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import Source
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.models.configs import WEIGHT_NAMES, component_config, model_index, scheduler_config
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import part_shapes
from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.files import check_room
from fastsd_helpers.options import check, option
from fastsd_helpers.processes import environment_for

__all__ = ["Settings", "make_folder", "make_lora", "measure"]

# SD 1.5's own; half of them for a try on a small disk.
_WIDTHS = {
    **{"u0": 320, "u1": 640, "u2": 1280, "u3": 1280, "x": 768},
    **{"v0": 128, "v1": 256, "v2": 512, "v3": 512},
    **{"vocab": 49408, "h": 768, "positions": 77, "m": 3072},
}
# What is timed, in which order it is shown: beside what, the name of the ratio, and in words.
_SHOWN = (
    ("copy", "", "", "cat of the same bytes + fsync"),
    ("same", "copy", "ratio_same_to_copy", "convert, same format"),
    ("same_hashed", "copy", "ratio_same_hashed_to_copy", "  with its SHA-256"),
    ("copy_half", "", "", "cat of the fp16 file + fsync"),
    ("fp16", "copy_half", "ratio_fp16_to_writing_its_output", "convert, fp32 to fp16"),
    ("fp16_hashed", "copy_half", "ratio_fp16_hashed_to_writing_its_output", "  with its SHA-256"),
    ("merged", "copy", "ratio_merged_to_copy", "merge a LoRA of every layer"),
    ("theirs", "copy", "ratio_theirs_to_copy", "diffusers' script, same format"),
)
# Both are timed as whole processes, from the start of Python to a file that is on the disk.
_WATCHED = """
import json, os, sys, threading, time
peak, running = 0, True
def watch():
    global peak
    while running:
        with open("/proc/self/status") as status:
            peak = max([peak, *(int(line.split()[1]) for line in status if line.startswith("RssAnon"))])
        time.sleep(0.01)
if os.path.exists("/proc/self/status"):
    threading.Thread(target=watch, daemon=True).start()
started = time.perf_counter()
{work}
inside = time.perf_counter() - started
running = False
print(json.dumps({{"inside": inside, "anonymous_mb": peak / 1000, "torch": "torch" in sys.modules}}))
"""
_CONVERT = _WATCHED.format(
    work="""
from fastsd_helpers.checkpoints import convert
merge = [sys.argv[5]] if len(sys.argv) > 5 else []
convert(sys.argv[1], sys.argv[2], dtype=sys.argv[3], hashes=sys.argv[4:5] == ["hashed"], merge=merge)
"""
)
_THEIRS = _WATCHED.format(
    work="""
import runpy
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
with open(sys.argv[sys.argv.index("--checkpoint_path") + 1], "rb") as file:
    os.fsync(file.fileno())
"""
)


@dataclass(frozen=True)
class Settings:
    """Settings of the benchmark of `fastsd convert`."""

    work: str = option("", help="folder with 11 GB of free space; empty: a temporary one here, removed afterwards")
    rounds: int = option(3, help="number of measurements; the median counts", low=1, high=20)
    divide: int = option(1, help="divide the model's widths by this: 1 is SD 1.5 itself", low=1, high=16)
    script: str = option(
        "", help="path of diffusers' convert_diffusers_to_original_stable_diffusion.py, to time it too"
    )

    def __post_init__(self) -> None:
        check(self)


def measure(settings: Settings) -> Report:
    """Run the comparison; prints nothing.

    Raises:
        DiskFull: there is not enough room.
        TrainingFailed: a command that was timed broke down.
    """
    if settings.work:
        Path(settings.work).mkdir(parents=True, exist_ok=True)
        return _measure(Path(settings.work), settings)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix="bench-") as work:
        return _measure(Path(work), settings)


def _measure(work: Path, settings: Settings) -> Report:
    folder = work / f"model-{settings.divide}"
    whole = sum(fact.bytes for part in find_family("sd15").parts for fact in _facts(part, settings.divide).values())
    # Never more than the model, the half file and one whole one.
    needed = (1.5 if (folder / "model_index.json").exists() else 2.5) * whole
    hint = "Give another folder with --work, or a smaller model with --divide 4."
    check_room(work, int(needed), "the benchmark", spare=100_000_000, hint=hint)
    if not (folder / "model_index.json").exists():
        make_folder(folder, settings.divide)
    weights = sorted(folder.glob("*/*.safetensors"))
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name, *_ in _SHOWN}
    with tempfile.TemporaryDirectory(dir=work, prefix="timed-") as scratch:
        made, half = Path(scratch) / "made.safetensors", Path(scratch) / "half.safetensors"
        lora = make_lora(Path(scratch) / "lora.safetensors", settings.divide)
        _run(_CONVERT, [folder, half, "fp16"])
        timed = {
            "copy": (weights, lambda: _cat(weights, made)),
            "same": (weights, lambda: _run(_CONVERT, [folder, made, "keep"])),
            "same_hashed": (weights, lambda: _run(_CONVERT, [folder, made, "keep", "hashed"])),
            "merged": ([*weights, lora], lambda: _run(_CONVERT, [folder, made, "keep", "", f"{lora}:0.7"])),
            "copy_half": ([half], lambda: _cat([half], made)),
            "fp16": (weights, lambda: _run(_CONVERT, [folder, made, "fp16"])),
            "fp16_hashed": (weights, lambda: _run(_CONVERT, [folder, made, "fp16", "hashed"])),
        }
        if settings.script:
            theirs = [settings.script, "--model_path", folder, "--checkpoint_path", made, "--use_safetensors"]
            timed["theirs"] = (weights, lambda: _run(_THEIRS, theirs))
        for _round in range(settings.rounds):
            # Interleaved: a disk that slows down meanwhile slows everything down.
            for name, (sources, work_once) in timed.items():
                _warm(sources)
                os.sync()  # what others wrote is not waited for in somebody's time
                started = time.perf_counter()
                found = work_once()
                seen[name].append({"seconds": time.perf_counter() - started, **found})
                made.unlink()
    return _report(seen, whole, settings)


def _report(seen: dict[str, list[dict[str, Any]]], whole: int, settings: Settings) -> Report:
    seconds = {name: statistics.median(run["seconds"] for run in runs) for name, runs in seen.items() if runs}
    ours = [run for name in ("same", "same_hashed", "fp16", "fp16_hashed") for run in seen[name]]
    anonymous = max(run["anonymous_mb"] for run in ours)
    data = {
        "bytes": whole,
        "rounds": settings.rounds,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "seconds_without_pythons_start": {
            name: round(statistics.median(run["inside"] for run in runs), 3)
            for name, runs in seen.items()
            if runs and "inside" in runs[0]
        },
        **{
            key: round(seconds[one] / seconds[other], 3) for one, other, key, _words in _SHOWN if key and one in seconds
        },
        "anonymous_mb": round(anonymous, 1),
        "anonymous_mb_merged": round(max(run["anonymous_mb"] for run in seen["merged"]), 1),
        "torch_imported": any(run["torch"] for run in ours),
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    lines = [f"{whole / 1e9:.2f} GB, median of {settings.rounds}, {os.cpu_count()} CPU cores"]
    for one, _other, key, words in _SHOWN:
        if one in seconds:
            lines.append(f"  {words:33}{seconds[one]:6.2f} s" + (f"   {data[key]:.2f} x" if key else ""))
    memory = {"anonymous memory, at most": anonymous, "  with a LoRA merged": data["anonymous_mb_merged"]}
    if "theirs" in seconds:
        data["anonymous_mb_theirs"] = round(max(run["anonymous_mb"] for run in seen["theirs"]), 1)
        memory["  diffusers' script"] = data["anonymous_mb_theirs"]
    lines += [f"  {words:33}{size:6.0f} MB" for words, size in memory.items()]
    return Report(data, lines)


# ------------------------------------------------------------------------------------------------ what is timed


def _warm(files: list[Path]) -> None:
    for path in files:
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass


def _cat(files: list[Path], dst: Path) -> dict[str, Any]:
    """`cat FILES > dst`, and a sync."""
    with dst.open("wb") as out:
        _checked(["cat", *map(str, files)], stdout=out)
        os.fsync(out.fileno())
    return {}


def _run(program: str, arguments: list[Any]) -> dict[str, Any]:
    """A program in a Python of its own; what it says of its memory."""
    done = _checked([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def _checked(command: list[str], **settings: Any) -> Any:
    environment = environment_for("proof", this_python=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, env=environment, **settings)
    if done.returncode:
        raise TrainingFailed(f"{command[0]} ended with {done.returncode}: {done.stderr[-300:]}", "Its output is above.")
    return done


# ------------------------------------------------------------------------------------------------ the model


class _Noise(Source):
    """Random weights that take no room: a window that moves over one block of them."""

    def __init__(self, tensors: dict[str, TensorFact]) -> None:
        import numpy as np

        self.tensors = tensors
        self._block = (np.random.default_rng(0).standard_normal(1 << 20) * 0.05).astype("<f4").view("u1")

    def read_into(self, name: str, start: int, buffer: Any) -> None:
        import numpy as np

        view = np.frombuffer(buffer, "u1")
        place = (start + 4 * len(name)) % len(self._block) // 4 * 4
        view[:] = np.resize(np.roll(self._block, -place), len(view))


def make_folder(folder: Path, divide: int = 1) -> None:
    """Write an SD 1.5 Diffusers folder with random fp32 weights, widths divided by `divide`, without tokenizer."""
    family = find_family("sd15")
    widths = _divided(divide)
    for part in family.parts:
        source = _Noise(_facts(part, divide))
        recipes = {name: copied(source, name) for name in source.tensors}
        path = folder / part / WEIGHT_NAMES[part]
        write_safetensors(path, recipes, metadata={"format": "pt"}, read_back=False, hashes=False)
        (folder / part / "config.json").write_text(json.dumps(component_config(family, part, widths)))
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = scheduler_config(family, Prediction("epsilon", ""))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (folder / "model_index.json").write_text(json.dumps(model_index(family, {})))


def make_lora(path: Path, divide: int = 1, rank: int = 16) -> Path:
    """Write a LoRA in kohya's names for every linear layer and convolution of the U-Net and the text encoder, fp16."""
    shapes = {
        (part, name): fact.shape for part in ("unet", "text_encoder") for name, fact in _facts(part, divide).items()
    }
    tensors = {}
    for module in lora_modules("sd15"):
        shape = shapes.get((module.part, f"{module.paths[0]}.weight"))
        if shape is not None:
            ones = (1,) * len(shape[2:])
            tensors[f"{module.kohya}.lora_down.weight"] = TensorFact("F32", (rank, *shape[1:]))
            tensors[f"{module.kohya}.lora_up.weight"] = TensorFact("F32", (shape[0], rank, *ones))
    source = _Noise(tensors)
    recipes = {name: copied(source, name, "fp16") for name in tensors}
    write_safetensors(path, recipes, metadata={"ss_network_alpha": f"{rank / 2:g}"}, read_back=False, hashes=False)
    return path


def _facts(part: str, divide: int) -> dict[str, TensorFact]:
    return {
        name: TensorFact("F32", shape)
        for row in find_family("sd15").rows
        if row.part == part
        for name, shape in zip(row.diffusers, part_shapes(row, _divided(divide)), strict=False)
    }


def _divided(divide: int) -> dict[str, int]:
    return {symbol: size if symbol == "positions" else size // divide for symbol, size in _WIDTHS.items()}
