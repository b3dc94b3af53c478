"""Starts a web UI's own launcher after patches were laid out for its modules: `python start.py ENTRY ARGUMENTS...`.

Run by the web UI's own Python, where this package is not installed: standard library alone, Python 3.10 or newer.
"""

import os
import runpy
import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from typing import Any

__all__ = ["main"]

Patches = dict[str, Callable[[Any], None]]


def main(words: list[str], patches: Patches) -> None:
    """Run the launcher in this process, as if it had been started itself, with its modules patched on their way in.

    Args:
        words: the launcher's file and its arguments.
        patches: for each module by name, what is done with it right after it was imported.
    """
    entry = words[0]
    root = os.path.dirname(os.path.abspath(entry))
    if os.path.isdir(os.path.join(root, "modules")):
        for name in patches:
            if not os.path.isfile(os.path.join(root, *name.split(".")) + ".py"):
                sys.exit(f"{entry} is not started: it has no {name}, which has to be patched.")
    sys.meta_path.insert(0, _Patcher(patches))
    sys.argv = list(words)
    sys.path[0] = root
    runpy.run_path(entry, run_name="__main__")


class _Patcher(MetaPathFinder):
    """Finds a module as Python does by itself, and patches it when its code has run."""

    def __init__(self, patches: Patches) -> None:
        self._patches = patches

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """Find one of the modules to patch; None for any other, which is found in the usual way."""
        if name not in self._patches:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module: Any) -> None:
                execute(module)
                self._patches[name](module)

            spec.loader.exec_module = execute_and_patch
        return spec


def _patches() -> Patches:
    import api_login  # beside this file, by its bare name: there is no package here

    return api_login.patches()


if __name__ == "__main__":
    main(sys.argv[1:], _patches())
