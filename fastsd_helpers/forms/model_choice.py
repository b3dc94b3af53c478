"""Choosing a model in a notebook: a known one, a Hub id, a path or a link, with what it is and whether it fits here."""

import html
from collections.abc import Callable

from fastsd_helpers.forms.view import load_widgets
from fastsd_helpers.model_lookup import understand
from fastsd_helpers.registry import ModelSpec, models
from fastsd_helpers.runtime import Device, describe_device

__all__ = ["ModelChoice", "describe_fit"]

_OTHER = "another one: type it above"
_AUTO = "auto"


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
    """A field that takes any model, and a dropdown of the known ones; `read()` is what `fetch_model` and `fetch` take.

    The text is the value: choosing in the dropdown fills it in. Show `widget` in a cell, or place `text`, `known` and
    `about` yourself.

    Args:
        kind: which models are offered: base, reader, checkpoint, vae, text-encoder, or None for all.
        use: what it is chosen for, to tell whether it fits: draw, lora or full.
        families: only these, when given.
        auto: what the choice "auto" does, in words; empty: it is not offered.
        value: what is chosen at first; left alone, auto or the first known model.
        changed: called with the new value after every change.
    """

    def __init__(
        self,
        *,
        kind: str | None = "base",
        use: str = "draw",
        families: tuple[str, ...] = (),
        auto: str = "",
        value: str = "",
        changed: Callable[[str], None] | None = None,
    ) -> None:
        widgets = load_widgets()
        self._specs = {spec.key: spec for spec in models(kind) if not families or spec.family in families}
        self._use, self._auto = use, auto
        self._changed: Callable[[str], None] | None = None
        self._device: Device | None = None
        entries = [(f"{_AUTO}: {auto}", _AUTO)] if auto else []
        entries += [(f"{spec.key}: {spec.title}", spec.key) for spec in self._specs.values()]
        self._keys = [key for _label, key in entries]
        # So that a column of fixed width around them may make them narrower.
        wide = widgets.Layout(width="460px", max_width="calc(100% - 4px)")  # a widget has 2 px of margin
        self.text = widgets.Combobox(
            options=self._keys,
            placeholder="owner/name, /path/to/model, https://...",
            ensure_option=False,
            continuous_update=False,
            layout=wide,
        )
        self.known = widgets.Dropdown(options=[*entries, (_OTHER, "")], value="", layout=wide)
        self.about = widgets.HTML()
        self.widget = widgets.VBox([self.text, self.known, self.about])
        self.text.observe(lambda _change: self._typed(), names="value")
        self.known.observe(lambda _change: self._picked(), names="value")
        self.write(value or next(iter(self._keys), ""))
        self._show()
        self._changed = changed

    def read(self) -> str:
        """What was chosen: auto, a key, or any other text without blanks around it."""
        return self.text.value.strip()

    def write(self, value: str) -> None:
        """Choose a key, or type any other text."""
        self.text.value = value

    def set_use(self, use: str) -> None:
        """Say what it is chosen for from now on: draw, lora or full."""
        if use != self._use:
            self._use = use
            self._show()

    def _typed(self) -> None:
        self.known.value = self.read() if self.read() in self._keys else ""
        self._show()
        if self._changed is not None:
            self._changed(self.read())

    def _picked(self) -> None:
        if self.known.value:
            self.text.value = self.known.value
        elif self.read() in self._keys:
            self.text.value = ""  # "another one" makes room for it

    def _show(self) -> None:
        self.about.value = "<br>".join(html.escape(line) for line in self._lines())

    def _lines(self) -> list[str]:
        chosen = self.read()
        if chosen == _AUTO and self._auto:
            return []  # the dropdown's entry says it
        spec = self._specs.get(chosen)
        if spec is None:
            return [_kind_of_text(chosen)]
        # Asked once, and late: describing the processor imports torch.
        if self._device is None:
            self._device = describe_device()
        size = f"{spec.bytes / 1e9:.1f} GB" if spec.bytes else "size not known" if spec.sources else "in this package"
        lines = [f"{size} · {spec.licence}"]
        if spec.gated:
            lines.append(f"⚠ Needs a token (HF_TOKEN) of an account that accepted the licence at {spec.licence_page}")
        fits, reason = describe_fit(spec, self._device, self._use)
        lines.append(f"{ {True: '✓', False: '⚠', None: '·'}[fits] } {reason}")
        if spec.note:
            lines.append(spec.note)
        return lines


def _kind_of_text(text: str) -> str:
    if not text:
        return "Type a Hub id, paste a link, or give a path."
    said = {
        "link": "A link: the file is downloaded, checked, and its kind told by its content.",
        "folder": "A path on this machine.",
        "file": "A path on this machine.",
        "hub": "A model of the Hugging Face Hub.",
        "key": "A model with a key, of another kind than those above.",
    }
    return said.get(understand(text).what, "⚠ Neither a path that is here, nor a Hub id (owner/name), nor a link.")
