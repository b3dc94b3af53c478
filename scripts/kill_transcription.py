"""Kill a transcription at 20 random moments, go on with the same command, and compare every file it ends with.

    python scripts/kill_transcription.py [--moments N] [--pages N] [--seed S] [--write]

Short pages are drawn, some of them as PDFs and TIFFs of several, and read by the built-in model into every format. Each
run is killed twenty times: at a random moment after a random number of pages, or while it writes a random file. Then
it goes on to its end. Exits with 1 if a file is missing, differs from that of the run nobody killed, or is one too
many, or if a page was noted twice. `--write` records the table in benchmarks/results/transcription_kills.md.
"""

import argparse
import datetime
import importlib
import json
import multiprocessing
import os
import platform
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))
RESULT = REPOSITORY / "benchmarks" / "results" / "transcription_kills.md"
FORMATS = "txt,json,csv,alto,page,hocr,pdf"
KILLS_A_RUN = 20
WORDS = "over the lazy dog and into a quiet garden where nobody had been since spring".split()  # noqa: SIM905
HEAD = "| # | run | killed | pages noted then | files there then |\n|---:|---:|---|---:|---:|"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="how many (default: 20)")
    parser.add_argument("--pages", type=int, default=100, help="of every run (default: 100)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the moments (default: 1)")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    for name in ("torch", "transformers", "onnxruntime", "rapidocr", "pikepdf", "img2pdf", "lxml.etree"):
        importlib.import_module(name)  # once, and not in every process that is killed
    chance, rows, problems = random.Random(chosen.seed), [], []
    with tempfile.TemporaryDirectory(prefix="kill-transcription-") as name:
        folder = Path(name)
        inputs = draw_inputs(folder / "scans", chosen.pages, chance)
        ended(start(folder / "scans", folder / "whole"))
        whole = files_of(folder / "whole")
        print(f"{inputs} inputs, {chosen.pages} pages, {len(whole)} files\n\n{HEAD}", flush=True)
        left, run = chosen.moments, 0
        while left:
            run += 1
            out = folder / f"run-{run}"
            for _ in range(min(left, KILLS_A_RUN)):
                told = kill_once(folder / "scans", out, chance, chosen.pages)
                left -= 1
                noted, there = sum(noted_pages(out).values()), len(files_of(out))
                rows.append(f"| {len(rows) + 1} | {run} | {told} | {noted} | {there} |")
                print(rows[-1], flush=True)
            if ended(start(folder / "scans", out)):
                problems.append(f"run {run} did not end well")
            problems += [f"run {run}: {problem}" for problem in compare(out, whole, chosen.pages)]
    verdict = "\n".join(problems) or (
        f"All {run} runs ended with the {len(whole)} files of the run that nobody killed, byte for byte; no page was "
        "noted twice, none is missing, and no other file is there."
    )
    print(f"\n{verdict}")
    if chosen.write:
        RESULT.write_text(page_of(chosen, inputs, len(whole), rows, verdict), encoding="utf-8")
        print(f"Written: {RESULT}")
    return 1 if problems else 0


def draw_inputs(folder: Path, pages: int, chance: random.Random) -> int:
    """Draw short pages: one image in ten is a TIFF of two, one a PDF of three; returns how many files."""
    from PIL import Image, ImageDraw, ImageFont

    folder.mkdir()
    left, number = pages, 0
    while left:
        number += 1
        wanted = min(left, {3: 2, 7: 3}.get(number % 10, 1))
        left -= wanted
        sheets = []
        for _ in range(wanted):
            sheet = Image.new("RGB", (520, 480), "white")
            for row in range(2):
                text = " ".join(chance.sample(WORDS, 3))
                ImageDraw.Draw(sheet).text((30, 80 + 140 * row), text, "black", ImageFont.load_default(36))
            sheets.append(sheet)
        ending = {1: "png", 2: "tiff", 3: "pdf"}[wanted]
        more = {"save_all": True, "append_images": sheets[1:]} if wanted > 1 else {}
        sheets[0].save(folder / f"scan{number}.{ending}", **more)
    return number


def start(scans: Path, out: Path, **environment: str) -> Any:
    """Start the command in a process of its own, forked from this one, which has imported what it needs and no more."""
    words = ["trocr", "read", str(scans), "--out", str(out), "--pages", "--format", FORMATS, "--model", "demo-reader"]
    run = multiprocessing.get_context("fork").Process(target=command, args=(words, environment))
    run.start()
    return run


def command(words: list[str], environment: dict[str, str]) -> None:
    from fastsd_helpers.cli import main as fastsd

    os.environ |= environment
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    sys.exit(fastsd(words))


def ended(run: Any) -> int:
    run.join()
    return int(run.exitcode)


def kill_once(scans: Path, out: Path, chance: random.Random, pages: int) -> str:
    """Start the run, or go on with it, and kill it; returns where."""
    before = sum(noted_pages(out).values())
    if chance.random() < 0.4:  # in the middle of writing a file, which takes too little time to be met by chance
        point = chance.choice(["trocr.file.write", "trocr.file.after_rename", "trocr.page"])
        fault = f"{point}:{chance.randint(1, 5)}"
        code, told = ended(start(scans, out, FASTSD_FAULT=fault)), f"at `{fault}`"
    else:
        more, delay = chance.randint(0, max(1, pages // KILLS_A_RUN - 2)), chance.uniform(0, 0.8)
        run, told = start(scans, out), f"{delay:.2f} s after {more} more pages"
        while run.is_alive() and sum(noted_pages(out).values()) < before + more:
            time.sleep(0.02)
        time.sleep(delay)
        run.kill()
        code = ended(run)
    return told if code == -signal.SIGKILL else f"{told}: too late, it was done"


def noted_pages(out: Path) -> dict[tuple[str, int], int]:
    """How often each page of each input is noted."""
    counts: dict[tuple[str, int], int] = {}
    for path in (out / ".fastsd-run").glob("*.jsonl"):
        for row in path.read_bytes().split(b"\n"):
            try:
                record = json.loads(row).get("record")
            except (ValueError, AttributeError):
                continue  # the end of one that a kill cut
            if record:
                key = (path.name, record["number"])
                counts[key] = counts.get(key, 0) + 1
    return counts


def files_of(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file() and ".fastsd-run" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def compare(out: Path, whole: dict[str, bytes], pages: int) -> list[str]:
    found, noted = files_of(out), noted_pages(out)
    told = [f"{name} is missing" for name in sorted(whole.keys() - found.keys())]
    told += [f"{name} is one too many" for name in sorted(found.keys() - whole.keys())]
    told += [f"{name} differs" for name in sorted(whole.keys() & found.keys()) if whole[name] != found[name]]
    told += [f"page {number} of {name} was noted {count} times" for (name, number), count in noted.items() if count > 1]
    return told if len(noted) == pages else [*told, f"{len(noted)} of {pages} pages are noted"]


def page_of(chosen: argparse.Namespace, inputs: int, files: int, rows: list[str], verdict: str) -> str:
    table, command = (
        "\n".join(rows),
        (f"scripts/kill_transcription.py --moments {chosen.moments} --pages {chosen.pages} --seed {chosen.seed}"),
    )
    return f"""\
# A transcription that is killed

{platform.system()}, Python {platform.python_version()}; {datetime.date.today()}; `python {command}`

{inputs} images, TIFFs and PDFs with {chosen.pages} short pages are read into {FORMATS}: {files} files.
Each run is killed {KILLS_A_RUN} times (SIGKILL), each time gone on with by the same command, and then let to its end.

{verdict}

{HEAD}
{table}
"""


if __name__ == "__main__":
    sys.exit(main())
