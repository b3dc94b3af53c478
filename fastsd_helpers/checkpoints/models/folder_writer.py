"""Write a Diffusers folder from a single file: weights, configurations, and what a base folder lends."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.prediction import Prediction, read_config
from fastsd_helpers.checkpoints.formats.safetensors_writer import write_safetensors
from fastsd_helpers.checkpoints.formats.tensor_plan import Recipe
from fastsd_helpers.checkpoints.models.configs import (
    WEIGHT_NAMES,
    component_config,
    guessed_heads,
    model_index,
    scheduler_config,
)
from fastsd_helpers.checkpoints.models.folder_settings import (
    scaling_unknown,
    settings_of_file,
    vae_family,
)
from fastsd_helpers.checkpoints.models.single_file import SingleFile
from fastsd_helpers.checkpoints.models.verifier import compare
from fastsd_helpers.checkpoints.models.writer import CheckpointFile
from fastsd_helpers.checkpoints.names.layout import PART_WORDS, Family
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.files import check_room, new_folder
from fastsd_helpers.runtime import logger

__all__ = ["write_component", "write_folder"]

_TOKENIZERS = ("tokenizer", "tokenizer_2")
_OF_LATENTS = ("scaling_factor", "latents_mean", "latents_std")


def write_folder(
    single: SingleFile,
    dst: Path,
    prediction: Prediction,
    *,
    dtype: str,
    verify: bool,
    base: Path | None = None,
) -> CheckpointFile:
    """Write every part of a single file into a new Diffusers folder.

    Args:
        base: a Diffusers folder of the same family and widths; its configurations and tokenizers are copied.

    Raises:
        CheckpointError: the base has other widths. DiskFull, DriveReadOnly, DriveError: nothing is left behind.
        VerificationFailed: with `verify`, a part is not what it should be.
    """
    family = single.family
    settings = settings_of_file(single.source.metadata)
    plans = {part: single.part(part, dtype, prefix=_prefix(family, part)) for part in family.parts}
    notes = list(single.notes)
    if base is not None:
        _check_base(base, family, single.widths)
    with new_folder(dst) as folder:
        check_room(folder, _bytes_of(plans.values()))
        for part, recipes in plans.items():
            logger.info("Writing the %s (%d tensors) ...", PART_WORDS[part], len(recipes))
            config = component_config(family, part, single.widths, prediction=prediction)
            lender = base / part if base else None
            if part == "vae" and lender is not None and prediction.edm is not None:
                # What the file says of latents stays.
                own = {name: config[name] for name in _OF_LATENTS if name in config}
                config = {**config, **read_config(lender / "config.json"), **own}
                lender = None
            said = {} if part == "vae" else single.metadata
            _write_part(folder / part, part, recipes, {**config, **settings.get(part, {})}, lender, verify, said)
        tokenizers = _copy_tokenizers(base, folder)
        schedule = scheduler_config(family, prediction, guided=bool(single.widths.get("guided", 1)))
        schedule |= settings.get("scheduler", {})
        _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
        index = read_config(base / "model_index.json") if base else {}
        if base is not None and not _prediction_differs(base, prediction):
            shutil.copytree(base / "scheduler", folder / "scheduler", dirs_exist_ok=True)
        elif index:
            index["scheduler"] = ["diffusers", schedule["_class_name"]]
        made = model_index(family, tokenizers, scheduler=schedule["_class_name"], channels=single.widths.get("ins", 0))
        _write_json(folder / "model_index.json", index or made)
    if base is None:
        lacking = [name for name in _TOKENIZERS if name.replace("tokenizer", "text_encoder") in family.parts]
        notes.append(
            f"No {' and no '.join(lacking)} was written, as the file has none: specify a Diffusers folder of the same "
            "family as the base (--base), or add them to the folder."
        )
        if guessed_heads(family, single.widths):
            notes.append("The widths match no published model: the number of attention heads is a guess.")
    return _result(dst, plans.values(), family.key, dtype, notes)


def write_component(
    single: SingleFile, dst: Path, *, dtype: str, verify: bool, base: Path | None = None, family: str = ""
) -> CheckpointFile:
    """Write a VAE, a text encoder or Flux's transformer alone into a new folder of its own; raises as `write_folder`.

    Args:
        base: a Diffusers folder of the part or of a whole model; the part's configuration is copied.
        family: of a VAE, the one whose scaling is written; otherwise what its ModelSpec metadata say.
    """
    (part,) = single.family.parts
    if base is not None and (base / part).is_dir():
        base = base / part
    if base is not None and not (base / "config.json").is_file():
        raise CheckpointError(
            f"The base {base} has no configuration for the {PART_WORDS[part]}.", "Leave the base out."
        )
    recipes = single.part(part, dtype, prefix=_prefix(single.family, part))
    metadata = single.source.metadata
    vae_of = vae_family(single.family, family, metadata) if part == "vae" else ""
    settings = settings_of_file(metadata)
    if family and vae_of:  # what was asked for comes before what a header keeps
        settings = {}
    config = component_config(single.family, part, single.widths, vae_of=vae_of) | settings.get(part, {})
    notes = list(single.notes)
    if part == "vae" and not vae_of and base is None and "scaling_factor" not in settings.get("vae", {}):
        notes.append(scaling_unknown(single.family))
    left = sorted(name for name in single.source.tensors if single.family.is_extra(name))
    if left:
        notes.append(
            f"{', '.join(left)}: left out, as the folder's model class has no such weights and the model needs none."
        )
    with new_folder(dst) as folder:
        check_room(folder, _bytes_of([recipes]))
        _write_part(folder, part, recipes, config, base, verify, single.metadata)
    return _result(dst, [recipes], single.family.key, dtype, notes)


def _prefix(family: Family, part: str) -> str:
    # transformers of every version reads a CLIP text encoder with it.
    clip = part == "text_encoder" or (part == "text_encoder_2" and "flux" not in family.key and family.key != "t5")
    return "text_model." if clip else ""


def _write_part(
    folder: Path,
    part: str,
    recipes: Mapping[str, Recipe],
    config: dict[str, Any],
    base: Path | None,
    verify: bool,
    metadata: Mapping[str, str],
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / WEIGHT_NAMES[part]
    write_safetensors(path, recipes, metadata={"format": "pt", **metadata}, read_back=False, hashes=False)
    if verify:
        compare(path, recipes)
    if base is not None and (base / "config.json").is_file():
        shutil.copyfile(base / "config.json", folder / "config.json")
    else:
        _write_json(folder / "config.json", config)


def _copy_tokenizers(base: Path | None, folder: Path) -> dict[str, str]:
    found = {}
    for name in _TOKENIZERS:
        if base is not None and (base / name).is_dir():
            shutil.copytree(base / name, folder / name)
            kind = read_config(base / name / "tokenizer_config.json").get("tokenizer_class")
            found[name] = str(kind or "CLIPTokenizer")
    return found


def _check_base(base: Path, family: Family, widths: Mapping[str, int]) -> None:
    for part, first, symbols in (("unet", "block_out_channels", "u"), ("vae", "block_out_channels", "v")):
        channels = read_config(base / part / "config.json").get(first)
        ours = [widths[f"{symbols}{level}"] for level in range(8) if f"{symbols}{level}" in widths]
        if part in family.parts and channels is not None and list(channels) != ours:
            raise CheckpointError(
                f"The base folder's {PART_WORDS[part]} has the widths {list(channels)}, the file has {ours}.",
                "Give a base folder of the same model.",
            )


def _prediction_differs(base: Path, prediction: Prediction) -> bool:
    config = read_config(base / "scheduler" / "scheduler_config.json")
    if config and prediction.kind is None:
        return False  # the file does not say it, and the base does
    if prediction.zero_terminal_snr and not config.get("rescale_betas_zero_snr"):
        return True
    return not config or (prediction.kind or "epsilon") not in (config.get("prediction_type", "epsilon"), "flow")


def _bytes_of(plans: Any) -> int:
    return sum(recipe.fact.bytes + 200 for plan in plans for recipe in plan.values())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _result(dst: Path, plans: Any, family: str, dtype: str, notes: Any) -> CheckpointFile:
    plans = list(plans)
    size = sum(path.stat().st_size for path in dst.rglob("*") if path.is_file())
    return CheckpointFile(dst, "", size, sum(map(len, plans)), family, dtype, tuple(notes))
