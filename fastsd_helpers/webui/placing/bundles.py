"""Which files a model needs in a web UI, in the size that the machine holds: family -> parts, and the choice."""

from dataclasses import dataclass

from fastsd_helpers.errors import ModelError, WebUIError
from fastsd_helpers.registry import ModelSpec, find_model, models
from fastsd_helpers.runtime import secret
from fastsd_helpers.webui.catalog import WebUI, uis
from fastsd_helpers.webui.flags import Machine
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, ModelFile, base_family

__all__ = ["T5_SIZES", "Bundle", "choose_bundle", "file_name", "parts_of", "require_family", "require_runs", "runs_in"]

T5_SIZES = ("auto", "fp8", "fp16")
# What a base model of a family needs beside a file that holds it without them: part -> keys, the largest first.
_PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        "T5": ("flux-t5-fp16", "flux-t5-fp8"),
        "CLIP": ("flux-clip-l",),
        "VAE": ("flux-vae",),
    }
}
_GIB = 2**30
_ROOM_GPU = 2.5e9  # bytes: latents, activations and the VAE of an image of 1024 px
_ROOM_HOST = 3e9  # bytes: Python, torch and CUDA's own


@dataclass(frozen=True)
class Bundle:
    """The rows of models.toml to fetch, the base model's first; and why these.

    smaller: keys of the same weights that need no access and less room, for when the first cannot be had.
    """

    specs: tuple[ModelSpec, ...]
    reasons: tuple[str, ...] = ()
    smaller: tuple[str, ...] = ()


def require_family(ui: WebUI, family: str, ref: str) -> None:
    """Raise WebUIError, with what works instead, when a web UI does not run a family."""
    if family not in ui.families:
        others = [other.title for other in uis() if family in other.families]
        raise WebUIError(
            f"{ui.title} does not run '{ref}', which is a {family} model.",
            f"Choose {' or '.join(others)}{', or ' if others else ''}a model of {', '.join(ui.families)}.",
        )


def require_runs(found: ModelFile, ui: WebUI, name: str) -> None:
    """Refuse a file of a family that a web UI does not run: a base model, or a LoRA, VAE, ControlNet for one.

    Raises:
        WebUIError: with the web UIs that do.
        ModelError: with the web UIs that do.
    """
    if found.foreign and not ui.runs_others:
        raise WebUIError(f"{name} is {found.what}.", f"{ui.title} runs models of {', '.join(ui.families)}.")
    if found.family is None:
        return
    if found.kind in BASE_KINDS:
        require_family(ui, found.family, name)
    elif found.family not in {base_family(family) for family in ui.families}:
        others = [other.title for other in uis() if found.family in other.families]
        raise ModelError(
            f"{name} is {found.what} for {found.family} models, which {ui.title} does not run.",
            f"Place it in {' or '.join(others)} (--ui)." if others else "No web UI here runs them.",
        )


def parts_of(family: str | None) -> dict[str, tuple[str, ...]]:
    """What a base model of a family needs beside its own file when that holds nothing else: part -> keys."""
    return _PARTS.get(family or "", {})


def choose_bundle(spec: ModelSpec, ui: WebUI, machine: Machine, *, t5: str = "auto") -> Bundle:
    """Choose the files of a model for a web UI and a machine; nobody is asked and nothing fetched.

    Args:
        spec: a base model, or one of its sizes that was named itself.
        machine: its GPU and its RAM decide.
        t5: auto, fp8 or fp16.

    Raises:
        WebUIError: this web UI does not run the family.
    """
    require_family(ui, spec.family, spec.key)
    parts = parts_of(spec.family)
    alone = spec.kind == "diffusion-model" or bool(spec.sizes)
    if not parts or not alone:
        return Bundle((spec,), _reasons_of_whole(spec, machine))
    rest = [find_model(keys[-1]) for part, keys in parts.items() if part != "T5"]
    small_t5, large_t5 = find_model(parts["T5"][-1]), find_model(parts["T5"][0])
    least = {"fp16": large_t5}.get(t5, small_t5)
    beside = sum(_bytes(item) for item in rest)
    sizes = [find_model(key) for key in spec.sizes] or [spec]
    fitting = [size for size in sizes if _fits(size, beside + _bytes(least), machine)]
    reasons, chosen = [], fitting[0] if fitting else sizes[-1]
    if chosen.gated and not secret("HF_TOKEN"):
        reasons.append(
            f"{file_name(chosen)} ({_gb(chosen)}) would fit this machine. It is gated: to download it, accept the "
            f"licence at {chosen.licence_page} and give a token of that account as HF_TOKEN. Until then its public "
            "copy is used."
        )
        chosen = next(size for size in [*fitting, *sizes] if not size.gated)
    # With a fifth to spare beside all files at once: the large T5 is a comfort, and no reason to run short.
    all_large = _bytes(chosen) + _bytes(large_t5) + beside + _ROOM_HOST
    large = t5 == "fp16" or (t5 == "auto" and all_large <= 0.8 * machine.host_gib * _GIB)
    text = large_t5 if large else small_t5
    reasons.append(_reason(spec, chosen, sizes, machine, fits=bool(fitting)))
    reasons.append(_reason_of_t5(text, large_t5, t5, machine))
    smaller = sizes[sizes.index(chosen) + 1 :]
    return Bundle((chosen, text, *rest), tuple(reasons), tuple(size.key for size in smaller if not size.gated))


def _reasons_of_whole(spec: ModelSpec, machine: Machine) -> tuple[str, ...]:
    """Say of a file that holds the whole model that this machine's RAM is too small for it."""
    need = (_bytes(spec) + _ROOM_HOST) / _GIB
    if not machine.host_gib or need <= machine.host_gib:
        return ()
    base = next((one for one in models() if one.sizes and one.key == spec.key.removesuffix("-fp8")), None)
    instead = f"{base.key} has a size that fits." if base else "A smaller model needs less."
    return (
        f"{file_name(spec)} ({_gb(spec)}) needs about {need:.0f} GiB of RAM, and {machine.name} has "
        f"{machine.host_gib:.1f}: the start may be killed for its memory. {instead}",
    )


def _fits(size: ModelSpec, beside: float, machine: Machine) -> bool:
    """Whether GPU and RAM hold a model with `beside` bytes of encoders and VAE.

    A file is read through the RAM; what the GPU does not take stays there, with the encoders while they rest.
    """
    host = machine.host_gib * _GIB - _ROOM_HOST
    gpu = machine.gpu_gib * _GIB
    left = 0.0 if _bytes(size) + _ROOM_GPU <= gpu else float(_bytes(size))
    return _bytes(size) <= host and beside + left <= host and (left == 0.0 or gpu == 0)


def _reason(spec: ModelSpec, chosen: ModelSpec, sizes: list[ModelSpec], machine: Machine, *, fits: bool) -> str:
    holds = f"{machine.gpu_gib:.1f} GiB on the GPU" if machine.gpu_gib else "no GPU"
    where = f"{machine.name} ({holds}, {machine.host_gib:.1f} GiB of RAM)"
    said = f"{spec.key} for {where}: {file_name(chosen)} ({_gb(chosen)})"
    if not fits:
        need = (_bytes(chosen) + _ROOM_HOST) / _GIB
        return (
            f"{said} is used, although it is too large: it needs about {need:.0f} GiB of RAM and, to generate images "
            f"fast, a GPU with {(_bytes(chosen) + _ROOM_GPU) / _GIB:.0f} GiB. The start may be killed for its memory; "
            "sdxl or sd15 need less."
        )
    larger = [size for size in sizes[: sizes.index(chosen)] if not size.gated or secret("HF_TOKEN")]
    if not larger:
        return f"{said} fits."
    next_one = f"{file_name(larger[-1])} has {_gb(larger[-1])}"
    return f"{said} is the largest that fits: {next_one}, too much for {_too_small(larger[-1], machine)}."


def _too_small(size: ModelSpec, machine: Machine) -> str:
    """What of a machine does not hold a size that `_fits` refuses."""
    if _bytes(size) > machine.host_gib * _GIB - _ROOM_HOST:
        return "its RAM, through which a file is read"
    return "its GPU" if machine.gpu_gib else "its RAM"


def _reason_of_t5(text: ModelSpec, large: ModelSpec, t5: str, machine: Machine) -> str:
    if t5 != "auto":
        return f"T5: {t5} was asked for ({_gb(text)})."
    if text.key == large.key:
        return f"T5: fp16 ({_gb(text)}), which fits into {machine.host_gib:.1f} GiB of RAM; --t5 fp8 takes half."
    return (
        f"T5: fp8 ({_gb(text)}); {machine.host_gib:.1f} GiB of RAM do not hold fp16 ({_gb(large)}) with the rest. "
        "--t5 fp16 uses it anyway."
    )


def _bytes(spec: ModelSpec) -> int:
    return spec.bytes or 0


def _gb(spec: ModelSpec) -> str:
    return f"{_bytes(spec) / 1e9:.1f} GB"


def file_name(spec: ModelSpec) -> str:
    """The name that the single file of a row has on disk."""
    about = spec.checkpoint or {}
    return str(about.get("save_as") or about.get("file", spec.key)).rsplit("/", 1)[-1]


def runs_in(spec: ModelSpec) -> tuple[str, ...]:
    """Keys of the web UIs that load a row: they run its family, and have a folder for its kind."""
    kind = "checkpoint" if spec.kind == "base" else spec.kind
    if kind == "reader" or spec.folder:
        return ()  # the embedded model has a shape of its own
    return tuple(ui.key for ui in uis() if spec.family in ui.families and kind in dict(ui.folders))
