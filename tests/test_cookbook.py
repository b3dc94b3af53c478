"""The cookbook: wishes with one command each; those that are marked run here as they stand."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from fastsd_helpers.cli import main
from fastsd_helpers.demo import MODEL_FOLDER, SUBJECTS_FOLDER

ROOT = Path(__file__).resolve().parents[1]
COOKBOOK = (ROOT / "docs" / "cookbook.md").read_text(encoding="utf-8")
WISH = re.compile(r"^### (.+?)( ✓)?$\n(.*?)(?=^##|\Z)", re.MULTILINE | re.DOTALL)


def wishes() -> dict[str, tuple[str, bool]]:
    """Heading -> its one command, and whether the page says that tests run it."""
    found = {}
    for heading, marked, text in WISH.findall(COOKBOOK):
        [block] = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        [command] = block.splitlines()
        found[heading] = (command, bool(marked))
    return found


def test_every_wish_has_one_command_of_its_own_and_readme_says_how_many_there_are() -> None:
    assert len(wishes()) >= 25
    assert all(command.startswith("fastsd ") for command, _ in wishes().values())
    assert len({command for command, _ in wishes().values()}) == len(wishes())
    assert f"([{len(wishes())} of these](docs/cookbook.md))" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the things that the commands name."""
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    shutil.copytree(SUBJECTS_FOLDER / "robot", tmp_path / "photos-of-rex")
    (tmp_path / "demo-model").symlink_to(MODEL_FOLDER)
    samples = MODEL_FOLDER.parent / "reader_samples"
    (tmp_path / "lines").mkdir()
    table = (samples / "labels.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "lines" / "labels.csv").write_text("\n".join(table[:5]) + "\n", encoding="utf-8")
    for row in table[1:5]:
        shutil.copy(samples / row.split(",")[0], tmp_path / "lines")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_marked_commands_run_as_they_stand(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for package in ("torch", "diffusers", "transformers"):
        pytest.importorskip(package)
    marked = [command for command, runs in wishes().values() if runs]
    assert len(marked) >= 10
    for command in marked:
        exit_code = main(shlex.split(command)[1:])
        said = capsys.readouterr()
        assert exit_code == 0, f"{command}\n{said.err}"
        assert said.out.strip(), command
    assert len((kitchen / "text" / "lines.jsonl").read_text(encoding="utf-8").splitlines()) == 4
    report = (kitchen / "errors.html").read_text(encoding="utf-8")
    assert "CER" in report
    assert "<img" in report
    assert (kitchen / "demo.safetensors").stat().st_size > 10e6
    captions = kitchen / "Fast-Dreambooth" / "Sessions" / "rex" / "captions"
    assert "a zib robot on the moon\n" in [path.read_text(encoding="utf-8") for path in captions.iterdir()]
