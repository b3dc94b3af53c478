"""Put small faults into the code, one at a time, and count how many of them the quick tests notice.

    python scripts/sample_faults.py --seed S [--count 200] [--out FILE.json] [--modules NAME,NAME]

Takes the modules below in turn and changes one place of each: a comparison, a condition, a call, a number (all kinds:
tests/faults/mutants.py). Works in a temporary copy of the tree. Each mutant gets the quick tests that reach its block
of statements, quickest first, until one fails or `--seconds` of unmutated time have passed. Which tests reach a block
is recorded once for every test file, and again when that file changes, in `--map`. Prints a line for each mutant. What
stands in FILE.json is not run again, so a run that was stopped goes on; `--again` runs its survivors once more.

A mutant that no test notices may be equivalent to the code: that is for a reader to judge.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = "fastsd_helpers"
QUICK = "not slow and not network and not gpu"
MARK = "FASTSD_MARK"

# Where a fault costs users most: lost work, wrong results in silence, an open door.
# fmt: off
MODULES = (
    "sessions/session", "sessions/lock", "sessions/importing", "dreambooth/resume/store",
    "dreambooth/resume/copy_queue",
    "dreambooth/resume/generation", "dreambooth/training/randomness", "dreambooth/training/loss",
    "dreambooth/training/stages",
    "checkpoints/converter", "checkpoints/models/folder_conversion",
    "checkpoints/lora_converter", "checkpoints/formats/dtypes",
    "checkpoints/formats/safetensors_file",
    "tunnels/gate/server", "tunnels/gate/entrance", "tunnels/gate/visitor", "tunnels/gate/wire",
    "tunnels/gate/connection", "tunnels/gate/cookie",
    "tunnels/gate/login", "tunnels/gate/proxy", "downloads/transfer", "downloads/links",
    "wheels/difference", "wheels/installer", "files", "processes/identity", "processes/lock", "processes/child",
    "model_lookup/names", "model_lookup/kinds", "model_lookup/finding", "drive", "trocr/model/search",
    "trocr/reading/dataset",
    "trocr/teaching/metrics", "webui/placing/models", "options",
)
# fmt: on

# Loaded once, before the first fork: most of the time a small test takes is the import of these.
# fmt: off
WARM = (
    "numpy", "PIL.Image", "PIL.ImageDraw", "PIL.ImageFont", "PIL.ImageOps", "cv2", "torch", "torch.nn.functional",
    "torch.optim", "safetensors.torch", "huggingface_hub", "transformers",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.tokenization_clip",
    "transformers.models.trocr.modeling_trocr", "transformers.models.vit.modeling_vit",
    "transformers.modeling_utils", "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder",
    "transformers.models.t5.modeling_t5", "diffusers", "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion", "peft", "accelerate", "aiohttp",
    "aiohttp.web", "pytest", "xml.etree.ElementTree", "sqlite3", "email.message", "http.server", "http.cookiejar",
    "ipywidgets", "multiprocessing.pool",
)
# fmt: on


class Recorder:
    """A pytest plugin that notes how long each test takes, and which blocks of statements it reaches."""

    options = ()

    def __init__(self, folder: Path) -> None:
        self.tests: dict[str, dict] = {}
        self._folder = folder
        self._by_fixture: dict[str, set[str]] = {}
        self._started = 0.0

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._listen("test")
        self._started = time.perf_counter()

    def pytest_fixture_setup(self, fixturedef, request) -> Iterator[None]:
        """What a fixture that many tests share reaches counts for each of them, not only for the first."""
        if fixturedef.scope == "function":
            yield
            return
        before = self._heard("test")
        self._listen("test")
        yield
        found = self._heard("test")
        self._by_fixture[fixturedef.argname] = found
        with open(self._folder / "test", "a") as file:
            file.write("".join(f"{block}\n" for block in before))

    pytest_fixture_setup.hookwrapper = True

    def pytest_runtest_logreport(self, report) -> None:
        test = self.tests.setdefault(report.nodeid, {"seconds": 0.0, "passed": False, "blocks": []})
        if report.when == "call":
            test["passed"] = report.passed

    def pytest_runtest_teardown(self, item, nextitem) -> Iterator[None]:
        yield
        shared = set().union(*(self._by_fixture.get(name, ()) for name in item.fixturenames))
        test = self.tests[item.nodeid]
        test["blocks"] = sorted(self._heard("test") | shared)
        test["seconds"] = round(time.perf_counter() - self._started, 2)

    pytest_runtest_teardown.hookwrapper = True

    def _listen(self, name: str) -> None:
        vars(__import__("builtins")).setdefault("_blocks_reached", set()).clear()
        os.environ["FASTSD_PROBES"] = str(self._folder / name)
        (self._folder / name).unlink(missing_ok=True)

    def _heard(self, name: str) -> set[str]:
        path = self._folder / name
        return set(path.read_text().split("\n")) - {""} if path.exists() else set()


class Chooser:
    """A pytest plugin that runs the tests named, in their order, and writes down the first that fails."""

    options = ("-x",)

    def __init__(self, names: list[str], answer: Path) -> None:
        self._names = {name: place for place, name in enumerate(names)}
        self._answer = answer

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = sorted((it for it in items if it.nodeid in self._names), key=lambda it: self._names[it.nodeid])

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._note(f"{report.nodeid} (does not load)")

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self._note(report.nodeid)

    def _note(self, name: str) -> None:
        if not self._answer.exists():
            self._answer.write_text(name)


def main() -> int:
    chosen = read_options()
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="sample-faults-") as name:
        folder = Path(name)
        tree = copy_tree(folder / "tree")
        tests = record(folder, chosen)
        if chosen.seed is None:
            return 0
        outcomes = sample(folder, tree, tests, chosen)
        doubtful = verify(folder, tree, outcomes)
    report(outcomes, doubtful)
    return 0


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="chooses the mutants; without one only the map is recorded")
    parser.add_argument("--count", type=int, default=200, help="how many mutants (default: 200)")
    parser.add_argument("--seconds", type=float, default=40, help="of unmutated test time for each (default: 40)")
    parser.add_argument("--out", type=Path, help="the outcomes as JSON; read first, so that a stopped run goes on")
    parser.add_argument("--again", action="store_true", help="run the survivors in FILE.json once more")
    parser.add_argument("--modules", help=f"these of the modules alone, for example {','.join(MODULES[:2])}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--map", type=Path, default=cache / "fastsd-sample-faults.json", help="(default: %(default)s)")
    return parser.parse_args()


def load_libraries() -> None:
    import importlib

    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    for name in WARM:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    # A forked process has the lock another thread held, and not the thread that would open it.
    assert threading.active_count() == 1
    assert PACKAGE not in sys.modules


def copy_tree(place: Path) -> Path:
    listed = ["git", "-C", str(REPOSITORY), "ls-files", "-coz", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, check=True, text=True).stdout.split("\0"):
        if name and (REPOSITORY / name).is_file():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, place / name)
    for name in (".venv", ".venv-ipywidgets7"):
        if (REPOSITORY / name).exists():
            (place / name).symlink_to((REPOSITORY / name).resolve())
    compiled = [sys.executable, "-m", "compileall", "-q", str(place / PACKAGE)]
    subprocess.run(compiled, check=True)
    return place


def sources(tree: Path) -> dict[str, str]:
    return {name: (tree / PACKAGE / f"{name}.py").read_text(encoding="utf-8") for name in MODULES}


def record(folder: Path, chosen: argparse.Namespace) -> dict[str, dict]:
    """Return what is known of every quick test, running the files that have changed since they were recorded."""
    sys.path.append(str(REPOSITORY / "tests"))
    from faults.mutants import add_probes

    known = json.loads(chosen.map.read_text()) if chosen.map.exists() else {}
    files = sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    prints = {name: hashlib.sha256((REPOSITORY / name).read_bytes()).hexdigest() for name in files}
    wanted = [name for name in files if known.get(name, {}).get("sha256") != prints[name]]
    if wanted:
        probed = copy_tree(folder / "probed")
        for name, source in sources(probed).items():
            (probed / PACKAGE / f"{name}.py").write_text(add_probes(source, name), encoding="utf-8")
    for place, name in enumerate(sorted(wanted, key=lambda name: known.get(name, {}).get("seconds", 0)), start=1):
        answer = folder / "recorded.json"
        answer.unlink(missing_ok=True)
        started = time.monotonic()
        fork(lambda: _record_file(probed, name, folder, answer), folder, seconds=1800)  # noqa: B023
        seconds = round(time.monotonic() - started, 1)
        tests = json.loads(answer.read_text()) if answer.exists() else {}
        failing = [test for test, found in tests.items() if not found["passed"]]
        left_out = f"; left out: {', '.join(failing)}" if failing else ""
        print(f"recorded {place}/{len(wanted)}: {name}, {len(tests)} tests, {seconds} s{left_out}", flush=True)
        if tests or name not in known:
            known[name] = {"sha256": prints[name], "seconds": seconds, "tests": tests}
        chosen.map.parent.mkdir(parents=True, exist_ok=True)
        scratch = chosen.map.with_suffix(".new")
        scratch.write_text(json.dumps(known))
        scratch.replace(chosen.map)
    return {
        test: {**found, "file": name}
        for name in files
        for test, found in known[name]["tests"].items()
        if found["passed"]
    }


def _record_file(tree: Path, name: str, folder: Path, answer: Path) -> None:
    recorder = Recorder(folder)
    run_pytest(tree, [name, "-m", QUICK], recorder)
    answer.write_text(json.dumps(recorder.tests))


def run_pytest(tree: Path, arguments: list[str], plugin: object, *, compiled: bool = False) -> int:
    """Run pytest in this process (a forked one) on the copy of the tree, as if started there."""
    import pytest

    ours = str(REPOSITORY)
    for name, module in list(sys.modules.items()):
        if name != "__main__" and (getattr(module, "__file__", None) or "").startswith(
            (f"{ours}/tests", f"{ours}/{PACKAGE}")
        ):
            del sys.modules[name]
    sys.path[:] = [str(tree), *(path for path in sys.path if not path.startswith(f"{ours}/") or ".venv" in path)]
    os.environ["PYTHONPATH"] = str(tree)
    # A mutant may have the size and the second of the file it replaces: no compiled file must outlive it.
    if not compiled:
        os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = not compiled
    os.chdir(tree)
    base = tree.parent / "pytest"
    return pytest.main(
        [*arguments, *plugin.options, "-q", "-p", "no:cacheprovider", f"--basetemp={base}"], plugins=[plugin]
    )


def fork(work: Callable[[], object], folder: Path, seconds: float) -> bool:
    """Do the work in a forked process, its output in a file; False when its time was up. Nothing it began lives on."""
    run = f"{os.getpid()}-{time.monotonic_ns()}"
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.environ[MARK] = run
            output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            work()
            code = 0
        finally:
            os._exit(code)
    try:
        deadline = time.monotonic() + seconds
        while not os.waitpid(child, os.WNOHANG)[0]:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return False
            time.sleep(0.02)
        return True
    finally:
        for process in _marked(run):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        shutil.rmtree(folder / "pytest", ignore_errors=True)


def _marked(run: str) -> Iterator[int]:
    """Yield the processes that a run left behind: they have its mark in their environment."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if f"{MARK}={run}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def sample(folder: Path, tree: Path, tests: dict[str, dict], chosen: argparse.Namespace) -> list[dict]:
    from faults.mutants import choose_mutants

    code = sources(tree)
    # Once with compiled files written, pytest's own of the tests too: what each mutant loads is then ready.
    fork(
        lambda: run_pytest(tree, ["--collect-only", "-m", QUICK], Chooser([], folder / "none"), compiled=True),
        folder,
        600,
    )
    wanted = chosen.modules.split(",") if chosen.modules else list(code)
    earlier = json.loads(chosen.out.read_text()) if chosen.out and chosen.out.exists() else []
    done = {_key(outcome): outcome for outcome in earlier}
    outcomes = []
    for module, mutant in choose_mutants(code, chosen.count, chosen.seed):
        if module not in wanted:
            continue
        outcome = {"module": module, **asdict(mutant)}
        known = done.get(_key(outcome))
        if known and not (chosen.again and known["killed_by"] is None):
            outcomes.append(known)
            continue
        path = tree / PACKAGE / f"{module}.py"
        path.write_text(mutant.put_into(code[module]), encoding="utf-8")
        compiled = list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))
        for file in compiled:
            file.unlink()
        started = time.monotonic()
        outcome |= try_mutant(folder, tree, tests, module, mutant.block, chosen.seconds)
        outcome["seconds"] = round(time.monotonic() - started, 1)
        path.write_text(code[module], encoding="utf-8")
        outcomes.append(outcome)
        print(f"{len(outcomes):3} {_line(outcome)}", flush=True)
        if chosen.out:
            rest = [known for key, known in done.items() if key not in {_key(outcome) for outcome in outcomes}]
            chosen.out.write_text(json.dumps(outcomes + rest, indent=1))
    return outcomes


def _key(outcome: dict) -> tuple:
    return tuple(outcome[name] for name in ("module", "block", "kind", "start", "before", "after"))


def _line(outcome: dict) -> str:
    before, after = (" ".join(outcome[name].split())[:70] for name in ("before", "after"))
    change = f"{outcome['module']}:{outcome['line']} {outcome['kind']}: {before} -> {after}"
    found = f"noticed by {outcome['killed_by']}" if outcome["killed_by"] else "SURVIVED"
    return f"{change} | {found} ({outcome['ran']} of {outcome['of']} tests, {outcome['seconds']} s)"


def try_mutant(folder: Path, tree: Path, tests: dict[str, dict], module: str, block: str, seconds: float) -> dict:
    """Run the tests that reach the block: first the quickest of the files nearest to it, then the rest."""
    names, reached = reaching(tests, module, block)
    nearest = [name for name, _ in Counter(tests[test]["file"] for test in names).most_common(3)]
    first, spent = [], 0.0
    for test in names:
        if tests[test]["file"] in nearest and spent + tests[test]["seconds"] < 4:
            first.append(test)
            spent += tests[test]["seconds"]
    rest = []
    for test in names:
        if test not in set(first) and spent + tests[test]["seconds"] <= seconds:
            rest.append(test)
            spent += tests[test]["seconds"]
    ran = 0
    for batch in filter(None, (first, rest)):
        killer = run_tests(folder, tree, tests, batch)
        ran += len(batch)
        if killer:
            return {"killed_by": killer, "ran": ran, "of": len(names), "reached": reached}
    return {"killed_by": None, "ran": ran, "of": len(names), "reached": reached}


def reaching(tests: dict[str, dict], module: str, block: str) -> tuple[list[str], str]:
    """Return the tests that reach a block, quickest first; where none is known, those of its function or module.

    What stands outside functions is reached when the module is loaded: it gets all tests of files that use the module.
    """
    function = block.split("#")[0]
    if not block:
        start = f"{module}|"
        files = {test["file"] for test in tests.values() if any(name.startswith(start) for name in test["blocks"])}
        found = [name for name, test in tests.items() if test["file"] in files]
        return sorted(found, key=lambda name: tests[name]["seconds"]), "module"
    reach = {
        "block": lambda name: name == f"{module}|{block}",
        "function": lambda name: function and name.startswith(f"{module}|{function}#"),
        "module": lambda name: name.startswith(f"{module}|"),
    }
    for what, matches in reach.items():
        found = [name for name, test in tests.items() if any(matches(block) for block in test["blocks"])]
        if found:
            return sorted(found, key=lambda name: tests[name]["seconds"]), what
    return [], "nothing"


def run_tests(folder: Path, tree: Path, tests: dict[str, dict], names: list[str]) -> str | None:
    """Return what noticed: the first test that fails, or that the run died or did not end."""
    answer = folder / "killer.txt"
    answer.unlink(missing_ok=True)
    ended = folder / "ended.txt"
    ended.unlink(missing_ok=True)
    files = list(dict.fromkeys(tests[name]["file"] for name in names))
    expected = sum(tests[name]["seconds"] for name in names)

    def work() -> None:
        code = run_pytest(tree, files, Chooser(names, answer))
        ended.write_text(str(int(code)))

    in_time = fork(work, folder, seconds=45 + 5 * expected)
    if answer.exists():
        return answer.read_text()
    if not in_time:
        return "a time-out"
    return None if ended.exists() and ended.read_text() in ("0", "5") else "the end of the test run"


def verify(folder: Path, tree: Path, outcomes: list[dict]) -> set[str]:
    """Run every test that noticed something once more, on the code without a fault; return those that fail there."""
    left = sorted({outcome["killed_by"] for outcome in outcomes if "::" in (outcome["killed_by"] or "")})
    tests = {name: {"file": name.split("::")[0], "seconds": 3.0} for name in left}
    doubtful = set()
    while left and (killer := run_tests(folder, tree, tests, left)):
        print(f"fails without a fault: {killer}", flush=True)
        doubtful.add(killer)
        if killer not in left:
            break
        left.remove(killer)
    return doubtful


def report(outcomes: list[dict], doubtful: set[str]) -> None:
    print("\n| module | mutants | noticed | not noticed |\n|---|---:|---:|---:|")
    noticed = {_key(outcome) for outcome in outcomes if outcome["killed_by"] and outcome["killed_by"] not in doubtful}
    for module in MODULES:
        of_it = [outcome for outcome in outcomes if outcome["module"] == module]
        if of_it:
            killed = sum(_key(outcome) in noticed for outcome in of_it)
            print(f"| {module} | {len(of_it)} | {killed} | {len(of_it) - killed} |")
    print(f"| all | {len(outcomes)} | {len(noticed)} | {len(outcomes) - len(noticed)} |\n")
    for outcome in outcomes:
        if _key(outcome) not in noticed:
            print(_line(outcome))


if __name__ == "__main__":
    sys.exit(main())
