"""Random LoRA of every family, naming and way of stating their strength, each with what it adds to every weight.

The truth is made first and written down afterwards, so it needs no reader. Patterns are what peft says they are
(`get_pattern_key`); where peft is not installed, none are written.
"""

import json
import math
from dataclasses import dataclass, field

import numpy as np
from table_models import widths_of, write

from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.formats.sources import read_whole
from fastsd_helpers.checkpoints.lora.modules import lora_modules
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import part_shapes

FAMILIES = ("sd15", "sd21", "sdxl", "flux")
NAMINGS = {
    **dict.fromkeys(("sd15", "sd21", "sdxl"), ("kohya", "diffusers", "old", "bare", "peft folder", "peft file")),
    "flux": ("kohya", "diffusers", "bare", "peft folder", "peft file", "bfl", "bfl down", "onetrainer"),
}
TEXT_TABLES = {
    "sd15": {"text_encoder": "clip-l"},
    "sd21": {"text_encoder": "clip-h"},
    "sdxl": {"text_encoder": "clip-l", "text_encoder_2": "clip-g"},
    "flux": {"text_encoder": "clip-l"},
}
DTYPES = {"F32": "<f4", "F16": "<f2"}
# What storing both matrices in 16 bits adds to the change of a layer, of its norm.
ROUNDING = {"keep": 1e-6, "fp32": 1e-6, "fp16": 1e-3, "bf16": 8e-3}


@dataclass
class Case:
    """A LoRA as files; truth: (part, Diffusers path) -> what is added to that weight, float64."""

    family: str
    naming: str
    source: object = None
    truth: dict = field(default_factory=dict)
    words: str = ""


def table_shapes(family):
    """(part, Diffusers path) -> shape of the weight, at the widths of table_models."""
    shapes = {}
    tables = {None: family, **TEXT_TABLES[family]}
    for part, table in tables.items():
        widths = widths_of(table) | ({"x": 1024} if table == "sd21" else {})  # which tells it from SD 1.x
        for row in find_family(table).rows:
            own = part or row.part
            for name, shape in zip(row.diffusers, part_shapes(row, widths), strict=False):
                shapes[own, name.removesuffix(".weight")] = shape
    wanted = {(module.part, path) for module in lora_modules(family) for path in module.paths}
    return {key: shape for key, shape in shapes.items() if key in wanted and len(shape) in (2, 4)}


def make_case(folder, family, seed, shapes):
    """Write one random LoRA; every choice follows from the seed."""
    return _Maker(folder, family, np.random.default_rng(seed), shapes).make()


class _Maker:
    def __init__(self, folder, family, random, shapes):
        self.folder, self.family, self.random, self.shapes = folder, family, random, shapes
        self.naming = str(random.choice(NAMINGS[family]))
        self.dtype = str(random.choice(["F32", "F16", "BF16"]))
        self.long = bool(random.integers(2))  # text_model. in front of the text encoders' paths
        self.case = Case(family, self.naming)
        self.tensors, self.metadata = {}, {"format": "pt"}
        self.stated = {}
        self.words = []

    def make(self):
        modules = self.choose_modules()
        fused = self.naming in ("bfl", "bfl down") or (self.naming == "kohya" and self.family == "flux")
        alphas = self.choose_alphas([(m, p) for m in modules for p in (m.paths if not fused else m.paths[:1])], fused)
        for module in modules:
            if fused:
                self.add(module, None, *alphas[module.part, module.paths[0]])
                continue
            for path in module.paths:
                self.add(module, path, *alphas[module.part, path])
        self.write_files()
        self.case.words = f"{self.family}, {self.naming}, {self.dtype}, {', '.join(self.words)}"
        return self.case

    # -------------------------------------------------------------------------------------------- what is adapted

    def choose_modules(self):
        every = [
            module
            for module in lora_modules(self.family)
            if all((module.part, path) in self.shapes for path in module.paths)
        ]
        denoiser = [module for module in every if module.part in ("unet", "transformer")]
        text = [module for module in every if module.part.startswith("text") and "layers" in module.paths[0]]
        if self.naming == "old":  # attention layers and what diffusers trained then
            denoiser = [m for m in denoiser if "attn" in m.paths[0]]
        if self.naming in ("bare", "peft file", "onetrainer", "bfl", "bfl down"):
            text = []
        chosen = list(self.random.choice(np.array(denoiser, object), self.random.integers(2, 9), replace=False))
        # The family has to show: deep blocks of SDXL, the width of the text encoder in SD 2.x.
        sign = {"sdxl": "transformer_blocks.1.attn1.to_q", "sd21": "attn2.to_k", "sd15": "attn2.to_k"}
        if self.family in sign:
            chosen.append(next(module for module in denoiser if sign[self.family] in module.paths[0]))
        if self.family == "flux" and self.random.integers(2):  # names that end alike
            chosen += [m for m in denoiser if m.paths[0].endswith("proj_out")][:: self.random.integers(5, 20)]
            chosen += [m for m in denoiser if m.paths[0] == "proj_out"]
        if text and self.random.integers(2):
            chosen += list(self.random.choice(np.array(text, object), self.random.integers(1, 6), replace=False))
        return list(dict.fromkeys(chosen))

    # -------------------------------------------------------------------------------------------- how strongly

    def choose_alphas(self, layers, fused):
        """(part, path) -> (rank, effective alpha, whether a tensor says it)."""
        ranks = self.random.choice([1, 2, 4, 8], 3)
        alphas = self.random.choice([0.5, 1, 1.1, 3, 4, 16, 0.03125, -2, 32, 7.7], 4)
        rank = {
            (m.part, p): int(ranks[0] if self.random.random() < 0.6 else self.random.choice(ranks)) for m, p in layers
        }
        ways = {
            "kohya": ("tensors", "some tensors", "nothing", "ss"),
            "diffusers": ("metadata", "metadata", "metadata", "plain", "tensors", "nothing"),
            "old": ("nothing", "plain"),
            "bare": ("common metadata", "plain", "nothing"),
            "bfl": ("tensors", "nothing", "plain"),
            "bfl down": ("tensors",),
            "onetrainer": ("tensors",),
            "peft folder": ("config",),
            "peft file": ("config",),
        }
        way = str(self.random.choice(ways[self.naming]))
        self.words.append(way)
        self.way = way
        found = {}
        if way in ("metadata", "common metadata", "config"):
            for part in dict.fromkeys(m.part for m, _ in layers):
                own = {p: rank[part, p] for m, p in layers if m.part == part}
                found |= {(part, p): value for p, value in self.state(part, own, alphas).items()}
            return found
        for place, (module, path) in enumerate(layers):
            key, one = (module.part, path), rank[module.part, path]
            says = way == "tensors" or (way == "some tensors" and place % 2 == 0)
            alpha = float(np.float32(self.random.choice(alphas))) if says else float(one)
            if way in ("plain", "ss"):
                alpha = float(alphas[0])
            found[key] = one, alpha, says
        if way == "plain":
            part = layers[0][0].part
            one_part = len({m.part for m, _ in layers}) == 1
            keys = ["lora_alpha", "network_alpha", "alpha"] + ([f"{part}.lora_alpha"] if one_part else [])
            self.metadata[str(self.random.choice(keys))] = f"{alphas[0]:g}"
        if way == "ss":
            self.metadata |= {"ss_network_alpha": str(alphas[0]), "ss_network_dim": str(ranks[0])}
        return found

    def state(self, part, ranks, alphas):
        """A configuration of peft's for one part, with random patterns."""
        spelled = {path: self.spell(part, path) for path in ranks}
        usual = int(self.random.choice(list(ranks.values())))
        rslora = self.random.random() < 0.2
        config = {
            "r": usual,
            "lora_alpha": float(alphas[0]),
            "target_modules": sorted(spelled.values()),
            "rank_pattern": {f"^{spelled[path]}": rank for path, rank in ranks.items() if rank != usual},
            "alpha_pattern": {},
            "use_rslora": rslora,
        }
        keys = [None] * len(ranks)
        try:
            from peft.utils.other import get_pattern_key
        except ImportError:
            pass
        else:
            some = list(spelled.values())
            for value in alphas[1 : 1 + self.random.integers(0, 4)]:
                path = str(self.random.choice(some))
                leaf, two = path.rpartition(".")[2], ".".join(path.split(".")[-2:])
                forms = (path, f"^{path}", leaf, two, rf".*{leaf}", "no.such.layer", path.split(".")[0] + r"\..*")
                config["alpha_pattern"][str(self.random.choice(forms))] = float(value)
            patterns = config["alpha_pattern"]
            keys = [get_pattern_key(patterns.keys(), spelled[path]) for path in ranks]
        self.stated[part] = config
        self.words.append(f"{len(config['alpha_pattern'])} patterns" + (", rslora" if rslora else ""))
        found = {}
        for (path, rank), key in zip(ranks.items(), keys, strict=True):
            alpha = config["alpha_pattern"].get(key, config["lora_alpha"])
            found[path] = rank, alpha * math.sqrt(rank) if rslora else alpha, False
        return found

    def spell(self, part, path):
        return f"text_model.{path}" if part.startswith("text") and self.long else path

    # -------------------------------------------------------------------------------------------- the tensors

    def add(self, module, path, rank, alpha, says):
        shapes = [self.shapes[module.part, one] for one in (module.paths if path is None else [path])]
        rows, (columns, *kernel) = sum(shape[0] for shape in shapes), shapes[0][1:]
        down, up = self.draw(rank, columns, *kernel), self.draw(rows, rank, *([1, 1] if kernel else []))
        tensors = {"down": down, "up": up}
        inner = down.reshape(rank, -1)
        if self.naming == "kohya" and kernel and kernel != [1, 1] and self.random.integers(2):
            tensors["down"], tensors["mid"] = self.draw(rank, columns, 1, 1), self.draw(rank, rank, *kernel)
            inner = np.einsum("abhw,bc->achw", tensors["mid"], tensors["down"][:, :, 0, 0]).reshape(rank, -1)
            self.words.append("mid")
        delta = alpha / rank * (up.reshape(rows, rank) @ inner)
        if path is None and module.row.form == "swapped":
            delta = np.roll(delta, rows // 2, axis=0)
        firsts = np.cumsum([0] + [shape[0] for shape in shapes])
        for place, one in enumerate(module.paths if path is None else [path]):
            self.case.truth[module.part, one] = delta[firsts[place] : firsts[place + 1]]
        stem, ends = self.names(module, path)
        for role, values in tensors.items():
            self.tensors.setdefault(self.home(module.part), {})[stem + ends[role]] = self.store(values)
        if says:
            own = self.random.choice(["F32", "F64"]) if alpha in (1.1, 7.7) else "F32"
            kind = {"F32": "<f4", "F64": "<f8"}[str(own)]
            shape = () if self.random.integers(2) else (1,)
            number = TensorFact(str(own), shape), np.array(alpha, kind).tobytes()
            self.tensors[self.home(module.part)][f"{stem}.alpha"] = number

    def names(self, module, path):
        kohya = {"down": ".lora_down.weight", "up": ".lora_up.weight", "mid": ".lora_mid.weight"}
        peft = {"down": ".lora_A.weight", "up": ".lora_B.weight"}
        plain = self.spell(module.part, path) if path else ""
        original = module.row.original.removeprefix("model.diffusion_model.").removesuffix(".weight")
        stems = {
            "kohya": (module.kohya, kohya),
            "diffusers": (f"{module.part}.{plain}", peft),
            "old": (f"{module.part}.{plain}", {"down": ".lora.down.weight", "up": ".lora.up.weight"}),
            "bare": (plain, peft),
            "peft folder": (f"base_model.model.{plain}", peft),
            "peft file": (f"base_model.model.{plain}", peft),
            "bfl": (f"diffusion_model.{original}", peft),
            "bfl down": (f"diffusion_model.{original}", kohya),
            "onetrainer": (f"lora_transformer_{plain.replace('.', '_')}", kohya),
        }
        return stems[self.naming]

    def home(self, part):
        return part if self.naming == "peft folder" else ""

    def draw(self, *shape):
        """Random numbers that the file's format holds exactly."""
        values = (self.random.standard_normal(shape) * 0.1).astype("<f4")
        if self.dtype == "BF16":
            return (values.view("<u4") & 0xFFFF0000).view("<f4").astype("<f8")
        return values.astype(DTYPES[self.dtype]).astype("<f8")

    def store(self, values):
        if self.dtype == "BF16":
            content = (values.astype("<f4").view("<u4") >> 16).astype("<u2")
        else:
            content = values.astype(DTYPES[self.dtype])
        return TensorFact(self.dtype, values.shape), content.tobytes()

    # -------------------------------------------------------------------------------------------- the files

    def write_files(self):
        if self.way == "metadata":
            packed = {f"{part}.{key}": value for part, config in self.stated.items() for key, value in config.items()}
            self.metadata["lora_adapter_metadata"] = json.dumps(packed)
        if self.way == "common metadata":
            (config,) = self.stated.values()
            self.metadata["lora_adapter_metadata"] = json.dumps(config)
        for part, tensors in self.tensors.items():
            peft = self.naming.startswith("peft")
            place = self.folder / part / ("adapter_model.safetensors" if peft else "lora.safetensors")
            write(place, tensors, self.metadata)
            if peft:
                config = self.stated[part] if part else next(iter(self.stated.values()))
                (place.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **config}))
            self.case.source = self.folder if self.naming == "peft folder" else place


# ------------------------------------------------------------------------------------------------ the definition


def changes_of(path, family):
    """What a written LoRA adds to every weight of Diffusers, by the definition of kohya's or of diffusers' layout."""
    with SafetensorsFile(path) as file:
        values = {name: _values(fact, read_whole(file, name)) for name, fact in file.tensors.items()}
        metadata = file.metadata
    kohya = {module.kohya: module for module in lora_modules(family)}
    said = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    found = {}
    for name in values:
        if name.endswith(".lora_down.weight"):
            stem = name.removesuffix(".lora_down.weight")
            module, alpha = kohya[stem], float(values[f"{stem}.alpha"])
            found |= _original(module, _product(values[name], values[f"{stem}.lora_up.weight"], alpha))
        for down, up in ((".lora_A", ".lora_B"), (".lora_linear_layer.down", ".lora_linear_layer.up")):
            if name.endswith(f"{down}.weight"):
                stem = name.removesuffix(f"{down}.weight")
                part, _, path = stem.partition(".")
                alpha = _stated_alpha(said, part, path)
                found[part, path.removeprefix("text_model.")] = _product(
                    values[name], values[f"{stem}{up}.weight"], alpha
                )
    return found


def _stated_alpha(said, part, path):
    import re

    for pattern, value in said[f"{part}.alpha_pattern"].items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return said[f"{part}.lora_alpha"]


def _values(fact, content):
    if fact.dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype("<u4") << 16).view("<f4").astype("<f8").reshape(fact.shape)
    kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}[fact.dtype]
    return np.frombuffer(content, kind).astype("<f8").reshape(fact.shape)


def _product(down, up, alpha):
    return alpha / len(down) * (up.reshape(len(up), -1) @ down.reshape(len(down), -1))


def _original(module, delta):
    if module.row.form == "swapped":
        delta = np.roll(delta, len(delta) // 2, axis=0)
    width = delta.shape[1]
    edges = [width * place for place in range(len(module.paths))] + [len(delta)]
    return {(module.part, path): delta[edges[place] : edges[place + 1]] for place, path in enumerate(module.paths)}


def largest_difference(found, truth):
    """The largest difference of a layer, of that layer's norm; infinite where one has a layer that the other lacks."""
    worst = 0.0
    for key in found.keys() | truth.keys():
        one, other = found.get(key), truth.get(key)
        if one is None or other is None:
            there = one if other is None else other
            # The original's matrix for several layers has rows of zeros for those that are not changed.
            if np.abs(there).max() > 0:
                return math.inf
            continue
        size = np.linalg.norm(other)
        worst = max(worst, np.linalg.norm(one.reshape(other.shape) - other) / size if size else np.linalg.norm(one))
    return worst
