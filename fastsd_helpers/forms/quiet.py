"""Other libraries say nothing below a notebook's cells: their warnings, advice and bars are for those who program.

What goes wrong is raised as an error and said in words of ours; what takes long has a bar of ours.
"""

import contextlib
import importlib.abc
import importlib.util
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["quieten_libraries"]

# Whoever asked for more by setting one of these gets it.
_SETTINGS = {
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LIBRARIES = (
    "accelerate bitsandbytes cv2 diffusers gradio httpx huggingface_hub matplotlib nncf numpy openvino optimum peft "
    "PIL safetensors tensorboard tokenizers torch torchvision transformers"
)


def quieten_libraries() -> None:
    """Silence the libraries that this one uses, for this kernel; what the user's own cells warn of is still shown."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    libraries = _LIBRARIES.split()
    for name in libraries:
        logging.getLogger(name).setLevel(logging.ERROR)
    # Also what they lay at our door by `stacklevel`: a user can do nothing about a deprecation inside this library.
    warnings.filterwarnings("ignore", module=rf"({'|'.join([*libraries, 'fastsd_helpers'])})(\.|$)")
    for name, act in _AFTER_IMPORT.items():
        if name in sys.modules:
            act(sys.modules[name])
    if not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _no_bar_of_ours(module: ModuleType) -> None:
    """transformers, diffusers and huggingface_hub each have a switch of their own."""
    for name in ("disable_progress_bar", "disable_progress_bars"):
        switch = getattr(module, name, None)
        if switch is not None:
            switch()


def _no_nncf_bar(module: ModuleType) -> None:
    """nncf has no switch: its bar is made without one being drawn."""
    bar = module.track
    make = bar.__init__

    def make_hidden(self: Any, *args: Any, **values: Any) -> None:
        make(self, *args, **values | {"disable": True})

    if not getattr(bar, "fastsd_hidden", False):
        bar.__init__, bar.fastsd_hidden = make_hidden, True


def _errors_alone(module: ModuleType) -> None:
    """nncf sets the level of its log when it is imported."""
    logging.getLogger("nncf").setLevel(logging.ERROR)


_AFTER_IMPORT: dict[str, Callable[[ModuleType], None]] = {
    "diffusers.utils.logging": _no_bar_of_ours,
    "huggingface_hub.utils.tqdm": _no_bar_of_ours,
    "nncf.common.logging.logger": _errors_alone,
    "nncf.common.logging.track_progress": _no_nncf_bar,
    "transformers.utils.logging": _no_bar_of_ours,
}


class _AfterImport(importlib.abc.MetaPathFinder):
    """Quietens a library when it is imported, which may be long after the notebook's first cell."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        act = _AFTER_IMPORT.get(fullname)
        if act is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            loader: Any = spec.loader if spec is not None else None
            if hasattr(loader, "exec_module"):
                loader.exec_module = _then(loader.exec_module, act)
                return spec
        return None


def _then(run: Callable[[ModuleType], None], act: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
    def run_and_act(module: ModuleType) -> None:
        run(module)
        with contextlib.suppress(AttributeError, TypeError):  # another version of the library
            act(module)

    return run_and_act
