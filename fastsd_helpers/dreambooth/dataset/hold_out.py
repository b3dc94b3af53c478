"""Which images are only measured, never trained on, where a user names none."""

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

__all__ = ["choose_held_out", "subject_of"]

_EVERY = 10


def choose_held_out(subjects: Sequence[Hashable]) -> list[int]:
    """Choose one image of every ten, from ten up: the tenth, or one before it where that is its subject's last.

    Args:
        subjects: of each image in order; see `subject_of`.

    Returns:
        places in `subjects`; after them every subject still has an image to train on.
    """
    left = Counter(subjects)
    chosen = []
    for tenth in range(_EVERY - 1, len(subjects), _EVERY):
        for place in range(tenth, tenth - _EVERY, -1):
            if left[subjects[place]] > 1:
                left[subjects[place]] -= 1
                chosen.append(place)
                break
    return chosen


def subject_of(images: Sequence[dict[str, Any]]) -> list[Hashable]:
    """What each image is of: its caption where several have the same, else the words of its name.

    Captions that all differ describe images, not subjects.
    """
    captions = Counter(item["caption"] for item in images if item["caption"])
    return [
        ("caption", item["caption"]) if captions[item["caption"]] > 1 else ("words", item["stem_words"].casefold())
        for item in images
    ]
