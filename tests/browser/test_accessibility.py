"""Everybody can use the forms: names for screen readers, contrast, keys, and a narrow cell; in a real JupyterLab."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from browser.accessibility import CELLS, find_axe, look_at_everything, open_forms

pytestmark = [pytest.mark.slow, pytest.mark.notebook, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page with every form."""
    pytest.importorskip("jupyterlab")
    pytest.importorskip("transformers")
    if find_axe() is None:
        pytest.skip("axe-core is missing: npm fetches it, and there is no npm or no network")
    with open_forms(tmp_path_factory.mktemp("lab")) as page:
        page.set_default_timeout(30_000)
        yield page


def test_nothing_serious_in_any_form_and_nothing_out_of_sight_in_a_narrow_cell(shown: Any) -> None:
    told = look_at_everything(shown)
    assert told["serious"] == [], "\n".join(told["serious"])
    assert told["unnamed"] == [], "\n".join(told["unnamed"])
    assert told["out_of_sight"] == [], "\n".join(told["out_of_sight"])


def cell(page: Any, title: str) -> Any:
    """The output of a cell."""
    return page.locator(".jp-Notebook .jp-CodeCell").nth(list(CELLS).index(title))


def wait_for(page: Any, is_so: Callable[[], Any]) -> None:
    """Look until it is so."""
    for _ in range(120):
        if is_so():
            return
        page.wait_for_timeout(250)
    assert is_so()


def test_the_crop_square_is_moved_and_resized_by_keys_and_keeps_them(shown: Any) -> None:
    crops = cell(shown, "dreambooth-crops")
    square = crops.locator(".fastsd-box")
    side, left = crops.get_by_label("side, px"), crops.get_by_label("left edge, px")
    square.focus()
    for _ in range(12):
        shown.keyboard.press("-")
    wait_for(shown, lambda: int(side.input_value()) < 128)
    small = int(side.input_value())
    for _ in range(30):
        shown.keyboard.press("ArrowRight")
    wait_for(shown, lambda: int(left.input_value()) == 128 - small)
    shown.keyboard.press("Shift+ArrowLeft")
    wait_for(shown, lambda: int(side.input_value()) < small)
    assert square.evaluate("square => square === document.activeElement"), "the next key is for the square too"
    assert "Not applied yet" in crops.inner_text()


def test_ctrl_enter_keeps_the_prompt_and_goes_on_instead_of_running_the_cell(shown: Any) -> None:
    prompts = cell(shown, "dreambooth-prompts")
    number = prompts.locator(".jp-InputPrompt").first.text_content()
    photo, words = prompts.get_by_label("photo", exact=True), prompts.get_by_label("the exact prompt")
    first = photo.input_value()
    words.fill("a zib robot by keyboard alone")
    words.press("Control+Enter")
    wait_for(shown, lambda: photo.input_value() != first)
    wait_for(shown, lambda: "by keyboard alone" in prompts.locator("table").inner_text())
    assert prompts.locator(".jp-InputPrompt").first.text_content() == number
    assert "keyboard" not in words.input_value()
    words.fill("typed, and never saved by a button")
    photo.focus()  # as whoever chooses the next photo leaves the field
    photo.select_option(label=first.replace("%20", " "))
    wait_for(shown, lambda: "never saved by a button" in prompts.locator("table").inner_text())


def test_a_screen_reader_hears_the_help_and_what_is_wrong_with_a_field(shown: Any) -> None:
    form = cell(shown, "dreambooth-settings-wrong")

    def heard(name: str) -> str:
        return form.get_by_label(name, exact=True).evaluate(
            """field => (field.getAttribute('aria-describedby') || '').split(' ')
                .map(id => (document.getElementById(id) || {}).textContent || '').join(' ')"""
        )

    assert "optimizer steps of the U-Net" in heard("unet steps")
    assert "the smallest is 0" in heard("unet steps")
    assert form.get_by_label("unet steps", exact=True).get_attribute("aria-invalid") == "true"
    assert form.get_by_label("seed", exact=True).get_attribute("aria-invalid") is None
    assert form.get_by_label("lora rank", exact=True).is_visible(), "the folded part is open where something is wrong"
    assert form.get_by_role("group", name="Settings for one DreamBooth run").count() == 1
