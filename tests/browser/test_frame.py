"""What every frame of a notebook brings to its page, in a real browser: names with hyphens stay whole on a line."""

import html

import pytest

from browser.lab import open_browser
from fastsd_helpers.forms.widgets.style import read_script, read_style
from fastsd_helpers.forms.widgets.view import draw_notice, draw_script, draw_table

pytestmark = [pytest.mark.notebook]

# How many of the names that a frame of this width (px) shows lie on more than one line.
BROKEN = r"""(width) => { const frame = document.querySelector('.fastsd'); frame.style.width = width + 'px';
  const walk = document.createTreeWalker(frame, NodeFilter.SHOW_TEXT); let broken = 0;
  while (walk.nextNode()) for (const name of walk.currentNode.data.matchAll(/\S*-\S+/g)) {
    if (walk.currentNode.parentElement.closest('style,img')) continue;
    const range = document.createRange(); range.setStart(walk.currentNode, name.index);
    range.setEnd(walk.currentNode, name.index + name[0].length);
    broken += new Set([...range.getClientRects()].map(part => Math.round(part.top))).size > 1; }
  return broken; }"""
WIDTHS = range(260, 540, 20)


def test_a_name_with_hyphens_is_on_one_line_at_every_width_and_in_what_comes_later() -> None:
    said = "The keys are sd15-inpaint, sd21-512, trocr-base-handwritten and noobai-xl-eps; --no-half-vae is a flag."
    table = draw_table("files", ["name", "text"], [["my-first-photo-of-a-dog.jpg", html.escape(said)]])
    inside = f"{draw_notice(said, 'warn')}<div class='fastsd-help' id='help'>{said}</div>{table}"
    style, script = f"<style>{read_style()}</style>", draw_script(read_script("frame.js"))
    with open_browser() as page:
        page.set_content(f"{style}<div class='fastsd'>{inside}</div>")
        assert sum(page.evaluate(BROKEN, width) for width in WIDTHS) > 10, "without the script they break"
        page.set_content(f"{style}<div class='fastsd'>{script}{inside}</div>")
        page.wait_for_selector(".fastsd-word")
        assert [page.evaluate(BROKEN, width) for width in WIDTHS] == [0] * len(WIDTHS)
        assert page.inner_text("#help") == said, "and what is copied is what was said"
        page.evaluate("document.getElementById('help').textContent = 'Choose illustrious-xl or animagine-xl-4.'")
        page.wait_for_selector("#help .fastsd-word")
        assert [page.evaluate(BROKEN, width) for width in WIDTHS] == [0] * len(WIDTHS)
        # One that has no room on a line is broken: nothing is out of sight.
        page.evaluate("document.getElementById('help').textContent = 'a-long-name-of-a-model-'.repeat(5)")
        page.evaluate(BROKEN, 300)
        assert page.evaluate("(help => help.scrollWidth <= help.clientWidth)(document.getElementById('help'))")
