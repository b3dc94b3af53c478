"""Flux files of full size that take no room, placed for a web UI as `fastsd` does: for placed_in_comfyui.py and _forge.

Every file has its real header, with the published shapes, and a hole in place of its weights.
"""

import json
import struct
import sys
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


def place_flux(scratch: Path, ui_key: str, *, packed: bool) -> tuple[list[Any], Any, Any]:
    """Write hollow files and place each; what was placed, the web UI and its places.

    Args:
        packed: the transformer is a GGUF file.
    """
    from fastsd_helpers.webui import find_places, find_ui, place

    ui = find_ui(ui_key)
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
    return placed, ui, places


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a file of a family at its published widths."""
    from fastsd_helpers.checkpoints.names.families import find_family
    from fastsd_helpers.checkpoints.names.layout import expected_shapes

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
