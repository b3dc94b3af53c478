"""What a notebook's last cells call: export, upload, and giving the machine back when everything is safe."""

import logging

from fastsd_helpers.dreambooth.engine import TrainResult
from fastsd_helpers.dreambooth.finish import finished_result
from fastsd_helpers.dreambooth.learned import ExportConfig, ExportResult, export
from fastsd_helpers.dreambooth.upload import UploadConfig, UploadResult, upload
from fastsd_helpers.drive import flush_drive
from fastsd_helpers.errors import VerificationFailed
from fastsd_helpers.files import sha256_of
from fastsd_helpers.forms.form import require
from fastsd_helpers.runtime import end_runtime
from fastsd_helpers.sessions import Session

__all__ = ["disconnect_when_safe", "export_model", "upload_model"]

logger = logging.getLogger("fastsd_helpers")


def export_model(config: ExportConfig, session: Session) -> ExportResult | None:
    """Write the session's model in the form that was chosen; None when training has written just that already.

    Raises:
        SettingsError: these are the settings of another form. And what `dreambooth.export` raises.
    """
    require(config, ExportConfig)
    done = finished_result(session, int(session.record.get("run", 1)))
    if config == ExportConfig() and done is not None:
        logger.info("Training has written this file already: %s", done["path"])
        return None
    # The file is named after the session, its step and its format: written again it is the same file.
    values = {name: getattr(config, name) for name in config.__dataclass_fields__}
    result = export(ExportConfig(**values | {"overwrite": config.overwrite or not config.out}), session)
    logger.info("Written and read back: %s (sha256 %s)", result.path, result.sha256)
    return result


def upload_model(config: UploadConfig, session: Session) -> UploadResult | None:
    """Upload the finished model to the Hub; nothing happens while no name was given.

    Raises:
        SettingsError: these are the settings of another form. And what `dreambooth.upload` raises.
    """
    require(config, UploadConfig)
    if not config.repo:
        logger.info("Nothing was uploaded: give a name in `repo` above to upload the model.")
        return None
    return upload(config, session)


def disconnect_when_safe(result: TrainResult, session: Session, *, disconnect: bool) -> bool:
    """Give the machine back, so that it costs nothing more, once the model is proved to be in the session's folder.

    Args:
        result: what the training made.
        session: where it is.
        disconnect: False only checks, and says so.

    Returns:
        whether the machine was given back; only Colab takes it.

    Raises:
        VerificationFailed: the file is not what the training wrote. DriveError: Drive could not be flushed.
    """
    found = sha256_of(result.path)
    if found != result.sha256:
        raise VerificationFailed(
            f"{result.path} is not the file that the training wrote (sha256 {found[:12]}...).",
            "Do not disconnect: run the training cell again, which writes it anew from the last checkpoint.",
        )
    logger.info("Safe: %s was read back once more, and is what the training wrote.", result.path)
    if not disconnect:
        logger.info("Nothing was disconnected: set disconnect=True to give the machine back when this cell is run.")
        return False
    if flush_drive():
        logger.info("Everything has reached Google Drive, which is unmounted now.")
    if end_runtime():
        return True
    logger.info("This is not Colab: shut this kernel down yourself when you are done.")
    return False
