"""A training in its own process: started, watched, found again by another kernel, stopped, killed, explained."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.cli.flags import given_values
from fastsd_helpers.cli.parser import parse
from fastsd_helpers.dreambooth.running import child_process
from fastsd_helpers.dreambooth.running.child_process import find_training, start_training, train_command
from fastsd_helpers.dreambooth.running.live import Journal, JournalReader, Progress, live_folder
from fastsd_helpers.dreambooth.running.out_of_memory import explain_shortage, settings_to_change
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted, SettingsError, TrainingFailed
from fastsd_helpers.processes import LocalProcess
from fastsd_helpers.sessions import Session

# Stands in for the training itself, which takes a minute: it holds the session's real lock, writes the real journal,
# answers signals as the command line does, and ends as argv[3] says. The real one is in the last test of this file.
PRETENDER = """
import json, os, signal, sys, time
from pathlib import Path
from fastsd_helpers.dreambooth.running.live import Progress
from fastsd_helpers.dreambooth.running.live import Journal
from fastsd_helpers.sessions import Session
root, name, end = sys.argv[1:4]
session = Session.open(name, root=root)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
with session.lock():
    report = Journal(session, every_s=0)
    report(Progress(message="settings as chosen"))
    for step in range(1, 200 if end == "wait" else 4):
        report(Progress("unet", step, 200, 0.5 / step, 200.0 - step))
        if stopped:
            print(json.dumps({"error": f"Stopped at unet step {step}.", "hint": "Go on.", "exit_code": 130}))
            sys.exit(130)
        time.sleep(0.05)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "crash":
        print("Fatal Python error: it broke", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGABRT)
    if end == "break":
        sys.exit("ImportError: it does not fit")
    if end == "refuse":
        print(json.dumps({"error": "Bad.", "hint": "Better.", "exit_code": 2}))
        sys.exit(2)
    path = session.exports / "rex.safetensors"
    path.write_bytes(b"model")
    made = {"path": str(path), "sha256": "0" * 64, "grid": str(path), "loss_plot": str(path), "model_card": str(path)}
    losses = {"loss_before": 0.2, "loss_after": 0.1, "first_step": 0, "steps": 3, "seconds": 1.5}
    print("progress bars and the like")
    print(json.dumps({"session": name, **made, **losses}))
"""


@pytest.fixture(autouse=True)
def _own_scratch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session.create("rex", root=tmp_path / "sessions")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    def set_end(end: str) -> None:
        def command(config: Any, session: Session, **_words: Any) -> list[str]:
            return [sys.executable, "-c", PRETENDER, str(session.folder.parent), session.name, end]

        monkeypatch.setattr(child_process, "train_command", command)

    return set_end


def wait_for(condition: Any, what: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    "config",
    [
        DreamBoothConfig(),
        DreamBoothConfig(unet_steps=7, unet_lr=2e-6, flip=True, gradient_checkpointing=False, save_every=0),
        DreamBoothConfig(
            instance_prompt="-a photo of 'zib' dog; $HOME", base_model="some where/model", precision="fp32"
        ),
    ],
)
def test_the_command_line_means_the_very_settings(config: DreamBoothConfig, session: Session) -> None:
    command = train_command(config, session, restart=True)
    assert command[:5] == [sys.executable, "-m", "fastsd_helpers", "dreambooth", "train"]
    chosen = parse(command[3:])
    assert DreamBoothConfig(**given_values(chosen, DreamBoothConfig)) == config
    assert (chosen.session, chosen.root, chosen.restart, chosen.take_over) == (
        "rex",
        session.folder.parent,
        True,
        False,
    )
    assert chosen.json


def test_more_steps_go_on_the_command_line(session: Session) -> None:
    command = train_command(DreamBoothConfig(seed=42), session, more_steps=20, more_text_encoder_steps=5)
    chosen = parse(command[3:])
    assert (chosen.more_steps, chosen.more_text_encoder_steps, chosen.restart) == (20, 5, False)
    assert given_values(chosen, DreamBoothConfig) == {"seed": 42}, "given, although it is the default"


def test_settings_left_alone_are_left_out(session: Session) -> None:
    assert train_command(DreamBoothConfig(), session)[-3:] == ["--root", str(session.folder.parent), "--json"]


# ----------------------------------------------------------------------------------------------- from start to end


def test_a_training_is_watched_to_its_end(session: Session, pretend: Any) -> None:
    pretend("finish")
    seen = []
    training = start_training(DreamBoothConfig(), session)
    result = training.wait(between=lambda: seen.append(training.live().step), every_s=0.02)
    assert (result.path, result.loss_before, result.steps) == (session.exports / "rex.safetensors", 0.2, 3)
    assert isinstance(result.grid, Path)
    assert seen == sorted(seen)
    live = training.live()
    assert (live.stage, live.step, live.steps, live.messages) == ("unet", 3, 200, ["settings as chosen"])
    assert live.losses["unet"] == [(1, 0.5), (2, 0.25), (3, pytest.approx(0.5 / 3))]
    assert live.host_bytes > 0
    assert find_training(session) is None


def test_another_kernel_finds_the_training_and_gets_its_result(session: Session, pretend: Any) -> None:
    pretend("wait")
    started = start_training(DreamBoothConfig(), session)
    wait_for(lambda: started.live().step > 2, "the first steps")
    other = find_training(Session.open("rex", root=session.folder.parent))
    assert other is not None
    assert other.process == started.process
    assert other.live().step > 2
    other.stop()
    with pytest.raises(Interrupted, match=r"Stopped at unet step \d+"):
        other.wait(every_s=0.02)
    with pytest.raises(Interrupted, match="Stopped at unet step"):
        started.wait(every_s=0.02)


@pytest.mark.parametrize("before", ["nothing", "a training of a notebook that has ended"])
def test_a_training_begun_in_a_terminal_is_found_watched_and_stopped(
    session: Session, pretend: Any, before: str
) -> None:
    if before != "nothing":
        pretend("finish")
        start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    assert find_training(session) is None
    command = [sys.executable, "-c", PRETENDER, str(session.folder.parent), session.name, "wait"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as terminal:
        try:
            wait_for(lambda: find_training(session) is not None, "the training to be found")
            found = find_training(Session.open("rex", root=session.folder.parent))
            assert found.process.pid == terminal.pid
            assert found.is_running()
            wait_for(lambda: found.live().step > 2, "the first steps")
            found.stop()
            with pytest.raises(Interrupted):
                found.wait(every_s=0.02)
            assert terminal.wait(60) == 130
        finally:
            terminal.kill()
    assert find_training(session) is None


def test_whoever_else_holds_the_session_is_not_taken_for_a_training(session: Session, pretend: Any) -> None:
    """Preparing photos locks it too; and the news of an earlier training still lie there."""
    with session.lock():
        assert find_training(session) is None
    pretend("finish")
    start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    with session.lock():
        assert find_training(session) is None


def test_the_childs_life_does_not_hang_on_the_kernels(session: Session, pretend: Any) -> None:
    pretend("wait")
    training = start_training(DreamBoothConfig(), session)
    assert os.getsid(training.process.pid) == training.process.pid != os.getsid(0), "no interrupt reaches it"
    training.kill()
    with pytest.raises(TrainingFailed):
        training.wait()


def test_a_mistake_comes_with_the_childs_own_words(session: Session, pretend: Any) -> None:
    pretend("refuse")
    with pytest.raises(FastSDError) as caught:
        start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    assert (caught.value.problem, caught.value.hint, caught.value.exit_code) == ("Bad.", "Better.", 2)


def test_a_killed_training_is_a_sentence_with_the_settings_to_change(session: Session, pretend: Any) -> None:
    pretend("kill")
    session.save(settings={"batch_size": 4, "method": "full", "resolution": 768}, progress={"step": 2})
    with pytest.raises(TrainingFailed) as caught:
        start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    assert "killed from outside after unet step 3 of 200 (signal 9); it had used" in caught.value.problem
    assert "ran out of memory" in caught.value.problem
    hint = caught.value.hint
    for words in ("batch_size 1 (now 4)", "resolution 512 (now 768)", "method lora", "High-RAM", "--restart"):
        assert words in hint, hint
    assert "gradient_checkpointing" not in hint, "that saves nothing of this machine's own memory"


def test_a_training_whose_end_nobody_saw_is_explained_too(session: Session, pretend: Any) -> None:
    pretend("wait")
    started = start_training(DreamBoothConfig(), session)
    wait_for(lambda: started.live().step > 0, "the first step")
    other = find_training(session)
    assert other is not None
    started.kill()
    with pytest.raises(TrainingFailed, match="killed from outside after unet step"):
        other.wait()


def test_a_crash_shows_its_last_words(session: Session, pretend: Any) -> None:
    pretend("crash")
    with pytest.raises(TrainingFailed) as caught:
        start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    assert "crashed after unet step 3 of 200 (signal 6)" in caught.value.problem
    assert "Fatal Python error: it broke" in caught.value.hint
    assert "it broke" in (session.logs / "train.log").read_text(), "kept for a bug report"


def test_a_child_that_breaks_without_an_answer_is_not_taken_for_one_that_was_killed(
    session: Session, pretend: Any
) -> None:
    pretend("break")
    with pytest.raises(TrainingFailed) as caught:
        start_training(DreamBoothConfig(), session).wait(every_s=0.02)
    assert "crashed after unet step 3 of 200 (exit code 1)" in caught.value.problem
    assert "ImportError: it does not fit" in caught.value.hint


def test_no_secret_reaches_the_command_or_the_kept_log(
    session: Session, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    assert not any("hf_x" in word for word in train_command(DreamBoothConfig(), session))
    folder = live_folder(session)
    folder.mkdir(parents=True)
    (folder / "a.log").write_text(f"token hf_{'x' * 30} was used\n")
    training = child_process.TrainingChild(
        folder, LocalProcess(-1, "0"), folder / "a.out", folder / "a.log", session=session
    )
    assert training.log_lines() == ["token ••• was used"]


# ------------------------------------------------------------------------------------------------- the journal


@pytest.mark.parametrize("uptime_s", [0.0, 5.0, 1e6])
def test_the_journal_keeps_the_mean_loss_between_its_lines(
    session: Session, monkeypatch: pytest.MonkeyPatch, uptime_s: float
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: uptime_s)  # which is counted from the machine's start
    report = Journal(session, every_s=3600)
    for step, loss in enumerate((9.0, 1.0, 2.0, 3.0), start=1):
        report(Progress("unet", step, 4, loss, 1.0))
    assert JournalReader(session).read().losses["unet"] == [(1, 9.0), (4, 2.0)], "first, and last with the mean"


def test_a_run_that_is_gone_on_with_shows_its_whole_curve(session: Session) -> None:
    report, reader = Journal(session, every_s=0), JournalReader(session)
    losses = {"text_encoder": [0.5, 0.25], "unet": [1.0] * 1500}
    report(Progress(message="Resuming after step 1502 of 1510.", history=losses))
    report(Progress("unet", 1501, 1508, 0.5, 7.0))
    live = reader.read()
    assert live.losses["text_encoder"] == [(1, 0.5), (2, 0.25)]
    curve = live.losses["unet"]
    assert curve[-1] == (1501, 0.5)
    assert 100 < len(curve) <= 601
    assert curve[0][0] < 5
    assert live.messages == ["Resuming after step 1502 of 1510."]


def test_a_line_that_was_cut_is_passed_over_until_it_is_whole(session: Session) -> None:
    report, reader = Journal(session, every_s=0), JournalReader(session)
    report(Progress("unet", 1, 4, 0.5, 1.0))
    path = live_folder(session) / "progress.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"message": "half')
    assert reader.read().messages == []
    with open(path, "ab") as file:
        file.write(b' a line"}\nnot json at all\n')
    assert reader.read().messages == ["half a line"]
    assert reader.read().step == 1


def test_a_new_run_begins_a_new_journal_and_a_reader_notices(session: Session) -> None:
    reader = JournalReader(session)
    Journal(session, every_s=0)(Progress("unet", 50, 90, 0.5, 1.0))
    assert reader.read().step == 50
    Journal(session, every_s=0)(Progress("text_encoder", 1, 9, 0.7, 1.0))
    live = reader.read()
    assert (live.stage, live.step, list(live.losses)) == ("text_encoder", 1, ["text_encoder"])


def test_a_run_that_is_refused_leaves_the_news_of_the_other_alone(session: Session) -> None:
    Journal(session, every_s=0)(Progress("unet", 50, 90, 0.5, 1.0))
    Journal(session)  # made before the lock is asked for; says nothing
    assert JournalReader(session).read().step == 50


def test_a_long_curve_is_thinned_but_keeps_its_ends(session: Session) -> None:
    report = Journal(session, every_s=0)
    for step in range(1, 3001):
        report(Progress("unet", step, 3000, 1.0, 1.0))
    points = JournalReader(session).read().losses["unet"]
    assert 250 < len(points) <= 600
    assert points[-1][0] > 2990
    assert all(loss == 1.0 for _, loss in points)
    assert (live_folder(session) / "progress.jsonl").stat().st_size < 1_000_000


def test_a_full_disk_costs_the_watchers_not_the_run(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    record = session.folder / "session.json"
    before = record.read_bytes()
    monkeypatch.setenv("FASTSD_SCRATCH", str(record))  # a file, so no folder can be made
    Journal(session)(Progress("unet", 1, 4, 0.5, 1.0))
    assert record.read_bytes() == before
    assert JournalReader(session).read().losses == {}


# --------------------------------------------------------------------------------------------------- memory


class OutOfMemoryError(RuntimeError):
    """Named as torch names its own."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), "The GPU's memory ran out"),
        (RuntimeError("bitsandbytes: out of memory"), "The GPU's memory ran out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "This machine's memory ran out"),
        (MemoryError(), "This machine's memory ran out"),
    ],
)
def test_out_of_memory_is_a_sentence(error: Exception, words: str, session: Session) -> None:
    session.save(settings={"batch_size": 2, "gradient_checkpointing": False, "precision": "fp32", "optimizer": "adamw"})
    with pytest.raises(TrainingFailed, match=words) as caught, explain_shortage(session):
        raise error
    assert "batch_size 1 (now 2)" in caught.value.hint
    assert ("gradient_checkpointing on" in caught.value.hint) == ("GPU" in words)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), SettingsError("x", "y"), ValueError("out of memory")])
def test_other_errors_pass_as_they_are(error: Exception, session: Session) -> None:
    with pytest.raises(type(error)) as caught, explain_shortage(session):
        raise error
    assert caught.value is error


def test_settings_that_save_already_are_not_named() -> None:
    best = {
        "batch_size": 1,
        "gradient_checkpointing": True,
        "precision": "fp16",
        "optimizer": "adamw8bit",
        "resolution": 512,
        "method": "lora",
        "ema": 0.0,
    }
    assert settings_to_change(best, "gpu") == []
    assert settings_to_change(best | {"ema": 0.99}, "gpu") == ["ema 0"]
    sides = settings_to_change(best | {"resolutions": "512,768"}, "gpu")
    assert sides == ["resolutions without the largest (now 512,768)"]


# ------------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_training_stops_when_asked_and_goes_on(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    from fastsd_helpers import demo
    from fastsd_helpers.cli import main
    from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare

    prepare(PrepareConfig(images=str(demo.SUBJECTS_FOLDER / "robot"), size=128), session)
    config = DreamBoothConfig(base_model="demo", unet_steps=12, text_encoder_steps=0, sample_every=0, batch_size=1)
    training = start_training(config, session)
    wait_for(lambda: training.live().step >= 2 or not training.is_running(), "two steps", 600)
    training.stop()
    with pytest.raises(Interrupted, match="everything is saved"):
        training.wait()
    stopped_at = Session.open("rex", root=session.folder.parent).record["progress"]["step"]
    # Train again, as the same child's command line does, here; and once more: it is finished, and says so at once.
    answers = []
    for _ in range(2):
        capsys.readouterr()
        assert main(train_command(config, session)[3:]) == 0
        answers.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert [answer["first_step"] for answer in answers] == [stopped_at, 12]
    assert 2 <= stopped_at < 12 == answers[0]["steps"]
    assert Path(answers[0]["path"]).is_file()
    assert answers[1]["sha256"] == answers[0]["sha256"]


def test_signals_are_what_the_command_line_understands() -> None:
    # `stop` sends SIGTERM; cli.entry and the training loop turn it into "save and return".
    from fastsd_helpers.cli import entry

    with entry._sigterm_as_ctrl_c(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
