"""TrOCR readers: which files of a repository or folder make one, and when it is whole."""

import functools
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads import pick_weights, read_json
from fastsd_helpers.downloads.pipeline import Contents, Listing
from fastsd_helpers.errors import ModelError, WrongFamily
from fastsd_helpers.model_lookup.kinds import ModelKind

__all__ = ["GRAPHS", "LANGUAGE", "READER", "list_reader", "require_reader"]

GRAPHS = "openvino"  # subfolder of a reader that was quantised: its graphs, instead of PyTorch weights
LANGUAGE = "language/characters.safetensors"  # in a reader's folder: the language model that it is read with
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")  # what a trainer leaves behind
# Networks that see an image and load nothing else.
_ENCODERS = [
    "beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "donut-swin", "pvt", "pvt_v2", "swin",
    "swinv2", "vit", "vit_mae", "vit_msn"
]  # fmt: skip


def require_reader(folder: Path) -> dict[str, Any]:
    """Check that a folder holds a TrOCR model with its tokenizer and image settings; return its config.json.

    Args:
        folder: of the recognition model.

    Returns:
        Its config.json.

    Raises:
        WrongFamily: it is another kind of model.
        ModelError: a part of it is missing.
    """
    list_reader(folder)
    return read_json(folder, "config.json")


def list_reader(folder: Path) -> list[str]:
    """The files that a TrOCR model in a folder consists of: weights or graphs, tokenizer, settings, language model.

    Args:
        folder: of the recognition model.

    Raises:
        WrongFamily: it is another kind of model.
        ModelError: a part of it is missing.
    """
    found = [*folder.iterdir(), *(folder / GRAPHS).glob("*"), folder / LANGUAGE]
    names = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found if path.is_file()}
    return _reader_files(Listing(str(folder), names, functools.partial(read_json, folder)))


def _reader_files(listing: Listing) -> list[str]:
    """The files of a reader: its small ones and one kind of weights, for both kinds hold the same."""
    where, names = listing.where, set(listing.names)
    hint = f"Choose {READER.choices()}."
    if "adapter_config.json" in names and "config.json" not in names:
        raise ModelError(
            f"{where} is a LoRA adapter, not a complete recognition model.",
            "Merge it into its base model and save that.",
        )
    if "config.json" not in names:
        raise ModelError(f"{where} is not a model: it has no config.json.", hint)
    config = listing.read("config.json")
    kind = str(config.get("model_type") or (config.get("architectures") or ["unknown"])[0])
    decoder = config.get("decoder")
    decoder = str(decoder.get("model_type", "none") if isinstance(decoder, dict) else decoder)
    if kind != "vision-encoder-decoder" or decoder != "trocr":
        what = kind if kind != "vision-encoder-decoder" else f"reader with a {decoder} decoder"
        raise WrongFamily(f"{where} is not a TrOCR model but a {what}.", hint)
    encoder = config.get("encoder")
    eye = str(encoder.get("model_type", "none") if isinstance(encoder, dict) else encoder)
    if encoder is not None and eye not in _ENCODERS:
        raise WrongFamily(f"{where} is not a TrOCR model: its encoder is of the type {eye[:60]!r}.", hint)
    flat = [name for name in listing.names if "/" not in name]
    graphs = [name for name in listing.names if name.startswith(f"{GRAPHS}/")]
    weights = pick_weights(flat)[0] or [
        name for name in flat if name.endswith((".safetensors", ".bin")) and name not in _NO_WEIGHTS
    ]
    if not weights and f"{GRAPHS}/decoder.xml" not in graphs:
        raise ModelError(f"{where} has no weights.", "Copy or download all of it again.")
    if not names & {"tokenizer.json", "vocab.json", "sentencepiece.bpe.model"}:
        raise ModelError(
            f"{where} has no tokenizer: without it token numbers cannot be turned into text.",
            "Copy tokenizer.json (or vocab.json and merges.txt, or sentencepiece.bpe.model) of the model it was "
            "trained from into the folder.",
        )
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise ModelError(
            f"{where} has no preprocessor_config.json: the size and scaling of its images are unknown.",
            "Copy preprocessor_config.json of the model it was trained from into the folder.",
        )
    small = [name for name in flat if name.endswith((".json", ".txt", ".model")) and ".index." not in name]
    graphs = [name for name in graphs if name.endswith((".xml", ".bin", ".json"))]
    return [*small, *weights, *graphs, *(names & {LANGUAGE})]


READER = ModelKind(
    Contents("reader", _reader_files, require_reader),
    "reader",
    "a folder with a TrOCR model, or a Hub id such as microsoft/trocr-base-handwritten",
)
