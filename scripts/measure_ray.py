"""Measure the processor time of a page with Ray's workers, and in one process.

    python scripts/measure_ray.py [--pages N] [--workers N] [--write]

Drawn pages are transcribed by the built-in model, in turns: by workers of a local Ray, and in this process with as many
threads as one of them has. Counted is the processor time of all processes from when the models are loaded: a run of a
million pages pays for that once. What the start takes is told beside it.
`--write` records it in benchmarks/results/transcription_ray.md.
"""

import argparse
import datetime
import functools
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastsd_helpers.trocr.reading.reader import Reader
    from fastsd_helpers.trocr.reading.transcription import TranscribeConfig

RESULT = REPOSITORY / "benchmarks" / "results" / "transcription_ray.md"
OURS, READING, RAYS = "of these, the process that gave out the work", "of these, the workers", "of these, Ray's own"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=80, help="how many (default: 80)")
    parser.add_argument("--turns", type=int, default=4, help="in so many turns of each (default: 4)")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"record it in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    # Before torch is imported. Ray gives its workers the same number, where nobody chose one.
    threads = max(1, (os.cpu_count() or 1) // chosen.workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import ray

    from fastsd_helpers.bench.trocr_pages import Settings, draw_pages
    from fastsd_helpers.trocr.reading import cluster

    with tempfile.TemporaryDirectory(prefix="fastsd-ray-") as name:
        folder = Path(name)
        draw_pages(folder / "scans", Settings(pages=chosen.pages))
        scans = sorted(str(path) for path in (folder / "scans").iterdir())
        read_here(scans[:1], folder / "first")
        start, plain, spent = 0.0, 0.0, dict.fromkeys((OURS, READING, RAYS), 0.0)
        with cluster._connected(ray, None):
            # In turns, as a processor's second is worth more or less with what else the machine does.
            for turn in range(chosen.turns):
                began, used = read_with_ray(scans[turn :: chosen.turns], folder / "ray", chosen.workers)
                start = start or began
                spent = {kind: seconds + used[kind] for kind, seconds in spent.items()}
                plain += read_here(scans[turn :: chosen.turns], folder / "plain")
                print(f"turn {turn + 1}: {spent}, here {plain:.1f}", file=sys.stderr, flush=True)
        same = files_of(folder / "ray") == files_of(folder / "plain")
    ratio = sum(spent.values()) / plain
    rows = "\n".join(f"| {kind} | {seconds / chosen.pages:.2f} |" for kind, seconds in spent.items())
    page = f"""\
# Transcribing with Ray

{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}; {datetime.date.today()};
`python scripts/measure_ray.py --pages {chosen.pages} --workers {chosen.workers}`

| processor time of a page | seconds |
|---|---:|
| one process, with as many threads as a worker has ({threads}) | {plain / chosen.pages:.2f} |
| {chosen.workers} workers of Ray, with Ray's own processes | {sum(spent.values()) / chosen.pages:.2f} |
{rows}
| ratio | {ratio:.2f} |

{chosen.pages} pages of 20 lines, every format, in {chosen.turns} turns. Starting Ray and loading the models took
{start:.0f} s of processor time, once. The files were {"the same" if same else "NOT the same"}, byte for byte.
"""
    print(page)
    if chosen.write:
        RESULT.write_text(page, encoding="utf-8")


def read_with_ray(scans: list[str], out: Path, workers: int) -> tuple[float, dict[str, float]]:
    """Transcribe with Ray; the seconds until models are loaded, and those from then on by kind of process."""
    from fastsd_helpers.trocr.reading import cluster

    began: dict[str, float] = {}
    seconds, ready = Seconds(), cluster._read_all

    def read_all(*given: object) -> object:
        if not began:
            began.update(seconds.now())
        return ready(*given)

    cluster._read_all = read_all
    try:
        cluster.transcribe_on_ray("demo-reader", {}, scans, out, config(), cluster.ClusterConfig(workers=workers))
    finally:
        cluster._read_all = ready
    return sum(began.values()), {kind: used - began.get(kind, 0) for kind, used in seconds.end().items()}


@functools.cache
def opened() -> "tuple[Reader, Callable[[], object]]":
    """The model and the detector of this process, loaded once as a worker's are."""
    from fastsd_helpers.trocr.pages.page_reader import open_detector
    from fastsd_helpers.trocr.reading.reader import Reader

    return Reader("demo-reader"), functools.cache(open_detector)


def read_here(scans: list[str], out: Path) -> float:
    """Transcribe in this process; returns the seconds."""
    from fastsd_helpers.trocr.reading.results import LocalResults
    from fastsd_helpers.trocr.reading.transcription import _list_inputs, begin_run, read_inputs

    reader, detector = opened()
    before, results = time.process_time(), LocalResults(out)
    begin_run(results, reader, config())
    read_inputs(reader, _list_inputs(scans, out), results, config(), detector=detector)
    return time.process_time() - before


def config() -> "TranscribeConfig":
    from fastsd_helpers.trocr.reading.transcription import TranscribeConfig

    return TranscribeConfig(("txt", "json", "csv", "alto", "page", "hocr", "pdf"), pages="pages")


class Seconds:
    """The processor time of this process and all that it starts, also of those that have ended, by kind."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], tuple[str, float]] = {}
        self._stop = threading.Event()
        self._first = time.process_time()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> dict[str, float]:
        self._look()
        used = dict.fromkeys((OURS, READING, RAYS), 0.0)
        used[OURS] += time.process_time() - self._first
        for kind, seconds in self._seen.values():
            used[kind] += seconds
        return used

    def end(self) -> dict[str, float]:
        self._stop.set()
        self._thread.join()
        return self.now()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self._look()

    def _look(self) -> None:
        ticks, me = os.sysconf("SC_CLK_TCK"), os.getpid()
        rows = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                name, _, rest = path.read_text().rpartition(")")
            except OSError:
                continue
            fields = rest.split()
            used = (int(fields[11]) + int(fields[12])) / ticks
            rows[int(path.parent.name)] = int(fields[1]), int(fields[19]), READING if "_Worker" in name else RAYS, used
        for pid, (_parent, born, kind, used) in rows.items():
            above = pid
            while above in rows and above != me:
                above = rows[above][0]
            if above == me and pid != me:
                self._seen[pid, born] = kind, used


def files_of(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file() and ".fastsd-run" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


if __name__ == "__main__":
    main()
