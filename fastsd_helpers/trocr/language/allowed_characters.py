"""Reading with some characters only: numbers and dates are read better when nothing else can be written."""

import re
from typing import TYPE_CHECKING, Any

from fastsd_helpers.errors import SettingsError

if TYPE_CHECKING:
    import torch

__all__ = ["banned_tokens", "parse_characters"]

_RANGE = re.compile(r"(.)-(.)", re.DOTALL)
_MOST = 5000


def parse_characters(text: str) -> frozenset[str]:
    """The characters that `0-9.,/` means: ranges by their first and last, the rest one by one; a last '-' is itself.

    Raises:
        SettingsError: a range that ends before it begins, or is longer than any script.
    """
    found: set[str] = set()
    place = 0
    while place < len(text):
        match = _RANGE.match(text, place)
        if match is None:
            found.add(text[place])
            place += 1
            continue
        first, last = ord(match[1]), ord(match[2])
        if not 0 <= last - first < _MOST:
            raise SettingsError(
                f"allowed_characters has the range {match[0]!r}, which is empty or too long.",
                "Write the lower character first, as in 0-9; to allow '-' itself, put it at the end.",
                fields={"allowed_characters": f"the range {match[0]!r} is empty or too long"},
            )
        found.update(map(chr, range(first, last + 1)))
        place = match.end()
    return frozenset(found)


def banned_tokens(tokenizer: Any, size: int, text: str, ends: tuple[int, ...]) -> "torch.Tensor":
    """The ids of all tokens that would write another character than those of `text`; int64, sorted.

    Args:
        size: tokens of the model, which may be more than the tokenizer's.
        ends: ids that end a line, always allowed.

    Raises:
        SettingsError: a character that this tokenizer cannot write, or a bad range.
    """
    import torch

    allowed = parse_characters(text)
    kept = set(ends)
    for letter in sorted(allowed):
        ids = tokenizer.encode(letter, add_special_tokens=False)
        if not letter.isspace() and tokenizer.decode(ids, skip_special_tokens=True).strip() != letter:
            raise SettingsError(
                f"This model cannot write {letter!r}, one of the allowed characters.",
                "Leave it out, or use a model whose vocabulary has it.",
                fields={"allowed_characters": f"this model cannot write {letter!r}"},
            )
        kept.update(ids)
    special = set(tokenizer.all_special_ids)
    for token in range(min(size, len(tokenizer))):
        # A sentencepiece token's mark for the beginning of a word decodes to nothing, which any line may have.
        if token not in special and set(tokenizer.decode([token])) <= allowed:
            kept.add(token)
    return torch.tensor([token for token in range(size) if token not in kept])
