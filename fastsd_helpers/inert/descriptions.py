"""The .yaml beside a checkpoint: AUTOMATIC1111 and Forge build whatever classes it names."""

import re
from pathlib import Path

from fastsd_helpers.errors import UnsafeModel

__all__ = ["look_at_description"]

_MOST_BYTES = 200_000  # those of Stable Diffusion have 2 kB
# Only the plainest YAML: no anchors, tags, braces or escapes, in which a name could hide.
_PLAIN = r"\"?[\w.,/+ -]*\"?|'[\w.,/+ -]*'|\[[\w.,+ -]*\]"
_LINE = re.compile(rf"(?P<indent> *)(?:- )*(?:(?P<key>[A-Za-z_]\w*): *)?(?P<value>{_PLAIN}) *(?:#.*)?")
_VERSIONS = ("", "openai/clip-vit-large-patch14", "laion2b_s32b_b79k", "laion2b_s39b_b160k")
_TARGET = re.compile(r"(ldm|sgm)(\.\w+)+\.[A-Z]\w*|torch\.nn\.Identity")


def look_at_description(path: Path) -> None:
    """Refuse a description that names anything but the networks of Stable Diffusion, or further files.

    Raises:
        UnsafeModel: says in which line.
    """
    hint = "Remove it or take the one that belongs to the model; SD 1.x needs none."
    raw = path.read_bytes()[: _MOST_BYTES + 1]
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UnsafeModel(f"{path} is not plain text.", hint) from err
    if len(raw) > _MOST_BYTES:
        raise UnsafeModel(f"{path} is too long for the description of a model.", hint)
    for number, line in enumerate(text.split("\n"), 1):
        match = _LINE.fullmatch(line.rstrip("\r"))
        if match is None:
            raise UnsafeModel(
                f"{path} is not used: line {number} ({line.strip()[:60]!r}) is not a plain 'name: value'.", hint
            )
        value = match["value"].strip().strip("\"'")
        if match["key"] == "target" and not _TARGET.fullmatch(value):
            raise UnsafeModel(
                f"{path} is not used: line {number} names {value[:80]!r}, which is not a network of Stable Diffusion "
                "and would be called.",
                hint,
            )
        further = value not in ("", "null") and (match["key"] or "").endswith(("_path", "ckpt", "_file"))
        if further or (match["key"] == "version" and value not in _VERSIONS):
            raise UnsafeModel(
                f"{path} is not used: line {number} ({match['key']}) names a further model, which was not checked.",
                hint,
            )
