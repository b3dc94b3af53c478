"""Small models made from the name tables alone, with numpy: quick to write, for tests of files and not of names.

That the tables are right is tested with the real classes (test_checkpoints_families.py) and the recorded lists.
"""

import json
import math
import struct

import numpy as np

from fastsd_helpers.checkpoints.formats.prediction import Prediction
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource, read_whole
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.models.configs import WEIGHT_NAMES, component_config, model_index, scheduler_config
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import expected_shapes, part_shapes

WIDTHS = {
    **{"u0": 8, "u1": 16, "u2": 32, "u3": 32, "x": 24, "adm": 16, "v0": 8, "v1": 16, "v2": 32, "v3": 32},
    **{"vocab": 50, "h": 24, "positions": 7, "m": 48, "gvocab": 50, "gh": 24, "gpositions": 7, "gm": 48},
    **{"d": 16, "ins": 4, "outs": 4, "c": 8, "p": 24, "hd": 8, "fm": 64, "guided": 1},
    **{"i": 8, "b": 4, "heads": 2},
    **{"tvocab": 40, "th": 8, "ti": 8, "tb": 4, "theads": 2, "tm": 16},
}


def widths_of(key):
    """Small widths that fit together for a family."""
    widths = {symbol: WIDTHS[symbol] for symbol in find_family(key).measured}
    if key.startswith("sdxl") and key != "sdxl-refiner":
        widths["x"] = widths["h"] + widths["gh"]
    return widths


def values(shapes, dtype="F32", seed=0):
    """Random tensors of these shapes: name -> (fact, bytes)."""
    random = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes.items():
        numbers = (random.standard_normal(shape) * 0.05).astype("<f4")
        if dtype == "F16":
            numbers = numbers.astype("<f2")
        made[name] = TensorFact(dtype, tuple(shape)), numbers.tobytes()
    return made


def write(path, tensors, metadata=None):
    """Write tensors (name -> (fact, bytes)) as they are."""
    source = BytesSource(tensors)
    recipes = {name: copied(source, name) for name in tensors}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, recipes, metadata=metadata or {}, read_back=False)
    return path


def original(key, dtype="F32", seed=0):
    """The tensors of a single file of a family."""
    return values(expected_shapes(find_family(key), widths_of(key)), dtype, seed)


def folder(path, key, dtype="F32", seed=0):
    """Write a whole Diffusers folder of a family, without tokenizers."""
    family = find_family(key)
    widths = widths_of(key)
    for place, part in enumerate(family.parts):
        shapes = {
            name: shape
            for row in family.rows
            if row.part == part
            for name, shape in zip(row.diffusers, part_shapes(row, widths), strict=False)
        }
        write(path / part / WEIGHT_NAMES[part], values(shapes, dtype, seed + place))
        (path / part / "config.json").write_text(json.dumps(component_config(family, part, widths)))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler_config(family, Prediction("epsilon", "")))
    )
    (path / "model_index.json").write_text(json.dumps(model_index(family, {})))
    return path


def read(path):
    """Every tensor of a file: name -> (dtype, shape, bytes)."""
    from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile

    with SafetensorsFile(path) as file:
        return {name: (fact.dtype, fact.shape, bytes(read_whole(file, name))) for name, fact in file.tensors.items()}


def write_gguf(path, shapes, architecture="flux", cut=0):
    """A GGUF file of F32 tensors, as its description says: fastest axis first, data at multiples of 32."""

    def text(word):
        return struct.pack("<Q", len(word)) + word.encode()

    head = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), 1)
    head += text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    data = b""
    for name, shape in shapes.items():
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, len(data))
        numbers = bytes(4 * math.prod(shape))
        data += numbers + bytes(-len(numbers) % 32)
    whole = head + bytes(-len(head) % 32) + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


def write_lora(path):
    """A LoRA for one layer of Stable Diffusion 1.5, in kohya's names."""
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    return write(path, values({f"{layer}.lora_down.weight": (2, 8, 1, 1), f"{layer}.lora_up.weight": (8, 2, 1, 1)}))
