"""Notebook forms: a settings class becomes widgets. All ipywidgets code of this project is in this folder.

The names below are loaded when they are first used.
"""

import importlib
from typing import Any

from fastsd_helpers.forms.desk import attend_errors

_NAMES = {  # module: what notebooks use of it
    "dreambooth.caption_editor": "CaptionEditor edit_captions",
    "trocr.correction_table": "CorrectionTable correct_lines",
    "dreambooth.crop_editor": "CropEditor edit_crops",
    "widgets.form": "Form show_form",
    "model_file": "ModelFileConfig look_or_convert",
    "dreambooth.notebook": "SessionConfig open_session prepare_pictures",
    "playground": "show_playground",
    "readiness": "set_up",
    "trocr.reading": "LinesForm ReadingSessionConfig open_reading read_pictures show_lines_form",
    "trocr.reading_share": "share_reader",
    "trocr.reading_tools": "EmbedConfig EvaluateConfig show_embedder show_evaluator",
    "trocr.reading_view": "ConfidenceView show_confidence",
    "dreambooth.results": "DisconnectView show_disconnect show_prepared show_result",
    "dreambooth.exporting": "disconnect_when_safe export_model upload_model",
    "trocr.quantization": "ShrinkView shrink_reader",
    "trocr.uploading": "SessionUploadConfig upload_reader",
    "dreambooth.disk_space": "show_space",
    "trocr.finetuning": "CompareView TeachConfig TeachForm compare_reading show_teach_form teach_reader",
    "widgets.tools": "ToolView show_captioner show_converter show_dry_run show_inspector",
    "dreambooth.training": "RunConfig run_training",
    "dreambooth.uploading": "PhotosForm show_photos_form",
    "webui.cells": "NotebookUI StoreConfig fetch_controlnets fetch_models install_ui open_store share_ui start_ui",
    "webui.forms": "UIForm show_store_form show_ui_form",
    "webui.views": "LinkView StopView show_kept show_stop",
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)

attend_errors()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
