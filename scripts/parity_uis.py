"""Feed the names and shapes of our full-size exports to ComfyUI's and Forge's own loaders, and print what they miss.

AUTOMATIC1111 is given the LoRA for SDXL alone: its loader of models is that of the original code. None of the UIs is
part of this project; give checkouts of them, for Forge one of lllyasviel/huggingface_guess in its folder repositories/
(its launcher puts it there) or beside it, for AUTOMATIC1111 one of Stability-AI/generative-models likewise:

    python scripts/parity_uis.py --comfyui path/to/ComfyUI --forge path/to/stable-diffusion-webui-forge \
        --a1111 path/to/stable-diffusion-webui

Nothing of full size is written or held in memory. The Diffusers folders are real configurations and headers, with
files that are one hole behind them; `convert` runs on them as it would on a model, up to the point where bytes would be
copied; what it would write is given to the UIs as tensors of the meta device. LoRA are real files of rank 1: one for
each family with every layer that one can change, and for SDXL what training writes with each choice of layers. Each UI
runs in a process of its own (parity_comfyui.py, parity_forge.py, parity_a1111.py), with the Python that
--comfyui-python and so on name: they have pinned packages of their own, above all Forge its transformers.

A name is let pass only where PERMITTED says why. The exit status is 0 when nothing else is missing, left over, of
another shape, or taken for another model.
"""

import argparse
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
UIS = ("a1111", "comfyui", "forge")

# What a loader may lack, and why: (UI, export, name) as patterns that match wholly.
PERMITTED = (
    (".*", ".*", r"(\w+\.|\w+: )?logit_scale", "used in CLIP's training only"),
    ("comfyui", ".*", r"clip_l\.transformer\.text_projection\.weight", "CLIP-L's pooled output is not projected"),
    ("comfyui", "flux-.*", r"text_projection\.weight", "the same, in a text encoder's file"),
    # Not so with SDXL's second text encoder, and the refiner's only one: their projections are used.
    ("forge", "(?!sdxl-refiner).*", r"text_encoder: transformer\.text_projection\.weight", "the same"),
    (
        "comfyui",
        "sd21.*",
        r"clip_h\.transformer\.(text_projection\.weight|text_model\.encoder\.layers\.23\..*)",
        "Diffusers folders have 23 layers, and no picture needs the 24th",
    ),
    ("forge", "flux-.*", r"text_encoder_2: transformer\.encoder\.embed_tokens\.weight", "T5's other name for `shared`"),
)
# What a UI may leave aside of a LoRA, and why.
UNUSED = (("a1111", "lora-sdxl", r"lora_te2_text_projection\..*", "it reads layers, and there this is a bare matrix"),)
# Where a UI guesses what is predicted from the values of a weight, which here has none.
BY_VALUES = {("comfyui", "sd21-768")}


def main() -> int:
    """Make the exports, ask each UI and judge; 0 when all is as documented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for ui in UIS:
        parser.add_argument(f"--{ui}", type=Path, help="a checkout of it")
        parser.add_argument(f"--{ui}-python", default=sys.executable, help="the Python that has what it needs")
    parser.add_argument("--only", default="", help="exports to try, with commas between them (default all)")
    options = parser.parse_args()
    asked = {ui: getattr(options, ui) for ui in UIS if getattr(options, ui)}
    if not asked:
        parser.error("give --a1111, --comfyui, --forge or several of them")
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        exports = make_exports(Path(scratch), set(filter(None, options.only.split(","))))
        listed = Path(scratch) / "exports.json"
        listed.write_text(json.dumps(exports))
        for ui, checkout in asked.items():
            print(f"{ui}: {commit_of(checkout)}")
            answers = ask(ui, checkout, listed, getattr(options, f"{ui}_python"))
            results += [judged(ui, export, answers[export["name"]]) for export in exports if export["name"] in answers]
    for result in results:
        print(in_words(result))
    agree = bool(results) and all(result["ok"] for result in results)
    print(json.dumps({"agree": agree, "results": results}))
    return 0 if agree else 1


def commit_of(checkout: Path) -> str:
    """The commit of a checkout, for the record."""
    found = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() if not found.returncode else f"{checkout} (no git checkout)"


def ask(ui: str, checkout: Path, listed: Path, python: str) -> dict[str, Any]:
    """Run one UI's loaders in a process of its own: name of the export -> what it reported."""
    script = Path(__file__).with_name(f"parity_{ui}.py")
    ended = subprocess.run(
        [python, script, checkout.resolve(), listed], stdout=subprocess.PIPE, text=True, check=False, cwd=listed.parent
    )
    if ended.returncode:
        raise SystemExit(f"{script.name} failed ({ended.returncode}): see above.")
    return json.loads(ended.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ judging


def judged(ui: str, export: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a UI reported about one export, less what is permitted."""
    reported = [*(f"lacks {name}" for name in answer["missing"]), *(f"does not use {name}" for name in answer["extra"])]
    troubles = [text for text in reported if not _permitted(ui, export["name"], text)]
    troubles += answer["errors"]
    expected = export["expected"].get(ui)
    if answer["model"] != expected:
        troubles.append(f"was taken for {answer['model']}, not {expected}")
    if answer["predicts"] not in (None, export.get("predicts")) and (ui, export["name"]) not in BY_VALUES:
        troubles.append(f"predicts {answer['predicts']}, not {export['predicts']}")
    return {
        "ui": ui,
        "export": export["name"],
        "model": answer["model"],
        "predicts": answer["predicts"],
        "tensors": sum(len(names) for names in export["files"].values()),
        "permitted": len(reported) - sum(text in reported for text in troubles),
        "troubles": troubles,
        "ok": not troubles,
    }


def _permitted(ui: str, export: str, text: str) -> bool:
    allowed, start = (PERMITTED, "lacks ") if text.startswith("lacks ") else (UNUSED, "does not use ")
    name = text.removeprefix(start)
    return any(
        re.fullmatch(uis, ui) and re.fullmatch(exports, export) and re.fullmatch(names, name)
        for uis, exports, names, _why in allowed
    )


def in_words(result: Mapping[str, Any]) -> str:
    """One line for one export in one UI."""
    said = (
        f"{'ok' if result['ok'] else 'FAILED':6} {result['ui']:8} {result['export']:22} {result['tensors']:5} tensors"
    )
    said += f"  {result['model']}" + (f", {result['predicts']}" if result["predicts"] else "")
    if result["permitted"]:
        said += f"; {result['permitted']} that it may lack or leave aside"
    more = len(result["troubles"]) - 5
    return (
        said
        + "".join(f"\n         {text}" for text in result["troubles"][:5])
        + (f"\n         and {more} more" if more > 0 else "")
    )


# ------------------------------------------------------------------------------------------------ the exports

_SD = {"comfyui": "SD15", "forge": "SD15"}
_SD2 = {"comfyui": "SD20", "forge": "SD20"}
_XL = {"comfyui": "SDXL", "forge": "SDXL"}
_REFINER = {"comfyui": "SDXLRefiner", "forge": "SDXLRefiner"}
_V = {"prediction_type": "v_prediction"}
_ZERO = {**_V, "rescale_betas_zero_snr": True}
_DEV, _SCHNELL = {"comfyui": "Flux", "forge": "Flux"}, {"comfyui": "FluxSchnell", "forge": "FluxSchnell"}

# name: (family of tests/tiny_families.py, how it is built, scheduler, options of convert, what the UIs take it for)
_EXPORTS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, str]]] = {
    "sd15": ("sd15", {}, {}, {}, _SD),
    "sd15-inpaint": ("sd15-inpaint", {}, {}, {}, _SD),
    "sd21-512": ("sd21", {}, {}, {}, _SD2),
    "sd21-768": ("sd21", {}, _V, {}, _SD2),
    "sdxl": ("sdxl", {}, {}, {}, _XL),
    "sdxl-v": ("sdxl", {}, _ZERO, {}, _XL),
    "sdxl-refiner": ("sdxl-refiner", {}, {}, {}, _REFINER),
    "flux-dev": ("flux", {}, {}, {}, _DEV),
    "flux-schnell": ("flux", {"guidance": False}, {}, {}, _SCHNELL),
    "flux-dev-all-in-one": ("flux", {}, {}, {"all_in_one": True}, _DEV),
}
_LORAS = {"sd15": "sd15", "sd21": "sd21-512", "sdxl": "sdxl", "flux": "flux-dev-all-in-one"}
_PREDICTS = {"sd21-768": "v", "sdxl-v": "v"}
# What training writes for SDXL: the layers that were chosen, and whether the text encoders learned too.
TRAINED = {
    f"trained-{targets.replace(' ', '-')}{'-text' if text else ''}": (targets, text)
    for targets in ("attention", "all linears")
    for text in (False, True)
}


def make_exports(scratch: Path, only: set[str]) -> list[dict[str, Any]]:
    """Convert every full-size folder and LoRA; a list of what would be written, as names, number formats and shapes."""
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    from fastsd_helpers import checkpoints

    made = []
    for name, (family, build, scheduler, options, expected) in _EXPORTS.items():
        based = {f"lora-{key}" for key, base in _LORAS.items() if base == name}
        based |= set(TRAINED) if name == "sdxl" else set()
        if only and name not in only and not based & only:
            continue
        folder = hollow_folder(scratch / name / "model", family, build, scheduler)
        dst = scratch / name / f"{name}.safetensors"
        with captured() as written:
            checkpoints.convert(folder, dst, **options)
            if family == "flux" and not options:
                for part, file in (("text_encoder", "clip_l.safetensors"), ("text_encoder_2", "t5xxl.safetensors")):
                    checkpoints.convert(folder / part, dst.with_name(file))
        predicts = "flow" if family == "flux" else _PREDICTS.get(name, "epsilon")
        made.append({"name": name, "path": str(dst), "expected": expected, "predicts": predicts, "files": written})
    for family, base in _LORAS.items():
        if not only or f"lora-{family}" in only:
            made.append(_listed_lora(f"lora-{family}", base, make_lora(scratch / f"lora-{family}", family)))
    for name, (targets, text) in TRAINED.items():
        if not only or name in only:
            path = make_trained_lora(scratch / f"{name}.safetensors", targets, text=text)
            made.append(_listed_lora(name, "sdxl", path))
    return made


def _listed_lora(name: str, base: str, path: Path) -> dict[str, Any]:
    from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile

    expected = {**_EXPORTS[base][4], **({"a1111": "SDXL"} if base == "sdxl" else {})}
    with SafetensorsFile(path) as file:
        return {"name": name, "base": base, "expected": expected, "files": {str(path): list(file.tensors)}}


def hollow_folder(folder: Path, family: str, build: Mapping[str, Any], scheduler: Mapping[str, Any]) -> Path:
    """A full-size Diffusers folder of real configurations whose weights are headers and a hole."""
    import torch
    from tiny_families import build_parts, write_index

    with torch.device("meta"):
        parts = build_parts(family, "full", **build)
    for part, model in parts.items():
        (folder / part).mkdir(parents=True)
        if type(model).__module__.startswith("diffusers"):
            start = "diffusion_pytorch_model"
            model.save_config(folder / part)
        else:
            start = "model"
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder / part)
        place, header = 0, {}
        for name, tensor in model.state_dict().items():
            if name == "encoder.embed_tokens.weight":  # T5's other name for `shared.weight`, which is not saved
                continue
            size = 2 * tensor.numel()
            header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(header).encode()
        with (folder / part / f"{start}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + place)
    write_index(folder, family, parts, **scheduler)
    return folder


@contextmanager
def captured() -> Iterator[dict[str, Any]]:
    """Let `convert` plan what it writes and write nothing: file name -> {name: [number format, shape]}."""
    from fastsd_helpers.checkpoints.models import folder_conversion

    files: dict[str, Any] = {}
    write = folder_conversion.write_recipes

    def plan(dst: Path, recipes: Mapping[str, Any], **_rest: Any) -> tuple[str, int]:
        files[dst.name] = {name: [recipe.fact.dtype, recipe.fact.shape] for name, recipe in recipes.items()}
        return "", 0

    folder_conversion.write_recipes = plan
    try:
        yield files
    finally:
        folder_conversion.write_recipes = write


def make_lora(folder: Path, family: str) -> Path:
    """A LoRA of rank 1 for every layer that a LoRA of the family can change, converted to kohya's names."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file
    from tiny_families import build_parts

    from fastsd_helpers import checkpoints
    from fastsd_helpers.checkpoints.lora.modules import lora_modules

    with torch.device("meta"):
        parts = build_parts(family, "full")
    layers = {
        (part, name.removeprefix("text_model.").removesuffix(".weight")): tuple(tensor.shape)
        for part, model in parts.items()
        for name, tensor in model.state_dict().items()
    }
    tensors = {}
    for module in lora_modules(family):
        for path in module.paths:
            if (module.part, path) not in layers:  # shortcuts are there only where the widths change
                continue
            outs, *ins = layers[module.part, path]
            tensors[f"{module.part}.{path}.lora_A.weight"] = np.ones((1, *ins), "<f2")
            tensors[f"{module.part}.{path}.lora_B.weight"] = np.ones((outs, 1, *(1 for _ in ins[1:])), "<f2")
    folder.mkdir(parents=True)
    save_file(tensors, folder / "diffusers.safetensors")
    return checkpoints.convert(folder / "diffusers.safetensors", folder / f"{family}.safetensors").path


def make_trained_lora(path: Path, targets: str, *, text: bool) -> Path:
    """A LoRA of rank 1 as training writes it: SDXL's layers of a choice, those of the text encoders too or not."""
    import torch
    from tiny_families import build_parts

    from fastsd_helpers.dreambooth.families import family_named
    from fastsd_helpers.dreambooth.training.lora import write_lora_file
    from fastsd_helpers.registry import find_model

    family = family_named("sdxl")
    with torch.device("meta"):
        parts = build_parts("sdxl", "full")
    trained = {
        part: {
            f"{name.removeprefix('text_model.')}.lora_{side}.weight": torch.ones(shape)
            for name, layer in parts[part].named_modules()
            if family.takes_lora(part, name, targets) and hasattr(layer, "weight")
            for side, shape in (("A", (1, layer.weight.shape[1])), ("B", (layer.weight.shape[0], 1)))
        }
        for part in ("unet", *(family.trained_encoders if text else ()))
    }
    return write_lora_file(path, trained, spec=find_model("sdxl"), alpha=1.0, px=1024).path


if __name__ == "__main__":
    sys.exit(main())
