"""A training on several processes gives the bits of one process, resumes with any number of them, and says who died."""

import json
import os
import shutil
import signal
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dreambooth_runs import build_base, config_for, learned, make_session, same
from forked import START_TOGETHER, TRAINING, ForkServer, free_port

from fastsd_helpers import launching
from fastsd_helpers.dreambooth import train
from fastsd_helpers.dreambooth.running import processes
from fastsd_helpers.dreambooth.running.following import follow
from fastsd_helpers.dreambooth.running.processes import choose_processes
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.processes import LOST, Ranks
from fastsd_helpers.sessions import Session, local_holder

pytest.importorskip("accelerate")

_START_TOGETHER = (
    "import types; from dreambooth_runs import draw_quickly; "
    + "draw_quickly(types.SimpleNamespace(setattr=setattr), blank=False)"
    + START_TOGETHER
)
_QUICK = (
    "sample_every=0",
    "save_every=2",
    "resolution=64",
    "unet_steps=3",
    "text_encoder_steps=2",
    "precision=fp32",
    "batch_size=1",
)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a session with prepared images."""
    folder = tmp_path_factory.mktemp("several")
    build_base(folder / "base")
    make_session(folder, photos=3, held_out=1)
    return folder


class Runner:
    """Trains copies of one session on several processes."""

    def __init__(self, forks: ForkServer, ground: Path, folder: Path) -> None:
        self._forks, self._ground, self._folder = forks, ground, folder

    def session(self, name: str) -> Session:
        """A copy of the session by that name, made when it is first asked for."""
        root = self._folder / name
        if not root.exists():
            shutil.copytree(self._ground / "sessions", root)
        return Session.open("robot", root=root)

    def train(self, name: str, *words: str, count: int = 1, fault: str = "") -> tuple[int, dict[str, Any], str]:
        """Train on; returns the exit code, the first process's answer, and what all of them said."""
        session = self.session(name)
        flags = [f"--{word.replace('_', '-')}" for word in (*_QUICK, *words)]
        command = ["dreambooth", "train", "robot", f"--root={session.folder.parent}", "--json", *flags]
        command += ["--batch-size=1", f"--base-model={self._ground / 'base'}"]
        out = self._folder / f"{name}.out"
        env = dict(os.environ) | {"FASTSD_FAULT": fault, "OMP_NUM_THREADS": "1"}
        env |= {"FASTSD_SCRATCH": str(self._folder / "scratch" / name)}
        ended = self._forks.run(
            [
                "-c",
                _START_TOGETHER,
                str(count),
                str(free_port()),
                str(out),
                *command,
                f"--base-model={self._ground / 'base'}",
            ],
            env=env,
        )
        lines = Path(f"{out}.0").read_text(encoding="utf-8").splitlines()
        return ended.returncode, json.loads(lines[-1]) if lines else {}, ended.stderr


@pytest.fixture(scope="module")
def runner(forks: Callable[..., ForkServer], ground: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(forks(*TRAINING), ground, tmp_path_factory.mktemp("runs"))


def test_two_processes_make_the_weights_of_accumulation_two_bit_for_bit(runner: Runner) -> None:
    _code, one, _said = runner.train("one", "accumulation=2")
    code, two, said = runner.train("two", count=2)
    assert code == 0, said
    assert same(learned(runner.session("two")), learned(runner.session("one")))
    assert (one["loss_before"], one["loss_after"]) == (two["loss_before"], two["loss_after"])
    assert runner.session("two").record["settings"]["processes"] == 2


def test_three_processes_make_a_lora_and_class_images_as_one_makes_them(runner: Runner) -> None:
    words = ["method=lora", "class_prompt=a robot", "class_images=5", "gradient_checkpointing", "ema=0.9"]
    words += ["unet_steps=2", "text_encoder_steps=1"]
    assert runner.train("one-lora", *words, "accumulation=3")[0] == 0
    code, three, said = runner.train("three-lora", *words, count=3)
    assert code == 0, said
    assert same(learned(runner.session("three-lora")), learned(runner.session("one-lora")))
    assert Path(three["path"]).name == "robot-lora.safetensors"
    names = [
        sorted(path.name for path in runner.session(f"{n}-lora").class_images.rglob("*")) for n in ("one", "three")
    ]
    assert names[0] == names[1]
    assert len(names[0]) == 6  # with their folder


def test_a_run_of_two_of_which_one_was_killed_is_resumed_by_one(runner: Runner) -> None:
    code, answer, said = runner.train("killed", "save_every=1", count=2, fault="step.unet@1:2")
    assert code == 9, said
    assert answer["error"].startswith("Another process of this run has ended"), said
    assert "run it again to resume" in answer["hint"]
    code, answer, said = runner.train("killed", "save_every=1")
    assert code == 0, said
    assert answer["first_step"] >= 3
    assert same(learned(runner.session("killed")), learned(runner.session("one")))


def test_processes_that_cannot_share_the_steps_are_refused_before_anything_is_loaded(runner: Runner) -> None:
    code, answer, _said = runner.train("two", "more_steps=2", count=3)
    assert code == 2
    assert "processes (--processes) is 3, and each optimizer step of this run has 2 forward passes" in answer["error"]
    assert "Choose 1 or 2" in answer["hint"]


@pytest.mark.parametrize(("asked", "kind"), [(True, Interrupted), (False, TrainingFailed)])
def test_who_waits_for_the_first_one_which_ends_as_it_was_asked_to_was_stopped_too(asked: bool, kind: type) -> None:
    # What the first one shares: that there is nothing to train along with, and then nothing more, for it has ended.
    shared: list[Any] = [types.SimpleNamespace(finished=True)]

    class Follower(Ranks):
        def share(self, make: Any) -> Any:
            if shared:
                return shared.pop()
            raise TrainingFailed(f"{LOST}.")

    stop = threading.Event()
    if asked:
        stop.set()
    with pytest.raises(kind):
        follow(Follower(), None, stop)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------ how many there are


def _session(record: dict[str, Any]) -> Any:
    return type("Known", (), {"record": record})()


def _begun(accumulation: int, count: int | None, **given: Any) -> Any:
    settings = {"accumulation": accumulation, "unet_steps": 5} | ({"processes": count} if count else {})
    segment = {"settings": settings, "pictures": [], "given": given, "more": [], "judged_since": 0}
    return _session({"run": 1, "segments": [segment], "given": given, "progress": {"stage": "unet", "step": 2}})


@pytest.mark.parametrize(
    ("gpus", "given", "known", "count"),
    [
        (0, {}, _session({}), 1),
        (2, {}, _session({}), 2),
        (4, {}, _session({}), 4),
        (2, {"processes": 1}, _session({}), 1),
        (0, {"processes": 3}, _session({}), 3),
        (2, {}, _begun(1, None), 1),  # begun by a version that knew one
        (2, {}, _begun(1, 2), 2),
        (1, {}, _begun(1, 2, processes=2), 1),  # begun on two GPUs
        (0, {}, _begun(1, 2, processes=2), 2),
        (4, {}, _begun(3, 2), 3),  # four cannot share six
        (8, {}, _begun(1, 4), 4),
    ],
)
def test_the_number_of_processes_follows_the_gpus_and_what_the_run_began_with(
    monkeypatch: pytest.MonkeyPatch, gpus: int, given: dict[str, Any], known: Any, count: int
) -> None:
    monkeypatch.setattr(processes, "count_gpus", lambda: gpus)
    assert choose_processes(DreamBoothConfig(**given), known).count == count


def test_two_gpus_keep_the_steps_and_say_what_that_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count_gpus", lambda: 2)
    reason = choose_processes(DreamBoothConfig(unet_steps=1000), _session({})).reason
    assert "2 processes on 2 of 2 GPUs" in reason
    assert "each sees 2 times the images" in reason
    assert "--unet-steps 500" in reason


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "count_gpus", lambda: 2)
    with pytest.raises(SettingsError, match=r"processes .* is 4, and this machine has 2 GPUs"):
        choose_processes(DreamBoothConfig(processes=4), _session({}))
    with pytest.raises(SettingsError, match="has 1 forward pass,"):
        choose_processes(DreamBoothConfig(processes=2), _begun(1, 1))


def test_auto_is_a_number_of_processes_left_alone() -> None:
    assert DreamBoothConfig(processes="auto").processes is None
    with pytest.raises(SettingsError, match="processes"):
        DreamBoothConfig(processes=0)


# --------------------------------------------------------------------------------------- watched over


def _here(
    runner: Runner, name: str, ground: Path, monkeypatch: pytest.MonkeyPatch, *, fault: str = "", stop: bool = False
) -> Any:
    """Train in this process, which starts two others; returns the result and what was reported."""
    monkeypatch.setenv("FASTSD_FAULT", fault)
    monkeypatch.setenv("FASTSD_SCRATCH", str(ground / "scratch" / name))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    said: list[Any] = []

    def report(progress: Any) -> None:
        said.append(progress)
        if stop and len(said) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    quick = {"text_encoder_steps": 2, "unet_lr": None, "text_encoder_lr": None, "save_every": 1}
    config = config_for(ground / "base", processes=2, **quick)
    return train(config, runner.session(name), report=report), said


def test_accelerate_launch_starts_two_whose_news_and_result_come_back(
    runner: Runner, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, said = _here(runner, "launched", ground, monkeypatch)
    assert result.path.is_file()
    assert result.loss_after > 0
    assert [(each.step, each.steps) for each in said if each.stage == "unet"] == [(1, 3), (2, 3), (3, 3)]
    assert "2 processes on the CPU" in said[0].message
    assert same(learned(runner.session("launched")), learned(runner.session("one")))


def _forked(count: int, words: list[str]) -> list[str]:
    # The same processes without the launcher's own imports.
    return [sys.executable, "-c", _START_TOGETHER, str(count), str(free_port()), "", *words, "--json"]


def test_both_processes_hear_a_stop_while_they_encode_the_images(
    runner: Runner, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "launch_command", _forked)
    with pytest.raises(Interrupted, match="Stopped while the images were encoded, 0 of 3"):
        _here(runner, "stopped", ground, monkeypatch, stop=True)
    assert local_holder(runner.session("stopped").folder) is None


def test_a_killed_process_of_two_is_named_in_a_sentence_and_nothing_is_left_running(
    runner: Runner, ground: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "launch_command", _forked)
    with pytest.raises(TrainingFailed) as caught:
        _here(runner, "watched", ground, monkeypatch, fault="step.unet@1:2")
    assert caught.value.problem.startswith("Process 2 of 2 of this training was killed from outside")
    assert "run it again to resume" in caught.value.hint
    session = runner.session("watched")
    assert session.record["progress"]["step"] >= 1
    assert local_holder(session.folder) is None
