"""What a notebook's cells call before the training: which session, and which photos."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers import demo
from fastsd_helpers.dreambooth.dataset.begun import has_begun_with
from fastsd_helpers.dreambooth.dataset.originals import own_place
from fastsd_helpers.dreambooth.dataset.prepared import load_dataset, recorded_images
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, PrepareResult, prepare
from fastsd_helpers.dreambooth.dataset.report import counted_prompts
from fastsd_helpers.dreambooth.photos.browser_uploads import count_uploads, uploads_folder
from fastsd_helpers.dreambooth.running.child_process import find_training
from fastsd_helpers.drive import mount_drive, sessions_root, shared_folder
from fastsd_helpers.errors import DatasetError, SessionNotFound
from fastsd_helpers.forms import desk, recent
from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.options import Checked, option
from fastsd_helpers.runtime import in_notebook, logger, where
from fastsd_helpers.sessions import Session, import_session, is_old_session

__all__ = ["SessionConfig", "open_session", "prepare_pictures"]

_LINK = "drive.google.com/"


@dataclass(frozen=True)
class SessionConfig(Checked):
    """Which session to work in."""

    session_name: str = option(
        "", help="name of a session to resume, or a new name; empty: the one used last", known="sessions"
    )
    google_drive: bool = option(True, help="keep it on your Google Drive, where it survives a disconnect (Colab only)")
    shared_drive: str = option("", help="name of a Shared drive; empty: My Drive", advanced=True)
    import_from: str = option(
        "",
        help="folder of a session made elsewhere, or the Drive link of one that was shared with you: it is copied",
        advanced=True,
    )


def open_session(config: SessionConfig) -> Session:
    """Open the session of that name, import it, or create it; in Colab it is on Google Drive unless switched off.

    Without a name it is the one that was used last in that place, and a new one only where there is none. A folder
    that the old notebook left under the name becomes a session at once. With `import_from` a session is copied from
    elsewhere the first time, and opened from then on.

    Args:
        config: what the form shows, as its `config()` gives it.

    Returns:
        The session, which the cells below take.

    Raises:
        SettingsError: these are the settings of another form.
        SessionError: a name that cannot be a folder's name.
        SessionNotFound: one that was in the list is gone.
        DriveError: Drive was not mounted or cannot be written.
    """
    require(config, SessionConfig)
    desk.close_session()
    on_drive = config.google_drive and where() == "colab" and in_notebook()
    if on_drive:
        mount_drive(shared_drive=config.shared_drive or None)
    root = sessions_root(shared_drive=config.shared_drive) if on_drive else recent.local_root(recent.SESSIONS)
    name = recent.choose_name(config.session_name, root, first=recent.FIRST_NAME, imports=bool(config.import_from))
    session = _open_or_make(name, root, config.import_from)
    recent.say_twin(session.name, root, recent.SESSIONS)
    recent.remember(session.folder)
    desk.sit_down(session, config)
    return session


def _open_or_make(name: str, root: Path, import_from: str) -> Session:
    for folder in (root / name, root / name.replace(" ", "_")):
        if folder.parent == root and is_old_session(folder):
            return import_session(folder.name, root=root).session
    used = recent.last_time(name, root)
    try:
        session = Session.open(name, root=root)
    except SessionNotFound:
        if import_from:
            source = shared_folder(import_from) if _LINK in import_from else Path(import_from)
            return import_session(name, source=source, root=root).session
        session = Session.create(name, root=root)
        logger.info("Created the session %s in %s", session.name, session.folder)
    else:
        logger.info("Resuming %s%s, in %s", session.name, used, session.folder)
        if session.notices:
            logger.warning(
                "If this folder is still being copied, wait until the copy is complete, and run this cell again."
            )
    return session


def prepare_pictures(config: PrepareConfig, session: Session) -> PrepareResult:
    """Prepare the user's photos, or the demo's images of a robot at the demo model's size when none were given.

    Images that are prepared already are kept when no photos are named, when those that are named are gone (as on a
    new machine), while a training of this session is running, and where one was begun with just these photos. Photos
    that were uploaded count as named. The session remembers whether they are the demo's: only then does base model
    "auto" mean the demo model.

    Args:
        config: what the form shows, as its `config()` gives it.
        session: the session, as `open_session` gives it.

    Returns:
        What `dreambooth.prepare` gives; of images that were kept, what was found when they were prepared.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `dreambooth.prepare` raises.
    """
    require(config, PrepareConfig)
    if not config.images and (not recorded_images(session) or session.record["dataset"].get("demo")):
        config = dataclasses.replace(config, images=str(uploads_folder(session)) if count_uploads(session)[0] else "")
    kept = _why_kept(config, session)
    if kept:
        logger.info("%s", kept)
        return _prepared_before(session)
    # Images of an imported session, which no `prepare` has read yet, are the user's own too.
    own = bool(config.images) or (not recorded_images(session) and any(session.instance_images.glob("*.*")))
    if not own:
        folder = demo.SUBJECTS_FOLDER / "robot"
        logger.info("No photos were given, so the built-in images of a robot are used: %s", folder)
        held_out = demo.SUBJECTS_FOLDER / "held_out" / "robot"
        config = dataclasses.replace(config, images=str(folder), held_out=str(held_out), size=128)
    result = prepare(config, session)
    session.save(dataset=session.record["dataset"] | {"demo": not own})
    return result


def _why_kept(config: PrepareConfig, session: Session) -> str | None:
    dataset: dict[str, Any] = session.record.get("dataset") or {}
    if not recorded_images(session):
        return None
    if find_training(session) is not None:
        return "A training of this session is running, so its images are not changed."
    boxes = Path((dataset.get("settings") or {}).get("boxes") or "-")
    asked = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("size", "crop")}
    same = dataset.get("settings", {}) | {"boxes": ""} == asked | {"boxes": ""}
    same = same and (dataset.get("size"), dataset.get("crop")) == (config.size, config.crop)
    if not config.images and (boxes.is_file() or not dataset.get("demo", False)):
        count = len(recorded_images(session))
        return f"No new photos were given: the {count} images that are prepared in this session are used."
    if config.images and not own_place(session, Path(config.images).expanduser()).exists():
        return f"{config.images} is not on this machine: the images prepared from it are used."
    if same and config.images and boxes.is_file() and not config.boxes:
        return "These photos are prepared already, with your own crops."
    if config.images and has_begun_with(config, session):
        return "A training was started with these images, so their prompts, crops and held-out photos are not changed."
    return None


def _prepared_before(session: Session) -> PrepareResult:
    dataset = session.record["dataset"]
    sheet = session.logs / "contact-sheet.png"
    if not sheet.is_file():
        raise DatasetError("The contact sheet of the prepared images is missing.", "Give the photos again.")
    images = recorded_images(session)
    held_out = sum(item["held_out"] for item in images)
    size = dataset.get("size") or 0
    skipped = tuple(dataset.get("skipped") or ())
    prepared = load_dataset(session)  # every image is there and as it was
    prompts = counted_prompts([image.prompt for image in (*prepared.train, *prepared.held_out)])
    return PrepareResult(len(images) - held_out, held_out, size, tuple(images), skipped, (), sheet, prompts)
