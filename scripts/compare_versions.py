"""Run a benchmark of two versions in turns, A B B A, and compare: whether a change made anything slower.

    python scripts/compare_versions.py BEFORE AFTER [--turns N] [--records FILE] [--note TEXT] [--write]

BEFORE and AFTER are commits of this repository, or folders that hold a version. Every turn is a process of its own,
with one thread; its processor time is recorded beside what the benchmark says. `--records` keeps each turn in a file
as it ends, and a run that was stopped goes on from there. `--write` records the table in
benchmarks/results/before_and_after.md. It takes about 15 minutes on one core; on a busy machine the medians of four
turns each still differ by a few per cent.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "before_and_after.md"
BENCHES = {
    "dreambooth": ["--steps", "10", "--rounds", "1", "--threads", "1"],
    "trocr": ["--lines", "2", "--batch", "2", "--rounds", "1", "--threads", "1", "--tokens", "12", "--no-memory"],
    "convert": ["--divide", "4", "--rounds", "2"],
}


def main() -> int:
    chosen = read_options()
    with tempfile.TemporaryDirectory() as name:
        trees = {side: unpack(getattr(chosen, side), Path(name) / side) for side in ("before", "after")}
        work = Path(name) / "work"
        turns = read_records(chosen.records)
        for bench in BENCHES:
            order = [("before", "after", "after", "before")[turn % 4] for turn in range(2 * chosen.turns)]
            for side in order[sum(turn["bench"] == bench for turn in turns) :]:
                turns.append(take_turn(side, trees[side], bench, work))
                print(f"{bench} {side}: {turns[-1]['cpu']:.1f} s of processor time", flush=True)
                if chosen.records is not None:
                    with chosen.records.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(turns[-1]) + "\n")
    page = make_page(turns, chosen)
    print(page)
    if chosen.write:
        RESULT.write_text(page, encoding="utf-8")
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the version to compare with: a commit or a folder")
    parser.add_argument("after", help="the version that is judged: a commit or a folder")
    parser.add_argument("--turns", type=int, default=4, help="turns of each version (default: 4)")
    parser.add_argument("--records", type=Path, help="keep every turn in this file, and go on from what is there")
    parser.add_argument("--note", default="", help="a sentence for the page, about what was looked at again")
    parser.add_argument("--write", action="store_true", help=f"record the table in {RESULT.relative_to(ROOT)}")
    return parser.parse_args()


def unpack(version: str, folder: Path) -> Path:
    """The folder of a version: as given, or a commit's files in a new folder."""
    if Path(version).is_dir():
        return Path(version).resolve()
    packed = subprocess.run(["git", "archive", version], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def read_records(path: Path | None) -> list[dict[str, Any]]:
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def take_turn(side: str, tree: Path, bench: str, work: Path) -> dict[str, Any]:
    """One benchmark of one version, with the processor time of all that it started."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    work.mkdir(exist_ok=True)
    more = ["--work", str(work)] if bench == "trocr" else []  # both read the same model
    command = [sys.executable, "-m", "fastsd_helpers", "bench", bench, *BENCHES[bench], *more, "--json"]
    before = used()
    done = subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return {"side": side, "bench": bench, "cpu": used() - before, "out": json.loads(done.stdout.splitlines()[-1])}


def used() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return children.ru_utime + children.ru_stime


def measured(turn: dict[str, Any]) -> dict[str, float]:
    """What a turn measured, in seconds: what -> how long."""
    out = turn["out"]
    if turn["bench"] == "dreambooth":
        found = {f"a step, {name}": values["step"] for name, values in out["medians"].items()}
        return found | {"caches, ours": out["medians"]["ours"]["caches"]}
    seconds = out["seconds"].items()
    return {what: statistics.median(times) if isinstance(times, list) else times for what, times in seconds}


def make_page(turns: list[dict[str, Any]], chosen: argparse.Namespace) -> str:
    rows = []
    for bench in BENCHES:
        of = {side: [t for t in turns if t["bench"] == bench and t["side"] == side] for side in ("before", "after")}
        for what in measured(of["before"][0]):
            before, after = ([measured(turn)[what] for turn in of[side]] for side in ("before", "after"))
            rows.append([bench, what, *map(in_words, (before, after)), f"{ratio(after, before):.2f}"])
        before, after = ([turn["cpu"] for turn in of[side]] for side in ("before", "after"))
        rows.append([bench, "processor time of a turn", *map(in_words, (before, after)), f"{ratio(after, before):.2f}"])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    commands = "\n".join(f"- `fastsd bench {name} {' '.join(words)}`" for name, words in BENCHES.items())
    count = len(turns) // (2 * len(BENCHES))
    return f"""# Two versions in turns

Seconds of each turn, in the order they were taken (A B B A); the ratio is that of the medians, after / before. Above 1
the newer version is slower. The rows of other libraries' code, which is the same in both, show what the machine's own
noise is.

| benchmark | what | before: {chosen.before} | after: {chosen.after} | ratio |
|---|---|---|---|---:|
{table}

{commands}

Measured on {datetime.datetime.now(datetime.UTC).date()}, {platform.machine()}, one thread, {count} turns of each.
{chosen.note}

Again: `python scripts/compare_versions.py {chosen.before} {chosen.after} --turns {count} --write`
"""


def in_words(seconds: list[float]) -> str:
    return ", ".join(f"{value:.3f}" if value < 2 else f"{value:.1f}" for value in seconds)


def ratio(after: list[float], before: list[float]) -> float:
    return statistics.median(after) / statistics.median(before)


if __name__ == "__main__":
    sys.exit(main())
