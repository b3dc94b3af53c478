"""Captions of training images: read them, write them, take words from file names, and decide on the exact prompt."""

import itertools
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DatasetError, ModelError, needs_package
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.images.files import PictureProblem, read_rgb
from fastsd_helpers.model_lookup import CAPTIONER, find_folder
from fastsd_helpers.names.code_pages import decode_text
from fastsd_helpers.wheels.advisories import require_safe_tokenizer

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

DEFAULT_CAPTIONER = "Salesforce/blip-image-captioning-base"  # 990 MB, BSD-3-Clause

# A caption longer than this is not a caption: the text encoder reads 77 tokens.
_MOST_BYTES = 64 * 1024

# "(3)", "(3) (1)" and "copy" at the end: added by the operating system or by the old notebook's naming rule.
_COUNTER = re.compile(r"(?:[\s_-]*\(\d+\)|[\s_-]+copy)+\s*$", re.IGNORECASE)

# Whole names that programs give; matched on the name in lower case with every separator turned into one space.
_PROGRAM_NAMES = re.compile(
    r"""
      (?:whatsapp|signal|telegram)\b.*              # WhatsApp Image 2024-01-01 at 12.00.00
    | screen\ ?shot.*                               # Screenshot 2024-01-01 at 12.00.00
    | (?:bildschirmfoto|capture\ d\ ?ecran)\ .*
    | .*\ unsplash | pexels\ .* | .*\ pixabay       # stock photos: photographer and a code
    | snapchat\ .* | received\ \d+ | fb\ img\ \d+
    | (?:pxl|mvimg)\ \d{8}.*                        # PXL_20240101_120000123.MP
    | (?:sam|wp|kic)\ \d{4,}.*                     # but "sam (1)" may be a person
    | (?:download|downloads|untitled|unnamed|unknown|noname)(?:\ \d+)?
    """,
    re.VERBOSE,
)
_CAMERA_WORDS = re.compile(
    "img|imge|imag|image|images|dsc|dscn|dscf|pxl|mvimg|pano|vid|mov|gopr|dji|cimg|hpim|"
    "photo|photos|picture|pictures|pic|pics|foto|crop|cropped|edit|edited|burst|hdr|copy"
)
# Letters and digits in one piece as cameras count: IMG1234, DSC0001, P1010001, WA0001, E1234, image7.
_CAMERA_CODE = re.compile(
    r"(?:img|imag|image|photo|picture|pic|foto)\d+|(?:dsc|dscn|dscf|pxl|mvimg|gopr|gh|gx|dji|cimg|sam|hpim|img[a-z])\d{4,}"
    r"|p\d{5,}|wa\d{3,}|e\d{4,}|burst\d+|\d+|\d{8}t?\d{6}z?|[ap]m|at"
)
_UUID = re.compile(r"[0-9a-f]{8}[-_ ]?(?:[0-9a-f]{4}[-_ ]?){3}[0-9a-f]{12}", re.IGNORECASE)


def resolve_prompt(
    file_name: str, caption: str | None, *, instance_prompt: str | None, session_name: str, words: str | None = None
) -> str:
    """Decide which words an image is trained with.

    The first of these that has any words: the picture's own caption (its .txt), which is the exact prompt; the
    instance prompt; the words of the file name; the session's name.

    Args:
        file_name: the picture's name, with or without folder and ending.
        caption: text of the .txt beside it, or None.
        instance_prompt: one prompt for all images, or None when it was left alone.
        session_name: the last resort; underscores become spaces.
        words: what the name was found to say among those of its set ("" for nothing); None: what it says by itself.

    Returns:
        The prompt of the image, as the text encoder gets it.
    """
    for candidate in (caption, instance_prompt, words_of(file_name) if words is None else words):
        plain = " ".join((candidate or "").split())
        if plain:
            return plain
    return words_of(session_name) or session_name


def words_of(file_name: str) -> str:
    """Take the words out of a file name by the old notebook's convention, but keep digits.

    "sks_dog (3).jpg" gives "sks dog", "user01 (1).jpg" gives "user01". A name that a camera, a phone or a program
    made (IMG_1234, 20240101_120000, 07, a UUID) has no words and gives "".

    Args:
        file_name: with its ending, without folders.

    Returns:
        The words, joined by blanks; "" for none.
    """
    stem = _stem(file_name)
    if _UUID.search(stem):
        return ""
    words = re.sub(r"[\s_\-]+", " ", _COUNTER.sub("", stem)).strip(" .,;~+")
    lowered = re.sub(r"[\s_\-.,;:~+'()]+", " ", words.lower()).strip()
    if not lowered or _PROGRAM_NAMES.fullmatch(lowered):
        return ""
    return "" if all(_says_nothing(word) for word in lowered.split()) else words


def _stem(file_name: str) -> str:
    name = unicodedata.normalize("NFC", re.split(r"[\\/]", file_name)[-1])
    stem, dot, ending = name.rpartition(".")
    # Only a real ending is cut off: "mr. dog" and "2024.01.01" keep their dots.
    return stem if dot and stem and re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,4}", ending) else name


def _says_nothing(word: str) -> bool:
    if _CAMERA_WORDS.fullmatch(word) or _CAMERA_CODE.fullmatch(word):
        return True
    digits = sum(c.isdigit() for c in word)
    changes = sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(word))
    hexadecimal = re.fullmatch(r"[0-9a-f]{8,}", word) is not None
    # A hash or a random key: long, with digits scattered among the letters.
    return digits >= 2 and ((hexadecimal and (changes >= 2 or len(word) >= 16)) or (len(word) >= 16 and changes >= 4))


def decode_caption(data: bytes, *, page: str | None = None) -> str | None:
    """Read the bytes of a .txt: UTF-8 with or without BOM, UTF-16 with BOM, else a code page; empty gives None.

    Args:
        data: all of it.
        page: the code page that was guessed from all captions of a set; by default it is guessed from this one.

    Returns:
        The text in one line; None when it is empty.

    Raises:
        DatasetError: far too long, or no text at all.
    """
    hint = "A caption is a short text file: rename or remove this one, or write the caption into it."
    if len(data) > _MOST_BYTES:
        raise DatasetError(f"A caption of {len(data):,} bytes is too long.", hint)
    text = decode_text(data, page)
    if "\0" in text:
        raise DatasetError("The caption contains zero bytes, so it is not a text file.", hint)
    return " ".join(text.split()) or None


def read_caption(path: Path, *, page: str | None = None) -> str | None:
    """Read the caption in a .txt file; None when there is no file or nothing in it. `page`: see `decode_caption`.

    Args:
        path: the .txt file.
        page: the code page of bytes that are no Unicode; see `decode_caption`.

    Returns:
        The caption, or None.

    Raises:
        DatasetError: the file is not a caption.
        DriveError: it cannot be read.
    """
    with file_errors(path, "read"):
        try:
            found = path.stat()
            if not stat.S_ISREG(found.st_mode):  # a pipe would be waited for, for ever
                raise DatasetError(f"{path} is not a caption: it is not an ordinary file.", "Remove or rename it.")
            size = found.st_size
            data = path.read_bytes() if size <= _MOST_BYTES else b"\0" * (_MOST_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return decode_caption(data, page=page)
    except DatasetError as err:
        raise DatasetError(f"{path} is not a caption: {err.problem}", err.hint) from err


def write_caption(path: Path, caption: str | None) -> None:
    """Write a caption as UTF-8, whole or not at all; an empty one removes the file.

    Args:
        path: the .txt file.
        caption: its new text; None or empty: none.

    Raises:
        DriveError: the file or its folder cannot be written.
    """
    words = " ".join((caption or "").split())
    if words:
        write_atomic(path, f"{words}\n".encode())
        return
    with file_errors(path, "remove"):
        path.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- automatic


def describe_pictures(
    pictures: Sequence[Path], *, model: str = DEFAULT_CAPTIONER, device: str = "cpu"
) -> Iterator[str]:
    """Describe images one by one in a few words, such as "a dog sitting on a couch", with a BLIP model.

    Source: Li et al. 2022, "BLIP". Greedy decoding, so an image always gets the same words.

    Args:
        pictures: files; see `picture_files.FORMATS`.
        model: a folder or a Hub id; downloaded when it is not here.
        device: where it runs, as torch names it.

    Yields:
        The words of each image, in the order given.

    Raises:
        ModelNotFound: there is no such model.
        WrongFamily: it is not a BLIP captioning model.
        DependencyMissing: transformers is not installed.
    """
    network, tokenizer, prepare = _open_captioner(model)
    network = network.to(device)
    import torch

    for path in pictures:
        try:
            picture = read_rgb(path)
        except PictureProblem as err:
            raise DatasetError(f"{path} {err.problem}.", "Leave it out, or save it again.") from err
        pixels = prepare(picture, return_tensors="pt").pixel_values.to(device)
        with torch.no_grad():
            ids = network.generate(pixel_values=pixels, max_new_tokens=30, num_beams=1, do_sample=False)
        text = network.config.text_config
        # The tokens that begin and end a caption are words to some tokenizers.
        marks = {text.bos_token_id, text.eos_token_id, text.sep_token_id, text.pad_token_id}
        words = [number for number in ids[0].tolist() if number not in marks]
        yield " ".join(tokenizer.decode(words, skip_special_tokens=True).split())


def _open_captioner(model: str) -> tuple[Any, Any, Any]:
    with needs_package("Describing images", "Run: fastsd install dreambooth"):
        import transformers
    # The PIL form needs no torchvision, which may be absent, and gives everyone the same pixels.
    images = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    folder = find_folder(model, CAPTIONER)
    require_safe_tokenizer(folder)
    own = {"local_files_only": True}
    try:
        network = transformers.BlipForConditionalGeneration.from_pretrained(folder, use_safetensors=True, **own)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **own)
        return network.eval(), tokenizer, images.from_pretrained(folder, **own)
    except (OSError, ValueError) as err:
        first = (str(err).splitlines() or [type(err).__name__])[0]
        raise ModelError(
            f"The captioning model {model} cannot be loaded: {first}",
            f"Give {CAPTIONER.examples}; or write the captions by hand.",
        ) from err


def name_subject(description: str, subject: str) -> str:
    """Put the subject's own words into a description: its kind is replaced by its name where it is mentioned.

    ("a brown dog on a couch", "zib dog") gives "a brown zib dog on a couch"; where the kind (the subject's last word)
    is not mentioned, the subject comes first: "zib dog, a couch".

    Args:
        description: such as "a brown dog on a couch".
        subject: its name and kind, such as "zib dog".

    Returns:
        The prompt.
    """
    kind = subject.split()[-1] if subject.split() else ""
    if not kind:
        return description
    named, count = re.subn(rf"\b{re.escape(kind)}\b", lambda _: subject, description, count=1, flags=re.IGNORECASE)
    return named if count else f"{subject}, {description}" if description else subject
