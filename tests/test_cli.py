"""The `fastsd` command: flags from the settings classes, answers for people and programs, honest exit codes."""

import argparse
import errno
import hashlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
from forked import TRAINING

from fastsd_helpers import __version__
from fastsd_helpers.cli import main, model_commands
from fastsd_helpers.cli.answers import pairs, plain
from fastsd_helpers.cli.entry import _with_own_flag
from fastsd_helpers.cli.flags import given_values
from fastsd_helpers.cli.parser import build_parser
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig
from fastsd_helpers.dreambooth.running.live import JournalReader
from fastsd_helpers.dreambooth.settings import DreamBoothConfig
from fastsd_helpers.errors import FastSDError, Interrupted, TrainingFailed
from fastsd_helpers.options import options_of
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import size_in_words

ROOT = Path(__file__).resolve().parents[1]
FASTSD = [sys.executable, "-c", "import sys; from fastsd_helpers.cli import main; sys.exit(main())"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run one command in this process; gives exit code, standard output and standard error."""
    monkeypatch.delenv("FASTSD_DEBUG", raising=False)

    def run_one(*words: str | Path) -> types.SimpleNamespace:
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # --help and --version end argparse's own way
            code = stop.code
        out, err = capsys.readouterr()
        return types.SimpleNamespace(code=code, out=out, err=err)

    return run_one


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """Name -> parser of every command at the top."""
    (action,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(action.choices)


def last_json(done: types.SimpleNamespace) -> dict[str, Any]:
    return json.loads(done.out.splitlines()[-1])


def photos(folder: Path, count: int = 3) -> Path:
    image = pytest.importorskip("PIL.Image")
    folder.mkdir()
    for number in range(count):
        image.effect_noise((96, 96), 60 + number).convert("RGB").save(folder / f"zib robot ({number + 1}).png")
    return folder


# ----------------------------------------------------------------------------------------------- the contract


def test_version_and_help(run: Any) -> None:
    assert run("--version").out == f"fastsd {__version__}\n"
    done = run("--help")
    assert done.code == 0
    for command in ("demo", "dreambooth", "models"):
        assert command in done.out


@pytest.mark.parametrize(
    "words",
    [["demo"], ["doctor"], ["install"], ["controlnet", "list"], ["controlnet", "get"]]
    + [["models", name] for name in ("list", "show", "get")]
    + [["dreambooth", name] for name in ("new", "list", "show", "prepare", "train", "sample", "export", "delete")],
)
def test_every_command_explains_itself(run: Any, words: list[str]) -> None:
    done = run(*words, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert words[0] != "dreambooth" or "--root DIR" in done.out


def test_a_command_is_read_without_the_modules_of_the_others(tmp_path: Path) -> None:
    """Training, web UIs and recognition take longer to import than a small command to run."""
    code = (
        "import sys; from fastsd_helpers.cli import main; main(['convert', 'nothing', 'new']); "
        "print(*(name for name in sys.modules if name.startswith(('fastsd_helpers.', 'numpy'))))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True).stdout.split()
    assert "fastsd_helpers.checkpoints.converter" in loaded
    unneeded = ("bench", "dreambooth", "story", "trocr", "tunnels", "webui")
    others = ("numpy", *(f"fastsd_helpers.{name}" for name in unneeded))
    assert [name for name in loaded if name.startswith(others)] == []


def test_a_parser_made_for_one_command_says_of_it_what_the_whole_one_says() -> None:
    whole = {name: parser.format_help() for name, parser in commands_of(build_parser()).items()}
    assert len(whole) > 10
    for word in (*whole, "nothing", "--help"):
        one = {name: parser.format_help() for name, parser in commands_of(build_parser(word)).items()}
        assert word in one if word in whole else one == whole
        assert one.items() <= whole.items()


@pytest.mark.parametrize(
    ("command", "settings"),
    [("train", DreamBoothConfig), ("prepare", PrepareConfig), ("sample", SampleConfig), ("export", ExportConfig)],
)
def test_every_setting_is_a_flag_with_help_limits_and_default(run: Any, command: str, settings: type) -> None:
    shown = " ".join(run("dreambooth", command, "--help").out.split())
    for item in options_of(settings):
        assert item.flag in shown
        assert " ".join(item.help.split()) in shown
        if item.default not in (None, ""):
            expected = {True: "yes", False: "no"}.get(item.default, item.default) if item.kind is bool else item.default
            assert f"default: {expected}" in shown
        if item.low is not None and item.high is not None and item.kind is int:
            assert f"{item.low} to {item.high}" in shown


def test_only_flags_that_were_given_count_as_given() -> None:
    parser = build_parser()
    words = ["dreambooth", "train", "rex", "--unet-steps", "12", "--no-flip", "--seed", "42", "--save-every", "none"]
    given = given_values(parser.parse_args(words), DreamBoothConfig)
    assert given == {"unet_steps": 12, "flip": False, "seed": 42, "save_every": None}
    assert given_values(parser.parse_args(["dreambooth", "train", "rex"]), DreamBoothConfig) == {}


def test_with_json_the_last_line_is_one_object_even_for_a_mistake(run: Any, tmp_path: Path) -> None:
    good = run("dreambooth", "new", "rex", "--root", tmp_path, "--json")
    assert last_json(good) == {"session": "rex", "path": str(tmp_path / "rex")}
    bad = run("dreambooth", "new", "rex", "--root", tmp_path, "--json")
    assert bad.code == 2
    assert set(last_json(bad)) == {"error", "hint", "exit_code"}


def test_an_answer_keeps_paths_absolute_and_numbers_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert plain({"path": Path("a"), "loss": float("nan"), "list": (1, Path("/b"))}) == {
        "path": str(tmp_path / "a"),
        "loss": None,
        "list": [1, "/b"],
    }


def test_sizes_and_values_are_said_in_words() -> None:
    assert [size_in_words(n) for n in (0, 999, 1500, 2_500_000, 4_265_146_304)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "4.27 GB",
    ]
    assert pairs({"a_b": True, "c": None, "d": 2e-06, "e": [1, 2]}) == [
        "  a b  yes",
        "  c    -",
        "  d    2e-06",
        "  e    1, 2",
    ]
    sentences = pairs({"path": "a", "next": ("Look at the grid: before and after.", "Train some more.")})
    assert sentences[1] == "  next  Look at the grid: before and after.\n        Train some more."


# --------------------------------------------------------------------------------------------- exit codes


def pretend_models_list(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(_chosen: Any) -> None:
        raise error

    monkeypatch.setattr(model_commands, "list_models", fail)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (FastSDError("The value is 3.", "Give 2."), 2, "✋ The value is 3.\n   → Give 2.\n"),
        (TrainingFailed("It broke.", "Do this."), 1, "✋ It broke.\n   → Do this.\n"),
        (Interrupted("Saved at step 3.", "Run it again."), 130, "✋ Saved at step 3.\n"),
        (KeyboardInterrupt(), 130, "✋ Stopped.\n"),
        (ModuleNotFoundError("No module named 'diffusers'", name="diffusers"), 2, "'diffusers' is not installed"),
        (ZeroDivisionError("division by zero"), 1, "ZeroDivisionError: division by zero."),
        (OSError(errno.ENOTCONN, "", "/drive/x"), 2, "Could not use /drive/x: Transport endpoint is not connected"),
        (OSError(errno.ENOSPC, ""), 2, "Could not use a file: the disk or Drive is full"),
        (OSError(errno.ENOENT, "", "/x"), 1, "fastsd itself failed"),
        (ModuleNotFoundError("No module named 'fastsd_helpers.x'", name="fastsd_helpers.x"), 1, "fastsd itself failed"),
    ],
)
def test_the_exit_code_tells_whose_fault_it_was(
    run: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, words: str
) -> None:
    pretend_models_list(monkeypatch, error)
    done = run("models", "list")
    assert done.code == code
    assert words in done.err
    assert "Traceback" not in done.err + done.out
    assert done.out == ""


def test_a_traceback_is_shown_when_asked_for_and_hides_secrets(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    token = "hf_" + "Zz9" * 9
    pretend_models_list(monkeypatch, ZeroDivisionError(f"with {token}"))
    monkeypatch.setenv("FASTSD_DEBUG", "1")
    done = run("models", "list", "--json")
    assert "Traceback" in done.err
    assert token not in done.err + done.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: COMMAND"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
        (["dreambooth"], "required: COMMAND"),
        (["dreambooth", "new"], "required: SESSION"),
        (
            ["dreambooth", "train", "rex", "--unet-step", "3"],
            "does not accept '--unet-step'.\n   → Did you mean --unet-steps?",
        ),
        (["dreambooth", "new", "rex", "dog"], "`fastsd dreambooth new` does not accept 'dog'"),
        (["models", "show", "sd16"], "No model has the key 'sd16'"),
    ],
)
def test_a_command_line_that_cannot_be_understood_is_a_sentence_and_a_hint(
    run: Any, words: list[str], said: str
) -> None:
    done = run(*words)
    assert done.code == 2
    assert said in done.err
    assert "   → " in done.err
    assert len(done.err.splitlines()) == 2


def test_all_bad_settings_are_named_at_once_before_anything_is_looked_for(run: Any, tmp_path: Path) -> None:
    words = ["--unet-steps", "-5", "--unet-lr", "-1e-6", "--resolution", "big", "--lr-scheduler", "wavy"]
    done = run("dreambooth", "train", "no-such-session", "--root", tmp_path, *words)
    assert done.code == 2
    for part in (
        "--unet-steps) is -5; the smallest is 0",
        "--unet-lr) is -1e-06",
        "--resolution) is 'big'; it must be an integer",
        "--lr-scheduler) is 'wavy'; choose linear",
    ):
        assert part in done.err


def test_both_stages_switched_off_is_refused(run: Any, tmp_path: Path) -> None:
    done = run("dreambooth", "train", "x", "--root", tmp_path, "--unet-steps", "0", "--text-encoder-steps", "0")
    assert done.code == 2
    assert "nothing would be trained" in done.err


def test_a_reader_that_goes_away_ends_the_command_quietly() -> None:
    command = subprocess.Popen(
        [*FASTSD, "models", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    command.stdout.close()
    _, err = command.communicate(timeout=60)
    assert "Traceback" not in err
    assert "Exception ignored" not in err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_polite_kill_end_with_130(number: signal.Signals) -> None:
    code = (
        "import sys, time\n"
        "from fastsd_helpers.cli import main, model_commands\n"
        "def wait(_chosen):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
        "model_commands.list_models = wait\n"
        "sys.exit(main(['models', 'list']))"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert running.stdout.readline() == "ready\n"
    started = time.monotonic()
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 130
    assert err == "✋ Stopped.\n   → Run the same command again to resume.\n"
    assert time.monotonic() - started < 10


def test_a_name_that_the_terminal_cannot_show_does_not_end_a_command(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    words = ["dreambooth", "new", "Jürgen", "--root", str(tmp_path)]
    done = subprocess.run([*FASTSD, *words], capture_output=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert b"rgen" in done.stdout


def test_the_logger_of_a_program_that_calls_main_is_left_as_it_was(run: Any) -> None:
    import logging

    logger = logging.getLogger("fastsd_helpers")
    before = list(logger.handlers), logger.level, signal.getsignal(signal.SIGTERM)
    run("models", "list")
    assert (list(logger.handlers), logger.level, signal.getsignal(signal.SIGTERM)) == before


# -------------------------------------------------------------------------------------------------- models


def test_models_are_listed_for_people_and_for_programs(run: Any) -> None:
    lines = run("models", "list").out.splitlines()
    assert lines[0].split() == ["KEY", "KIND", "FAMILY", "RESOLUTION", "SIZE", "GPU", "LICENCE"]
    assert any(line.startswith("sd15 ") for line in lines)
    found = {row["key"]: row for row in last_json(run("models", "list", "--json"))["models"]}
    assert found["demo"]["defaults"]["resolution"] == 128
    assert last_json(run("models", "show", "sd15", "--json"))["family"] == "sd15"
    assert "CreativeML" in run("models", "show", "sd15").out


# ------------------------------------------------------------------------------------------------ sessions


def test_a_session_is_made_listed_shown_and_deleted(run: Any, tmp_path: Path) -> None:
    sessions = tmp_path / "sessions"
    root = ["--root", sessions]
    assert "No sessions in" in run("dreambooth", "list", *root).out
    made = run("dreambooth", "new", "rex", *root)
    assert made.code == 0
    assert "fastsd dreambooth prepare rex --images" in made.out
    listed = run("dreambooth", "list", *root).out.splitlines()
    assert listed[0].split() == ["SESSION", "PROGRESS", "PICTURES", "SIZE"]
    assert listed[1].startswith("rex")
    assert "not trained" in listed[1]
    shown = last_json(run("dreambooth", "show", "rex", *root, "--json"))
    assert shown["path"] == str(sessions / "rex")
    assert shown["checkpoints"] == []
    assert "not trained" in run("dreambooth", "show", "rex", *root).out
    deleted = last_json(run("dreambooth", "delete", "rex", *root, "--yes", "--json"))
    assert deleted["deleted"] is True
    assert deleted["bytes"] > 0
    assert not (sessions / "rex").exists()


@pytest.mark.parametrize("name", ["a/b", "../up", "", "x" * 300, "con"])
def test_a_name_that_cannot_be_a_folder_is_refused_and_nothing_is_made(run: Any, tmp_path: Path, name: str) -> None:
    done = run("dreambooth", "new", name, "--root", tmp_path / "root")
    assert done.code == 2
    assert not (tmp_path / "root").exists() or not any((tmp_path / "root").iterdir())
    assert not list(tmp_path.rglob("session.json"))


@pytest.mark.parametrize("command", ["show", "train", "delete"])
def test_a_session_that_is_not_there_names_those_that_are(run: Any, tmp_path: Path, command: str) -> None:
    Session.create("bird", root=tmp_path)
    done = run("dreambooth", command, "cat", "--root", tmp_path)
    assert done.code == 2
    assert "No session named 'cat'" in done.err
    assert "bird" in done.err


def test_deleting_without_a_terminal_needs_yes(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Session.create("rex", root=tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    done = run("dreambooth", "delete", "rex", "--root", tmp_path)
    assert done.code == 2
    assert "--yes" in done.err
    assert (tmp_path / "rex").exists()


@pytest.mark.parametrize(("typed", "gone"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_deleting_shows_the_size_and_asks(tmp_path: Path, typed: str, gone: bool) -> None:
    session = Session.create("rex", root=tmp_path)
    (session.checkpoints / "big.bin").write_bytes(b"x" * 2_000_000)
    ours, theirs = pty.openpty()
    command = subprocess.Popen(
        [*FASTSD, "dreambooth", "delete", "rex", "--root", str(tmp_path)],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    )
    os.close(theirs)
    os.write(ours, typed.encode())
    out, err = command.communicate(timeout=60)
    os.close(ours)
    assert command.returncode == 0, err
    assert "Delete the session rex (2.0 MB)?" in err
    assert ("Deleted the session rex: 2.0 MB." in out) is gone
    assert ("Nothing was deleted" in out) is not gone
    assert session.folder.exists() is not gone


def test_a_single_checkpoint_can_be_deleted(run: Any, tmp_path: Path) -> None:
    session = Session.create("rex", root=tmp_path)
    for name in ("one", "two"):
        folder = session.checkpoints / name
        folder.mkdir()
        (folder / "manifest.json").write_text('{"files": []}')
        (folder / "weights").write_bytes(b"x" * 1000)
    done = run("dreambooth", "delete", "rex", "--root", tmp_path, "--checkpoint", "three", "--yes")
    assert done.code == 2
    assert "one, two" in done.err
    assert run("dreambooth", "delete", "rex", "--root", tmp_path, "--checkpoint", "one", "--yes").code == 0
    assert [path.name for path in session.checkpoints.iterdir()] == ["two"]
    shown = last_json(run("dreambooth", "show", "rex", "--root", tmp_path, "--json"))
    assert [item["name"] for item in shown["checkpoints"]] == ["two"]
    assert shown["checkpoints"][0]["bytes"] > 1000


def test_the_default_root_is_a_folder_here(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    run("dreambooth", "new", "rex")
    assert (tmp_path / "Fast-Dreambooth" / "Sessions" / "rex" / "session.json").is_file()


# ------------------------------------------------------------------------------------------------- prepare


def test_prepare_says_what_was_read_and_where_to_look(run: Any, tmp_path: Path) -> None:
    Session.create("rex", root=tmp_path)
    words = ["dreambooth", "prepare", "rex", "--root", tmp_path, "--images", photos(tmp_path / "in"), "--size", "64"]
    done = run(*words)
    assert done.code == 0, done.err
    assert "3 images to train on, 64 px." in done.out
    assert "Next: fastsd dreambooth train rex" in done.out
    answer = last_json(run(*words, "--json"))
    assert answer["train"] == 3
    assert Path(answer["contact_sheet"]).is_file()
    assert answer["path"] == str(tmp_path / "rex")


@pytest.mark.parametrize("together", [True, False])
def test_a_report_that_was_logged_is_not_repeated_where_the_log_is_seen_too(tmp_path: Path, together: bool) -> None:
    Session.create("rex", root=tmp_path)
    words = ["dreambooth", "prepare", "rex", "--root", tmp_path, "--images", photos(tmp_path / "in"), "--size", "64"]
    # A file stands for the terminal: what counts is that both streams end in it.
    with (tmp_path / "out").open("w") as out, (tmp_path / "err").open("w") as err:
        done = subprocess.run(
            [*FASTSD, *map(str, words)], stdout=out, stderr=out if together else err, cwd=ROOT, check=False
        )
    assert done.returncode == 0
    said = (tmp_path / "out").read_text()
    assert said.count("3 images to train on, 64 px.") == 1
    assert said.rstrip().endswith("Next: fastsd dreambooth train rex")
    assert (tmp_path / "err").read_text().count("3 images to train on, 64 px.") == (0 if together else 1)


def test_prepare_without_usable_pictures_is_a_users_mistake(run: Any, tmp_path: Path) -> None:
    Session.create("rex", root=tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "note.jpg").write_text("no image")
    for images in (tmp_path / "in", tmp_path / "nowhere"):
        done = run("dreambooth", "prepare", "rex", "--root", tmp_path, "--images", images)
        assert done.code == 2
        assert "   → " in done.err
    assert run("dreambooth", "prepare", "rex", "--root", tmp_path).code == 2


def test_prepare_with_a_size_and_a_crop_that_cannot_be_names_both(run: Any, tmp_path: Path) -> None:
    done = run("dreambooth", "prepare", "rex", "--root", tmp_path, "--size", "8", "--crop", "round")
    assert done.code == 2
    assert "--size) is 8; the smallest is 64" in done.err
    assert "--crop) is 'round'; choose smart, center, none" in done.err


# --------------------------------------------------------------------------------------------------- train


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Diffusers folder of the SD 1.5 shape, made of the real classes at tiny widths."""
    pytest.importorskip("torch")
    pytest.importorskip("diffusers")
    from tiny_models import SMALL, build_pipeline

    folder = tmp_path_factory.mktemp("base") / "model"
    build_pipeline(SMALL, folder.parent / "words", seed=0).save_pretrained(folder)
    return folder


@pytest.fixture
def prepared(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a session `rex` with three images."""
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    Session.create("rex", root=tmp_path / "root")
    images = photos(tmp_path / "in")
    assert (
        run("dreambooth", "prepare", "rex", "--root", tmp_path / "root", "--images", images, "--size", "64").code == 0
    )
    return tmp_path / "root"


TINY = [
    "--resolution",
    "64",
    "--batch-size",
    "1",
    "--sample-every",
    "0",
    "--unet-lr",
    "1e-4",
    "--text-encoder-lr",
    "1e-4",
]


def test_a_dry_run_says_steps_and_bytes_and_trains_nothing(run: Any, prepared: Path, base_model: Path) -> None:
    words = ["dreambooth", "train", "rex", "--root", prepared, "--base-model", base_model, *TINY, "--dry-run"]
    done = run(*words, "--unet-steps", "3", "--text-encoder-steps", "2")
    assert done.code == 0, done.err
    assert "5 steps" in done.out
    assert last_json(run(*words, "--unet-steps", "3", "--text-encoder-steps", "2", "--json"))["steps"] == 5
    assert list((prepared / "rex" / "exports").iterdir()) == []
    assert list((prepared / "rex" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("command", ["sample", "export"])
def test_a_session_that_learned_nothing_yet_says_how_to_train_it(run: Any, prepared: Path, command: str) -> None:
    done = run("dreambooth", command, "rex", "--root", prepared)
    assert done.code == 2
    assert "fastsd dreambooth train rex" in done.err


def test_an_export_in_a_format_that_is_not_written_names_those_that_are(run: Any, tmp_path: Path) -> None:
    done = run("dreambooth", "export", "x", "--root", tmp_path, "--format", "zip", "--dtype", "int8")
    assert done.code == 2
    for part in ("--format) is 'zip'", "safetensors", "--dtype) is 'int8'", "fp16, bf16"):
        assert part in done.err


@pytest.mark.slow
def test_train_ends_with_a_verified_file_and_says_so_for_programs(run: Any, prepared: Path, base_model: Path) -> None:
    words = ["dreambooth", "train", "rex", "--root", prepared, "--base-model", base_model, *TINY]
    words += ["--unet-steps", "2", "--text-encoder-steps", "2", "--json"]
    done = run(*words)
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 1, "progress goes to standard error"
    answer = last_json(done)
    names = ("path", "sha256", "grid", "loss_plot", "loss_before", "loss_after", "first_step", "steps", "seconds")
    assert set(names) <= set(answer)
    path = Path(answer["path"])
    assert path.is_absolute()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == answer["sha256"]
    assert (answer["first_step"], answer["steps"]) == (0, 4)
    shown = last_json(run("dreambooth", "show", "rex", "--root", prepared, "--json"))
    assert shown["progress"] == {"stage": "unet", "step": 2, "steps": 2}
    assert str(path) in [item["path"] for item in shown["exports"]]
    assert [item["path"] for item in shown["exports"]] == [str(path)], "the model card beside it is not a model"
    again = last_json(run(*words))
    assert (again["first_step"], again["sha256"]) == (4, answer["sha256"])


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.slow
def test_what_was_learned_can_be_drawn_with_and_exported(
    run: Any, prepared: Path, base_model: Path, tmp_path: Path
) -> None:
    root = ["--root", prepared]
    words = ["dreambooth", "train", "rex", *root, "--base-model", base_model, *TINY]
    assert run(*words, "--unet-steps", "1", "--text-encoder-steps", "1").code == 0
    draw = ["dreambooth", "sample", "rex", *root, "--prompt", "a robot", "--sample-steps", "1", "--count", "1"]
    drawn = last_json(run(*draw, "--seed", "5", "--json"))
    assert (drawn["prompts"], drawn["stage"], drawn["step"]) == (["a robot"], "unet", 1)
    assert drawn["sha256"] == sha256(drawn["path"])
    export = ["dreambooth", "export", "rex", *root, "--out", tmp_path / "rex.safetensors"]
    written = last_json(run(*export, "--json"))
    assert (written["path"], written["sha256"]) == (str(tmp_path / "rex.safetensors"), sha256(written["path"]))
    refused = run(*export)
    assert refused.code == 2
    assert "--overwrite" in refused.err
    assert sha256(written["path"]) == written["sha256"], "a refused export leaves the file as it was"
    larger = last_json(run(*export, "--overwrite", "--dtype", "fp32", "--json"))
    assert larger["bytes"] > 1.8 * written["bytes"]
    assert larger["sha256"] == sha256(written["path"])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_training_saves_ends_with_130_and_goes_on(
    run: Any, prepared: Path, base_model: Path, number: signal.Signals, forks: Any
) -> None:
    words = ["dreambooth", "train", "rex", "--root", str(prepared), "--base-model", str(base_model), *TINY]
    many = [*words, "--unet-steps", "2", "--text-encoder-steps", "100000"]
    session = Session.open("rex", root=prepared)
    running = forks(*TRAINING).start(["-m", "fastsd_helpers", *many, "--json"])
    while JournalReader(session).read().step < 2:
        assert running.poll() is None, running.said()
        time.sleep(0.1)
    running.send_signal(number)
    assert running.wait() == 130, running.said()
    out, err = running.said()
    assert json.loads(out.splitlines()[-1])["exit_code"] == 130
    assert "everything is saved" in err
    step = Session.open("rex", root=prepared).record["progress"]["step"]
    assert step > 0
    refused = run(*words, "--unet-steps", "3", "--text-encoder-steps", "100000")
    assert refused.code == 2
    assert "unet_steps was 2 and is now 3" in refused.err
    assert "--restart" in refused.err


def test_python_dash_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastsd_helpers", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"fastsd {__version__}\n"


@pytest.mark.parametrize("words", [["doctor"], ["doctor", "--json"]])
def test_a_python_that_is_too_old_is_named(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert main(words) == 2
    said = capsys.readouterr()
    assert "needs Python 3.11 or newer, and this is Python 3.10.13" in said.err + said.out


def test_a_stream_that_knows_no_encoding_takes_the_answer_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # As a notebook's own output, and whatever a caller has put in its place.
    answer = io.StringIO()
    monkeypatch.setattr(sys, "stdout", answer)
    assert main(["models", "list", "--json"]) == 0
    assert json.loads(answer.getvalue().splitlines()[-1])


def test_a_hint_about_the_folder_of_results_names_the_commands_own_flag():
    hint = "Ask for edit access to this folder, or choose another folder with --root."
    assert _with_own_flag(hint, argparse.Namespace(out="x")).endswith("with --out.")
    for chosen in (argparse.Namespace(root="x", out="x"), argparse.Namespace(), None):
        assert _with_own_flag(hint, chosen) == hint
