"""The login of a web UI's API inside its own process: entered from the private file, told to nobody."""

import argparse
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.processes import environment_for
from fastsd_helpers.webui.guards import api_login, start
from fastsd_helpers.webui.guards.api_login import patches


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_login, "_entered", [])


def options(file: Path | str, *words: str) -> Any:
    """The parsed flags of AUTOMATIC1111 v1.10.1 that a login has to do with, by the same parser."""
    parser = argparse.ArgumentParser()
    for flag in ("--api-auth", "--gradio-auth", "--gradio-auth-path"):
        parser.add_argument(flag, type=str, default=None)
    for flag in ("--api", "--nowebui"):
        parser.add_argument(flag, action="store_true")
    return types.SimpleNamespace(cmd_opts=parser.parse_args([*words, "--gradio-auth-path", str(file)]))


@pytest.mark.parametrize("words", [["--api"], ["--nowebui"], []])
@pytest.mark.parametrize("login", ["fastsd:a-word-of-mine", "me:p&%$!?;/\\()=#~" + "x" * 100, "me:pass\n"])
def test_the_api_has_the_pages_login_whatever_opens_it(login: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "login").write_text(login)
    module = options(tmp_path / "login", *words)
    patches()["modules.shared_cmd_options"](module)
    assert module.cmd_opts.api_auth == login.strip()


@pytest.mark.parametrize("content", [None, "", "nobody", "a:b,c:d", "a:b:c", b"\xff\xfe:x"])
def test_without_a_usable_file_it_does_not_start_and_says_nothing_of_it(content: Any, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "login").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit, match="cannot be set") as caught:
        patches()["modules.shared_cmd_options"](options(tmp_path / "login", "--api"))
    assert not content or str(content) not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("modules.shared_cmd_options", types.SimpleNamespace()),
        ("modules.shared_cmd_options", types.SimpleNamespace(cmd_opts=types.SimpleNamespace(api=True))),
        ("modules.api.api", types.SimpleNamespace()),
        ("modules.api.api", types.SimpleNamespace(Api=object)),
    ],
)
def test_another_version_that_lacks_what_is_patched_does_not_start(
    name: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_login, "_entered", [True])
    with pytest.raises(SystemExit, match="cannot be set"):
        patches()[name](module)


def test_the_api_tells_its_flags_without_the_login(tmp_path: Path) -> None:
    (tmp_path / "login").write_text("me:a-word-of-mine")
    module = options(tmp_path / "login", "--api")
    patches()["modules.shared_cmd_options"](module)

    class Api:
        def get_cmd_flags(self) -> dict[str, Any]:
            return vars(module.cmd_opts)

    patches()["modules.api.api"](types.SimpleNamespace(Api=Api))
    flags = Api().get_cmd_flags()
    assert "a-word-of-mine" not in str(flags)
    assert flags["api"] is True
    assert module.cmd_opts.api_auth == "me:a-word-of-mine", "the API itself still asks for it"


LAUNCHER = """
import sys
print("started as", sys.argv, __name__, sys.path[0])
from modules import shared_cmd_options
print("login", shared_cmd_options.cmd_opts.api_auth)
import modules.api.api
print("told", modules.api.api.Api().get_cmd_flags())
"""
OPTIONS = """
import types, sys
cmd_opts = types.SimpleNamespace(api_auth=None, gradio_auth=None, gradio_auth_path=sys.argv[-1])
"""
API = """
from modules.shared_cmd_options import cmd_opts
class Api:
    def get_cmd_flags(self): return vars(cmd_opts)
"""


def started(root: Path, **files: str) -> subprocess.CompletedProcess[str]:
    """A launcher with modules of these texts, started in a Python that has nothing but its standard library."""
    (root / "code" / "modules" / "api").mkdir(parents=True)
    for name, text in (
        {"launch": LAUNCHER, "modules/shared_cmd_options": OPTIONS, "modules/api/api": API} | files
    ).items():
        if text:
            (root / "code" / f"{name}.py").write_text(text)
    (root / "login").write_text("me:a-word-of-mine")
    command = [sys.executable, "-S", str(start.__file__), "launch.py", "--x", str(root / "login")]
    return subprocess.run(
        command, cwd=root / "code", capture_output=True, text=True, check=False, env=environment_for("web UI")
    )


def test_the_launcher_runs_as_if_it_had_been_started_itself(tmp_path: Path) -> None:
    done = started(tmp_path)
    assert done.returncode == 0, done.stderr
    code = tmp_path / "code"
    assert f"started as ['launch.py', '--x', '{tmp_path / 'login'}'] __main__ {code}" in done.stdout
    assert "login me:a-word-of-mine" in done.stdout
    assert "a-word-of-mine" not in done.stdout.split("told", 1)[1]


@pytest.mark.parametrize(
    "files",
    [
        {"modules/shared_cmd_options": ""},
        {"modules/api/api": ""},
        {"modules/shared_cmd_options": "cmd_opts = None"},
        {"modules/api/api": "class Api: pass"},
        {"modules/api/api": "class Api: get_cmd_flags = None"},
        {
            "launch": "import modules.api.api; print('told')",
            "modules/api/api": "class Api:\n    def get_cmd_flags(s): 1",
        },
    ],
    ids=["no options", "no api", "empty options", "empty api", "no function", "api before options"],
)
def test_a_launcher_of_another_make_is_not_left_running_with_an_open_api(files: dict[str, str], tmp_path: Path) -> None:
    done = started(tmp_path, **files)
    assert done.returncode == 1
    assert "told" not in done.stdout
    assert "is not started" in done.stderr or "cannot be set" in done.stderr
