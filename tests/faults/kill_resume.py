"""Kill a training at an exact place, lose what its mount had not delivered, go on elsewhere, and compare the weights.

Every run, killed or resuming, is a process of its own with a scratch folder of its own. To spare 40 times the import
of torch they are forked from a server process (multiprocessing's forkserver) that has imported the libraries and this
package and done nothing else: it runs one thread and has passed no fault point, which every run checks first; each run
has random seeds of its own, as new interpreters have.
The command line in a new interpreter, which draws the images too, gives the same weights; a test compares the two.
Forked runs leave the images blank and draw no loss plot: both take time and go into no weight.

The mount is tests/fakes.py's WriteBackMount: the killed run's own view of it is thrown away, and the next process gets
a new view with what had been delivered, cut short or changed by then.
"""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreambooth_runs import build_base
from fakes import WriteBackMount
from forked import TRAINING
from trash_mount import Drive, TrashMount, live_on

from faults.fingerprints import fingerprint

__all__ = [
    "SESSION",
    "SETTINGS",
    "VARIANTS",
    "Moment",
    "Outcome",
    "Place",
    "Run",
    "World",
    "choose_drive_moments",
    "choose_moments",
    "count_passings",
    "draw_in_one_step",
    "kill_and_resume",
    "make_world",
    "train_in_new_interpreter",
]

SESSION = "robot"
SETTINGS: dict[str, Any] = {
    "text_encoder_steps": 12,
    "unet_steps": 14,
    "save_every": 3,
    "sample_every": 0,
    "resolution": 64,
    "batch_size": 1,
    # Steps large enough that a lost, repeated or differently drawn one cannot round to the same weights.
    "text_encoder_lr": 1e-3,
    "unet_lr": 1e-3,
    "precision": "fp32",
    "seed": 5,
}
# Ways to train: the base model's family, and the settings that differ.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sd15", {}),
    "lora": ("sd15", {"method": "lora", "lora_rank": 4, "lora_alpha": 2.0}),
    "sd21": ("sd21-768", {}),
    "sdxl": ("sdxl", {"lora_rank": 4, "lora_alpha": 2.0, "method": "lora"}),
    "sdxl-full": ("sdxl", {"method": "full", "precision": "bf16"}),
    "buckets": ("sd15", {"resolutions": "64,128"}),
    "prior": ("sd15", {"class_prompt": "a robot", "class_images": 4, "min_snr": 5.0}),
    # Half the steps, each stage still into its second pass over the four images.
    "short": ("sd15", {"text_encoder_steps": 6, "unet_steps": 8, "save_every": 2}),
}
_SHAPES = ((96, 96), (64, 160), (160, 64))
# One thread each: a process must not be forked from one whose threads have started.
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
# With ours, so that an edit while runs go on changes none of them.
_PRELOADED = [*TRAINING, "faults.kill_resume"]
_TESTS = Path(__file__).resolve().parents[1]
_LIMIT_S = 600
SMALL_MARGIN = 2**19  # of the room on a small Drive, in bytes: logs and pictures
# How often the mount delivers some of what waits: a run of about 5 s loses nothing, a little or most of its files.
_DELIVERY_S = (0.03, 0.3, 1.0)
# How long a checkpoint must have been whole before older ones go: as on Drive, where nothing goes in so short a run,
# or a few deliveries of this mount, so that old ones really go.
_SETTLE_S = (120.0, 1.0)

# Fault points and how many of 40 moments are at them.
_QUOTAS = (
    (("step.text_encoder",), 10),
    (("step.unet",), 10),
    (("checkpoint.begin", "checkpoint.write", "checkpoint.fsync", "checkpoint.hash"), 6),
    (("copy.begin", "copy.half", "copy.before_rename", "copy.before_manifest", "copy.after_manifest"), 6),
    (("prune",), 1),
    (("session.write",), 1),
    (("session.after_rename",), 1),
    (("finish.begin",), 1),
    (("export.tensor",), 2),
    (("export.rename",), 1),
    (("export.written",), 1),
)


# --------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True)
class World:
    """What all runs share: a base model and a session with prepared images, nothing trained yet."""

    base: Path
    prepared: Path  # a sessions root
    own: dict[str, Any] = field(default_factory=dict)  # settings that differ from SETTINGS

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of its runs."""
        return {**SETTINGS, "base_model": str(self.base), **self.own}


def make_world(folder: Path, variant: str = "full") -> World:
    """Make a small base model with random weights, and a session of 4 + 2 drawn images; see VARIANTS."""
    import numpy as np
    from demo_pictures import BACKGROUNDS, PLACES, draw_subject, subject_caption

    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare
    from fastsd_helpers.sessions import Session

    family, settings = VARIANTS[variant]
    shapes = "resolutions" in settings  # photos of several shapes, prepared whole
    base = build_base(folder / "base", family)
    generator = np.random.default_rng(11)
    for index in range(6):
        photos = folder / ("photos" if index < 4 else "held_out")
        photos.mkdir(exist_ok=True)
        place, background = list(PLACES)[index % 5], list(BACKGROUNDS)[index]
        picture = draw_subject(SESSION, place, background, generator)
        if shapes:
            picture = picture.resize(_SHAPES[index % len(_SHAPES)])
        picture.save(photos / f"{index}.png")
        (photos / f"{index}.txt").write_text(subject_caption(SESSION, place, background), encoding="utf-8")
    prepared = folder / "prepared"
    session = Session.create(SESSION, root=prepared)
    crop = {"crop": "none"} if shapes else {}
    prepare(PrepareConfig(images=str(folder / "photos"), held_out=str(folder / "held_out"), size=64, **crop), session)
    return World(base, prepared, settings)


class Place:
    """Where one case happens: what the mount has delivered, and one view and scratch folder after the other.

    Args:
        folder: a new folder for this case alone.
        seed: decides what the mount delivers when, and what a crash leaves of the rest.
        delivery_s: how often the mount delivers some of what waits.
        start: a sessions root that was delivered before; left alone, the prepared one.
        drive: the quota and trash of a Google Drive; without it there is room for everything.
    """

    def __init__(
        self,
        world: World,
        folder: Path,
        *,
        seed: int,
        delivery_s: float = _DELIVERY_S[0],
        start: Path | None = None,
        drive: Drive | None = None,
    ) -> None:
        self.world, self.folder, self.seed, self.delivery_s, self.drive = world, folder, seed, delivery_s, drive
        self.cloud = folder / "cloud"
        self.number = 0
        shutil.copytree(start or world.prepared, self.cloud)
        self.mount = WriteBackMount(folder / "nobody", self.cloud, seed)
        self.move()

    def move(self) -> None:
        """Begin a machine that sees what was delivered, and nothing else."""
        self.number += 1
        self.view = self.folder / f"view-{self.number}"
        self.mount.fresh_view(self.view)
        modes = (*WriteBackMount.MODES, "flipped")
        seed = self.seed + self.number
        if self.drive is None:
            mount = WriteBackMount(self.view, self.cloud, seed, modes=modes)
        else:
            notes, trash = self.folder / f"notes-{self.number}", getattr(self.mount, "trash", 0)
            mount = TrashMount(self.view, self.cloud, seed, drive=self.drive, notes=notes, trash=trash, modes=modes)
            mount.most = getattr(self.mount, "most", 0)
            mount.refused = set(getattr(self.mount, "refused", ()))
        self.mount = mount.start(self.delivery_s)

    def crash(self) -> dict[str, str]:
        """Lose the machine; returns what became of each file that was not delivered."""
        fates = self.mount.crash()
        self.move()
        return fates

    def leave(self) -> None:
        """Disconnect after everything was delivered."""
        self.mount.stop()
        self.mount.settle()

    @property
    def session_folder(self) -> Path:
        """The session as the present machine sees it."""
        return self.view / SESSION

    def begin(self, **options: Any) -> "Run":
        """Start a training here in a process of its own; see Run."""
        scratch = self.folder / f"scratch-{self.number}-{time.monotonic_ns()}"
        return Run(self, scratch, **options)


# ------------------------------------------------------------------------------------------------- a run


class Run:
    """A training in a process of its own.

    Args:
        place: where its session is.
        scratch: its local folder, new.
        fault: `name:n`, die at the n-th passing of that fault point.
        signal_at: (stage, step, signal): send itself that signal after that step.
        settle_s: how long checkpoints must have been whole before older ones go; given, the folder counts as Drive.
        settings: settings that differ from SETTINGS.
    """

    def __init__(
        self,
        place: Place,
        scratch: Path,
        *,
        fault: str | None = None,
        signal_at: tuple[str, int, int] | None = None,
        settle_s: float | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.log = scratch.with_name(f"{scratch.name}.log")
        request = {
            "root": str(place.view),
            "scratch": str(scratch),
            "log": str(self.log),
            "fault": fault or "none:0",  # counts the passings, and stops nowhere
            "signal_at": signal_at,
            "settle_s": settle_s,
            "drive": None if place.drive is None else [str(place.mount.notes), place.drive.quota],
            "settings": {**place.world.settings, **(settings or {})},
        }
        self.process = _server().Process(target=_train, args=(request,))
        self.process.start()

    def wait(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal."""
        self.process.join(_LIMIT_S)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"The run did not end in {_LIMIT_S} s; it said: {self.said()[-5:]}")
        return self.process.exitcode

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def wait_for(self, text: str) -> None:
        """Wait until its log holds a text."""
        until = time.monotonic() + _LIMIT_S
        while not self.log.exists() or text not in self.log.read_text(encoding="utf-8"):
            if time.monotonic() > until or self.process.exitcode is not None:
                raise TimeoutError(f"{text!r} never came; it said: {self.said()[-5:]}")
            time.sleep(0.02)

    def lines(self) -> list[dict[str, Any]]:
        """What it wrote, the line excepted that a kill cut."""
        lines = []
        for line in self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines

    def said(self) -> list[str]:
        """Its sentences to the user, errors included."""
        return [line[key] for line in self.lines() for key in ("message", "error") if line.get(key)]

    def reached(self) -> str:
        """The last step it reported."""
        steps = [line for line in self.lines() if line.get("stage")]
        return f"{steps[-1]['stage']} {steps[-1]['step']}" if steps else "before step 1"

    def last(self) -> dict[str, Any]:
        """The last thing it wrote."""
        return (self.lines() or [{}])[-1]


def _server() -> Any:
    """The server that runs are forked from, started at the first call."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    wanted = {**_ONE_THREAD, "PYTHONPATH": os.pathsep.join([str(_TESTS.parent), str(_TESTS)])}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        from multiprocessing.forkserver import ensure_running

        ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def _train(request: dict[str, Any]) -> None:
    """What a run's process does."""
    log = open(request["log"], "a", encoding="utf-8")  # noqa: SIM115 - open until the process dies

    def write(**fields: Any) -> None:
        log.write(json.dumps(fields) + "\n")
        log.flush()

    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    _check_fresh(request["scratch"])
    os.fsync = lambda _handle: None  # processes are killed here and no machines, and a busy disk is slow
    os.environ["FASTSD_FAULT"], os.environ["FASTSD_SCRATCH"] = request["fault"], request["scratch"]
    from PIL import Image

    from fastsd_helpers import runtime
    from fastsd_helpers.dreambooth.results import finishing
    from fastsd_helpers.dreambooth.resume import room, store
    from fastsd_helpers.dreambooth.running import engine
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.sessions import Session

    engine.plot_losses = lambda *args, **kwargs: None
    finishing.draw_with = lambda context, vae, prompts, **options: [Image.new("RGB", (8, 8)) for _ in prompts]
    if request["settle_s"] is not None:
        store.delivers_late, store._SETTLE_S = (lambda folder: True), request["settle_s"]
    if request["drive"] is not None:
        notes, quota = request["drive"]
        live_on(Path(request["root"]), Path(notes), quota)
        room._LAG_S, sys.modules["fastsd_helpers.dreambooth.running.forecast"]._MARGIN = 2.0, SMALL_MARGIN

    def report(progress: Any) -> None:
        write(stage=progress.stage, step=progress.step, message=progress.message)
        if request["signal_at"] and [progress.stage, progress.step] == list(request["signal_at"][:2]):
            os.kill(os.getpid(), request["signal_at"][2])

    try:
        session = Session.open(SESSION, root=request["root"])
        for notice in session.notices:
            write(message=notice)
        result = engine.train(DreamBoothConfig(**request["settings"]), session, report=report)
    except FastSDError as err:
        write(kind=type(err).__name__, error=err.problem, hint=err.hint)
        sys.exit(3)
    write(result=str(result.path), first_step=result.first_step, passings=dict(runtime._passings))


def _check_fresh(scratch: str) -> None:
    """Be as good as a new interpreter, or refuse to run."""
    import numpy as np
    import torch

    from fastsd_helpers import runtime

    status = Path(f"/proc/{os.getppid()}/status").read_text(encoding="ascii")
    problems = {
        "the server has more than one thread": not re.search(r"^Threads:\s+1$", status, re.MULTILINE),
        "its scratch folder is not new": os.path.exists(scratch),
        "fault points were passed": bool(runtime._passings),
        "torch uses threads": torch.get_num_threads() != 1,
    }
    if any(problems.values()):
        raise RuntimeError(f"Not a fresh process: {', '.join(name for name in problems if problems[name])}.")
    # A new interpreter has random seeds of its own; sharing the server's would hide what depends on them.
    torch.seed()
    random.seed()
    np.random.seed()


def draw_in_one_step() -> None:
    """Let this process draw its images before and after in one denoising step."""
    from fastsd_helpers.dreambooth.training import sampling

    draw = sampling.draw_pictures
    sampling.draw_pictures = lambda *args, **options: draw(*args, **options | {"steps": 1})


def train_in_new_interpreter(place: Place) -> int:
    """Train with the command line itself, in a new interpreter; returns the exit status."""
    flags = [
        part for name, value in place.world.settings.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    scratch = place.folder / f"scratch-{place.number}"
    environment = {**os.environ, **_ONE_THREAD, "FASTSD_SCRATCH": str(scratch)}
    environment["PYTHONPATH"] = os.pathsep.join([str(_TESTS.parent), str(_TESTS)])
    start = "import sys; from faults.kill_resume import draw_in_one_step; from fastsd_helpers.cli import main; "
    start += "draw_in_one_step(); sys.exit(main())"
    command = [sys.executable, "-c", start, "dreambooth", "train", SESSION, "--root", str(place.view)]
    with open(f"{scratch}.log", "wb") as log:
        return subprocess.run(
            [*command, *flags], env=environment, stdout=log, stderr=log, timeout=_LIMIT_S, check=False
        ).returncode


# ---------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class Moment:
    """Where a run is killed, and the seed of what its mount delivers and loses."""

    fault: str  # name:n
    seed: int
    settle_s: float
    delivery_s: float

    @property
    def point(self) -> str:
        return self.fault.partition(":")[0]


@dataclass
class Outcome:
    """What became of a run that was killed."""

    moment: Moment
    reached: str = ""
    lost: str = ""  # of the files that were on their way when the machine went
    resumed_from: str = ""
    passed_over: list[str] = field(default_factory=list)
    equal: bool = False
    seconds: float = 0.0
    problem: str = ""
    most: int = 0  # bytes that counted on the Drive at the same time
    trash: int = 0
    poor: str = ""  # what a Drive had no room for

    def note_drive(self, mount: TrashMount) -> None:
        """Take over what a Drive counted; more than its quota is a problem."""
        self.most, self.trash = mount.most, mount.trash + mount.emptied_by_hand
        if mount.refused or mount.most > mount.drive.quota:
            self.equal, self.problem = False, f"over the room: {sorted(mount.refused)} {self.problem}"

    def row(self, number: int) -> str:
        """A line of the table."""
        sentences = " ".join(_without_suffix(sentence) for sentence in self.passed_over) or "-"
        verdict = "yes" if self.equal else f"NO: {self.problem}"
        return (
            f"| {number} | `{self.moment.fault}` | {self.reached} | {self.lost} | {self.resumed_from} "
            f"| {sentences} | {verdict} |"
        )


def _without_suffix(sentence: str) -> str:
    return sentence.split("; resuming from")[0].split("; starting from")[0].removesuffix(".") + "."


def count_passings(world: World, folder: Path) -> tuple[dict[str, int], dict[str, str]]:
    """Run without any fault: how often each fault point is passed, and the fingerprint that all others must have."""
    place = Place(world, folder, seed=0)
    run = place.begin()
    if run.wait() != 0:
        raise AssertionError(f"The uninterrupted run failed: {run.said()[-3:]} {run.log.read_text()[-2000:]}")
    place.leave()
    return run.last()["passings"], fingerprint(place.cloud / SESSION, world.settings["unet_steps"])


def choose_drive_moments(passings: dict[str, int], *, count: int, seed: int) -> list[Moment]:
    """Choose moments by seed for a run on a Drive with a trash: half of them while old checkpoints are emptied."""
    chance = random.Random(f"drive/{seed}")
    emptying = ("prune", "emptied.before", "emptied.after", "prune.removed")
    others = (
        "step.unet",
        "checkpoint.hash",
        "copy.half",
        "copy.before_rename",
        "copy.after_manifest",
        "export.written",
    )
    chosen: list[str] = []
    while len(chosen) < count:
        point = chance.choice(emptying if len(chosen) % 2 == 0 else others)
        # What is copied and emptied how often depends on the clock; the first few are always passed.
        few = {"copy.half": 12, "copy.before_rename": 12, "copy.after_manifest": 4}
        most = few.get(point, passings.get(point, 1)) if point in others else 4
        fault = f"{point}:{chance.randint(1, most)}"
        if fault not in chosen or len(set(chosen)) > 20:
            chosen.append(fault)
    return [
        Moment(fault, seed * 1000 + index, 0.2, chance.choice((1.0, 2.0) if index % 4 == 2 else (0.03, 0.1, 0.3)))
        for index, fault in enumerate(chosen)
    ]


def choose_moments(passings: dict[str, int], *, count: int, seed: int) -> list[Moment]:
    """Choose moments by seed; any 40 of them hold at least 10 in each stage, 5 inside a save and 5 inside a copy."""
    moments: list[Moment] = []
    for batch in range(-(-count // 40)):
        chance = random.Random(f"{seed}/{batch}")
        chosen: list[str] = []
        for wanted, quota in _QUOTAS:
            points = [point for point in wanted if point in passings] or ["step.unet"]  # a LoRA's file has no such
            start = chance.randrange(len(points))
            names = [points[(start + index) % len(points)] for index in range(quota)]
            for point in dict.fromkeys(names):
                left = [number for number in range(1, passings[point] + 1) if f"{point}:{number}" not in chosen]
                passed = chance.sample(left, names.count(point))
                chosen += [f"{point}:{number}" for number in passed]
        if len(chosen) != 40 or len(set(chosen)) != 40:
            raise AssertionError(f"{len(set(chosen))} different moments instead of 40")
        if count < 40:
            chance.shuffle(chosen)
        moments += [
            Moment(fault, seed * 1000 + batch * 40 + index, chance.choice(_SETTLE_S), chance.choice(_DELIVERY_S))
            for index, fault in enumerate(chosen)
        ]
    return moments[:count]


def kill_and_resume(
    world: World,
    folder: Path,
    moment: Moment,
    expected: dict[str, str],
    *,
    start: Path | None = None,
    drive: Drive | None = None,
) -> Outcome:
    """Kill a run at a moment, lose its machine, go on in a fresh process that sees what was delivered, and compare.

    On a Drive it must also never have taken more than there is room for.

    Given `start`, a sessions root that was delivered before, the run that is killed goes on from there.
    """
    started = time.monotonic()
    outcome = Outcome(moment)
    place = Place(world, folder, seed=moment.seed, delivery_s=moment.delivery_s, start=start, drive=drive)
    first = place.begin(fault=moment.fault, settle_s=moment.settle_s)
    status = first.wait()
    outcome.reached = first.reached()
    if status == 0 and drive is not None:
        outcome.reached += " (the end: it was not passed so often)"
    elif status != -signal.SIGKILL:
        outcome.problem = f"was not killed: exit {status}, {first.said()[-1:]}"
        place.leave()
        return outcome
    fates = list(place.crash().values())
    kinds = [(kind, fates.count(kind)) for kind in ("missing", "truncated", "empty", "flipped", "whole")]
    outcome.lost = ", ".join(f"{count} {kind}" for kind, count in kinds if count) or "-"
    second = place.begin(settle_s=moment.settle_s)
    status = second.wait()
    said = second.said()
    if drive is not None and second.last().get("kind") == "DiskFull":
        # As it says: the trash is emptied, and the same session is trained again.
        outcome.poor = "the finished file, until the trash was emptied"
        place.mount.empty_trash()
        time.sleep(min(drive.lag_s, 5.0) + 0.5)  # a person comes back once the Drive reports it
        again = place.begin(settle_s=moment.settle_s)
        status, said = again.wait(), [*said, *again.said()]
    place.leave()
    outcome.passed_over = [
        sentence for sentence in said if re.match(r"session\.json|Checkpoint .*; (going on|starting) from ", sentence)
    ]
    going_on = [sentence for sentence in said if sentence.startswith(("Resuming after", "This run is finished"))]
    outcome.resumed_from = going_on[0].rstrip(".").removeprefix("Resuming after ") if going_on else "the beginning"
    if status != 0:
        outcome.problem = f"the resumed run ended with {status}: {said[-1:]}"
    else:
        # Where a Drive had no room for the last checkpoint, the run says so, and its file is what there is to compare.
        poor = drive is not None and not outcome.poor and any("was not written to" in sentence for sentence in said)
        outcome.poor = outcome.poor or ("the last checkpoint" if poor else "")
        try:
            found = fingerprint(place.cloud / SESSION, world.settings["unet_steps"], file_only=poor)
        except Exception as err:  # what was made is not there, or not whole: one case failed, the others go on
            found = {repr(err): ""}
        roles = found if poor else {*found, *expected}
        differing = sorted(role for role in roles if found.get(role) != expected.get(role))
        outcome.equal, outcome.problem = not differing, f"{', '.join(differing)} differ" if differing else ""
    if drive is not None:
        outcome.note_drive(place.mount)
    outcome.seconds = time.monotonic() - started
    return outcome
