"""Notebook forms: a settings class becomes widgets. All ipywidgets code of this project is in this folder."""

from fastsd_helpers.forms.form import Form, show_form
from fastsd_helpers.forms.notebook import SessionConfig, open_session, prepare_pictures

__all__ = ["Form", "SessionConfig", "open_session", "prepare_pictures", "show_form"]
