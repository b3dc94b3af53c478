"""Notebook forms: a settings class becomes widgets. All ipywidgets code of this project is in this folder."""

from fastsd_helpers.forms.caption_editor import CaptionEditor, edit_captions
from fastsd_helpers.forms.crop_editor import CropEditor, edit_crops
from fastsd_helpers.forms.form import Form, show_form
from fastsd_helpers.forms.notebook import SessionConfig, open_session, prepare_pictures
from fastsd_helpers.forms.playing import PlayView, show_playground
from fastsd_helpers.forms.sharing import disconnect_when_safe, export_model, upload_model
from fastsd_helpers.forms.space import SpaceView, show_space
from fastsd_helpers.forms.training import run_training
from fastsd_helpers.forms.uploading import PhotosForm, show_photos_form

__all__ = [
    "CaptionEditor",
    "CropEditor",
    "Form",
    "PhotosForm",
    "PlayView",
    "SessionConfig",
    "SpaceView",
    "disconnect_when_safe",
    "edit_captions",
    "edit_crops",
    "export_model",
    "open_session",
    "prepare_pictures",
    "run_training",
    "show_form",
    "show_photos_form",
    "show_playground",
    "show_space",
    "upload_model",
]
