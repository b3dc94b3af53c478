"""Measure what a page costs, step by step, and compute from it what an archive costs.

    python scripts/cost_of_pages.py [--pages N] [--write]

A page's steps are those of `fastsd bench trocr pages`, in one thread; the lines a second of a model of the size of
trocr-base are those of benchmarks/results/trocr.md. `--write` records it in benchmarks/results/trocr_pages.md.
"""

import argparse
import datetime
import os
import re
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

RESULTS = REPOSITORY / "benchmarks" / "results"
LINES, CORES, ON = 20, 2, 64  # of a page; of the machine of trocr.md; of the one that a million pages are computed for
STEPS = {
    "finding": "finding lines, and which way is up (PP-OCR's detector, onnxruntime)",
    "cutting": "cutting them",
    "reading": "reading them, built-in model",
    "writing": "writing seven formats, and the notes to go on from",
    "other": "other: opening images",
}
MODELS = {"fp32": "fp32", "bf16": "bf16", "int8": r"int8 static \(OpenVINO\)"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=6, help="drawn pages (default: 6)")
    parser.add_argument("--write", action="store_true", help="record it in benchmarks/results/trocr_pages.md")
    chosen = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
    from fastsd_helpers.bench.trocr_pages import Settings, measure

    page = page_of(measure(Settings(pages=chosen.pages, lines=LINES, rounds=1)).data, chosen.pages)
    print(page)
    if chosen.write:
        (RESULTS / "trocr_pages.md").write_text(page, encoding="utf-8")


def page_of(found: dict[str, Any], pages: int) -> str:
    """The results page."""
    cost, sizes = found["processor_seconds_per_page"], found["bytes_per_page"]
    whole = cost["whole"]
    steps = [f"| {told} | {cost[name]:.2f} | {100 * cost[name] / whole:.1f} % |" for name, told in STEPS.items()]
    rest = whole - cost["reading"]
    models = []
    for name, rate in rates().items():
        read = CORES * LINES / rate
        hours = 1000 * (read + rest) / 3600
        models.append(
            f"| {name} | {rate:.3f} | {read:.1f} | {read + rest:.1f} | {hours:.1f} | {hours * 1000 / ON / 24:.1f} |"
        )
    gpus = []
    for rate in (20, 100, 500):
        hours_by_cores = (1000 * (rest / cores + LINES / rate) / 3600 for cores in (1, 4, 16))
        gpus.append(f"| {rate} | " + " | ".join(f"{hours:.2f}" for hours in hours_by_cores) + " |")
    bytes_ = [f"| {kind} | {size:,.0f} |" for kind, size in sizes.items()]
    return f"""\
# Transcribing whole pages

`python scripts/cost_of_pages.py --pages {pages}`, {datetime.date.today()}: A4 pages at 150 dots per inch with {LINES}
drawn lines, the built-in model, every format (txt, json, csv, alto, page, hocr, pdf), one thread; processor time, as
the machine (2 cores) was busy with other work, which makes a second worth less: on an idle one it is fewer seconds.

| step | seconds a page | share |
| --- | ---: | ---: |
{chr(10).join(steps)}
| all | {whole:.2f} | |

Bytes a page:

| | bytes |
| --- | ---: |
{chr(10).join(bytes_)}

## Computed from it

A model of the size of trocr-base, by its lines a second on {CORES} cores ([measured](trocr.md)): {CORES} × {LINES}
÷ that are the seconds of a core to read a page; the other steps, {rest:.2f} s, are those above.

| trocr-base | lines a second | reading | all steps | core-hours for 1,000 pages | days for a million on {ON} cores |
| --- | ---: | ---: | ---: | ---: | ---: |
{chr(10).join(models)}

Hours of a GPU with 1, 4 or 16 cores for 1,000 pages: {rest:.2f} ÷ cores + {LINES} ÷ lines a second, for a page. The
lines a second are assumed, none were measured.

| lines a second | 1 core | 4 cores | 16 cores |
| --- | ---: | ---: | ---: |
{chr(10).join(gpus)}
"""


def rates() -> dict[str, float]:
    """Lines a second of trocr-base's size, from the page where they were measured."""
    text = (RESULTS / "trocr.md").read_text(encoding="utf-8")
    lines = {name: rf"^\| \(c\) ours, {told} \| ([\d.]+) " for name, told in MODELS.items()}
    return {name: float(re.findall(find, text, re.MULTILINE)[0]) for name, find in lines.items()}


if __name__ == "__main__":
    main()
