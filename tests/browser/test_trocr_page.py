"""The shared reading page as a visitor sees it: refused with a wrong password, an image read after the right one."""

import os
from pathlib import Path

import pytest
from tiny_readers import noise_pictures, write_reader

from browser.lab import PATIENCE_S, open_browser

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def shoot(page, name):
    shots = os.environ.get("FASTSD_SCREENSHOTS")
    if shots:
        Path(shots).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=str(Path(shots) / f"{name}.png"))


def log_in(page, user, password):
    page.get_by_label("username").fill(user)
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


def test_a_visitor_logs_in_and_reads_a_line(tmp_path):
    pytest.importorskip("gradio")
    pytest.importorskip("transformers")
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading.serve import ServeConfig, serve

    write_reader(tmp_path / "reader", seed=1, end=4.0)
    reader = Reader(tmp_path / "reader", precision="fp32", max_new_tokens=6)
    # A picture whose text is more than marks and blanks, so that it can be seen on the page.
    picture, expected = next(
        (picture, line.text)
        for picture in noise_pictures(200)
        if (text := (line := reader.read(picture)[0]).text).isascii() and text.isprintable() and len(text.strip()) > 2
    )
    picture.save(tmp_path / "line.png")
    served = serve(reader, ServeConfig(port=0))
    try:
        with open_browser() as page:
            page.goto(served.url)
            page.get_by_label("password").wait_for()
            assert "Handwriting recognition" not in page.inner_text("body")
            log_in(page, served.user, "wrong")
            page.get_by_text("Incorrect").wait_for()
            shoot(page, "page-refused")
            assert page.request.get(f"{served.url}config").status == 401
            log_in(page, served.user, served.password)
            page.get_by_text("Handwriting recognition").wait_for()
            page.locator("input[type=file]").first.set_input_files(str(tmp_path / "line.png"))
            page.locator("img").first.wait_for()
            page.get_by_role("button", name="Read", exact=True).click()
            box = page.get_by_label("Text", exact=True)
            page.wait_for_function(
                "expected => [...document.querySelectorAll('textarea')].some(area => area.value === expected)",
                arg=expected,
                timeout=PATIENCE_S * 1000,
            )
            assert box.count() >= 1
            shoot(page, "page-read")
    finally:
        served.app.close()
