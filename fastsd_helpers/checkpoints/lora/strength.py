"""How strongly each layer of a LoRA counts: the alpha that the file states, wherever it states it.

A tensor of the layer's own counts most. Where there is none: `lora_adapter_metadata` in the header (diffusers, with a
part in front of each name or without), adapter_config.json (peft), plain entries of the header such as `lora_alpha`,
and kohya's `ss_network_alpha`. Where nothing is said, every reader takes the rank.

Source: peft's LoraConfig and get_pattern_key (peft/utils/other.py), which diffusers hands its metadata to.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fastsd_helpers.errors import CheckpointError

__all__ = ["METADATA_KEY", "Adapted", "Statement", "exact_pattern", "find_pattern", "find_statements", "settle_alphas"]

METADATA_KEY = "lora_adapter_metadata"
_PARTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_ALPHAS = ("lora_alpha", "network_alpha", "alpha")
_RANKS = ("lora_rank", "network_rank", "network_dim", "lora_dim", "lora_r", "rank", "r")
_HINT = "Save it again with the program that made it."
# An alpha in fp16 or bf16 is not quite the number that the metadata state.
_ROUNDED = 1 / 128
# peft's default, which it takes where a configuration states everything but the alpha.
_PEFT_ALPHA = 8.0
_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class Statement:
    """What one place states about a part's rank and alpha; None is nothing.

    where: the place, in words.
    alphas, ranks: pattern of module paths -> the number of those modules.
    firm: whether layers whose tensors say something else contradict it. kohya's entries name one number of many.
    of_peft: whether peft would make a LoraConfig of it.
    unusual: whether few readers look there.
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
    if described := _described(metadata):
        own = {key.removeprefix(f"{part}."): value for key, value in described.items() if key.startswith(f"{part}.")}
        common = {key: value for key, value in described.items() if not key.startswith(tuple(f"{p}." for p in _PARTS))}
        if common or own:
            found.append(_of_config({**common, **own}, "the header's metadata"))
    alpha, alpha_key = _plain(metadata, part, _ALPHAS)
    rank, rank_key = _plain(metadata, part, _RANKS)
    if alpha is not None or rank is not None:
        rslora = str(metadata.get("use_rslora", "")).lower() == "true"
        found.append(Statement(f"the header's {alpha_key or rank_key}", alpha, rank, rslora, unusual=True))
    found += _of_kohya(metadata)
    if all(one.alpha is None for one in found) and any(one.of_peft for one in found):
        found.append(Statement("peft's default", _PEFT_ALPHA, firm=False, unusual=True))
    return found


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    if not (text := metadata.get(METADATA_KEY)):
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as err:
        raise CheckpointError("The LoRA's metadata cannot be read.", "Save it again with diffusers.") from err
    return found if isinstance(found, dict) else {}


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
        bool(config.get("use_rslora")),
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
        raise CheckpointError(f"{where} states {key} as {str(value)[:40]!r}, which is not a number.", _HINT) from err


def _numbers(config: Mapping[str, Any], key: str, where: str) -> dict[str, float]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(f"{where} states {key} as {str(patterns)[:40]!r}.", _HINT)
    found = {str(pattern): _number(patterns, pattern, f"{where}, {key},") for pattern in patterns}
    return {pattern: value for pattern, value in found.items() if value is not None}


def _plain(metadata: Mapping[str, str], part: str, names: Iterable[str]) -> tuple[float | None, str]:
    for key in (*(f"{part}.{name}" for name in names), *(f"{part}_{name}" for name in names), *names):
        value = _loose(metadata.get(key))
        if value is not None:
            return value, key
    return None, ""


def _loose(text: Any) -> float | None:
    # Headers hold whatever their makers liked: words under these names state nothing.
    try:
        return float(str(text))
    except ValueError:
        return None


def _of_kohya(metadata: Mapping[str, str]) -> list[Statement]:
    alpha, rank = _loose(metadata.get("ss_network_alpha")), _loose(metadata.get("ss_network_dim"))
    if alpha is None and rank is None:
        return []
    try:
        options = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        options = {}
    conv = _loose(options.get("conv_alpha")) if isinstance(options, dict) else None
    return [Statement("the header's ss_network_alpha", alpha, rank, conv_alpha=conv, firm=False, unusual=True)]


# ------------------------------------------------------------------------------------------------ what counts


def settle_alphas(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> int:
    """Give every layer the alpha that counts; what contradicts itself or looks like an accident becomes a note.

    Returns:
        How many layers nothing states an alpha of; it was taken to be the rank.

    Raises:
        CheckpointError: an alpha that is infinite or not a number.
    """
    counts = next((one for one in statements if one.alpha is not None), None)
    unsaid = 0
    for adapted in layers:
        stated = [(one.alpha_of(adapted), one.where) for one in statements]
        stated.insert(0, (adapted.own_alpha, "its own tensor"))
        found = next(((alpha, where) for alpha, where in stated if alpha is not None), None)
        unsaid += found is None
        adapted.alpha, adapted.where = found or (float(adapted.rank), "")
        if not math.isfinite(adapted.alpha):
            raise CheckpointError(
                f"The LoRA's alpha of {adapted.place} is {adapted.alpha}: its scale is unknown.",
                "Use an earlier checkpoint of it, or correct the stated alpha.",
            )
    lacking = [adapted for adapted in layers if adapted.own_alpha is None]
    if lacking and counts is not None and counts.unusual:
        notes.append(
            f"No tensor holds the alpha of {_count(lacking)}: {counts.alpha:g} was used, from {counts.where}. "
            "Other programs may use the rank."
        )
    _note_contradictions(layers, statements, notes)
    _note_ranks(layers, statements, notes)
    _note_accidents(layers, statements, notes)
    return unsaid


def _differ(one: float, other: float) -> bool:
    return not math.isclose(one, other, rel_tol=_ROUNDED)


def _count(layers: list[Adapted]) -> str:
    return layers[0].place if len(layers) == 1 else f"{len(layers)} layers"


def _note_contradictions(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> None:
    for statement in statements:
        said = [(adapted, statement.alpha_of(adapted)) for adapted in layers]
        other = [adapted for adapted, alpha in said if alpha is not None and _differ(alpha, adapted.alpha)]
        if other and (statement.firm or len(other) == len(layers)):
            stated = statement.alpha_of(other[0])
            notes.append(
                f"The alpha of {_count(other)} is stated twice: {stated:g} in {statement.where}, "
                f"and {other[0].alpha:g} in {other[0].where}, which was used."
            )


def _note_ranks(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> None:
    for statement in statements:
        said = [(adapted, statement.rank_of(adapted)) for adapted in layers]
        other = [adapted for adapted, rank in said if rank is not None and rank != adapted.rank]
        if other and (statement.firm or len(other) == len(layers)):
            notes.append(
                f"{statement.where[0].upper()}{statement.where[1:]} states rank {statement.rank_of(other[0]):g} for "
                f"{_count(other)}; the matrices have rank {other[0].rank}, which was used."
            )


def _note_accidents(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> None:
    paths = [adapted.paths for adapted in layers]
    for statement in statements:
        for key, patterns in (("alpha_pattern", statement.alphas), ("rank_pattern", statement.ranks)):
            idle = [pattern for pattern in patterns if not any(find_pattern([pattern], one) for one in paths)]
            if idle:
                more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
                notes.append(f"{key} in {statement.where} names {idle[0]!r}{more}, which is not a layer of this LoRA.")
    nothing = [adapted for adapted in layers if adapted.alpha == 0]
    if nothing:
        notes.append(f"The alpha of {_count(nothing)} is 0: nothing is changed there.")
    negative = [adapted for adapted in layers if adapted.alpha < 0]
    if negative:
        notes.append(f"The alpha of {_count(negative)} is negative: it has the opposite effect.")
    empty = [adapted for adapted in layers if adapted.nothing]
    if len(empty) == len(layers):
        notes.append("Every layer has an all-zero matrix: this LoRA has no effect.")
    elif empty:
        notes.append(f"A matrix of {_count(empty)} is all zeros: nothing is changed there.")
