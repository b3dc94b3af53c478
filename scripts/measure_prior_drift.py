"""Measure how much a trained demo model drifts from the base model, with and without prior preservation.

    python scripts/measure_prior_drift.py [--seeds 5] [--class-images 40] [--work FOLDER] [--write]

Ten class prompts, of objects that the base model knows, are drawn by the base model and by each trained one from equal
noise; the class pictures of the prior are drawn for the same prompts from other noise. Drift is the mean distance of
the pictures: pixels (mean absolute difference, 0..1) and latents (root mean square difference of the demo VAE's
latents). Each seed trains three times, alike but for the prior: without it, with it, and with class pictures drawn as
other trainers draw them (guidance 7.5). --write records the table in benchmarks/results/prior_drift.md.
"""

import argparse
import os
import platform
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
import torch
from demo_pictures import BACKGROUNDS, COLOURS, OBJECTS, PLACES, Scene

from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare, train
from fastsd_helpers.dreambooth.results.learned import open_learned
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.dreambooth.training.cache import encode_prompts
from fastsd_helpers.dreambooth.training.sampling import draw_pictures
from fastsd_helpers.runtime import make_cpu_sums_repeatable
from fastsd_helpers.sessions import Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "prior_drift.md"
SUBJECT = "robot"
PROMPTS = [
    Scene(name, colour, place, background, "flat").caption
    for name, colour, place, background in zip(
        OBJECTS, 2 * list(COLOURS), 2 * list(PLACES), 2 * list(BACKGROUNDS), strict=False
    )
]
CLASS_PROMPT = " | ".join(PROMPTS)
RUNS: dict[str, dict] = {"without": {}, "with": {"class_guidance": 1.0}, "with, guided": {"class_guidance": 7.5}}
MEASURES = ("pixels", "latents")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--class-images", type=int, default=40)
    parser.add_argument("--class-prompt", default=CLASS_PROMPT)
    parser.add_argument("--work", type=Path, help="keep the sessions here, and go on with them")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.name}")
    chosen = parser.parse_args()
    make_cpu_sums_repeatable()
    work = chosen.work or Path(tempfile.mkdtemp())
    before = draw_with(BaseModel.fetch("demo"), None)
    names = list(RUNS)
    lines = [
        f"| seed | {' | '.join(f'{what} {name}' for what in MEASURES for name in names)} |",
        f"|---:|{'---:|' * len(MEASURES) * len(names)}",
    ]
    rows = []
    for seed in range(1, chosen.seeds + 1):
        row = {}
        for name, prior in RUNS.items():
            if prior:
                prior = {**prior, "class_prompt": chosen.class_prompt, "class_images": chosen.class_images}
            row[name] = distances(before, drawn_after_training(work / f"{name}-{seed}".replace(", ", "-"), seed, prior))
        rows.append(row)
        lines.append(f"| {seed} | {cells_of(row)} |")
        print(lines[-1], flush=True)
    mean = {name: {what: float(np.mean([row[name][what] for row in rows])) for what in MEASURES} for name in names}
    lines += [f"| mean | {cells_of(mean)} |", ""]
    lower = {what: sum(row["with"][what] < row["without"][what] for row in rows) for what in MEASURES}
    lines.append(
        "Lower with the prior than without: "
        + ", ".join(f"{what} in {count} of {chosen.seeds} seeds" for what, count in lower.items())
        + "."
    )
    print("\n".join(lines[-3:]))
    if chosen.write:
        head = [
            "# Drift with and without prior preservation",
            "",
            f"`scripts/measure_prior_drift.py`, {date.today()}, {platform.platform()}, {os.cpu_count()} cores, torch "
            f"{torch.__version__}; subject {SUBJECT}, class prompt `{chosen.class_prompt}`, {chosen.class_images} "
            "class pictures.",
            "",
        ]
        RESULTS.write_text("\n".join([*head, *lines]) + "\n", encoding="utf-8")


def cells_of(row: dict[str, dict[str, float]]) -> str:
    return " | ".join(f"{row[name][what]:.4f}" for what in MEASURES for name in RUNS)


def drawn_after_training(folder: Path, seed: int, prior: dict) -> tuple[np.ndarray, torch.Tensor]:
    """Train the demo's subject once, or go on with it, and draw the class prompts with what came out."""
    if (folder / SUBJECT).exists():
        session = Session.open(SUBJECT, root=folder)
    else:
        session = Session.create(SUBJECT, root=folder)
        prepare(PrepareConfig(images=str(SUBJECTS_FOLDER / SUBJECT), size=128), session)
    train(DreamBoothConfig(base_model="demo", seed=seed, sample_every=0, save_every=0, **prior), session)
    with tempfile.TemporaryDirectory() as scratch:
        context, _, _ = open_learned(session, Path(scratch))
    return draw_with(context.base, context)


def draw_with(base: BaseModel, context) -> tuple[np.ndarray, torch.Tensor]:
    """Pixels float32 [prompts, h, w, 3] in 0..1 and their latents, drawn by the base model or by a context's."""
    encoders = context.load_encoders() if context else base.load_encoders()
    unet = context.load_denoiser() if context else base.load("unet")
    vae = base.load("vae")
    text = encode_prompts(base.family, encoders, base.load_tokenizers(), [*PROMPTS, ""], device="cpu")
    seeds = list(range(100, 100 + len(PROMPTS)))
    pictures = draw_pictures(base, unet, vae, text[:-1], text[-1:], size=128, seeds=seeds, device="cpu")
    pixels = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
    return pixels, latents


def distances(one, other) -> dict[str, float]:
    """Mean absolute difference of the pixels and root mean square difference of the latents."""
    return {
        "pixels": float(np.abs(one[0] - other[0]).mean()),
        "latents": float((one[1] - other[1]).pow(2).mean().sqrt()),
    }


if __name__ == "__main__":
    main()
