"""The error tree: two calm parts, an exit code, and a docstring that draws the tree as it is."""

import inspect

import pytest

from fastsd_helpers import errors
from fastsd_helpers.errors import DependencyMissing, FastSDError, needs_package

CLASSES = [kind for name in errors.__all__ if isinstance(kind := getattr(errors, name), type)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_has_a_problem_a_hint_and_an_exit_code(kind: type[FastSDError]) -> None:
    err = kind("The value is 3.", "Give 2.")
    assert isinstance(err, FastSDError)
    assert (err.problem, err.hint) == ("The value is 3.", "Give 2.")
    assert str(err) == "The value is 3.\nGive 2."
    assert str(kind("The value is 3.")) == "The value is 3."
    assert err.exit_code in (1, 2, 130)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_notebook_shows_two_calm_lines(kind: type[FastSDError]) -> None:
    assert kind("The value is 3.", "Give 2.")._render_traceback_() == ["✗ The value is 3.", "   → Give 2."]
    assert kind("The value is 3.")._render_traceback_() == ["✗ The value is 3."]


def test_an_ipython_kernel_really_shows_only_these_lines(capsys: pytest.CaptureFixture[str]) -> None:
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactiveshell.InteractiveShell()
    shell.run_cell(
        "from fastsd_helpers.errors import SessionNotFound\nraise SessionNotFound('No cat.', 'Choose: dog.')"
    )
    shown = "".join(capsys.readouterr())
    assert "✗ No cat.\n   → Choose: dog." in shown
    assert "Traceback" not in shown


def test_failures_of_ours_and_stops_have_their_own_exit_codes() -> None:
    codes = {kind.__name__: kind.exit_code for kind in CLASSES if kind.exit_code != 2}
    assert codes == {"VerificationFailed": 1, "TrainingFailed": 1, "Interrupted": 130}


def test_the_docstring_draws_the_tree_as_it_is() -> None:
    drawn: dict[int, str] = {}
    found = {}
    for line in inspect.getdoc(errors).splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if name in {kind.__name__ for kind in CLASSES}:
            depth = len(line) - len(line.lstrip(" │├└─"))
            drawn[depth] = name
            found[name] = next((drawn[level] for level in sorted(drawn, reverse=True) if level < depth), "Exception")
    assert found == {kind.__name__: kind.__base__.__name__ for kind in CLASSES}


def test_a_package_that_is_there_and_fails_is_told_from_one_that_is_missing() -> None:
    def said(err: ImportError) -> str:
        with pytest.raises(DependencyMissing) as caught, needs_package("The page", "Run: pip install x"):
            raise err
        return str(caught.value)

    assert said(ModuleNotFoundError("No module named 'x'", name="x")).startswith("The page needs the package x, which")
    assert "cannot be loaded: cannot import name 'a' from 'b'." in said(ImportError("cannot import name 'a' from 'b'"))
    assert "pip install socksio" in said(ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."))
