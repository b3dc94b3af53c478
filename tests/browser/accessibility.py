"""Every form of the notebooks in a real JupyterLab, looked at by axe-core: names, contrast, and what is out of sight.

The cells are those of the three notebooks with their forms untouched, some with something wrong typed into them, on
sessions that were really prepared, trained and read.
"""

import contextlib
import hashlib
import json
import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser.lab import PATIENCE_S, ROOT, Lab, open_browser, start_lab

__all__ = ["CELLS", "THEMES", "WIDTHS", "Finding", "find_axe", "look_at_everything", "open_forms"]

AXE = "4.14.1"
AXE_SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"
THEMES = ("JupyterLab Light", "JupyterLab Dark")
WIDTHS = (520, 1200)
RULES = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")

SET_UP = """
import os, sys
os.environ["HF_HUB_OFFLINE"] = "1"
from pathlib import Path
from fastsd_helpers import forms, show_form
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.sessions import Session

root = Path("Fast-Dreambooth/Sessions")
session = Session.create("robot", root=root)
pictures = forms.prepare_pictures(PrepareConfig(), session)
done = Session.open("full-done", root=Path("done"))
reading = forms.open_reading(forms.ReadingSessionConfig())
webui = forms.open_store(forms.StoreConfig(store="store", without_gpu=True))
"""
WRONG = """
from fastsd_helpers import DreamBoothConfig
form = show_form(DreamBoothConfig)
form.update(unet_steps=-3, lora_rank=5000, base_model="sdxl")
try:
    form.config()
except Exception:
    pass  # it is said at the fields, which is what is looked at
form
"""
LIVE = """
from fastsd_helpers.dreambooth.running.live import Live
from fastsd_helpers.forms.dreambooth.live_view import LiveView
view = LiveView()
wave = [(step, 0.2 + 0.1 * ((7 * step) % 5) / 5) for step in range(1, 100)]
live = Live(stage="unet", step=60, steps=200, seconds_left=125.0, losses={"text_encoder": wave, "unet": wave[:60]},
            messages=["Saved after step 50."], host_bytes=3 * 2**30)
view.show_run(live, {"text_encoder": 100, "unet": 200}, done.samples, force=True)
view.display()
"""
FINISHED = """
from fastsd_helpers.forms.dreambooth.live_view import LiveView
view = LiveView()
view.display()
view.end("Done.", good=True)
view.show_plot(done.folder / done.record["result"]["loss_plot"])
"""
# Title -> code; the last line is what the cell shows.
CELLS: dict[str, str] = {
    "set-up": SET_UP,
    "dreambooth-session": "show_form(forms.SessionConfig)",
    "dreambooth-photos": "forms.show_photos_form(session)",
    "dreambooth-crops": "forms.edit_crops(session)",
    "dreambooth-prompts": "forms.edit_captions(session)",
    "dreambooth-prepared": "forms.show_prepared(pictures)",
    "dreambooth-describe": "forms.show_captioner(session)",
    "dreambooth-settings": "from fastsd_helpers import DreamBoothConfig\nshow_form(DreamBoothConfig, restore=session)",
    "dreambooth-settings-wrong": WRONG,
    "dreambooth-dry-run": "forms.show_dry_run(show_form(DreamBoothConfig), session)",
    "dreambooth-run": "show_form(forms.RunConfig)",
    "dreambooth-live": LIVE,
    "dreambooth-finished": FINISHED,
    "dreambooth-result": "forms.show_result(done)",
    "dreambooth-play": "from fastsd_helpers import PlaygroundConfig\nshow_form(PlaygroundConfig)",
    "dreambooth-open": "forms.show_playground(PlaygroundConfig(), session)",
    "dreambooth-file": "from fastsd_helpers import ExportConfig\nshow_form(ExportConfig, restore=done)",
    "dreambooth-look": "forms.show_inspector(session)",
    "dreambooth-convert": "forms.show_converter(session)",
    "dreambooth-disconnect": "forms.show_disconnect(done)",
    "dreambooth-hub": "from fastsd_helpers import UploadConfig\nshow_form(UploadConfig)",
    "dreambooth-space": "forms.show_space(session)",
    "trocr-session": "show_form(forms.ReadingSessionConfig)",
    "trocr-lines": "forms.show_lines_form(reading)",
    "trocr-read": "from fastsd_helpers.trocr.reading.session import ReadPicturesConfig\n"
    "forms.read_pictures(ReadPicturesConfig(), reading)",
    "trocr-correct": "forms.correct_lines(reading)",
    "trocr-teach": "forms.show_teach_form(reading)",
    "trocr-evaluate": "forms.show_evaluator(reading)",
    "trocr-embed": "forms.show_embedder(reading)",
    "trocr-share": "from fastsd_helpers.trocr.reading.serve import ServeConfig\nshow_form(ServeConfig)",
    "trocr-open": "forms.share_reader(ServeConfig(), reading)",
    "trocr-hub": "show_form(forms.SessionUploadConfig)",
    "webui-store": "forms.show_store_form(forms.StoreConfig)",
    "webui-install": "from fastsd_helpers.webui import InstallConfig\nforms.show_ui_form(InstallConfig, webui)",
    "webui-models": "from fastsd_helpers.webui import ModelsConfig\nforms.show_ui_form(ModelsConfig, webui)",
    "webui-controlnets": "from fastsd_helpers.webui import ControlNetConfig\n"
    "forms.show_ui_form(ControlNetConfig, webui)",
    "webui-start": "from fastsd_helpers.webui import LaunchConfig\nforms.show_ui_form(LaunchConfig, webui)",
    "webui-link": "from fastsd_helpers.tunnels import TunnelConfig\nforms.show_ui_form(TunnelConfig, webui)",
    "webui-stop": "forms.show_stop(webui)",
    "webui-space": "forms.show_kept(webui)",
    "webui-file": "forms.show_ui_form(forms.ModelFileConfig, webui)",
}


class Finding(dict):
    """What axe found: id, impact, help, and the elements (cell, html, why)."""

    def __str__(self) -> str:
        places = "\n".join(
            f"      {node['cell']}: {node['html'][:200]}\n         {node['why']}" for node in self["nodes"]
        )
        return f"{self['impact']} {self['id']}: {self['help']}\n{places}"


def find_axe() -> Path | None:
    """axe-core's one file, fetched with npm into the environment the first time; None where it cannot be had."""
    kept = ROOT / ".venv" / f"axe-core-{AXE}.min.js"
    if not kept.is_file() and (shutil.which("npm") is None or not _fetch_axe(kept)):
        return None
    if hashlib.sha256(kept.read_bytes()).hexdigest() != AXE_SHA256:
        kept.unlink()
        return None
    return kept


def _fetch_axe(place: Path) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        # npm's own settings lie in the real home folder, which tests replace.
        settings = Path(pwd.getpwuid(os.getuid()).pw_dir) / ".npmrc"
        environment = os.environ | ({"NPM_CONFIG_USERCONFIG": str(settings)} if settings.is_file() else {})
        command = ["npm", "pack", "--silent", f"axe-core@{AXE}"]
        try:
            subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
            with tarfile.open(next(Path(folder).glob("*.tgz"))) as packed:
                data = packed.extractfile("package/axe.min.js").read()  # type: ignore[union-attr]
        except (subprocess.SubprocessError, OSError, StopIteration, KeyError):
            return False
    place.parent.mkdir(exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.part")
    temporary.write_bytes(data)
    temporary.replace(place)
    return True


@contextlib.contextmanager
def open_forms(folder: Path, cells: dict[str, str] | None = None) -> Iterator[Any]:
    """Run the cells in a JupyterLab in `folder` and give the page that shows them all, with axe-core in it."""
    cells = cells or CELLS
    with tarfile.open(ROOT / "tests" / "data" / "v0.1" / "sessions-full-done.tar.xz") as packed:
        packed.extractall(folder / "unpacked", filter="data")
    found = next((folder / "unpacked").rglob("session.json")).parent
    shutil.copytree(found, folder / "done" / found.name)
    _write_notebook(folder / "forms.ipynb", cells)
    windowing = folder / ".settings" / "@jupyterlab" / "notebook-extension"
    windowing.mkdir(parents=True)
    # Every cell is drawn, also one that is out of sight.
    (windowing / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    with open_browser() as page, start_lab(folder, more=["--LabApp.expose_app_in_browser=True"]) as address:
        lab = Lab(page, address, "forms.ipynb")
        page.evaluate("jupyterapp.commands.execute('application:toggle-left-area')")
        _run_all(page, lab)
        _wait_for_all(page, list(cells))
        page.add_style_tag(content=".jp-Notebook .jp-Cell-inputWrapper{display:none}")
        page.add_script_tag(path=str(find_axe()))
        yield page


def _run_all(page: Any, lab: Lab) -> None:
    """Run every cell; again where nothing was begun, as happens while a busy JupyterLab still draws the notebook."""
    prompt = lab.cell(next(iter(CELLS))).locator(".jp-InputPrompt").first
    end = time.monotonic() + PATIENCE_S
    while (prompt.text_content() or "").strip() in ("", "[ ]:") and time.monotonic() < end:
        # Not awaited: the command ends only when every cell has.
        page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
        for _ in range(25):
            page.wait_for_timeout(200)
            if (prompt.text_content() or "").strip() not in ("", "[ ]:"):
                break


def _wait_for_all(page: Any, titles: list[str]) -> None:
    """Wait for every cell; one that fails ends the waiting, because those after it are not run."""
    errors = page.locator("[data-mime-type='application/vnd.jupyter.stderr']")
    done, end = 0, time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        page.wait_for_timeout(1000)
        assert not errors.count(), errors.all_inner_texts()
        # The page has no other code cells, and is asked once for all of them.
        prompts = page.locator(".jp-Notebook .jp-CodeCell").evaluate_all(
            "cells => cells.map(cell => (cell.querySelector('.jp-InputPrompt') || cell).textContent)"
        )
        before, done = done, sum(bool(re.search(r"\[\d+\]", prompt)) for prompt in prompts)
        if done == len(titles):
            page.wait_for_timeout(3000)
            return
        if done > before:  # a busy machine takes its time for all of them together
            end = time.monotonic() + PATIENCE_S
    raise AssertionError(f"some cells are still running: {dict(zip(titles, prompts, strict=True))}")


def _write_notebook(path: Path, cells: dict[str, str]) -> None:
    made = [
        {
            "cell_type": "code",
            "id": title,
            "metadata": {},
            "execution_count": None,
            "outputs": [],
            "source": f"# @title {title}\n{code.strip()}",
        }
        for title, code in cells.items()
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": made, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))


def choose_theme(page: Any, theme: str) -> None:
    """Switch JupyterLab to a theme."""
    page.evaluate(f"jupyterapp.commands.execute('apputils:change-theme', {{theme: {theme!r}}})")
    light = "true" if "Light" in theme else "false"
    page.wait_for_selector(f"body[data-jp-theme-light={light}]", state="attached")
    page.wait_for_timeout(800)


def set_width(page: Any, width_px: int) -> None:
    """Make the page as wide as it takes for a cell's output to have this width."""
    for _ in range(4):
        have = page.locator(".jp-OutputArea-output").last.evaluate("output => output.clientWidth")
        if have == width_px:
            return
        size = page.viewport_size
        page.set_viewport_size({"width": size["width"] + width_px - have, "height": size["height"]})
        page.wait_for_timeout(700)


def run_axe(page: Any) -> list[Finding]:
    """Let axe-core look at what is below the cells."""
    found = page.evaluate(
        """async rules => (await axe.run({include: [['.jp-OutputArea']]},
            {runOnly: {type: 'tag', values: rules}, resultTypes: ['violations']})).violations.map(found => ({
                id: found.id, impact: found.impact, help: found.help,
                nodes: found.nodes.map(node => {
                    const element = document.querySelector(node.target[node.target.length - 1]);
                    const cell = element && element.closest('.jp-Cell');
                    const title = cell && cell.querySelector('.cm-line');
                    return {html: node.html, why: (node.failureSummary || '').replace(/\\s+/g, ' '),
                            cell: title ? title.textContent.replace('# @title ', '') : '?'};
                })}))""",
        list(RULES),
    )
    return [Finding(item) for item in found]


def out_of_sight(page: Any) -> list[str]:
    """What reaches over the right edge of its cell, or can only be reached by scrolling sideways."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.jp-OutputArea-output')].flatMap(output => {
            const title = output.closest('.jp-Cell').querySelector('.cm-line').textContent.replace('# @title ', '');
            const edge = output.getBoundingClientRect().left + output.clientWidth + 1;
            const parts = [...output.querySelectorAll('*')].filter(part => part.offsetParent !== null);
            const over = parts.filter(part => part.matches('input,select,textarea,button,img,svg,th,td,label')
                && !part.closest('svg *') && part.getBoundingClientRect().right > edge);
            const scrolls = parts.filter(part => part.scrollWidth > part.clientWidth + 1
                && ['auto', 'scroll'].includes(getComputedStyle(part).overflowX));
            return [...over.map(part => `${title}: over the edge: ${part.outerHTML.slice(0, 120)}`),
                    ...scrolls.map(part => `${title}: scrolls sideways: ${part.outerHTML.slice(0, 120)}`)];
        })"""
    )


def unnamed(page: Any) -> list[str]:
    """Inputs that a screen reader has no name for, told from the label or aria-label alone: axe takes a title too."""
    return page.evaluate(
        """() => [...document.querySelectorAll('.jp-OutputArea input, .jp-OutputArea select, .jp-OutputArea textarea')]
            .filter(field => field.offsetParent !== null && field.type !== 'hidden')
            .filter(field => !(field.getAttribute('aria-label') || '').trim()
                && ![...(field.labels || [])].some(label => label.textContent.trim()))
            .map(field => `${field.closest('.jp-Cell').querySelector('.cm-line').textContent}: ${field.outerHTML}`)"""
    )


def look_at_everything(page: Any, shots: Path | None = None) -> dict[str, list[Any]]:
    """Both themes at both widths.

    Returns:
        "serious": axe's serious and critical findings; "others": its milder ones; "unnamed": inputs without a label;
        "out_of_sight": what a narrow cell does not show. Each entry begins with theme and width.
    """
    told: dict[str, list[Any]] = {"serious": [], "others": [], "unnamed": [], "out_of_sight": []}
    for theme in THEMES:
        choose_theme(page, theme)
        for width in WIDTHS:
            set_width(page, width)
            where = f"{theme}, {width} px"
            page.set_viewport_size({"width": page.viewport_size["width"], "height": 2600})
            for found in run_axe(page):
                told["serious" if found["impact"] in ("serious", "critical") else "others"].append(f"{where}: {found}")
            told["out_of_sight"] += [f"{where}: {text}" for text in out_of_sight(page)]
            told["unnamed"] += [f"{where}: {text}" for text in unnamed(page)]
            if shots is not None:
                _shoot(page, shots, f"{'light' if 'Light' in theme else 'dark'}-{width}")
    return told


def _shoot(page: Any, shots: Path, name: str) -> None:
    shots.mkdir(parents=True, exist_ok=True)
    for cell in page.locator(".jp-Notebook .jp-CodeCell").all():
        title = (cell.locator(".cm-line").first.text_content() or "").removeprefix("# @title ").strip()
        area = cell.locator(".jp-OutputArea").first
        if area.count() and (area.bounding_box() or {}).get("height", 0) > 5:
            area.screenshot(path=str(shots / f"{title}-{name}.png"))
