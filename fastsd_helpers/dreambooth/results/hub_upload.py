"""Upload a finished session to the Hugging Face Hub: the model file, its card, and images; private unless asked."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads.hub import client_errors, network_errors
from fastsd_helpers.downloads.links import find_repo, is_repo_name
from fastsd_helpers.dreambooth.results.finishing import finished_result
from fastsd_helpers.errors import (
    DownloadError,
    FastSDError,
    SessionError,
    SettingsError,
    VerificationFailed,
    needs_package,
    proxy_problem,
)
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import models
from fastsd_helpers.runtime import logger, redact, secret
from fastsd_helpers.sessions import Session

__all__ = ["UploadConfig", "UploadResult", "upload"]

_WRITE_HINT = (
    "Make a token with write access at https://huggingface.co/settings/tokens and set it as HF_TOKEN "
    "(environment variable, Colab or Kaggle secret, or the field of the form)."
)
# The licences of our models in the Hub's own words; it refuses any other.
# Source: huggingface.co/docs/hub/repositories-licenses
_LICENCES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "creativeml openrail-m": "creativeml-openrail-m",
    "creativeml open rail++-m": "openrail++",
}


@dataclass(frozen=True)
class UploadConfig:
    """Settings for an upload to the Hub."""

    repo: str = option("", help="name of the model on the Hub: NAME, or OWNER/NAME; empty: nothing is uploaded")
    private: bool = option(True, help="private repository: only you can see it")
    samples: bool = option(True, help="also upload the sample images generated during training")
    hf_token: str | None = option(None, help="a token with write access (HF_TOKEN)", secret=True)

    def __post_init__(self) -> None:
        bad = isinstance(self.repo, str) and self.repo and not is_repo_name(self.repo)
        words = "letters, digits, - _ . and at most one /"
        check(self, [f"repo (--repo) is {self.repo!r}; a name has {words}"] if bad else [])


@dataclass(frozen=True)
class UploadResult:
    """What is on the Hub now; every file was compared with what the Hub says it has."""

    repo: str
    url: str
    private: bool
    files: tuple[str, ...]
    sha256: str  # of the model file


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
    if not config.repo:
        raise SettingsError("repo (--repo) is empty.", "Give the name that the model should have on the Hub.")
    done = finished_result(session, int(session.record.get("run", 1)))
    if done is None:
        raise SessionError(
            f"Session {session.name} has no finished model, or its file is not the one that training wrote.",
            f"Train it to the end first: fastsd dreambooth train {session.name}",
        )
    files = _files_of(session, done, samples=config.samples)
    token = config.hf_token or secret("HF_TOKEN")
    if not token:
        raise DownloadError("Uploading needs a Hugging Face token, and none was given.", _WRITE_HINT)
    return _Hub(token).send(config, files, sha256=done["sha256"])


def _files_of(session: Session, done: dict[str, Any], *, samples: bool) -> dict[str, Path | bytes]:
    """Name on the Hub -> file or bytes; the card becomes README.md."""
    card = done["model_card"].read_text(encoding="utf-8")
    files: dict[str, Path | bytes] = {
        done["path"].name: done["path"],
        "README.md": _card_for_the_hub(card).encode(),
        done["grid"].name: done["grid"],
        done["loss_plot"].name: done["loss_plot"],
    }
    if samples:
        pictures = sorted(path for path in session.samples.glob("*.png") if not path.name.startswith("."))
        files |= {f"samples/{path.name}": path for path in pictures if path != done["grid"]}
    return files


def _card_for_the_hub(card: str) -> str:
    """Put the card's head into words that the Hub accepts: it refuses a base model that it does not have."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return card
    repos = {spec.key: spec.sources[0].repo if spec.sources else "" for spec in models()}
    head = []
    for line in match[1].splitlines():
        name, _, value = line.partition(": ")
        value = value.strip().strip('"')
        if name == "base_model":
            repo = repos.get(value, value)
            if repo and find_repo(repo) and not Path(value).exists():
                head.append(f'base_model: "{repo}"')
        elif name == "license":
            known = _LICENCES.get(value.lower())
            head += [f"license: {known}"] if known else ["license: other", f'license_name: "{value}"']
        else:
            head.append(line)
    # Cards of version 0.1 say where on the user's machine the base model lay.
    body = re.sub(r"(?m)^(\| base_model \| )(?:/|~|[A-Za-z]:).*[/\\]([^/\\|]+ \|)$", r"\1\2", card[match.end() :])
    return "---\n" + "\n".join(head) + "\n---\n" + body


class _Hub:
    """The Hub's client with one token; every failure is put into words."""

    def __init__(self, token: str) -> None:
        with needs_package("Uploading", "Run: pip install huggingface_hub"):
            from huggingface_hub import HfApi
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, token=token)

    def send(self, config: UploadConfig, files: dict[str, Path | bytes], *, sha256: str) -> UploadResult:
        """Make the repository where it is missing, send the files in one commit, compare."""
        try:
            return self._send(config, files, sha256)
        except FastSDError:
            raise
        except client_errors() as err:
            raise self._translate(err, config.repo) from err

    def _send(self, config: UploadConfig, files: dict[str, Path | bytes], sha256: str) -> UploadResult:
        from huggingface_hub import CommitOperationAdd

        repo = self._api.create_repo(config.repo, private=config.private, exist_ok=True).repo_id
        is_private = bool(self._api.model_info(repo).private)
        if config.private and not is_private:
            raise DownloadError(
                f"{repo} is on the Hub already, and everybody can see it.",
                "Choose another name, make it private in its settings there, or switch `private` off.",
            )
        size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in files.values())
        logger.info("Uploading %d files (%.0f MB) to %s.", len(files), size / 1e6, repo)
        parts = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=item if isinstance(item, bytes) else str(item))
            for name, item in files.items()
        ]
        self._api.create_commit(repo, parts, commit_message="Upload a model trained with fastsd_helpers")
        self._compare(repo, files, sha256)
        url = f"{re.sub(r'//[^/@]*@', '//', self.endpoint)}/{repo}"
        logger.info("Uploaded and compared: %s (%s).", url, "private" if is_private else "public")
        return UploadResult(repo, url, is_private, tuple(files), sha256)

    def _compare(self, repo: str, files: dict[str, Path | bytes], sha256: str) -> None:
        listed = {file.rfilename: file for file in self._api.model_info(repo, files_metadata=True).siblings or []}
        wrong = []
        for name, item in files.items():
            size = len(item) if isinstance(item, bytes) else item.stat().st_size
            there = listed.get(name)
            stored = getattr(getattr(there, "lfs", None), "sha256", None)
            is_model = isinstance(item, Path) and item.suffix == ".safetensors"
            if there is None or there.size != size or (is_model and stored != sha256):
                wrong.append(name)
        if wrong:
            raise VerificationFailed(
                f"{repo} does not have the uploaded files: {', '.join(wrong)}.",
                "Run the upload again: it uploads what differs.",
            )

    def _translate(self, err: Exception, repo: str) -> FastSDError:
        status = getattr(getattr(err, "response", None), "status_code", None)
        words = redact(str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__)
        if status in (401, 403):
            return DownloadError(f"The Hub does not let this token write to {repo} (HTTP {status}).", _WRITE_HINT)
        if status == 429:
            return DownloadError("The Hub answered 'too many requests' (HTTP 429).", "Try again in a few minutes.")
        if status is not None:
            return DownloadError(f"The Hub refused the upload to {repo} (HTTP {status}): {words}", "Try again later.")
        if (proxy := proxy_problem(err)) is not None:
            return DownloadError(redact(proxy[0]), proxy[1])
        if isinstance(err, network_errors()):
            place = re.sub(r"//[^/@]*@", "//", self.endpoint)
            return DownloadError(
                f"The Hub at {place} cannot be reached: {words}", "Check the connection and try again."
            )
        return DownloadError(f"The upload to {repo} failed: {words}", "Check the name of the repository and try again.")
