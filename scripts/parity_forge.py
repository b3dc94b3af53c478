"""Give listed tensors to Forge's own detection and loader; started by parity_uis.py, which says what this is for.

    python scripts/parity_forge.py path/to/stable-diffusion-webui-forge exports.json

Every name and class is Forge's own decision: the whole of `forge_loader` runs, with its tokenizers and engines.
Replaced are only: reading the files (the tensors come from the list), the devices that its memory_management gives out
(here `meta`, so that nothing has memory), `modules.shared`, of which it asks two options, and its Linear layer, by
torch's own: Forge's takes whatever the file has, and so would report neither a missing weight nor one of another shape.
It needs the versions of transformers and diffusers that it pins.
"""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

from ui_answers import Answer, note_lora, print_answers, recorded, tensors_of

_DEVICES = (
    "get_torch_device",
    "text_encoder_device",
    "text_encoder_offload_device",
    "unet_inital_load_device",
    "unet_offload_device",
    "vae_device",
    "vae_offload_device",
)


def main() -> int:
    """Load every export that is listed and print what was reported."""
    checkout, listed = Path(sys.argv[1]), Path(sys.argv[2])
    # Forge talks on standard output; the answer is the last line there.
    out, sys.stdout = sys.stdout, sys.stderr
    open_forge(checkout)
    answers: dict[str, Answer] = {}
    loaded: dict[str, Any] = {}
    for export in json.loads(listed.read_text()):
        answer = answers[export["name"]] = Answer()
        if "base" in export:
            load_lora(*export["files"], loaded[export["base"]], answer)
            continue
        loaded[export["name"]] = load_model(export, answer)
    sys.stdout = out
    print_answers(answers)
    return 0


def open_forge(checkout: Path) -> None:
    """Make Forge's packages importable on a machine without a GPU."""
    guesses = (checkout / "repositories" / "huggingface_guess", checkout.with_name("huggingface_guess"))
    guess = next((place for place in guesses if place.is_dir()), None)
    if guess is None:
        raise SystemExit(f"There is no huggingface_guess in {guesses[0].parent} or beside {checkout}.")
    sys.path[:0] = [str(checkout), str(checkout / "packages_3rdparty"), str(guess)]
    sys.argv[1:] = ["--always-cpu"]  # its settings are read at import
    shared = types.ModuleType("modules.shared")
    shared.opts = types.SimpleNamespace(emphasis="Original", sdxl_crop_left=0, sdxl_crop_top=0)
    modules = types.ModuleType("modules")
    modules.shared = shared
    sys.modules |= {"modules": modules, "modules.shared": shared}

    import torch
    from backend import memory_management, operations

    meta = torch.device("meta")
    memory_management.cpu = meta
    for name in _DEVICES:
        setattr(memory_management, name, lambda *_args, **_rest: meta)
    linear = torch.nn.Linear

    class Strict(linear):
        def __init__(self, ins: int, outs: int, bias: bool = True, **_rest: Any) -> None:
            super().__init__(ins, outs, bias, device=operations.current_device, dtype=operations.current_dtype)

    operations.ForgeOperations.Linear = Strict

    from backend import loader

    load_component = loader.load_huggingface_component

    def without_memory(guess: Any, component: str, *rest: Any) -> Any:
        with torch.device("cpu" if component == "scheduler" else "meta"):
            return load_component(guess, component, *rest)

    loader.load_huggingface_component = without_memory


def load_model(export: dict[str, Any], answer: Answer) -> Any:
    """`forge_loader`, with the VAE and text encoders beside a transformer alone as the user would choose them."""
    from backend import loader

    files = {name: tensors_of(tensors) for name, tensors in export["files"].items()}
    main_file = Path(export["path"])
    loader.load_torch_file = lambda path: dict(files[os.path.basename(path)])
    beside = [str(main_file.with_name(name)) for name in files if name != main_file.name]
    guessed: list[Any] = []
    split = loader.split_state_dict

    def noted(*args: Any, **options: Any) -> Any:
        parts, guess = split(*args, **options)
        guessed[:] = [guess, {id(tensors): name for name, tensors in parts.items()}, parts]
        return parts, guess

    loader.split_state_dict = noted
    load_part = loader.load_state_dict

    def named(model: Any, tensors: Any, *rest: Any, **options: Any) -> Any:
        with recorded(answer, lambda _module: guessed[1].get(id(tensors), "")):
            return load_part(model, tensors, *rest, **options)

    loader.load_state_dict = named
    try:
        engine = loader.forge_loader(str(main_file), additional_state_dicts=beside)
    finally:
        loader.split_state_dict, loader.load_state_dict = split, load_part
    answer.model = type(guessed[0]).__name__
    predictor = engine.forge_objects.unet.model.predictor
    answer.predicts = getattr(predictor, "prediction_type", "flow")
    answer.predicts = {"v_prediction": "v", "const": "flow"}.get(answer.predicts, answer.predicts)
    return engine


def load_lora(path: str, engine: Any, answer: Answer) -> None:
    """The names that Forge finds a place for, and whether the matrices fit there."""
    from backend.patcher.lora import load_lora as match
    from backend.patcher.lora import model_lora_keys_clip, model_lora_keys_unet
    from safetensors.torch import load_file

    given = load_file(path)
    objects = engine.forge_objects
    unet, clip = model_lora_keys_unet(objects.unet.model), model_lora_keys_clip(objects.clip.cond_stage_model)
    of_unet, rest = match(dict(given), unet)
    of_clip, rest = match(rest, clip)
    answer.note(extra=sorted(rest))
    answer.model = type(engine.model_config).__name__
    weights = {**objects.unet.model.state_dict(), **objects.clip.cond_stage_model.state_dict()}
    answer.errors += [
        f"{place}: the model has no such weight" for place in {**of_unet, **of_clip} if place not in weights
    ]
    note_lora(answer, given, {**unet, **clip}, weights)


if __name__ == "__main__":
    sys.exit(main())
