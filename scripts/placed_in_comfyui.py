"""Place Flux files for ComfyUI as `fastsd` does, and let ComfyUI's own nodes load them by the workflow that is written.

    python scripts/placed_in_comfyui.py --comfyui path/to/ComfyUI [--gguf path/to/ComfyUI-GGUF]

Nothing of full size is written or held in memory: every file has its real header and a hole behind it, and ComfyUI
builds its networks on torch's meta device (parity_comfyui.py). What is its own: which files its lists show, how it
recognises each, and which names its networks lack. With --gguf the transformer is a GGUF file too, and the node pack
reads it. The exit status is 0 when every node loads and nothing is missing but what parity_uis.py permits.
"""

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

_WIDTHS = {
    "clip-l": {"vocab": 49408, "h": 768, "positions": 77, "m": 3072},
    "t5": {"vocab": 32128, "h": 4096, "i": 4096, "b": 32, "heads": 64, "m": 10240},
    "flux": {"ins": 64, "outs": 64, "c": 4096, "p": 768, "d": 3072, "hd": 128, "fm": 12288, "guided": 1},
    "flux-ae": {"v0": 128, "v1": 256, "v2": 512, "v3": 512},
}
_FILES = {
    "clip_l.safetensors": ("clip-l", "F16"),
    "t5xxl_fp8_e4m3fn.safetensors": ("t5", "F8_E4M3"),
    "ae.safetensors": ("flux-ae", "F32"),
    "flux1-dev.safetensors": ("flux", "BF16"),
}
_BYTES = {"F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4}


def main() -> int:
    """Place, write the workflow, load; 0 when nothing is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--gguf", type=Path, help="a checkout of the node pack ComfyUI-GGUF")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # this script's own child
    options = parser.parse_args()
    if options.load:
        return load(options.comfyui.resolve(), options.gguf, json.loads(options.load.read_text()))
    failed = 0
    for packed in (False, True) if options.gguf else (False,):
        with tempfile.TemporaryDirectory() as scratch:
            about = place(Path(scratch), packed=packed)
            listed = Path(scratch) / "about.json"
            listed.write_text(json.dumps(about))
            words = [sys.executable, __file__, "--comfyui", str(options.comfyui.resolve()), "--load", str(listed)]
            words += ["--gguf", str(options.gguf.resolve())] if packed else []
            failed += subprocess.run(words, check=False, cwd=scratch).returncode != 0
    return 1 if failed else 0


def place(scratch: Path, *, packed: bool) -> dict[str, Any]:
    """Write hollow files, place each for ComfyUI; the data folder and the workflow for its API."""
    from fastsd_helpers.webui import find_places, find_ui, place
    from fastsd_helpers.webui.workflows import write_workflow

    ui = find_ui("comfyui")
    places = find_places(ui, folder=scratch / "program", store=scratch / "store")
    placed = []
    for name, (family, dtype) in _FILES.items():
        shapes = shapes_of(family)
        file = scratch / "files" / name
        file.parent.mkdir(exist_ok=True)
        if packed and family == "flux":
            file = hollow_gguf(file.with_suffix(".gguf"), shapes)
        else:
            hollow_safetensors(file, shapes, dtype)
        placed += place(str(file), ui, places)
    for model in placed:
        print(f"{model.kind:16} {model.path.relative_to(places.models)}")
    write_workflow(placed, ui, places)
    workflow = json.loads((places.store / "comfyui" / "api-workflows" / "fastsd-flux.json").read_text())
    return {"data": str(places.data), "workflow": workflow}


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a file of a family at its published widths."""
    from fastsd_helpers.checkpoints.families import find_family
    from fastsd_helpers.checkpoints.layout import expected_shapes

    found = find_family(family)
    return dict(expected_shapes(found, {name: _WIDTHS[family][name] for name in found.measured}))


def hollow_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Path:
    """A safetensors file of zeros that takes no room on the disk."""
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + _BYTES[dtype] * _count(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return path


def hollow_gguf(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Path:
    """A GGUF file of zeros: matrices in Q4_0 (18 bytes for 32 values), the rest in F32."""

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word)) + word.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text("flux")
    place = 0
    for name, shape in shapes.items():
        kind, size = (
            (2, _count(shape) // 32 * 18) if len(shape) == 2 and shape[-1] % 32 == 0 else (0, 4 * _count(shape))
        )
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, place)
        place += -(-size // 32) * 32
    with path.open("wb") as file:
        file.write(head)
        file.truncate(-(-len(head) // 32) * 32 + place)
    return path


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


def load(checkout: Path, pack: Path | None, about: dict[str, Any]) -> int:
    """In ComfyUI's own process: run the loading nodes of the workflow, each value taken from ComfyUI's own lists."""
    from parity_comfyui import open_comfyui
    from parity_uis import PERMITTED
    from ui_answers import Answer, recorded

    sys.argv = ["main.py", "--base-directory", about["data"], "--cpu"]
    sys.path.insert(0, str(checkout))
    import comfy.options

    comfy.options.enable_args_parsing()  # as its main.py does first of all
    open_comfyui(checkout)
    import re
    import warnings

    import nodes
    import torch

    warnings.filterwarnings("ignore", message=".*to a meta parameter in the current model.*")
    if pack is not None:
        sys.path.insert(0, str(pack.parent))
        nodes.NODE_CLASS_MAPPINGS.update(__import__(pack.name).NODE_CLASS_MAPPINGS)
    answer, failed = Answer(), 0
    for node in about["workflow"].values():
        kind = nodes.NODE_CLASS_MAPPINGS.get(node["class_type"])
        if kind is None or not node["class_type"].endswith(("Loader", "LoaderGGUF", "LoaderSimple")):
            continue
        offered = kind.INPUT_TYPES()
        for name, value in node["inputs"].items():
            choices = {**offered["required"], **offered.get("optional", {})}[name][0]
            if isinstance(choices, list) and value not in choices:
                print(f"FAILED {node['class_type']}: {value} is not in its list {choices[:8]}")
                failed += 1
        with torch.device("meta"), recorded(answer, lambda module: ""):
            loaded = getattr(kind(), kind.FUNCTION)(**node["inputs"])
        model = getattr(getattr(loaded[0], "model", None), "model_config", None)
        print(f"loaded {node['class_type']}: {type(model or loaded[0]).__name__}")
    allowed = [names for uis, exports, names, _why in PERMITTED if re.fullmatch(uis, "comfyui")]
    missing = [name for name in answer.missing if not any(re.fullmatch(names, name) for names in allowed)]
    extra = [name for name in answer.extra if "encoder.embed_tokens" not in name]
    print(f"missing: {missing[:5]} ({len(missing)}), not used: {extra[:5]} ({len(extra)}); {len(answer.missing)} noted")
    return 1 if failed or missing or extra else 0


if __name__ == "__main__":
    sys.exit(main())
