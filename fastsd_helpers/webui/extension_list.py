"""Extensions that the owner of an installation adds: read from a setting, brought to the web UI's folder for them."""

import logging
import re
from pathlib import Path

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.webui.catalog import Repository, WebUI

__all__ = ["read_extensions", "warn_of"]

logger = logging.getLogger("fastsd_helpers")

_FORM = "Use an https address of a git repository or a folder of this machine, with an optional @COMMIT after it."


def read_extensions(text: str) -> list[Repository]:
    """Read "ADDRESS[@COMMIT], ADDRESS, ...": https addresses of git repositories, or folders that are one.

    Without a commit it is the newest one; once there, it stays until another commit is asked for.

    Raises:
        SettingsError: no https, a login in the address, no repository, or a name twice.
    """
    found: dict[str, Repository] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        address, mark, revision = part.rpartition("@")
        if not mark or "/" in revision:
            address, revision = part, "HEAD"
        if not re.fullmatch(r"[0-9A-Za-z][\w.-]*", revision):
            raise SettingsError(f"extensions (--extension) has {part!r}: {revision!r} is not a commit.", _FORM)
        name = address.rstrip("/").rpartition("/")[2].removesuffix(".git")
        if address.startswith("https://"):
            if not re.fullmatch(r"https://[\w.-]+(:\d+)?/[\w./~+-]+", address):
                raise SettingsError(
                    f"extensions (--extension) has {re.sub('//[^/@]*@', '//', part)!r}, which is not a plain address.",
                    _FORM,
                )
        else:
            folder = Path(address).expanduser().absolute()
            if "://" in address or ":" in address or not folder.exists():
                raise SettingsError(f"extensions (--extension) has {part!r}: neither https nor a folder here.", _FORM)
            if not (folder / ".git").exists() and not (folder / "HEAD").exists():
                raise SettingsError(
                    f"{folder} is not a git repository.", f"Run there: git init, git add, git commit. {_FORM}"
                )
            address, name = str(folder), folder.name.removesuffix(".git")
        if not re.fullmatch(r"\w[\w.-]*", name) or name in found:
            problem = "is there twice" if name in found else "is not a name for a folder"
            raise SettingsError(f"extensions (--extension) has {part!r}: {name!r} {problem}.", _FORM)
        found[name] = Repository(name, f"extension/{name}", (address,), revision)
    return list(found.values())


def warn_of(ui: WebUI, extension: Repository) -> None:
    """Say what adding an extension means."""
    logger.warning(
        "The extension %s is a program: with every start of %s it runs with all your rights. Add only what you trust.",
        extension.name,
        ui.title,
    )
