"""fastsd_helpers: DreamBooth, web UIs and handwriting reading in notebooks, over one thin library.

The names below are loaded when they are first used, so `import fastsd_helpers` needs the standard library alone.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {  # module: what of it is public here
    "captions.prompts": "resolve_prompt",
    "checkpoints": "convert verify_checkpoint write_checkpoint",
    "device": "describe_device",
    "doctor": "examine",
    "downloads": "fetch",
    "dreambooth.running.engine": "train",
    "dreambooth.results.learned": "ExportConfig",
    "dreambooth.dataset.preparing": "PrepareConfig prepare",
    "dreambooth.settings": "DreamBoothConfig",
    "dreambooth.results.hub_upload": "UploadConfig",
    "drive": "mount_drive sessions_root",
    "errors": "FastSDError",
    "forms": (
        "Form ReadingSessionConfig RunConfig SessionConfig SessionUploadConfig TeachConfig show_captioner "
        "show_converter show_disconnect show_dry_run show_inspector show_prepared show_result "
        "compare_reading correct_lines "
        "disconnect_when_safe edit_captions edit_crops export_model open_reading open_session "
        "prepare_pictures read_pictures run_training set_up share_reader show_confidence show_embedder "
        "show_evaluator show_form "
        "show_lines_form show_photos_form show_playground show_space show_teach_form shrink_reader teach_reader "
        "upload_model upload_reader"
    ),
    "model_lookup": "fetch_model",
    "playground": "PlaygroundConfig",
    "registry": "ModelSpec find_model models",
    "runtime": "start_log where",
    "sessions": "Session delete_session import_session list_sessions",
    "trocr": "Reader",
    "trocr.reading.serve": "ServeConfig",
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
