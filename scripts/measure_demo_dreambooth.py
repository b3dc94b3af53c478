"""Measure DreamBooth on the demo model: held-out loss before and after, for each subject and several seeds.

    python scripts/measure_demo_dreambooth.py [--seeds 5] [--jobs 2] [--work FOLDER] [--grid grid.png] [--write]

The held-out pictures are never trained on, and the noise and timesteps they are judged with are the same before and
after. --write records the table in benchmarks/results/demo_dreambooth.md; --grid writes each subject's pictures before
and after, drawn by the run with seed 1.
"""

import argparse
import multiprocessing
import os
import platform
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path

import demo_pictures as pictures
import torch
from PIL import Image

from fastsd_helpers.demo import SUBJECTS_FOLDER
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare, train
from fastsd_helpers.sessions import Session

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "demo_dreambooth.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; each gets its share of the cores")
    parser.add_argument("--work", type=Path, help="keep the sessions here")
    parser.add_argument("--grid", type=Path, help="write the pictures before and after here")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULTS.name}")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    lines = ["| subject | before | after, mean of seeds | lower by, mean | worst seed | seconds a run |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    grids = []
    pool = ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(threads,)
    )
    with pool:
        seeds = range(1, arguments.seeds + 1)
        runs = {subject: [pool.submit(run, subject, seed, work) for seed in seeds] for subject in pictures.SUBJECTS}
        for subject, futures in runs.items():
            results = [future.result() for future in futures]
            drops = [1 - result.loss_after / result.loss_before for result in results]
            before = sum(result.loss_before for result in results) / len(results)
            after = sum(result.loss_after for result in results) / len(results)
            seconds = sum(result.seconds for result in results) / len(results)
            mean = sum(drops) / len(drops)
            lines.append(f"| {subject} | {before:.4f} | {after:.4f} | {mean:.1%} | {min(drops):.1%} | {seconds:.0f} |")
            print(lines[-1], flush=True)
            grids.append(Image.open(results[0].grid).convert("RGB"))
    if arguments.grid:
        sheet = Image.new("RGB", (grids[0].width, sum(grid.height for grid in grids)), "white")
        for index, grid in enumerate(grids):
            sheet.paste(grid, (0, sum(earlier.height for earlier in grids[:index])))
        sheet.save(arguments.grid, optimize=True)
    if arguments.write:
        RESULTS.write_text(
            "# DreamBooth on the demo model\n\n"
            f"`python scripts/measure_demo_dreambooth.py --seeds {arguments.seeds} --jobs {arguments.jobs} --write`, "
            f"{date.today()}, "
            f"{platform.machine()}, {describe_device().name}, {arguments.jobs} runs at a time with {threads} threads "
            f"each, torch {torch.__version__}. "
            "Held-out loss on six pictures never trained on, same noise and timesteps before and after.\n\n"
            + "\n".join(lines)
            + "\n",
            encoding="utf-8",
        )
    if not arguments.work:
        shutil.rmtree(work)


def run(subject: str, seed: int, work: Path):
    name = f"{subject}-{seed}"
    session = Session.open(name, root=work) if (work / name).is_dir() else Session.create(name, root=work)
    if not session.record["dataset"].get("images"):
        held_out = str(SUBJECTS_FOLDER / "held_out" / subject)
        prepare(PrepareConfig(images=str(SUBJECTS_FOLDER / subject), held_out=held_out, size=128), session)
    config = DreamBoothConfig(base_model="demo", seed=seed, save_every=0, sample_every=0)
    return train(config, session, report=lambda progress: None)


if __name__ == "__main__":
    main()
