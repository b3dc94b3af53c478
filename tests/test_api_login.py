"""The login of a web UI's API inside its own process: entered from the private file, told to nobody."""

import argparse
import types
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.webui.guards.api_login import patches


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
def test_another_version_that_lacks_what_is_patched_does_not_start(name: str, module: Any) -> None:
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
