"""Versions of packages that are known to cause trouble: whom it concerns, and what to do."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["KNOWN_BAD", "KnownBad"]


@dataclass(frozen=True)
class KnownBad:
    """Versions that are known to cause trouble."""

    package: str
    versions: str  # a range, such as ">=5.13,<5.18"
    level: Literal["note", "warning", "problem"]
    what: str
    todo: str = ""
    only: str | None = None  # a place: colab, kaggle, jupyter, terminal
    beside: tuple[str, str] | None = None  # another package and its range that must be there too


# From what was seen to break; each row says whom it concerns and what to do.
KNOWN_BAD = (
    KnownBad(
        "transformers",
        ">=5.13,<5.18",
        "note",
        "cannot load the tokenizers of the published TrOCR base and large models by itself",
        "Nothing: `fastsd trocr` loads them another way.",
    ),
    KnownBad(
        "transformers",
        ">=5.0",
        "note",
        "leaves the positions of TrOCR stage1 and large-printed models empty when it loads them",
        "Nothing: `fastsd trocr` fills them in.",
    ),
    KnownBad(
        "transformers",
        "<4.53",
        "problem",
        "is older than this project supports",
        "Run `fastsd install dreambooth`, then restart the runtime.",
    ),
    KnownBad(
        "diffusers",
        "<0.34",
        "problem",
        "is older than this project supports",
        "Run `fastsd install dreambooth`, then restart the runtime.",
    ),
    KnownBad(
        "opencv-python",
        ">=5",
        "note",
        "no longer has the Haar face detector",
        "Nothing: the smart crop looks for the subject another way.",
    ),
    KnownBad(
        "ipywidgets",
        ">=8",
        "problem",
        "does not show in Colab, which draws version 7 only",
        "Run `pip install ipywidgets==7.7.1`, then Runtime > Restart session.",
        only="colab",
    ),
    KnownBad(
        "numpy",
        ">=2",
        "problem",
        "and a torch older than 2.3 cannot exchange arrays",
        "Install a newer torch, as pytorch.org says.",
        beside=("torch", "<2.3"),
    ),
    KnownBad(
        "bitsandbytes",
        "<0.45",
        "warning",
        "has no kernels for the newest GPUs",
        "Run `fastsd install dreambooth`, then restart the runtime.",
    ),
    KnownBad(
        "xformers",
        ">=0",
        "note",
        "is not used here: PyTorch's own attention is as fast, and xformers breaks whenever torch changes",
    ),
    KnownBad(
        "pyngrok",
        "<7.5",
        "warning",
        "fetches an ngrok program that ngrok no longer accepts",
        "Run `fastsd install webui`.",
    ),
    KnownBad(
        "setuptools",
        ">=82",
        "note",
        "has no pkg_resources, which old packages such as CLIP import while they are built",
        "Nothing: a web UI gets an environment of its own with an older one.",
    ),
)
