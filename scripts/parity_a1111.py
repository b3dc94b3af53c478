"""Give LoRA to AUTOMATIC1111's own table of names; started by parity_uis.py, which says what this is for.

    python scripts/parity_a1111.py path/to/stable-diffusion-webui exports.json

Every name is AUTOMATIC1111's own decision: its extension `Lora` names the layers of a model, reads the file and makes a
module of each layer, and its own arithmetic gives each change its shape. The model is SDXL's at full size, of the
classes that it runs: Stability-AI/generative-models (in its folder repositories/, where its launcher puts it, or beside
it), OpenCLIP's text tower and transformers' CLIP, on torch's meta device. Replaced are only its `modules`, of which the
extension asks a few functions, and gradio. It needs `einops` and `open_clip_torch`.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

from parity_originals import package, stand_in
from ui_answers import Answer, print_answers


def main() -> int:
    """Load every LoRA for SDXL that is listed and print what was reported."""
    checkout, listed = Path(sys.argv[1]), Path(sys.argv[2])
    import torch

    with torch.device("meta"):
        model = make_sdxl(checkout)
    open_a1111(checkout, model)
    answers: dict[str, Answer] = {}
    for export in json.loads(listed.read_text()):
        if "a1111" in export["expected"]:
            answer = answers[export["name"]] = Answer()
            load_lora(*export["files"], answer)
    print_answers(answers)
    return 0


def make_sdxl(checkout: Path) -> Any:
    """What AUTOMATIC1111 asks of an SDXL model that is loaded: the U-Net, and both text encoders as it wraps them."""
    import torch
    import transformers
    import yaml

    places = (checkout / "repositories" / "generative-models", checkout.with_name("generative-models"))
    root = next((place for place in places if place.is_dir()), None)
    if root is None:
        raise SystemExit(f"There is no generative-models in {places[0].parent} or beside {checkout}.")
    for name in ("sgm", "sgm.modules", "sgm.modules.diffusionmodules"):
        package(name, root / name.replace(".", "/"))
    stand_in("sgm.modules.video_attention", SpatialVideoTransformer=type("Unused", (), {}))
    described = yaml.safe_load((root / "configs" / "inference" / "sd_xl_base.yaml").read_text())
    settings = described["model"]["params"]["network_config"]["params"]
    # Not xformers' attention, which needs the package; its layers have the same names.
    settings |= {"spatial_transformer_attn_type": "softmax", "use_checkpoint": False}
    wrapper = torch.nn.Module()
    wrapper.diffusion_model = importlib.import_module("sgm.modules.diffusionmodules.openaimodel").UNetModel(**settings)
    first, second = torch.nn.Module(), torch.nn.Module()
    clip = transformers.CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    first.transformer = transformers.CLIPTextModel(clip)
    if not hasattr(first.transformer, "text_model"):  # transformers from 5.6 on has it without
        first.transformer, inner = torch.nn.Module(), first.transformer
        first.transformer.text_model = inner
    # OpenCLIP's whole model has the text tower's layers under its own name.
    second.model = _text_tower()
    embedders = [types.SimpleNamespace(wrapped=encoder) for encoder in (first, second)]
    conditioner = types.SimpleNamespace(embedders=embedders)
    return types.SimpleNamespace(is_sdxl=True, model=wrapper, conditioner=conditioner)


def _text_tower() -> Any:
    """ViT-bigG-14's text tower of OpenCLIP."""
    for name in ("torchvision", "torchvision.ops"):
        stand_in(name)
    stand_in("torchvision.ops.misc", FrozenBatchNorm2d=None)
    spec = importlib.util.find_spec("open_clip")
    if spec is None:
        raise SystemExit("OpenCLIP is not installed: pip install --no-deps open_clip_torch")
    package("open_clip", Path(next(iter(spec.submodule_search_locations))))
    tower = importlib.import_module("open_clip.transformer").TextTransformer
    return tower(context_length=77, vocab_size=49408, width=1280, heads=20, layers=32, output_dim=1280)


def open_a1111(checkout: Path, model: Any) -> None:
    """Make the extension `Lora` importable, with the model as the one that is loaded."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file

    def read_metadata(path: str) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}

    def nothing(*_args: Any, **_rest: Any) -> None:
        return None

    shared = {"sd_model": model, "opts": types.SimpleNamespace(lora_preferred_name="Filename", data={})}
    shared["cmd_opts"] = types.SimpleNamespace(lora_dir=".", lyco_dir_backcompat=".")
    shared["walk_files"] = lambda *_args, **_rest: ()
    needed = {
        "shared": shared,
        "devices": {"cpu": torch.device("cpu"), "device": torch.device("cpu"), "dtype": torch.float32},
        "sd_models": {"read_state_dict": load_file, "read_metadata_from_safetensors": read_metadata},
        "cache": {"cached_data_for_file": lambda _kind, _title, _path, read: read()},
        "hashes": {"sha256_from_cache": nothing, "sha256": nothing},
        "errors": {"display": nothing},
        "scripts": {},
        "sd_hijack": {},
        "patches": {"patch": nothing, "undo": nothing},
        "textual_inversion": {"__path__": []},
        "textual_inversion.textual_inversion": {},
        "models": {"__path__": []},
        "models.sd3": {"__path__": []},
        # Of Stable Diffusion 3, whose layers are of a kind of their own.
        "models.sd3.mmdit": {"QkvLinear": type("QkvLinear", (), {})},
    }
    modules = types.ModuleType("modules")
    modules.__path__ = []
    sys.modules["modules"] = modules
    for name, values in needed.items():
        stand_in(f"modules.{name}", **values)
        parent, _, leaf = f"modules.{name}".rpartition(".")
        setattr(sys.modules[parent], leaf, sys.modules[f"modules.{name}"])
    stand_in("gradio")
    sys.path.insert(0, str(checkout / "extensions-builtin" / "Lora"))
    networks = importlib.import_module("networks")
    networks.assign_network_names_to_compvis_modules(model)


def load_lora(path: str, answer: Answer) -> None:
    """The names that the extension finds a place for, and whether each change fits there."""
    import network
    import networks
    import torch
    from safetensors.torch import load_file

    on_disk = network.NetworkOnDisk(Path(path).stem, path)
    answer.model = on_disk.sd_version.name
    loaded = networks.load_network(on_disk.name, on_disk)
    found = {module.network_key.partition(".")[0]: module for module in loaded.modules.values()}
    answer.note(extra=sorted(name for name in load_file(path) if name.partition(".")[0] not in found))
    for layer, module in found.items():
        own = module.sd_module
        if layer.endswith(("_q_proj", "_k_proj", "_v_proj")) and isinstance(own, torch.nn.MultiheadAttention):
            weight = own.in_proj_weight[: own.embed_dim]  # the three lie above each other
        else:
            weight = own.weight
        change, _bias = module.calc_updown(weight)
        if change.shape != weight.shape:
            answer.errors.append(f"{layer}: {list(change.shape)} does not fit {list(weight.shape)}")
        if module.alpha is None or module.scale is not None:
            answer.errors.append(f"{layer}: its alpha was not read")


if __name__ == "__main__":
    sys.exit(main())
