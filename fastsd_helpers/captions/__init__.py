"""Captions of training images, the prompts made of them, and the words in photos' names."""

from fastsd_helpers.captions.prompts import (
    DEFAULT_CAPTIONER,
    decode_caption,
    describe_pictures,
    name_subject,
    read_caption,
    resolve_prompt,
    words_of,
    write_caption,
)

__all__ = [
    "DEFAULT_CAPTIONER",
    "decode_caption",
    "describe_pictures",
    "name_subject",
    "read_caption",
    "resolve_prompt",
    "words_of",
    "write_caption",
]
