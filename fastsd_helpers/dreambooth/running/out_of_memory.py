"""Out of memory in words: which settings to change, on the GPU or in this machine's own memory."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth.running.fitting import savings, savings_in_words
from fastsd_helpers.errors import FastSDError, TrainingFailed
from fastsd_helpers.sessions import Session

__all__ = ["explain_shortage", "settings_to_change", "shortage"]


def settings_to_change(settings: Mapping[str, Any], place: Literal["gpu", "host"]) -> list[str]:
    """Name the settings that would save memory, the one that costs least first, each as `name value (now value)`."""
    return savings_in_words(savings(settings, place), settings)


def shortage(session: Session, place: Literal["gpu", "host"], fact: str) -> TrainingFailed:
    """Make the error for a run that had too little memory.

    Args:
        session: whose settings are looked at.
        place: whose memory ran out.
        fact: what happened, as a sentence without its full stop.
    """
    changes = settings_to_change(session.record.get("settings") or {}, place)
    first = (
        f"Change one or more of: {', '.join(changes)}." if changes else "Every setting that saves memory is already on."
    )
    if place == "host":
        first = f"Close other notebooks, or use a machine with more memory (Colab: High-RAM). {first}"
    begun = (session.record.get("progress") or {}).get("step", 0)
    how = (
        "A started run keeps its settings, so start again with --restart (restart=True in the notebook's training "
        "cell)."
        if begun
        else "Then train again."
    )
    return TrainingFailed(f"{fact}.", f"{first} {how} Saved checkpoints are intact.")


@contextlib.contextmanager
def explain_shortage(session: Session) -> Iterator[None]:
    """Turn "out of memory" raised in the `with` block into TrainingFailed with the settings to change."""
    try:
        yield
    except FastSDError:
        raise
    except (MemoryError, RuntimeError) as err:
        place = _place_of(err)
        if place is None:
            raise
        if place == "host":
            raise shortage(session, "host", "This machine's memory ran out during the training") from err
        device = describe_device()
        fact = f"The GPU's memory ran out during the training ({device.name}, {device.memory_gib:.0f} GiB)"
        raise shortage(session, "gpu", fact) from err


def _place_of(err: Exception) -> Literal["gpu", "host"] | None:
    # torch.OutOfMemoryError since 2.5, torch.cuda.OutOfMemoryError before; the CPU's allocator raises a bare
    # RuntimeError, and so does bitsandbytes for the GPU, which leaves their words to go by.
    words = str(err).lower()
    if isinstance(err, MemoryError) or "can't allocate memory" in words or "not enough memory" in words:
        return "host"
    if type(err).__name__ == "OutOfMemoryError" or "out of memory" in words:
        return "gpu"
    return None
