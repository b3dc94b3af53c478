"""What a LoRA's file states of its rank and alpha, wherever it states it.

`lora_adapter_metadata` in the header (diffusers, with a part in front of each name or without), adapter_config.json
(peft), plain entries of the header such as `lora_alpha`, and kohya's `ss_network_alpha`.

Source: peft's LoraConfig and get_pattern_key (peft/utils/other.py), which diffusers hands its metadata to.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fastsd_helpers.errors import CheckpointError

__all__ = [
    "METADATA_KEY",
    "PER_LAYER",
    "Adapted",
    "Statement",
    "capital",
    "exact_pattern",
    "find_pattern",
    "find_statements",
]

METADATA_KEY = "lora_adapter_metadata"
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_RANKS = ("lora_rank", "network_rank", "network_dim", "lora_dim", "lora_r", "rank", "r")
_HINT = "Save it again with the program that made it."
# peft's default, which it takes where a configuration states everything but the alpha.
_PEFT_ALPHA = 8.0
# Texts that state nothing: trainers write str(None).
_NOTHING = ("", "none", "null")
# kohya's resize_lora.py writes it where every layer has a rank and an alpha of its own.
PER_LAYER = "'Dynamic'"
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Statement:
    """What one place states about a part's rank and alpha; None is nothing.

    where: the place, in words.
    alphas, ranks: pattern of module paths -> the number of those modules.
    firm: whether layers whose tensors say something else contradict it. kohya's entries name one number of many.
    of_peft: whether peft would make a LoraConfig of it.
    unusual: whether few readers look there.
    unread: what it says where a number belongs; `alpha`, or `conv_alpha`, is NaN then.
    """

    where: str
    alpha: float | None = None
    rank: float | None = None
    rslora: bool = False
    alphas: Mapping[str, float] = field(default_factory=dict)
    ranks: Mapping[str, float] = field(default_factory=dict)
    conv_alpha: float | None = None
    firm: bool = True
    of_peft: bool = False
    unusual: bool = False
    unread: str = ""

    def alpha_of(self, adapted: "Adapted") -> float | None:
        """What it states of one layer; a rank-stabilised LoRA divides by the root of the rank."""
        pattern = find_pattern(self.alphas, adapted.paths)
        alpha = self.alpha if pattern is None else self.alphas[pattern]
        if self.conv_alpha is not None and adapted.kernel:
            alpha = self.conv_alpha
        return alpha * math.sqrt(adapted.rank) if alpha is not None and self.rslora else alpha

    def rank_of(self, adapted: "Adapted") -> float | None:
        """The rank it states of one layer."""
        pattern = find_pattern(self.ranks, adapted.paths)
        return self.rank if pattern is None else self.ranks[pattern]

    def in_words(self, alpha: float) -> str:
        """An alpha as it states it: the words, where those are not a number."""
        return self.unread if self.unread and math.isnan(alpha) else f"{alpha:g}"


@dataclass
class Adapted:
    """One layer of a file, with what its strength is found by.

    paths: every way in which patterns may spell the module: with and without `text_model.`.
    place: the layer, for messages.
    rank: that of its matrices.
    own_alpha: what its own tensor says.
    kernel: whether it is a convolution of more than one pixel.
    nothing: whether one of its matrices is all zeros.
    alpha, where: what counts, and the place that states it; settled here.
    """

    paths: tuple[str, ...]
    place: str
    rank: int
    own_alpha: float | None = None
    kernel: bool = False
    nothing: bool = False
    alpha: float = 0.0
    where: str = ""


def find_pattern(patterns: Iterable[str], paths: Iterable[str]) -> str | None:
    """The first pattern that means a module, as peft looks for it: the end of the path, as a regular expression.

    Raises:
        CheckpointError: one is not a regular expression.
    """
    paths = tuple(paths)
    return next((pattern for pattern in patterns if any(map(_matcher(pattern), paths))), None)


def _matcher(pattern: str) -> Callable[[str], Any]:
    # Repeated groups can take longer than anyone waits; no module's path needs one.
    if len(pattern) > 2000 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 6:
        raise CheckpointError(f"The LoRA's metadata has the pattern {pattern[:80]!r}, which is too complex.", _HINT)
    try:
        return re.compile(rf"(.*\.)?({pattern})$").match  # compiled once: `re` remembers
    except re.error as err:
        raise CheckpointError(
            f"The LoRA's metadata has the pattern {pattern[:80]!r}, which is not a regular expression: {err}.",
            _HINT,
        ) from err


def exact_pattern(part: str, path: str) -> str:
    """The pattern that means this module and no other whose path ends alike: `proj_out` also ends every single block.

    transformers leaves `text_model.` out of CLIPTextModel since 5.6, and older versions and the second encoder do not.
    """
    return rf"^(text_model\.)?{path}" if part.startswith("text") else f"^{path}"


# ------------------------------------------------------------------------------------------------ what is stated


def find_statements(metadata: Mapping[str, str], config: Mapping[str, Any], part: str) -> list[Statement]:
    """Everything that is stated about one part; the first that states an alpha counts.

    Args:
        metadata: the strings of the file's header.
        config: what adapter_config.json says; empty where there is none.

    Raises:
        CheckpointError: it cannot be read, or states something that is not a number.
    """
    found = []
    if config:
        found.append(_of_config(config, "adapter_config.json"))
    if described := _described(metadata, part):
        found.append(_of_config(described, "the header's metadata"))
    found += _of_plain(metadata, part)
    found += _of_others(metadata, part)
    found += _of_kohya(metadata)
    if all(one.alpha is None for one in found) and any(one.of_peft for one in found):
        found.append(Statement("peft's default", _PEFT_ALPHA, firm=False, unusual=True))
    return found


def _described(metadata: Mapping[str, str], part: str) -> dict[str, Any]:
    """diffusers' entry, as far as it speaks of a part: `unet.lora_alpha`, or `lora_alpha` inside an object `unet`."""
    where = f"the header's {METADATA_KEY}"
    if not (text := metadata.get(METADATA_KEY)):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError(
            f"{capital(where)} cannot be read: it is {_shown(text)}, which is not JSON.", _HINT
        ) from err
    if not isinstance(found, dict):
        raise CheckpointError(f"{capital(where)} is {_shown(found)}, which is not an object.", _HINT)
    return _of_part(found, part, where)


def _of_part(found: Mapping[str, Any], part: str, where: str) -> dict[str, Any]:
    own = {key.removeprefix(f"{part}."): value for key, value in found.items() if key.startswith(f"{part}.")}
    inside = _mapping(found, part, where)
    others = tuple(f"{other}." for other in _PARTS)
    common = {key: value for key, value in found.items() if key not in _PARTS and not key.startswith(others)}
    return {**common, **inside, **own}


def _of_others(metadata: Mapping[str, str], part: str) -> Iterator[Statement]:
    """What the settings of a training, or peft's configuration, say under a key of their own, as JSON."""
    for key, text in metadata.items():
        if key == METADATA_KEY or 'lora_alpha"' not in text:
            continue
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(found, dict):
            continue
        where = f"the header's {key}"
        plain = {name: value for name, value in found.items() if name not in _PARTS or isinstance(value, dict)}
        described = _of_part(plain, part, where)
        alpha, unread = _loose(described.get("lora_alpha"))
        if alpha is not None and not unread and {"r", "lora_alpha"} <= described.keys():
            yield replace(_of_config(described, where), firm=False, of_peft=False, unusual=True)
        elif alpha is not None:
            yield Statement(where, alpha, firm=False, unusual=True, unread=unread)


def _of_config(config: Mapping[str, Any], where: str) -> Statement:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_MODEL):
        raise CheckpointError(
            f"The LoRA was trained on changed weights ({where} says init_lora_weights: {start}): it does not "
            "fit the original model.",
            "Save it with peft's path_initial_model_for_weight_conversion, which turns it into a plain LoRA.",
        )
    # peft's LoHa and LoKr have `alpha`.
    alpha_key = "lora_alpha" if config.get("lora_alpha") is not None else "alpha"
    alpha, rank = _number(config, alpha_key, where), _number(config, "r", where)
    return Statement(
        where,
        alpha,
        rank,
        _switch(config, "use_rslora", where),
        _numbers(config, "alpha_pattern", where),
        _numbers(config, "rank_pattern", where),
        of_peft=not {"r", "target_modules", "peft_type"}.isdisjoint(config),
    )


def _number(config: Mapping[str, Any], key: str, where: str) -> float | None:
    value = config.get(key)
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise ValueError(value)
        return float(value)
    except (TypeError, ValueError, OverflowError) as err:
        raise _not_that(where, key, value, "a number") from err


def _numbers(config: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    patterns = _mapping(config, key, where)
    found = {str(pattern): _number(patterns, pattern, f"{where}, {key},") for pattern in patterns}
    return {pattern: value for pattern, value in found.items() if value is not None}


def _switch(config: Mapping[str, Any], key: str, where: str) -> bool:
    said = str(config.get(key)).strip().lower()  # headers hold text, and JSON may
    if said not in ("true", "1", "false", "0", *_NOTHING):
        raise _not_that(where, key, config[key], "true or false")
    return said in ("true", "1")


def _mapping(config: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _not_that(where, key, value, "an object")
    return dict(value or {})


def _not_that(where: str, key: str, value: Any, what: str) -> CheckpointError:
    return CheckpointError(f"{capital(where)} states {key} as {_shown(value)}, which is not {what}.", _HINT)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def capital(words: str) -> str:
    """A place at the start of a sentence; a file keeps its name."""
    return words[:1].upper() + words[1:] if words.startswith("the ") else words


def _of_plain(metadata: Mapping[str, str], part: str) -> list[Statement]:
    alphas, ranks = _plain(metadata, part, _ALPHAS), _plain(metadata, part, _RANKS)
    read = {key: value for key, (value, unread) in alphas.items() if not unread}
    known = {key: value for key, (value, unread) in ranks.items() if not unread}  # the matrices have it anyway
    found = []
    if read or known:
        key, rslora = next(iter((*read, *known))), _switch(metadata, "use_rslora", "the header")
        alpha, rank = (next(iter(some.values()), None) for some in (read, known))
        found.append(Statement(f"the header's {key}", alpha, rank, rslora, unusual=True))
    wordy = {key: unread for key, (_, unread) in alphas.items() if unread}
    return found + [Statement(f"the header's {key}", math.nan, unread=words) for key, words in wordy.items()]


def _plain(metadata: Mapping[str, str], part: str, names: Iterable[str]) -> dict[str, tuple[float | None, str]]:
    """Key -> what it says (`_loose`), the one that counts first."""
    keys = (*(f"{part}.{name}" for name in names), *(f"{part}_{name}" for name in names), *names)
    return {key: _loose(metadata[key]) for key in keys if not _says_nothing(metadata.get(key))}


def _says_nothing(text: Any) -> bool:
    return str(text).strip().lower() in _NOTHING


def _loose(text: Any) -> tuple[float | None, str]:
    """A number of the header, None where it says nothing; where it says something else: NaN, and what that is.

    It is not refused yet: headers hold whatever their makers liked, and every layer may have a tensor of its own.
    """
    if _says_nothing(text):
        return None, ""
    try:
        return float(str(text)), ""
    except ValueError:
        return math.nan, _shown(text)


def _of_kohya(metadata: Mapping[str, str]) -> list[Statement]:
    (alpha, unread), (rank, other) = _loose(metadata.get("ss_network_alpha")), _loose(metadata.get("ss_network_dim"))
    conv, conv_unread = _loose(_conv_alpha(metadata))
    found = []
    if conv is not None:
        where = "the header's conv_alpha"
        found.append(Statement(where, conv_alpha=conv, firm=False, unusual=True, unread=conv_unread))
    rank = None if other else rank
    if alpha is not None or rank is not None:
        where = "the header's ss_network_alpha"
        found.append(Statement(where, alpha, rank, firm=False, unusual=True, unread=unread))
    return found


def _conv_alpha(metadata: Mapping[str, str]) -> Any:
    text = metadata.get("ss_network_args") or "{}"
    try:
        options = json.loads(text)
    except (ValueError, RecursionError):
        options = None
    if isinstance(options, dict):
        return options.get("conv_alpha")
    return text if "conv_alpha" in text else None
