"""LoRA between diffusers', peft's, kohya's and others' names, with the true alpha: the strength never changes.

kohya's files hold alpha as a tensor per module. diffusers' files hold it in their metadata, where a pattern that is not
tied to the beginning of a path also means every longer path that ends alike.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fastsd_helpers.checkpoints.formats.dtypes import cast, cast_dtype
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.sources import BytesSource
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.lora.fusing import fuse, split, swap_halves
from fastsd_helpers.checkpoints.lora.layers import Layer, open_lora, read_lora
from fastsd_helpers.checkpoints.lora.layouts import LORA_FILE, LoraLayout, LoraModule
from fastsd_helpers.checkpoints.lora.modules import Module, lora_modules
from fastsd_helpers.checkpoints.lora.second_reader import SourceLayer, check_lora
from fastsd_helpers.checkpoints.lora.statements import METADATA_KEY, exact_pattern
from fastsd_helpers.checkpoints.models.verifier import compare
from fastsd_helpers.checkpoints.models.writer import CheckpointFile, refuse_existing, refuse_sources
from fastsd_helpers.checkpoints.names.families import architecture_of
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import new_folder, placed, sha256_of

__all__ = ["convert_lora", "write_kohya"]

_BASE_WORDS = {"sd15": "sd_v1", "sd21": "sd_v2", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
_NOTABLE_ROUNDING = 0.02
_PROJECTION = "lora_te2_text_projection"  # for the extension that reads LoRA there, it is no layer

Split = dict[tuple[str, str], Layer]  # (part, Diffusers path) -> layer
Stored = dict[str, tuple[TensorFact, Any]]  # tensor name -> what is written


def convert_lora(src: Path, dst: Path, *, dtype: str, overwrite: bool, verify: bool) -> CheckpointFile:
    """Convert a LoRA: kohya's names become diffusers', all others become kohya's, which every web UI reads.

    Before it gets its name, what was written is read by another reader, and every layer's change compared.

    Args:
        dst: a .safetensors name; or a folder, which gets the file that diffusers looks for.

    Raises:
        CheckpointError: a layer that no model of the family has, half a pair, DoRA or biases, or a name that is taken.
        VerificationFailed: what was written changes a layer in another way than the source; nothing is left behind.
        DiskFull: nothing is left behind.
        DriveReadOnly: nothing is left behind.
        DriveError: nothing is left behind.
    """
    if dst.suffix.lower() in (".ckpt", ".bin", ".pt"):
        raise CheckpointError(f"A LoRA is not written as {dst.suffix}.", "Give a name that ends in .safetensors.")
    refuse_existing(dst, overwrite=overwrite)
    with ExitStack() as stack:
        lora = open_lora(src, stack)
        refuse_sources(dst, lora.source.files)
        _refuse_others(lora.layout)
        to_folder = dst.suffix.lower() != ".safetensors"
        if to_folder and lora.layout.naming in ("diffusers", "peft"):
            raise CheckpointError("A LoRA with kohya keys is a single file.", "Give a name that ends in .safetensors.")
        layers, notes = read_lora(lora)
        layers = _without_tables(layers, lora.layout.family, notes)
        sources = [
            SourceLayer(lora.source, module.module, module.path, module.tensors, layer.alpha)
            for module, layer in layers
        ]
        family = lora.layout.family
        if to_folder or lora.layout.naming == "kohya":
            tensors, metadata = _to_diffusers(_as_diffusers(layers), family, dtype)
            t5 = sum(family == "flux" and module.module.part == "text_encoder_2" for module, _ in layers)
            if t5:
                notes.append(
                    f"{t5} layers change T5; diffusers' Flux.1 pipeline does not load those. ComfyUI reads them "
                    "under the source's key names."
                )
        else:
            tensors, metadata = _to_kohya(_as_original(layers, family), family, dtype)
            if f"{_PROJECTION}.alpha" in tensors:
                notes.append(f"AUTOMATIC1111 does not read {_PROJECTION}; ComfyUI and Forge do.")
            metadata["modelspec.title"] = dst.stem
        del layers

        def write(path: Path) -> CheckpointFile:
            return _write(path, tensors, metadata, sources, family, dtype, verify, notes)

        if not to_folder:
            with placed(dst) as temporary:
                written = write(temporary)
            return replace(written, path=dst)
        with new_folder(dst) as folder:
            written = write(folder / LORA_FILE)
        return replace(written, path=dst, sha256=sha256_of(dst / LORA_FILE))


def _refuse_others(layout: LoraLayout) -> None:
    if layout.kind != "lora":
        raise CheckpointError(
            f"The file is {layout.words}, for which no conversion exists.",
            "Use it as it is: AUTOMATIC1111, Forge and ComfyUI read LyCORIS kinds and DoRA.",
        )
    for module in layout.modules:
        if "bias" in module.tensors:
            raise CheckpointError(
                f"The LoRA has {module.tensors['bias']!r}: biases, for which no conversion exists.",
                "Give a plain LoRA, trained without biases.",
            )


def _without_tables(
    layers: list[tuple[LoraModule, Layer]], family: str, notes: list[str]
) -> list[tuple[LoraModule, Layer]]:
    """Leave out zeros for token and position embeddings, which some programs extract; peft has no names for them.

    Raises:
        CheckpointError: an embedding or a norm layer is changed.
    """
    known = set(lora_modules(family))
    kept = []
    for module, layer in layers:
        if module.module in known or not module.module.kohya:
            kept.append((module, layer))
        elif layer.down.any() and layer.up.any():
            raise CheckpointError(
                f"The LoRA changes {module.spelled!r}, neither a linear layer nor a convolution: it has no kohya key.",
                "Use it in ComfyUI as it is, or extract it again without the embeddings.",
            )
    if len(kept) < len(layers):
        notes.append(f"{len(layers) - len(kept)} all-zero layers of embeddings or norms were left out.")
    return kept


def _write(
    path: Path,
    tensors: Stored,
    metadata: Mapping[str, str],
    sources: list[SourceLayer],
    family: str,
    dtype: str,
    verify: bool,
    notes: list[str],
) -> CheckpointFile:
    sha256, size = _write_tensors(path, tensors, metadata, verify=verify)
    checked = check_lora(path, family, sources)
    if checked.worst > _NOTABLE_ROUNDING:
        notes = [
            *notes,
            f"Rounding to {dtype} changes the effect of {checked.where} by {checked.worst:.0%}: its values "
            "are very small. --dtype fp32 keeps them.",
        ]
    return CheckpointFile(path, sha256, size, len(tensors), f"{family}-lora", dtype, tuple(notes))


def _write_tensors(
    path: Path, tensors: Stored, metadata: Mapping[str, str], *, verify: bool, finite: bool = False
) -> tuple[str, int]:
    made = BytesSource(tensors)
    recipes = {name: copied(made, name) for name in tensors}
    metadata = {"format": "pt", **metadata}
    sha256, size = write_safetensors(path, recipes, metadata=metadata, read_back=False, finite=finite)
    if verify:
        compare(path, recipes)
    return sha256, size


def write_kohya(
    path: Path, layers: list[tuple[Module, Layer]], family: str, *, dtype: str, metadata: Mapping[str, str]
) -> CheckpointFile:
    """Write a LoRA in kohya's names, which every web UI reads; it is read back and every value compared.

    Args:
        layers: each with the module of `lora_modules` that it changes.
        metadata: for the header, before what is said there of family, rank and alpha.

    Raises:
        CheckpointError: a value is NaN or Inf, or becomes Inf in `dtype`.
        DiskFull: it cannot be written.
        DriveReadOnly: it cannot be written.
        DriveError: it cannot be written.
        VerificationFailed: what was read back differs.
    """
    tensors, described = _to_kohya(layers, family, dtype, alpha_dtype=dtype)  # as kohya's scripts save it
    sha256, size = _write_tensors(path, tensors, {**described, **metadata}, verify=True, finite=True)
    return CheckpointFile(path, sha256, size, len(tensors), f"{family}-lora", dtype)


# ------------------------------------------------------------------------------------------------ the layers


def _as_diffusers(layers: Iterable[tuple[LoraModule, Layer]]) -> Split:
    """Every layer as Diffusers has it: one matrix of the original may be several."""
    found: Split = {}
    for module, layer in layers:
        for path, piece in _pieces(module, layer):
            found[module.module.part, path] = piece
    return found


def _pieces(module: LoraModule, layer: Layer) -> Iterator[tuple[str, Layer]]:
    row, paths = module.module.row, module.module.paths
    if not module.fused:
        yield module.path, layer
    elif row.form == "swapped":
        yield paths[0], swap_halves(layer, module.spelled)
    elif len(paths) == 1:
        yield paths[0], layer
    else:
        pieces = zip(paths, split(row, layer, module.spelled), strict=True)
        yield from ((path, piece) for path, piece in pieces if piece is not None)


def _as_original(layers: Iterable[tuple[LoraModule, Layer]], family: str) -> list[tuple[Module, Layer]]:
    """Every layer as the original has it, in the order of the model."""
    whole: dict[Module, Layer] = {}
    split_up: Split = {}
    for module, layer in layers:
        if module.fused and module.module.kohya:
            whole[module.module] = layer
        else:
            split_up |= {(module.module.part, path): piece for path, piece in _pieces(module, layer)}
    found = []
    for meant in lora_modules(family):
        given = [split_up.get((meant.part, path)) for path in meant.paths]
        if meant in whole:
            found.append((meant, whole[meant]))
        elif any(given):
            place = f"{meant.part}.{meant.paths[0]}"
            layer = given[0] if len(given) == 1 and given[0] else fuse(meant.row, given, place)
            found.append((meant, swap_halves(layer, place) if meant.row.form == "swapped" else layer))
    return found


# ------------------------------------------------------------------------------------------------ the file


def _to_kohya(
    layers: list[tuple[Module, Layer]], family: str, dtype: str, *, alpha_dtype: str = "fp32"
) -> tuple[Stored, dict[str, str]]:
    tensors: Stored = {}
    for module, layer in layers:
        # diffusers never comes back from a negative alpha in this layout (_convert_to_ai_toolkit): `up` takes the sign.
        up, alpha = (layer.up, layer.alpha) if layer.alpha >= 0 else (-layer.up, -layer.alpha)
        tensors[f"{module.kohya}.lora_down.weight"] = _stored(layer.down, layer.dtype, dtype)
        tensors[f"{module.kohya}.lora_up.weight"] = _stored(up, layer.dtype, dtype)
        tensors[f"{module.kohya}.alpha"] = _stored_number(alpha, alpha_dtype)
    return tensors, {
        "modelspec.architecture": f"{architecture_of(family)}/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "ss_base_model_version": _BASE_WORDS[family],
        "ss_network_alpha": f"{_usual(abs(layer.alpha) for _, layer in layers):g}",
        "ss_network_dim": str(_usual(layer.rank for _, layer in layers)),
        "ss_network_module": "networks.lora_flux" if family == "flux" else "networks.lora",
        "ss_v2": str(family == "sd21"),
    }


def _to_diffusers(layers: Split, family: str, dtype: str) -> tuple[Stored, dict[str, str]]:
    # diffusers takes `text_model.` away where transformers has none, and does not add it where it has one.
    starts = {
        (module.part, module.paths[0]): "text_model."
        for module in lora_modules(family)
        if module.part.startswith("text") and module.row.original.startswith("text_model.")
    }
    # And it knows peft's names in a text encoder by its attention layers; without one, only its own older names.
    usual = {part for part, path in layers if not part.startswith("text") or ".self_attn." in path}
    tensors: Stored = {}
    for (part, path), layer in layers.items():
        name = f"{part}.{starts.get((part, path), '')}{path}"
        down, up = ("lora_A", "lora_B") if part in usual else ("lora_linear_layer.down", "lora_linear_layer.up")
        tensors[f"{name}.{down}.weight"] = _stored(layer.down, layer.dtype, dtype)
        tensors[f"{name}.{up}.weight"] = _stored(layer.up, layer.dtype, dtype)
    described: dict[str, Any] = {}
    for part in sorted({part for part, _ in layers}):
        own = {path: layer for (other, path), layer in layers.items() if other == part}
        rank, alpha = _usual(layer.rank for layer in own.values()), _usual(layer.alpha for layer in own.values())
        described |= {
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.target_modules": _targets(part, sorted(own), family),
            f"{part}.rank_pattern": {
                exact_pattern(part, path): layer.rank for path, layer in own.items() if layer.rank != rank
            },
            f"{part}.alpha_pattern": {
                exact_pattern(part, path): layer.alpha for path, layer in own.items() if layer.alpha != alpha
            },
        }
    return tensors, {METADATA_KEY: json.dumps(described, sort_keys=True)}


def _targets(part: str, paths: list[str], family: str) -> list[str] | str:
    """The modules as peft's list of names, or as one expression where a name in the list would mean others too.

    Versions before peft 0.17 give all of those a layer, which has no numbers.
    """
    others = {path for module in lora_modules(family) if module.part == part for path in module.paths} - set(paths)
    if any(other.endswith(f".{path}") for path in paths for other in others):
        return "|".join(paths)
    return paths


def _usual(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _stored(values: Any, own: str, dtype: str) -> tuple[TensorFact, Any]:
    fact = TensorFact(cast_dtype(own, dtype), tuple(values.shape))
    flat = np.ascontiguousarray(values, "<f4").reshape(-1)
    if fact.dtype == "F64":  # read as fp32: nothing is gained by widening it again
        fact = TensorFact("F32", fact.shape)
    return fact, cast(flat.view("u1"), "F32", fact.dtype, owner=lambda: "The LoRA")


def _stored_number(value: float, dtype: str) -> tuple[TensorFact, Any]:
    return _stored(np.float32(value).reshape(()), "F32", dtype)
