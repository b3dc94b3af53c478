"""Notebook forms: a settings class becomes widgets. All ipywidgets code of this project is in this folder."""

from fastsd_helpers.forms.caption_editor import CaptionEditor, edit_captions
from fastsd_helpers.forms.correction_table import CorrectionTable, correct_lines
from fastsd_helpers.forms.crop_editor import CropEditor, edit_crops
from fastsd_helpers.forms.desk import attend_errors
from fastsd_helpers.forms.form import Form, show_form
from fastsd_helpers.forms.model_file import ModelFileConfig, look_or_convert
from fastsd_helpers.forms.notebook import SessionConfig, open_session, prepare_pictures
from fastsd_helpers.forms.playing import PlayView, show_playground
from fastsd_helpers.forms.readiness import set_up
from fastsd_helpers.forms.reading import LinesForm, ReadingSessionConfig, open_reading, read_pictures, show_lines_form
from fastsd_helpers.forms.reading_share import ShareView, share_reader
from fastsd_helpers.forms.reading_tools import EmbedConfig, EvaluateConfig, show_embedder, show_evaluator
from fastsd_helpers.forms.reading_view import ConfidenceView, show_confidence
from fastsd_helpers.forms.results import DisconnectView, show_disconnect, show_prepared, show_result
from fastsd_helpers.forms.sharing import disconnect_when_safe, export_model, upload_model
from fastsd_helpers.forms.shrinking import ShrinkView, shrink_reader
from fastsd_helpers.forms.space import SpaceView, show_space
from fastsd_helpers.forms.teaching import (
    CompareView,
    TeachConfig,
    TeachForm,
    compare_reading,
    show_teach_form,
    teach_reader,
)
from fastsd_helpers.forms.tools import ToolView, show_captioner, show_converter, show_dry_run, show_inspector
from fastsd_helpers.forms.training import RunConfig, run_training
from fastsd_helpers.forms.uploading import PhotosForm, show_photos_form
from fastsd_helpers.forms.webui import (
    NotebookUI,
    StoreConfig,
    fetch_controlnets,
    fetch_models,
    install_ui,
    open_store,
    share_ui,
    start_ui,
)
from fastsd_helpers.forms.webui_forms import UIForm, show_store_form, show_ui_form
from fastsd_helpers.forms.webui_views import KeptView, LinkView, StopView, show_kept, show_stop

__all__ = [
    "CaptionEditor",
    "CompareView",
    "ConfidenceView",
    "CorrectionTable",
    "CropEditor",
    "DisconnectView",
    "EmbedConfig",
    "EvaluateConfig",
    "Form",
    "KeptView",
    "LinesForm",
    "LinkView",
    "ModelFileConfig",
    "NotebookUI",
    "PhotosForm",
    "PlayView",
    "ReadingSessionConfig",
    "RunConfig",
    "SessionConfig",
    "ShareView",
    "ShrinkView",
    "SpaceView",
    "StopView",
    "StoreConfig",
    "TeachConfig",
    "TeachForm",
    "ToolView",
    "UIForm",
    "compare_reading",
    "correct_lines",
    "disconnect_when_safe",
    "edit_captions",
    "edit_crops",
    "export_model",
    "fetch_controlnets",
    "fetch_models",
    "install_ui",
    "look_or_convert",
    "open_reading",
    "open_session",
    "open_store",
    "prepare_pictures",
    "read_pictures",
    "run_training",
    "set_up",
    "share_reader",
    "share_ui",
    "show_captioner",
    "show_confidence",
    "show_converter",
    "show_disconnect",
    "show_dry_run",
    "show_embedder",
    "show_evaluator",
    "show_form",
    "show_inspector",
    "show_kept",
    "show_lines_form",
    "show_photos_form",
    "show_playground",
    "show_prepared",
    "show_result",
    "show_space",
    "show_stop",
    "show_store_form",
    "show_teach_form",
    "show_ui_form",
    "shrink_reader",
    "start_ui",
    "teach_reader",
    "upload_model",
]

attend_errors()
