"""The login of a web UI's API inside its own process: entered from the private file, told to nobody."""

import subprocess
import sys
from pathlib import Path

import pytest

from fastsd_helpers.processes import environment_for
from fastsd_helpers.webui import LaunchConfig, find_ui, plan

GUARDS = Path(__file__).resolve().parents[1] / "fastsd_helpers" / "webui" / "guards"
GUARD = f"import sys; sys.path.insert(0, {str(GUARDS)!r}); import api_login; from frame import run; run()"
# The flags of AUTOMATIC1111 v1.10.1 and Forge that a login has to do with, by the same parser.
OPTIONS = """
import argparse
parser = argparse.ArgumentParser()
for flag in ("--api-auth", "--gradio-auth", "--gradio-auth-path"):
    parser.add_argument(flag, type=str, default=None)
for flag in ("--api", "--nowebui"):
    parser.add_argument(flag, action="store_true")
cmd_opts = parser.parse_args()
"""
API = """
from modules.shared_cmd_options import cmd_opts
class Api:
    def get_cmd_flags(self): return vars(cmd_opts)
"""
LAUNCHER = """
import sys
print("started as", sys.argv[0], __name__, sys.path[0])
from modules import shared_cmd_options
print("login", shared_cmd_options.cmd_opts.api_auth)
import modules.api.api
print("told", modules.api.api.Api().get_cmd_flags())
"""


def started(
    root: Path, *words: str, login: bytes | None = b"me:a-word-of-mine", **files: str
) -> "subprocess.CompletedProcess[str]":
    """A launcher with modules of these texts, run by a guard in a Python that has nothing but its standard library."""
    (root / "code" / "modules" / "api").mkdir(parents=True)
    usual = {"launch": LAUNCHER, "modules/shared_cmd_options": OPTIONS, "modules/api/api": API}
    for name, text in (usual | files).items():
        if text:
            (root / "code" / f"{name}.py").write_text(text)
    if login is not None:
        (root / "login").write_bytes(login)
    command = [sys.executable, "-S", "-c", GUARD, "launch.py", *words, "--gradio-auth-path", str(root / "login")]
    return subprocess.run(
        command, cwd=root / "code", capture_output=True, text=True, check=False, env=environment_for("web UI")
    )


@pytest.mark.parametrize("words", [["--api"], ["--nowebui"], []])
@pytest.mark.parametrize("login", ["fastsd:a-word-of-mine", "me:p&%$!?;/\\()=#~" + "x" * 100, "me:pass\n"])
def test_the_api_has_the_pages_login_whatever_opens_it_and_tells_it_to_nobody(
    login: str, words: list[str], tmp_path: Path
) -> None:
    done = started(tmp_path, *words, login=login.encode())
    assert done.returncode == 0, done.stderr
    assert f"started as launch.py __main__ {tmp_path / 'code'}" in done.stdout
    before, told = done.stdout.split("told", 1)
    assert f"login {login.strip()}\n" in before
    assert login.strip() not in told
    assert "'api_auth': None" in told


@pytest.mark.parametrize("content", [None, b"", b"nobody", b"a:b,c:d", b"a:b:c", b"\xff\xfe:x"])
def test_without_a_usable_file_it_does_not_start_and_says_nothing_of_it(content: bytes | None, tmp_path: Path) -> None:
    done = started(tmp_path, "--api", login=content)
    assert done.returncode == 3
    assert "the web UI is not started without it" in done.stderr
    assert not content or content not in done.stderr.encode()


@pytest.mark.parametrize(
    "files",
    [
        {"modules/shared_cmd_options": "cmd_opts = None"},
        {"modules/shared_cmd_options": "other = None"},
        {"modules/api/api": "class Api: pass"},
        {"modules/api/api": "class Api:\n def get_cmd_flags(self, more): return {}"},
        {
            "launch": "import modules.api.api; print('told')",
            "modules/api/api": "class Api:\n def get_cmd_flags(self): 1",
        },
    ],
    ids=["empty options", "no options", "no function", "another function", "api before options"],
)
def test_a_launcher_of_another_make_is_not_left_running_with_an_open_api(files: dict[str, str], tmp_path: Path) -> None:
    done = started(tmp_path, **files)
    assert done.returncode == 3
    assert "told" not in done.stdout
    assert "the web UI is not started without it" in done.stderr


@pytest.mark.parametrize("key", ["a1111", "forge-neo"])
def test_those_with_an_api_are_started_by_a_guard_that_enters_it(key: str, tmp_path: Path) -> None:
    guard = Path(plan(LaunchConfig(ui=key, folder=str(tmp_path), store=str(tmp_path))).command[2])
    assert guard == GUARDS / find_ui(key).guard
    assert "\nimport api_login\n" in guard.read_text(encoding="utf-8")
