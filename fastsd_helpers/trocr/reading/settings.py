"""The settings of reading, and the reader that is taken where none is named."""

from dataclasses import dataclass
from typing import Literal

from fastsd_helpers.options import check, option
from fastsd_helpers.trocr.language.allowed_characters import parse_characters

__all__ = ["DEMO_READER", "OWN_READER", "ReadConfig", "choose_reader"]

OWN_READER = "trocr-base-handwritten"
DEMO_READER = "demo-reader"


@dataclass(frozen=True)
class ReadConfig:
    """Settings for reading lines."""

    beams: int = option(
        1,
        help="beam width: candidate texts kept per step; 1 is greedy decoding, 4 is a little more accurate and slower",
        low=1,
        high=16,
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "int8"] = option(
        "auto",
        help=(
            "precision: dtype of weights and computation; int8 needs the package openvino on a CPU, bitsandbytes on a "
            "GPU"
        ),
    )
    n_best: int = option(
        1,
        help=(
            "n-best: the likeliest texts of each line that are kept, with their log-probabilities (json, jsonl); the "
            "beam width is at least this"
        ),
        low=1,
        high=16,
    )
    language: str = option(
        "auto",
        help=(
            "language model (character n-gram, shallow fusion): its file, or a text file or folder to learn it from; "
            "auto: the recognition model's own, if it has one; or none"
        ),
    )
    min_new_tokens: int | None = option(None, help="minimum number of tokens per line", low=0, high=512, advanced=True)
    max_new_tokens: int | None = option(
        None,
        help="maximum number of tokens per line; default: the checkpoint's own, else 128",
        low=1,
        high=1024,
        advanced=True,
    )
    loop_guard: bool = option(True, help="repetition guard: read a line again if the model repeats itself endlessly")
    allowed_characters: str = option(
        "",
        help=(
            "characters that may be written, ranges as 0-9: for numbers 0-9.,/ (vocabulary mask); default: all of the "
            "model's"
        ),
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", help="device to compute on", advanced=True)
    batch_size: int | None = option(
        None,
        help="batch size: lines read together; default: 8 on a CPU and up to 64 on a GPU",
        low=1,
        high=1024,
        advanced=True,
    )

    def __post_init__(self) -> None:
        low, high = self.min_new_tokens, self.max_new_tokens
        crossed = isinstance(low, int) and isinstance(high, int) and low > high
        check(self, [f"min_new_tokens is {low}, more than max_new_tokens, {high}"] if crossed else [])
        parse_characters(self.allowed_characters)

    @property
    def beam_width(self) -> int:
        """How many beginnings of a line are kept: so many as are asked for in the end, at least."""
        return max(self.beams, self.n_best)


def choose_reader(wanted: str, *, own_pictures: bool) -> tuple[str, str]:
    """Choose the reader: (key, folder or Hub id; why)."""
    if wanted != "auto":
        return wanted, "as asked"
    if own_pictures:
        return OWN_READER, "made for handwriting, and of the middle size"
    return DEMO_READER, "small, built in, and made for these samples"
