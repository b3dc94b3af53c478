"""The web UI notebook as a person uses it: install, start, share, open the link, log in once, draw, stop."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from notebook_webui import LINK, prepare_kernel
from table_models import write_lora
from test_own_extensions import commit_in
from tunnel_doubles import free_port

from browser.lab import PATIENCE_S, ROOT, Lab, open_browser, start_lab
from fastsd_helpers.sessions import Session
from fastsd_helpers.webui import status, stop

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(3600)]


def fill(lab: Lab, title: str, values: dict[str, str]) -> None:
    """Type values into the form below a cell."""
    for name, value in values.items():
        lab.enter(title, name, value)
    lab.page.wait_for_timeout(1000)


def run(lab: Lab, title: str) -> None:
    """Run a cell and wait for it; on a busy machine the first key press may come before the page listens to keys."""
    prompt = lab.run(title, wait=False).locator(".jp-InputPrompt").first
    for _ in range(3):
        for _ in range(50):
            if (prompt.text_content() or "").strip() not in ("", "[ ]:"):
                lab.wait_done(title)
                return
            lab.page.wait_for_timeout(200)
        lab.run(title, wait=False)
    lab.wait_done(title)


def test_install_start_share_log_in_and_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jupyterlab")
    # JupyterLab's own start sets IPYTHONDIR below its root folder, so the kernel's first file goes there.
    folder = tmp_path / "lab"
    prepare_kernel(tmp_path / "edges", monkeypatch)
    folder.mkdir()
    shutil.copytree(tmp_path / "edges" / "ipython", folder / ".ipython")
    shutil.copy(ROOT / "notebooks" / "a1111.ipynb", folder)
    programs, store = str(tmp_path / "programs"), str(tmp_path / "store")
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    try:
        with open_browser() as page, start_lab(folder) as address:
            lab = Lab(page, address, "a1111.ipynb", Path(shots) if shots else None)
            own = what_is_the_users_own(folder)
            install(lab, programs, store, extension=own / "my-extension")
            choose_models(lab, page_saved_as_model=own / "page.safetensors")
            link, user, password = start_and_share(lab)
            open_the_link(lab, link, user, password)
            lab.page.bring_to_front()
            run(lab, "8")
            lab.cell("8").locator("button", has_text="Stop the web UI").click()
            lab.wait_for_output("8", "Stopped")
            lab.shoot("8-stopped", "8")
            assert status("a1111", folder=programs, store=store)[1] is False
            run(lab, "9")
            lab.shoot("9-space", "9")
            kept = lab.cell("9").locator("select").inner_text().replace("\xa0", " ")
            assert "AUTOMATIC1111 v1.10.1 itself" in kept
    finally:
        stop("a1111", folder=programs, store=store)


def what_is_the_users_own(folder: Path) -> Path:
    """A session that trained a LoRA where the notebook lies, an extension, and a web page saved as a model."""
    own = folder / "own"
    session = Session.create("zib", root=folder / "Fast-Dreambooth" / "Sessions")
    session.save(base_model={"ref": "demo", "sha256": None})
    write_lora(session.exports / "zib-lora.safetensors")
    commit_in(own / "my-extension", script__py="x = 1")
    (own / "page.safetensors").write_text("<!DOCTYPE html><html><title>Log in</title></html>")
    return own


def install(lab: Lab, programs: str, store: str, *, extension: Path) -> None:
    run(lab, "1")  # from here on the sentences are shown
    run(lab, "2a")
    lab.unfold("2a")
    fill(lab, "2a", {"store": store, "without gpu": "yes"})
    run(lab, "2b")
    run(lab, "3a")
    lab.unfold("3a")
    fill(lab, "3a", {"folder": programs, "extensions": str(extension)})
    lab.shoot("3a-install", "3a")
    run(lab, "3b")
    said = lab.output("3b")
    assert "The extension my-extension is a program" in said
    assert "is installed in" in said


def choose_models(lab: Lab, *, page_saved_as_model: Path) -> None:
    run(lab, "4a")
    fill(lab, "4a", {"model": "demo", "lora": str(page_saved_as_model)})
    run(lab, "4b")
    assert "page.safetensors is a web page, not a model" in lab.output("4b")
    assert "Writing" not in lab.output("4b"), "nothing is made before everything was looked at"
    fill(lab, "4a", {"lora": "session zib: lora.safetensors"})
    run(lab, "4b")
    said = lab.output("4b")
    lab.shoot("4b-models", "4b")
    assert "demo.safetensors (checkpoint): converted" in said
    assert "zib-lora.safetensors (lora): linked" in said
    run(lab, "5a")
    tasks = lab.field("5a", "tasks").locator("option").all_text_contents()
    assert any(text.startswith("all\xa0that\xa0fit:") for text in tasks)
    run(lab, "5b")
    lab.shoot("5b-controlnets", "5b")


def start_and_share(lab: Lab) -> tuple[str, str, str]:
    run(lab, "6a")
    lab.unfold("6a")
    fill(lab, "6a", {"port": str(free_port())})
    lab.shoot("6a-start", "6a")
    run(lab, "6b")
    assert "its model is loaded" in lab.output("6b")
    lab.shoot("6b-started", "6b")
    run(lab, "7a")
    assert not lab.field("7a", "password").is_visible(), "a link asks for the web UI's own login"
    lab.unfold("7a")
    fill(lab, "7a", {name.replace("_", " "): value for name, value in LINK.items()})
    run(lab, "7b")
    pattern = r"Link:\s+(\S+)\s+User:\s+(\S+)\s+Password:\s+(\S+)"
    link, user, password = re.search(pattern, lab.wait_for_output("7b", pattern)).groups()
    lab.shoot("7b-shared", "7b")
    return link, user, password


def open_the_link(lab: Lab, link: str, user: str, password: str) -> None:
    visitor = lab.page.context.browser.new_page()  # another visitor: no cookie of the notebook's
    visitor.set_default_timeout(PATIENCE_S * 1000)
    visitor.goto(link)
    visitor.wait_for_selector("input[name=password]")
    shoot(lab, visitor, "link-login")
    visitor.fill("input[name=user]", user)
    visitor.fill("input[name=password]", "wrong-password-1")
    visitor.click("button")
    visitor.wait_for_selector("[role=alert]")
    assert "Wrong user or password" in visitor.inner_text("body")
    visitor.fill("input[name=user]", user)
    visitor.fill("input[name=password]", password)
    visitor.click("button")
    box = visitor.get_by_label("Prompt")
    box.wait_for()
    box.fill("stressed")
    box.press("Enter")
    visitor.wait_for_function("() => document.querySelector('textarea, input').value === 'desserts'")
    shoot(lab, visitor, "link-page")
    visitor.close()


def shoot(lab: Lab, visitor: Any, name: str) -> None:
    if lab._shots is not None:
        visitor.screenshot(path=str(lab._shots / f"{name}.png"))
