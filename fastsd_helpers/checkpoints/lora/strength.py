"""How strongly each layer of a LoRA counts: a tensor of the layer's own, else what its file states elsewhere.

Where nothing is said, every reader takes the rank.
"""

import math
from collections.abc import Iterable

from fastsd_helpers.checkpoints.lora.statements import PER_LAYER, Adapted, Statement, capital, find_pattern
from fastsd_helpers.errors import CheckpointError

__all__ = ["settle_alphas"]

# An alpha in fp16 or bf16 is not quite the number that the metadata state.
_ROUNDED = 1 / 128


def settle_alphas(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> int:
    """Give every layer the alpha that counts; what contradicts itself or looks like an accident becomes a note.

    Returns:
        How many layers nothing states an alpha of; it was taken to be the rank.

    Raises:
        CheckpointError: an alpha that is infinite or not a number.
    """
    counts = next((one for one in statements if one.alpha is not None and not one.unread), None)
    unsaid = 0
    for adapted in layers:
        stated = [(one.alpha_of(adapted), one.where) for one in sorted(statements, key=_words_last)]
        stated.insert(0, (adapted.own_alpha, "its own tensor"))
        found = next(((alpha, where) for alpha, where in stated if alpha is not None), None)
        unsaid += found is None
        adapted.alpha, adapted.where = found or (float(adapted.rank), "")
        if not math.isfinite(adapted.alpha):
            raise _unknown(adapted, statements)
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


def _words_last(statement: Statement) -> bool:
    """Words count where no number is stated; those about convolutions before a number about every layer."""
    return bool(statement.unread) and statement.conv_alpha is None


def _unknown(adapted: Adapted, statements: Iterable[Statement]) -> CheckpointError:
    unread = next((one.unread for one in statements if one.where == adapted.where), "")
    if unread:
        return CheckpointError(
            f"The scale of {adapted.place} is unknown: {adapted.where} is {unread}, which is not a number.",
            "Correct it, or export the LoRA again with the program that made it.",
        )
    return CheckpointError(
        f"The LoRA's alpha of {adapted.place} is {adapted.alpha}, from {adapted.where}: its scale is unknown.",
        "Use an earlier checkpoint of it, or correct the stated alpha.",
    )


def _differ(one: float, other: float) -> bool:
    return not math.isclose(one, other, rel_tol=_ROUNDED)


def _count(layers: list[Adapted]) -> str:
    return layers[0].place if len(layers) == 1 else f"{len(layers)} layers"


def _note_contradictions(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> None:
    for statement in statements:
        said = [(adapted, statement.alpha_of(adapted)) for adapted in layers]
        other = [adapted for adapted, alpha in said if alpha is not None and _differ(alpha, adapted.alpha)]
        if other and (statement.firm or len(other) == len(layers)) and statement.unread != PER_LAYER:
            stated = statement.in_words(statement.alpha_of(other[0]) or 0.0)
            notes.append(
                f"The alpha of {_count(other)} is stated twice: {stated} in {statement.where}, "
                f"and {other[0].alpha:g} in {other[0].where}, which was used."
            )


def _note_ranks(layers: list[Adapted], statements: list[Statement], notes: list[str]) -> None:
    for statement in statements:
        said = [(adapted, statement.rank_of(adapted)) for adapted in layers]
        other = [adapted for adapted, rank in said if rank is not None and rank != adapted.rank]
        if other and (statement.firm or len(other) == len(layers)):
            notes.append(
                f"{capital(statement.where)} states rank {statement.rank_of(other[0]):g} for "
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
