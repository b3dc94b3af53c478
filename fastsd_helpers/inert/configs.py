"""Looks at the .json files of a model: read once, strictly, without a key or a name by which a library fetches code."""

import json
import re
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import ModelError, UnsafeModel
from fastsd_helpers.files import file_errors
from fastsd_helpers.inert.headers import unique_names
from fastsd_helpers.inert.known import (
    is_diffusers_class,
    is_known_part,
    is_pipeline_class,
    is_tokenizer_class,
    is_transformers_type,
)

__all__ = ["look_at_config", "look_at_values", "read_config"]

_AGAIN = "Download or copy the model again."
_TRUST = "Nothing in it was run. Use a model from a source you trust; in one of your own, remove that entry."
# Vocabularies and logs: any word may be a key in them, and no library takes one for a setting.
_WORDS = re.compile(r"(tokenizer(\.[\d.]+)?|vocab(-\w+)?|added_tokens|trainer_state|(all|train|eval)_results)\.json")
_MOST_BYTES = 16_000_000
_MOST_WORDS = 200_000_000
_DEEPEST = 64
# By these a library loads code of the model's own, or files that nobody looked at.
_KEYS = frozenset(
    [
        "auto_map", "auto_mapping", "code_revision", "configuration_files", "custom_code", "custom_generate",
        "custom_modules", "custom_pipeline", "custom_pipelines", "custom_revision", "megatron_config",
        "transformers_weights", "trust_remote_code", "use_kernel_forward_from_hub", "use_kernels"
    ]
)  # fmt: skip
_ATTENTION = re.compile(r"_?(attn|attention|experts)_implementation\w*|attention_backend|_attention_backend")
_BACKBONES = ("use_pretrained_backbone", "use_timm_backbone", "timm_model_name")
_QUANTIZERS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")


def read_config(path: Path) -> dict[str, Any]:
    """Read one of a model's descriptions, and look at it.

    Args:
        path: the .json file.

    Returns:
        The object.

    Raises:
        ModelError: it is not a JSON object.
        UnsafeModel: it could make a library load code or files from elsewhere.
    """
    content = look_at_config(path, path.name)
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object.", _AGAIN)
    return content


def look_at_config(path: Path, name: str, *, lenient: bool = False) -> Any:
    """Look at a .json file called `name` and return what is in it; None for a vocabulary or a log.

    With `lenient`, one that is not JSON at all gives None too.

    Raises:
        ModelError: as `read_config`.
        UnsafeModel: as `read_config`.
    """
    words = _WORDS.fullmatch(name) is not None
    most = _MOST_WORDS if words else _MOST_BYTES
    with file_errors(path, "read"):
        try:
            with path.open("rb") as file:
                raw = b"" if words else file.read(most + 1)
        except (FileNotFoundError, IsADirectoryError) as err:
            raise ModelError(f"{path} cannot be read as JSON: {err}.", _AGAIN) from err
        size = path.stat().st_size
    if size > most:
        raise UnsafeModel(f"{path} has {size:,} bytes, too many for what it is.", _AGAIN)
    if words:
        return None
    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_names)
    except (ValueError, RecursionError) as err:
        if lenient and isinstance(err, json.JSONDecodeError) and not raw.startswith(b"\xef\xbb\xbf"):
            return None  # its loader reads it with the same parser, and says what it was wanted for
        raise ModelError(f"{path} cannot be read as JSON: {err}.", _AGAIN) from err
    look_at_values(content, str(path))
    if isinstance(content, dict):
        _look_at_top(content, path, name)
    return content


def look_at_values(content: Any, where: str) -> None:
    """Refuse keys at any depth by which a library loads code, or files from elsewhere.

    Raises:
        UnsafeModel: names the key.
    """
    todo = [(content, 0, "")]
    while todo:
        value, depth, under = todo.pop()
        if depth > _DEEPEST:
            raise UnsafeModel(f"{where} is nested {depth} deep.", _TRUST)
        if isinstance(value, list):
            todo += [(inner, depth + 1, under) for inner in value if isinstance(inner, (list, dict))]
        elif isinstance(value, dict):
            for key, inner in value.items():
                _look_at_key(key, inner, f"{under}{key}", where)
                if isinstance(inner, (list, dict)):
                    todo.append((inner, depth + 1, f"{under}{key}."))


def _look_at_key(key: str, value: Any, shown: str, where: str) -> None:
    if value is None:
        return
    # transformers 4.47 to 4.56 wrote this one, a yes or no, into every description.
    if key == "_attn_implementation_autoset" and isinstance(value, bool):
        return
    if key == "auto_mapping" and _is_of_libraries(value):  # peft writes it where it knows no task
        return
    # A network inside the network, by its name on the Hub or in timm.
    named = (key == "backbone" and isinstance(value, str)) or (key in _BACKBONES and value is not False)
    if named or key in _KEYS or _ATTENTION.fullmatch(key):
        raise UnsafeModel(
            f"{where} is not used: its entry '{shown[:120]}' can make a library load code from elsewhere.", _TRUST
        )
    if key == "model_type" and not (isinstance(value, str) and is_transformers_type(value)):
        raise UnsafeModel(f"{where} is not used: its '{shown[:120]}' is {_shown(value)}, an unknown type.", _TRUST)
    if key == "tokenizer_class" and not (isinstance(value, str) and is_tokenizer_class(value)):
        raise UnsafeModel(f"{where} is not used: its '{shown[:120]}' is {_shown(value)}, an unknown tokenizer.", _TRUST)
    if key in ("quantization_config", "compression_config"):
        kind = value.get("quant_method") if isinstance(value, dict) else value
        if kind not in _QUANTIZERS:
            raise UnsafeModel(
                f"{where} is not used: its weights are quantized by {_shown(kind)}, which loads its own library.",
                "Use the model with plain weights.",
            )


def _is_of_libraries(value: Any) -> bool:
    """Whether the network that an adapter is for is one of transformers or diffusers."""
    if not isinstance(value, dict) or not value.keys() <= {"base_model_class", "parent_library"}:
        return False
    library, name = value.get("parent_library"), value.get("base_model_class")
    known = isinstance(library, str) and re.fullmatch(r"(transformers|diffusers|peft)(\.\w+)*", library) is not None
    return known and isinstance(name, str) and name.isidentifier()


def _look_at_top(content: dict[str, Any], path: Path, name: str) -> None:
    if name == "model_index.json":
        _look_at_parts(content, path)
    elif "_class_name" in content and not is_diffusers_class(content["_class_name"]):
        raise UnsafeModel(
            f"{path} is not used: its '_class_name' is {_shown(content['_class_name'])}, not a diffusers class.", _TRUST
        )
    homes = content.get("weight_map")
    if homes is None:
        return
    if not isinstance(homes, dict):
        raise UnsafeModel(f"{path} is not used: its 'weight_map' is not a table.", _TRUST)
    for home in homes.values():
        if not isinstance(home, str) or not re.fullmatch(r"[\w][\w.+-]*\.(safetensors|bin)", home):
            raise UnsafeModel(f"{path} points outside its own folder, to {_shown(home)}.", _TRUST)


def _look_at_parts(index: dict[str, Any], path: Path) -> None:
    kind = index.get("_class_name")
    if kind is not None and not is_pipeline_class(kind):
        raise UnsafeModel(f"{path} is not used: its '_class_name' is {_shown(kind)}, not a diffusers pipeline.", _TRUST)
    for part, value in index.items():
        if not re.fullmatch(r"[A-Za-z_]\w*", part):
            raise UnsafeModel(f"{path} is not used: it has a part called {_shown(part)}.", _TRUST)
        if isinstance(value, dict):
            raise UnsafeModel(f"{path} is not used: its '{part}' is not a part of a pipeline.", _TRUST)
        if not isinstance(value, list) or value in ([], [None, None]):
            continue
        if not (len(value) == 2 and all(isinstance(word, str) for word in value) and is_known_part(*value)):
            raise UnsafeModel(
                f"{path} is not used: its part '{part}' is {_shown(value)}, not a known class of diffusers or "
                "transformers.",
                _TRUST,
            )


def _shown(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, (list, dict)) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
