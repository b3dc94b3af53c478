"""Choosing a model in a notebook: a known one, a Hub id, a path or a link, with what it is and whether it fits here."""

import html
import re
from collections.abc import Callable
from pathlib import Path

from fastsd_helpers.downloads import is_link
from fastsd_helpers.forms.fields import load_widgets
from fastsd_helpers.registry import ModelSpec, models
from fastsd_helpers.runtime import Device, describe_device

__all__ = ["ModelChoice", "describe_fit"]

_OTHER = "other: Hub id, path or link"


def describe_fit(spec: ModelSpec, device: Device, use: str) -> tuple[bool | None, str]:
    """Say whether a model fits a processor for a use: draw, lora or full.

    Returns:
        (True, False or None for unknown, the reason in words).
    """
    needed = spec.vram_gb.get(use)
    if needed is None:
        return None, "how much GPU memory it takes is not known"
    if needed <= 1:
        return True, "runs without a GPU"
    have = device.memory_bytes / 1e9
    if device.kind == "cpu":
        return False, f"wants a GPU with {needed:g} GB, and none is attached"
    fits = needed <= have
    return fits, f"wants {needed:g} GB of GPU memory, and {device.name} has {have:.0f} GB"


class ModelChoice:
    """A dropdown of known models and a text field for any other; `value` is what `fetch_model` and `fetch` take.

    Show `widget` in a cell. `read()` gives the value, `write()` sets it.

    Args:
        kind: which models are offered: base, reader, checkpoint, vae, text-encoder, or None for all.
        use: what it is chosen for, to tell whether it fits: draw, lora or full.
        families: only these, when given.
        changed: called with the new value after every change.
    """

    def __init__(
        self,
        *,
        kind: str | None = "base",
        use: str = "draw",
        families: tuple[str, ...] = (),
        value: str = "",
        changed: Callable[[str], None] | None = None,
    ) -> None:
        widgets = load_widgets()
        self._specs = {spec.key: spec for spec in models(kind) if not families or spec.family in families}
        self._use, self._changed = use, changed
        self._device: Device | None = None
        entries = [(f"{spec.key}: {spec.title}", spec.key) for spec in self._specs.values()]
        wide = widgets.Layout(width="460px")
        self._list = widgets.Dropdown(options=[*entries, (_OTHER, "")], layout=wide)
        self._text = widgets.Text(placeholder="owner/name, /path/to/model, https://...", layout=wide)
        self._text.continuous_update = False
        self._about = widgets.HTML()
        self.widget = widgets.VBox([self._list, self._text, self._about])
        self._list.observe(lambda _change: self._show(), names="value")
        self._text.observe(lambda _change: self._show(), names="value")
        self.write(value or next(iter(self._specs), ""))
        self._show()

    def read(self) -> str:
        """What was chosen: a key, or the text without blanks around it."""
        return self._list.value or self._text.value.strip()

    def write(self, value: str) -> None:
        """Choose a key, or type any other text."""
        known = value in self._specs
        self._list.value = value if known else ""
        self._text.value = "" if known else value

    def _show(self) -> None:
        self._text.layout.display = "none" if self._list.value else ""
        # Asked once, and late: describing the processor imports torch.
        if self._device is None and self._list.value:
            self._device = describe_device()
        self._about.value = "<br>".join(html.escape(line) for line in self._lines())
        if self._changed is not None:
            self._changed(self.read())

    def _lines(self) -> list[str]:
        spec = self._specs.get(self._list.value)
        if spec is None:
            return [_kind_of_text(self._text.value.strip())]
        size = f"{spec.bytes / 1e9:.1f} GB" if spec.bytes else "size not known" if spec.sources else "in this package"
        lines = [f"{size} · {spec.licence}"]
        if spec.gated:
            lines.append(f"⚠ Needs a token (HF_TOKEN) of an account that accepted the licence at {spec.licence_page}")
        fits, reason = describe_fit(spec, self._device or describe_device(), self._use)
        lines.append(f"{ {True: '✓', False: '⚠', None: '·'}[fits] } {reason}")
        if spec.note:
            lines.append(spec.note)
        return lines


def _kind_of_text(text: str) -> str:
    if not text:
        return "Type a Hub id, paste a link, or give a path."
    if is_link(text):
        return "A link: the file is downloaded, checked, and its kind told by its content."
    if Path(text).expanduser().exists():
        return "A path on this machine."
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text):
        return "A model of the Hugging Face Hub."
    return "⚠ Neither a path that is here, nor a Hub id (owner/name), nor a link."
