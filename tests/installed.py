"""Skip what needs a package that is not installed, without importing it: every collection would pay for the import."""

import importlib.util

import pytest

__all__ = ["require_installed"]


def require_installed(*names: str) -> None:
    """Skip the test module that calls this where one of these packages is missing."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed (pip install {name})", allow_module_level=True)
