"""Upload a finished session to the Hugging Face Hub: the model file, its card, and images; private unless asked."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.dreambooth.results.finishing import finished_result
from fastsd_helpers.errors import SessionError
from fastsd_helpers.options import option
from fastsd_helpers.sessions import Session
from fastsd_helpers.uploads import HubUpload, UploadResult, card_for_the_hub, require_name, send_model

__all__ = ["UploadConfig", "upload"]


@dataclass(frozen=True)
class UploadConfig(HubUpload):
    """Settings for an upload to the Hub."""

    samples: bool = option(True, help="also upload the sample images generated during training")


def upload(config: UploadConfig, session: Session) -> UploadResult:
    """Upload a finished session's model file, card and images in one commit, then compare them with the Hub's list.

    Files that are there already with the same content are not sent again. An existing public repository is refused
    while `private` is on.

    Raises:
        SettingsError: no name was given.
        SessionError: the session is not finished, or its file has changed.
        DownloadError: the Hub cannot be reached, or refuses.
        VerificationFailed: it has other bytes than were sent.
    """
    require_name(config.repo)
    session.require_here()
    done = finished_result(session, int(session.record.get("run", 1)))
    if done is None:
        raise SessionError(
            f"Session {session.name} has no finished model, or its file is not the one that training wrote.",
            f"Train it to the end first: fastsd dreambooth train {session.name}",
        )
    files = _files_of(session, done, samples=config.samples)
    hashes = {done["path"].name: done["sha256"]}
    return send_model(config.repo, files, hashes, private=config.private, token=config.hf_token)


def _files_of(session: Session, done: dict[str, Any], *, samples: bool) -> dict[str, Path | bytes]:
    """Name on the Hub -> file or bytes; the card becomes README.md."""
    files: dict[str, Path | bytes] = {
        done["path"].name: done["path"],
        "README.md": _card_of(done["model_card"]).encode(),
        done["grid"].name: done["grid"],
        done["loss_plot"].name: done["loss_plot"],
    }
    if samples:
        pictures = sorted(path for path in session.samples.glob("*.png") if not path.name.startswith("."))
        files |= {f"samples/{path.name}": path for path in pictures if path != done["grid"]}
    return files


def _card_of(path: Path) -> str:
    card = path.read_text(encoding="utf-8")
    # Cards of version 0.1 say where on the user's machine the base model lay.
    card = re.sub(r"(?m)^(\| base_model \| )(?:/|~|[A-Za-z]:).*[/\\]([^/\\|]+ \|)$", r"\1\2", card)
    return card_for_the_hub(card)
