"""No public name, setting, flag or help text comes or goes unseen: all are compared with recorded texts."""

import json
import re
from pathlib import Path

import pytest
import snapshots

import fastsd_helpers.captions.prompts
import fastsd_helpers.cli.parser
from fastsd_helpers.downloads.table import read_table

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
# What is promised to those who write programs on top, under these names and no others.
PROMISED = (
    "checkpoints.convert",
    "checkpoints.inspect",
    "demo.MODEL_FOLDER",
    "demo.SUBJECTS_FOLDER",
    "downloads.fetch",
    "dreambooth.DreamBoothConfig",
    "dreambooth.train",
    "forms.show_form",
    "sessions.Session",
    "trocr.Reader",
    "tunnels.Gate.close",
    "tunnels.Gate.port",
    "tunnels.Gate.set_public_url",
    "tunnels.Gate.url",
    "tunnels.make_login",
    "tunnels.open_gate",
    "tunnels.open_tunnel",
    "wheels.install",
)


def recorded(name: str) -> list[str]:
    return (snapshots.DATA / name).read_text(encoding="utf-8").splitlines()


def recorded_names() -> set[str]:
    """The dotted names of the recorded public surface."""
    return {re.match(r"[\w.]+", line)[0] for line in recorded("public_surface.txt")}


@pytest.mark.parametrize("name", snapshots.renderers())
def test_nothing_that_others_rely_on_comes_or_goes_unseen(name: str) -> None:
    changes = snapshots.differences(recorded(name), snapshots.renderers()[name]())
    shown = "\n".join(changes)
    assert not changes, f"{name} changed (- lost, + came). Where that is meant: {snapshots.RENEW}\n{shown}"


@pytest.mark.parametrize("name", PROMISED)
def test_a_promised_name_is_in_the_recorded_surface(name: str) -> None:
    assert f"fastsd_helpers.{name}" in recorded_names()


def test_what_the_notebooks_import_is_in_the_recorded_surface() -> None:
    # People keep copies of notebooks: a name that one imports stays, even where today's notebook takes another.
    imported = set()
    for path in NOTEBOOKS.glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        source = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        for module, names in re.findall(r"^from (fastsd_helpers[\w.]*) import (.+)$", source, re.MULTILINE):
            imported |= {f"{module}.{name.strip()}" for name in names.split(",")}
    assert len(imported) > 40
    assert imported - recorded_names() == set()


def test_a_lost_a_new_and_a_changed_name_are_each_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastsd_helpers.captions
    before = snapshots.public_surface()

    def words_of(file_name: str, *, lower: bool = False) -> str:
        return file_name

    monkeypatch.setattr(module, "words_of", words_of)
    monkeypatch.setattr(module, "new_name", lambda: None, raising=False)
    monkeypatch.setattr(module, "__all__", [*(name for name in module.__all__ if name != "write_caption"), "new_name"])
    assert sorted(snapshots.differences(before, snapshots.public_surface())) == [
        "+fastsd_helpers.captions.new_name()",
        "+fastsd_helpers.captions.words_of(file_name: str, *, lower: bool = False) -> str",
        "-fastsd_helpers.captions.words_of(file_name: str) -> str",
        "-fastsd_helpers.captions.write_caption(path: Path, caption: str | None) -> None",
    ]


def test_a_lost_flag_and_a_new_command_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshots.help_texts()
    monkeypatch.setitem(read_table("cli/commands.toml")["shared"], "root", {})
    lost = snapshots.differences(before, snapshots.help_texts())
    assert len(lost) > 5
    assert all(line.startswith("-") and " --root DIR" in line for line in lost)
    more = fastsd_helpers.cli.parser.build_parser()
    group = next(action for action in more._actions if hasattr(action, "add_parser"))
    group.add_parser("sing", help="a song")
    came = [line for parser in snapshots.commands(more) if (line := parser.prog) == "fastsd sing"]
    assert came == ["fastsd sing"]


def test_every_help_text_that_is_printed_has_the_recorded_words() -> None:
    # The recorded texts are read from the parser's data; what a user sees must hold them, whatever the layout.
    blocks: dict[str, list[str]] = {}
    prog = ""
    for line in recorded("help_texts.txt"):
        if line.startswith("  "):
            blocks[prog].append(line.strip().removeprefix(f"{prog} "))
        else:
            prog, _, about = line.partition(": ")
            blocks[prog] = [f": {about}"]
    assert set(blocks) == {parser.prog for parser in snapshots.commands()}
    for parser in snapshots.commands():
        printed = "".join(parser.format_help().split())
        for line in blocks[parser.prog]:
            name, _, about = line.partition(": ")
            assert name.partition(" ")[0].rstrip(",") in printed, f"{parser.prog} does not show {name}"
            about = "" if about == "None" else "".join(about.split()).replace("%%", "%")
            assert about in printed, f"{parser.prog} does not show: {about}"


def test_the_environment_is_found_however_it_is_asked() -> None:
    found = snapshots.environment_variables()
    # By get, by `in`, through a name of the module, through our own lookup of secrets, and by setdefault.
    for name in ("FASTSD_MODELS", "COLAB_RELEASE_TAG", "FASTSD_FACE_MODEL", "FASTSD_PASSWORD", "MKL_CBWR"):
        assert name in found
