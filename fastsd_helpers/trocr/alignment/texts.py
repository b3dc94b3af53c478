"""A page's known text aligned to the lines that are found on it, by what the reader makes of each line.

Every line gets a stretch of the text, in order, so that the characters by which reading and text differ are fewest in
all; stretches and lines that have no partner are left out. A line is kept where its stretch is like what was read and
no other one would do about as well; else it is left out by name, with the reason.
Source: dynamic programming over edit distances, as in Needleman and Wunsch 1970.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastsd_helpers.errors import needs_package

__all__ = ["Aligned", "align_text"]

_HYPHENS = "-\u2010\u2011\u00ac=\u2e17\u00ad"  # at the end of a line: the word goes on in the next one
_ALONE = 0.35  # of its characters, the cost of a line or stretch without a partner: below it, half of them may differ
_OFF_BREAK = 1.5  # edits, for a stretch that begins or ends elsewhere than a line of the text, where it has lines
_LIKE = 0.5  # most edits to the characters of a stretch that is kept, for long lines
_LIKE_SHORT, _SHORT = 0.25, 8  # the same for lines of fewer characters, which chance makes alike
_LIKE_ELSEWHERE = 0.3  # the same for a stretch that is not in its line's turn
_CLEAR = 1.0  # edits by which the next best stretch of a line must be worse
_OF_PAGE = 0.34  # of the characters read that must find their text, or the text is another page's
_SHORTEST, _LONGEST = 0.5, 1.7  # of the characters read that a stretch may have
_GAP = 0.5  # of a usual line: less text than that between two lines belongs to one of them, not to a line of its own
_MOST_CHARACTERS = 30_000  # of a page


@dataclass(frozen=True)
class Aligned:
    """A line of the page: its text, or why it has none (a few words, and the reason to count by)."""

    text: str | None
    why: str = ""
    reason: str = ""


class _Text:
    """The text with single blanks, where its words begin, and where its own lines do."""

    def __init__(self, text: str, usual: float) -> None:
        lines = [" ".join(line.split()) for line in text.splitlines()]
        lines = [line for line in lines if line]
        self.text, self.usual = " ".join(lines), usual
        self.size = len(self.text) + 1 if self.text else 0  # a blank behind the last word too
        self.words = [0, *(at + 1 for at, letter in enumerate(self.text) if letter == " "), self.size]
        begins = [0]
        for line in lines:
            begins.append(begins[-1] + len(line) + 1)
        lengths = sorted(map(len, lines))
        middle = lengths[len(lengths) // 2] if lengths else 0
        # Lines much longer than the page's are paragraphs, much shorter ones words: their breaks say nothing.
        self.has_lines = len(lines) > 1 and 0.5 * usual <= middle <= 1.8 * usual
        self.begins = frozenset(begins) if self.has_lines else frozenset()

    def is_inside(self, place: int) -> bool:
        """Whether a place is within a word."""
        return 0 < place < len(self.text) and " " not in self.text[place - 1 : place + 1]

    def off_break(self, place: int) -> float:
        """What a stretch pays that begins or ends here."""
        return _OFF_BREAK if self.has_lines and place not in self.begins else 0.0

    def stretch(self, begin: int, end: int, mark: str) -> str:
        """The text of a line between two places; with the mark of a word that goes on in the next line."""
        return self.text[begin:end].strip() + (mark if self.is_inside(end) else "")

    def ends(self, begin: int, least: float, most: float, *, inside: bool) -> list[int]:
        """Places where a stretch may end: before words, and within them too if `inside`."""
        first = bisect.bisect_left(self.words, begin + max(1, math.floor(least)))
        last = bisect.bisect_right(self.words, begin + math.ceil(most) + 1)
        # A line of one long word is longer than what was read of it.
        found = self.words[first : max(last, min(first + 1, len(self.words)))]
        if inside:
            low, high = begin + max(1, math.floor(least)), min(begin + math.ceil(most), len(self.text))
            found = sorted({*found, *(place for place in range(low, high) if self.is_inside(place))})
        return found


def align_text(read: Sequence[str], text: str) -> list[Aligned]:
    """Give each line of a page its part of the page's text.

    Args:
        read: what a reader made of the lines, in reading order.
        text: the page's text, with line breaks where the page has them, or as paragraphs; a word that the page divides
            with a hyphen may be whole in it.

    Returns:
        One for each line. None of them has a text where too few do: then it is the text of another page.
    """
    read = [" ".join(line.split()) for line in read]
    lengths = sorted(len(line) for line in read if line) or [0]
    known = _Text(text, lengths[len(lengths) // 2])
    if not known.text:
        return [Aligned(None, "the page's text is empty", "no text")] * len(read)
    if known.size > max(_MOST_CHARACTERS, 20 * sum(map(len, read))):
        return [Aligned(None, "its text is far longer than the page", "another page's text")] * len(read)
    with needs_package("Aligning a text", "Run: fastsd install trocr"):
        from rapidfuzz.distance import Levenshtein
    distance: Callable[[str, str], int] = Levenshtein.distance
    marks = [line[-1] if len(line) > 1 and line[-1] in _HYPHENS else "" for line in read]
    paths = _Paths(read, marks, known, distance)
    chosen = paths.best()
    found = [_judge(line, mark, spans, known, distance) for line, mark, spans in zip(read, marks, chosen, strict=True)]
    kept = {number: (begin, end) for number, ((_cost, begin, end), *_rest) in enumerate(chosen)
            if found[number].text is not None}  # fmt: skip
    for number, part in _beside_gaps(kept, known):
        why = f"the text between it and the next line, {part!r}, belongs to one of them"
        found[number] = Aligned(None, why, "unsure where it begins or ends")
    found = _in_other_order(read, found, list(kept.values()), known, distance)
    known_of = sum(len(line) for line, one in zip(read, found, strict=True) if one.text is not None)
    if known_of < _OF_PAGE * sum(map(len, read)):
        why = "too little of what is read is in the text: it is another page's, or the reader cannot read this hand"
        return [Aligned(None, why, "another page's text")] * len(read)
    return found


# A stretch for a line: what the whole page costs with it, where it begins and ends; (-1, -1) for none.
_Span = tuple[float, int, int]


class _Paths:
    """All ways to give lines their stretches in order, by cost: those that lead to a place, and those from it on."""

    def __init__(
        self, read: Sequence[str], marks: Sequence[str], known: _Text, distance: Callable[[str, str], int]
    ) -> None:
        self._read, self._known, self._marks = read, known, marks
        self._steps = [self._matches(line, mark, distance, place) for place, (line, mark) in enumerate(
            zip(read, marks, strict=True))]  # fmt: skip
        self._places = sorted(
            {*known.words, *(place for step in self._steps for _cost, *span in step for place in span)}
        )

    def _matches(self, line: str, mark: str, distance: Callable[[str, str], int], number: int) -> list[_Span]:
        """What each stretch of the text would cost as this line's, of those that are at all like it."""
        known, found = self._known, []
        if not line:
            return []
        begins = known.words[:-1]
        if number and self._marks[number - 1]:
            begins = [place for place in range(len(known.text)) if known.text[place] != " "]
        worst = 2 * _ALONE * len(line)
        for begin in begins:
            paid = known.off_break(begin)
            for end in known.ends(begin, _SHORTEST * len(line), _LONGEST * len(line) + 3, inside=bool(mark)):
                stretch = known.stretch(begin, end, mark)
                edits = distance(line, stretch) + paid + known.off_break(end)
                if edits <= max(worst, 2 * _ALONE * len(stretch)):
                    found.append((edits, begin, end))
        return found

    def best(self) -> list[list[_Span]]:
        """For each line its two best stretches, the better first, in the best way through the page."""
        places, lines = self._places, len(self._read)
        at = {place: index for index, place in enumerate(places)}
        skip = [_ALONE * (later - earlier) for earlier, later in pairwise(places)]
        alone = [_ALONE * len(line) for line in self._read]
        before = [_spread([0.0, *[math.inf] * (len(places) - 1)], skip)]
        for step, cost in zip(self._steps, alone, strict=True):
            row = [value + cost for value in before[-1]]
            for edits, begin, end in step:
                row[at[end]] = min(row[at[end]], before[-1][at[begin]] + edits)
            before.append(_spread(row, skip))
        after = [_spread([0.0, *[math.inf] * (len(places) - 1)], skip[::-1])[::-1]]
        for step, cost in zip(self._steps[::-1], alone[::-1], strict=True):
            row = [value + cost for value in after[-1]]
            for edits, begin, end in step:
                row[at[begin]] = min(row[at[begin]], after[-1][at[end]] + edits)
            after.append(_spread(row[::-1], skip[::-1])[::-1])
        after.reverse()
        found = []
        for number in range(lines):
            left = min(a + b for a, b in zip(before[number], after[number + 1], strict=True)) + alone[number]
            spans = [(before[number][at[begin]] + edits + after[number + 1][at[end]], begin, end)
                     for edits, begin, end in self._steps[number]]  # fmt: skip
            found.append(sorted([*spans, (left, -1, -1)])[:2])
        return found


def _spread(row: list[float], skip: list[float]) -> list[float]:
    """The costs of places, where text may be passed over on the way to each."""
    for index, cost in enumerate(skip, 1):
        row[index] = min(row[index], row[index - 1] + cost)
    return row


def _judge(line: str, mark: str, spans: list[_Span], known: _Text, distance: Callable[[str, str], int]) -> Aligned:
    (best, begin, end), *rest = spans
    if not line:
        return Aligned(None, "nothing could be read there", "nothing read")
    if begin < 0:
        return Aligned(None, f"nothing in the text is like what is read there, {line!r}", "not in the text")
    text = known.stretch(begin, end, mark)
    if not _is_like(line, text, distance):
        return Aligned(None, f"what is read there, {line!r}, is too unlike its text, {text!r}", "unlike its text")
    for cost, other_begin, other_end in rest:
        other = known.stretch(other_begin, other_end, mark) if other_begin >= 0 else text
        if other != text and cost - best < _CLEAR:
            return Aligned(None, f"its text may be {text!r} or {other!r}", "unsure where it begins or ends")
    return Aligned(text)


def _beside_gaps(kept: dict[int, tuple[int, int]], known: _Text) -> list[tuple[int, str]]:
    """The lines beside a stretch without a line that is too short for one, and its text."""
    spans = [(0, 0, -1), *sorted((*span, number) for number, span in kept.items()), (known.size, known.size, -1)]
    found = []
    for (_begin, end, one), (begin, _end, other) in pairwise(spans):
        whole = end in known.begins and begin in known.begins
        if 0 < begin - end < _GAP * known.usual and not whole:
            found += [(number, known.text[end:begin].strip()) for number in (one, other) if number >= 0]
    return found


def _is_like(line: str, text: str, distance: Callable[[str, str], int], part: float = _LIKE) -> bool:
    part = min(part, _LIKE_SHORT) if len(text) < _SHORT else part
    return distance(line, text) <= part * len(text)


def _in_other_order(
    read: Sequence[str],
    found: list[Aligned],
    taken: list[tuple[int, int]],
    known: _Text,
    distance: Callable[[str, str], int],
) -> list[Aligned]:
    """Lines whose stretch is in the text at another place than their turn: notes, and lines in another order."""
    free = [True] * known.size
    for begin, end in taken:
        free[begin:end] = [False] * (end - begin)
    made = list(found)
    for number, (line, one) in enumerate(zip(read, found, strict=True)):
        if one.text is not None or one.reason != "not in the text" or len(line) < _SHORT:
            continue
        spans = sorted(
            (distance(line, known.stretch(begin, end, "")) + known.off_break(begin) + known.off_break(end), begin, end)
            for begin in known.words[:-1]
            if free[begin]
            for end in known.ends(begin, _SHORTEST * len(line), _LONGEST * len(line), inside=False)
            if all(free[begin:end])
        )
        if not spans:
            continue
        _cost, begin, end = spans[0]
        text = known.stretch(begin, end, "")
        clear = len(spans) < 2 or spans[1][0] - spans[0][0] >= _CLEAR
        if clear and _is_like(line, text, distance, _LIKE_ELSEWHERE):
            made[number] = Aligned(text)
            free[begin:end] = [False] * (end - begin)
    return made
