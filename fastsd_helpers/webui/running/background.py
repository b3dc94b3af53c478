"""A link of a web UI that runs in the background: held by a process of its own, which ends with the web UI."""

import contextlib
import dataclasses
import json
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import TunnelError
from fastsd_helpers.options import to_values
from fastsd_helpers.processes import (
    Child,
    ChildEnded,
    ChildMute,
    LocalProcess,
    boot_id,
    end_group,
    environment_for,
    with_this_package,
)
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels import Login, TunnelConfig
from fastsd_helpers.tunnels.services.kinds import find_token

__all__ = ["MARK", "SAID", "BackgroundLink", "end_link", "hold_link", "read_link"]

MARK, SAID = "fastsd-link ", "fastsd-says "


@dataclass(frozen=True)
class BackgroundLink:
    """A link that another process holds. Its login is kept in no file."""

    url: str
    kind: str
    note: str
    text: str  # the block to copy, without the login
    visitor_password: str | None
    until: str | None  # when it ends, as ISO 8601
    pid: int
    started: str | None
    boot: str
    login: Login | None = None

    def block(self) -> str:
        """Link, user, password and expiry in one block to copy; the password is in clear, so it is for no log."""
        first, *rest = self.text.splitlines()
        return "\n".join([first, *(self.login.lines() if self.login else []), *rest])

    def with_login(self, login: Login | None) -> "BackgroundLink":
        """The same link with what visitors enter."""
        return dataclasses.replace(self, login=login)

    def close(self) -> None:
        """End the process that holds it, and so the link; calling it twice is harmless."""
        end_group(self.process, grace_s=5)

    @property
    def closed(self) -> bool:
        """Whether nobody holds it any more."""
        return self.boot != boot_id() or not self.process.is_alive()

    @property
    def expires(self) -> datetime | None:
        """When it ends at the latest; None when nothing but the web UI's end ends it."""
        return datetime.fromisoformat(self.until) if self.until else None

    @property
    def process(self) -> LocalProcess:
        """Who holds it."""
        return LocalProcess(self.pid, self.started)


def hold_link(port: int, run: Path, config: TunnelConfig, login: Login) -> BackgroundLink:
    """Let a process of its own make a link to the web UI of a run, and hold it until the web UI ends.

    Args:
        port: where the web UI listens.
        run: the folder of its run, with its state.
        config: of the link.
        login: what visitors enter.

    Raises:
        TunnelError: no service gave a link; what it said is in the sentence.
    """
    token = find_token(config) if config.kind in ("auto", "ngrok") else None
    secrets = {"password": login.password, "ngrok_token": token}
    environment = with_this_package(environment_for("tunnel", this_python=True))
    code = "import sys; from fastsd_helpers.webui.running.link_holder import main; sys.exit(main(sys.argv[1:]))"
    words = [str(port), str(run), json.dumps(to_values(config) | {"user": login.user})]
    command = [sys.executable, "-u", "-c", code, *words]
    child = Child(
        command,
        log=run / "link.log",
        env=environment,
        hidden=[text for text in secrets.values() if text],
        outlives=True,
        told=json.dumps(secrets),
    )
    try:
        said = child.wait_for(_find, time.monotonic() + 5 * config.wait_s + 60)
    except BaseException as err:
        child.close()
        if not isinstance(err, (ChildEnded, ChildMute)):
            raise  # such as a cell that was stopped: what was tried until then ends too
        last = " / ".join(child.last_lines(2))
        raise TunnelError(f"The link could not be held in the background: {last}.", "Share it without it.") from err
    if "problem" in said:
        child.close()
        raise TunnelError(said["problem"], said["hint"])
    return BackgroundLink(**{**said, "login": login})


def _find(line: str) -> dict[str, Any] | None:
    if line.startswith(MARK):
        return json.loads(line.removeprefix(MARK))
    if line.startswith(SAID):
        logger.info("%s", line.removeprefix(SAID))  # which service it tries, and what that answers
    return None


def read_link(run: Path) -> BackgroundLink | None:
    """The link that is held for a run; None when none is."""
    try:
        link = BackgroundLink(**read_object(run / "link.json"))
    except TypeError:
        return None
    return link if link.boot == boot_id() and link.process.is_alive() else None


def end_link(run: Path) -> None:
    """End the link that is held for a run, when there is one."""
    link = read_link(run)
    if link is not None:
        end_group(link.process, grace_s=5)
    with contextlib.suppress(OSError):
        (run / "link.json").unlink()
