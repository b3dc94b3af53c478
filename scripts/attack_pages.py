"""Attack a real web UI that is installed here from pages of other origins in Chromium, through the gate.

python scripts/attack_pages.py --folder DIR --store DIR [--ui a1111] [--extra-args WORDS]

Starts the web UI as `fastsd webui launch` does, opens the gate as a link does, logs a visitor in at
https://gated.gradio.live (a front on this machine ends the encryption), and lets pages of other origins send whatever
a browser can send. Prints what of it arrived at the web UI; ends with 1 when anything of a foreign page did. Chromium,
Playwright and openssl are needed.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# A post, an upload, a socket, a stream of events and a page of each.
PATHS = {
    "a1111": ("/sdapi/v1/txt2img", "/upload", "/queue/join", "/queue/status", "/config"),
    "forge-neo": ("/sdapi/v1/txt2img", "/upload", "/queue/join", "/queue/data", "/config"),
    "comfyui": ("/api/prompt", "/api/upload/image", "/ws", "/api/events", "/api/object_info"),
}


def attack(running: Any, folder: Path) -> list[tuple[str, set[str]]]:
    """Let every page send everything; gives what arrived at the web UI, for the link's own page first."""
    from browser.origins import ATTACKERS, Record, open_world

    from fastsd_helpers.tunnels.gate.server import open_gate

    record = Record()
    login = running.login
    upstream = login if running.ui.has_login else None
    with open_gate(running.port, login, upstream_login=upstream, closed=running.ui.closed) as gate:
        _note_what_passes(gate, record)
        gate.set_public_url("https://gated.gradio.live")
        with open_world(folder, {"gated": gate.port}, record) as world:
            page = world.page
            page.goto("https://gated.gradio.live/")
            page.locator("input[name=user]").fill(login.user)
            page.locator("input[name=password]").fill(login.password)
            page.locator("button").click()
            page.wait_for_function("!location.pathname.includes('.fastsd')")
            rows = []
            for name in ["same origin", *ATTACKERS]:
                arrived, _seen = world.attack(name, "https://gated.gradio.live", PATHS[running.ui.key], "gated")
                rows.append((name, arrived))
            if not world.logged_in("gated"):
                rows.append(("logged out", {"logout"}))
            return rows


def _note_what_passes(gate: Any, record: Any) -> None:
    handle = gate._proxy.handle

    async def noted(request: Any, connection: Any) -> Any:
        record.note(request.query_string)
        return await handle(request, connection)

    gate._proxy.handle = noted


def main() -> int:
    """Print what arrived from which page."""
    from fastsd_helpers.webui import LaunchConfig, launch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ui", default="a1111", choices=sorted(PATHS))
    parser.add_argument("--folder", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--extra-args", default="")
    options = parser.parse_args()
    config = LaunchConfig(
        ui=options.ui, folder=options.folder, store=options.store, extra_args=options.extra_args, wait_s=900
    )
    with launch(config) as running, tempfile.TemporaryDirectory() as folder:
        rows = attack(running, Path(folder))
    for name, arrived in rows:
        sys.stdout.write(f"| {name} | {', '.join(sorted(arrived)) or 'nothing'} |\n")
    return int(not rows[0][1] or any(arrived for _name, arrived in rows[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
