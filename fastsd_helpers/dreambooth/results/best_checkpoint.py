"""Which checkpoint of a run has the lowest held-out loss, among those that are still there and whole."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.dreambooth.resume import CheckpointStore, Generation
from fastsd_helpers.dreambooth.resume.generation import NotWhole, list_generations, read_generation, verify_files
from fastsd_helpers.errors import CheckpointError
from fastsd_helpers.sessions import Session
from fastsd_helpers.wording import label_of

__all__ = ["BEST", "Choice", "choose_checkpoint", "find_best", "offer_best"]

BEST = "best"  # role of the weights that keep_best carries along; also the word for `--checkpoint`


@dataclass(frozen=True)
class Choice:
    """Weights to export or draw with: a generation, and the role in it that holds the last stage's weights."""

    generation: Generation
    role: str
    stage: str
    step: int
    loss: float | None  # held-out loss, where it was judged


def _own(generation: Generation) -> Choice:
    return Choice(generation, generation.stage, generation.stage, generation.step, generation.record.get("loss"))


def _judged_on(generation: Generation) -> tuple[str, int]:
    return generation.stage, generation.record.get("judged_since", 0)


def _whole(folder: Path, name: str) -> Generation | None:
    try:
        generation = read_generation(folder, name)
        verify_files(generation, hashes=False)  # `load` checks each file's hash
    except NotWhole:
        return None
    return generation


def find_best(folder: Path, timeline: str) -> Choice | None:
    """The weights with the lowest held-out loss of a run's last stage; in a draw or without losses the newest."""
    found: list[Choice] = []
    for name in list_generations(folder):  # newest first
        generation = _whole(folder, name)
        if generation is None or generation.timeline != timeline:
            continue
        if found and _judged_on(generation) != _judged_on(found[0].generation):
            break  # of other images or noise, two losses cannot be compared
        kept = generation.record.get("best")
        if not found and kept and BEST in generation.roles:
            found += [_own(generation), Choice(generation, BEST, kept["stage"], kept["step"], kept["loss"])]
        else:
            found.append(_own(generation))
    judged = [choice for choice in found if choice.loss is not None]
    return min(judged, key=lambda choice: choice.loss, default=found[0] if found else None)


def choose_checkpoint(folder: Path, newest: Generation, wanted: str) -> Choice:
    """Find what `--checkpoint` names: nothing (the newest), `best`, or a generation's name.

    Raises:
        CheckpointError: there is no whole checkpoint of that name; the hint lists those that are.
    """
    if wanted in ("", newest.name):
        return _own(newest)
    if wanted == BEST:
        return find_best(folder, newest.timeline) or _own(newest)
    names = list_generations(folder)
    generation = _whole(folder, wanted) if wanted in names else None
    if generation is None:
        whole = [name for name in names if _whole(folder, name)]
        raise CheckpointError(
            f"There is no complete checkpoint {wanted!r} in {folder}.", f"Choose best, or one of: {', '.join(whole)}."
        )
    return _own(generation)


def offer_best(session: Session, store: CheckpointStore, loss_after: float, say: Callable[[str], object]) -> str | None:
    """Say so when an earlier checkpoint was better, and name it; the user's eye decides, not the loss."""
    best = find_best(store.folder, store.timeline)
    if best is None or best.loss is None or best.loss >= loss_after:
        return None
    say(
        f"The held-out loss was lower at {label_of(best.stage)} step {best.step}: {best.loss:.4f}, {loss_after:.4f} at "
        f"the end. To export that model: fastsd dreambooth export {session.name} --checkpoint {BEST}"
    )
    return BEST if best.role == BEST else best.generation.name
