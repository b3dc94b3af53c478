"""Convert a Diffusers folder, or a part of one, and write what any conversion makes."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.checkpoints.formats.packed import refuse_small_floats
from fastsd_helpers.checkpoints.formats.prediction import (
    Prediction,
    prediction_metadata,
    prediction_of_folder,
    read_config,
    sidecar,
)
from fastsd_helpers.checkpoints.formats.sources import Source, open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, copied
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.models.folder_copy import copy_folder
from fastsd_helpers.checkpoints.models.folder_settings import (
    describe_folder,
    resolution_of,
    settings_in_words,
    vae_family,
)
from fastsd_helpers.checkpoints.models.parts import Parts, open_parts
from fastsd_helpers.checkpoints.models.verifier import compare
from fastsd_helpers.checkpoints.models.writer import (
    CheckpointFile,
    check_destination,
    describe,
    marked,
    refuse_sources,
    write_recipes,
)
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.runtime import logger

if TYPE_CHECKING:
    from fastsd_helpers.checkpoints.models.merge import Merging

__all__ = [
    "ENDINGS",
    "Conversion",
    "convert_component",
    "convert_pipeline",
    "write_model",
    "write_parts",
    "write_sidecar",
]

ENDINGS = "Give a name that ends in .safetensors or .ckpt for a single file, any other name for a folder."


@dataclass(frozen=True)
class Conversion:
    """What every way of converting needs to know."""

    dtype: str
    verify: bool
    overwrite: bool
    base: Path | None
    family: str | None
    ema: bool
    hashes: bool
    all_in_one: bool
    merging: "Merging"


def convert_pipeline(src: Path, dst: Path, to_file: bool, key: str, options: Conversion) -> CheckpointFile:
    """Convert a whole pipeline.

    Raises:
        CheckpointError: as `convert`; nothing half-written is left.
    """
    refuse_sources(dst, (src / "model_index.json",))
    if not to_file:
        _refuse_same(src, options, "Diffusers folder")
        return _recast(src, dst, key, options)
    layout = "flux-all-in-one" if key == "flux" and options.all_in_one else key
    prediction = prediction_of_folder(src, key)
    parts = {part: src / part for part in find_family(layout).parts}
    if key != "flux" or options.all_in_one:
        return write_parts(dst, layout, parts, resolution_of(src), options, prediction, folder=src)
    from fastsd_helpers.checkpoints.models.merge import Merging

    vae = dst.with_name("ae.safetensors")
    if dst == vae:
        raise CheckpointError("ae.safetensors is the name of the VAE next to the transformer.", "Choose another.")
    _refuse_ckpt(dst, key)
    check_destination(vae, overwrite=options.overwrite)
    with open_parts(find_family("flux-ae"), {"vae": src / "vae"}):
        pass  # looked at before the large file is written
    written = write_parts(dst, layout, parts, resolution_of(src), options, prediction, folder=src)
    try:
        alone = replace(options, merging=Merging())
        beside = write_parts(vae, "flux-ae", {"vae": src / "vae"}, {}, alone, folder=src)
    except BaseException:
        dst.unlink(missing_ok=True)
        raise
    note = f"{vae.name} next to it is the VAE; web UIs also need the text encoders clip_l and t5xxl."
    return replace(written, notes=(*written.notes, *beside.notes, note), beside=(*written.beside, beside.path))


def write_parts(
    dst: Path,
    key: str,
    parts: Mapping[str, Path],
    described: Mapping[str, str],
    options: Conversion,
    prediction: Prediction | None = None,
    *,
    folder: Path | None = None,
) -> CheckpointFile:
    """Write a single file of the networks of a folder.

    Raises:
        CheckpointError: as `convert`; nothing half-written is left.
    """
    family = find_family(key)
    prediction = prediction or Prediction(None, "")
    with open_parts(family, parts) as opened, ExitStack() as stack:
        notes = list(opened.notes)
        for part, source in opened.sources.items():
            refuse_sources(dst, source.files)
            notes += refuse_small_floats(parts[part], source, options.dtype)
        recipes = options.merging.into_parts(opened).recipes(options.dtype)
        recipes |= _extras(opened, _open_base(family, options.base, stack), options, notes)
        recipes |= marked(family, prediction)
        metadata = {**prediction_metadata(family, prediction, opened.widths), **described}
        metadata |= options.merging.metadata({})
        if folder is not None:
            settings = describe_folder(folder, family, opened.widths, prediction, metadata)
            notes += settings_in_words(settings, header=dst.suffix.lower() == ".safetensors")
        if family.extras and not any(family.is_extra(name) for name in recipes) and key.startswith("sd21"):
            metadata["fastsd.left_out"] = "text_projection, logit_scale, transformer.resblocks.23"
        written = write_model(dst, family.key, recipes, describe(family, dst, metadata), options)
        notes_file, beside = write_sidecar(dst, sidecar(family, prediction, opened.widths), options)
    return replace(written, family=key, notes=(*notes, *notes_file), beside=beside)


def _open_base(family: Family, base: Path | None, stack: ExitStack) -> Source | None:
    if base is None or not family.extras or base.is_dir():
        return None
    source = open_file(base)
    stack.callback(source.close)
    kind = detect(source.tensors)
    if kind.family != family.key:
        raise CheckpointError(f"The base {base} is {kind.words}, not a {family.title} file.", "Give another base.")
    return source


def _extras(opened: Parts, base: Source | None, options: Conversion, notes: list[str]) -> dict[str, Recipe]:
    family = opened.family
    if base is not None:
        carried = {name: copied(base, name, options.dtype) for name in base.tensors if family.is_extra(name)}
        notes.append(f"{len(carried)} tensors that Diffusers folders lack were copied from the base file.")
        return carried
    for part, source in opened.sources.items():
        if part == "text_encoder" and "text_projection.weight" in source.tensors:
            if family.is_extra("text_projection.weight"):
                return {"text_projection.weight": copied(source, "text_projection.weight", options.dtype)}
            notes.append("The text encoder's text_projection was left out: the model generates images without it.")
    if family.key.startswith("sd21"):
        notes.append(
            "The text encoder's 24th layer, text_projection and logit_scale are left out: a Diffusers folder does not "
            "have them and no web UI needs them; --base ORIGINAL.safetensors copies them."
        )
    return {}


def _refuse_ckpt(dst: Path, key: str) -> None:
    if key.startswith("flux") and dst.suffix.lower() == ".ckpt":
        raise CheckpointError(
            "Flux.1 is not written as .ckpt: every program that runs it reads .safetensors, which cannot hide code.",
            "Give a name that ends in .safetensors.",
        )


def write_model(
    dst: Path, key: str, recipes: Mapping[str, Recipe], metadata: Mapping[str, str], options: Conversion
) -> CheckpointFile:
    """Write one file, and compare it with its sources where that is wanted.

    Raises:
        CheckpointError: it cannot be written as it was asked for.
        VerificationFailed: it is not what it should be.
    """
    _refuse_ckpt(dst, key)
    sha256, size = write_recipes(dst, recipes, metadata=metadata, read_back=options.verify, hashes=options.hashes)
    if options.verify:
        compare(dst, recipes)
        logger.info("Verified: %s was read back and every tensor is identical.", dst)
    return CheckpointFile(dst, sha256, size, len(recipes), key, options.dtype)


def write_sidecar(dst: Path, text: str | None, options: Conversion) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """The note and the file that tell web UIs of a v-prediction model."""
    if text is None:
        return (), ()
    path = dst.with_suffix(".yaml")
    if path.exists() and not options.overwrite and path.read_bytes() != text.encode():
        return (f"{path.name} exists already and was not changed; this model predicts velocity (v).",), ()
    write_atomic(path, text.encode())
    return (f"Keep {path.name} next to it: it tells web UIs that the model predicts velocity (v).",), (path,)


def _refuse_same(src: Path, options: Conversion, what: str) -> None:
    if options.dtype == "keep" and not options.merging:
        hint = f"{ENDINGS} With --dtype or --merge a folder becomes a folder."
        raise CheckpointError(f"{src} is a {what} already.", hint)


def _recast(src: Path, dst: Path, key: str, options: Conversion) -> CheckpointFile:
    return copy_folder(src, dst, family=key, dtype=options.dtype, verify=options.verify, merging=options.merging)


def convert_component(src: Path, dst: Path, to_file: bool, part: str, options: Conversion) -> CheckpointFile:
    """Convert one network of a pipeline.

    Raises:
        CheckpointError: as `convert`; nothing half-written is left.
    """
    if not to_file:
        _refuse_same(src, options, "folder")
    family = options.family
    config = read_config(src / "config.json")
    if part == "vae":
        key = "flux-ae" if config.get("latent_channels") == 16 else "vae"
    elif part == "transformer":
        key = "flux"
    elif "d_model" in config:
        key = "t5"
    else:
        layers: Any = config.get("num_hidden_layers")
        key = {12: "clip-l", 23: "clip-h", 32: "clip-g"}.get(layers, "")
        if not key or (key == "clip-g" and part != "text_encoder_2"):
            raise CheckpointError(
                f"{src} is a text encoder of {layers} layers, which no model of these families has.",
                "Give the text encoder of a Stable Diffusion, SDXL or Flux.1 model.",
            )
    if family not in (None, key) and not vae_family(find_family(key), family or "", {}):
        raise CheckpointError(f"{src} is {find_family(key).title}, not {family}.", "Leave the family out.")
    if not to_file:
        return _recast(src, dst, key, options)
    return write_parts(dst, key, {find_family(key).parts[0]: src}, {}, options, folder=src)
