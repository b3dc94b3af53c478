"""Give listed tensors to ComfyUI's own detection and loaders; started by parity_uis.py, which says what this is for.

    python scripts/parity_comfyui.py path/to/ComfyUI exports.json

Every name, shape and class is ComfyUI's own decision. Replaced are only: the devices that its model_management gives
out (here `meta`, so that nothing has memory), moving models to a GPU, and torchvision and torchaudio, which it imports
for other models' sake. Missing names are taken from every `load_state_dict`, so also those that ComfyUI does not log.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

from ui_answers import Answer, note_lora, print_answers, recorded, tensors_of

_DEVICES = (
    "get_torch_device",
    "text_encoder_device",
    "text_encoder_initial_device",
    "text_encoder_offload_device",
    "unet_inital_load_device",
    "unet_offload_device",
    "vae_device",
    "vae_offload_device",
)


def main() -> int:
    """Load every export that is listed and print what was reported."""
    checkout, listed = Path(sys.argv[1]), Path(sys.argv[2])
    open_comfyui(checkout)
    import torch

    answers: dict[str, Answer] = {}
    loaded: dict[str, Any] = {}
    for export in json.loads(listed.read_text()):
        answer = answers[export["name"]] = Answer()
        with torch.device("meta"):
            if "base" not in export:
                loaded[export["name"]] = load_model(export, answer)
        if "base" in export:
            load_lora(*export["files"], *loaded[export["base"]], answer)
    print_answers(answers)
    return 0


class _Unused(type):
    """A class in place of whatever is taken from a package that is not installed; nothing here may be made with it."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __call__(cls, *_args: Any, **_rest: Any) -> Any:
        raise SystemExit(f"{cls.__name__} is used: install it, since a stand-in cannot do what it does.")


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Lets every module of packages that are not installed be imported, whatever is taken from it."""

    def __init__(self, packages: set[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, *_rest: Any) -> Any:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module: types.ModuleType) -> None:
        def taken(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Unused(f"{module.__name__}.{name}", (), {})

        module.__dict__["__getattr__"] = taken


def open_comfyui(checkout: Path) -> None:
    """Make ComfyUI's packages importable on a machine without a GPU."""
    import transformers  # noqa: F401  (looks for torchvision, which it must not find below)

    absent = {name for name in ("torchvision", "torchaudio") if importlib.util.find_spec(name) is None}
    sys.meta_path.append(_Absent(absent))
    sys.path.insert(0, str(checkout))
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = True
    import comfy.model_management
    import comfy.sd

    for name in _DEVICES:
        setattr(comfy.model_management, name, lambda *_args, **_rest: torch.device("meta"))
    comfy.model_management.load_models_gpu = lambda *_args, **_rest: None


def load_model(export: dict[str, Any], answer: Answer) -> tuple[Any, Any]:
    """The checkpoint loader, or for a transformer alone the loaders of its folder, with the VAE and text encoders."""
    import comfy.sd

    files = {name: tensors_of(tensors) for name, tensors in export["files"].items()}
    main_file = files.pop(Path(export["path"]).name)
    before = len(main_file)
    with recorded(answer, lambda module: ""):
        if files:
            model = comfy.sd.load_diffusion_model_state_dict(main_file)
            comfy.sd.VAE(sd=files["ae.safetensors"])
            texts = [files["clip_l.safetensors"], files["t5xxl.safetensors"]]
            clip = comfy.sd.load_text_encoder_state_dicts(texts, clip_type=comfy.sd.CLIPType.FLUX)
        else:
            model, clip, vae, _vision = comfy.sd.load_state_dict_guess_config(main_file)
            vae.throw_exception_if_invalid()
    if len(main_file) == before:
        answer.errors.append("nothing was taken from the file")
    answer.extra += [name for name in main_file if name not in ("v_pred", "ztsnr")]
    answer.model = type(model.model.model_config).__name__
    answer.predicts = _PREDICTIONS.get(model.model.model_type.name, model.model.model_type.name)
    return model, clip


_PREDICTIONS = {"EPS": "epsilon", "V_PREDICTION": "v", "FLUX": "flow", "FLOW": "flow"}


def load_lora(path: str, model: Any, clip: Any, answer: Answer) -> None:
    """The names that `LoraLoader` finds a place for, and whether the matrices fit there."""
    import comfy.lora
    import comfy.lora_convert
    from safetensors.torch import load_file

    given = load_file(path)
    places = comfy.lora.model_lora_keys_unet(model.model, {})
    places = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, places)
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(given)), places)
    used = set().union(*(patch.loaded_keys for patch in patches.values()))
    used |= {name for name in given if name.endswith(".alpha") and name.replace(".alpha", ".lora_up.weight") in used}
    taken = {*model.clone().add_patches(patches), *clip.clone().add_patches(patches)}
    answer.errors += [f"{place}: the model has no such weight" for place in patches if place not in taken]
    answer.note(extra=sorted(given.keys() - used))
    answer.model = type(model.model.model_config).__name__
    note_lora(answer, given, places, {**model.model.state_dict(), **clip.cond_stage_model.state_dict()})


if __name__ == "__main__":
    sys.exit(main())
