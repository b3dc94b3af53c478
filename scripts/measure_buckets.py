"""Measure aspect-ratio buckets against squares on the demo model: held-out loss over several seeds, and speed by pixel.

    python scripts/measure_buckets.py [--subjects robot,fish,mushroom] [--seeds 5] [--steps 80] [--write]

Some of the demo's photos are made 2:1 or 1:2. One run trains on their squares (crop smart), the other on the whole
photos in buckets (crop none), with the same settings, seed and number of steps; both are judged on the same square
images that neither was trained on, with the same noise. For the speed, steps on squares and on 2:1 and 1:2 are timed
in turn. --write records it in benchmarks/results/buckets.md.
"""

import argparse
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare
from fastsd_helpers.dreambooth.dataset.prepared import Dataset, load_dataset
from fastsd_helpers.dreambooth.settings import resolve_settings
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage
from fastsd_helpers.sessions import Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "buckets.md"
RESOLUTION = 192
ARMS = {"squares": "smart", "buckets": "none"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", default="robot,fish,mushroom")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--timed", type=int, default=12, help="steps of each shape that are timed")
    parser.add_argument(
        "--framing", default="area", choices=["area", "more"], help="how photos became 2:1; see reframe"
    )
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.name}")
    chosen = parser.parse_args()
    began = time.monotonic()
    lines = [
        "| subject | before | squares: after, mean (lowest to highest) | buckets: after, mean (lowest to highest) |",
        "| --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory(prefix="buckets-") as name:
        for subject in chosen.subjects.split(","):
            data = {arm: make_dataset(Path(name), subject, crop, chosen.framing) for arm, crop in ARMS.items()}
            # Both are judged on the squares.
            data["buckets"] = Dataset(data["buckets"].train, data["squares"].held_out)
            after: dict[str, list[float]] = {arm: [] for arm in ARMS}
            for seed in range(1, chosen.seeds + 1):
                for arm in ARMS:
                    after[arm].append(train(data[arm], seed, chosen.steps))
                    print(f"{subject} seed {seed} {arm}: {after[arm][-1]:.4f} after", flush=True)
            before = train(data["squares"], 1, 0)
            row = " | ".join(in_words(after[arm]) for arm in ARMS)
            lines.append(f"| {subject} | {before:.4f} | {row} |")
            print(lines[-1], flush=True)
        speed = measure_speed(data["buckets"], chosen.timed)
        print(speed, flush=True)
    if chosen.write:
        RESULTS.write_text(make_page(lines, speed, chosen, time.monotonic() - began), encoding="utf-8")


def in_words(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def make_dataset(folder: Path, subject: str, crop: str, framing: str) -> Dataset:
    photos = folder / f"{subject} photos"
    if not photos.is_dir():
        photos.mkdir()
        for number, path in enumerate(sorted((SUBJECTS_FOLDER / subject).glob("*.png"))):
            reframe(Image.open(path).convert("RGB"), number, framing).save(photos / path.name)
            (photos / path.name).with_suffix(".txt").write_bytes(path.with_suffix(".txt").read_bytes())
    session = Session.create(f"{subject}-{crop}", root=folder / "sessions")
    held_out = str(SUBJECTS_FOLDER / "held_out" / subject)
    prepare(PrepareConfig(images=str(photos), held_out=held_out, size=RESOLUTION, crop=crop), session)
    return load_dataset(session)


def reframe(picture: Image.Image, number: int, framing: str) -> Image.Image:
    """A square photo as it is, or 2:1, or 1:2.

    framing: "area" keeps the photo's area, so that the subject takes as much of it as before: its edges go on along one
    side, and along the other less is shown. "more" shows more along one side, so that the square around the subject is
    the photo as it was.
    """
    shape = number % 3
    if not shape:
        return picture
    side = picture.width
    pixels = np.asarray(picture if shape == 1 else picture.transpose(Image.Transpose.TRANSPOSE))
    if framing == "more":
        pixels = np.pad(pixels, ((0, 0), (side // 2, side // 2), (0, 0)), mode="edge")
    else:
        high = round(side / 2**0.5)
        top = min(max(subject_row(pixels) - high // 2, 0), side - high)
        wide = (2 * high - side) // 2
        pixels = np.pad(pixels[top : top + high], ((0, 0), (wide, wide), (0, 0)), mode="edge")
    made = Image.fromarray(pixels)
    return made if shape == 1 else made.transpose(Image.Transpose.TRANSPOSE)


def subject_row(pixels: np.ndarray) -> int:
    """The row in the middle of what is unlike the photo's border."""
    border = np.median(np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)]), axis=0)
    unlike = np.abs(pixels.astype(float) - border).sum(2).clip(max=200) ** 2
    rows = unlike.sum(1)
    return round(float((rows * np.arange(len(rows))).sum() / rows.sum()))


def open_context(data: Dataset, seed: int) -> TrainingContext:
    base = BaseModel.fetch("demo")
    asked = DreamBoothConfig(base_model="demo", seed=seed, resolution=RESOLUTION, text_encoder_steps=0, batch_size=4)
    config, _ = resolve_settings(asked, base.spec, describe_device())
    context = TrainingContext(base, config, describe_device())
    context.fill_caches(data)
    return context


def train(data: Dataset, seed: int, steps: int) -> float:
    """Held-out loss after so many steps of the U-Net."""
    context = open_context(data, seed)
    trainer = open_stage("unet", context, None)
    for step in range(steps):
        trainer.take_step(step, context.config.unet_lr)
    return trainer.held_out_loss()


def measure_speed(data: Dataset, count: int) -> str:
    """Seconds a step by pixel on squares and on 2:1, timed in turn; the medians and their ratio."""
    context = open_context(data, 1)
    trainer = open_stage("unet", context, None)
    seconds: dict[tuple[int, int], list[float]] = {}
    for step in range(1000):
        shape = tuple(context.draw_batch("unet", step, 0).latents.shape[2:])
        if len(seconds.setdefault(shape, [])) > count:
            continue
        started = time.perf_counter()
        trainer.take_step(step, 1e-6)
        seconds[shape].append(time.perf_counter() - started)
        if all(len(each) > count for each in seconds.values()) and len(seconds) == 3:
            break
    # The first of each shape finds its kernels and its memory.
    found = {shape: statistics.median(each[1:]) for shape, each in seconds.items()}
    square = (RESOLUTION // 8, RESOLUTION // 8)
    per_pixel = {shape: value / (shape[0] * shape[1]) for shape, value in found.items()}
    said = [
        f"{shape[1] * 8} x {shape[0] * 8}: {found[shape]:.2f} s a step of four images, "
        f"{per_pixel[shape] / per_pixel[square]:.2f} of the square's time by pixel"
        for shape in sorted(found)
    ]
    return "; ".join(said) + "."


def make_page(lines: list[str], speed: str, chosen: argparse.Namespace, seconds: float) -> str:
    asked = f"--subjects {chosen.subjects} --seeds {chosen.seeds} --steps {chosen.steps} --framing {chosen.framing}"
    framed = {
        "area": "the subject takes the same share of a photo's area in every shape",
        "more": "2:1 and 1:2 show more background, so that the squares are framed as the images that are judged",
    }[chosen.framing]
    table = "\n".join(lines)
    return f"""# Aspect-ratio buckets against squares

The demo model, {RESOLUTION} px, batch 4, {chosen.steps} steps of the U-Net, {chosen.seeds} seeds. Six photos of a
subject, of which a third are 1:1, a third 2:1 and a third 1:2: {framed}.
Trained on their squares (crop smart), or on the whole photos in buckets (crop none). Held-out loss on the same six
square images for both, which neither was trained on.

{table}

Speed, steps of each shape in turn, medians of {chosen.timed}: {speed}

`python scripts/measure_buckets.py {asked} --timed {chosen.timed} --write`, {date.today()}, {platform.machine()},
{describe_device().name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}; {seconds:.0f} s in all.
"""


if __name__ == "__main__":
    main()
