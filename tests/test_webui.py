"""Web UIs: flags for every machine, installation from places that live, starting, refusing, crashing, stopping."""

import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from bare_guard import use_bare_guard
from table_models import original, write
from tunnel_doubles import free_port, processes_of

from fastsd_helpers.errors import (
    ModelError,
    ModelNotFound,
    SettingsError,
    WebUICrashed,
    WebUIError,
    WebUINotInstalled,
)
from fastsd_helpers.processes import LogTail, end_group
from fastsd_helpers.sessions import Session
from fastsd_helpers.webui import (
    InstallConfig,
    LaunchConfig,
    find_places,
    find_ui,
    launch,
    place_controlnet,
    place_model,
    plan,
    status,
    stop,
    uis,
)
from fastsd_helpers.webui.extensions import installation
from fastsd_helpers.webui.flags import GPUS, Machine, choose_flags, rules
from fastsd_helpers.webui.places import prepare_places
from fastsd_helpers.webui.placing import models
from fastsd_helpers.webui.placing.in_store import families_in_store
from fastsd_helpers.webui.placing.models import ModelsConfig, place_models
from fastsd_helpers.webui.placing.needed import find_needed
from fastsd_helpers.webui.running import process
from fastsd_helpers.webui.running.crash import explain_crash

A1111 = find_ui("a1111")
CPU = Machine("a processor", 0, 16)


@pytest.fixture
def bare_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return use_bare_guard(tmp_path, monkeypatch)


@pytest.fixture
def where(tmp_path: Path) -> dict[str, str]:
    return {"folder": str(tmp_path / "programs"), "store": str(tmp_path / "store")}


# ---------------------------------------------------------------------------------------------------------- flags


def test_every_machine_and_family_has_a_rule_and_a_reason() -> None:
    for ui in uis():
        for family in ui.families:
            for machine in (*GPUS.values(), CPU, Machine("small", 3.9, 8), Machine("tiny", 1, 2)):
                flags, reasons = choose_flags(ui, family, machine)
                assert all(reasons), (ui.key, family, machine.name)
                assert len(flags) == len(set(flags))
    assert {rule.ui for rule in rules()} == {ui.key for ui in uis()}


@pytest.mark.parametrize(
    ("gpu", "family", "expected"),
    [
        ("T4", "sd15", ["--no-half-vae", "--opt-sdp-attention"]),
        ("T4", "sdxl", ["--lowram", "--no-half-vae", "--opt-sdp-attention"]),
        ("A100", "sdxl", ["--no-half-vae", "--opt-sdp-attention"]),
    ],
)
def test_the_flags_of_the_machines_people_rent(gpu: str, family: str, expected: list[str]) -> None:
    assert choose_flags(A1111, family, GPUS[gpu])[0] == expected


def test_small_gpus_and_processors_get_what_they_need() -> None:
    assert "--medvram" in choose_flags(A1111, "sd15", Machine("GTX 1650", 4.0, 16))[0]
    assert "--lowvram" in choose_flags(A1111, "sdxl", Machine("GTX 1650", 4.0, 16))[0]
    assert "--medvram-sdxl" in choose_flags(A1111, "sdxl", Machine("RTX 3070", 8.0, 32))[0]
    assert choose_flags(A1111, "sd15", CPU)[0][:4] == ["--use-cpu", "all", "--skip-torch-cuda-test", "--no-half"]
    assert choose_flags(find_ui("comfyui"), "flux", Machine("RTX 3070", 8.0, 32))[0][0] == "--lowvram"
    assert "--lowvram" not in choose_flags(find_ui("comfyui"), "flux", GPUS["T4"])[0], "its size fits this GPU whole"


def test_flags_are_for_the_model_of_the_folder_that_needs_most(where: dict[str, str]) -> None:
    checkpoints = Path(where["store"]) / "models" / "Stable-diffusion"
    sizes = {"a.safetensors": 2.1e9, "b.ckpt": 4.3e9, "sub/xl.safetensors": 6.9e9, "large.safetensors": 13.9e9}
    for name, size in sizes.items():
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        with (checkpoints / name).open("wb") as file:
            file.truncate(int(size))  # only sizes are looked at, or a header that cannot be read
    places = find_places(A1111, **where)
    assert families_in_store(A1111, places) == {"sd15": "a.safetensors", "sdxl": "large.safetensors"}
    made = plan(LaunchConfig(model="sd15", **where), machine=GPUS["T4"])
    assert "--lowram" in made.command, "the model beside it can be chosen while it runs"
    assert any("large.safetensors" in reason for reason in made.reasons)
    small = plan(LaunchConfig(model="sd15", **where), machine=Machine("GTX 1650", 4.0, 16))
    assert "--lowvram" in small.command
    for name in ("sub/xl.safetensors", "large.safetensors"):
        (checkpoints / name).unlink()
    made = plan(LaunchConfig(model="sd15", **where), machine=GPUS["T4"])
    assert "--lowram" not in made.command
    # One of SDXL's own size in 8 bit is told by what is in it.
    write(checkpoints / "xl-fp8.safetensors", original("sdxl"))
    import fastsd_helpers.webui.placing.in_store as module

    assert module._family_of(checkpoints / "xl-fp8.safetensors", int(3.5e9)) == "sdxl"


def test_what_was_asked_for_is_used() -> None:
    assert "--lowvram" in choose_flags(A1111, "sd15", GPUS["A100"], vram="low")[0]
    flags, _ = choose_flags(A1111, "sd15", GPUS["T4"], precision="fp32", attention="sdp-repeatable")
    assert flags == ["--no-half", "--opt-sdp-no-mem-attention"]


def test_a_family_that_a_ui_lacks_is_refused_with_the_ui_that_has_it() -> None:
    with pytest.raises(WebUIError) as caught:
        choose_flags(A1111, "flux", GPUS["A100"])
    assert caught.value.problem == "AUTOMATIC1111 v1.10.1 does not run flux models."
    assert caught.value.hint == "Choose Forge Neo or ComfyUI."


def test_the_page_of_dry_runs_is_what_the_code_says() -> None:
    import runpy

    root = Path(__file__).resolve().parents[1]
    made = runpy.run_path(str(root / "scripts" / "make_webui_flags.py"))["make_page"]()
    assert (root / "docs" / "webui-flags.md").read_text(encoding="utf-8") == made, "run scripts/make_webui_flags.py"


# -------------------------------------------------------------------------------------------------------- the command


def test_the_login_is_on_no_command_line_and_never_shown(where: dict[str, str]) -> None:
    made = plan(LaunchConfig(password="a-secret-word-9", **where), machine=GPUS["T4"])
    words = made.command
    assert not [
        word for word in words if word.startswith(("--api-auth", "--gradio-auth=")) or "a-secret-word-9" in word
    ]
    assert words[words.index("--gradio-auth-path") + 1] == str(made.login_file)
    assert "--api" in words
    assert made.environment["COMMANDLINE_ARGS"] == ""
    shown = "\n".join(made.lines())
    assert "a-secret-word-9" not in shown
    assert "a-secret-word-9" not in repr(made)
    for forbidden in ("--share", "--listen", "--disable-safe-unpickle", "--enable-insecure-extension-access"):
        assert forbidden not in words
    for needed in ("--skip-install", "--no-download-sd-model"):
        assert needed in words


def test_forge_neo_gets_only_flags_that_it_has(where: dict[str, str]) -> None:
    # Source: its modules/cmd_args.py and backend/args.py of 2026, which have none of the four below.
    made = plan(LaunchConfig(ui="forge-neo", vram="low", **where), machine=GPUS["T4"], family="flux")
    assert "--lowvram" in made.command
    assert "--skip-version-check" in made.command
    assert made.command[made.command.index("--ckpt-dirs") + 1].endswith("/models/Stable-diffusion")
    assert not {"--ckpt", "--models-dir", "--no-download-sd-model", "--do-not-download-clip"} & set(made.command)
    assert "IGNORE_CMD_ARGS_ERRORS" not in made.environment, "a flag that it does not have ends its start"
    assert "IGNORE_CMD_ARGS_ERRORS" not in plan(LaunchConfig(**where), machine=GPUS["T4"]).environment


def test_comfyui_finds_the_folders_that_it_asks_for(where: dict[str, str]) -> None:
    ui = find_ui("comfyui")
    places = find_places(ui, **where)
    prepare_places(places, ui)
    assert (places.data / "custom_nodes").is_dir(), "it ends without it"
    assert (places.data / "user").resolve() == Path(where["store"]) / "comfyui" / "user", "settings are kept"
    assert (places.models / "checkpoints" / "store").is_dir()
    words = plan(LaunchConfig(ui="comfyui", **where), machine=CPU).command
    assert "--cpu" in words
    assert words[words.index("--listen") + 1] == "127.0.0.1"
    assert words[words.index("--database-url") + 1] == f"sqlite:///{places.data}/comfyui.db", "no database on Drive"


@pytest.mark.parametrize("words", ["--share", "--listen --x", "--gradio-auth=a:b", "--port 1", "'open"])
def test_extra_arguments_cannot_open_it_to_strangers(words: str) -> None:
    with pytest.raises(SettingsError, match="extra_args"):
        LaunchConfig(extra_args=words)


def test_every_setting_but_the_login_changes_the_command(where: dict[str, str]) -> None:
    def command(**settings: Any) -> str:
        made = plan(LaunchConfig(**{**where, **settings}), machine=GPUS["T4"])
        return shlex.join(made.command)

    plain = command()
    for change in (
        {"vram": "low"},
        {"precision": "fp32"},
        {"attention": "split"},
        {"theme": "dark"},
        {"api": False},
        {"port": 7999},
        {"extra_args": "--xformers"},
        {"store": "/elsewhere"},
        {"folder": "/elsewhere"},
    ):
        assert command(**change) != plain, change
    assert command(user="me", password="another-word-5") == plain, "the login is in a file"


# -------------------------------------------------------------------------------------------------------- installing


def _repository(folder: Path, text: str) -> tuple[Path, str]:
    folder.mkdir(parents=True)
    (folder / "launch.py").write_text(text)

    def git(*words: str) -> str:
        names = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        return subprocess.run(["git", *names, *words], cwd=folder, check=True, capture_output=True, text=True).stdout

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    first = git("rev-parse", "HEAD").strip()
    (folder / "later.txt").write_text("later")
    git("add", ".")
    git("commit", "--quiet", "-m", "second")
    return folder, first


@pytest.fixture
def small_ui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """AUTOMATIC1111's entry with two small local repositories, and an environment that is this very Python."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed (apt install git)")
    import dataclasses

    code, commit = _repository(tmp_path / "upstream", "print('here')")
    other, other_commit = _repository(tmp_path / "other", "x = 1")
    repositories = (
        dataclasses.replace(A1111.repositories[0], urls=("file:///gone.git", str(code)), revision=commit),
        dataclasses.replace(A1111.repositories[2], urls=(str(other),), revision=other_commit),
    )
    ui = dataclasses.replace(A1111, repositories=repositories)
    asked: list[Any] = []

    def make_environment(folder: Path, *, python: str) -> Path:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        if not (folder / "bin" / "python").exists():
            (folder / "bin" / "python").symlink_to(sys.executable)
        asked.append(python)
        return folder / "bin" / "python"

    class Report:
        changes = ()

    module = sys.modules["fastsd_helpers.webui.extensions.installation"]
    monkeypatch.setattr(module, "find_ui", lambda key: ui)
    monkeypatch.setattr(module, "make_environment", make_environment)
    monkeypatch.setattr(module, "install", lambda name, **more: asked.append((name, more)) or Report())
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda path: 10**12)
    return type("Small", (), {"ui": ui, "asked": asked, "commit": commit, "upstream": code, "other": other})


def test_code_comes_at_its_commit_from_the_first_place_that_has_it(
    small_ui: Any, where: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        result = installation.install_webui(InstallConfig(**where))
    assert result.commits["a1111"] == small_ui.commit
    assert not (result.path / "later.txt").exists()
    branch = subprocess.run(
        ["git", "branch", "--show-current"], cwd=result.path, capture_output=True, text=True, check=True
    )
    assert branch.stdout.strip() == "fastsd", "a detached HEAD makes the UI complain"
    assert "could not be downloaded from file:///gone.git" in caplog.text
    assert set(result.steps) == {"code of a1111", "code of stable-diffusion", "environment", "packages"}
    assert (small_ui.asked[0], small_ui.asked[1][0]) == ("3.11", "a1111")
    assert "code of a1111: done" in result.log.read_text()
    assert json.loads(find_places(A1111, **where).installed.read_text())["commits"] == result.commits
    store = Path(where["store"])
    assert (store / "models" / "Stable-diffusion").is_dir()
    assert (store / "outputs").is_dir()


def test_done_again_it_only_looks_and_a_moved_folder_is_put_right(small_ui: Any, where: dict[str, str]) -> None:
    installation.install_webui(InstallConfig(**where))
    again = installation.install_webui(InstallConfig(**where))
    assert "was there already" in again.log.read_text()
    subprocess.run(["git", "fetch", "-q", str(small_ui.upstream)], cwd=again.path, check=True)
    subprocess.run(["git", "checkout", "-q", "-B", "mine", "FETCH_HEAD"], cwd=again.path, check=True)
    assert installation.install_webui(InstallConfig(**where)).commits["a1111"] == small_ui.commit
    subprocess.run(["git", "checkout", "-q", "mine"], cwd=again.path, check=True)
    subprocess.run(["git", "checkout", "-q", "-B", "other", "HEAD"], cwd=again.path, check=True)


def test_files_changed_by_hand_are_not_lost(small_ui: Any, where: dict[str, str]) -> None:
    code = installation.install_webui(InstallConfig(**where)).path
    subprocess.run(["git", "fetch", "-q", str(small_ui.upstream)], cwd=code, check=True)
    subprocess.run(["git", "checkout", "-q", "-B", "mine", "FETCH_HEAD"], cwd=code, check=True)
    (code / "launch.py").write_text("mine")
    with pytest.raises(WebUIError, match="were changed by hand"):
        installation.install_webui(InstallConfig(**where))
    assert (code / "launch.py").read_text() == "mine"


def test_a_mirror_of_the_users_own_is_taken(small_ui: Any, where: dict[str, str], tmp_path: Path) -> None:
    mirror = shutil.copytree(small_ui.upstream, tmp_path / "mirror")
    result = installation.install_webui(InstallConfig(mirrors=f"a1111={mirror}", **where))
    remote = subprocess.run(
        ["git", "remote", "get-url", "origin"], cwd=result.path, capture_output=True, text=True, check=True
    )
    assert remote.stdout.strip() == str(mirror)
    for wrong in ("nothing", "unknown=/x", "a1111="):
        with pytest.raises(SettingsError, match="mirrors"):
            installation.install_webui(InstallConfig(mirrors=wrong, **where))


def test_code_that_nobody_has_names_every_place_and_leaves_nothing(small_ui: Any, where: dict[str, str]) -> None:
    shutil.rmtree(small_ui.upstream)
    with pytest.raises(WebUIError) as caught:
        installation.install_webui(InstallConfig(**where))
    assert "file:///gone.git" in caught.value.problem
    assert str(small_ui.upstream) in caught.value.problem
    assert "--mirrors a1111=" in caught.value.hint
    places = find_places(A1111, **where)
    assert not places.code.exists()
    assert not places.installed.exists()
    assert not list(places.root.glob(".code.*"))


def test_without_git_or_room_nothing_is_begun(
    small_ui: Any, where: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda path: 10**9)
    with pytest.raises(Exception, match=r"has 1\.00 GB left"):
        installation.install_webui(InstallConfig(**where))
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda path: 10**12)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(WebUIError, match="git is not installed"):
        installation.install_webui(InstallConfig(**where))


def test_every_ui_has_a_lock_and_its_code_at_a_commit() -> None:
    from fastsd_helpers.wheels import read_lock

    locked = {(found.name, found.python): found for found in read_lock().sets}
    for ui in uis():
        assert locked[ui.lock_set, ui.python].own_environment, ui.key
        assert all(re.fullmatch("[0-9a-f]{40}", item.revision) for item in ui.repositories), ui.key


def test_packages_that_a_user_brings_along_are_left_out(small_ui: Any, where: dict[str, str]) -> None:
    installation.install_webui(InstallConfig(skip_packages="torch, NumPy,", **where))
    assert small_ui.asked[1] == ("a1111", {"python": find_places(A1111, **where).python, "skip": ["torch", "NumPy"]})


def test_the_previous_notebooks_folder_is_used_as_it_is(small_ui: Any, where: dict[str, str]) -> None:
    old = Path(where["store"]) / "models" / "Stable-diffusion" / "old.safetensors"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"mine")
    installation.install_webui(InstallConfig(**where))
    assert (
        find_places(A1111, **where).models / "Stable-diffusion" / "store" / "old.safetensors"
    ).read_bytes() == b"mine"


# ----------------------------------------------------------------------------------------------------------- models


@pytest.fixture(scope="module")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model as one file: a real checkpoint of the SD 1.5 layout; not to be changed."""
    from fastsd_helpers.checkpoints import convert
    from fastsd_helpers.model_lookup import fetch_model

    file = tmp_path_factory.mktemp("demo") / "tiny.safetensors"
    convert(fetch_model("demo"), file)
    return file


@pytest.fixture
def checkpoint(demo_file: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(demo_file, tmp_path))


def test_a_file_is_linked_with_the_yaml_beside_it(checkpoint: Path, where: dict[str, str]) -> None:
    checkpoint.with_suffix(".yaml").write_text("model: x")
    places = find_places(A1111, **where)
    placed = place_model(str(checkpoint), A1111, places)
    assert (placed.how, placed.family) == ("linked", "sd15")
    assert placed.path.is_symlink()
    assert placed.path.resolve() == checkpoint
    assert placed.path.with_suffix(".yaml").read_text() == "model: x"
    assert place_model(str(checkpoint), A1111, places).path == placed.path


def test_a_key_a_folder_and_a_session_become_models_too(
    checkpoint: Path, where: dict[str, str], tmp_path: Path
) -> None:
    places = find_places(A1111, **where)
    placed = place_model("demo", A1111, places)
    assert placed.how == "converted"
    assert placed.path.is_file()
    assert placed.path.resolve().is_relative_to(Path(where["store"]))
    stamp = placed.path.stat().st_mtime_ns
    assert place_model("demo", A1111, places).path.stat().st_mtime_ns == stamp, "converted once"
    session = Session.create("rex", root=tmp_path / "Fast-Dreambooth" / "Sessions")
    with pytest.raises(ModelNotFound, match="has no finished model yet"):
        place_model("rex", A1111, places)
    session.exports.mkdir(exist_ok=True)
    shutil.copy(checkpoint, session.exports / "rex.safetensors")
    assert place_model("rex", A1111, places).path.resolve() == session.exports / "rex.safetensors"


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
@pytest.mark.parametrize("given", ["name", "folder"])
def test_of_several_finished_models_of_a_session_the_newest_is_taken(
    checkpoint: Path, where: dict[str, str], tmp_path: Path, order: tuple[str, ...], given: str
) -> None:
    """The newest by when it was written, whatever their names: another step, another strength, written again."""
    session = Session.create("rex", root=tmp_path / "Fast-Dreambooth" / "Sessions")
    places = find_places(A1111, **where)
    session.exports.mkdir(exist_ok=True)
    for age, name in enumerate(order):
        path = session.exports / f"{name}.safetensors"
        shutil.copy(checkpoint, path)
        os.utime(path, (1e9 + 60 * age, 1e9 + 60 * age))
        (session.exports / "newer.txt").write_text("no model")
        placed = place_model("rex" if given == "name" else str(session.folder), A1111, places)
        assert placed.path.resolve() == path
    os.utime(session.exports / f"{order[0]}.safetensors", (2e9, 2e9))
    assert place_model("rex", A1111, places).path.resolve().stem == order[0]


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sdxl-refiner", "sd15-inpaint"])
@pytest.mark.parametrize("named", ["file", "link to the file", "with ~"])
def test_the_family_of_a_file_is_what_is_in_it_and_decides_its_flags(
    where: dict[str, str], tmp_path: Path, family: str, named: str
) -> None:
    path = write(tmp_path / "home" / "some name.safetensors", original(family))
    (tmp_path / "link.safetensors").symlink_to(path)
    ref = {"file": str(path), "link to the file": str(tmp_path / "link.safetensors"), "with ~": f"~/{path.name}"}[named]
    assert find_needed(ref, A1111, find_places(A1111, **where), CPU).family == family
    made = plan(LaunchConfig(model=ref, **where), machine=GPUS["T4"])
    for flag in choose_flags(A1111, family, GPUS["T4"])[0]:
        assert flag in made.command
    assert ("--lowram" in made.command) == family.startswith("sdxl")


def test_the_family_of_what_cannot_be_told_without_fetching_it_is_left_open(where: dict[str, str]) -> None:
    for ref in ("somebody/a-model", "https://example.org/model.safetensors"):
        assert find_needed(ref, A1111, find_places(A1111, **where), CPU).family is None, ref


def test_what_is_no_model_or_not_for_this_ui_is_refused(where: dict[str, str], tmp_path: Path) -> None:
    places = find_places(A1111, **where)
    with pytest.raises(ModelNotFound, match="There is no model 'nothing-like-it'"):
        place_model("nothing-like-it", A1111, places)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is not a model file"):
        place_model(str(tmp_path / "notes.txt"), A1111, places)
    with pytest.raises(WebUIError) as caught:
        place_model("flux-dev", A1111, places)
    assert "does not run 'flux-dev', which is a flux model" in caught.value.problem
    assert "Forge Neo or ComfyUI" in caught.value.hint


def test_controlnets_that_do_not_fit_are_refused_with_what_does(where: dict[str, str]) -> None:
    places = find_places(A1111, **where)
    with pytest.raises(ModelError) as caught:
        place_controlnet("flux-dev", "canny", A1111, places)
    assert "ComfyUI" in f"{caught.value.problem} {caught.value.hint}"
    with pytest.raises(ModelError, match="is for sd15, and sdxl is sdxl") as caught:
        place_controlnet("sdxl", "sd15-canny", A1111, places)
    assert "Use 'sdxl" in caught.value.hint
    assert find_needed("sdxl", A1111, places, CPU).family == "sdxl"


@pytest.mark.parametrize("action", ["look", "place"])
def test_a_drive_that_goes_in_the_middle_is_one_sentence(
    where: dict[str, str], action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from fastsd_helpers.errors import DriveError

    places = find_places(A1111, **where)
    prepare_places(places, A1111)
    file = places.store / "x.safetensors"
    write(file, original("vae"))
    lost = OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(places.store / "models"))

    def gone(*_words: Any) -> Any:
        raise lost

    monkeypatch.setattr(Path, "rglob", gone)
    monkeypatch.setattr(models, "new_link", gone)
    actions = {
        "look": lambda: place_models(ModelsConfig(), A1111, places),
        "place": lambda: place_model(str(file), A1111, places, kind="vae"),
    }
    with pytest.raises(DriveError) as caught:
        actions[action]()
    assert str(places.store / "models") in caught.value.problem
    assert "run the cell that connects Drive again" in caught.value.hint
    with pytest.raises(DriveError, match="Could not read"):
        families_in_store(A1111, places)


# ---------------------------------------------------------------------------------------------------------- running


@pytest.fixture
def stub(where: dict[str, str], bare_guard: Path) -> Any:
    """An installation whose program is a stub that behaves as its file `mood` says."""
    places = find_places(A1111, **where)
    places.python.parent.mkdir(parents=True)
    places.python.symlink_to(sys.executable)
    places.code.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub_webui.py"), places.code / "launch.py")

    def start(mood: str, show: Any = None, machine: Machine = CPU, **settings: Any) -> Any:
        (places.code / "mood").write_text(mood)
        values = {"port": free_port(), "password": "ui-password-77", "wait_s": 60, **where, **settings}
        return launch(LaunchConfig(**values), machine=machine, show=show)

    yield type("Stub", (), {"start": staticmethod(start), "places": places, "where": where})
    stop("a1111", **where)


def test_it_is_not_asked_before_it_says_that_it_is_ready(stub: Any) -> None:
    # The stub ends, as AUTOMATIC1111 does, when a request comes between its two lines.
    with stub.start("good") as running:
        assert running.alive()
        assert running.model_loaded is True
        log = running.log.read_text()
        assert "ui-password-77" not in log
        assert "--api-auth" not in log
        assert oct(running.log.stat().st_mode & 0o777) == "0o600"
        assert oct((stub.places.run / "login").stat().st_mode & 0o777) == "0o600"
        state, runs = status("a1111", **stub.where)
        assert runs
        assert state.port == running.port
        assert "ui-password-77" not in json.dumps(state.__dict__)
        with pytest.raises(WebUIError, match="is already running"):
            stub.start("good")
    assert not running.alive()
    assert status("a1111", **stub.where)[1] is False
    assert not (stub.places.run / "login").exists()


@pytest.mark.parametrize("machine", [CPU, GPUS["T4"]])
def test_lines_that_only_worry_are_in_the_log_and_not_shown(stub: Any, machine: Machine) -> None:
    shown: list[str] = []
    with stub.start("good", show=shown.append, machine=machine) as running:
        log = running.log.read_text()
    text = "\n".join(shown)
    assert "Startup time: " in text
    for line in ("To create a public link", "fatal: No names found", "Found no NVIDIA driver"):
        assert line in log
        # Where a GPU is meant to be used, that none was found is no noise.
        assert (line in text) == (machine is not CPU and "NVIDIA" in line)


def test_running_without_its_model_is_told_apart(stub: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fastsd_helpers"), stub.start("refuses") as running:
        assert running.alive()
        assert running.model_loaded is False
    assert "runs, but it refused the model" in caplog.text
    assert "fastsd inspect" in caplog.text


@pytest.mark.parametrize(
    ("mood", "said", "hint"),
    [
        ("dies", "its environment lacks the module pytorch_lightning", "fastsd webui install"),
        ("ram", "was killed (exit -9)", "more RAM"),
        ("url then death", "the GPU's memory was not enough", "lower setting for vram"),
    ],
)
def test_a_start_that_fails_says_why(stub: Any, mood: str, said: str, hint: str) -> None:
    with pytest.raises(WebUICrashed) as caught:
        stub.start(mood)
    assert said in caught.value.problem
    assert hint in caught.value.hint
    assert status("a1111", **stub.where)[1] is False


def test_a_start_that_the_system_ends_for_lack_of_memory_says_so(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(100))
    for module in ("process", "circumstances"):
        monkeypatch.setattr(f"fastsd_helpers.webui.running.{module}.count_memory_kills", lambda: next(counts))
    with pytest.raises(WebUICrashed, match=r"was ended by the system \(exit -9\): the machine's RAM was not enough"):
        stub.start("ram")


@pytest.mark.slow
def test_a_start_that_hangs_ends_at_the_deadline_and_leaves_nothing(stub: Any) -> None:
    with pytest.raises(WebUIError, match="did not start within 10 s; its last output: Warning: caught"):
        stub.start("mute", wait_s=10)
    assert processes_of(str(stub.places.code)) == []
    assert status("a1111", **stub.where)[1] is False


@pytest.mark.slow
def test_another_process_finds_it_and_stops_it_with_all_it_started(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "end_group", lambda leader, grace_s: end_group(leader, grace_s=min(1, grace_s)))
    marker = f"--marker-{os.getpid()}"
    running = stub.start("stubborn", extra_args=marker)
    assert stop("a1111", **stub.where) is True
    running.wait(10)
    assert processes_of(marker) == []
    assert stop("a1111", **stub.where) is False


def test_another_process_says_why_it_ended_and_nothing_of_one_that_was_stopped(
    stub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [word for name in ("folder", "store") for word in (f"--{name}", stub.where[name])]
    running = stub.start("good")
    with running.log.open("a") as log:
        log.write('Traceback (most recent call last):\n  File "/x/extensions/sd-a/a.py", line 1, in f\nKeyError: 1\n')
    assert "problem" not in json.loads(_run(capsys, "webui", "status", *places, "--json")[1])
    os.killpg(running.state.pid, 9)
    running.wait(10)
    said = json.loads(_run(capsys, "webui", "status", *places, "--json")[1])
    assert said["running"] is False
    assert "in the extension sd-a: KeyError: 1" in said["problem"]
    state = stub.places.run / "state.json"
    kept = state.read_text()
    state.write_text(json.dumps({**json.loads(kept), "boot": "another"}))
    assert "was restarted" in _run(capsys, "webui", "status", *places)[1]
    state.write_text(kept)
    running.stop()
    assert "problem" not in json.loads(_run(capsys, "webui", "status", *places, "--json")[1])


def test_a_process_with_the_same_number_is_not_taken_for_it(stub: Any) -> None:
    running = stub.start("good")
    running.stop()
    path = stub.places.run / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "pid": os.getpid()}))
    assert status("a1111", **stub.where)[1] is False
    assert stop("a1111", **stub.where) is False


def test_it_is_started_again_when_it_ends_by_itself(stub: Any) -> None:
    running = stub.start("dies later", restart=True)
    try:
        (stub.places.code / "mood").write_text("good")
        ends = time.monotonic() + 60
        while running.restarts < 1 or running.problem() is not None:
            assert time.monotonic() < ends
            time.sleep(0.1)
        assert running.restarts == 1
    finally:
        running.stop()


def test_a_port_in_use_and_a_missing_installation_are_said_first(stub: Any, tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WebUIError) as caught:
            stub.start("good", port=port)
    assert caught.value.problem == f"Port {port} of this machine is in use by another program."
    assert f"--port {port + 1}" in caught.value.hint
    with pytest.raises(WebUINotInstalled) as missing:
        launch(LaunchConfig(folder=str(tmp_path / "nowhere")))
    assert missing.value.hint == "Run: fastsd webui install --ui a1111"


def test_a_drive_that_is_gone_stops_the_start(stub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from fastsd_helpers.errors import DriveError

    def gone(folder: Any) -> None:
        raise DriveError(f"Could not read {folder}: {os.strerror(errno.ENOTCONN)}.", "Connect Drive again.")

    monkeypatch.setattr(sys.modules["fastsd_helpers.webui.running.launching"], "check_health", gone)
    with pytest.raises(DriveError, match="Could not read"):
        stub.start("good")


def test_a_model_of_another_family_never_starts_anything(stub: Any) -> None:
    with pytest.raises(WebUIError, match="does not run 'flux-dev'"):
        stub.start("good", model="flux-dev")
    assert not (stub.places.run / "state.json").exists()


def test_sharing_asks_for_one_login_and_closes_what_the_ui_leaves_open(
    stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    import urllib.error
    import urllib.request

    from fastsd_helpers.processes import Child
    from fastsd_helpers.tunnels import TunnelConfig
    from fastsd_helpers.tunnels.services import kinds
    from fastsd_helpers.webui import share

    def direct(port: int, config: TunnelConfig) -> Any:
        child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
        return kinds.Running(f"http://127.0.0.1:{port}", child)

    monkeypatch.setitem(kinds.SERVICES, "cloudflared", direct)
    with stub.start("good") as running:
        tunnel = share(running, TunnelConfig(kind="cloudflared"))
        assert tunnel.login == running.login
        for path in ("/", "/internal/sysinfo"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{tunnel.url}{path}", timeout=10)
            assert caught.value.code == 401
    assert tunnel.closed


OTHER_UI = """
import http.server, sys, threading, time
words = sys.argv[1:]
class Site(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == ALIVE else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Site)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(SAYS, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("ui", "entry", "alive", "says"),
    [
        ("comfyui", "main.py", "/system_stats", "Starting server\n\nTo see the GUI go to: http://127.0.0.1:8188"),
        ("forge-neo", "launch.py", "/internal/ping", "Startup time: 29.4s (prepare environment: 0.4s)."),
    ],
)
def test_the_others_are_ready_by_their_own_words_and_no_model_is_waited_for(
    where: dict[str, str], bare_guard: Path, ui: str, entry: str, alive: str, says: str
) -> None:
    # As seen with the real ones: both load a model with the first picture.
    places = find_places(find_ui(ui), **where)
    places.python.parent.mkdir(parents=True)
    places.python.symlink_to(sys.executable)
    places.code.mkdir(parents=True)
    (places.code / entry).write_text(OTHER_UI.replace("SAYS", repr(says)).replace("ALIVE", repr(alive)))
    started = time.monotonic()
    with launch(LaunchConfig(ui=ui, port=free_port(), wait_s=60, **where), machine=CPU) as running:
        assert running.alive()
        assert running.model_loaded is None
        assert time.monotonic() - started < 60, "waiting for the model would take two minutes"


# ----------------------------------------------------------------------------------------------- crashes and logs


@pytest.mark.parametrize(
    ("code", "line", "said"),
    [
        (1, "OSError: Cannot find empty port in range: 7860-7860", "its port is in use"),
        (1, "RuntimeError: Cannot add middleware after an application has started", "before it was ready"),
        (
            1,
            "RuntimeError: CUDA error: no kernel image is available for execution on the device",
            "no code for this GPU",
        ),
        (1, "RuntimeError: operator torchvision::nms does not exist", "do not match"),
        (1, "OSError: [Errno 107] Transport endpoint is not connected", "connection to Drive was lost"),
        (1, "Exception: bad file inside model.ckpt: zip213/.format_version", "was refused"),
        (2, "launch.py: error: unrecognized arguments: --xx", "does not know the argument --xx"),
        (-15, "", "was stopped from outside"),
        (-9, "Loading weights", "RAM was not enough"),
        (5, "something new", "Its last line: something new"),
        (5, "", "It printed nothing."),
    ],
)
def test_crashes_become_sentences(code: int, line: str, said: str) -> None:
    err = explain_crash("AUTOMATIC1111", code, [line] if line else [])
    assert said in err.problem
    assert err.hint


def test_a_log_is_read_in_whole_lines_without_progress_bars(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    tail = LogTail(log)
    assert tail.read() == []
    log.write_bytes(b"one\n10%\r50%\r100%\nhal")
    assert tail.read() == ["one", "100%"]
    with log.open("ab") as file:
        file.write(b"f\n\xff\xfe\n")
    assert tail.read()[0] == "half"
    assert "half" in tail.last


# ------------------------------------------------------------------------------------------------- the real Gradio

GRADIO_APP = """
import sys
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
user, password = open(words[words.index("--gradio-auth-path") + 1]).read().split(":")
import gradio
with gradio.Blocks(analytics_enabled=False) as blocks:
    box = gradio.Textbox()
    box.submit(lambda text: text[::-1], box, box, api_name="turn")
blocks.launch(server_port=port, auth=(user, password), prevent_thread_lock=True, quiet=True)
print("Startup time: 1s", flush=True)
print("Model loaded in 1s", flush=True)
blocks.block_thread()
"""


@pytest.mark.slow
def test_a_real_gradio_server_is_started_shared_and_used_with_one_login(
    where: dict[str, str], bare_guard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import base64
    import importlib.util
    import urllib.error
    import urllib.request

    if importlib.util.find_spec("gradio") is None or importlib.util.find_spec("aiohttp") is None:
        pytest.skip("gradio or aiohttp is not installed (pip install gradio aiohttp)")
    import dataclasses

    from fastsd_helpers.processes import Child
    from fastsd_helpers.tunnels import TunnelConfig
    from fastsd_helpers.tunnels.services import kinds
    from fastsd_helpers.webui import share

    def direct(port: int, config: TunnelConfig) -> Any:
        child = Child([sys.executable, "-c", "import time; time.sleep(600)"])
        return kinds.Running(f"http://127.0.0.1:{port}", child)

    def ask(url: str, data: Any = None, **headers: str) -> tuple[int, str]:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(url, data=body, headers={"Content-Type": "application/json", **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as err:
            return err.code, err.read().decode()

    ui = dataclasses.replace(A1111, alive_path="/", guard=str(bare_guard))
    monkeypatch.setattr(sys.modules["fastsd_helpers.webui.running.launching"], "find_ui", lambda key: ui)
    monkeypatch.setitem(kinds.SERVICES, "cloudflared", direct)
    places = find_places(A1111, **where)
    places.python.parent.mkdir(parents=True)
    # The packages of this very environment, which a link alone would not bring along.
    places.python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    places.python.chmod(0o755)
    places.code.mkdir(parents=True)
    (places.code / "launch.py").write_text(GRADIO_APP)
    config = LaunchConfig(port=free_port(), password="ui-password-77", wait_s=250, **where)
    with launch(config, machine=CPU) as running:
        assert ask(f"{running.url}/config")[0] == 401, "Gradio's own login stands"
        tunnel = share(running, TunnelConfig(kind="cloudflared"))
        assert ask(f"{tunnel.url}/config")[0] == 401
        basic = {"Authorization": "Basic " + base64.b64encode(b"fastsd:ui-password-77").decode()}
        status_, text = ask(f"{tunnel.url}/config", **basic)
        assert status_ == 200
        assert '"auth_required":true' not in text.replace(" ", "")
        _, text = ask(f"{tunnel.url}/gradio_api/call/turn", {"data": ["abc"]}, **basic)
        event = json.loads(text)["event_id"]
        # Gradio 4 and later answer with server-sent events.
        _, text = ask(f"{tunnel.url}/gradio_api/call/turn/{event}", **basic)
        assert 'data: ["cba"]' in text


# ----------------------------------------------------------------------------------------------------- the commands


def _run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    from fastsd_helpers.cli import main

    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_the_commands_say_what_would_be_started_and_what_is_not_there(
    where: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--folder", where["folder"], "--store", where["store"]]
    code, out, _ = _run(capsys, "webui", "launch", "--dry-run", "--gpu", "T4", "--family", "sdxl", *places, "--json")
    assert code == 0
    assert "--lowram" in json.loads(out.splitlines()[-1])["lines"][-1]
    assert not Path(where["folder"]).exists(), "a dry run makes nothing"
    for wrong, said in (
        (("--dry-run", "--model", "nothere"), "There is no model 'nothere'"),
        (("--dry-run", "--user", "a b"), "user is 'a b'"),
        (("--dry-run", "--share", "zrok"), "choose auto, ngrok"),
        (("--gpu", "T4"), "Add --dry-run"),
        (("--family", "sdxl"), "Add --dry-run"),
    ):
        code, _, err = _run(capsys, "webui", "launch", *wrong, *places)
        assert (code, said in err) == (2, True), err
    large = Path(where["store"]) / "models" / "Stable-diffusion" / "large.safetensors"
    large.parent.mkdir(parents=True)
    with large.open("wb") as file:
        file.truncate(7 * 10**9)  # only its size is looked at
    code, out, _ = _run(capsys, "webui", "launch", "--dry-run", "--gpu", "T4", *places, "--json")
    assert "--lowram" in json.loads(out.splitlines()[-1])["lines"][-1], "as a start would take it"
    large.unlink()
    code, out, err = _run(capsys, "webui", "launch", *places)
    assert (code, out) == (2, "")
    assert "is not installed" in err
    assert _run(capsys, "webui", "stop", *places)[1] == "It does not run.\n"
    assert _run(capsys, "webui", "status", *places)[1] == "It was not started here.\n"
    code, _, err = _run(capsys, "webui", "status", "--ui", "hlky")
    assert code == 2
    assert "Choose a1111, forge-neo, comfyui." in err
    code, _, err = _run(capsys, "tunnel", str(free_port()), "--kind", "gradio")
    assert code == 2
    assert "Nothing answers on port" in err
    code, _, err = _run(capsys, "tunnel", "80", "--kind", "serveo")
    assert code == 2
    assert "serveo" in err
    code, _, err = _run(capsys, "webui", "place", "canny", "--kind", "controlnet", *places)
    assert code == 2
    assert "--base sd15" in err


def test_automatic1111_lies_where_it_can_serve_its_own_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Gradio 3 answers 403 for every file below a folder whose name begins with a dot."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    assert find_places(A1111).root == tmp_path / "fastsd" / "webui" / "a1111"
    assert find_places(find_ui("comfyui")).root == tmp_path / ".cache" / "fastsd" / "webui" / "comfyui"
    for place in (tmp_path / ".hidden", tmp_path / "a" / ".b" / "c"):
        with pytest.raises(WebUIError, match="begins with a dot") as caught:
            find_places(A1111, folder=place)
        assert "--folder" in caught.value.hint
        assert find_places(find_ui("forge-neo"), folder=place).root == place / "forge-neo"
