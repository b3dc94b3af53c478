"""The process that holds the link of a web UI in the background; says so to its parent in a line of JSON."""

import contextlib
import json
import logging
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import FastSDError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.options import from_values
from fastsd_helpers.processes import LocalProcess, boot_id
from fastsd_helpers.runtime import start_log
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui.running.background import MARK, SAID, BackgroundLink
from fastsd_helpers.webui.running.process import is_running, read_run
from fastsd_helpers.webui.running.sharing import share_port

__all__ = ["main"]

_LOOK_EVERY_S = 2


def main(words: list[str]) -> int:
    """Make the link, say so, and hold it until the web UI ends or this process is ended.

    Args:
        words: port, folder of the run, and settings of the link as JSON; its secrets are on standard input, as JSON.
    """
    port, run, values = int(words[0]), Path(words[1]), json.loads(words[2]) | json.load(sys.stdin)
    start_log(sys.stdout).setFormatter(logging.Formatter(f"{SAID}%(message)s"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    me = LocalProcess.me()

    def note(link: Any) -> dict[str, Any]:
        lines = [line for line in link.block().splitlines() if line not in (link.login.lines() if link.login else ())]
        about = BackgroundLink(
            link.url,
            link.kind,
            link.note,
            "\n".join(lines),
            link.visitor_password,
            link.expires.isoformat() if link.expires else None,
            me.pid,
            me.start,
            boot_id(),
        )
        said = asdict(about)
        write_atomic(run / "link.json", json.dumps(said).encode())
        return said

    try:
        with share_port(port, from_values(TunnelConfig, values), on_change=note) as link:
            _say(note(link))
            while not link.wait(_LOOK_EVERY_S):
                state = read_run(run)
                if state is None or state.port != port or not is_running(state):
                    break
    except FastSDError as err:
        _say({"problem": err.problem, "hint": err.hint})
        return 1
    finally:
        with contextlib.suppress(OSError):
            (run / "link.json").unlink()
    return 0


def _say(what: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()
