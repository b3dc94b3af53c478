"""Look at a model file, or convert it, from a notebook: what `inspect` and `convert` do, in sentences."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.forms.widgets.form import require
from fastsd_helpers.forms.widgets.tools import inspected
from fastsd_helpers.options import check, option
from fastsd_helpers.runtime import logger
from fastsd_helpers.wording import size_in_words

__all__ = ["ModelFileConfig", "look_or_convert"]


@dataclass(frozen=True)
class ModelFileConfig:
    """Which model file to look at, and what to write of it."""

    file: str = option("", help="model file (.safetensors, .ckpt), LoRA or Diffusers folder", known="model_files")
    write_to: str = option(
        "",
        help="empty: only inspect it; a name that ends in .safetensors or .ckpt: convert it to a single file; "
        "any other name: to a Diffusers folder",
    )
    number_format: Literal["keep", "fp32", "fp16", "bf16"] = option(
        "keep", help="dtype of the weights that are written"
    )
    every_number: bool = option(False, help="look for NaN and Inf in the weights too, which reads the entire file")
    read_back: bool = option(True, help="read the result back and compare every tensor with the source")
    replace: bool = option(False, help="replace what exists under that name", advanced=True)
    lends: str = option(
        "",
        help="source of missing tokenizers and configurations: a Diffusers folder",
        advanced=True,
    )

    family: str = option(
        "",
        help=(
            "model family: refuse a file of another one; for a VAE alone: the family it belongs to (sd15, sdxl, flux, "
            "sd3)"
        ),
        advanced=True,
    )

    def __post_init__(self) -> None:
        check(self, ["write_to needs a file to convert"] if self.write_to.strip() and not self.file.strip() else [])


def look_or_convert(config: ModelFileConfig) -> None:
    """Say what a model file is and what is wrong with it; with a name to write to, convert it.

    Args:
        config: what the form shows, as its `config()` gives it.

    Raises:
        SettingsError: these are the settings of another form.
        FastSDError: what `checkpoints.inspect` and `checkpoints.convert` raise.
    """
    require(config, ModelFileConfig)
    if not config.file.strip():
        logger.info("No file was given, so there is nothing to inspect.")
        return
    source = Path(config.file.strip()).expanduser()
    if source.is_file() or (source.is_dir() and not config.write_to.strip()):
        logger.info("%s", "\n".join(inspected(source, hashes=True, scan=config.every_number)))
    elif not config.write_to.strip():
        raise SettingsError(f"{source} is not there.", "Choose a file in the form, or give the path of a folder.")
    if config.write_to.strip():
        _convert(source, config)


def _convert(source: Path, config: ModelFileConfig) -> None:
    from fastsd_helpers.checkpoints import convert

    written = convert(
        source,
        Path(config.write_to.strip()),
        dtype=config.number_format,
        verify=config.read_back,
        overwrite=config.replace,
        base=config.lends.strip() or None,
        family=config.family.strip() or None,
    )
    how = "Written, read back and compared" if config.read_back else "Written"
    logger.info("%s: %s (%s, %d tensors).", how, written.path.absolute(), size_in_words(written.bytes), written.tensors)
    for sentence in written.notes:
        logger.info("%s", sentence)
