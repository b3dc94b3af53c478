"""The table of known faults fits the code and the tests; putting them back takes minutes and is the script's own."""

import ast
import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("put_faults_back", ROOT / "scripts" / "put_faults_back.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_every_fault_has_its_place_in_the_code_and_changes_it(script: ModuleType) -> None:
    for fault in script.FAULTS:
        path, text = script.find_original(ROOT, fault)  # says itself what is wrong
        changed = text.replace(fault.original, fault.changed)
        assert changed != text
        assert ast.dump(ast.parse(changed, path)) != ast.dump(ast.parse(text, path)), fault.says
    assert len({(fault.file, fault.original, fault.changed) for fault in script.FAULTS}) == len(script.FAULTS)
    assert len({fault.says for fault in script.FAULTS}) == len(script.FAULTS)


def test_every_test_that_is_to_notice_one_is_there_and_quick(script: ModuleType) -> None:
    for fault in script.FAULTS:
        assert fault.tests, fault.says
        for test in fault.tests:
            file, _, name = test.partition("::")
            body = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8")).body
            found = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == name), None)
            assert found is not None, test
            assert not any("mark.slow" in ast.unparse(decorator) for decorator in found.decorator_list), test


def test_a_text_that_moved_or_went_is_told_with_where_it_is(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / script.PACKAGE / "wing").mkdir(parents=True)
    (tmp_path / script.PACKAGE / "wing" / "new.py").write_text("x = 1\n")
    (tmp_path / script.PACKAGE / "twice.py").write_text("y = 2\ny = 2\n")
    moved = script.Fault("a wrong x", "old.py", "x = 1", "x = 2", ("test_x.py::test_x",))
    with pytest.raises(
        script.TableError, match=r"is 0 times in old\.py, and must be there once; it is now in wing/new"
    ):
        script.find_original(tmp_path, moved)
    with pytest.raises(script.TableError, match="no other file has it"):
        script.find_original(tmp_path, dataclasses.replace(moved, original="z = 3"))
    with pytest.raises(script.TableError, match=r"is 2 times in twice\.py"):
        script.find_original(tmp_path, dataclasses.replace(moved, file="twice.py", original="y = 2"))
