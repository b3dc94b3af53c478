"""Convert models and LoRA between a Diffusers folder and a single file, whatever the source is."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.checkpoints.formats.dtypes import cast_dtype
from fastsd_helpers.checkpoints.formats.packed import refuse_gguf, refuse_small_floats
from fastsd_helpers.checkpoints.formats.prediction import (
    MARKS,
    Prediction,
    prediction_metadata,
    prediction_of_file,
    prediction_of_folder,
    read_config,
    sidecar,
)
from fastsd_helpers.checkpoints.formats.sources import Source, open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe, copied
from fastsd_helpers.checkpoints.given import Given, identify
from fastsd_helpers.checkpoints.models.configs import VAE_FACTORS
from fastsd_helpers.checkpoints.models.detect import Kind, detect, require_convertible
from fastsd_helpers.checkpoints.models.folder_copy import copy_folder
from fastsd_helpers.checkpoints.models.folder_settings import (
    VAE_ARCHITECTURES,
    describe_folder,
    resolution_of,
    settings_in_words,
    settings_of_file,
    vae_family,
)
from fastsd_helpers.checkpoints.models.folder_writer import write_component, write_folder
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.models.parts import Parts, open_parts
from fastsd_helpers.checkpoints.models.single_file import open_single
from fastsd_helpers.checkpoints.models.verifier import compare
from fastsd_helpers.checkpoints.models.writer import (
    CheckpointFile,
    check_destination,
    describe,
    marked,
    refuse_existing,
    refuse_sources,
    write_recipes,
)
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import Family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import write_atomic
from fastsd_helpers.model_lookup import how_to_get, require_inert
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import detect_family
from fastsd_helpers.runtime import logger

if TYPE_CHECKING:
    from fastsd_helpers.checkpoints.models.merge import Merging

__all__ = ["ConvertConfig", "convert"]


@dataclass(frozen=True)
class ConvertConfig:
    """Settings of `convert` as flags; an empty text is nothing."""

    dtype: Literal["keep", "fp32", "fp16", "bf16"] = option("keep", help="dtype of the weights")
    verify: bool = option(False, help="read the result back and compare every tensor bit by bit with the source")
    overwrite: bool = option(False, help="replace DST if it exists")
    base: str = option(
        "",
        help=(
            "source of missing tokenizers and configurations (a folder) or of SD 2.x's last text encoder layer (a file)"
        ),
    )
    family: str = option(
        "",
        help="model family: refuse a source of another one; for a VAE alone: the family it belongs to, such as sdxl",
        advanced=True,
    )
    ema: bool = option(True, help="use the EMA weights of an old training checkpoint", advanced=True)
    hashes: bool = option(
        False,
        help=("compute the SHA-256 of the file, about a third of the time of a conversion; verifying needs it anyway"),
    )
    all_in_one: bool = option(False, help="Flux: write text encoders and VAE into the same file")

    def __post_init__(self) -> None:
        check(self)


_FILES = (".safetensors", ".ckpt")
# Endings that are plainly meant as files; a folder of such a name would surprise.
_OTHER_FILES = (".bin", ".gguf", ".h5", ".json", ".msgpack", ".onnx", ".pkl", ".pt", ".pth", ".sft", ".yaml", ".zip")


def convert(
    src: Path | str,
    dst: Path | str,
    *,
    dtype: str = "keep",
    verify: bool = False,
    overwrite: bool = False,
    base: Path | str | None = None,
    family: str | None = None,
    ema: bool = True,
    hashes: bool = True,
    all_in_one: bool = False,
    merge: Sequence[str] = (),
) -> CheckpointFile:
    """Convert a model, a VAE, a text encoder or a LoRA, streamed; what is converted into what follows from `dst`.

    A name that ends in .safetensors or .ckpt becomes a single file in the original layout, any other name a Diffusers
    folder. A LoRA in diffusers' or peft's names becomes one in kohya's, and the other way round. Between safetensors
    files neither torch is imported nor more than a few pieces of tensors are in memory.

    Args:
        src: a Diffusers folder (a whole pipeline, a VAE or a text encoder), a .safetensors, .ckpt or .bin file, or a
            LoRA as a file or folder.
        dst: what to write.
        dtype: `keep`, `fp32`, `fp16` or `bf16`, for every tensor of fractions; whole numbers are never cast.
        verify: read what was written back from disk and compare every tensor's bytes with the source.
        overwrite: replace `dst` if it exists.
        base: source of missing what the source does not have: for a folder, a Diffusers folder with tokenizers and
            configurations; for a single file of SD 2.x, an original file with the text encoder's last layer.
        family: refuse a source that is of another family; of a VAE alone, the family whose scaling is written.
        ema: use the EMA weights of an old training checkpoint where it has them.
        hashes: compute a file's SHA-256 while it is written (about 2 GB/s); `verify` always does.
        all_in_one: a Flux file with its text encoders and VAE, instead of `ae.safetensors` beside the transformer.
        merge: `LORA` or `LORA:strength`, for each that is added to the model's weights: a file or folder with a LoRA,
            LoCon, LoHa, LoKr, DoRA, IA3 or full differences.

    Returns:
        What was written: `path`, `sha256` (empty for a folder, and without `hashes` and `verify`), `bytes`, `tensors`,
        and notes.

    Raises:
        CheckpointError: as `write_checkpoint`; the source is not touched, and nothing half-written is left.
        DiskFull: as `write_checkpoint`; the source is not touched, and nothing half-written is left.
        DriveReadOnly: as `write_checkpoint`; the source is not touched, and nothing half-written is left.
        DriveError: as `write_checkpoint`; the source is not touched, and nothing half-written is left.
        WrongFamily: `src` is not a model that can be converted.
        ModelNotFound: `src` is not a model that can be converted.
        ModelError: `src` is not a model that can be converted.
        VerificationFailed: with `verify`, what was written is not what it should be.
    """
    dst = Path(dst).expanduser()
    base = Path(base).expanduser() if base is not None else None
    given = _look(Path(src).expanduser(), dst, base, family, dtype)
    src = given.path
    if given.what == "lora":
        from fastsd_helpers.checkpoints.lora_converter import convert_lora

        _refuse_merging(src, merge)
        require_inert([src])
        written = convert_lora(src, dst, dtype=dtype, overwrite=overwrite, verify=verify)
        return replace(written, notes=(*given.notes, *written.notes))
    # It needs numpy, and only now is needed.
    from fastsd_helpers.checkpoints.models.merge import Merging, open_adapters

    (check_destination if dst.suffix.lower() in _FILES else _check_folder)(dst, overwrite=overwrite)
    require_inert([src])  # links that lead nowhere or round in a circle too
    with ExitStack() as stack:
        merging = Merging(open_adapters(merge, stack), src.stem if src.is_file() else src.name)
        refuse_sources(dst, merging.files)
        written = _convert_model(
            given, dst, _Options(dtype, verify, overwrite, base, family, ema, hashes, all_in_one, merging)
        )
    return replace(written, notes=tuple(dict.fromkeys((*given.notes, *written.notes, *merging.notes))))


def _look(src: Path, dst: Path, base: Path | None, family: str | None, dtype: str) -> Given:
    """What is given, after every argument was checked that needs no look inside."""
    if not src.exists():
        raise CheckpointError(f"{src} does not exist.", how_to_get(src))
    given = identify(src)
    _check_name(dst)
    if dst.exists() and given.path.samefile(dst):
        raise CheckpointError(f"{dst} is both source and destination.", "Choose another name for the new file.")
    cast_dtype("F32", dtype)
    if family is not None and family not in VAE_FACTORS:
        find_family(family)
    if base is not None and not base.exists():
        raise CheckpointError(f"There is no base model at {base}.", "Check the path, or leave the base out.")
    if base is not None:  # it lends tokenizers and descriptions
        require_inert([base])
    return given


def _check_folder(dst: Path, *, overwrite: bool) -> None:
    if dst.is_file():
        raise CheckpointError(f"{dst} is a file; a folder would be written there.", _ENDINGS)
    refuse_existing(dst, overwrite=overwrite)


def _convert_model(given: Given, dst: Path, options: "_Options") -> CheckpointFile:
    src, family = given.path, options.family
    to_file = dst.suffix.lower() in _FILES
    if given.what == "file":
        return _convert_file(src, dst, to_file, options)
    refuse_gguf(src)
    if given.what == "part":
        return _convert_component(src, dst, to_file, given.part, options)
    found = detect_family(src)
    if family not in (None, found):
        raise CheckpointError(f"{src} is a {found} model, not {family}.", "Leave the family out.")
    return _convert_pipeline(src, dst, to_file, found, options)


def _refuse_merging(src: Path, merge: Sequence[object]) -> None:
    if merge:
        raise CheckpointError(
            f"{src} is a LoRA, and a LoRA is merged into a model.",
            "Give the model first: fastsd convert MODEL NEW.safetensors --merge LORA.",
        )


def _check_name(dst: Path) -> None:
    if dst.suffix.lower() in _OTHER_FILES:
        raise CheckpointError(f"{dst.name!r} cannot be written: models are not written as {dst.suffix}.", _ENDINGS)
    try:
        dst.exists()
    except OSError as err:  # one that is too long
        raise CheckpointError(f"{dst.name[:40]!r}... cannot be a name: {err.strerror}.", "Choose another one.") from err


_ENDINGS = "Give a name that ends in .safetensors or .ckpt for a single file, any other name for a folder."


@dataclass(frozen=True)
class _Options:
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


# ------------------------------------------------------------------------------------------------ from a folder


def _convert_pipeline(src: Path, dst: Path, to_file: bool, key: str, options: _Options) -> CheckpointFile:
    refuse_sources(dst, (src / "model_index.json",))
    if not to_file:
        _refuse_same(src, options, "Diffusers folder")
        return _recast(src, dst, key, options)
    layout = "flux-all-in-one" if key == "flux" and options.all_in_one else key
    prediction = prediction_of_folder(src, key)
    parts = {part: src / part for part in find_family(layout).parts}
    if key != "flux" or options.all_in_one:
        return _write_parts(dst, layout, parts, resolution_of(src), options, prediction, folder=src)
    from fastsd_helpers.checkpoints.models.merge import Merging

    vae = dst.with_name("ae.safetensors")
    if dst == vae:
        raise CheckpointError("ae.safetensors is the name of the VAE next to the transformer.", "Choose another.")
    _refuse_ckpt(dst, key)
    check_destination(vae, overwrite=options.overwrite)
    with open_parts(find_family("flux-ae"), {"vae": src / "vae"}):
        pass  # looked at before the large file is written
    written = _write_parts(dst, layout, parts, resolution_of(src), options, prediction, folder=src)
    try:
        alone = replace(options, merging=Merging())
        beside = _write_parts(vae, "flux-ae", {"vae": src / "vae"}, {}, alone, folder=src)
    except BaseException:
        dst.unlink(missing_ok=True)
        raise
    note = f"{vae.name} next to it is the VAE; web UIs also need the text encoders clip_l and t5xxl."
    return replace(written, notes=(*written.notes, *beside.notes, note), beside=(*written.beside, beside.path))


def _write_parts(
    dst: Path,
    key: str,
    parts: Mapping[str, Path],
    described: Mapping[str, str],
    options: _Options,
    prediction: Prediction | None = None,
    *,
    folder: Path | None = None,
) -> CheckpointFile:
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
        written = _write(dst, family.key, recipes, describe(family, dst, metadata), options)
        notes_file, beside = _write_sidecar(dst, sidecar(family, prediction, opened.widths), options)
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


def _extras(opened: Parts, base: Source | None, options: _Options, notes: list[str]) -> dict[str, Recipe]:
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


def _write(
    dst: Path, key: str, recipes: Mapping[str, Recipe], metadata: Mapping[str, str], options: _Options
) -> CheckpointFile:
    _refuse_ckpt(dst, key)
    sha256, size = write_recipes(dst, recipes, metadata=metadata, read_back=options.verify, hashes=options.hashes)
    if options.verify:
        compare(dst, recipes)
        logger.info("Verified: %s was read back and every tensor is identical.", dst)
    return CheckpointFile(dst, sha256, size, len(recipes), key, options.dtype)


def _write_sidecar(dst: Path, text: str | None, options: _Options) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    if text is None:
        return (), ()
    path = dst.with_suffix(".yaml")
    if path.exists() and not options.overwrite and path.read_bytes() != text.encode():
        return (f"{path.name} exists already and was not changed; this model predicts velocity (v).",), ()
    write_atomic(path, text.encode())
    return (f"Keep {path.name} next to it: it tells web UIs that the model predicts velocity (v).",), (path,)


def _refuse_same(src: Path, options: _Options, what: str) -> None:
    if options.dtype == "keep" and not options.merging:
        hint = f"{_ENDINGS} With --dtype or --merge a folder becomes a folder."
        raise CheckpointError(f"{src} is a {what} already.", hint)


def _recast(src: Path, dst: Path, key: str, options: _Options) -> CheckpointFile:
    return copy_folder(src, dst, family=key, dtype=options.dtype, verify=options.verify, merging=options.merging)


def _convert_component(src: Path, dst: Path, to_file: bool, part: str, options: _Options) -> CheckpointFile:
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
    return _write_parts(dst, key, {find_family(key).parts[0]: src}, {}, options, folder=src)


# ------------------------------------------------------------------------------------------------ from a file


def _convert_file(src: Path, dst: Path, to_file: bool, options: _Options) -> CheckpointFile:
    from fastsd_helpers.checkpoints.lora_converter import convert_lora

    opened, family = open_file(src), options.family
    try:
        source = tidy(opened)
        kind = detect(source.tensors, source.metadata)
        if not kind.what.startswith("lora"):
            kind = require_convertible(src, source.tensors, family, source.metadata)
        prediction = prediction_of_file(src, kind.family or "", source)
        metadata = dict(source.metadata)
    finally:
        opened.close()
    if kind.what.startswith("lora"):
        _refuse_merging(src, options.merging.files)
        if family is not None:
            raise CheckpointError(f"{src} is {kind.words}, not a model of the family {family!r}.", "Leave it out.")
        return convert_lora(src, dst, dtype=options.dtype, overwrite=options.overwrite, verify=options.verify)
    if kind.what == "diffusers part":
        if not to_file:
            raise CheckpointError(f"{src} is {kind.words} already.", _ENDINGS)
        vae_of = vae_family(find_family(str(kind.family)), family or "", metadata)
        said = {"modelspec.architecture": VAE_ARCHITECTURES[vae_of]} if vae_of else {}
        return _write_parts(dst, str(kind.family), {"vae": src}, said, options)
    if to_file:
        if kind.what == "part" and family and kind.family != family:
            vae_of = vae_family(find_family(str(kind.family)), family, {})
            metadata |= {"modelspec.architecture": VAE_ARCHITECTURES[vae_of]} if vae_of else {}
        return _rewrite_file(src, dst, kind, prediction, metadata, options)
    with open_single(src, str(kind.family), ema=options.ema, dtype=options.dtype) as single:
        single = options.merging.into_single(single)
        refuse_sources(dst, single.source.files)
        shared: dict[str, Any] = {"dtype": options.dtype, "verify": options.verify, "base": options.base}
        if kind.what == "part":
            return write_component(single, dst, **shared, family=family or "")
        if kind.family == "flux":
            written = write_component(single, dst, **shared)
            note = (
                "The file holds the transformer alone, and so does the folder: it takes the place of `transformer` in "
                "a Flux.1 folder. An all-in-one file becomes a whole folder."
            )
            return replace(written, notes=(*written.notes, note))
        if options.base is not None and detect_family(options.base) != str(kind.family).removesuffix("-all-in-one"):
            raise CheckpointError(f"The base {options.base} is of another family than {src}.", "Give another base.")
        written = write_folder(single, dst, prediction, **shared)
    if prediction.kind is None:
        return replace(written, notes=(*written.notes, _unsaid(str(kind.family), options.base)))
    return written


def _unsaid(family: str, base: Path | None) -> str:
    """The note on a file that does not say what it predicts: what its folder says then."""
    note = "The file does not say whether it predicts noise (epsilon) or velocity (v)"
    kind = prediction_of_folder(base, family).kind if base is not None else None
    if kind is not None:
        return f"{note}: what the base predicts ({kind}) was taken."
    neither = ", and neither does the base" if base is not None else ""
    return f"{note}{neither}. Diffusers takes epsilon: if images come out as noise, it is a v-prediction model."


def _rewrite_file(
    src: Path, dst: Path, kind: Kind, prediction: Prediction, metadata: dict[str, str], options: _Options
) -> CheckpointFile:
    """A single file once more: another dtype or file format, without buffers and training state."""
    with open_single(src, str(kind.family), ema=options.ema, dtype=options.dtype) as single:
        single = options.merging.into_single(single)
        refuse_sources(dst, single.source.files)
        own = {name: copied(single.source, name) for name in MARKS if name in single.source.tensors}
        recipes = {**single.whole(options.dtype), **marked(single.family, prediction), **own}
        # What the source says of itself stays, but for what is no longer true.
        kept = {key: text for key, text in metadata.items() if not key.startswith(("modelspec.hash", "format"))}
        known = prediction_metadata(single.family, prediction, single.widths) if prediction.kind else {}
        full = {**describe(single.family, dst, known), **kept, **single.metadata}
        lost = settings_in_words(settings_of_file(kept), header=False) if dst.suffix.lower() == ".ckpt" else ()
        written = _write(dst, single.family.key, recipes, full, options)
        notes, beside = _write_sidecar(dst, sidecar(single.family, prediction, single.widths), options)
    return replace(written, notes=(*single.notes, *lost, *notes), beside=beside)
