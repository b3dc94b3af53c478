"""Which characters are read as which: counted over the edits between the truth and what was read."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from fastsd_helpers.errors import needs_package

__all__ = ["count_confusions"]

_MOST = 50
_MOST_MISSING = 20


def count_confusions(
    pairs: Iterable[tuple[str, str]],
) -> tuple[tuple[dict[str, Any], ...], tuple[dict[str, Any], ...]]:
    """Count the edits that turn each truth into what was read.

    Args:
        pairs: (truth, read) of each line, in one Unicode form; blanks around them do not count.

    Returns:
        Up to 50 confusions ({truth, read, count}; one of both is empty for a character left out or made up), and up to
        20 characters that were left out ({letter, count, of}: so often, of all times it is in the truth).
    """
    with needs_package("Counting confusions", "Run: fastsd install trocr"):
        from rapidfuzz.distance import Levenshtein
    counted: Counter[tuple[str, str]] = Counter()
    letters: Counter[str] = Counter()
    for truth, read in ((truth.strip(), read.strip()) for truth, read in pairs):
        letters.update(truth)
        for edit in Levenshtein.editops(truth, read):
            lost = "" if edit.tag == "insert" else truth[edit.src_pos]
            counted[lost, "" if edit.tag == "delete" else read[edit.dest_pos]] += 1
    ranked = sorted(counted.items(), key=lambda item: (-item[1], item[0]))
    confusions = tuple({"truth": truth, "read": read, "count": count} for (truth, read), count in ranked[:_MOST])
    missing = [(truth, count) for (truth, read), count in ranked if not read]
    return confusions, tuple(
        {"letter": letter, "count": count, "of": letters[letter]} for letter, count in missing[:_MOST_MISSING]
    )
