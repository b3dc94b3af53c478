"""A language model of characters beside a reader's search: what each token would add to a line (shallow fusion).

A token is judged by the characters it writes, the end of a line as a blank; one that writes a part of a character (a
byte of it) counts when the character is whole.
Source: Gulcehre et al. 2015, "On Using Monolingual Corpora in Neural Machine Translation", section 4.1.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsd_helpers.trocr.language.ngram import CharacterModel

__all__ = ["Fusion", "Written", "pieces_of"]

_REMEMBERED = 200_000  # tokens after a context; lines have much in common


class Written(NamedTuple):
    """A line so far, as far as the language model looks back; and the bytes of a character that is not whole."""

    before: str = " "
    pending: bytes = b""


class Fusion:
    """What tokens add to a line's score: the model's weight times log P of their characters, and a bonus for each.

    Args:
        model: the language model.
        pieces: what each token writes, as `pieces_of` gives it.
        ends: ids that end a line.
        weights: (weight, bonus); the model has them for either search.
    """

    def __init__(
        self, model: CharacterModel, pieces: Sequence[bytes], ends: Sequence[int], weights: tuple[float, float]
    ) -> None:
        self.model, (self.weight, self.bonus) = model, weights
        self._pieces, self._ends = pieces, frozenset(ends)
        self._known: dict[tuple[Written, int], tuple[float, Written]] = {}

    def begin(self) -> Written:
        """A line of which nothing is written."""
        return Written()

    def after(self, written: Written, token: int) -> Written:
        """The line with one token more."""
        if (written, token) not in self._known:
            self.added([written], [[token]])
        return self._known[written, token][1]

    def added(self, lines: Sequence[Written], tokens: Sequence[Sequence[int]]) -> list[list[float]]:
        """What each of some tokens would add to each line: [lines, tokens of the line]."""
        if len(self._known) > _REMEMBERED:
            self._known.clear()
        new = {
            (written, token): self._read_on(written, token)
            for written, row in zip(lines, tokens, strict=True)
            for token in row
            if (written, token) not in self._known
        }
        values = self.model.score([(written.before, text) for (written, _token), (text, _next) in new.items()])
        for (key, (text, written)), value in zip(new.items(), values.tolist(), strict=True):
            self._known[key] = self.weight * value + self.bonus * len(text), written
        return [[self._known[written, token][0] for token in row] for written, row in zip(lines, tokens, strict=True)]

    def _read_on(self, written: Written, token: int) -> tuple[str, Written]:
        """The whole characters that a token adds to a line, and the line after it."""
        if token in self._ends:
            return ("" if written.before.endswith(" ") else " "), written
        piece = self._pieces[token] if token < len(self._pieces) else b""
        text, pending = _whole_characters(written.pending + piece)
        text = self.in_one_blank(written.before, text)
        return text, Written((written.before + text)[-max(1, self.model.order - 1) :], pending)

    @staticmethod
    def in_one_blank(before: str, text: str) -> str:
        """The text as the language model counts it: any run of blanks is one, also with the one before."""
        words = " ".join(text.split())
        opened, closed = text[:1].isspace(), text[-1:].isspace()
        if not words:
            return " " if text and not before.endswith(" ") else ""
        return (" " if opened and not before.endswith(" ") else "") + words + (" " if closed else "")


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """The text of some bytes, and those at the end that begin a character; what is no UTF-8 becomes its mark."""
    try:
        return data.decode(), b""
    except UnicodeDecodeError as err:
        if err.end == len(data) and "end of data" in err.reason:
            return data[: err.start].decode(errors="replace"), data[err.start :]
        return data.decode(errors="replace"), b""


def pieces_of(tokenizer: Any, size: int) -> list[bytes]:
    """What each token writes, as bytes of UTF-8; nothing for special ones.

    Args:
        size: tokens of the model, which may be more than the tokenizer's.
    """
    words = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    backend = getattr(tokenizer, "backend_tokenizer", None)
    described = json.loads(backend.to_str()) if backend is not None else {}
    decoder = json.dumps(described.get("decoder"))
    byte_level = "ByteLevel" in decoder or hasattr(tokenizer, "byte_decoder")
    alphabet = _byte_alphabet() if byte_level else {}
    special = {tokenizer.convert_ids_to_tokens(token) for token in tokenizer.all_special_ids}
    added = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    pieces = []
    for word in words:
        if word is None or word in special:
            pieces.append(b"")
        elif byte_level and word not in added and all(letter in alphabet for letter in word):
            pieces.append(bytes(alphabet[letter] for letter in word))
        elif not byte_level and len(word) == 6 and word.startswith("<0x") and word.endswith(">"):
            pieces.append(bytes.fromhex(word[3:5]))  # sentencepiece's fallback for what it has no piece for
        else:
            pieces.append((word if byte_level else word.replace("▁", " ")).encode("utf-8", "replace"))
    return pieces


def _byte_alphabet() -> dict[str, int]:
    """The letter that a byte-level tokenizer writes each byte with.

    Source: GPT-2's encoder.py, `bytes_to_unicode`: printable bytes are themselves, the others follow from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
