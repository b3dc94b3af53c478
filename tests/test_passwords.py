"""The password of a link or a web UI: where it may come from, what wins, and that no way shows it."""

import io
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.cli import main
from fastsd_helpers.cli.flags import given_values
from fastsd_helpers.cli.parser import parse
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.trocr.reading.serve import ServeConfig
from fastsd_helpers.tunnels import TunnelConfig, choose_login
from fastsd_helpers.webui import LaunchConfig

SIGNS = "!#$%&()*+-./;<=>?@[]^_`{|}~\\"
LONG = (SIGNS * 5)[:128]


@pytest.fixture(autouse=True)
def _no_password_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTSD_PASSWORD", raising=False)


@pytest.fixture
def password_file(tmp_path: Path) -> Path:
    path = tmp_path / "password"
    path.write_text("a-word-in-a-file\n")
    path.chmod(0o600)
    return path


def given(*words: str, settings: Any = LaunchConfig, command: tuple[str, ...] = ("webui", "launch")) -> str | None:
    return settings(**given_values(parse([*command, *words]), settings)).password


def refusal(*words: str) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        given(*words)
    return caught.value


# -------------------------------------------------------------------------------------------------- what wins


def test_what_is_given_wins_over_the_environment_and_that_over_one_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    made = choose_login("me").password
    assert len(made) == 19
    assert made != choose_login("me").password
    monkeypatch.setenv("FASTSD_PASSWORD", " from-the-environment ")
    assert choose_login("me").password == "from-the-environment"
    assert choose_login("me", "").password == "from-the-environment"
    assert choose_login("me", "given-by-hand").password == "given-by-hand"


@pytest.mark.parametrize(
    "bad",
    ["short", "with a blank", "no-text-\udcff-inside", "with:colon-in-it", "x" * 129, "with,comma", "with'quote-"],
)
def test_a_bad_password_of_the_environment_is_named_after_it_and_not_shown(
    bad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTSD_PASSWORD", bad)
    with pytest.raises(SettingsError, match=r"^FASTSD_PASSWORD: The password") as caught:
        choose_login("me")
    assert bad not in str(caught.value)
    with pytest.raises(SettingsError, match=r"^user is"):
        choose_login("no user")


@pytest.mark.parametrize(
    ("command", "settings"),
    [(("webui", "launch"), LaunchConfig), (("tunnel", "7860"), TunnelConfig), (("trocr", "serve"), ServeConfig)],
)
def test_a_file_or_standard_input_gives_it_to_every_command(
    command: tuple[str, ...], settings: Any, password_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert given("--password-file", str(password_file), settings=settings, command=command) == "a-word-in-a-file"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from-the-input\r\nmore")))
    assert given("--password-file", "-", settings=settings, command=command) == "from-the-input"
    assert given(settings=settings, command=command) is None


def test_the_playground_takes_it_too(password_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def open_playground(model: str, config: Any, *, tunnel: Any = None) -> Any:
        seen.append((config.share, tunnel))
        raise SettingsError("enough")

    monkeypatch.setattr("fastsd_helpers.playground.open_playground", open_playground)
    assert main(["playground", "--share", "ngrok", "--password-file", str(password_file)]) == 2
    assert (seen[0][0], seen[0][1].kind, seen[0][1].password) == ("ngrok", "ngrok", "a-word-in-a-file")


# ----------------------------------------------------------------------------------------------- the file itself


@pytest.mark.parametrize("newline", ["", "\n", "\r\n", "\nsecond line\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_the_first_line_counts_with_any_signs(start: str, newline: str, tmp_path: Path) -> None:
    (tmp_path / "p").write_bytes(f"{start}{LONG}{newline}".encode())
    assert given("--password-file", str(tmp_path / "p")) == LONG


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "has no password in its first line"),
        (b"\n a-good-one-below\n", "has no password in its first line"),
        (b"short\n", "has 5 characters"),
        (b"two words here\n", "contains a space"),
        (b"trailing-blank \n", "contains a space"),
        (b"user:password\n", "contains a space, comma, colon, quote"),
        (b"\xff\xfe\x00binary", "is not UTF-8 text"),
        (b"x" * 5000, "has 4096 characters"),
        (b"a-null-\x00-inside", "control character"),
        (b"a-bell-\x07-inside", "control character"),
    ],
)
def test_an_odd_file_is_one_sentence_that_names_it_and_not_the_word(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "the-file"
    path.write_bytes(content)
    refused = refusal("--password-file", str(path))
    assert said in refused.problem
    assert str(path) in refused.problem
    assert refused.hint
    for word in content.decode(errors="ignore").split():
        assert word not in str(refused).replace(str(path), "") or len(word) < 4


def test_files_that_cannot_be_read_are_sentences(tmp_path: Path) -> None:
    assert "No such file" in refusal("--password-file", str(tmp_path / "none")).problem
    assert "Is a directory" in refusal("--password-file", str(tmp_path)).problem
    assert "both set the password" in refusal("--password-file", "x", "--ask-password").problem


def test_others_who_can_read_the_file_are_named(
    password_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    caplog.set_level(logging.WARNING, "fastsd_helpers")
    given("--password-file", str(password_file))
    assert not caplog.text
    password_file.chmod(0o644)
    given("--password-file", str(password_file))
    assert f"chmod 600 {password_file}" in caplog.text
    assert "a-word-in-a-file" not in caplog.text


def test_a_pipe_of_the_shell_is_a_file_too(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"out-of-a-password-manager\n")
    os.close(writing)
    try:
        assert given("--password-file", f"/dev/fd/{reading}") == "out-of-a-password-manager"
    finally:
        os.close(reading)


# ------------------------------------------------------------------------------------------------ being asked


def test_it_is_asked_for_on_a_terminal_only_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "There is no terminal to ask" in refusal("--ask-password").problem
    asked = []
    monkeypatch.setattr(sys, "stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("getpass.getpass", lambda words: asked.append(words) or "typed-in-secret")
    chosen = parse(["webui", "launch", "--ask-password"])
    for settings in (LaunchConfig, TunnelConfig):
        assert settings(**given_values(chosen, settings)).password == "typed-in-secret"
    assert len(asked) == 1
    monkeypatch.setattr("getpass.getpass", lambda words: "")
    assert "no password" in refusal("--ask-password").problem


# ------------------------------------------------------------------------------------- never on the command line


@pytest.mark.parametrize("command", [["webui", "launch"], ["tunnel", "7860"], ["playground"], ["trocr", "serve"], []])
@pytest.mark.parametrize(
    "typed",
    [
        ["--password", "hunter22"],
        ["--password=hunter22"],
        ["--PASSWORD=hunter22"],
        ["-password", "hunter22"],
        ["--passwd", "hunter22"],
        ["--pass", "hunter22"],
        ["--pw=hunter22"],
        ["--auth", "me:hunter22"],
        ["--api-auth=me:hunter22"],
        ["--gradio-auth", "me:hunter22"],
    ],
)
def test_a_typed_password_is_refused_with_the_ways_there_are(
    command: list[str], typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, *typed]) == 2
    out, err = capsys.readouterr()
    for way in ("--password-file FILE", "--ask-password", "FASTSD_PASSWORD"):
        assert way in err
    assert "Did you mean" not in err
    assert "hunter22" not in out + err


@pytest.mark.parametrize(
    "typed", ["--hf-token", "--ngrok-token", "--token", "--civitai-token", "--api-key", "--secret"]
)
def test_a_typed_token_is_refused_too(typed: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([typed, "abc123456"], [f"{typed}=abc123456"], ["--json", f"{typed}=abc123456"]):
        assert main(["tunnel", "7860", *words]) == 2
        out, err = capsys.readouterr()
        assert "HF_TOKEN, CIVITAI_TOKEN, NGROK_AUTHTOKEN" in err
        assert "abc123456" not in out + err


def test_an_unknown_flag_is_named_without_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tunnel", "7860", "--my-passcode=hunter22"]) == 2
    out, err = capsys.readouterr()
    assert "does not accept '--my-passcode'" in err
    assert "hunter22" not in out + err


def test_words_that_only_look_like_it_pass() -> None:
    chosen = parse(["webui", "launch", "--extra-args", "--token-merging-ratio 0.5", "--user", "password"])
    assert chosen.extra_args == "--token-merging-ratio 0.5"
    assert given("--user", "token") is None
