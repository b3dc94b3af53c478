"""What a model's tokenizer makes of a text, and how it is extended with characters it lacks."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.runtime import logger

__all__ = ["Coverage", "comes_back", "measure_coverage", "prepare_vocabulary"]

_FEWEST = 1  # times a letter must occur to get a token of its own
_MARKS = ("<s>", "<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Coverage:
    """How a tokenizer fits a text: tokens per character (1 or less is good), characters it cannot give back."""

    tokens_per_character: float
    longest_line: int  # in tokens, the end counted
    lost_letters: str  # come back as something else
    costly_letters: str  # take more than one token each
    advice: Literal["keep", "extend", "replace"]
    reason: str


def measure_coverage(tokenizer: Any, texts: Iterable[str]) -> Coverage:
    """Count how many tokens the texts take, and which characters are lost or costly."""
    texts = [text for text in texts if text]
    letters = Counter(letter for text in texts for letter in text if not letter.isspace())
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    counts = [len(ids) for ids in encoded]
    # Sentencepiece's mark before the first word is a token of its own where that word's letter is.
    marks = sum(tokenizer.convert_ids_to_tokens(ids[:1]) == ["▁"] for ids in encoded)
    lost, costly = [], []
    advice: Literal["keep", "extend", "replace"]
    for letter in sorted(letters):
        ids = tokenizer.encode(letter, add_special_tokens=False)
        # A blank in front is the tokenizer's own (sentencepiece marks the beginning of a word).
        if tokenizer.decode(ids, skip_special_tokens=True).strip() != letter:
            lost.append(letter)
        elif len([token for token in tokenizer.convert_ids_to_tokens(ids) if token != "▁"]) > 1:
            costly.append(letter)
    ratio = (sum(counts) - marks) / max(1, sum(map(len, texts)))
    bad = sum(letters[letter] for letter in (*lost, *costly)) / max(1, sum(letters.values()))
    if not lost and ratio <= 1.0:
        advice, reason = "keep", "every character is kept and takes at most one token on average"
    elif bad < 0.5 and len(letters) > 20:
        advice, reason = "extend", f"{len(lost) + len(costly)} characters are lost or take several tokens"
    else:
        advice, reason = "extend", "the script is new to it: most characters are lost or take several tokens"
        if len(letters) > 1500:
            advice = "replace"
            reason += ", and there are so many of them that a table of their own is smaller"
    return Coverage(round(ratio, 4), max(counts, default=0) + 1, "".join(lost), "".join(costly), advice, reason)


def prepare_vocabulary(
    model: Any, tokenizer: Any, texts: Iterable[str], mode: Literal["keep", "extend", "replace"]
) -> tuple[Any, list[str]]:
    """Fit model and tokenizer to a new script; both are changed in place where they can be.

    Args:
        model: a VisionEncoderDecoderModel with a TrOCR decoder.
        mode: keep = nothing; extend = a token for every letter that is lost or costly, its vector the mean of those
            of its bytes (not for letters that a byte-level tokenizer writes bytes with, such as ą or Ö: these stay
            bytes); replace = a new tokenizer of the texts' letters alone, vectors taken over for letters that the
            old one had.

    Returns:
        The tokenizer to use from now on, and the letters that were added.
    """
    import torch

    texts = list(texts)
    if mode == "keep":
        return tokenizer, []
    if mode not in ("extend", "replace"):
        raise SettingsError(f"vocabulary is {mode!r}; choose keep, extend or replace.", "Change it and run again.")
    embeddings = model.decoder.get_input_embeddings().weight.data
    head = model.decoder.get_output_embeddings().weight.data
    tied = head.data_ptr() == embeddings.data_ptr()
    old_words, old_head = embeddings.clone(), head.clone()
    new_tokenizer, added, sources = (_extended if mode == "extend" else _replaced)(tokenizer, texts)
    places = {word: new_tokenizer.convert_tokens_to_ids(word) for word in sources}
    model.decoder.resize_token_embeddings(len(new_tokenizer), mean_resizing=False)
    model.config.decoder.vocab_size = len(new_tokenizer)
    if mode == "replace":
        _set_marks(model, new_tokenizer)
    with torch.no_grad():
        pairs = [(model.decoder.get_input_embeddings().weight, old_words)]
        pairs += [] if tied else [(model.decoder.get_output_embeddings().weight, old_head)]
        for weight, old in pairs:
            for letter, place in places.items():
                known = [token for token in sources[letter] if token is not None]
                weight[place] = old[known].mean(0) if known else old.mean(0)
    return new_tokenizer, added


def _extended(tokenizer: Any, texts: list[str]) -> tuple[Any, list[str], dict[str, list[Any]]]:
    """The tokenizer with new characters, these, and each new token's old ones, whose embeddings it begins with."""
    coverage = measure_coverage(tokenizer, texts)
    added = [*coverage.lost_letters, *coverage.costly_letters]
    taken = _byte_letters(tokenizer)
    if refused := "".join(letter for letter in added if letter in taken):
        logger.info("%s: written as bytes, as before; this tokenizer uses these characters otherwise.", refused)
        added = [letter for letter in added if letter not in taken]
    sources = {letter: _pieces(tokenizer, letter) for letter in added}
    if not added:
        return tokenizer, added, sources
    described = _described(tokenizer)
    if described.get("model", {}).get("type") == "Unigram":
        return _with_pieces(tokenizer, described, added), added, sources
    tokenizer.add_tokens(added)
    return tokenizer, added, sources


def comes_back(tokenizer: Any, text: str) -> bool:
    """Whether a text is the same after encoding and decoding; else nothing that learned it could ever write it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return bool(tokenizer.decode(ids, skip_special_tokens=True).strip() == text.strip())


def _with_pieces(tokenizer: Any, described: dict[str, Any], letters: list[str]) -> Any:
    """A sentencepiece tokenizer with more pieces in its own table.

    As added tokens they would be cut out before the words are, and get a blank beside them: 'für' would come back as
    'f ü r'. Its normalizer, which makes other letters of some (ſ an s), is left out; what needed it is a piece now.
    """
    import tokenizers
    import transformers

    pieces = described["model"]["vocab"]
    lowest = min(score for _piece, score in pieces)
    for token in sorted(described["added_tokens"], key=lambda token: token["id"]):
        if token["id"] == len(pieces):  # its place would be taken by the first new piece
            pieces.append([token["content"], lowest])
    known = {piece for piece, _score in pieces}
    pieces += [[letter, lowest] for letter in letters if letter not in known]
    described["normalizer"] = None
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token")
    special = {name: str(getattr(tokenizer, name)) for name in names if getattr(tokenizer, name, None) is not None}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(described)),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _described(tokenizer: Any) -> dict[str, Any]:
    """What a fast tokenizer is made of; empty for another."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
    return found


def _replaced(tokenizer: Any, texts: list[str]) -> tuple[Any, list[str], dict[str, list[Any]]]:
    """As `_extended`, of a tokenizer that has the letters of the texts alone."""
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    sources = {letter: _pieces(tokenizer, letter) for letter in letters} | {"▁": _pieces(tokenizer, " ")}
    marks = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    sources |= {mark: [old] for mark, old in zip(_MARKS, marks, strict=True)}
    return _letters_tokenizer(letters), letters, sources


def _pieces(tokenizer: Any, letter: str) -> list[int]:
    unknown = tokenizer.unk_token_id
    return [token for token in tokenizer.encode(letter, add_special_tokens=False) if token != unknown]


def _byte_letters(tokenizer: Any) -> frozenset[str]:
    """The letters a byte-level tokenizer writes single bytes with: a token that is one of them reads as that byte."""
    from tokenizers import pre_tokenizers

    decoder = _described(tokenizer).get("decoder")
    return frozenset(pre_tokenizers.ByteLevel.alphabet() if "ByteLevel" in json.dumps(decoder) else ())


def _set_marks(model: Any, tokenizer: Any) -> None:
    start, pad, end = tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id
    for settings in (model.config, model.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id, settings.eos_token_id = start, pad, end
    model.config.decoder.pad_token_id = pad
    model.config.decoder.eos_token_id = end


def _letters_tokenizer(letters: list[str]) -> Any:
    """A tokenizer with one token per letter, and '▁' for a blank; the marks have the places they have in TrOCR."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = [*_MARKS, "▁", *letters]
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(list(_MARKS))
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="<s>", sep_token="</s>", clean_up_tokenization_spaces=False, **names
    )
