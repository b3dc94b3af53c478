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
        show_confidence,
        show_form,
        show_lines_form,
        show_photos_form,
        show_playground,
        show_space,
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

__all__ = [
    "DreamBoothConfig",
    "ExportConfig",
    "FastSDError",
    "Form",
    "ModelSpec",
    "PlaygroundConfig",
    "PrepareConfig",
    "Reader",
    "ReadingSessionConfig",
    "ServeConfig",
    "Session",
    "SessionConfig",
    "TeachConfig",
    "UploadConfig",
    "compare_reading",
    "convert",
    "correct_lines",
    "delete_session",
    "describe_device",
    "disconnect_when_safe",
    "edit_captions",
    "edit_crops",
    "examine",
    "export_model",
    "fetch",
    "fetch_model",
    "find_model",
    "import_session",
    "install",
    "list_sessions",
    "models",
    "mount_drive",
    "open_reading",
    "open_session",
    "prepare",
    "prepare_pictures",
    "read_pictures",
    "resolve_prompt",
    "run_training",
    "sessions_root",
    "set_up",
    "share_reader",
    "show_confidence",
    "show_form",
    "show_lines_form",
    "show_photos_form",
    "show_playground",
    "show_space",
    "shrink_reader",
    "start_log",
    "teach_reader",
    "train",
    "upload_model",
    "verify_checkpoint",
    "where",
    "write_checkpoint",
]

_HOMES = {
    "DreamBoothConfig": "dreambooth.settings",
    "ExportConfig": "dreambooth.learned",
    "FastSDError": "errors",
    "Form": "forms",
    "ModelSpec": "registry",
    "PlaygroundConfig": "playground",
    "PrepareConfig": "dreambooth.prepare",
    "Reader": "trocr",
    "ReadingSessionConfig": "forms",
    "ServeConfig": "trocr.serve",
    "Session": "sessions",
    "SessionConfig": "forms",
    "TeachConfig": "forms",
    "UploadConfig": "dreambooth.upload",
    "compare_reading": "forms",
    "convert": "checkpoints",
    "correct_lines": "forms",
    "delete_session": "sessions",
    "describe_device": "runtime",
    "disconnect_when_safe": "forms",
    "edit_captions": "forms",
    "edit_crops": "forms",
    "examine": "doctor",
    "export_model": "forms",
    "fetch": "downloads",
    "fetch_model": "model_lookup",
    "find_model": "registry",
    "import_session": "sessions",
    "install": "wheels",
    "list_sessions": "sessions",
    "models": "registry",
    "mount_drive": "drive",
    "open_reading": "forms",
    "open_session": "forms",
    "prepare": "dreambooth.prepare",
    "prepare_pictures": "forms",
    "read_pictures": "forms",
    "resolve_prompt": "captions",
    "run_training": "forms",
    "sessions_root": "drive",
    "set_up": "forms",
    "share_reader": "forms",
    "show_confidence": "forms",
    "show_form": "forms",
    "show_lines_form": "forms",
    "show_photos_form": "forms",
    "show_playground": "forms",
    "show_space": "forms",
    "shrink_reader": "forms",
    "start_log": "runtime",
    "teach_reader": "forms",
    "train": "dreambooth.engine",
    "upload_model": "forms",
    "verify_checkpoint": "checkpoints",
    "where": "runtime",
    "write_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
