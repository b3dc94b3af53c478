"""Open any TrOCR checkpoint and fixed what is wrong with it; every repair is a sentence with its effect."""

import contextlib
import json
import math
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd_helpers.device import Device, describe_cpu, describe_device
from fastsd_helpers.downloads import read_json
from fastsd_helpers.errors import ModelError, SettingsError, needs_package
from fastsd_helpers.model_lookup import GRAPHS, READER, find_folder, require_reader
from fastsd_helpers.runtime import logger
from fastsd_helpers.trocr.model.image_processor import Pixels
from fastsd_helpers.trocr.model.search import Limits
from fastsd_helpers.wheels.advisories import require_safe_tokenizer

__all__ = [
    "PICTURES",
    "WORDS",
    "Checkpoint",
    "copy_files",
    "load_tokenizer",
    "load_weights",
    "open_checkpoint",
    "open_in_bitsandbytes",
    "quiet_transformers",
    "repair_positions",
]

# Files of a model's folder: those of its tokenizer, and of its image settings.
WORDS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
    *("sentencepiece.bpe.model", "added_tokens.json"),
)
PICTURES = ("preprocessor_config.json", "processor_config.json")
_OLD_DEFAULT_LENGTH = 20  # what transformers fills in for a checkpoint that says nothing
_LONGEST_LINE = 128
_FEW_PARAMETERS = 20_000_000


@dataclass
class Checkpoint:
    """A model as opened: its network (None for a folder of graphs), tokenizer, image settings and limits."""

    folder: Path
    model: Any
    tokenizer: Any
    pixels: Pixels
    limits: Limits
    device: str
    precision: str
    reason: str  # why this device and precision
    repairs: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def has_graphs(self) -> bool:
        """Whether the folder holds OpenVINO graphs instead of PyTorch weights."""
        return self.model is None


def open_checkpoint(
    ref: str | Path, *, device: str = "auto", precision: str = "auto", cache_dir: Path | None = None
) -> Checkpoint:
    """Open a model by key, Hub id or folder, repaired.

    Repairs: the cache of earlier steps switched on; a limit of 20 tokens that nobody asked for lifted; sinusoidal
    position tables that transformers 5 leaves empty computed again; a tokenizer that transformers cannot build made
    from its vocabulary; missing start, end and padding ids filled in; rules against repeated words left out.

    Args:
        device: auto, cpu, cuda or mps.
        precision: auto, fp32, bf16, fp16 or int8; int8 here loads fp32 weights, for the caller to turn into graphs.

    Raises:
        ModelError: see `model_lookup.find_folder`.
        SettingsError: there is no such device here.
    """
    folder = find_folder(ref, READER, cache_dir=cache_dir)
    config = require_reader(folder)
    repairs: list[str] = []
    tokenizer = load_tokenizer(folder, repairs)
    pixels = Pixels(_picture_settings(folder))
    limits = _read_limits(folder, config, tokenizer, repairs)
    if (folder / GRAPHS / "decoder.xml").is_file():
        return Checkpoint(
            folder,
            None,
            tokenizer,
            pixels,
            limits,
            "cpu",
            "int8",
            "the folder holds graphs for the CPU",
            repairs,
            config,
        )
    chosen = describe_device()
    if device not in ("auto", "cpu", chosen.kind):
        raise SettingsError(f"There is no {device} device here.", f"Leave --device out: {chosen.kind} is used then.")
    if device == "cpu" and chosen.kind != "cpu":
        chosen = describe_cpu("as asked")  # whose formats and memory are not the GPU's
    model = _load_model(folder, repairs)
    count = sum(weight.numel() for weight in model.parameters())
    precision, reason = _choose_precision(precision, chosen, count)
    _to_precision(model, precision, chosen.kind)
    for repair in repairs:
        logger.warning("%s: %s", folder.name, repair)
    reason = f"{chosen.name} ({chosen.reason}); {precision}: {reason}"
    return Checkpoint(folder, model, tokenizer, pixels, limits, chosen.kind, precision, reason, repairs, config)


def _choose_precision(precision: str, device: Device, parameters: int) -> tuple[str, str]:
    """Choose the dtype for a device: (fp32, bf16, fp16 or int8; why). int8 is never chosen by itself."""
    if precision != "auto":
        return precision, "as asked"
    if device.kind == "cuda":
        if device.has_bf16:
            return "bf16", "half the memory and more than twice the speed of fp32 on this GPU"
        return "fp16", "this GPU has no bf16 arithmetic"
    if device.kind == "cpu" and device.has_bf16 and parameters >= _FEW_PARAMETERS:
        return "bf16", "this CPU calculates in bf16, about twice as fast as in fp32"
    if parameters < _FEW_PARAMETERS:
        return "fp32", "so small a model gains nothing from lower precision"
    return "fp32", "this CPU has no lower precision that is faster"


def _to_precision(model: Any, precision: str, device: str) -> None:
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    model.to(device=device, dtype=dtype)
    # A plain attribute, which `to` does not know.
    for module in _sinusoidal_tables(model):
        module.weights = module.weights.to(device=device, dtype=dtype)


# -------------------------------------------------------------------------------------------------- the model


def _load_model(folder: Path, repairs: list[str]) -> Any:
    with needs_package(
        "Reading", "Run: fastsd install trocr (PyTorch itself comes from pytorch.org or your platform)."
    ):
        import safetensors
        import torch  # noqa: F401
        import transformers  # noqa: F401
    try:
        model, missing = load_weights(folder)
    except (OSError, RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as err:
        raise ModelError(
            f"{folder} cannot be opened: {str(err).splitlines()[0]}", "Copy or download the complete model again."
        ) from err
    if missing:
        raise ModelError(
            f"{folder} lacks weights: {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} "
            f"({len(missing)} tensors).",
            "Download it again: a model with random weights would read nonsense.",
        )
    repair_positions(model, repairs)
    return model.eval()


def load_weights(folder: Path | str) -> tuple[Any, list[str]]:
    """Load a VisionEncoderDecoderModel in fp32: the model, and the names of weights that its files lack.

    Not counted: the pooler, a layer that nobody trained and nothing uses; the projection of tied words, which is the
    words' own table; and an empty marker that transformers 4 keeps beside sinusoidal positions.
    """
    import torch
    import transformers

    name = "dtype" if _at_least(transformers.__version__, 4, 56) else "torch_dtype"
    with quiet_transformers():
        model, info = transformers.VisionEncoderDecoderModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, **{name: torch.float32}
        )
    tied = model.config.decoder.tie_word_embeddings
    missing = [key for key in sorted(info["missing_keys"]) if "pooler" not in key and "_float_tensor" not in key]
    return model, [key for key in missing if not (tied and key.endswith("output_projection.weight"))]


def _at_least(version: str, *wanted: int) -> bool:
    return tuple(int(part) for part in version.split(".")[: len(wanted)] if part.isdigit()) >= wanted


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' reports and progress bars away for a while: what matters is said by us."""
    from transformers.utils import logging as their_log

    level, bars = their_log.get_verbosity(), their_log.is_progress_bar_enabled()
    their_log.set_verbosity_error()
    their_log.disable_progress_bar()
    try:
        yield
    finally:
        their_log.set_verbosity(level)
        if bars:
            their_log.enable_progress_bar()


def _sinusoidal_tables(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == "TrOCRSinusoidalPositionalEmbedding"]


def repair_positions(model: Any, repairs: list[str] | None = None) -> None:
    """Compute sinusoidal position tables again where loading left them empty or wrong.

    transformers 5.0 to at least 5.23 creates models on the meta device, and this table is not a parameter: it stays
    there, and the first step fails. It concerns every stage1 and large-printed checkpoint.
    """
    import torch

    for module in _sinusoidal_tables(model):
        count = model.config.decoder.max_position_embeddings + module.padding_idx + 1
        with torch.device("cpu"):
            right = module.get_embedding(count, module.embedding_dim, module.padding_idx)
        table = module.weights
        if table is None or table.is_meta or table.shape != right.shape or not torch.equal(table.cpu().float(), right):
            module.weights = right
            if repairs is not None:
                repairs.append("its position table came empty out of transformers and was computed again.")


def open_in_bitsandbytes(checkpoint: Checkpoint) -> Any:
    """Open the same folder with 8-bit weights on the GPU. Not tried by our tests, which have no GPU."""
    import torch
    import transformers

    settings = transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["output_projection"])
    model = transformers.VisionEncoderDecoderModel.from_pretrained(
        checkpoint.folder, local_files_only=True, quantization_config=settings, device_map={"": 0}
    )
    repair_positions(model)
    for module in _sinusoidal_tables(model):
        module.weights = module.weights.to("cuda", torch.float16)
    return model.eval()


# ------------------------------------------------------------------------------------------ words and images


def load_tokenizer(folder: Path, repairs: list[str] | None = None) -> Any:
    """Load the tokenizer of a model, or build it from its vocabulary where transformers cannot.

    transformers 5.13 to 5.17 fails on checkpoints that have vocab.json and merges.txt but no tokenizer.json.

    Raises:
        ModelError: neither works, or only an old sentencepiece could read it.
    """
    import transformers

    require_safe_tokenizer(folder)
    try:
        with quiet_transformers():
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as err:  # whatever type this version raises: there is a second way
        first = err
    try:
        tokenizer = _build_tokenizer(folder, _special_words(folder))
    except Exception as err:
        raise ModelError(
            f"The tokenizer in {folder} cannot be read: {str(err).splitlines()[0] if str(err) else first}.",
            "Copy the tokenizer files of the model it was trained from into the folder; some need the package "
            "sentencepiece.",
        ) from first
    if repairs is not None:
        repairs.append("transformers could not build its tokenizer, so it was built from its vocabulary.")
    return tokenizer


def _special_words(folder: Path) -> dict[str, str]:
    if not (folder / "special_tokens_map.json").is_file():
        return {}
    raw = read_json(folder, "special_tokens_map.json")
    raw.pop("additional_special_tokens", None)
    return {name: value["content"] if isinstance(value, dict) else value for name, value in raw.items()}


def _build_tokenizer(folder: Path, special: dict[str, str]) -> Any:
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers, processors

    if (folder / "tokenizer.json").is_file():
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
                   "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"} | special  # fmt: skip
        cls, sep = special["cls_token"], special["sep_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} {sep} $B {sep}",
            special_tokens=[(word, backend.token_to_id(word)) for word in (cls, sep)],
        )
        backend.add_special_tokens([word for word in special.values() if backend.token_to_id(word) is not None])
    else:
        return transformers.XLMRobertaTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _picture_settings(folder: Path) -> dict[str, Any]:
    if (folder / "preprocessor_config.json").is_file():
        return read_json(folder, "preprocessor_config.json")
    whole = read_json(folder, "processor_config.json")  # newer versions keep it inside the processor's
    return whole.get("image_processor") or whole


def copy_files(folder: Path, names: Iterable[str], target: Path) -> None:
    """Copy those of these files that a model's folder has."""
    for name in names:
        if (folder / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, target / name)


# ----------------------------------------------------------------------------------------------------- limits


def _read_limits(folder: Path, config: dict[str, Any], tokenizer: Any, repairs: list[str]) -> Limits:
    generation: dict[str, Any] = {}
    if (folder / "generation_config.json").is_file():
        with contextlib.suppress(ValueError):
            generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    decoder = config.get("decoder", {})
    if generation.get("use_cache", config.get("use_cache")) is False or decoder.get("use_cache") is False:
        repairs.append("it switches the cache of earlier steps off (three times slower); here it is always on.")

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    def known(name: str) -> Any:
        return first(generation.get(name), config.get(name), decoder.get(name))

    eos = first(known("eos_token_id"), tokenizer.eos_token_id, tokenizer.sep_token_id)
    if eos is None:
        raise ModelError(f"{folder} does not say which token ends a line.", "Set eos_token_id in its config.json.")
    start = known("decoder_start_token_id")
    if start is None:
        start = eos if isinstance(eos, int) else eos[0]
        repairs.append(f"it does not say which token begins a line; {start} (the end token, as in TrOCR) is used.")
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    longest = int(decoder.get("max_position_embeddings", 512))
    limit = _own_limit(generation, config)
    if limit is None:
        limit = min(_LONGEST_LINE, longest)
        repairs.append(f"it sets no limit, which transformers takes for 20 tokens and cuts lines; here it is {limit}.")
    for name, harmless, effect in (
        ("no_repeat_ngram_size", (None, 0), "it forbids legal repetitions such as '11 11 11'"),
        ("length_penalty", (None, 1, 1.0), "it favours longer text than is there"),
        ("repetition_penalty", (None, 1, 1.0), "it forbids legal repetitions"),
    ):
        if first(generation.get(name), config.get(name)) not in harmless:
            repairs.append(f"its {name} is left out: {effect}.")
    return Limits(int(start), tuple(int(token) for token in ends), 0, min(limit, longest))


def _own_limit(generation: dict[str, Any], config: dict[str, Any]) -> int | None:
    for source in (generation, config):
        value = source.get("max_new_tokens")
        if isinstance(value, int) and value > 0:
            return value
        value = source.get("max_length")
        if isinstance(value, int) and value > 1 and value != _OLD_DEFAULT_LENGTH and math.isfinite(value):
            return value - 1  # it counts the start token
    return None
