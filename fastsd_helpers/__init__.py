"""fastsd_helpers: DreamBooth, web UIs and handwriting reading in notebooks, over one thin library.

The names below are loaded when they are first used, so `import fastsd_helpers` needs the standard library alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsd_helpers.captions import resolve_prompt
    from fastsd_helpers.checkpoints import convert, verify_checkpoint, write_checkpoint
    from fastsd_helpers.downloads import fetch_model
    from fastsd_helpers.dreambooth.engine import train
    from fastsd_helpers.dreambooth.prepare import PrepareConfig, prepare
    from fastsd_helpers.dreambooth.settings import DreamBoothConfig
    from fastsd_helpers.drive import mount_drive, sessions_root
    from fastsd_helpers.errors import FastSDError
    from fastsd_helpers.forms import Form, SessionConfig, open_session, prepare_pictures, show_form
    from fastsd_helpers.registry import ModelSpec, find_model, models
    from fastsd_helpers.runtime import describe_device, start_log, where
    from fastsd_helpers.sessions import Session, delete_session, list_sessions

__version__ = "0.1.0"

__all__ = [
    "DreamBoothConfig",
    "FastSDError",
    "Form",
    "ModelSpec",
    "PrepareConfig",
    "Session",
    "SessionConfig",
    "convert",
    "delete_session",
    "describe_device",
    "fetch_model",
    "find_model",
    "list_sessions",
    "models",
    "mount_drive",
    "open_session",
    "prepare",
    "prepare_pictures",
    "resolve_prompt",
    "sessions_root",
    "show_form",
    "start_log",
    "train",
    "verify_checkpoint",
    "where",
    "write_checkpoint",
]

_HOMES = {
    "DreamBoothConfig": "dreambooth.settings",
    "FastSDError": "errors",
    "Form": "forms",
    "ModelSpec": "registry",
    "PrepareConfig": "dreambooth.prepare",
    "Session": "sessions",
    "SessionConfig": "forms",
    "convert": "checkpoints",
    "delete_session": "sessions",
    "describe_device": "runtime",
    "fetch_model": "downloads",
    "find_model": "registry",
    "list_sessions": "sessions",
    "models": "registry",
    "mount_drive": "drive",
    "open_session": "forms",
    "prepare": "dreambooth.prepare",
    "prepare_pictures": "forms",
    "resolve_prompt": "captions",
    "sessions_root": "drive",
    "show_form": "forms",
    "start_log": "runtime",
    "train": "dreambooth.engine",
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
