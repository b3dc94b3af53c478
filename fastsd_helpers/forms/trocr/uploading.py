"""Upload a model of the session to the Hub: the fine-tuned one, or its int8 copy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.errors import SessionUnfinished
from fastsd_helpers.forms.trocr.quantization import int8_copy
from fastsd_helpers.forms.widgets.form import is_named, require
from fastsd_helpers.options import option
from fastsd_helpers.trocr.reading.session import ReadingSession
from fastsd_helpers.trocr.teaching.hub_upload import ReaderUploadConfig, upload
from fastsd_helpers.trocr.teaching.session_teaching import taught_reader
from fastsd_helpers.uploads import UploadResult

__all__ = ["SessionUploadConfig", "upload_reader"]


@dataclass(frozen=True)
class _Chosen:
    model: Literal["fine-tuned", "int8"] = option(
        "fine-tuned", help="model of this session: the one fine-tuned last, or its int8 copy"
    )


@dataclass(frozen=True)
class SessionUploadConfig(ReaderUploadConfig, _Chosen):
    """Which model of the session to upload, and under which name."""


def upload_reader(config: SessionUploadConfig, session: ReadingSession) -> UploadResult | None:
    """Upload a model of the session to the Hub; nothing happens while no name was given.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_reading` gives it.

    Returns:
        Its address on the Hub, or None while no name was given.

    Raises:
        SettingsError: these are the settings of another form.
        SessionUnfinished: the session has no such model.
        FastSDError: what `hub_upload.upload` raises.
    """
    require(config, SessionUploadConfig)
    return upload(config, _folder_of(config.model, session)) if is_named(config) else None


def _folder_of(model: str, session: ReadingSession) -> Path:
    taught = taught_reader(session)
    if taught is None:
        raise SessionUnfinished(
            "No model was fine-tuned in this session yet.", "Run cell 5b to the end, then this cell again."
        )
    folder = taught.path if model == "fine-tuned" else int8_copy(session, taught)
    if folder is None:
        raise SessionUnfinished(
            "This session has no int8 copy of the model it fine-tuned last.",
            "Run cell 7, which makes one where that pays; or choose 'fine-tuned' in cell 9a.",
        )
    return folder
