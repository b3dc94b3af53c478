"""Run the tests on every path that the libraries have through the same sums, with one thread and with two.

python scripts/test_paths.py [--all | --slow] [--paths plain,avx2] [--threads 1,2] [--workers N] [--write] [-- WORDS]

Which instructions PyTorch, its oneDNN, MKL, NumPy's OpenBLAS and OpenCV use is the processor's choice, and each choice
rounds differently; their own switches make another processor's choice here. Prints a table, and which comparisons came
nearest to their bounds; ends with 1 when anything is red. Without `--all` it is the tests marked `numeric` that are
not slow. `--write` keeps the tables in benchmarks/results/test_paths.md.

What the switches cannot do: on an AMD processor MKL takes its own choice for AVX2 and AVX512 (MKL_VERBOSE=1 says so);
OpenVINO and ONNX Runtime have no switch that works (see tests/conftest.py).
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastsd_helpers.device import describe_device  # noqa: E402
from fastsd_helpers.runtime import versions  # noqa: E402

SWITCHES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "OPENBLAS_CORETYPE", "OPENCV_CPU_DISABLE")
PATHS = {
    "plain": ("default", "SSE41", "COMPATIBLE", "Prescott", "AVX2,AVX512-SKX"),
    "avx2": ("avx2", "AVX2", "AVX2,STRICT", "Haswell", "AVX512-SKX"),
    "avx512": ("avx512", "AVX512_CORE", "AVX512,STRICT", "SkylakeX", ""),
    "own": ("", "", "", "", ""),  # as a user has it
}
NEEDS = {"avx2": "avx2", "avx512": "avx512bw"}  # flags in /proc/cpuinfo
NEAREST = 12


@dataclass
class Outcome:
    """One run of the tests; `failed` counts a run that died as one failure."""

    path: str
    threads: int
    passed: int
    failed: int
    skipped: int
    seconds: float

    def row(self) -> str:
        """A row of the table."""
        numbers = f"{self.passed} | {self.failed} | {self.skipped} | {self.seconds:.0f}"
        return f"| {self.path} | {self.threads} | {numbers} |"


def set_environment(path: str, threads: int, notes: Path) -> dict[str, str]:
    """The environment in which the libraries take this path."""
    environment = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    environment |= {name: value for name, value in zip(SWITCHES, PATHS[path], strict=True) if value}
    return environment | {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "FASTSD_DEVIATIONS": str(notes),
    }


def run(path: str, threads: int, notes: Path, *, workers: int, words: list[str]) -> Outcome:
    """Run pytest once; its own output goes to the screen."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
        if workers > 1:
            command += ["--numprocesses", str(workers), "--dist", "loadfile", "--max-worker-restart", "0"]
        began = time.monotonic()
        done = subprocess.run([*command, *words], cwd=ROOT, env=set_environment(path, threads, notes), check=False)
        seconds = time.monotonic() - began
        if not report.is_file():  # the process died: pytest writes it last
            return Outcome(path, threads, 0, 1, 0, seconds)
        suite = next(ElementTree.parse(report).iter("testsuite"))
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    return Outcome(path, threads, total - failed - skipped, failed or int(done.returncode != 0), skipped, seconds)


def nearest_to_their_bounds(notes: dict[str, Path]) -> list[str]:
    """Of each test the deviation that was the largest share of what is allowed, those with the least room first."""
    found: dict[str, tuple[float, float, float, str]] = {}
    for where, file in notes.items():
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            note = json.loads(line)
            used = note["share"] / note["allowed"]
            found[note["test"]] = max(found.get(note["test"], (-1.0,)), (used, note["share"], note["allowed"], where))
    rows = ["| test | off by, of the largest value | allowed | times less | on |", "| --- | --- | --- | --- | --- |"]
    for test, (used, share, allowed, where) in sorted(found.items(), key=lambda item: -item[1][0])[:NEAREST]:
        name = test.removeprefix("tests/").replace("::", " ")
        rows.append(f"| {name} | {share:.1e} | {allowed:.0e} | {1 / used if used else float('inf'):.0f} | {where} |")
    return rows


def main() -> int:
    """Run every path asked for, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all quick tests, not only those marked numeric")
    parser.add_argument("--slow", action="store_true", help="the slow ones among them too")
    parser.add_argument("--paths", default=",".join(PATHS), help="default: %(default)s")
    parser.add_argument("--threads", default="1,2", help="default: %(default)s")
    parser.add_argument("--workers", type=int, help="tests at once; default: as many as there are cores for, 4 at most")
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/results/test_paths.md")
    parser.add_argument("pytest", nargs="*", metavar="WORDS", help="words for pytest, after --")
    arguments = parser.parse_args()
    kinds = [*([] if arguments.all else ["numeric"]), *([] if arguments.slow else ["not slow"])]
    words = ["-m", " and ".join([*kinds, "not network", "not gpu"]), *arguments.pytest]
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="ascii", errors="replace").split()) if cpuinfo.is_file() else set()
    lines = ["| path | threads | passed | failed | skipped | seconds |", "| --- | --- | --- | --- | --- | --- |"]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        notes: dict[str, Path] = {}
        for path in arguments.paths.split(","):
            if path in NEEDS and NEEDS[path] not in flags:
                lines.append(f"| {path} | this processor has not got it | | | | |")
                continue
            for threads in map(int, arguments.threads.split(",")):
                where = f"{path}, {threads}"
                notes[where] = Path(folder) / f"{path}-{threads}.jsonl"
                workers = arguments.workers or max(1, min(4, (os.cpu_count() or 1) // threads))
                print(f"== {where} {'thread' if threads == 1 else 'threads'}", flush=True)
                outcomes.append(run(path, threads, notes[where], workers=workers, words=words))
                lines.append(outcomes[-1].row())
                print(lines[-1], flush=True)
        nearest = nearest_to_their_bounds(notes)
    print("\n".join(["", *lines, "", *nearest]))
    if arguments.write:
        write_results([*lines, "", "Comparisons with the least room to their bounds, on any path:", "", *nearest])
    return int(any(outcome.failed for outcome in outcomes))


def write_results(tables: list[str]) -> None:
    """Keep the tables with the command, the machine, the versions and the date."""
    device, found = describe_device(), versions()
    libraries = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "transformers", "diffusers", "numpy"))
    text = [
        "# The tests on every path of the libraries",
        "",
        f"`python scripts/test_paths.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, {device.name}, "
        f"{os.cpu_count()} cores, {libraries}.",
        "",
        *[f"- {path}: {describe(values)}" for path, values in PATHS.items()],
        "",
        *tables,
    ]
    (ROOT / "benchmarks" / "results" / "test_paths.md").write_text("\n".join(text) + "\n", encoding="utf-8")


def describe(values: tuple[str, ...]) -> str:
    """The switches of a path in words."""
    pairs = [f"{name}={value}" for name, value in zip(SWITCHES, values, strict=True) if value]
    return ", ".join(pairs) or "nothing set"


if __name__ == "__main__":
    sys.exit(main())
