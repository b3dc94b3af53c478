"""The header of a safetensors file: names, places and strings, of which one kind is a description of its own."""

import json
import os
import struct
from pathlib import Path

from fastsd_helpers.errors import UnsafeModel
from fastsd_helpers.inert.configs import look_at_values
from fastsd_helpers.inert.headers import HEADER_LIMIT, open_header, read_entries, unique_names

__all__ = ["is_safetensors", "look_at_header"]

_MOST_METADATA = 1_000_000  # diffusers keeps the settings of a LoRA in it, a few kB


def is_safetensors(head: bytes) -> bool:
    """Whether a file begins as a safetensors file does."""
    return len(head) >= 9 and head[8:9] == b"{" and head[4:8] == bytes(4)


def look_at_header(path: Path) -> None:
    """Refuse a header in which readers could see different things, or whose strings describe how to fetch code.

    A file that is not a safetensors file is left to its loader, which says so: nothing in it can run.

    Raises:
        UnsafeModel: says what was found.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        size = os.fstat(file.fileno()).st_size
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > size - 8:
            return
        if length > HEADER_LIMIT:
            raise UnsafeModel(
                f"{path} is not a complete safetensors file: its header has {length:,} bytes; the limit is "
                f"{HEADER_LIMIT:,}.",
                "Download it again, or use another file.",
            )
        header = open_header(file, length)
    try:
        for kind, key, value in read_entries(header):
            # peft takes its settings from here: by two of them it imports a module of a given name.
            if kind == "metadata" and "adapter_metadata" in key:
                if value.bytes > _MOST_METADATA:
                    raise UnsafeModel(
                        f"{path} is not used: its header's {key} has {value.bytes:,} characters.", "Use another file."
                    )
                _look_at_settings(path, key, value.read())
    except ValueError as err:
        if "twice" in str(err):
            raise UnsafeModel(
                f"{path} is not a complete safetensors file: in its header {err}, and programs differ "
                "in which of the two they use.",
                "Download it again, or use another file.",
            ) from err
        return
    except RecursionError:
        return


def _look_at_settings(path: Path, key: str, text: str) -> None:
    try:
        settings = json.loads(text, object_pairs_hook=unique_names)
    except json.JSONDecodeError:
        return  # its readers say so, with the same parser
    except (ValueError, RecursionError) as err:
        raise UnsafeModel(f"{path} is not used: its header's {key} is ambiguous ({err}).", "Use another file.") from err
    look_at_values(settings, f"{path}: {key}")
