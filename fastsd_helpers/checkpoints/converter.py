"""Convert models and LoRA between a Diffusers folder and a single file, whatever the source is."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.checkpoints.formats.dtypes import cast_dtype
from fastsd_helpers.checkpoints.formats.packed import refuse_gguf
from fastsd_helpers.checkpoints.formats.prediction import (
    MARKS,
    Prediction,
    prediction_metadata,
    prediction_of_file,
    prediction_of_folder,
    sidecar,
)
from fastsd_helpers.checkpoints.formats.sources import open_file
from fastsd_helpers.checkpoints.formats.tensor_plan import copied
from fastsd_helpers.checkpoints.given import Given, identify
from fastsd_helpers.checkpoints.models.configs import VAE_FACTORS
from fastsd_helpers.checkpoints.models.detect import Kind, detect_file, require_convertible
from fastsd_helpers.checkpoints.models.folder_conversion import (
    ENDINGS,
    Conversion,
    convert_component,
    convert_pipeline,
    write_model,
    write_parts,
    write_sidecar,
)
from fastsd_helpers.checkpoints.models.folder_settings import (
    VAE_ARCHITECTURES,
    settings_in_words,
    settings_of_file,
    vae_family,
)
from fastsd_helpers.checkpoints.models.folder_writer import write_component, write_folder
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.models.single_file import open_single
from fastsd_helpers.checkpoints.models.writer import (
    CheckpointFile,
    check_destination,
    describe,
    marked,
    refuse_existing,
    refuse_sources,
)
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.model_lookup import how_to_get, require_inert
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import detect_family

if TYPE_CHECKING:
    pass

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
        src: a Diffusers folder (pipeline, VAE, text encoder), a .safetensors, .ckpt or .bin file, or a LoRA of either.
        dst: what to write.
        dtype: `keep`, `fp32`, `fp16` or `bf16`, for every tensor of fractions; whole numbers are never cast.
        verify: read what was written back from disk and compare every tensor's bytes with the source.
        overwrite: replace `dst` if it exists.
        base: source of what is missing: for a folder, a Diffusers folder with tokenizers and configurations; for a
            single file of SD 2.x, an original file with the text encoder's last layer.
        family: refuse a source that is of another family; of a VAE alone, the family whose scaling is written.
        ema: use the EMA weights of an old training checkpoint where it has them.
        hashes: compute a file's SHA-256 while it is written (about 2 GB/s); `verify` always does.
        all_in_one: a Flux file with its text encoders and VAE, instead of `ae.safetensors` beside the transformer.
        merge: `LORA` or `LORA:strength` of each that is added: LoRA, LoCon, LoHa, LoKr, DoRA, IA3, full differences.

    Returns:
        `path`, `sha256` (not of a folder, nor without `hashes` or `verify`), `bytes`, `tensors` and `notes`.

    Raises:
        CheckpointError: as `write_checkpoint`; the source is not touched, and nothing half-written is left.
        DriveError: DiskFull, DriveReadOnly or another fault of the disk; nothing half-written is left.
        ModelError: WrongFamily, ModelNotFound or another reason why `src` is not a model that can be converted.
        VerificationFailed: with `verify`, what was written is not what it should be.
    """
    dst, base = Path(dst).expanduser(), Path(base).expanduser() if base is not None else None
    given = _look(Path(src).expanduser(), dst, base, family, dtype)
    src = given.path
    if given.what == "lora":
        require_inert([src])
        written = _convert_lora(src, dst, merge, dtype=dtype, overwrite=overwrite, verify=verify)
        return replace(written, notes=(*given.notes, *written.notes))
    from fastsd_helpers.checkpoints.models.merge import Merging, open_adapters  # it needs numpy

    (check_destination if dst.suffix.lower() in _FILES else _check_folder)(dst, overwrite=overwrite)
    require_inert([src])  # links that lead nowhere or round in a circle too
    with ExitStack() as stack:
        merging = Merging(open_adapters(merge, stack), src.stem if src.is_file() else src.name)
        refuse_sources(dst, merging.files)
        options = Conversion(dtype, verify, overwrite, base, family, ema, hashes, all_in_one, merging)
        written = _convert_model(given, dst, options)
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
        raise CheckpointError(f"{dst} is a file; a folder would be written there.", ENDINGS)
    refuse_existing(dst, overwrite=overwrite)


def _convert_model(given: Given, dst: Path, options: "Conversion") -> CheckpointFile:
    src, family = given.path, options.family
    to_file = dst.suffix.lower() in _FILES
    if given.what == "file":
        return _convert_file(src, dst, to_file, options)
    refuse_gguf(src)
    if given.what == "part":
        return convert_component(src, dst, to_file, given.part, options)
    found = detect_family(src)
    if family not in (None, found):
        raise CheckpointError(f"{src} is a {found} model, not {family}.", "Leave the family out.")
    return convert_pipeline(src, dst, to_file, found, options)


def _convert_lora(src: Path, dst: Path, merge: Sequence[object], **how: Any) -> CheckpointFile:
    from fastsd_helpers.checkpoints.lora_converter import convert_lora

    if merge:
        raise CheckpointError(
            f"{src} is a LoRA, and a LoRA is merged into a model.",
            "Give the model first: fastsd convert MODEL NEW.safetensors --merge LORA.",
        )
    return convert_lora(src, dst, **how)


def _check_name(dst: Path) -> None:
    if dst.suffix.lower() in _OTHER_FILES:
        raise CheckpointError(f"{dst.name!r} cannot be written: models are not written as {dst.suffix}.", ENDINGS)
    try:
        dst.exists()
    except OSError as err:  # one that is too long
        raise CheckpointError(f"{dst.name[:40]!r}... cannot be a name: {err.strerror}.", "Choose another one.") from err


# ------------------------------------------------------------------------------------------------ from a file


def _convert_file(src: Path, dst: Path, to_file: bool, options: Conversion) -> CheckpointFile:
    opened, family = open_file(src), options.family
    try:
        source = tidy(opened)
        kind = detect_file(src, source.tensors, source.metadata)
        if not kind.what.startswith("lora"):
            kind = require_convertible(src, source.tensors, family, source.metadata)
        prediction = prediction_of_file(src, kind.family or "", source)
        metadata = dict(source.metadata)
    finally:
        opened.close()
    if kind.what.startswith("lora"):
        if family is not None:
            raise CheckpointError(f"{src} is {kind.words}, not a model of the family {family!r}.", "Leave it out.")
        how = {"dtype": options.dtype, "overwrite": options.overwrite, "verify": options.verify}
        return _convert_lora(src, dst, options.merging.files, **how)
    if kind.what == "diffusers part":
        if not to_file:
            raise CheckpointError(f"{src} is {kind.words} already.", ENDINGS)
        vae_of = vae_family(find_family(str(kind.family)), family or "", metadata)
        said = {"modelspec.architecture": VAE_ARCHITECTURES[vae_of]} if vae_of else {}
        return write_parts(dst, str(kind.family), {"vae": src}, said, options)
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
    src: Path, dst: Path, kind: Kind, prediction: Prediction, metadata: dict[str, str], options: Conversion
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
        written = write_model(dst, single.family.key, recipes, full, options)
        notes, beside = write_sidecar(dst, sidecar(single.family, prediction, single.widths), options)
    return replace(written, notes=(*single.notes, *lost, *notes), beside=beside)
