"""What a notebook's last cells call: export, upload, and giving the machine back when everything is safe."""

import dataclasses
from pathlib import Path

from fastsd_helpers.dreambooth.results.finishing import finished_result
from fastsd_helpers.dreambooth.results.hub_upload import UploadConfig, upload
from fastsd_helpers.dreambooth.results.learned import ExportConfig, ExportResult, export
from fastsd_helpers.dreambooth.running.engine import TrainResult
from fastsd_helpers.drive import flush_drive
from fastsd_helpers.errors import SessionUnfinished, VerificationFailed
from fastsd_helpers.files import sha256_of
from fastsd_helpers.forms.widgets.form import is_named, require
from fastsd_helpers.runtime import end_runtime, logger
from fastsd_helpers.sessions import Session
from fastsd_helpers.sessions.record import read_record
from fastsd_helpers.uploads import UploadResult

__all__ = ["disconnect_when_safe", "export_model", "unfinished", "upload_model"]


def export_model(config: ExportConfig, session: Session) -> ExportResult | None:
    """Write the session's model in the form that was chosen; None when training has written just that already.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_session` gives it.

    Returns:
        What was written, or None.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `dreambooth.export` raises.
    """
    require(config, ExportConfig)
    session.require_here()
    done = finished_result(session, int(session.record.get("run", 1)))
    if config == ExportConfig() and done is not None:
        logger.info("Training has already written this file: %s", done["path"])
        return None
    # The file is named after the session, its step and its format: written again it is the same file.
    result = export(dataclasses.replace(config, overwrite=config.overwrite or not config.out), session)
    logger.info("Written and read back: %s (sha256 %s)", result.path, result.sha256)
    return result


def upload_model(config: UploadConfig, session: Session) -> UploadResult | None:
    """Upload the finished model to the Hub; nothing happens while no name was given.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_session` gives it.

    Returns:
        Its address on the Hub, or None while no name was given.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `dreambooth.upload` raises.
    """
    require(config, UploadConfig)
    return upload(config, session) if is_named(config) else None


def disconnect_when_safe(
    made: TrainResult | Session, session: Session | None = None, *, disconnect: bool = False
) -> bool:
    """Give the machine back, so that it costs nothing more, once the model is proved to be in the session's folder.

    Args:
        made: the session; or what the training made, and then the session.
        session: where it is, when `made` is the result.
        disconnect: False only checks, and says so.

    Returns:
        whether the machine was given back; only Colab takes it.

    Raises:
        SessionUnfinished: there is no finished model yet.
        VerificationFailed: the file is not what the training wrote.
        DriveError: Drive could not be flushed.
    """
    path, sha256 = _finished_file(made) if isinstance(made, Session) else (made.path, made.sha256)
    found = sha256_of(path) if path.is_file() else "nothing"
    if found != sha256:
        raise VerificationFailed(
            f"{path} is not the file that the training wrote (sha256 {found[:12]}...).",
            "Do not disconnect: run the training cell again, which writes it again from the last checkpoint.",
        )
    logger.info("Safe: %s was read back once more, and is what the training wrote.", path)
    if not disconnect:
        logger.info("Nothing was disconnected.")
        return False
    if flush_drive():
        logger.info("Everything has reached Google Drive, which is unmounted now.")
    if end_runtime():
        return True
    logger.info("This is not Colab: shut this kernel down yourself when you are done.")
    return False


def _finished_file(session: Session) -> tuple[Path, str]:
    session.require_here()
    result = read_record(session.folder).record.get("result")
    if not result:
        raise unfinished(session)
    return session.folder / result["path"], result["sha256"]


def unfinished(session: Session) -> SessionUnfinished:
    """The error of a session whose training has not come to its end: how far it is, and what to run."""
    progress = read_record(session.folder).record.get("progress") or {}
    stage = {"unet": "U-Net", "text_encoder": "text encoder"}.get(progress.get("stage") or "", "")
    begun = f": it stopped after {stage} step {progress['step']} of {progress['steps']}" if stage else " yet"
    return SessionUnfinished(
        f"The training of {session.name} has not been finished{begun}.",
        "Run cell 5b: it resumes from the last checkpoint; then run this cell again.",
    )
