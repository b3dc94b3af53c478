"""One way from what a user names to local files: a key, a path, a link, a Hub id, a LoRA, a reader, a captioner.

`understand` tells which of these a text is, without asking anybody. `find_folder` brings a model of a kind here: a key
or repository of another kind is refused before anything large is fetched, what arrives is compared with the Hub's
hashes, and a copy fetched before serves when the Hub cannot be asked. Everything passes `require_inert` on its way out.
"""

from fastsd_helpers.inert import require_inert
from fastsd_helpers.model_lookup.finding import fetch_model, find_folder
from fastsd_helpers.model_lookup.kinds import BASE_MODEL, CAPTIONER, CONTROLNET, LORA, ModelKind, base_model, lora_file
from fastsd_helpers.model_lookup.names import Name, how_to_get, known_model, tokens_for, understand
from fastsd_helpers.model_lookup.readers import GRAPHS, LANGUAGE, READER, list_reader, require_reader

__all__ = [
    "BASE_MODEL",
    "CAPTIONER",
    "CONTROLNET",
    "GRAPHS",
    "LANGUAGE",
    "LORA",
    "READER",
    "ModelKind",
    "Name",
    "base_model",
    "fetch_model",
    "find_folder",
    "how_to_get",
    "known_model",
    "list_reader",
    "lora_file",
    "require_inert",
    "require_reader",
    "tokens_for",
    "understand",
]
