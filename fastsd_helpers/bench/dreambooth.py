"""How long an optimizer step of the U-Net takes beside a plain loop, with the split and the peak memory of each.

The plain loops do what diffusers' examples/dreambooth do at every step. Of SD 1.5 (train_dreambooth.py): read the
image, encode it with the VAE, encode the prompt with the text encoder, train the U-Net. Of SDXL
(train_dreambooth_lora_sdxl.py): read the image, encode it with the VAE, train the U-Net's LoRA; the prompt is encoded
before the first step. A third loop does the same with the latents of every image kept. Model, images, precision and
batch are the same; each round of each loop is a process of its own, the loops take turns, and the medians are compared.
"""

import json
import os
import platform
import statistics
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from fastsd_helpers.bench import Report
from fastsd_helpers.bench.clock import Clock
from fastsd_helpers.bench.dreambooth_models import make_model
from fastsd_helpers.bench.dreambooth_settings import Settings
from fastsd_helpers.device import describe_device, peak_memory_bytes
from fastsd_helpers.errors import TrainingFailed
from fastsd_helpers.runtime import make_cpu_sums_repeatable, versions

__all__ = ["Settings", "loops_of", "make_pictures", "measure"]

_WARM_UP = 2


def loops_of(family: str) -> dict[str, Any]:
    """The loops that take turns, by name: each opens with (settings, model, pictures, clock) to (a step, seconds)."""
    from fastsd_helpers.bench import dreambooth_loops, dreambooth_sdxl

    if family == "sdxl":
        plain, kept = dreambooth_sdxl.open_plain, partial(dreambooth_sdxl.open_plain, keep_latents=True)
        return {"plain": plain, "cached": kept, "ours": dreambooth_loops.open_ours}
    return {"plain": dreambooth_loops.open_plain, "ours": dreambooth_loops.open_ours}


def measure(settings: Settings) -> Report:
    """Time the loops in turns.

    Raises:
        TrainingFailed: a round's process ended without a result; its last words are in the problem.
    """
    settings = settings.filled()
    names = list(loops_of(settings.family))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(settings.family, settings.model, Path(folder) / "model")
        pictures = make_pictures(Path(folder) / "pictures", settings)
        for _ in range(settings.rounds):
            for name in names:
                found[name].append(_in_own_process(name, settings, model, pictures))
    medians = {name: _median(rounds) for name, rounds in found.items()}
    ratios = {name: values["step"] / medians["ours"]["step"] for name, values in medians.items() if name != "ours"}
    device = describe_device()
    data = {
        "settings": asdict(settings),
        "ratio": ratios["plain"],
        "ratio_cached": ratios.get("cached"),
        "ratios": [a["step"] / b["step"] for a, b in zip(found["plain"], found["ours"], strict=True)],
        "medians": medians,
        "rounds": found,
        "machine": {"device": device.name, "cores": os.cpu_count(), "platform": platform.platform()},
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    return Report(data, _in_words(settings, medians, ratios))


def _in_words(settings: Settings, medians: dict[str, dict[str, Any]], ratios: dict[str, float]) -> list[str]:
    lines = [
        f"{settings.family}, model {settings.model}, {settings.resolution} px, {settings.precision}, "
        f"batch {settings.batch_size}: median of {settings.rounds} rounds of {settings.steps} steps"
    ]
    for name, values in medians.items():
        split = ", ".join(f"{part} {seconds * 1000:.1f}" for part, seconds in values["split"].items())
        lines.append(
            f"  {name:6}  {values['step'] * 1000:8.1f} ms a step ({split}); peak memory {values['peak'] / 1e6:.0f} MB"
        )
    lines.append(f"  ours fills its caches once in {medians['ours']['caches']:.2f} s")
    if "cached" in ratios:
        lines.append(f"  baseline with kept latents / ours = {ratios['cached']:.2f}")
    lines.append(f"  baseline / ours = {ratios['plain']:.2f}")
    return lines


def _median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "step": statistics.median(each["step"] for each in rounds),
        "split": {part: statistics.median(each["split"][part] for each in rounds) for part in rounds[0]["split"]},
        "peak": statistics.median(each["peak"] for each in rounds),
        "caches": statistics.median(each["caches"] for each in rounds),
    }


# -------------------------------------------------------------------------------------------------- the rounds


def make_pictures(folder: Path, settings: Settings) -> list[Path]:
    """Write four images of the measured size into a new folder; they are the same every time."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    side = settings.resolution
    paths = []
    for index in range(4):
        coarse = Image.fromarray(generator.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        paths.append(folder / f"{index}.png")
        coarse.resize((side, side)).save(paths[-1])
    return paths


def _in_own_process(name: str, settings: Settings, model: Path, pictures: list[Path]) -> dict[str, Any]:
    """A new interpreter for each round: peak memory is a process's, and one loop warms nothing for the other."""
    import multiprocessing  # leaves a module of its own name behind at once

    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        process = multiprocessing.get_context("spawn").Process(
            target=_run_round, args=(name, settings, model, pictures, answer)
        )
        process.start()
        process.join()
        if process.exitcode != 0 or not answer.is_file():
            raise TrainingFailed(
                f"The {name} loop ended with exit code {process.exitcode}.",
                "Its message is above; exit code -9 means that memory ran out: choose a smaller model or resolution.",
            )
        return json.loads(answer.read_text())


def _run_round(name: str, settings: Settings, model: Path, pictures: list[Path], answer: Path) -> None:
    make_cpu_sums_repeatable()
    import torch

    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = describe_device()
    clock = Clock(device.kind)
    step, caches = loops_of(settings.family)[name](settings, model, pictures, clock)
    for index in range(_WARM_UP):
        step(index)
    clock.start()
    for index in range(_WARM_UP, _WARM_UP + settings.steps):
        step(index)
    seconds = clock.stop()
    split = {part: spent / settings.steps for part, spent in clock.parts.items()}
    split["rest"] = seconds / settings.steps - sum(split.values())
    found = {
        "step": seconds / settings.steps,
        "split": split,
        "peak": peak_memory_bytes("cuda" if device.kind == "cuda" else "host"),
        "caches": caches,
    }
    answer.write_text(json.dumps(found))
