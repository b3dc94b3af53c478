"""The file button in a real browser, its pieces answered by the Python side; what a notebook carries is elsewhere."""

from pathlib import Path

import pytest

from browser.lab import open_browser
from fastsd_helpers.forms.widgets import file_bridge
from fastsd_helpers.forms.widgets.file_bridge import FileBridge

pytest.importorskip("ipywidgets")

pytestmark = [pytest.mark.notebook]


def test_pieces_arrive_whole_and_a_file_that_is_too_large_is_named_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_bridge, "_MOST_BYTES", 3_000_000)
    kept: dict[str, bytes] = {}
    bridge = FileBridge("image/*,.txt", kept.__setitem__)
    contents = {"a.txt": b"words", "b.png": bytes(range(256)) * 10_000, "empty.png": b"", "huge.zip": bytes(3_000_001)}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)

    def answer(text: str) -> str:
        bridge._field.value = text
        return str(bridge._ack.value)

    with open_browser() as page:
        page.expose_function("answer", answer)
        page.set_content(
            f"{bridge._button.value}<div class='{bridge._id}'><input></div><div id='ack'></div>"
            f"<script>document.querySelector('.{bridge._id} input').addEventListener('change', async (event) => "
            "{ document.getElementById('ack').innerHTML = await answer(event.target.value); });</script>"
        )
        page.locator("input.fastsd-file").set_input_files([str(tmp_path / name) for name in contents])
        page.wait_for_function("!document.querySelector('.fastsd-file').disabled && document.querySelector("
                               "'.fastsd-said').textContent.includes('huge.zip')")  # fmt: skip
        said = page.locator(".fastsd-said").text_content()
    assert kept == {name: data for name, data in contents.items() if name != "huge.zip"}
    assert list(kept)[-1] == "a.txt", "captions come after the photos"
    assert said.startswith("Not sent, because larger than 3.0 MB: huge.zip. Put it on your Drive")
