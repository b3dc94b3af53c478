"""A real JupyterLab and a real Chromium for tests: start them, open a notebook, run its cells, find its widgets."""

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

__all__ = ["LAB3", "Lab", "find_chromium", "on_front", "open_browser", "start_lab"]

ROOT = Path(__file__).resolve().parents[2]
# JupyterLab 3, which the front end of ipywidgets 7 was made for, and that version of ipywidgets for the kernel.
LAB3 = ROOT / ".venv-jupyterlab3"
WIDGETS7 = ROOT / ".venv-ipywidgets7"
# Somebody else may be using the machine: what takes two seconds alone can take twenty.
PATIENCE_S = 180
EDITOR = ".cm-content, .CodeMirror"  # of JupyterLab 4 and 3


def on_front(widgets: str) -> pytest.MarkDecorator:
    """Give a long journey as `widgets7` whether it goes through JupyterLab 3 with ipywidgets 7.7.1, or today's with 8.

    Each journey has one of the two, each notebook both; FASTSD_FRONTS=all (`make test-fronts`) takes both for each.
    """
    chosen = ("8", "7.7.1") if os.environ.get("FASTSD_FRONTS") == "all" else (widgets,)
    return pytest.mark.parametrize("widgets7", [one != "8" for one in chosen], ids=[f"ipywidgets {x}" for x in chosen])


def find_chromium() -> str | None:
    """The browser of the system, as Debian, Fedora or a desktop names it."""
    names = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


@contextlib.contextmanager
def start_lab(folder: Path, *, widgets7: bool = False, more: Sequence[str] = ()) -> Iterator[str]:
    """Run JupyterLab on 127.0.0.1 with `folder` as its root; gives its address with the token.

    With `widgets7` it is JupyterLab 3 from an environment of its own; the kernel, this Python, has ipywidgets 7.7.1.
    `more` are further arguments of its own.
    """
    token = secrets.token_hex(16)
    python = str(LAB3 / "bin" / "python") if widgets7 else sys.executable
    if widgets7 and not (LAB3.is_dir() and WIDGETS7.is_dir()):
        pytest.skip(f"{LAB3.name} or {WIDGETS7.name} is not there; make setup makes both")
    command = [python, "-m", "jupyterlab", "--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    command += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}", "--ServerApp.allow_root=True"]
    command += more
    environment = os.environ | {
        "PYTHONPATH": "" if widgets7 else str(ROOT),
        "JUPYTER_CONFIG_DIR": str(folder / ".jupyter"),
        "JUPYTER_DATA_DIR": str(folder / ".data"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".runtime"),
        "IPYTHONDIR": str(folder / ".ipython"),
    }
    if widgets7:
        command.append("--KernelSpecManager.ensure_native_kernel=False")
        environment["JUPYTER_PREFER_ENV_PATH"] = "0"
        _write_kernel(folder / ".data" / "kernels" / "python3")
    _write_settings(folder)
    environment["JUPYTERLAB_SETTINGS_DIR"] = str(folder / ".settings")
    with open(folder / "lab.log", "wb") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield f"{_address(process, folder)}lab?token={token}"
    finally:
        # Its kernels are in process groups of their own and end when the server does.
        os.kill(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def _write_settings(folder: Path) -> None:
    """Settings of the server and of the page without which each start asks, looks or loads for nothing."""
    # Otherwise a question about news lies over the cells.
    news = folder / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    # Whether JupyterLab has to be built anew is a question to Node.js and npm, at every load of a page.
    page = folder / ".jupyter" / "labconfig" / "page_config.json"
    # Language servers are looked for with npm, extensions at a registry, and the old notebook is a page of its own.
    server = folder / ".jupyter" / "jupyter_server_config.json"
    unused = dict.fromkeys(("jupyter_lsp", "nbclassic", "jupyter_server_ydoc"), False)
    texts: dict[Path, dict[str, Any]] = {
        news: {"fetchNews": "false", "checkForUpdates": False},
        page: {"buildAvailable": False, "buildCheck": False},
        server: {"ServerApp": {"jpserver_extensions": unused}, "LabApp": {"extension_manager": "readonly"}},
    }
    for path, values in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))


def _write_kernel(folder: Path) -> None:
    """The kernel that runs in this Python, not in the one of the server."""
    folder.mkdir(parents=True)
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
        "env": {"PYTHONPATH": os.pathsep.join([str(WIDGETS7), str(ROOT)])},
    }
    (folder / "kernel.json").write_text(json.dumps(spec))


def _address(process: "subprocess.Popen[bytes]", folder: Path) -> str:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for file in (folder / ".runtime").glob("jpserver-*.json"):
            with contextlib.suppress(ValueError, KeyError, OSError):
                url = json.loads(file.read_text())["url"]
                urllib.request.urlopen(f"{url}api", timeout=20)
                return url
        assert process.poll() is None, (folder / "lab.log").read_text()[-3000:]
        time.sleep(0.3)
    raise AssertionError((folder / "lab.log").read_text()[-3000:])


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """A page of headless Chromium; skips the test where Chromium or Playwright is not found."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("Chromium is not installed (apt install chromium)")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_S * 1000)
        try:
            yield page
        finally:
            browser.close()


class Lab:
    """One open notebook.

    Args:
        page: of `open_browser`.
        address: of `start_lab`.
        notebook: name of the file in the server's root.
        shots: folder for screenshots, or None.
    """

    def __init__(self, page: Any, address: str, notebook: str, shots: Path | None = None) -> None:
        self.page, self._shots = page, shots
        page.goto(address.replace("/lab?", f"/lab/tree/{notebook}?"))
        self.cells = page.locator(".jp-Notebook .jp-Cell")
        page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.wait_for_kernel()

    def wait_for_kernel(self) -> None:
        """Wait until the kernel is there and does nothing."""
        # Before there is a kernel the light says idle too, and a cell that is run then asks for one.
        self.page.wait_for_function(
            """() => {
                const name = document.querySelector(".jp-Toolbar-kernelName");
                const light = document.querySelector(".jp-Notebook-ExecutionIndicator");
                return name && !name.innerText.includes("No Kernel") && light && light.dataset.status === "idle";
            }"""
        )

    def cell(self, title: str) -> Any:
        """The code cell whose title begins with these words."""
        pattern = re.compile(rf"# @title {re.escape(title)}")
        return self.page.locator(".jp-Notebook .jp-CodeCell", has_text=pattern).first

    def run(self, title: str, *, wait: bool = True) -> Any:
        """Run a cell; waits until it is done."""
        cell = self.cell(title)
        cell.scroll_into_view_if_needed()
        cell.locator(EDITOR).first.click()
        self.page.keyboard.press("Control+Enter")
        if self._answer_kernel_question():
            cell.locator(EDITOR).first.click()
            self.page.keyboard.press("Control+Enter")
        if wait:
            self.wait_done(title)
        return cell

    def _answer_kernel_question(self) -> bool:
        """On a slow machine the page asks for a kernel although one is starting; take what it offers."""
        question = self.page.locator(".jp-Dialog", has_text="Select Kernel")
        self.page.wait_for_timeout(300)
        if not question.count():
            return False
        question.locator(".jp-mod-accept").click()
        question.wait_for(state="detached")
        self.wait_for_kernel()
        return True

    def wait_done(self, title: str, *, timeout_s: float = PATIENCE_S) -> None:
        """Wait until a cell has a number, which it gets when it is done."""
        prompt = self.cell(title).locator(".jp-InputPrompt").first
        end, pause_ms = time.monotonic() + timeout_s, 100.0
        while time.monotonic() < end:
            if re.fullmatch(r"\[\d+\]:", (prompt.text_content() or "").strip()):
                return
            self.page.wait_for_timeout(pause_ms)
            pause_ms = min(1000, 1.2 * pause_ms)  # the page looks through all its cells each time
        raise AssertionError(f"{title} is still running: {self.output(title)[-2000:]}")

    def wait_for_output(self, title: str, pattern: str, *, timeout_s: float = PATIENCE_S) -> str:
        """Wait until what is below a cell holds a pattern; gives all of it."""
        for _ in range(int(timeout_s * 4)):
            shown = self.output(title)
            if re.search(pattern, shown):
                return shown
            self.page.wait_for_timeout(250)
        raise AssertionError(f"{pattern!r} did not appear below {title}:\n{self.output(title)[-2000:]}")

    def output(self, title: str) -> str:
        """What a person can read below a cell."""
        return self.cell(title).locator(".jp-OutputArea").first.inner_text()

    def field(self, title: str, name: str) -> Any:
        """The input of a setting in the form below a cell, found by its label as a screen reader finds it."""
        return self.cell(title).get_by_label(name, exact=True).first

    def enter(self, title: str, name: str, value: str) -> None:
        """Fill in a field; one with a list of known values takes any other one in the field below it."""
        field = self.field(title, name)
        if field.evaluate("field => field.tagName") == "SELECT":
            known = field.locator("option").evaluate_all("options => options.map(option => option.textContent)")
            plain = {text.replace("\xa0", " "): text for text in known}  # a browser folds other blanks together
            wanted = [text for words, text in plain.items() if words == value or words.startswith(f"{value}:")]
            if wanted:
                field.select_option(label=wanted[0])
                return
            field.select_option(index=len(known) - 1)
            field = self.field(title, f"{name}: another one")
        if field.get_attribute("type") == "checkbox":
            field.check()
            return
        field.fill(value)
        field.press("Tab")

    def unfold(self, title: str) -> None:
        """Open the advanced settings of a form."""
        self.cell(title).locator(".jupyter-widget-Collapse-header, .p-Collapse-header").first.click()
        self.page.wait_for_timeout(500)

    def shoot(self, name: str, title: str | None = None) -> None:
        """Keep a screenshot of a cell, or of the notebook's page."""
        self.shoot_page(name, self.cell(title) if title else self.page)

    def shoot_page(self, name: str, thing: Any) -> None:
        """Keep a screenshot of a page or of a part of one."""
        if self._shots is None:
            return
        self._shots.mkdir(parents=True, exist_ok=True)
        thing.screenshot(path=str(self._shots / f"{name}.png"))
