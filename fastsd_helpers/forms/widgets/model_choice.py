"""Choosing a model in a notebook: a known one, a Hub id, a path or a link, with what it is and whether it fits here."""

from fastsd_helpers.device import Device, describe_device
from fastsd_helpers.errors import FastSDError
from fastsd_helpers.forms.widgets.choice import Choice
from fastsd_helpers.model_lookup import known_model, understand
from fastsd_helpers.registry import ModelSpec, models, require_trainable, require_trainable_key

__all__ = ["ModelChoice", "describe_fit"]

_AUTO = "auto"


def describe_fit(spec: ModelSpec, device: Device, use: str) -> tuple[bool | None, str]:
    """Say whether a model fits a processor for a use: draw, lora or full.

    Returns:
        (True, False or None for unknown, the reason in words).
    """
    # A model that is trained in one way alone is meant by it, whatever is asked.
    needed = spec.vram_gb.get(use, spec.vram_gb.get(spec.defaults.get("method", "")))
    if needed is None:
        return None, "its GPU memory use is unknown"
    if needed <= 1:
        return True, "runs without a GPU"
    have = device.memory_bytes / 1e9
    if device.kind == "cpu":
        return False, f"needs a GPU with {needed:g} GB, and none is attached"
    fits = needed <= have
    return fits, f"wants {needed:g} GB of GPU memory, and {device.name} has {have:.0f} GB"


class ModelChoice(Choice):
    """A list of the known models that takes any other too; `read()` is what `fetch_model` and `fetch` take.

    Args:
        kind: which models are offered: base, reader, checkpoint, vae, text-encoder, or None for all.
        use: what it is chosen for, to tell whether it fits: draw, lora or full.
        families: only these, when given; of another known model it is said that it does not serve.
        auto: what the choice "auto" does, in words; empty: it is not offered.
        value: what is chosen at first; left alone, auto or the first known model.
        label: name of the setting, for those who hear the form.
    """

    def __init__(
        self,
        *,
        kind: str | None = "base",
        use: str = "draw",
        families: tuple[str, ...] = (),
        auto: str = "",
        value: str = "",
        label: str = "model",
    ) -> None:
        self._specs = {spec.key: spec for spec in models(kind) if not families or spec.family in families}
        self._use, self._auto, self._kind, self._families = use, auto, kind, families
        self._device: Device | None = None
        entries = [(f"{_AUTO}: {auto}", _AUTO)] if auto else []
        entries += [(f"{spec.key}: {spec.title}", spec.key) for spec in self._specs.values()]
        super().__init__(
            entries,
            label=label,
            placeholder="owner/name, /path/to/model, https://...",
            value=value or None,
        )

    def set_use(self, use: str) -> None:
        """Say what it is chosen for from now on: draw, lora or full."""
        if use != self._use:
            self._use = use
            self._show()

    def _lines(self) -> list[str]:
        chosen = self.read()
        if chosen == _AUTO and self._auto:
            return []  # the dropdown's entry says it
        spec = self._specs.get(chosen)
        if spec is None:
            return [self._refusal(chosen) or _kind_of_text(chosen)]
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

    def _refusal(self, text: str) -> str:
        """Why a known model does not serve here, whether by its key, its repository or its folder; "" for any other."""
        if not self._families:
            return ""
        name = understand(text)
        spec = name.spec or known_model(text)
        try:
            if spec is not None and spec.family not in self._families:
                require_trainable_key(spec)
            elif spec is not None and spec.kind != self._kind:
                return f"⚠ {spec.title} is not a base model: choose one of the list."
            elif name.what == "folder" and name.path is not None:
                require_trainable(name.path)
        except FastSDError as err:
            return f"⚠ {err.problem} {err.hint}"
        return ""


def _kind_of_text(text: str) -> str:
    if not text:
        return "Type a Hub id, paste a link, or give a path."
    said = {
        "link": "A link: the file is downloaded and checked, and its kind is detected from its content.",
        "folder": "A path on this machine.",
        "file": "A path on this machine.",
        "hub": "A model of the Hugging Face Hub.",
        "key": "A model key of another kind than those above.",
    }
    return said.get(understand(text).what, "⚠ Neither a path that is here, nor a Hub id (owner/name), nor a link.")
