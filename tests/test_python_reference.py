"""The examples of docs/reference/python.md run as they stand, one after the other, in an empty folder."""

import doctest
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "python.md"
NAMES = (
    "Session prepare train sample export inspect convert fetch Reader read_page finetune quantize install open_tunnel "
    "errors"
)


class _WithoutBars(doctest.OutputChecker):
    """Compares what was printed but the bars of a library that draws them whatever is asked."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        lines = [line for line in got.splitlines(keepends=True) if not line.startswith("Applying ")]
        return super().check_output(want, "".join(lines), optionflags)


@pytest.mark.slow
def test_every_example_of_the_python_reference_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTSD_MODELS", str(tmp_path / "models"))
    flags = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL | doctest.FAIL_FAST
    runner = doctest.DocTestRunner(checker=_WithoutBars(), optionflags=flags)
    text = PAGE.read_text(encoding="utf-8")
    result = runner.run(doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0))
    assert (result.failed, result.attempted >= 40) == (0, True)


def test_each_of_the_fifteen_names_has_an_example():
    text = PAGE.read_text(encoding="utf-8")
    blocks = text.split("\n::: ")[1:]
    assert [block.split("\n")[0].rpartition(".")[2] for block in blocks] == NAMES.split()
    assert all("```pycon\n>>> " in block for block in blocks)
