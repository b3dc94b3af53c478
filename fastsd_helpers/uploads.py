"""Send a finished model and its card to the Hugging Face Hub in one commit, and compare what arrived."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads.hub import client_errors, network_errors
from fastsd_helpers.downloads.links import find_repo, is_repo_name
from fastsd_helpers.errors import (
    DownloadError,
    FastSDError,
    SettingsError,
    VerificationFailed,
    needs_package,
    proxy_problem,
)
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import models
from fastsd_helpers.runtime import logger, redact, secret
from fastsd_helpers.wording import size_in_words

__all__ = ["HubUpload", "UploadResult", "card_for_the_hub", "require_name", "send_model"]

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
class HubUpload:
    """What every upload to the Hub asks for."""

    repo: str = option("", help="name of the model on the Hub: NAME, or OWNER/NAME; empty: nothing is uploaded")
    private: bool = option(True, help="private repository: only you can see it")
    hf_token: str | None = option(None, help="a token with write access (HF_TOKEN)", secret=True)

    def __post_init__(self) -> None:
        bad = isinstance(self.repo, str) and self.repo and not is_repo_name(self.repo)
        said = f"repo (--repo) is {self.repo!r}; a name has letters, digits, - _ . and at most one /"
        check(self, [said] if bad else [])


@dataclass(frozen=True)
class UploadResult:
    """What is on the Hub now; every file was compared with what the Hub says it has."""

    repo: str
    url: str
    private: bool
    files: tuple[str, ...]
    sha256: str  # of the model file


def require_name(repo: str) -> None:
    """Raise SettingsError where no name was given.

    Args:
        repo: as typed.
    """
    if not repo:
        raise SettingsError("repo (--repo) is empty.", "Give the name that the model should have on the Hub.")


def send_model(
    repo: str, files: dict[str, Path | bytes], hashes: dict[str, str], *, private: bool, token: str | None = None
) -> UploadResult:
    """Make the repository where it is missing, send the files in one commit, and compare them with the Hub's list.

    Files that are there already with the same content are not sent again. An existing public repository is refused
    while `private` is on.

    Args:
        repo: NAME or OWNER/NAME.
        files: name on the Hub -> file or bytes.
        hashes: name -> SHA-256 of the model's files, the main one first.
        private: only its owner can see it.
        token: one with write access; HF_TOKEN when None.

    Returns:
        Where it is, and the hash of the main file.

    Raises:
        DownloadError: the Hub cannot be reached, or refuses.
        VerificationFailed: it has other bytes than were sent.
    """
    token = token or secret("HF_TOKEN")
    if not token:
        raise DownloadError("Uploading needs a Hugging Face token, and none was given.", _WRITE_HINT)
    hub = _Hub(token)
    try:
        return hub.send(repo, files, hashes, private=private)
    except FastSDError:
        raise
    except client_errors() as err:
        raise hub.translate(err, repo) from err


def card_for_the_hub(card: str) -> str:
    """Put a card's head into words that the Hub accepts: it refuses a base model that it does not have.

    Args:
        card: the text of README.md; one without a head stays as it is.

    Returns:
        The card to send.
    """
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return card
    repos = {spec.key: spec.sources[0].repo if spec.sources else "" for spec in models(None)}
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
    return "---\n" + "\n".join(head) + "\n---\n" + card[match.end() :]


class _Hub:
    """The Hub's client with one token; every failure is put into words."""

    def __init__(self, token: str) -> None:
        with needs_package("Uploading", "Run: pip install huggingface_hub"):
            from huggingface_hub import HfApi
        self.endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").strip().rstrip("/")
        self._api = HfApi(endpoint=self.endpoint, token=token)

    def send(
        self, wanted: str, files: dict[str, Path | bytes], hashes: dict[str, str], *, private: bool
    ) -> UploadResult:
        from huggingface_hub import CommitOperationAdd

        repo = self._api.create_repo(wanted, private=private, exist_ok=True).repo_id
        is_private = bool(self._api.model_info(repo).private)
        if private and not is_private:
            raise DownloadError(
                f"{repo} is on the Hub already, and everybody can see it.",
                "Choose another name, make it private in its settings there, or switch `private` off.",
            )
        there = self._hashes(repo)
        new = {name: item for name, item in files.items() if name not in hashes or there.get(name) != hashes[name]}
        size = sum(len(item) if isinstance(item, bytes) else item.stat().st_size for item in new.values())
        same = len(files) - len(new)
        told = f"; {same} {'is' if same == 1 else 'are'} there already" if same else ""
        logger.info("Uploading %d files (%s) to %s%s.", len(new), size_in_words(size), repo, told)
        parts = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=item if isinstance(item, bytes) else str(item))
            for name, item in new.items()
        ]
        self._api.create_commit(repo, parts, commit_message="Upload a model trained with fastsd_helpers")
        self._compare(repo, files, hashes)
        url = f"{re.sub(r'//[^/@]*@', '//', self.endpoint)}/{repo}"
        logger.info("Uploaded and compared: %s (%s).", url, "private" if is_private else "public")
        return UploadResult(repo, url, is_private, tuple(files), next(iter(hashes.values())))

    def _listed(self, repo: str) -> dict[str, Any]:
        return {file.rfilename: file for file in self._api.model_info(repo, files_metadata=True).siblings or []}

    def _hashes(self, repo: str) -> dict[str, str | None]:
        """SHA-256 of the large files that the Hub has of a repository."""
        return {name: getattr(getattr(file, "lfs", None), "sha256", None) for name, file in self._listed(repo).items()}

    def _compare(self, repo: str, files: dict[str, Path | bytes], hashes: dict[str, str]) -> None:
        listed = self._listed(repo)
        wrong = []
        for name, item in files.items():
            size = len(item) if isinstance(item, bytes) else item.stat().st_size
            there = listed.get(name)
            stored = getattr(getattr(there, "lfs", None), "sha256", None)
            if there is None or there.size != size or (name in hashes and stored != hashes[name]):
                wrong.append(name)
        if wrong:
            raise VerificationFailed(
                f"{repo} does not have the uploaded files: {', '.join(wrong)}.",
                "Run the upload again: it uploads what differs.",
            )

    def translate(self, err: Exception, repo: str) -> FastSDError:
        status = getattr(getattr(err, "response", None), "status_code", None)
        words = redact(str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__)
        if status in (401, 403):
            owner, slash, _name = repo.partition("/")
            whose = f" It has to be of {owner}, or of somebody who may write there." if slash else ""
            hint = _WRITE_HINT + whose
            return DownloadError(f"The Hub does not let this token write to {repo} (HTTP {status}).", hint)
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
