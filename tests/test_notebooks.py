"""The notebooks keep to their shape, and run from start to end on a CPU with untouched or tiny settings."""

import ast
import builtins
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.forms.desk import MAKERS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REPOSITORY = PROJECT["tool"]["fastsd"]["repository"]
LONGEST_CELL = 12
# The one cell that has to be longer and hold logic: it finds the library, so it cannot call it. test_first_cell.py has
# its rules.
FIRST_CELL = "# @title 1 · Set up\n"
# What a cell may use from the cells before it.
SHARED = {*MAKERS}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def source_of(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def code_cells(path: Path) -> list[str]:
    return [source_of(cell) for cell in read(path)["cells"] if cell["cell_type"] == "code"]


def titles(path: Path) -> list[str]:
    """The numbers of the code cells: 1, 2a, 2b ..."""
    return [source.removeprefix("# @title ").split()[0] for source in code_cells(path)]


def without_magics(source: str) -> str:
    return re.sub(r"^(\s*)%.*$", r"\1pass", source, flags=re.MULTILINE)


def names_read(source: str) -> set[str]:
    """Names a cell reads and does not make itself."""
    tree = ast.parse(without_magics(source))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    return {node.id for node in names if isinstance(node.ctx, ast.Load)} - made - set(dir(builtins))


def test_there_is_a_notebook_to_look_at() -> None:
    assert (ROOT / "notebooks" / "dreambooth.ipynb") in NOTEBOOKS


@each_notebook
def test_the_file_is_canonical_json_without_outputs(path: Path) -> None:
    notebook = read(path)
    canonical = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert path.read_text(encoding="utf-8") == canonical
    for cell in notebook["cells"]:
        assert set(cell["metadata"]) <= {"cellView", "colab"}, "other metadata are lost when Colab saves the notebook"
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None


@each_notebook
def test_it_opens_with_one_title_its_own_badge_and_two_sentences(path: Path) -> None:
    cells = read(path)["cells"]
    first = source_of(cells[0])
    everything = "\n".join(source_of(cell) for cell in cells if cell["cell_type"] == "markdown")
    assert first.startswith("# ")
    assert len(re.findall(r"^# ", everything, flags=re.MULTILINE)) == 1
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    own_place = f"https://colab.research.google.com/github/{owner_and_name}/blob/main/{path.relative_to(ROOT)}"
    assert f"]({own_place})" in first, "the badge must open this very notebook"
    overview = first.rsplit("\n\n", 1)[-1]
    assert len(re.findall(r"[.!](?=\s|$)", overview)) == 2


@each_notebook
def test_every_code_cell_is_short_titled_and_follows_a_text(path: Path) -> None:
    cells = read(path)["cells"]
    seen_text = False
    for cell in cells:
        if cell["cell_type"] == "markdown":
            seen_text = True
            continue
        source = source_of(cell)
        assert seen_text
        assert source.startswith("# @title "), source
        assert len(source.splitlines()) <= (25 if source.startswith(FIRST_CELL) else LONGEST_CELL), source


@each_notebook
def test_a_cell_holds_no_logic_of_its_own(path: Path) -> None:
    assert code_cells(path)[0].startswith(FIRST_CELL)
    for source in code_cells(path)[1:]:
        assert not re.search(r"^\s*[!%]", source, flags=re.MULTILINE), "no shell commands, no magics"
        tree = ast.parse(without_magics(source))
        forbidden = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.Try, ast.Lambda, ast.ListComp)
        assert not [node for node in ast.walk(tree) if isinstance(node, forbidden)], source
        assert "input(" not in source
        assert names_read(source) <= SHARED, source


@each_notebook
def test_nothing_but_the_library_installs_anything(path: Path) -> None:
    for source in code_cells(path):
        assert not re.search(r"\bpip\b|subprocess|os\.system", source), source
    version = PROJECT["project"]["version"]
    assert f'VERSION, ARCHIVE, PART, here = "{version}", "{REPOSITORY}/archive/' in code_cells(path)[0]


@each_notebook
def test_the_readme_lists_it_and_every_link_to_the_project_is_the_one_address(path: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"notebooks/{path.name}" in readme
    owner_and_name = REPOSITORY.removeprefix("https://github.com/")
    for text in (readme, path.read_text(encoding="utf-8")):
        for found in re.findall(r"github(?:\.com)?/([\w-]+/fastsd_helpers)", text):
            assert found == owner_and_name


def test_every_other_file_that_names_the_project_names_the_one_address() -> None:
    files = [ROOT / "pyproject.toml", ROOT / "CHANGELOG.md", *(ROOT / "fastsd_helpers").rglob("*.py")]
    addresses = {
        found
        for path in files
        for found in re.findall(r"https://github\.com/[\w-]+/fastsd_helpers", path.read_text(encoding="utf-8"))
    }
    assert addresses == {REPOSITORY}


# --------------------------------------------------------------------------------------------------- run

TINY = {
    "DreamBoothConfig": {"unet_steps": 2, "text_encoder_steps": 2, "sample_every": 0, "batch_size": 1},
}


def run_notebook(
    path: Path, folder: Path, *, changes: dict[str, dict[str, Any]], widgets: Path | None = None, times: int = 1
) -> Any:
    """Run a copy of a notebook, with `..._form.update(...)` after the cells that show a form.

    With `times` all of its cells are run again in the same kernel, as "Run all" does.
    """
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = without_magics(cell.source)
        cells.append(cell)
        for settings, values in changes.items() if cell.cell_type == "code" else ():
            made = re.search(rf"^(\w+) = .*\b{settings}\b", cell.source, flags=re.MULTILINE)
            if made:
                cells.append(nbformat.v4.new_code_cell(f"{made[1]}.update(**{values!r})"))
    notebook.cells = [cell.copy() for _ in range(times) for cell in cells]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    paths = [str(widgets)] if widgets else []
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*paths, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    return notebook


def widgets7() -> Path:
    """The folder with Colab's ipywidgets 7.7.1, for a kernel to find first."""
    overlay = ROOT / ".venv-ipywidgets7"
    if not overlay.is_dir():
        pytest.skip(f"{overlay.name} is not there; `make setup` makes it")
    return overlay


def output_of(notebook: Any) -> str:
    return json.dumps([cell.get("outputs", []) for cell in notebook.cells])


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_dreambooth_runs_twice_and_after_a_restart_with_the_same_session(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    path = ROOT / "notebooks" / "dreambooth.ipynb"
    shown = output_of(run_notebook(path, tmp_path, changes=TINY, widgets=widgets7(), times=2))
    assert "✗" not in shown
    folder = tmp_path / "Fast-Dreambooth" / "Sessions" / "my-subject"
    made = list((folder / "exports").glob("*.safetensors"))
    assert len(made) == 1
    assert made[0].name in shown, "in the sentence of the last cell"
    # The live view is a widget, whose text is in no cell's output: the run's own log has the same sentences.
    log = (folder / "logs" / "train.log").read_text(encoding="utf-8")
    assert "This run is already finished" in log, "the second time nothing is trained"
    before = json.loads((folder / "session.json").read_text())
    assert before["forms"]["DreamBoothConfig"]["unet_steps"] == 2
    # On another platform, whose ipywidgets is an 8.
    again = output_of(run_notebook(path, tmp_path, changes={}))
    after = json.loads((folder / "session.json").read_text())
    assert "Resuming my-subject" in again
    assert (after["id"], after["result"]) == (before["id"], before["result"])


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_trocr_runs_twice_with_the_same_session(tmp_path: Path) -> None:
    for package in ("nbclient", "openvino", "nncf", "jiwer"):
        pytest.importorskip(package)
    write_reader(tmp_path / "reader", "stage1", spread=0.15, end=2.0)
    lines = tmp_path / "lines"
    lines.mkdir()
    rows = ["file_name,text,group"]
    for place, picture in enumerate(noise_pictures(12)):
        picture.save(lines / f"{place}.png")
        rows.append(f"{place}.png,{place % 3},w{place // 2}")
    (lines / "labels.csv").write_text("\n".join(rows))
    changes = {
        "show_lines_form": {"images": str(lines), "reader": str(tmp_path / "reader"), "max_new_tokens": 6},
        "show_teach_form": {"data": str(lines), "epochs": 2, "augment": False},
    }
    shown = output_of(
        run_notebook(ROOT / "notebooks" / "trocr.ipynb", tmp_path, changes=changes, widgets=widgets7(), times=2)
    )
    assert shown.count("12 lines read") == 2
    assert shown.count("lines that were held out: <b>") == 2, "before and after, twice"
    assert "This fine-tuning is already finished" in shown, "the second time nothing is trained"
    assert "It is there already" in shown, "nor shrunk"
    assert not re.search(r"PosixPath|Writing model shards|Traceback|UserWarning", shown)
    folder = tmp_path / "Fast-TrOCR" / "Sessions" / "my-handwriting"
    assert len((folder / "text.txt").read_text(encoding="utf-8").splitlines()) == 12
    assert len(list((folder / "fine-tuned").glob("*/model/model.safetensors"))) == 1
    report = json.loads((folder / "session.json").read_text(encoding="utf-8"))["int8_report"]
    assert (folder / "int8" / "openvino" / "decoder.xml").is_file() is (report["chosen"] != "fp32")
    # In a new kernel, with ipywidgets 8, "Run all" goes on with that session, with what was entered in it.
    again = output_of(run_notebook(ROOT / "notebooks" / "trocr.ipynb", tmp_path, changes={}))
    assert "Resuming my-handwriting" in again
    assert "12 lines read" in again
    assert "This fine-tuning is already finished" in again
    assert len([path for path in folder.parent.iterdir() if path.is_dir()]) == 1


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(900)
def test_trocr_reads_a_page_a_pdf_and_a_heic_of_ones_own(tmp_path: Path) -> None:
    for package in ("nbclient", "rapidocr", "pypdfium2"):
        pytest.importorskip(package)
    pytest.importorskip("pillow_heif").register_heif_opener()
    from PIL import Image, ImageDraw, ImageFont

    page = Image.new("RGB", (900, 760), "white")
    for row in range(4):
        place = (80, 100 + 140 * row)
        ImageDraw.Draw(page).text(place, f"The quick fox {row}", font=ImageFont.load_default(44), fill="black")
    kinds = ("drawn.png", "printed.pdf", "taken.heic")
    (tmp_path / "pages").mkdir()
    for kind in kinds:
        page.save(tmp_path / "pages" / kind)
    write_reader(tmp_path / "reader", "stage1", spread=0.15, end=2.0)
    changes = {"show_lines_form": {"images": str(tmp_path / "pages"), "reader": str(tmp_path / "reader")}}
    shown = output_of(run_notebook(ROOT / "notebooks" / "trocr.ipynb", tmp_path, changes=changes))
    assert "12 lines read" in shown
    assert "Nothing was trained: No line has been corrected yet" in shown
    text = (tmp_path / "Fast-TrOCR" / "Sessions" / "my-handwriting" / "text.csv").read_text(encoding="utf-8-sig")
    assert [text.count(kind) for kind in kinds] == [4, 4, 4]


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(1800)
def test_trocr_run_all_untouched_teaches_the_demo_reader_a_hand(tmp_path: Path) -> None:
    for package in ("nbclient", "openvino", "nncf", "jiwer"):
        pytest.importorskip(package)
    if not (ROOT / "fastsd_helpers" / "demo" / "reader_model").is_dir():
        pytest.skip("the demo reader is not there; scripts/train_demo_reader.py makes it")
    shown = output_of(run_notebook(ROOT / "notebooks" / "trocr.ipynb", tmp_path, changes={}))
    assert "built-in sample lines are read" in shown
    run = next((tmp_path / "Fast-TrOCR" / "Sessions" / "my-handwriting" / "fine-tuned").glob("*/result.json"))
    result = json.loads(run.read_text(encoding="utf-8"))
    assert result["cer_after"] < result["cer_before"]
