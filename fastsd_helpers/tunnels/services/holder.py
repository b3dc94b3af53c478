"""Holds one tunnel that a Python package makes, in a process of its own; speaks to its parent in lines of JSON.

pyngrok and gradio both read their agent's output in a way that can wait forever, and pyngrok shares one agent with
the whole process. Here neither matters: the parent has a deadline, and ends this process alone.

Its words are `ngrok PORT AGENT [DOMAIN]` (token in NGROK_AUTHTOKEN) or `gradio PORT FRPC [HOST:PORT of a share
server]`. AGENT and FRPC are the programs to run, which the parent has checked: nothing is downloaded here.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import secrets
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

__all__ = ["MARK", "main"]

MARK = "fastsd-tunnel "


def main(words: list[str]) -> int:
    """Open the tunnel, say so, and stay until it dies or this process is ended."""
    try:
        kind, port, *rest = words
        alive = {"ngrok": _open_ngrok, "gradio": _open_gradio}[kind](int(port), *rest)
    except Exception as err:
        code = str(getattr(err, "ngrok_error_code", "") or "")
        _say(error=type(err).__name__, code=code, text=f"{err} {err.__cause__ or ''}".strip()[:4000])
        return 1
    while alive():
        time.sleep(0.5)
    _say(error="Ended", code="", text="The tunnel's program ended.")
    return 1


def _say(**what: Any) -> None:
    # On a line of its own: pyngrok leaves the one of its download unfinished.
    sys.stdout.write(f"\n{MARK}{json.dumps(what)}\n")
    sys.stdout.flush()


def _open_ngrok(port: int, agent: str, domain: str = "") -> Any:
    # The token goes into a file that only this user can read: pyngrok would put it on the command line.
    token = os.environ.pop("NGROK_AUTHTOKEN", "")
    from pyngrok import conf, ngrok
    from pyngrok.exception import PyngrokNgrokError

    config = Path.cwd() / "ngrok.yml"
    with open(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        file.write(f'version: "3"\nagent:\n  authtoken: {json.dumps(token)}\n')
    # A token that ngrok refuses is said by its agent after "started"; the log has the code, the exception not always.
    codes: list[str] = []

    def note(line: Any) -> None:
        if "ERR_NGROK_" in (found := str(getattr(line, "err", "") or line)):
            codes.append("ERR_NGROK_" + found.split("ERR_NGROK_", 1)[1].split()[0].strip(".,'\"\\rn"))

    if not Path(agent).is_file():  # pyngrok would download one then, and compare it with nothing
        raise FileNotFoundError(f"{agent} is not there")
    setup = conf.PyngrokConfig(
        config_path=str(config), ngrok_path=agent, startup_timeout=60, request_timeout=20, log_event_callback=note
    )
    try:
        made = ngrok.connect(port, "http", pyngrok_config=setup, **({"domain": domain} if domain else {}))
        process = ngrok.get_ngrok_process(setup).proc
    except PyngrokNgrokError as err:
        if codes and not getattr(err, "ngrok_error_code", None):
            err.ngrok_error_code = codes[-1]
        raise
    finally:
        with contextlib.suppress(OSError):
            config.unlink()
    _say(url=made.public_url)
    return lambda: process.poll() is None


def _open_gradio(port: int, frpc: str, server: str = "") -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    networking, tunneling = _gradios_tunnels()
    # gradio writes what it downloads before it compares it, and runs what lies there the next time.
    tunneling.BINARY_PATH = frpc
    tunneling.Tunnel.download_binary = staticmethod(lambda: None)
    opened = threading.Event()
    threading.Thread(target=_end_with_program, args=(tunneling.CURRENT_TUNNELS, opened), daemon=True).start()
    url = networking.setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), server or None, None)
    opened.set()
    _say(url=url)
    tunnel = tunneling.CURRENT_TUNNELS[-1]
    for stream in (tunnel.proc.stdout, tunnel.proc.stderr):
        _drain(stream)
    return lambda: tunnel.proc is not None and tunnel.proc.poll() is None


def _gradios_tunnels() -> tuple[Any, Any]:
    """gradio's modules `networking` and `tunneling`, without the rest of it where they allow: that takes seconds."""
    names = ("gradio.networking", "gradio.tunneling")
    spec = importlib.util.find_spec("gradio")
    bare, routes = types.ModuleType("gradio"), types.ModuleType("gradio.routes")
    bare.__path__ = list(spec.submodule_search_locations or ()) if spec else []
    routes.App = None  # type: ignore[attr-defined]  # imported there for the order of imports, and not used
    sys.modules.update({"gradio": bare, "gradio.routes": routes})
    try:
        networking, tunneling = map(importlib.import_module, names)
    except Exception:  # those of another version need more
        for name in [name for name in sys.modules if name.partition(".")[0] == "gradio"]:
            del sys.modules[name]
        networking, tunneling = map(importlib.import_module, names)
    return networking, tunneling


def _end_with_program(tunnels: list[Any], opened: threading.Event) -> None:
    """End this process when gradio's program has ended without a link: gradio itself asks it on, for half a minute."""
    program = None
    while not opened.wait(0.2):
        if program is not None and program.poll() is not None:
            opened.wait(1)  # for gradio to read what it said last
            if not opened.is_set():
                said = program.stderr.read(1000).decode(errors="replace") if program.stderr else ""
                _say(error="Ended", code="", text=f"The tunnel's program ended. {said}".strip())
                os._exit(1)
        program = tunnels[-1].proc if tunnels else None


def _drain(stream: Any) -> None:
    """Read what nobody needs, so that the program that writes it never waits."""
    threading.Thread(target=lambda: [None for _line in stream], daemon=True).start()
