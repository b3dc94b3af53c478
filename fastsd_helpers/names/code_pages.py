"""Code pages: in which letters a name or a text is written that does not say so, and is not UTF-8.

Which one it is is judged over all texts of one writer together, by what the letters would be; always the same for the
same texts. Whoever uses a guess says it with an example, so that a wrong one is seen.

Source: PKWARE's APPNOTE 6.3.9, appendix D, for the pages of zips; Windows' list of ANSI code pages for those of texts.
"""

import functools
import itertools
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["CODE_PAGES", "PageGuess", "decode_text", "guess_page", "likeliest_page"]

# In this order where two are equally likely: of those that agree in most letters the one that Windows uses more.
CODE_PAGES = {
    "cp850": "Western European",
    "cp437": "US",
    "cp1252": "Western European",
    "cp866": "Cyrillic",
    "cp1251": "Cyrillic",
    "cp932": "Japanese",
    "gbk": "simplified Chinese",
    "cp949": "Korean",
    "big5": "traditional Chinese",
    "cp852": "Central European",
    "cp1250": "Central European",
    "cp857": "Turkish",
    "cp1254": "Turkish",
    "cp737": "Greek",
    "cp1253": "Greek",
    "cp862": "Hebrew",
    "cp1255": "Hebrew",
    "cp1256": "Arabic",
    "cp874": "Thai",
}
# Texts are written by Windows' programs, seldom by DOS's; and on older Unix machines, whose letters lie elsewhere.
_OF_TEXTS = {
    "cp1252": "Western European", "cp1251": "Cyrillic", "cp1250": "Central European", "cp1254": "Turkish",
    "iso8859_2": "Central European", "koi8_u": "Cyrillic", "euc_jp": "Japanese",
}  # fmt: skip
_TEXT_PAGES = _OF_TEXTS | CODE_PAGES
# What a page costs in texts before a letter is read: one letter alone says little.
_TEXT_COSTS = {
    page: 0.0 if page == "cp1252" else 0.3 if page.startswith("cp125") or page not in _OF_TEXTS else 1.2
    for page in _TEXT_PAGES
} | dict.fromkeys(("cp437", "cp737", "cp850", "cp852", "cp857", "cp862", "cp866"), 1.2)
_MOST_JUDGED = 500
_WIDE = (b"\xff\xfe", b"\xfe\xff")
_EXAMPLE = 40  # letters

# Letters by how often they are written: what is not listed costs more.
_LATIN = frozenset("äöüÄÖÜßéèêëàâáãåæçñíìîïóòôõøœúùûÿÉÅØ")
_LATIN_RARE = frozenset("ąćęłńśźżŁŚŻčďěňřšťůýžČŘŠŽőűğışİŞçșțăđ")
_RUSSIAN = {
    **dict.fromkeys("оеаинтсрвлкмдпу", 0.0),
    **dict.fromkeys("яыьгзбчйхжшюц", 0.6),
    **dict.fromkeys("щэфъё", 1.2),
}
_RUSSIAN_VOWELS = frozenset("аеёиоуыэюяіїє")
_KANJI = frozenset(
    "犬猫写真画像図人子供花山川海空車家男女顔友達娘息母父兄弟姉妹鳥魚馬木森街町駅料理食日本月年旅行夏冬春秋朝夜赤青白黒緑"
    "大小中上下左右前後新古東京都阪名撮影結婚式誕生学校先太郎次美愛桜富士祭神社寺温泉見物思出会社員仕事"
)
_HANZI = frozenset(
    "的一是不了人我在有他这中大来上个国照片图像狗猫小宝家儿女孩子妈爸花山水海天车新年月日生朋友老师学校旅游北京春夏秋冬白黑红蓝"
    "绿美好爱头手工作张王李刘陈這來個國圖貓寶兒媽車師學遊台灣紅藍綠愛頭張劉陳相册機机截屏幕拍摄攝影名字風风景动動物"
)
_HANGUL = frozenset(
    "이가나다라마바사아자차카타파하고도로소보조서지기리시은는을를의에한국진강개양그림여행족엄빠친구학교우딸들봄름겨울제주부산"
    "인정민수영현성희미연준호재동경대상원장선생님내너저집꽃산물새눈밤낮하루년월일요금토화목"
)
_CZECH, _ROMANCE = frozenset("žšŽŠ"), frozenset("ùòõìñ")  # seldom written together
_GREEK = frozenset("αοιετνσρκπςάέίόήύώ")
_RARE_PAGES = dict.fromkeys(("cp737", "cp1253", "cp862", "cp1255", "cp1256", "cp874"), 0.5)
_PUNCTUATION = frozenset("–—’‘“”…、。・！？（）「」【】《》～ー々〆〇·№°º")


@dataclass(frozen=True)
class PageGuess:
    """The code page in which the texts of one writer are read, and a piece of them that was read by it."""

    code_page: str
    example: str

    def line(self, what: str) -> str:
        """The guess as a sentence; `what` is "notes.csv is" or "The captions are"."""
        return (
            f"{what} not UTF-8, and read as {_TEXT_PAGES[self.code_page]} ({self.code_page}), for example "
            f"{self.example!r}; if that is wrong, save them as UTF-8 and try again."
        )


def guess_page(texts: Iterable[bytes]) -> PageGuess | None:
    """Guess the code page of whole text files of one writer; None when all of them are Unicode."""
    foreign = [data for data in texts if not _is_unicode(data)]
    if not foreign:
        return None
    lines = [line for data in foreign for line in data.splitlines()]
    page = likeliest_page(lines, costs=_TEXT_COSTS) or "cp1252"
    shown = next(line for line in lines if not line.isascii()).decode(page, "replace").strip()
    return PageGuess(page, shown[:_EXAMPLE] + ("…" if len(shown) > _EXAMPLE else ""))


def decode_text(data: bytes, page: str | None = None) -> str:
    """Decode a text file: by its mark (BOM), as UTF-8, else in a code page; what cannot be read becomes U+FFFD.

    Args:
        data: all of it.
        page: what was guessed from all files of its writer; by default it is guessed from this one.
    """
    if data.startswith(_WIDE):
        return data.decode("utf-16", errors="replace")
    if _is_unicode(data):
        return data.decode("utf-8-sig", errors="replace")
    if page is None:
        guess = guess_page([data])
        page = guess.code_page if guess else "utf-8"
    return data.decode(page, errors="replace")


def _is_unicode(data: bytes) -> bool:
    """Whether a text is UTF-16 with its mark, or UTF-8, damaged in a few places at most."""
    if data.startswith((*_WIDE, b"\xef\xbb\xbf")) or _decoded(data, "utf-8") is not None:
        return True
    read = data.decode("utf-8", errors="replace")
    broken = read.count("\ufffd")
    return sum(not char.isascii() for char in read) - broken > 4 * broken


def likeliest_page(texts: Iterable[bytes], *, costs: Mapping[str, float] | None = None) -> str | None:
    """The code page in which these texts, of one writer, make the most sense; None when all of them are UTF-8.

    Args:
        texts: names, or lines.
        costs: the pages to choose from, where two are equally likely the first, and what each costs beforehand; by
            default those of zips, for nothing.
    """
    texts = [text for text in texts if not text.isascii()]
    if all(_decoded(text, "utf-8") is not None for text in texts):
        return None
    best, best_cost = "cp437", float("inf")  # which reads any bytes
    judged = sorted(set(texts))[:_MOST_JUDGED]
    for page, before in (costs or dict.fromkeys(CODE_PAGES, 0.0)).items():
        if any(_decoded(text, page) is None for text in texts):
            continue
        cost = before + sum(_cost(text.decode(page), page) for text in judged)
        if cost < best_cost - 1e-9:
            best, best_cost = page, cost
    return best


def _decoded(data: bytes, page: str) -> str | None:
    try:
        return data.decode(page)
    except UnicodeDecodeError:
        return None


# --------------------------------------------------------------------------------------------- how likely a name is


def _cost(text: str, page: str) -> float:
    cost = 1.5 * text.count("\\")  # nearly always the second half of a letter
    for char in text:
        if char.isascii() or unicodedata.category(char)[0] in "LM":
            continue
        if char in _PUNCTUATION:
            cost += 0.3
        else:  # boxes, fractions and control characters are in no name
            cost += 6.0 if unicodedata.category(char)[0] in "CZ" else 4.0
    if _CZECH & set(text) and _ROMANCE & set(text):
        cost += 3.0
    # Letters with the marks that belong to them.
    words = "".join(char if unicodedata.category(char)[0] in "LM" else " " for char in text).split()
    return cost + _RARE_PAGES.get(page, 0.0) + sum(_cost_of_word(word, page) for word in words if not word.isascii())


def _cost_of_word(word: str, page: str) -> float:
    scripts = {_script(char) for char in word}
    cost = 0.0 if len(scripts) == 1 or scripts == {"HAN", "KANA"} else 2.0 if scripts & {"HAN", "KANA"} else 6.0
    cost += 3.0 * sum(one.islower() and other.isupper() for one, other in itertools.pairwise(word))
    if "LATIN" in scripts:
        cost += _cost_of_latin(word)
    if "CYRILLIC" in scripts:
        cost += _cost_of_cyrillic(word)
    if "GREEK" in scripts:
        cost += 0.5 * sum(char.isupper() for char in word[1:]) + (2.0 if word.endswith("σ") else 0.0)
        cost += 2.0 * max(0, sum(len(unicodedata.normalize("NFD", char)) > 1 for char in word) - 1)
    return cost + sum(_cost_of_sign(char, page) for char in word if not char.isascii())


@functools.cache
def _script(char: str) -> str:
    name = unicodedata.name(char, "NONE").split()[0]
    if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return "KANA"
    return "HAN" if name == "CJK" else name


def _cost_of_latin(word: str) -> float:
    accents = [not char.isascii() and char != "ı" for char in word]
    beside = sum(one and other for one, other in itertools.pairwise(accents))
    alone = 2.0 * len(word) if all(accents) and len(word) > 1 else 0.0
    # Portuguese writes õ before e alone; elsewhere it mostly is Hungarian ő, in a page that has none.
    lonely = sum(one == "õ" and other != "e" for one, other in itertools.pairwise(f"{word} "))
    return alone + 1.5 * beside + 0.6 * lonely


def _cost_of_cyrillic(word: str) -> float:
    small = word.lower()
    cost = 0.5 * sum(char.isupper() for char in word[1:])
    if len(word) > 1 and not _RUSSIAN_VOWELS & set(small):
        cost += 4.0
    return cost + (4.0 if small[0] in "ъыь" else 0.0)


def _cost_of_sign(char: str, page: str) -> float:
    script = _script(char)
    if script == "LATIN":
        return 0.2 if char in _LATIN else 0.5 if char in _LATIN_RARE else 2.0
    if script == "CYRILLIC":
        return _RUSSIAN.get(char.lower(), 1.5)
    if script == "GREEK":
        return 0.05 if char.lower() in _GREEK else 0.4
    if script == "HAN":
        return _cost_of_han(char, page)
    if script == "HANGUL":
        common = b"\xb0\xa1" <= char.encode("cp949") < b"\xc9\xa1" and char.encode("cp949")[1] >= 0xA1
        return 0.0 if char in _HANGUL else 1.0 if common else 4.0
    if script in ("HALFWIDTH", "FULLWIDTH"):
        return 3.0
    if script == "KANA":
        return 0.0 if page in ("cp932", "euc_jp") else 2.0
    return 0.3


def _cost_of_han(char: str, page: str) -> float:
    lead, trail = char.encode(page)[0], char.encode(page)[-1]
    if page in ("cp932", "euc_jp"):  # JIS X 0208: its first level ends with lead byte 97, or CF
        return 0.0 if char in _KANJI else 0.8 if lead < (0x98 if page == "cp932" else 0xD0) else 2.5
    if page == "gbk":  # GB 2312: its first level is B0 to D7
        return 0.0 if char in _HANZI else 0.8 if 0xB0 <= lead <= 0xD7 and trail >= 0xA1 else 2.5
    if page == "big5":
        return 0.0 if char in _HANZI else 0.8 if 0xA4 <= lead <= 0xC6 else 2.5
    return 2.5  # Korean names are rarely written with them
