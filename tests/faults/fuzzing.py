"""Random lives of sessions: made, prepared, captioned, trained, killed, copied, renamed, lengthened, exported, deleted.

A few sessions live in one root. After every step of a sequence it is checked that no photo, caption or checkpoint is
lost, that nothing of another session was touched, that no two folders have one identity, and that what was learned is
what a run without any kill has learned by then. What that is a few lines here compute for themselves.

Each step is a process of its own that may be killed at a fault point. Two kinds: forked from one that has imported
everything, where a few lines stand in for the networks (everything else is the real thing: records, locks, identities,
images, settings, segments, the loop, checkpoints); or the command line in a new interpreter with the demo model.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults import stand_in

__all__ = ["Failure", "Forked", "NewInterpreters", "World", "live"]

# Kind of step -> where it may be killed.
_FAULTS = {
    "prepare": [
        "session.write",
        "session.after_rename",
        "prepare.between",
        "prepare.before_record",
        "prepare.after_record",
    ],
    "train": [
        "session.write",
        "session.after_rename",
        "segment.recorded",
        "step.text_encoder",
        "step.unet",
        "step.unet",
        "checkpoint.begin",
        "checkpoint.write",
        "checkpoint.hash",
        "copy.begin",
        "copy.half",
        "copy.before_rename",
        "copy.before_manifest",
        "copy.after_manifest",
        "finish.begin",
    ],
}
_SETTINGS: dict[str, Any] = {"text_encoder_steps": 2, "unet_steps": 3, "save_every": 1, "sample_every": 0}
_KEPT = ("checkpoints", "instance_images", "held_out_images", "captions", "exports")
_PHOTOS = 6


class Failure(AssertionError):
    """A session lost or mistook something."""


@dataclass
class Known:
    """What a session must hold by now, as far as this file knows."""

    photos: dict[str, str] = field(default_factory=dict)  # source name -> words it is trained with
    segments: list[dict[str, Any]] = field(default_factory=list)
    saved: int = 0  # how many of them have a checkpoint, and stay as they are
    position: int = 0  # steps of the newest checkpoint, over all segments
    finished: bool = False

    def copy(self) -> "Known":
        return Known(dict(self.photos), json.loads(json.dumps(self.segments)), self.saved, self.position, self.finished)


class Forked:
    """Steps as forks of this process, with the stand-in for the networks."""

    checks_weights = True

    def __init__(self) -> None:
        os.environ["FASTSD_MODELS"] = os.environ.get("FASTSD_MODELS", "models")
        stand_in.put_in()

    def run(self, root: Path, words: list[Any], fault: str) -> dict[str, Any]:
        """Do one step; returns {"killed": True}, {"refused": sentence}, or what it made."""
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            with contextlib.suppress(BaseException):
                if fault:
                    os.environ["FASTSD_FAULT"] = fault
                os.write(writing, json.dumps(stand_in.step(root, *words)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            return {"killed": True}
        return json.loads(said or b'{"failed": "it ended without a word"}')


class NewInterpreters:
    """Steps as the command line, with the demo model; a LoRA of few steps."""

    checks_weights = False

    def run(self, root: Path, words: list[Any], fault: str) -> dict[str, Any]:
        """Do one step; returns {"killed": True}, {"refused": sentence}, or what it made."""
        kind, name, *rest = words
        command = [sys.executable, "-m", "fastsd_helpers", "dreambooth", kind, name, "--root", str(root), "--json"]
        if kind == "prepare":
            command += ["--images", rest[0], "--size", "64"]
        elif kind == "caption":
            command += ["--set", f"{rest[0]}={rest[1]}"]
        elif kind == "train":
            first = {"base_model": "demo", "method": "lora", "resolution": 64, "batch_size": 1, "precision": "fp32"}
            settings = (first if "unet_steps" in rest[0] else {}) | rest[0]
            command += [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        elif kind == "delete":
            command.append("--yes")
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
        if fault:
            environment["FASTSD_FAULT"] = fault
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        if done.returncode == -9:
            return {"killed": True}
        answer = json.loads(done.stdout.strip().splitlines()[-1]) if done.stdout.strip() else {}
        if done.returncode == 2:
            return {"refused": answer.get("error", "")}
        return answer if done.returncode == 0 else {"failed": f"{answer} {done.stderr[-2000:]}"}


@dataclass
class World:
    """A root with sessions, and what each must hold."""

    root: Path
    photos: Path  # the user's own, which nobody may touch
    steps: Any  # Forked or NewInterpreters
    chance: random.Random
    sessions: dict[str, Known] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)
    made: int = 0
    kills: int = 0

    def do(self, *words: Any, may_kill: bool = False) -> dict[str, Any]:
        """Do one step, perhaps killed, and check that nothing of the other sessions was touched."""
        name = words[1]
        fault = ""
        if may_kill and self.chance.random() < 0.7:
            fault = f"{self.chance.choice(_FAULTS[words[0]])}:{self.chance.randint(1, 3)}"
        self.story.append(f"{' '.join(map(str, words))} {fault}".strip())
        # A copy that is opened first of two gets its identity then, and not by the others' steps.
        before = {other: self.footprint(other) for other in self.sessions if other != name}
        answer = self.steps.run(self.root, list(words), fault)
        if "failed" in answer:
            raise Failure(answer["failed"])
        self.kills += bool(answer.get("killed"))
        for other, was in before.items():
            if self.footprint(other) != was:
                raise Failure(f"{words[0]} of {name} changed {other}")
        if _hash_folder(self.photos) != self.photos_hash:
            raise Failure("the user's own photos were changed")
        return answer

    def __post_init__(self) -> None:
        self.photos_hash = _hash_folder(self.photos)

    def footprint(self, name: str) -> dict[str, Any]:
        """What must stay as it is while another session is worked in."""
        folder = self.root / name
        return {part: _hash_folder(folder / part) for part in _KEPT} | {"id": _record(folder)["id"]}


def live(world: World, steps: int) -> None:
    """Let the sessions of a root live through a number of random steps.

    Raises:
        Failure: with what was done up to then.
    """
    try:
        for _ in range(steps):
            _choose(world)()
            _check_identities(world)
        for name in list(world.sessions):
            if world.sessions[name].photos:
                _train(world, name, may_kill=False)
    except (AssertionError, KeyError, OSError, ValueError) as err:
        told = "\n  ".join(world.story)
        raise Failure(f"{type(err).__name__}: {err}\nAfter:\n  {told}\n{traceback.format_exc(limit=4)}") from err


def _choose(world: World) -> Any:
    chance, names = world.chance, list(world.sessions)
    if not names:
        return lambda: _new(world)
    name = chance.choice(names)
    known = world.sessions[name]
    if not known.photos:
        return lambda: _prepare(world, name)
    kinds = ["train"] * 6 + ["copy"] * 2 + ["rename", "export", "new", "delete"]
    # What is begun keeps its pictures; now and then somebody changes them all the same.
    kinds += ["prepare", "caption"] * (2 if not known.position or known.finished else chance.random() < 0.2)
    kinds += ["more"] * 4 * known.finished
    kind = chance.choice(kinds)
    if kind == "train":
        return lambda: _train(world, name, may_kill=True)
    if kind == "more":
        return lambda: _more(world, name)
    return lambda: globals()[f"_{kind}"](world, name)


def _name(world: World) -> str:
    world.made += 1
    return f"{world.chance.choice(['rex', 'zoe', 'my_dog'])}{world.made}"


def _new(world: World, _name_before: str = "") -> None:
    name = _name(world)
    world.do("new", name)
    world.sessions[name] = Known()


def _prepare(world: World, name: str) -> None:
    chosen = sorted(world.chance.sample(range(_PHOTOS), world.chance.randint(2, _PHOTOS)))
    folder = world.root.parent / f"chosen-{len(world.story)}"
    folder.mkdir()
    for index in chosen:
        shutil.copy(world.photos / f"zib {'abcdef'[index]}.png", folder)
    known = world.sessions[name]
    world.do("prepare", name, str(folder), may_kill=True)
    now = _pictures(world, name)
    if set(now) == {path.name for path in folder.iterdir()}:
        known.photos = {photo: known.photos.get(photo, words) for photo, words in now.items()}
    _check_pictures(world, name)


def _caption(world: World, name: str) -> None:
    known = world.sessions[name]
    photo = world.chance.choice(sorted(known.photos))
    words = f"zib robot {len(world.story)}"
    file = next(item["file"] for item in _record(world.root / name)["dataset"]["images"] if item["source"] == photo)
    world.do("caption", name, Path(file).name, words)
    known.photos[photo] = words
    _check_pictures(world, name)


def _train(world: World, name: str, *, may_kill: bool, **more: Any) -> None:
    known = world.sessions[name]
    settings = dict(_SETTINGS) if not known.position else {}
    answer = world.do("train", name, settings | more, may_kill=may_kill)
    pictures = _trained_pictures(world, name)
    if "refused" in answer:
        changed = bool(known.segments) and known.segments[-1]["pictures"] != pictures
        early = bool(more) and not known.finished
        if not (early or (changed and not (more and known.finished))):
            raise Failure(f"train of {name} was refused: {answer['refused']}")
    elif not answer.get("killed") and known.segments and not more and known.segments[-1]["pictures"] != pictures:
        raise Failure(f"train of {name} went on with other images")
    _check_learned(world, name, pictures, finished=not answer.get("killed") and "refused" not in answer)


def _more(world: World, name: str) -> None:
    chance = world.chance
    more = {"more_steps": chance.randint(1, 3), "unet_lr": chance.choice([1e-3, 5e-4, 1e-4])}
    if chance.random() < 0.5:
        more |= {"more_text_encoder_steps": chance.randint(1, 2), "lr_scheduler": chance.choice(["linear", "cosine"])}
    before = len(world.sessions[name].segments)
    _train(world, name, may_kill=True, **more)
    for _ in range(3):  # the same command goes on with what it began
        known = world.sessions[name]
        if known.finished or len(known.segments) == before:
            return
        _train(world, name, may_kill=True, **more)
        if len(known.segments) > before + 1:
            raise Failure(f"the same command began two segments in {name}")


def _copy(world: World, name: str) -> None:
    other = _name(world)
    shutil.copytree(world.root / name, world.root / other)
    world.story.append(f"copy {name} {other}")
    world.sessions[other] = world.sessions[name].copy()
    # What is still on its way belongs to the original.
    found = _newest([world.root / other / "checkpoints"])
    copied = world.sessions[other]
    copied.position = _position(found) if found else 0
    copied.saved = len(found.record["segments"]) if found else 0
    copied.segments = copied.segments if found else []


def _rename(world: World, name: str) -> None:
    other = _name(world)
    (world.root / name).rename(world.root / other)
    world.story.append(f"rename {name} {other}")
    world.sessions[other] = world.sessions.pop(name)


def _export(world: World, name: str) -> None:
    answer = world.do("export", name)
    # What never left this machine's scratch folder the next training brings into the session, and export does not see.
    if "refused" in answer and _newest([world.root / name / "checkpoints"]):
        raise Failure(f"export of {name} was refused: {answer['refused']}")


def _delete(world: World, name: str) -> None:
    if len(world.sessions) < 2:
        return
    world.do("delete", name)
    del world.sessions[name]
    if (world.root / name).exists():
        raise Failure(f"{name} is still there")


# ------------------------------------------------------------------------------------------------------- checks


def _check_identities(world: World) -> None:
    """Opened in any order, no two folders have one identity: what one writes on this machine, no other finds."""
    names = world.chance.sample(list(world.sessions), world.chance.randint(0, len(world.sessions)))
    for name in names:
        world.do("show", name)
    ids = [_record(world.root / name)["id"] for name in names]
    if len(set(ids)) < len(ids):
        raise Failure(f"two of {', '.join(names)} have one identity")


def _check_pictures(world: World, name: str) -> None:
    found = _pictures(world, name)
    if found != world.sessions[name].photos:
        raise Failure(f"the images of {name} are {found} and should be {world.sessions[name].photos}")


def _check_learned(world: World, name: str, pictures: list[list[str]], *, finished: bool) -> None:
    known, folder = world.sessions[name], world.root / name
    found = _newest([folder / "checkpoints", *_scratch_of(folder)])
    position = _position(found) if found else 0
    if position < known.position:
        raise Failure(f"{name} is at step {position}, and was at {known.position}")
    known.position = position
    if found is None:
        return
    # The session also knows of a segment that was cut before its first checkpoint.
    begun = _record(folder).get("segments", [])
    saved = found.record["segments"]
    segments = begun if len(begun) > len(saved) else saved
    for index, segment in enumerate(segments):
        before = known.segments[index] if index < min(len(known.segments), known.saved) else None
        if before is not None and {**before, "given": 0} != {**segment, "given": 0}:
            raise Failure(f"segment {index} of {name} is another one now")
        if before is None and index >= len(known.segments) and segment["pictures"] != pictures:
            raise Failure(f"segment {index} of {name} was begun with other images than it had")
    if len(segments) < len(known.segments):
        raise Failure(f"a segment of {name} is gone")
    known.segments, known.saved, total = segments, len(saved), stand_in.steps_of(segments)
    # One that was killed after its result was recorded had done all that it was asked for, though it did not say so.
    recorded = (_record(folder).get("result") or {}).get("more") == len(segments) - 1
    known.finished = position == total and (finished or recorded)
    if finished and position != total:
        raise Failure(f"{name} says it is finished at step {position} of {total}")
    if world.steps.checks_weights:
        expected = stand_in.uninterrupted(saved, position)
        for stage, weights in expected.items():
            if found.load(stage)["w"].tolist() != weights:
                raise Failure(f"{stage} of {name} at step {position} is not what a run without a kill has learned")


def _newest(folders: list[Path]) -> Any:
    """The newest whole checkpoint of a session, wherever it lies on this machine."""
    from fastsd_helpers.dreambooth.resume.generation import NotWhole, list_generations, read_generation, verify_files

    names = sorted({name for folder in folders if folder.is_dir() for name in list_generations(folder)}, reverse=True)
    for name in names:
        with contextlib.suppress(NotWhole):
            found = read_generation(folders[0], name, scratch=folders[1] if len(folders) > 1 else None)
            verify_files(found)
            return found
    return None


def _position(found: Any) -> int:
    return stand_in.position_of(found.record["segments"], found.record["segment"], found.stage, found.step)


def _scratch_of(folder: Path) -> list[Path]:
    path = Path(os.environ["FASTSD_SCRATCH"]) / _record(folder)["id"]
    return [path] if path.is_dir() else []


def _record(folder: Path) -> dict[str, Any]:
    from fastsd_helpers.sessions.record import read_record

    return read_record(folder).record


def _dataset(world: World, name: str) -> Any:
    from fastsd_helpers.dreambooth.dataset.prepared import load_dataset
    from fastsd_helpers.sessions import Session

    folder = world.root / name
    session = Session(folder, _record(folder))
    return session, load_dataset(session)


def _pictures(world: World, name: str) -> dict[str, str]:
    """Source name -> exact prompt of every prepared image; each is there and as it was."""
    if not (_record(world.root / name)["dataset"] or {}).get("images"):
        return {}
    session, dataset = _dataset(world, name)
    prompts = {image.sha256: image.prompt for image in (*dataset.train, *dataset.held_out)}
    return {item["source"]: prompts[item["sha256"]] for item in session.record["dataset"]["images"]}


def _trained_pictures(world: World, name: str) -> list[list[str]]:
    _session, dataset = _dataset(world, name)
    return [[image.sha256, image.prompt] for image in (*dataset.train, *dataset.held_out)]


def _hash_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")) if folder.is_dir() else ():
        if path.is_file():
            digest.update(f"{path.relative_to(folder)} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()
