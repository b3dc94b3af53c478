"""Transcribe over several processes and machines with Ray: one model per GPU or per n cores, files claimed in blocks.

Ray starts the workers, here or on a cluster, and starts those again that are lost. What is read, noted and written is
what `transcribe` does in one process: a block that comes a second time finds what its first try noted, and every
file has one name and is whole or not there.
"""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any

from fastsd_helpers import errors
from fastsd_helpers.errors import DatasetError, FastSDError, SettingsError, needs_package
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.exports.formats import require_formats
from fastsd_helpers.trocr.pages.inputs import PICTURE_SUFFIXES, list_files
from fastsd_helpers.trocr.pages.page_reader import open_detector
from fastsd_helpers.trocr.reading.reader import Reader
from fastsd_helpers.trocr.reading.results import is_remote, open_results, remote_errors, remote_filesystem
from fastsd_helpers.trocr.reading.transcription import (
    ToRead,
    TranscribeConfig,
    Transcribed,
    begin_run,
    name_inputs,
    read_inputs,
)
from fastsd_helpers.wording import natural_order

__all__ = ["ClusterConfig", "transcribe_on_ray"]

_MOST_IN_A_BLOCK = 64
_CORES_EACH = 4  # without a GPU, where nobody says how many
_BLOCKS_EACH = 8  # at least, for a worker: the last ones to finish wait for little
_RETRIES = 2  # of a block whose worker was lost; then its files are read one by one
_STORE_BYTES = 100 * 2**20  # Ray's shared memory on this machine: names and counts alone go through it
_HINT = "Run: pip install 'ray>=2.40' on every machine, or leave out --engine."


@dataclass(frozen=True)
class ClusterConfig:
    """Where and with how many workers to read: `address` of a cluster (None: this machine); 0 means as many as fit."""

    address: str | None = None
    workers: int = 0
    cores: int = 0  # of each


@dataclass(frozen=True)
class _Job:
    """What a worker is told once."""

    model: str
    settings: dict[str, Any]  # of ReadConfig
    out: str
    config: TranscribeConfig


_Block = list[tuple[str, str, str]]  # path or address, name, stem of the results


def transcribe_on_ray(
    model: str,
    settings: dict[str, Any],
    sources: list[str],
    out: Path | str,
    config: TranscribeConfig | None = None,
    cluster: ClusterConfig | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Transcribed:
    """Do what `transcribe` does with many workers; call it again to go on.

    Args:
        model: key, folder or Hub id, which every worker opens: a folder must be there on every machine.
        settings: those of ReadConfig.
        sources: paths, or addresses of fsspec's (s3://...), that every machine can open.
        out: a path or an address that every machine can write to.
        progress: called with the number of pages read, after each block.

    Raises:
        DependencyMissing: ray is not installed.
        SettingsError: no worker fits.
        FastSDError: as `transcribe`.
    """
    config, cluster = config or TranscribeConfig(), cluster or ClusterConfig()
    require_formats(config.formats)
    with needs_package("--engine ray", _HINT):
        import ray
    inputs = _list_inputs(sources, out)
    job = _Job(model, settings, str(out), config)
    with _connected(ray, cluster.address):
        workers = _start(ray, job, cluster, len(inputs))
        total = _Total(Transcribed(out if is_remote(out) else Path(out)), progress)
        lost = _read_all(ray, workers, _blocks(inputs, len(workers)), total)
        # One file may have ended the worker of all others in its block: for want of memory, say.
        for ((_place, name, _stem),) in _read_all(ray, workers, [[one] for block in lost for one in block], total):
            total.done.problems.append(f"{name} was not read: its worker ended each time, as if out of memory.")
            logger.warning("%s", total.done.problems[-1])
    return total.done


def _list_inputs(sources: list[str], out: Path | str) -> _Block:
    found: list[tuple[Path, str]] = []
    places: dict[tuple[Path, str], str] = {}
    for source in sources:
        for place, name in _files_at(source, out):
            # The path stands for the place among the others: its name and ending are the same.
            key = (Path(str(len(places)), PurePosixPath(place).name), name)
            places[key] = place
            found.append(key)
    if not found:
        raise DatasetError(f"There is no image in {', '.join(sources)}.", "Name another folder.")
    return [(places[item.path, item.name], item.name, item.stem) for item in name_inputs(found)]


def _files_at(source: str, out: Path | str) -> Iterator[tuple[str, str]]:
    """The files of a path or address, and their names in it."""
    if is_remote(source):
        system, root = remote_filesystem(source)
        with remote_errors(source):
            if system.isfile(root):
                yield source, PurePosixPath(root).name
                return
            there = [str(path) for path in system.find(root)]
        under = remote_filesystem(str(out))[1] if is_remote(out) else None
        names = [path.removeprefix(root).lstrip("/") for path in there if under is None or not _within(path, under)]
        wanted = [name for name in names if name.lower().endswith((*PICTURE_SUFFIXES, ".pdf")) and not _hidden(name)]
        for name in sorted(wanted, key=lambda name: ([natural_order(part) for part in name.split("/")], name)):
            yield f"{source.rstrip('/')}/{name}", name
        return
    path = Path(source).expanduser().absolute()
    if path.is_dir():
        for name in list_files(path, leave_out=None if is_remote(out) else Path(out)):
            yield str(path / name), name
    elif path.is_file():
        yield str(path), path.name
    else:
        raise DatasetError(f"There is no file or folder {path}.", "Check the path; it must be there on every machine.")


def _within(path: str, folder: str) -> bool:
    return path.startswith(f"{folder}/")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _blocks(inputs: _Block, workers: int) -> list[_Block]:
    size = min(_MOST_IN_A_BLOCK, max(1, len(inputs) // (_BLOCKS_EACH * workers)))
    return [inputs[first : first + size] for first in range(0, len(inputs), size)]


# ------------------------------------------------------------------------------------------------------- the cluster


@contextlib.contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """Connect to the cluster, or start one on this machine that goes with this block; one that is connected stays."""
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to Ray's makers
    here: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "object_store_memory": _STORE_BYTES}
    try:
        ray.init(
            address=address or "local", include_dashboard=None if address else False, log_to_driver=False,
            logging_level="ERROR", **({} if address else here),
        )  # fmt: skip
    except Exception as err:  # it has no error of its own for a cluster that does not start
        why = " ".join(str(err).split())[:300].rstrip(".")
        hint = "Start the cluster first, as Ray's guide says, or leave out --address to read on this machine."
        hint = hint if address else "Run it again when the machine is less busy, or leave out --engine."
        raise SettingsError(f"The Ray cluster at {address or 'this machine'} does not answer: {why}.", hint) from err
    try:
        yield
    finally:
        ray.shutdown()


def _start(ray: Any, job: _Job, cluster: ClusterConfig, inputs: int) -> list[Any]:
    """The workers, each with its model loaded.

    Raises:
        FastSDError: what the first of them met.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, each, fit = _share(machines, cluster)
    count = min(cluster.workers or fit, max(1, inputs))
    if not 0 < count <= fit:
        has = ", ".join(f"{int(one.get('CPU', 0))} cores and {int(one.get('GPU', 0))} GPUs" for one in machines[:8])
        problem = f"{count or 'No'} workers of {each} cores do not fit: the machines have {has}."
        raise SettingsError(problem, "Ask for fewer workers, or fewer cores of each.")
    needs = {"num_gpus": 1, "num_cpus": each} if gpus else {"num_cpus": each}
    kind = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **needs)(_Worker)
    workers = [kind.remote(job) for _ in range(count)]
    told = ray.get([worker.problem.remote() for worker in workers])
    for problem in filter(None, told):
        raise _error_of(problem)
    logger.info("%d workers on Ray, %s%d cores each.", count, "a GPU and " if gpus else "", each)
    return workers


def _share(machines: list[dict[str, float]], cluster: ClusterConfig) -> tuple[bool, int, int]:
    """Whether workers get a GPU, how many cores each gets, and how many workers fit: none is on two machines.

    Finding a page's lines is the cores' work beside a GPU too, so all of them are divided among its machine's GPUs.
    """
    with_gpu = [one for one in machines if one.get("GPU", 0) >= 1]
    cores = [int(one.get("CPU", 0)) for one in with_gpu or machines]
    beside = [int(one.get("CPU", 0) // one["GPU"]) for one in with_gpu]
    wanted = sum(cores) // cluster.workers if cluster.workers else _CORES_EACH
    each = max(1, cluster.cores or (min(beside) if with_gpu else min(max(cores, default=1), wanted)))
    gpus = [int(one["GPU"]) for one in with_gpu] or cores
    return bool(with_gpu), each, sum(min(most, have // each) for most, have in zip(gpus, cores, strict=True))


def _read_all(ray: Any, workers: list[Any], blocks: list[_Block], total: "_Total") -> list[_Block]:
    """Give every worker a block as soon as it is free; returns those whose workers were lost again and again."""
    idle, waiting, lost = list(workers), list(reversed(blocks)), []
    running: dict[Any, tuple[Any, _Block]] = {}
    while waiting or running:
        while waiting and idle:
            worker, block = idle.pop(), waiting.pop()
            running[worker.read.remote(block)] = worker, block
        (ready, *_more), _rest = ray.wait(list(running))
        worker, block = running.pop(ready)
        idle.append(worker)
        try:
            found = ray.get(ready)
        except ray.exceptions.RayActorError:
            lost.append(block)
            continue
        if isinstance(found, dict):
            raise _error_of(found)
        total.add(found)
    return lost


class _Total:
    """What all blocks together did."""

    def __init__(self, done: Transcribed, progress: Callable[[int], None] | None) -> None:
        self.done, self._progress = done, progress

    def add(self, block: Transcribed) -> None:
        """Add what a block did."""
        for item in fields(Transcribed):
            if item.name != "folder":
                setattr(self.done, item.name, getattr(self.done, item.name) + getattr(block, item.name))
        if self._progress:
            self._progress(self.done.read_now)


# -------------------------------------------------------------------------------------------------------- the worker


class _Worker:
    """One process of Ray's with a model, which reads blocks of files."""

    def __init__(self, job: _Job) -> None:
        self._job, self._problem = job, None
        self._detector = functools.cache(open_detector)  # once for all blocks
        try:
            self._reader = Reader(job.model, **job.settings)
            self._results = open_results(job.out)
            begin_run(self._results, self._reader, job.config)
            if job.config.pages == "pages":  # else only when there is one
                self._detector()
        except FastSDError as err:
            self._problem = _told(err)

    def problem(self) -> dict[str, str] | None:
        """Why it cannot read; None when it can."""
        return self._problem

    def read(self, block: _Block) -> Transcribed | dict[str, str]:
        """Read the files of a block and write their results; an error as a table, as classes need not be known."""
        if self._problem:
            return self._problem
        try:
            with tempfile.TemporaryDirectory(prefix="fastsd-block-") as folder:
                inputs, problems = _fetched(block, Path(folder))
                done = read_inputs(self._reader, inputs, self._results, self._job.config, detector=self._detector)
            done.problems += problems
            return done
        except FastSDError as err:
            return _told(err)


def _fetched(block: _Block, folder: Path) -> tuple[list[ToRead], list[str]]:
    """The files of a block on this machine; those of an address are copied into a folder, with their times."""
    found, problems = [], []
    for number, (place, name, stem) in enumerate(block):
        path = Path(place)
        if is_remote(place):
            try:
                path = folder / str(number) / PurePosixPath(place).name
                path.parent.mkdir()
                system, there = remote_filesystem(place)
                with remote_errors(place):
                    system.get_file(there, str(path))
                    changed = _changed(system.info(there))
                    os.utime(path, (changed, changed))
            except FastSDError as err:
                problems.append(err.problem)
                continue
        found.append(ToRead(path, name, stem))
    return found, problems


def _changed(about: dict[str, Any]) -> int:
    """When a file was last changed, in seconds since 1970; 0 where its place does not say."""
    for key in ("mtime", "LastModified", "last_modified", "updated", "created"):
        value = about.get(key)
        if value is not None:
            with contextlib.suppress(TypeError, ValueError):
                return int(value.timestamp() if hasattr(value, "timestamp") else float(value))
    return 0


def _told(err: FastSDError) -> dict[str, str]:
    return {"kind": type(err).__name__, "problem": err.problem, "hint": err.hint}


def _error_of(told: dict[str, str]) -> FastSDError:
    kind: type[FastSDError] = getattr(errors, told["kind"], FastSDError)
    return kind(told["problem"], told["hint"])
