"""Measure the processor time of a page with Ray's workers, and in one process.

    python scripts/measure_ray.py [--pages N] [--workers N] [--write]

Drawn pages are transcribed by the built-in model twice: in this process, and by workers of a local Ray. Counted is the
processor time of all processes from when the models are loaded: a run of a million pages pays for that once. What the
start takes is told beside it. `--write` records it in benchmarks/results/transcription_ray.md.
"""

import argparse
import datetime
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

RESULT = REPOSITORY / "benchmarks" / "results" / "transcription_ray.md"


def main() -> None:
    from fastsd_helpers.bench.trocr_pages import Settings, draw_pages
    from fastsd_helpers.trocr.reading import cluster
    from fastsd_helpers.trocr.reading.reader import Reader
    from fastsd_helpers.trocr.reading.transcription import TranscribeConfig, transcribe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=40, help="how many (default: 40)")
    parser.add_argument("--workers", type=int, default=2, help="Ray workers (default: 2)")
    parser.add_argument("--write", action="store_true", help=f"record it in {RESULT.relative_to(REPOSITORY)}")
    chosen = parser.parse_args()
    config = TranscribeConfig(("txt", "json", "csv", "alto", "page", "hocr", "pdf"), pages="pages")
    with tempfile.TemporaryDirectory(prefix="fastsd-ray-") as name:
        folder = Path(name)
        draw_pages(folder / "scans", Settings(pages=chosen.pages))
        began, whole = [0.0], Seconds()
        ready = cluster._read_all

        def read_all(*given: object) -> object:
            began[0] = began[0] or whole.now()
            return ready(*given)

        cluster._read_all = read_all
        cluster.transcribe_on_ray(
            "demo-reader", {}, [str(folder / "scans")], folder / "ray", config,
            cluster.ClusterConfig(workers=chosen.workers), progress=lambda _done: None,
        )  # fmt: skip
        with_ray, start = whole.end() - began[0], began[0]
        reader = Reader("demo-reader")
        before = time.process_time()
        transcribe(reader, [str(folder / "scans")], folder / "plain", config)
        plain = time.process_time() - before
        same = files_of(folder / "ray") == files_of(folder / "plain")
    page = f"""\
# Transcribing with Ray

{platform.system()}, {os.cpu_count()} cores, Python {platform.python_version()}; {datetime.date.today()};
`python scripts/measure_ray.py --pages {chosen.pages} --workers {chosen.workers}`

| processor time of a page | seconds |
|---|---:|
| one process | {plain / chosen.pages:.2f} |
| {chosen.workers} workers of Ray, with Ray's own processes | {with_ray / chosen.pages:.2f} |
| ratio | {with_ray / plain:.2f} |

{chosen.pages} pages of 20 lines, every format. Starting Ray and loading the models took {start:.0f} s once.
The files were {"the same" if same else "NOT the same"}, byte for byte.
"""
    print(page)
    if chosen.write:
        RESULT.write_text(page, encoding="utf-8")


class Seconds:
    """The processor time of this process and all that it starts, also of those that have ended."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], float] = {}
        self._stop = threading.Event()
        self._first = time.process_time()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def now(self) -> float:
        self._look()
        return sum(self._seen.values()) + time.process_time() - self._first

    def end(self) -> float:
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
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            rows[int(path.parent.name)] = int(fields[1]), int(fields[19]), (int(fields[11]) + int(fields[12])) / ticks
        for pid, (_parent, born, used) in rows.items():
            above = pid
            while above in rows and above != me:
                above = rows[above][0]
            if above == me and pid != me:
                self._seen[pid, born] = used


def files_of(out: Path) -> dict[str, bytes]:
    found = (path for path in out.rglob("*") if path.is_file() and ".fastsd-run" not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


if __name__ == "__main__":
    main()
