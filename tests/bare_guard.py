"""A guard for doubles of web UIs, which have none of the functions that the real guards want: the API's login alone."""

import dataclasses
from pathlib import Path

import pytest

from fastsd_helpers.webui import catalog

__all__ = ["in_code", "use_bare_guard"]

_GUARDS = str(Path(catalog.__file__).parent / "guards")
_GUARD = f"import sys; sys.path.insert(0, {_GUARDS!r}); import api_login; from frame import run; run()"


def use_bare_guard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let every web UI be started by this guard from now on; returns its file."""
    path = folder / "bare_guard.py"
    path.write_text(_GUARD, encoding="utf-8")
    guarded = [dataclasses.replace(ui, guard=str(path)) for ui in catalog.uis()]
    monkeypatch.setattr(catalog, "_table", lambda: guarded)
    return path


def in_code(path: Path) -> str:
    """The same for another process: code to put before what it runs."""
    return (
        "import dataclasses; from fastsd_helpers.webui import catalog\n"
        f"guarded = [dataclasses.replace(ui, guard={str(path)!r}) for ui in catalog.uis()]\n"
        "catalog._table = lambda: guarded\n"
    )
