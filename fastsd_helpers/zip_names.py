"""The names in a zip as their writer meant them: by the flag, as UTF-8, else in the likeliest code page.

A zip says of each name only whether it is UTF-8. macOS writes UTF-8 without saying so, and Windows the code page of its
country. Which one it was is judged over all names of the zip together, by what the letters would be; always the same
for the same zip, and said with an example, so that a wrong guess is seen.

Source: PKWARE's APPNOTE 6.3.9, 4.4.4 (bit 11), 4.6.9 (the Unicode path field) and appendix D.
"""

import itertools
import unicodedata
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ZipNames", "read_names"]

_UTF8_FLAG = 0x800
_UNICODE_PATH = 0x7075

# In this order where two are equally likely: of those that agree in most letters the one that Windows uses more.
_CODE_PAGES = {
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
_GREEK = frozenset("αοιετνσρκπςάέίόήύώ")
_RARE_PAGES = dict.fromkeys(("cp737", "cp1253", "cp862", "cp1255", "cp1256", "cp874"), 0.5)
_PUNCTUATION = frozenset("–—’‘“”…、。・！？（）「」【】《》～ー々〆〇·№°º")


@dataclass(frozen=True)
class ZipNames:
    """The names of a zip's members."""

    names: tuple[str, ...]  # one a member, in their order; "/" between folders, composed letters (NFC)
    code_page: str | None = None  # what was guessed; None when the zip or the bytes themselves say it
    example: str | None = None  # one of the names that were read by it

    def line(self, zip_name: str) -> str | None:
        """What was guessed, as a sentence; None when nothing had to be."""
        if self.code_page is None:
            return None
        return (
            f"The names in {zip_name} are read as {_CODE_PAGES[self.code_page]} ({self.code_page}), for example "
            f"{self.example!r}; if that is wrong, unpack the zip and give the folder."
        )


def read_names(members: Sequence[zipfile.ZipInfo]) -> ZipNames:
    """Read the names of all members of one zip; a guess is made for those together that do not say what they are."""
    known = {place: name for place, member in enumerate(members) if (name := _said(member)) is not None}
    raw = {place: member.orig_filename.encode("cp437") for place, member in enumerate(members) if place not in known}
    foreign = [data for data in raw.values() if not data.isascii()]
    page = _likeliest([data.rpartition(b"/")[2] or data for data in foreign])
    decoded = {place: data.decode(page or "utf-8") for place, data in raw.items()}
    names = tuple(
        unicodedata.normalize("NFC", (known | decoded)[place]).replace("\\", "/") for place in range(len(members))
    )
    if page is None:
        return ZipNames(names)
    shown = next(place for place, data in raw.items() if not data.isascii())
    return ZipNames(names, page, names[shown].rpartition("/")[2] or names[shown])


def _said(member: zipfile.ZipInfo) -> str | None:
    """The name where the zip says in which letters it is written."""
    if member.flag_bits & _UTF8_FLAG:
        return member.orig_filename
    try:
        plain = member.orig_filename.encode("cp437")
    except UnicodeEncodeError:  # made in memory, not read from a file
        return member.orig_filename
    extra = member.extra
    while len(extra) >= 4:
        kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
        field, extra = extra[4 : 4 + size], extra[4 + size :]
        if kind == _UNICODE_PATH and field[:1] == b"\1" and int.from_bytes(field[1:5], "little") == zlib.crc32(plain):
            try:
                return field[5:].decode()
            except UnicodeDecodeError:
                return None
    return None


def _likeliest(names: list[bytes]) -> str | None:
    """The code page in which these names make the most sense; None when all of them are UTF-8."""
    if all(_decoded(name, "utf-8") is not None for name in names):
        return None
    best, best_cost = "cp437", float("inf")  # which reads any bytes
    distinct = sorted(set(names))[:500]
    for page in _CODE_PAGES:
        texts = [_decoded(name, page) for name in names]
        if None in texts:
            continue
        cost = sum(_cost(name.decode(page), page) for name in distinct)
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


def _script(char: str) -> str:
    name = unicodedata.name(char, "NONE").split()[0]
    if name in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"):
        return "KANA"
    return "HAN" if name == "CJK" else name


def _cost_of_latin(word: str) -> float:
    accents = [not char.isascii() and char != "ı" for char in word]
    beside = sum(one and other for one, other in itertools.pairwise(accents))
    alone = 2.0 * len(word) if all(accents) and len(word) > 1 else 0.0
    return alone + 1.5 * beside


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
    return 0.0 if script == "KANA" else 0.3


def _cost_of_han(char: str, page: str) -> float:
    lead, trail = char.encode(page)[0], char.encode(page)[-1]
    if page == "cp932":  # JIS X 0208: the first level ends with lead byte 97
        return 0.0 if char in _KANJI else 0.8 if lead < 0x98 else 2.5
    if page == "gbk":  # GB 2312: its first level is B0 to D7
        return 0.0 if char in _HANZI else 0.8 if 0xB0 <= lead <= 0xD7 and trail >= 0xA1 else 2.5
    if page == "big5":
        return 0.0 if char in _HANZI else 0.8 if 0xA4 <= lead <= 0xC6 else 2.5
    return 2.5  # Korean names are rarely written with them
