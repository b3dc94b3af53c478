"""What else a greedily decoded line may be: the rival of a token that the reader was not sure of, and what follows.

A language model that judges token by token takes a likely beginning of what the image does not have, and the reader
follows it; a whole line is also judged by what the reader sees after the token.
"""

from typing import Any

from fastsd_helpers.trocr.model.search import Engine, Found, Limits, greedy_search

__all__ = ["alternatives_search"]

# Twice as many tokens, and less close ones too: 0.1 to 0.2 points of CER less with the demo reader, for up to six
# times as many lines to decode again.
_TOKENS = 2
_CLOSE = 1.0  # natural logarithm: the rival is at least a third as likely


def alternatives_search(engine: Engine, hidden: Any, limits: Limits, **options: Any) -> list[Found]:
    """A greedy search; in `others` of each line what it is with the rival of one of its two least sure tokens.

    Args:
        hidden: the images' vectors, [lines, places, width].
        options: of `greedy_search`.
    """
    found = greedy_search(engine, hidden, limits, compare=True, **options)
    begun = [(place, ids) for place, line in enumerate(found) if not line.looped for ids in _other_beginnings(line)]
    # No more lines at once than before: there is memory for so many.
    for first in range(0, len(begun), len(found)):
        places, ids = zip(*begun[first : first + len(found)], strict=True)
        lines = greedy_search(engine, hidden[list(places)], limits, begun=ids, **options)
        for place, line in zip(places, lines, strict=True):
            if not line.looped:
                found[place].others += (line,)
    return found


def _other_beginnings(line: Found) -> list[list[int]]:
    """The line up to each of its least sure tokens, with the rival in its place."""
    unsure = sorted((margin, place, token) for place, (margin, token) in enumerate(line.rivals or []))
    return [[*line.ids[:place], token] for margin, place, token in unsure[:_TOKENS] if margin < _CLOSE]
