"""Names in zips: what the zip says, else UTF-8, else the code page in which all of them make the most sense."""

import io
import struct
import unicodedata
import zipfile
import zlib

import pytest

from fastsd_helpers.names.zips import ZipNames, read_names


def zip_with(names: list[bytes], *, flag: int = 0, extra: bytes = b"") -> list[zipfile.ZipInfo]:
    """The members of a zip whose names are these bytes, as other programs write them."""
    local, central = b"", b""
    for name in names:
        head = struct.pack("<5H3L2H", 20, flag, 0, 0, 33, zlib.crc32(b""), 0, 0, len(name), len(extra))
        place = len(local)
        local += b"PK\3\4" + head + name + extra
        central += b"PK\1\2" + struct.pack("<H", 20) + head + struct.pack("<3H2L", 0, 0, 0, 0, place) + name + extra
    end = b"PK\5\6" + struct.pack("<4H2LH", 0, 0, len(names), len(names), len(central), len(local), 0)
    with zipfile.ZipFile(io.BytesIO(local + central + end)) as archive:
        return archive.infolist()


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("cp866", "собака"),
        ("cp866", "Мой кот"),
        ("cp866", "ёжик в лесу"),
        ("cp1251", "щенок на даче"),
        ("cp932", "犬"),
        ("cp932", "ソファの猫"),  # its first letter ends with a backslash
        ("cp932", "太郎と花子"),
        ("gbk", "小狗"),
        ("gbk", "全家福"),
        ("cp949", "강아지"),
        ("cp949", "우리집 고양이"),
        ("big5", "我的貓"),
        ("cp850", "Zoë Hündchen"),
        ("cp850", "été à la plage"),
        ("cp1252", "Hündin"),
        ("cp852", "żółty pies"),
        ("cp857", "köpek yavrusu güneş ışığı"),
        ("cp1253", "σκύλος"),
        ("cp862", "תמונה"),
    ],
)
@pytest.mark.parametrize("folder", ["", "photos/"])
def test_the_code_page_of_another_system_is_found_and_said(page: str, text: str, folder: str) -> None:
    wanted = [f"{folder}{text} ({number}).png" for number in (1, 2, 3)]
    found = read_names(zip_with([name.encode(page) for name in wanted]))
    assert list(found.names) == wanted
    assert found.code_page is not None
    assert f"for example '{text} (1).png'" in str(found.line("a.zip"))
    assert read_names(zip_with([name.encode(page) for name in wanted])) == found, "always the same"


def test_all_names_of_a_zip_are_read_alike() -> None:
    # "犬" alone could be two letters of several code pages; beside the others it cannot.
    names = ["犬 (1).png", "我が家の犬.png", "plain.png", "海/写真.png"]
    assert list(read_names(zip_with([name.encode("cp932") for name in names])).names) == names


def test_utf_8_needs_no_flag_and_accents_are_composed() -> None:
    name = "Zoë Hündin (1).png"
    apart = unicodedata.normalize("NFD", name)
    assert read_names(zip_with([apart.encode()])) == ZipNames((name,))
    assert read_names(zip_with([apart.encode()], flag=0x800)) == ZipNames((name,))
    assert read_names(zip_with(["犬/собака.png".encode()])).line("a.zip") is None


def test_a_name_in_the_unicode_field_wins_where_it_is_of_this_name() -> None:
    plain, name = "собака.png".encode("cp866"), "собака.png"
    data = b"\1" + struct.pack("<L", zlib.crc32(plain)) + name.encode()
    assert read_names(zip_with([plain], extra=struct.pack("<2H", 0x7075, len(data)) + data)) == ZipNames((name,))
    other = b"\1" + struct.pack("<L", 1) + b"evil.png"
    found = read_names(zip_with([plain], extra=struct.pack("<2H", 0x7075, len(other)) + other))
    assert (found.names, found.code_page) == ((name,), "cp866")


def test_bytes_that_are_no_letters_anywhere_still_give_names() -> None:
    found = read_names(zip_with([b"\xff\xfe\x81.png", b"\x00\x01.png"]))
    assert len(found.names) == 2
