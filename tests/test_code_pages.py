"""Texts that do not say in which letters they are written: guessed together, said with an example, UTF-8 first."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig, prepare
from fastsd_helpers.dreambooth.photos.browser_uploads import save_uploads
from fastsd_helpers.dreambooth.photos.caption_tables import read_caption_table
from fastsd_helpers.names.code_pages import decode_text, guess_page
from fastsd_helpers.sessions import Session

TEXTS = [
    ("cp1251", "собака на траве"),
    ("cp1251", "пёс"),
    ("cp1251", "кіт спить на дивані"),
    ("koi8-r", "кот спит на диване, вид сбоку"),
    ("cp866", "портрет женщины"),
    ("cp1252", "un café – crème brûlée, l’été"),
    ("cp1252", "é"),
    ("latin-1", "el niño en la montaña"),
    ("cp1250", "žlutý kůň na louce"),
    ("cp1250", "macska az ágyon, szőke nő"),
    ("iso8859-2", "pies śpi na łóżku, Šárka"),
    ("cp1254", "köpek çimenlerin üzerinde, güneşli bir gün"),
    ("cp1253", "ένας σκύλος στο γρασίδι"),
    ("cp1255", "כלב על הדשא"),
    ("cp1256", "كلب على العشب"),
    ("cp932", "赤い帽子の女の子"),
    ("euc-jp", "犬が草の上に座っている"),
    ("gbk", "一只狗在草地上"),
    ("big5", "紅色的小貓在睡覺"),
    ("cp949", "잔디 위의 강아지"),
    ("cp874", "สุนัขบนหญ้า"),
]


@pytest.mark.parametrize(("page", "text"), TEXTS)
def test_a_text_is_read_in_the_code_page_in_which_it_makes_sense(page: str, text: str) -> None:
    data = text.encode(page)
    assert decode_text(data) == text
    guess = guess_page([b"a dog", data])
    assert guess is not None
    assert guess.line("a.txt is").startswith("a.txt is not UTF-8, and read as ")
    assert text[:30] in guess.line("a.txt is")


@pytest.mark.parametrize("text", ["a dog", "собака", "犬", "naïve 🐕", ""])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_is_never_guessed_at(text: str, encoding: str) -> None:
    assert guess_page([text.encode(encoding)]) is None
    assert decode_text(text.encode(encoding)) == text


def test_utf8_with_a_broken_letter_stays_utf8_and_lists_without_foreign_letters_need_no_guess() -> None:
    data = "собака на траве".encode()
    assert guess_page([data[:-1]]) is None
    assert decode_text(data[:-1]) == "собака на трав\ufffd"
    assert guess_page([]) is None
    assert guess_page([b"", b"a dog\r\n"]) is None


def test_any_bytes_are_read_as_something() -> None:
    assert len(decode_text(bytes(range(128, 256)))) > 100
    assert decode_text(b"caf\xe9 \x81").startswith("café ")


def photos_in(folder: Path, captions: dict[str, bytes]) -> None:
    folder.mkdir()
    for seed, (name, words) in enumerate(captions.items()):
        noise = np.random.default_rng(seed).integers(0, 255, (80, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
        if words:
            (folder / f"{name}.txt").write_bytes(words)


def prompts_of(session: Session) -> set[str]:
    return {image["prompt"] for image in session.record["dataset"]["images"]}


def test_captions_of_a_folder_are_judged_together_and_the_guess_is_in_the_report(tmp_path: Path) -> None:
    captions = {"a": "пёс на траве", "b": "кот", "c": "дом у реки"}
    photos_in(tmp_path / "photos", {name: words.encode("cp1251") for name, words in captions.items()})
    session = Session.create("rex", root=tmp_path / "root")
    report = prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64), session)
    written = {path.read_text(encoding="utf-8").strip() for path in session.captions.glob("*.txt")}
    assert written == set(captions.values())
    said = [line for line in report.lines() if "cp1251" in line]
    assert len(said) == 1
    assert said[0].startswith("Captions are not UTF-8, and read as Cyrillic (cp1251), for example ")


@pytest.mark.parametrize(("name", "table"), [
    ("metadata.csv", "file_name;text\na.png;рыжий кот на окне\nb.png;дом"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "рыжий кот на окне"}\n{"file_name": "b.png", "text": "дом"}'),
])  # fmt: skip
def test_a_table_of_captions_is_read_in_its_code_page_and_it_is_said(tmp_path: Path, name: str, table: str) -> None:
    photos_in(tmp_path / "photos", {"a": b"", "b": b""})
    (tmp_path / "photos" / name).write_bytes(table.encode("cp1251"))
    assert read_caption_table(name, table.encode("cp1251")) == {"a.png": "рыжий кот на окне", "b.png": "дом"}
    session = Session.create("rex", root=tmp_path / "root")
    report = prepare(PrepareConfig(images=str(tmp_path / "photos"), size=64), session)
    assert {path.read_text(encoding="utf-8").strip() for path in session.captions.glob("*.txt")} == {
        "рыжий кот на окне", "дом",
    }  # fmt: skip
    assert any(line.startswith(f"{name} is not UTF-8, and read as Cyrillic") for line in report.lines())


def test_captions_that_are_uploaded_together_are_judged_together_and_kept_as_utf8(tmp_path: Path) -> None:
    photos_in(tmp_path / "photos", {"a": b"", "b": b""})
    session = Session.create("rex", root=tmp_path / "root")
    files = [(path.name, path.read_bytes()) for path in (tmp_path / "photos").iterdir()]
    captions = [("a.txt", "犬".encode("cp932")), ("b.txt", "赤い帽子の女の子".encode("cp932"))]
    report = save_uploads(session, [*files, *captions])
    assert (session.folder / "uploads" / "a.txt").read_text(encoding="utf-8").strip() == "犬"
    assert sum("read as Japanese (cp932)" in line for line in report.lines()) == 1
