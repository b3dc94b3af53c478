"""What people do works with what a Colab image and `fastsd install` bring, and with nothing else that is here."""

import ast
import contextlib
import functools
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

from colab_lists import SETS, image_names, read_image  # noqa: E402
from image_farm import Farm, make_farm  # noqa: E402
from run_notebook import forms_of, with_values  # noqa: E402
from try_images import use_everything  # noqa: E402

from fastsd_helpers.wheels import read_lock  # noqa: E402
from fastsd_helpers.wheels.lockfile import canonical  # noqa: E402

OLDEST, NEWEST = image_names()[0], image_names()[-1]
# The platform's own, which no set brings: PyTorch and what a notebook runs in.
PLATFORM = {
    "torch",
    "torchvision",
    "numpy",
    "ipython",
    "ipywidgets",
    "ipykernel",
    "comm",
    "jupyter-client",
    "packaging",
}
PLATFORM |= {"packaging", "pip", "google-colab", "kaggle-secrets", "pyarrow", "setuptools", "psutil"}
QUICK = ("prepare", "read-auto", "gate", "webui")
# A LoRA is what the notebook trains.
LONG = ("prepare", "train", "sample", "read-page", "teach-lora", "serve", "shrink", "small-page")


def problems(rows: list[dict]) -> list[str]:
    return [f"{row['path']}: {row['said']}" for row in rows if not row["ok"]]


@pytest.fixture(scope="module")
def farm_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Farm]:
    """The Python of an image, made once; nothing is installed into it."""
    return functools.cache(lambda name: make_farm(read_image(name), tmp_path_factory.mktemp("farm") / "python"))


@pytest.mark.parametrize("name", [OLDEST, NEWEST])
def test_only_what_an_image_and_the_sets_bring_is_there(name: str, farm_of: Callable[[str], Farm]) -> None:
    farm = farm_of(name)
    code = "import importlib.util, sys; print([n for n in sys.argv[1:] if importlib.util.find_spec(n)])"
    asked = ["jupyterlab", "playwright", "xdist", "torch", "transformers", "onnxruntime", "nncf"]
    done = subprocess.run([farm.python, "-c", code, *asked], capture_output=True, text=True, check=True)
    there = ast.literal_eval(done.stdout)
    assert there == ["torch", "transformers", "onnxruntime", "nncf"]
    brought = read_image(name).packages.keys() | read_image(name).added().keys() | {"pip"}
    assert farm.brought <= brought
    assert not farm.lent & brought


@pytest.mark.parametrize("name", [OLDEST, NEWEST])
def test_pictures_from_outside_are_prepared_and_read_with_what_an_image_has(
    name: str, farm_of: Callable[[str], Farm], tmp_path: Path
) -> None:
    farm = farm_of(name)
    rows = use_everything(farm.python, tmp_path / "work", paths=QUICK, notebooks=())
    assert [row["path"] for row in rows] == ["pictures", *QUICK]
    assert problems(rows) == []


def test_without_its_set_a_path_says_what_is_missing_so_these_tests_can_fail(tmp_path: Path) -> None:
    sets = tuple(name for name in SETS if name != "trocr-int8")
    farm = make_farm(read_image(NEWEST), tmp_path / "python", sets=sets)
    rows = use_everything(farm.python, tmp_path / "work", paths=("shrink",), notebooks=())
    assert [row["ok"] for row in rows] == [True, False]
    said = (tmp_path / "work" / "shrink.log").read_text(encoding="utf-8")
    assert "fastsd install trocr-int8" in said


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_everything_long_works_with_what_the_newest_image_has(farm_of: Callable[[str], Farm], tmp_path: Path) -> None:
    farm = farm_of(NEWEST)
    assert problems(use_everything(farm.python, tmp_path / "work", paths=LONG, notebooks=())) == []


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "notebook"), [(OLDEST, "trocr"), (NEWEST, "dreambooth"), (NEWEST, "a1111")])
def test_a_notebook_runs_with_what_an_image_has_and_pictures_from_outside(
    name: str, notebook: str, farm_of: Callable[[str], Farm], tmp_path: Path
) -> None:
    farm = farm_of(name)
    rows = use_everything(farm.python, tmp_path / "work", paths=("pictures",), notebooks=(notebook,))
    assert problems(rows) == []


def test_a_notebooks_forms_are_found_by_what_makes_them() -> None:
    cell = "from x import show_form\n\n%pip install y\nrun_form = show_form(RunConfig, restore=session)\nrun_form"
    assert forms_of(cell.replace("%pip install y", "pass")) == {"run_form": ["show_form", "RunConfig", "session"]}
    assert with_values([cell], {"RunConfig": {"a": 1}}) == [cell, "run_form.update(**{'a': 1})"]
    with pytest.raises(SystemExit, match="no form of OtherConfig"):
        with_values([cell], {"OtherConfig": {"a": 1}})


# ------------------------------------------------------------------------------------------------ what belongs where


def third_party_imports() -> dict[str, set[str]]:
    """Top-level module -> files of the library that import it, whatever block it stands in."""
    found: dict[str, set[str]] = {}
    own = set(sys.stdlib_module_names) | {"fastsd_helpers"}
    for path in (ROOT / "fastsd_helpers").rglob("*.py"):
        if "guards" in path.parts:  # run in a web UI's process, with that one's packages
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                if name.split(".")[0] not in own:
                    found.setdefault(name.split(".")[0], set()).add(path.relative_to(ROOT).as_posix())
    return found


def test_every_optional_import_belongs_to_a_set_or_to_the_platform() -> None:
    wanted = {re.match(r"[\w.-]+", text)[0] for item in read_lock().sets for text in item.wanted}
    # An extra that no set of the lock has: it goes onto the machines of a cluster, and no notebook needs it.
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    wanted |= {re.match(r"[\w.-]+", text)[0] for text in extras["ray"]}
    known = {canonical(name) for name in wanted} | PLATFORM
    # What such a package cannot be without is there whenever it is, whatever the version: aiohttp's yarl.
    for name in list(known):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            needs = [text for text in importlib.metadata.requires(name) or () if "extra ==" not in text]
            known |= {canonical(re.match(r"[\w.-]+", text)[0]) for text in needs}
    distributions = importlib.metadata.packages_distributions()
    homeless = {}
    for module, files in third_party_imports().items():
        # Of google, a folder that many share, only Colab's part is imported.
        found = ["google-colab"] if module == "google" else distributions.get(module, [module])
        names = {canonical(name) for name in found}
        if not names & known:
            homeless[module] = sorted(files)
    assert homeless == {}, "name it in a section of requirements-colab.txt"


def test_what_the_lock_may_choose_at_most_is_obeyed_by_it_and_bounds_nobody_else() -> None:
    from packaging.requirements import Requirement

    text = (ROOT / "requirements-colab.txt").read_text(encoding="utf-8")
    bounds = [Requirement(bound) for bound in re.findall(r"^# lock: (\S+)", text, flags=re.MULTILINE)]
    assert bounds
    for item in read_lock().sets:
        for bound in bounds:
            row = item.row(bound.name)
            assert item.own_environment or row is None or bound.specifier.contains(row.version)
    ranges = [text for item in read_lock().sets for text in item.wanted]
    assert not [text for text in ranges if re.search("<|==|~=", text)], "an upper bound stands in a `# lock:` line"


@pytest.mark.parametrize("name", image_names())
def test_every_image_gets_what_reads_pages_and_shrinks_and_keeps_every_version(name: str) -> None:
    image = read_image(name)
    after = image.packages | image.added()
    assert {"onnxruntime", "rapidocr", "nncf", "openvino", "pillow-heif", "pypdfium2", "pyngrok", "uv"} <= after.keys()
    assert {package: after[package] for package in image.packages} == image.packages


# ---------------------------------------------------------------------------------------- what else an image has in it

OLD_TORCHAO = """
import sys, pathlib
site = pathlib.Path(sys.argv[1])
(site / "torchao").mkdir(parents=True)
(site / "torchao" / "__init__.py").write_text("import torch\\ntorch.ones(3).tolist()\\n")
record = site / "torchao-0.10.0.dist-info"
record.mkdir()
(record / "METADATA").write_text("Metadata-Version: 2.1\\nName: torchao\\nVersion: 0.10.0\\n")
sys.path.insert(0, str(site))
"""


def in_a_child(code: str, folder: Path) -> str:
    command = [sys.executable, "-c", OLD_TORCHAO + code, str(folder / "site")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_a_lora_is_made_beside_an_older_torchao_as_colab_has_it(tmp_path: Path) -> None:
    code = """
import torch
from fastsd_helpers.runtime import load_peft
peft = load_peft("The method lora", "none")
net = torch.nn.Sequential(torch.nn.Linear(4, 4))
peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), net)
print(sorted(name for name, _ in net.named_parameters() if "lora_" in name))
"""
    assert in_a_child(code, tmp_path) == "['0.lora_A.default.weight', '0.lora_B.default.weight']"


def test_nothing_is_imported_while_networks_are_made_without_weights(tmp_path: Path) -> None:
    """Colab's torchao calculates when diffusers imports it, which no tensor on `meta` can."""
    code = """
import torch
class Watch:
    asking = False
    def find_spec(self, name, path=None, target=None):
        if not Watch.asking:
            Watch.asking = True
            assert torch.get_default_device().type == "cpu", f"{name} is imported under the meta device"
            Watch.asking = False
sys.meta_path.insert(0, Watch())
from pathlib import Path
from fastsd_helpers import demo
from fastsd_helpers.dreambooth.training.base_model import BaseModel
from fastsd_helpers.registry import find_model
base = BaseModel("demo", Path(demo.__file__).parent / "model", find_model("demo"))
print([len(list(base.build_empty(part).parameters())) > 10 for part in ("unet", "text_encoder")])
"""
    assert in_a_child(code, tmp_path) == "[True, True]"
