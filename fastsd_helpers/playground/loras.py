"""LoRAs in the playground: found, looked at, added beside a model's weights, and as strong as each drawing asks."""

from pathlib import Path
from typing import Any

from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.downloads import fetch
from fastsd_helpers.errors import ModelNotFound, SessionError
from fastsd_helpers.model_lookup import LORA, find_folder, lora_file, require_inert, understand
from fastsd_helpers.runtime import load_peft
from fastsd_helpers.sessions import find_session
from fastsd_helpers.sessions.folders import models_in

__all__ = ["find_lora", "is_lora", "load_lora", "put_beside", "set_strength"]

_ADAPTER = "lora"


def is_lora(file: Path) -> bool:
    """Say whether a .safetensors file holds a LoRA alone, by the names of its tensors."""
    with SafetensorsFile(file) as opened:
        return detect(opened.tensors).what.startswith("lora")


def find_lora(ref: str, *, root: Path | None = None) -> Path:
    """Find the file of a LoRA: a file, a Hub id, a link, or the session that trained one.

    Raises:
        ModelNotFound: there is none.
        ModelError: there is none.
        SessionError: the session has no finished model, or a whole one.
    """
    session = find_session(ref, root=root)
    if session is not None:
        newest = session.finished_model()
        made = [newest, *models_in(session.exports)]
        loras = [path for path in made if is_lora(path)]
        if not loras:
            raise SessionError(
                f"The session {session.name} has a full model, {newest.name}, and no LoRA.",
                f"Use the session itself; or, where it was trained with method lora: "
                f"fastsd dreambooth export {session.name} --format lora",
            )
        return max(loras, key=lambda path: path.stat().st_mtime).absolute()
    name = understand(ref)
    if name.what == "link":
        return fetch(ref)
    return name.path if name.path is not None and name.what == "file" else lora_file(find_folder(ref, LORA))


def put_beside(pipe: Any, file: Path, ref: str) -> None:
    """Add a LoRA's matrices beside the weights of a pipeline; `set_strength` says how much they count.

    Raises:
        ModelNotFound: it does not fit this model.
        UnsafeModel: it could run code.
        DependencyMissing: peft is not installed.
    """
    load_peft("Using a LoRA", "Run: fastsd install dreambooth")
    require_inert([file])
    try:
        load_lora(pipe, str(file.parent), weight_name=file.name, local_files_only=True, adapter_name=_ADAPTER)
    except (OSError, ValueError, RuntimeError, LookupError) as err:
        raise ModelNotFound(
            f"The LoRA {ref} cannot be added to this model: {str(err).splitlines()[0]}",
            "Give a file or Hub id of a LoRA for the same family.",
        ) from err


def set_strength(pipe: Any, strength: float) -> None:
    """Let the LoRA count this much in the next drawings, 0 to 2; at 0 the model is what it was, to the bit."""
    if strength == 0:
        pipe.disable_lora()
        return
    pipe.enable_lora()
    pipe.set_adapters([_ADAPTER], [float(strength)])


def load_lora(pipe: Any, where: str, **options: Any) -> None:
    """`pipe.load_lora_weights`, also where transformers (from 5.6 on) knows a text encoder's layers by shorter names.

    diffusers before 0.40 looks for the longer ones and ends with an IndexError; Colab's image of August 2026 has such a
    pair. Raises what `load_lora_weights` raises.
    """
    encoders = {part: getattr(pipe, part, None) for part in ("text_encoder", "text_encoder_2")}
    shorter = [
        part
        for part, encoder in encoders.items()
        if encoder is not None and "text_model" not in dict(encoder.named_children())
    ]
    read = pipe.lora_state_dict

    def renamed(*args: Any, **kwargs: Any) -> Any:
        found = read(*args, **kwargs)
        weights, *rest = found if isinstance(found, tuple) else (found,)
        tables = [_with_shorter_names(table, shorter) for table in (weights, *rest)]
        return tuple(tables) if isinstance(found, tuple) else tables[0]

    pipe.lora_state_dict = renamed
    try:
        pipe.load_lora_weights(where, **options)
    finally:
        del pipe.lora_state_dict


def _with_shorter_names(table: Any, parts: list[str]) -> Any:
    if not isinstance(table, dict):
        return table
    longer = tuple(f"{part}.text_model." for part in parts)
    return {
        name.replace(".text_model.", ".", 1) if name.startswith(longer) else name: value
        for name, value in table.items()
    }
