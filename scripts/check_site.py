"""Open every page of the built site in Chromium at three widths: axe-core, what is out of sight, requests elsewhere.

    make docs && python scripts/check_site.py [--shots FOLDER] [--only PAGE ...]

Prints what was found; ends with code 1 for a serious finding of axe-core, a page that a narrow window does not show, a
script that failed, or anything that was asked of another machine.
"""

import argparse
import functools
import http.server
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browser.accessibility import find_axe  # noqa: E402

SITE = ROOT / "build" / "site"
WIDTHS = (360, 800, 1400)
_SERIOUS = """async () => (await axe.run(document, {resultTypes: ['violations']})).violations
    .filter(found => ['serious', 'critical'].includes(found.impact))
    .map(found => `${found.id}: ${found.nodes.length} x ${found.nodes[0].target} ${found.nodes[0].failureSummary}`)"""
_FRAMES = "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
_TOO_WIDE = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@contextmanager
def served() -> Iterator[str]:
    """The built site at an address of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_words: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()


def look(page: Any, address: str, axe: Path, widths: Sequence[int], shot: Path | None) -> list[str]:
    """What is wrong with one page of the site at each width."""
    told: list[str] = []
    page.goto(address, wait_until="networkidle")
    page.add_style_tag(content="* { transition: none !important }")  # colours on their way are no colours
    page.add_script_tag(path=str(axe))
    for width in widths:
        page.set_viewport_size({"width": width, "height": 900})
        page.evaluate(_FRAMES)  # the page has answered to its new width
        told += [f"{width} px: {found}" for found in page.evaluate(_SERIOUS)]
        if (over := page.evaluate(_TOO_WIDE)) > 0:
            told.append(f"{width} px: {over} px are out of sight")
        if shot:
            shot.parent.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=str(shot.with_name(f"{shot.name}-{width}.png")))
    return told


def watch(page: Any, address: str, told: list[str]) -> None:
    """Note what a page asks of other machines, what does not come, and scripts that fail."""
    page.on(
        "request", lambda sent: sent.url.startswith((address, "data:", "blob:")) or told.append(f"asked: {sent.url}")
    )
    page.on("requestfailed", lambda sent: told.append(f"failed: {sent.url}"))
    page.on("pageerror", lambda error: told.append(f"script: {error}"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", type=Path, help="folder for an image of every page")
    parser.add_argument("--only", nargs="*", default=[], help="pages such as how/gate.html; default: all")
    asked = parser.parse_args()
    axe = find_axe()
    if axe is None or not SITE.is_dir():
        print("axe-core cannot be downloaded (is npm there?), or there is no site yet (make docs).")
        return 1
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium") or shutil.which("chromium-browser")
    names = asked.only or sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html"))
    told: list[str] = []
    with served() as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for scheme, widths in (("light", WIDTHS), ("dark", WIDTHS)):
            page = browser.new_context(color_scheme=scheme).new_page()
            watch(page, address, told)
            for name in names:
                shot = asked.shots / f"{name.replace('/', '-')}-{scheme}" if asked.shots else None
                told += [f"{name}, {scheme}, {found}" for found in look(page, address + name, axe, widths, shot)]
        browser.close()
    found = list(dict.fromkeys(told))
    print("\n".join(found) or f"{len(names)} pages: nothing found.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
