"""fastsd_helpers: DreamBooth, web UIs and handwriting reading in notebooks, over one thin library.

The names below are loaded when they are first used, so `import fastsd_helpers` needs the standard library alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd_helpers.captions import resolve_prompt
    from fastsd_helpers.checkpoints import convert, verify_checkpoint, write_checkpoint
    from fastsd_helpers.doctor import examine
    from fastsd_helpers.downloads import fetch
    from fastsd_helpers.dreambooth.engine import train
    from fastsd_helpers.dreambooth.learned import ExportConfig
    from fastsd_helpers.dreambooth.prepare import PrepareConfig, prepare
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.dreambooth.upload import UploadConfig
    from fastsd_helpers.drive import mount_drive, sessions_root
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.forms import (
        Form,
        ReadingSessionConfig,
        RunConfig,
        SessionConfig,
        TeachConfig,
        compare_reading,
        correct_lines,
        disconnect_when_safe,
        edit_captions,
        edit_crops,
        export_model,
        open_reading,
        open_session,
        prepare_pictures,
        read_pictures,
        run_training,
        set_up,
        share_reader,
        show_captioner,
        show_confidence,
        show_converter,
        show_disconnect,
        show_dry_run,
        show_embedder,
        show_evaluator,
        show_form,
        show_inspector,
        show_lines_form,
        show_photos_form,
        show_playground,
        show_prepared,
        show_result,
        show_space,
        show_teach_form,
        shrink_reader,
        teach_reader,
        upload_model,
    )
    from fastsd_helpers.model_lookup import fetch_model
    from fastsd_helpers.playground import PlaygroundConfig
    from fastsd_helpers.registry import ModelSpec, find_model, models
    from fastsd_helpers.runtime import describe_device, start_log, where
    from fastsd_helpers.sessions import Session, delete_session, import_session, list_sessions
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.serve import ServeConfig
    from fastsd_helpers.wheels import install

__version__ = "0.1.0"

_NAMES = {  # module: what of it is public here
    "captions": "resolve_prompt",
    "checkpoints": "convert verify_checkpoint write_checkpoint",
    "doctor": "examine",
    "downloads": "fetch",
    "dreambooth.engine": "train",
    "dreambooth.learned": "ExportConfig",
    "dreambooth.prepare": "PrepareConfig prepare",
    "dreambooth.settings": "DreamBoothConfig",
    "dreambooth.upload": "UploadConfig",
    "drive": "mount_drive sessions_root",
    "errors": "FastSDError",
    "forms": (
        "Form ReadingSessionConfig RunConfig SessionConfig TeachConfig show_captioner show_converter "
        "show_disconnect show_dry_run show_inspector show_prepared show_result "
        "compare_reading correct_lines "
        "disconnect_when_safe edit_captions edit_crops export_model open_reading open_session "
        "prepare_pictures read_pictures run_training set_up share_reader show_confidence show_embedder "
        "show_evaluator show_form "
        "show_lines_form show_photos_form show_playground show_space show_teach_form shrink_reader teach_reader "
        "upload_model"
    ),
    "model_lookup": "fetch_model",
    "playground": "PlaygroundConfig",
    "registry": "ModelSpec find_model models",
    "runtime": "describe_device start_log where",
    "sessions": "Session delete_session import_session list_sessions",
    "trocr": "Reader",
    "trocr.serve": "ServeConfig",
    "wheels": "install",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
