"""What a user named: a key, folder, file, link or repository of the Hub; nobody is asked and nothing fetched."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.downloads import is_link
from fastsd_helpers.downloads.hub_cache import snapshot_of
from fastsd_helpers.downloads.links import find_repo, token_for
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.registry import ModelSpec, models

__all__ = ["FILE_ENDINGS", "Name", "how_to_get", "known_model", "tokens_for", "understand"]

FILE_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".zip")


@dataclass(frozen=True)
class Name:
    """What a text names.

    text: as typed, without blanks around it. spec: of a key. path: of a folder or file, absolute; of a Hub cache its
    snapshot. repo, revision: of
    a repository of the Hub.
    """

    text: str
    what: Literal["key", "folder", "file", "link", "hub", "nothing"]
    spec: ModelSpec | None = None
    path: Path | None = None
    repo: str = ""
    revision: str | None = None


def understand(ref: str | Path) -> Name:
    """Tell what a text names: a key before a path of that name, a path before a repository of the Hub.

    Args:
        ref: what the user typed.

    Returns:
        Which of these it is, with the key, path or repository.
    """
    text = str(ref).strip()
    spec = next((spec for spec in models(None) if spec.key == text), None)
    if spec is not None:
        return Name(text, "key", spec=spec)
    path = Path(os.path.expanduser(text)) if text else None
    if path is not None and os.path.isdir(path):
        with contextlib.suppress(FastSDError, OSError):  # who opens it says why
            path = snapshot_of(path) or path
        return Name(text, "folder", path=path.absolute())
    if path is not None and os.path.isfile(path):
        return Name(text, "file", path=path.absolute())
    repo = find_repo(text)
    # A path to a file that is not there has the shape of a Hub id too; no repository is called like that.
    if repo is not None and (is_link(text) or not text.lower().endswith(FILE_ENDINGS)):
        return Name(text, "hub", repo=repo[0], revision=repo[1])
    return Name(text, "link" if is_link(text) else "nothing")


def known_model(ref: str | Path) -> ModelSpec | None:
    """The known model that a repository of the Hub or a link to a file in one is; None for any other text.

    Args:
        ref: as the user named it.
    """
    text = str(ref).strip()
    found = find_repo(text)
    repo = found[0] if found is not None else ""
    if is_link(text):
        in_link = re.match(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", text)
        repo = in_link[1] if in_link else repo
    if not repo:
        return None
    return next((spec for spec in models(None) if repo.lower() in _repos_of(spec)), None)


def _repos_of(spec: ModelSpec) -> set[str]:
    own = str((spec.checkpoint or {}).get("repo", ""))
    return {name.lower() for name in (*(source.repo for source in spec.sources), *spec.former, own) if name}


def how_to_get(ref: str | Path) -> str:
    """What to do about a model that is wanted here and is not.

    Args:
        ref: as the user named it.
    """
    name = understand(ref)
    if name.what in ("key", "hub"):
        return f"Download it first (fastsd models get {name.text}), and give the path that it prints."
    return "Check the path; names are case-sensitive."


def tokens_for(ref: str | Path) -> tuple[str, ...]:
    """Names of the tokens that bringing a model here may need; none for what is on this machine already.

    A single file needs the Hub too: no such file has a tokenizer.

    Args:
        ref: as the user named it.
    """
    name = understand(ref)
    if name.what in ("folder", "nothing") or (name.spec is not None and name.spec.folder is not None):
        return ()
    of_link = token_for(name.text) if name.what == "link" else None
    return tuple(dict.fromkeys(filter(None, (of_link, "HF_TOKEN"))))
