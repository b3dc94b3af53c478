"""Code at an exact commit, from the first of several places that has it."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastsd_helpers.downloads.links import holds_secret, show_typed
from fastsd_helpers.errors import SettingsError, WebUIError
from fastsd_helpers.files import file_errors, unfinished_name
from fastsd_helpers.processes import environment_for
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import Repository

__all__ = ["clone", "commit_of", "list_own_files", "pack", "read_mirrors", "revision_of", "unpack"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT_S = 900


def read_mirrors(text: str, names: Sequence[str]) -> dict[str, str]:
    """Read "name=place, name=place": other places to get code from, such as a mirror or a folder on this machine.

    Raises:
        SettingsError: not of that form, or no repository of that name.
    """
    found = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, place = (word.strip() for word in part.partition("="))
        if holds_secret(place):
            # It would be on git's command line, in the repository, and in what the web UI tells of its extensions.
            raise SettingsError(
                "mirrors (--mirrors) has an address with a user, password or token in it.",
                "Leave that out of the address: use git's credential helper or an ssh address.",
            )
        if not separator or not place or name not in names:
            raise SettingsError(
                f"mirrors (--mirrors) has {show_typed(part)!r}; it must be NAME=PLACE.",
                f"The names are {', '.join(names)}.",
            )
        found[name] = str(Path(place).expanduser().absolute()) if Path(place).expanduser().exists() else place
    return found


def commit_of(folder: Path) -> str | None:
    """The commit that a folder holds; None when it is not a repository of its own."""
    if not (folder / ".git").exists():
        return None
    done = _git(["rev-parse", "HEAD"], folder)
    return done.stdout.strip() if done.returncode == 0 else None


def revision_of(folder: Path) -> tuple[str, str] | None:
    """Where a folder's code was fetched from by `clone`, and the revision asked for; None when it was not."""
    if commit_of(folder) is None:
        return None
    place = _git(["config", "--local", "remote.origin.url"], folder).stdout.strip()
    revision = _git(["config", "--local", "fastsd.revision"], folder).stdout.strip()
    return (place, revision) if place and revision else None


def clone(repository: Repository, folder: Path, *, mirrors: Mapping[str, str] | None = None) -> bool:
    """Bring a repository's code to `folder` at its revision; True when something was done.

    A folder that is there already is moved to the revision, unless its user changed files in it. A new one appears
    only when it is whole.

    Raises:
        WebUIError: git is missing, no place has it, or there are changes that would be lost.
    """
    if shutil.which("git") is None:
        raise WebUIError("git is not installed, and it downloads the web UI's code.", "Install git: apt install git")
    places = [mirrors[repository.name]] if mirrors and repository.name in mirrors else list(repository.urls)
    if folder.is_dir() and any(folder.iterdir()):
        return _update(repository, folder, places)
    problems, answered = [], False
    for place in places:
        temporary = unfinished_name(folder)
        with file_errors(folder, "write to"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        try:
            problem = _fetch(temporary, place, repository.revision)
            if not problem:
                with contextlib.suppress(FileNotFoundError):
                    folder.rmdir()  # empty
                os.replace(temporary, folder)
                return True
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        logger.info("%s could not be downloaded from %s: %s", repository.name, _shown(place), problem)
        problems.append(f"{_shown(place)}: {problem}")
        answered |= problem.startswith("it ")  # the place answers, and has not what is asked for
    check = "the commit, tag or branch" if answered else "the address and the connection"
    raise WebUIError(
        f"The code of {repository.name} could not be downloaded. {'; '.join(problems)}.",
        f"Check {check}, or give a mirror: --mirrors {repository.name}=URL-OR-FOLDER",
    )


def _update(repository: Repository, folder: Path, places: Sequence[str]) -> bool:
    there = commit_of(folder)
    if there is None:
        raise WebUIError(f"{folder} holds something that is not {repository.name}.", "Move it and run this again.")
    # A branch or tag is not asked for again: what was installed stays until its folder is deleted, or another place is
    # named for it.
    known = [(place, repository.revision) for place in places if not _COMMIT.fullmatch(repository.revision)]
    if there == repository.revision or (known and revision_of(folder) in known):
        return False
    if _git(["status", "--porcelain", "--untracked-files=no"], folder).stdout.strip():
        raise WebUIError(
            f"Files of {folder} were changed by hand, and another version of it is required.",
            "Save your changes elsewhere, delete that folder, and run this again.",
        )
    problems = [problem for place in places if (problem := _fetch(folder, place, repository.revision))]
    if len(problems) == len(places):
        raise WebUIError(
            f"{folder} could not be brought to the version that is required: {problems[-1]}.",
            f"Check the connection, or delete {folder} and run this again.",
        )
    return True


def _fetch(folder: Path, place: str, revision: str) -> str:
    """Fetch a revision into a repository that may be empty, and check it out; returns "" or what went wrong."""
    if not (folder / ".git").exists():
        _git(["init", "--quiet"], folder)
    # One commit without its history where the server allows it, else everything.
    done = _git(["fetch", "--quiet", "--depth", "1", place, revision], folder)
    if done.returncode != 0:
        everything = _git(["fetch", "--quiet", "--tags", place, "+refs/heads/*:refs/fetched/*"], folder)
        if everything.returncode != 0:
            return _last(everything.stderr) or "git said nothing"
        target = revision
    else:
        target = "FETCH_HEAD"
    # On a branch of its own: the UI complains about a detached HEAD.
    done = _git(["checkout", "--quiet", "--force", "-B", "fastsd", target], folder)
    if done.returncode != 0:
        return f"it has no {revision[:12]}"
    if _COMMIT.fullmatch(revision) and commit_of(folder) != revision:
        return f"it gave another commit than {revision[:12]}"
    _git(["config", "fastsd.revision", revision], folder)
    # For the UI's own look at where it comes from; without this it fails on a repository that has no remote.
    _git(["remote", "remove", "origin"], folder)
    _git(["remote", "add", "origin", place], folder)
    return ""


def pack(folder: Path, bundle: Path) -> list[str]:
    """Write the code of a repository's present commit into one file.

    Returns:
        The commits whose parents are not in it: `unpack` has to be told.

    Raises:
        WebUIError: git could not.
    """
    done = _git(["bundle", "create", "--quiet", str(bundle), "HEAD"], folder)
    if done.returncode != 0:
        raise WebUIError(f"{folder} could not be packed: {_last(done.stderr)}.", "Make room, and run this again.")
    shallow = folder / ".git" / "shallow"
    return shallow.read_text(encoding="ascii").split() if shallow.exists() else []


def unpack(bundle: Path, folder: Path, repository: Repository, shallow: Sequence[str]) -> None:
    """Bring the code out of such a file to an empty folder, at the repository's commit.

    Raises:
        WebUIError: it does not hold that commit, or is damaged.
    """
    _git(["init", "--quiet"], folder)
    if shallow:
        (folder / ".git" / "shallow").write_text("".join(f"{commit}\n" for commit in shallow), encoding="ascii")
    done = _git(["fetch", "--quiet", str(bundle), "HEAD"], folder)
    if done.returncode == 0:
        done = _git(["checkout", "--quiet", "--force", "-B", "fastsd", repository.revision], folder)
    if done.returncode != 0 or commit_of(folder) != repository.revision:
        raise WebUIError(
            f"{bundle} does not hold {repository.name} at {repository.revision[:10]}.",
            "Delete that file and run this again: the code is fetched from its address.",
        )
    _git(["config", "fastsd.revision", repository.revision], folder)
    _git(["remote", "add", "origin", repository.urls[0]], folder)


def list_own_files(folder: Path) -> list[str]:
    """Names of the files of a repository that its code does not have, ignored ones too, or has otherwise."""
    found = []
    for words in (["ls-files", "--others", "-z"], ["diff", "--name-only", "-z", "HEAD"]):
        found += _git(words, folder).stdout.split("\0")
    return sorted({name for name in found if name})


def _git(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    # Without the prompt: a repository that is gone makes GitHub ask for a password, for ever.
    environment = {**environment_for("git"), "GIT_TERMINAL_PROMPT": "0", "GIT_ASKPASS": "true", "LC_ALL": "C"}
    # A folder that another user made (a mirror on a shared disk) is read too; it was named by the user.
    command = ["git", "-c", "safe.directory=*", "-c", "advice.detachedHead=false", *words]
    try:
        return subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"nothing came within {_TIMEOUT_S} s")


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return ""
    # The address is named in front of this already.
    said = re.sub(r"^unable to access '[^']*': ", "", lines[-1].removeprefix("fatal: ").rstrip("."))
    return re.sub(r"//[^/@\s]+@", "//", said)[:200]


def _shown(place: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//", place)
