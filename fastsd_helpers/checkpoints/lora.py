"""LoRA between diffusers' or peft's names and kohya's, with the true alpha: the strength never changes.

A LoRA adds `alpha / rank * up @ down` to a weight. kohya's files hold alpha as a tensor per module. diffusers' files
hold it in their metadata, peft's folders in adapter_config.json; where neither says it, diffusers takes the rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints.layout import PART_WORDS
from fastsd_helpers.checkpoints.lora_names import Module, kohya_modules, lora_modules
from fastsd_helpers.checkpoints.number_formats import cast, cast_dtype
from fastsd_helpers.checkpoints.prediction import read_config
from fastsd_helpers.checkpoints.recipes import copied
from fastsd_helpers.checkpoints.recognise import recognise
from fastsd_helpers.checkpoints.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.sources import BytesSource, Source, open_file
from fastsd_helpers.checkpoints.verifier import compare
from fastsd_helpers.checkpoints.writer import CheckpointFile, refuse_existing, refuse_sources
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import new_folder, sha256_of

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LORA_FILE", "convert_lora", "is_lora_folder", "lora_family"]

LORA_FILE = "pytorch_lora_weights.safetensors"
_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_METADATA_KEY = "lora_adapter_metadata"
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_ENDINGS = re.compile(
    r"(?P<path>.+?)\.(?:"
    r"(?:lora|lora_linear_layer)\.(?P<old>down|up)"  # diffusers before 0.22
    r"|(?P<projection>to_q|to_k|to_v|to_out)_lora\.(?P<ancient>down|up)"  # and before 0.17
    r"|lora_(?P<letter>[AB])(?:\.[^.]+)?)\.weight"
)
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_BASE_WORDS = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1/lora",
    "sd21": "stable-diffusion-v2-512/lora",
    "sdxl": "stable-diffusion-xl-v1-base/lora",
    "flux": "flux-1-dev/lora",
}


@dataclass
class _Layer:
    """One module's pair of matrices, as float32, and how strongly they count."""

    down: "np.ndarray"
    up: "np.ndarray"
    alpha: float
    dtype: str

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


Layers = dict[tuple[str, str], _Layer]  # (part, Diffusers path) -> layer


def is_lora_folder(folder: Path) -> bool:
    """Whether a folder is a LoRA: one file of diffusers', or adapters of peft, perhaps one per part."""
    return bool(_adapters(folder)) or (folder / LORA_FILE).is_file()


def convert_lora(src: Path, dst: Path, *, dtype: str, overwrite: bool, verify: bool) -> CheckpointFile:
    """Convert a LoRA: diffusers' or peft's names become kohya's, kohya's become diffusers'.

    Args:
        dst: a .safetensors name; for a LoRA in kohya's names also a folder, which gets the file diffusers looks for.

    Raises:
        CheckpointError: a layer that no model of the family has, half a pair, DoRA or biases, or a name that is taken.
        DiskFull, DriveReadOnly, DriveError: nothing is left behind.
    """
    if dst.suffix.lower() in (".ckpt", ".bin", ".pt"):
        raise CheckpointError(f"A LoRA is not written as {dst.suffix}.", "Give a name that ends in .safetensors.")
    refuse_existing(dst, overwrite=overwrite)
    with ExitStack() as stack:
        files = _open(src, stack)
        for source, _part, _config in files:
            refuse_sources(dst, source.files)
        kohya = recognise(files[0][0].tensors).what == "lora"
        family = lora_family({name: fact for source, _, _ in files for name, fact in source.tensors.items()})
        notes: list[str] = []
        if kohya:
            tensors, metadata = _to_diffusers(_read_kohya(files[0][0], family, notes), dtype)
        else:
            layers: Layers = {}
            for source, part, config in files:
                layers |= _read_diffusers(source, part, config, family, notes)
            tensors, metadata = _to_kohya(layers, family, dtype)
            metadata["modelspec.title"] = dst.stem
        made = BytesSource(tensors)
        recipes = {name: copied(made, name) for name in tensors}
        if dst.suffix.lower() == ".safetensors":
            return _write(dst, recipes, metadata, family, dtype, verify, notes)
        if not kohya:
            raise CheckpointError("A LoRA in kohya's names is one file.", "Give a name that ends in .safetensors.")
        with new_folder(dst) as folder:
            _write(folder / LORA_FILE, recipes, metadata, family, dtype, verify, notes)
        size = (dst / LORA_FILE).stat().st_size
        return CheckpointFile(
            dst, sha256_of(dst / LORA_FILE), size, len(recipes), f"{family}-lora", dtype, tuple(notes)
        )


def _write(
    path: Path, recipes: Any, metadata: Mapping[str, str], family: str, dtype: str, verify: bool, notes: list[str]
) -> CheckpointFile:
    sha256, size = write_safetensors(path, recipes, metadata={"format": "pt", **metadata}, read_back=False)
    if verify:
        compare(path, recipes)
    return CheckpointFile(path, sha256, size, len(recipes), f"{family}-lora", dtype, tuple(notes))


def lora_family(tensors: Mapping[str, TensorFact]) -> str:
    """The family a LoRA belongs to, from its layers: sd15, sd21, sdxl or flux."""
    names = list(tensors)
    if any("double_blocks" in name or "single_blocks" in name or "single_transformer" in name for name in names):
        return "flux"
    if any(re.match(r"transformer\.|(base_model\.model\.)?transformer_blocks\.", name) for name in names):
        return "flux"
    second = ("lora_te2_", "text_encoder_2.")
    deep = re.compile(r"(^lora_unet|^unet|^base_model).*transformer_blocks[._][1-9]")
    if any(name.startswith(second) or deep.search(name) for name in names):
        return "sdxl"
    for name, fact in tensors.items():
        if re.search(r"attn2[._]to_k.*(lora_down|lora_A|down)\b.*weight", name) and len(fact.shape) >= 2:
            return {1024: "sd21", 2048: "sdxl"}.get(fact.shape[1], "sd15")
    return "sd15"


# ------------------------------------------------------------------------------------------------ reading


def _adapters(folder: Path) -> list[tuple[Path, str]]:
    """(file, part) of peft's adapters in a folder; an empty part is to be told from the names."""
    found = []
    for place, part in ((folder, ""), *((folder / part, part) for part in _PARTS)):
        for name in _ADAPTER_FILES:
            if (place / name).is_file():
                found.append((place / name, part))
                break
    return found


def _open(src: Path, stack: ExitStack) -> list[tuple[Source, str, dict[str, Any]]]:
    paths = [(src, "")] if src.is_file() else _adapters(src) or [(src / LORA_FILE, "")]
    opened = []
    for path, part in paths:
        source = open_file(path)
        stack.callback(source.close)
        opened.append((source, part, read_config(path.parent / "adapter_config.json") if src.is_dir() else {}))
    return opened


def _read_diffusers(source: Source, part: str, config: Mapping[str, Any], family: str, notes: list[str]) -> Layers:
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    alphas: dict[tuple[str, str], float] = {}
    for name in sorted(source.tensors):
        if name.endswith(".alpha"):
            place = _place(name.removesuffix(".alpha"), part, family)
            alphas[place] = float(_values(source, name).reshape(-1)[0])
            continue
        match = _ENDINGS.fullmatch(name)
        if match is None:
            reason = "DoRA" if "magnitude" in name or "dora" in name else "a tensor that is none of a plain LoRA"
            raise CheckpointError(
                f"The LoRA has {name!r}: {reason}, for which no conversion exists.", "Give a plain LoRA."
            )
        side = match["old"] or match["ancient"] or {"A": "down", "B": "up"}[match["letter"]]
        path = match["path"]
        if match["projection"]:
            path = path.removesuffix(".processor")
            text = ".layers." in path
            leaf = _TEXT_PROJECTIONS[match["projection"]] if text else match["projection"]
            path = f"{path}.{leaf}" + (".0" if leaf == "to_out" else "")
        pairs.setdefault(_place(path, part, family), {})[side] = name
    known = {(module.part, path) for module in lora_modules(family) for path in module.paths}
    adapter = _adapter_metadata(source, config)
    layers: Layers = {}
    unsaid = 0
    for place, names in pairs.items():
        if place not in known:
            raise CheckpointError(
                f"The LoRA changes {place[1]!r} of the {PART_WORDS.get(place[0], place[0])}, "
                f"which {_BASE_WORDS[family]} models do not have.",
                "Give a LoRA for Stable Diffusion 1.x, 2.x, SDXL or Flux.1.",
            )
        down, up = _pair(source, names, ".".join(place))
        alpha = alphas.get(place)
        if alpha is None:
            alpha = _alpha_of(adapter, place, down.shape[0])
        if alpha is None:
            alpha, unsaid = float(down.shape[0]), unsaid + 1
        layers[place] = _Layer(down, up, alpha, source.tensors[names["down"]].dtype)
    if unsaid:
        notes.append("The file does not say the alpha; it was taken to be the rank, as diffusers does.")
    return layers


def _place(path: str, part: str, family: str) -> tuple[str, str]:
    """(part, module path) of a name; peft's own folders say the part in the folder's name, or not at all."""
    path = path.removeprefix("base_model.model.")
    if not part:
        start, _, rest = path.partition(".")
        if start in _PARTS:
            part, path = start, rest
        elif ".layers." in path:
            part = "text_encoder"
        else:
            part = "transformer" if family == "flux" else "unet"
    return part, path.removeprefix("text_model.") if part.startswith("text") else path


def _adapter_metadata(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """What is written down about rank and alpha, with the part in front of each name; "" for a peft folder."""
    if config:
        return {f".{key}": value for key, value in config.items()}
    text = source.metadata.get(_METADATA_KEY)
    try:
        found = json.loads(text) if text else {}
    except ValueError as err:
        raise CheckpointError("The LoRA's metadata cannot be read.", "Save it again with diffusers.") from err
    return found if isinstance(found, dict) else {}


def _alpha_of(adapter: Mapping[str, Any], place: tuple[str, str], rank: int) -> float | None:
    part, path = place
    for start in (f"{part}.", "."):
        if f"{start}lora_alpha" not in adapter:
            continue
        alpha = adapter[f"{start}lora_alpha"]
        for pattern, value in (adapter.get(f"{start}alpha_pattern") or {}).items():
            # peft matches the end of the path, as a regular expression.
            if re.fullmatch(rf"(.*\.)?({pattern})", path):
                alpha = value
                break
        # Rank-stabilised LoRA divides by the root of the rank.
        return float(alpha) * math.sqrt(rank) if adapter.get(f"{start}use_rslora") else float(alpha)
    return None


def _read_kohya(source: Source, family: str, notes: list[str]) -> list[tuple[Module, _Layer]]:
    pairs: dict[str, dict[str, str]] = {}
    for name in sorted(source.tensors):
        base, _, ending = name.partition(".")
        sides = {"lora_down.weight": "down", "lora_up.weight": "up", "alpha": "alpha"}
        if ending not in sides:
            raise CheckpointError(
                f"The LoRA has {name!r}, for which no conversion exists.",
                "Give a plain LoRA, without DoRA and without LoCon's middle matrix.",
            )
        pairs.setdefault(base, {})[sides[ending]] = name
    modules = kohya_modules(family)
    layers = []
    unsaid = 0
    for base, names in pairs.items():
        if base not in modules:
            raise CheckpointError(
                f"The LoRA changes {base!r}, which {_BASE_WORDS[family]} models do not have.",
                "Give a LoRA for Stable Diffusion 1.x, 2.x, SDXL or Flux.1.",
            )
        down, up = _pair(source, names, base)
        alpha = float(_values(source, names["alpha"]).reshape(-1)[0]) if "alpha" in names else float(down.shape[0])
        unsaid += "alpha" not in names
        layers.append((modules[base], _Layer(down, up, alpha, source.tensors[names["down"]].dtype)))
    if unsaid:
        notes.append(f"{unsaid} layers do not say their alpha; it was taken to be the rank.")
    return layers


def _pair(source: Source, names: Mapping[str, str], place: str) -> tuple["np.ndarray", "np.ndarray"]:
    if "down" not in names or "up" not in names:
        lacking = "up" if "down" in names else "down"
        raise CheckpointError(f"The LoRA has half a layer: {place} lacks its {lacking} matrix.", "Download it again.")
    down, up = _values(source, names["down"]), _values(source, names["up"])
    if down.ndim < 2 or up.ndim < 2 or not down.shape[0] or up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"The LoRA's matrices of {place} do not fit: {list(down.shape)} and {list(up.shape)}.", "Download it again."
        )
    return down, up


def _values(source: Source, name: str) -> "np.ndarray":
    import numpy as np

    fact = source.tensors[name]
    values = bytearray(fact.bytes)
    source.read_into(name, 0, values)
    if fact.dtype.startswith(("I", "U")):
        return np.frombuffer(values, f"<{fact.dtype[0].lower()}{int(fact.dtype[1:]) // 8}").astype("<f4")
    wide = cast(values, fact.dtype, "F32", owner=lambda: f"The LoRA's tensor {name!r}")
    return np.frombuffer(wide, "<f4").reshape(fact.shape).copy()


# ------------------------------------------------------------------------------------------------ writing


def _to_kohya(layers: Layers, family: str, dtype: str) -> tuple[dict[str, tuple[TensorFact, Any]], dict[str, str]]:
    tensors: dict[str, tuple[TensorFact, Any]] = {}
    ranks: Counter[int] = Counter()
    alphas: Counter[float] = Counter()
    for module in lora_modules(family):
        given = [layers.get((module.part, path)) for path in module.paths]
        if not any(given):
            continue
        layer = given[0] if len(given) == 1 else _fused(module, given, layers)
        if module.row.form == "swapped":
            layer = _Layer(layer.down, _swapped(layer.up), layer.alpha, layer.dtype)
        tensors[f"{module.kohya}.lora_down.weight"] = _stored(layer.down, layer.dtype, dtype)
        tensors[f"{module.kohya}.lora_up.weight"] = _stored(layer.up, layer.dtype, dtype)
        tensors[f"{module.kohya}.alpha"] = _stored_number(layer.alpha)
        ranks[layer.rank] += 1
        alphas[layer.alpha] += 1
    rank, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return tensors, {
        "modelspec.architecture": _ARCHITECTURES[family],
        "modelspec.sai_model_spec": "1.0.1",
        "ss_base_model_version": _BASE_WORDS[family],
        "ss_network_alpha": f"{alpha:g}",
        "ss_network_dim": str(rank),
        "ss_network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
        "ss_v2": str(family == "sd21"),
    }


def _fused(module: Module, given: list[_Layer | None], layers: Layers) -> _Layer:
    """Several layers of Diffusers as the one of the original: ups along a diagonal, downs under one another."""
    import numpy as np

    there = [layer for layer in given if layer is not None]
    scales = {layer.scale for layer in there}
    scale = scales.pop() if len(scales) == 1 else 1.0
    width = next(layer.up.shape[0] for layer in there)
    rows, firsts = [], 0
    heights = _heights(module, given, width)
    rank = sum(layer.rank for layer in there)
    for layer, height in zip(given, heights, strict=True):
        block = np.zeros((height, rank), "<f4")
        if layer is not None:
            block[:, firsts : firsts + layer.rank] = layer.up if layer.scale == scale else layer.up * layer.scale
            firsts += layer.rank
        rows.append(block)
    down = np.concatenate([layer.down for layer in there])
    return _Layer(down, np.concatenate(rows), scale * rank, there[0].dtype)


def _heights(module: Module, given: list[_Layer | None], width: int) -> list[int]:
    """How many rows of the fused matrix each layer has; where one is not there, from what the others show."""
    in_width = next(layer.down.shape[1] for layer in given if layer is not None)
    sizes = {"d": in_width}
    for layer, symbol in zip(given, module.row.stacked, strict=True):
        if layer is not None:
            sizes[symbol] = layer.up.shape[0]
    # The inner layers of Flux are four times as wide.
    return [sizes.get(symbol, 4 * in_width) for symbol in module.row.stacked]


def _to_diffusers(
    layers: list[tuple[Module, _Layer]], dtype: str
) -> tuple[dict[str, tuple[TensorFact, Any]], dict[str, str]]:
    split: dict[tuple[str, str], _Layer] = {}
    for module, layer in layers:
        if module.row.form == "swapped":
            layer = _Layer(layer.down, _swapped(layer.up), layer.alpha, layer.dtype)
        pieces = [layer] if len(module.paths) == 1 else _split(module, layer)
        for path, piece in zip(module.paths, pieces, strict=True):
            if piece is not None:
                split[module.part, path] = piece
    tensors: dict[str, tuple[TensorFact, Any]] = {}
    for (part, path), layer in split.items():
        tensors[f"{part}.{path}.lora_A.weight"] = _stored(layer.down, layer.dtype, dtype)
        tensors[f"{part}.{path}.lora_B.weight"] = _stored(layer.up, layer.dtype, dtype)
    described: dict[str, Any] = {}
    for part in sorted({part for part, _ in split}):
        own = {path: layer for (other, path), layer in split.items() if other == part}
        rank = Counter(layer.rank for layer in own.values()).most_common(1)[0][0]
        alpha = Counter(layer.alpha for layer in own.values()).most_common(1)[0][0]
        described |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.target_modules": sorted(own),
            f"{part}.rank_pattern": {path: layer.rank for path, layer in own.items() if layer.rank != rank},
            f"{part}.alpha_pattern": {path: layer.alpha for path, layer in own.items() if layer.alpha != alpha},
        }
    return tensors, {_METADATA_KEY: json.dumps(described, sort_keys=True)}


def _split(module: Module, layer: _Layer) -> list[_Layer | None]:
    import numpy as np

    heights = _split_heights(module, layer)
    ups = np.split(layer.up, np.cumsum(heights)[:-1])
    used = [np.flatnonzero(np.any(up != 0, axis=0)) for up in ups]
    # Where no column serves two layers, they were apart before: each gets its own rank back.
    apart = sum(map(len, used)) == len(np.unique(np.concatenate(used)))
    made: list[_Layer | None] = []
    for up, columns in zip(ups, used, strict=True):
        if apart and not len(columns):
            made.append(None)
        elif apart:
            down, narrow = layer.down[columns], np.ascontiguousarray(up[:, columns])
            made.append(_Layer(down, narrow, layer.scale * len(columns), layer.dtype))
        else:
            made.append(_Layer(layer.down, np.ascontiguousarray(up), layer.alpha, layer.dtype))
    return made


def _split_heights(module: Module, layer: _Layer) -> list[int]:
    width = layer.down.shape[1]
    heights = [width if symbol == "d" else 0 for symbol in module.row.stacked]
    return [height or layer.up.shape[0] - sum(heights) for height in heights]


def _swapped(up: "np.ndarray") -> "np.ndarray":
    import numpy as np

    half = up.shape[0] // 2
    return np.concatenate([up[half:], up[:half]])


def _stored(values: "np.ndarray", own: str, dtype: str) -> tuple[TensorFact, Any]:
    import numpy as np

    fact = TensorFact(cast_dtype(own, dtype), tuple(values.shape))
    flat = np.ascontiguousarray(values, "<f4").reshape(-1)
    if fact.dtype == "F64":  # read as fp32: nothing is gained by widening it again
        fact = TensorFact("F32", fact.shape)
    return fact, cast(flat.view("u1"), "F32", fact.dtype, owner=lambda: "The LoRA")


def _stored_number(value: float) -> tuple[TensorFact, bytes]:
    import numpy as np

    return TensorFact("F32", ()), np.float32(value).tobytes()
