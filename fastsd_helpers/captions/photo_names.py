"""The words in photos' names, judged over a whole set: a number that changes from photo to photo is none of them.

One name alone cannot tell "rex 3" from "agent 47", or "7up" from "1 rex". Six names can: what changes is a count, what
stays is a word. Names that cameras, phones and programs give say nothing, in whatever language; then the folder may.
"""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from fastsd_helpers.captions.dull_names import PICTURE_WORD, PLAIN_FOLDER, PROGRAM
from fastsd_helpers.captions.prompts import words_of

__all__ = ["NamedPhoto", "folder_words", "name_photos", "repeats_in"]

# At the end, each possibly more than once: what an operating system or a browser adds to a name that is taken.
_COPY_WORDS = "copy|kopie|kopia|copia|copie|cópia|kopi|kopio|копия|копія|副本|複製|のコピー|コピー|복사본|사본"
_COUNTER = re.compile(
    rf"(?:[\s_.–—-]{{0,3}}\(\s?(?:{_COPY_WORDS})?\s?\d{{0,9}}\s?\)"
    rf"|[\s_]{{0,2}}[–—-]{{0,2}}[\s_]{{0,2}}(?<![^\W\d_])(?:{_COPY_WORDS})(?:\s?\d{{1,3}})?"
    r"|[\s_]{1,2}-[\s_]?(?:のコピー|コピー|副本|복사본))\s?$",
    re.IGNORECASE,
)
_COPY_OF = re.compile(
    r"^(?:copy (?:\(\d+\) )?of|kopie von|copie de|copia d[ei]|kopia|cópia de)\s+(?=\S)", re.IGNORECASE
)
_TOUCHED = re.compile(
    r"(?:[\s_-]+(?:crop|cropped|edit|edited|resized|scaled|upscaled|enhanced|nobg|no[\s_-]bg|removebg(?:[\s_-]preview)?"
    r"|transparent|transformed|compressed|original|\d{3,4}x\d{3,4}))+$|^(?:cropped|resized|edited|scaled|compressed)[_-]+",
    re.IGNORECASE,
)
_SIZE = re.compile(r"(?<![^\W_])\d{2,5}\s?[x×]\s?\d{2,5}(?:px)?(?![^\W_])", re.IGNORECASE)

# Dates and times; they are not words even where a single photo has one.
_DATE = re.compile(
    r"(?<!\d)(?:(?:19|20)\d\d[-_.:\s]?(?:0[1-9]|1[0-2])[-_.:\s]?(?:0[1-9]|[12]\d|3[01])"
    r"|(?:0?[1-9]|[12]\d|3[01])[-_.](?:0?[1-9]|1[0-2])[-_.](?:19|20)\d\d)(?!\d)"
    r"|(?:19|20)\d\d年\d{1,2}月\d{1,2}日"
)
_TIME = re.compile(
    r"(?<!\d)(?:(?:um|at|à|a las|alle|kl\.?|в|om|às|T)[\s_]?)?(?:[01]?\d|2[0-3])[-_.:hu]\s?[0-5]\d"
    r"(?:[-_.:m]\s?[0-5]\d)?(?:\.\d{1,3})?s?(?:[\s_]?[ap]\.?m\.?)?(?!\d)",
    re.IGNORECASE,
)


_PROGRAM_PREFIX = re.compile(r"^(?:dall[·.\s-]?e|midjourney)\b", re.IGNORECASE)

_CAMERA = (
    "img|imge|imag|img_?[a-z]|dsc|dscn|dscf|pxl|mvimg|pano|vid|mov|gopr|dji|cimg|hpim|sam|wp|kic|fb_img|_mg|mg|burst"
)
# "IMG_1234" beside words: a camera's number with what is in front of it.
_CAMERA_NUMBER = re.compile(
    rf"(?<![^\W_])(?:{_CAMERA})[\s_-]*\d{{2,}}(?:-wa\d+)?(?![^\W_])|(?<![^\W_])p\d{{7}}(?![^\W_])", re.IGNORECASE
)

_NUMBER_WORDS = re.compile(
    r"(?:^|(?<=[\s_.-]))(?:no|nr|num|number|n°|№|v|ver|version|frame|frm)[\s_.-]*$", re.IGNORECASE
)
_MOST_LETTERS = 160
_KOHYA = re.compile(r"^(\d+)_(?=\S)")

_EDGES = " \t_.,;~+#@–—-·&()[]{}'’\"№="


@dataclass(frozen=True)
class NamedPhoto:
    """What one photo's name says."""

    stem: str  # for its prepared picture: the words with a number where they were counted, else the name as it is
    words: str  # "" where neither name nor folder says anything
    folder: bool = False  # the words are the folder's


@dataclass
class _Name:
    text: str  # what is left of the name once dates, cameras' numbers and marks of copies are gone
    runs: list[tuple[int, int]]  # where digits are in it
    counter: bool  # a mark of a copy was there
    key: str = ""


def name_photos(names: Sequence[str]) -> list[NamedPhoto]:
    """Find the words in the names of a set of photos, each with its folders ("zob cat/IMG_0001.png") and ending.

    Names that are the same but for a number have the same words; a number that stays the same through all of them is
    a part of the words ("canon eos 5d 1", "canon eos 5d 2"), and so is that of a name that stands alone.
    """
    stems = [_stem(name) for name in names]
    parsed = [_parse(stem) for stem in stems]
    words = _words_of_set(parsed)
    spelling = _usual_spelling(words)
    said = [spelling[own.casefold()] or folder_words(name) for name, own in zip(names, words, strict=True)]
    picture_stems = _picture_stems(stems, said)
    return [
        NamedPhoto(picture_stem, text, folder=bool(text) and not own)
        for picture_stem, text, own in zip(picture_stems, said, words, strict=True)
    ]


def folder_words(name: str) -> str:
    """The words of the nearest folder in a photo's name that has any; kohya's repeat number ("10_") is none of them."""
    for part in reversed(PurePosixPath(name).parts[:-1]):
        plain = _KOHYA.sub("", unicodedata.normalize("NFC", part))
        text = _tidy(_DATE.sub(" ", _without_counters(plain)))
        said = [word for word in re.findall(r"[^\W\d]+", text.casefold()) if word.strip("_")]
        if (
            not said
            or _is_program(text)
            or all(PLAIN_FOLDER.fullmatch(word) or PICTURE_WORD.fullmatch(word) for word in said)
        ):
            continue
        return "" if not words_of(f"{text}.png") else text
    return ""


def repeats_in(names: Sequence[str]) -> dict[str, int]:
    """Folders that carry kohya's number of repeats: folder -> number. They are not obeyed here."""
    found = {}
    for name in names:
        for part in PurePosixPath(name).parts[:-1]:
            if (match := _KOHYA.match(part)) and folder_words(f"{part}/x.png"):
                found[part] = int(match[1])
    return found


# ------------------------------------------------------------------------------------------------ one name


def _stem(name: str) -> str:
    stem = unicodedata.normalize("NFC", PurePosixPath(name).stem)
    # Long runs of separators say nothing, and cost a regular expression much.
    return re.sub(r"([\s_.–—-])\1{2,}", r"\1", stem)[:_MOST_LETTERS]


def _parse(stem: str) -> _Name:
    plain = _without_counters(stem)
    counter = plain != stem
    plain = _COPY_OF.sub("", plain)
    if _is_program(plain) or not words_of(f"{plain}.png") or not _says_something(plain):
        return _Name("", [], counter)
    text = _PROGRAM_PREFIX.sub("", plain)
    for pattern in (_CAMERA_NUMBER, _DATE, _TIME, _SIZE):
        text = pattern.sub(" ", text)
    text = _without_counters(text.strip(" _-"))
    shorter = _TOUCHED.sub("", text)
    text = shorter if _says_something(shorter) else text
    return _Name(text, [match.span() for match in re.finditer(r"\d+", text)], counter)


def _without_counters(text: str) -> str:
    for _ in range(6):
        shorter = _COUNTER.sub("", text)
        if shorter == text:
            break
        text = shorter
    return text


def _is_program(text: str) -> bool:
    lowered = re.sub(r"[\s_\-.,]+", " ", text.casefold().replace("’", "'")).strip()
    return PROGRAM.fullmatch(lowered) is not None


def _says_something(text: str) -> bool:
    """Whether a word is left that is more than a name for images."""
    return any(not PICTURE_WORD.fullmatch(word) for word in re.findall(r"[^\W\d_]+", text.casefold()))


def _tidy(text: str) -> str:
    text = re.sub(r"\(\s*\)|\[\s*\]|\{\s*\}", " ", text)
    text = re.sub(r"[\s_]+", " ", text)
    text = re.sub(r"(?<=\s)[-–—.,;+#~·]+(?=\s)|(?<=\w)-(?=\w)", " ", text)
    return re.sub(r"\s+", " ", text).strip(_EDGES)


# --------------------------------------------------------------------------------------------- the whole set


def _words_of_set(names: list[_Name]) -> list[str]:
    groups: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        name.key = _key(name)
        if name.text:
            groups[name.key].append(place)
    words = [""] * len(names)
    for places in groups.values():
        dropped = _counted(names, places)
        for place in places:
            words[place] = _without(names[place], dropped)
    # One name with a number beside names without one: "rex.jpg" and "rex 2.jpg" are the same words too.
    bare = {text.casefold() for text in words}
    for places in groups.values():
        if len(places) == 1:
            for place in places:
                numbers = range(len(names[place].runs))
                for some in [numbers[-1:], numbers] if numbers else []:
                    shorter = _without(names[place], set(some))
                    if shorter.casefold() in bare - {"", words[place].casefold()}:
                        words[place] = shorter
                        break
    return [text if _says_something(text) else "" for text in words]


def _key(name: _Name) -> str:
    """What names that differ only in numbers have in common: their letters, with a mark where digits are."""
    marked = re.sub(r"\d+", "\0", name.text.casefold())
    # "1a", "2a", "3b": the letter belongs to the number.
    marked = re.sub(r"(?<![^\W_\0])\0[a-z](?![^\W_\0])", "\0", marked)
    return re.sub(r"[\s_\W]*\0[\s_\W]*", "\0", re.sub(r"[^\w\0]+|_+", " ", marked)).strip()


def _counted(names: list[_Name], places: list[int]) -> set[int]:
    """Which of the numbers in these names count photos: those that change, unless several photos share a value."""
    values = [[names[place].text[start:end] for start, end in names[place].runs] for place in places]
    changing = [number for number in range(len(values[0])) if len({row[number] for row in values}) > 1]
    if not changing:
        return set()
    kept = changing
    dropped: set[int] = set()
    has_counter = sum(names[place].counter for place in places) > len(places) / 2
    while kept:
        if not has_counter or dropped:
            # "agent 47 (1)", "agent 47 (2)", "agent 48 (1)": two subjects, and the last number counts.
            dropped.add(kept[-1])
            kept = kept[:-1]
        shared = Counter(tuple(row[number] for number in kept) for row in values)
        if kept and len(shared) <= 2 * len(places) / 3:
            break
        has_counter = False
    return dropped


def _without(name: _Name, dropped: set[int]) -> str:
    text = name.text
    for number in sorted(dropped, reverse=True):
        start, end = name.runs[number]
        before, after = text[:start], text[end:]
        letter = re.match(r"[A-Za-z](?![^\W_])", after)
        if letter and not re.search(r"[^\W_]$", before):
            after = after[1:]
        shorter = _NUMBER_WORDS.sub(" ", before)  # "frame 12", "no. 3", "v2"
        before = shorter if _says_something(shorter) else before
        text = f"{before} {after}"
    shorter = _TOUCHED.sub("", text.strip(" _-")) if dropped else text
    return _tidy(shorter if _says_something(shorter) else text)


def _usual_spelling(words: list[str]) -> dict[str, str]:
    """casefolded words -> as most photos spell them, so that "Rex 1" and "rex 2" have one prompt."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for text in words:
        spellings[text.casefold()][text] += 1
    return {key: found.most_common(1)[0][0] for key, found in spellings.items()}


def _picture_stems(stems: Sequence[str], words: Sequence[str]) -> list[str]:
    """Stems that say the same to `words_of`, which reads them where a session's record had to be rebuilt."""
    groups: dict[str, list[int]] = defaultdict(list)
    for place, text in enumerate(words):
        groups[text].append(place)
    found = list(stems)
    for text, places in groups.items():
        numbers = [int((re.findall(r"\d+", stems[place]) or ["0"])[-1][-9:]) for place in places]
        if len(set(numbers)) < len(numbers) or max(numbers) > 9999 or not text:
            numbers = list(range(1, len(places) + 1))
        for place, number in zip(places, numbers, strict=True):
            counted = re.fullmatch(r"(.*?\D)[\s_-]+\d{1,6}", stems[place])
            if text and counted and words_of(f"{counted[1]}.png").casefold() == text.casefold():
                found[place] = f"{counted[1].strip(' _-')} ({number})"
            elif words_of(f"{stems[place]}.png").casefold() != text.casefold():
                found[place] = f"{text or 'picture'} ({number})"
    return found
