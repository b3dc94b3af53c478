"""The words in photos' names: what changes from photo to photo is a count, what stays is a word."""

from typing import Any

import pytest

from fastsd_helpers.captions.photo_names import folder_words, name_photos, repeats_in
from fastsd_helpers.captions.prompts import words_of
from fastsd_helpers.dreambooth.photos.image_names import safe_stem, unique_stem


def words(*names: str) -> list[str]:
    return [photo.words for photo in name_photos(names)]


COUNTED: Any = """rex{}|rex0{}|rex-{}|rex_00{}|rex ({})|rex.{}|rex({})|rex #{}|rex_{}_crop|{} rex|0{}_rex|2024010{}_rex
|rex IMG_123{}|IMG_123{} rex|DSC_000{} rex|rex 2024-05-0{}|rex2024-05-0{}|rex_2024050{}_12000{}|rex - {}|rex [{}]
|rex (copy {})|rex - Copy ({})|Kopie von rex ({})|rex – Kopie ({})|Copy of rex {}|resized_rex_{}|cropped-rex-{}
|rex_v{}|rex no. {}|rex_frame_000{}|rex-removebg-preview ({})|rex_800x60{}_{}|rex {}a|p101000{} rex|rex{} (1)"""
COUNTED = COUNTED.replace("\n", "").split("|")


@pytest.mark.parametrize("pattern", COUNTED)
def test_names_that_are_the_same_but_for_a_number_have_the_same_words(pattern: str) -> None:
    names = [f"{pattern.replace('{}', str(number))}.jpg" for number in range(1, 7)]
    assert words(*names) == ["rex"] * 6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("r2d2 {}", "r2d2"),
        ("r2d2_{}", "r2d2"),
        ("7up {}", "7up"),
        ("7up{}", "7up"),
        ("canon eos 5d {}", "canon eos 5d"),
        ("c3po{}", "c3po"),
        ("u2 {}", "u2"),
        ("porsche 911 turbo {}", "porsche 911 turbo"),
        ("mustang 1967 ({})", "mustang 1967"),
        ("blade runner 2049 0{}", "blade runner 2049"),
        ("1984 poster {}", "1984 poster"),
        ("iPhone 15 ({})", "iPhone 15"),
        ("rex and 3 cats {}", "rex and 3 cats"),
        ("agent 47_{}", "agent 47"),
        ("a photo of sks dog {}", "a photo of sks dog"),
        ("DALL·E 2024-01-0{} 12.00.00 - a dog", "a dog"),
        ("собака{}", "собака"),
        ("犬{}", "犬"),
        ("강아지 ({})", "강아지"),
        ("crop top ({})", "crop top"),
        ("mr. dog {}", "mr. dog"),
    ],
)
def test_a_number_that_stays_the_same_is_a_part_of_the_words(name: str, said: str) -> None:
    assert words(*(f"{name.format(number)}.png" for number in range(1, 5))) == [said] * 4


@pytest.mark.parametrize(
    "name", ["7up.jpg", "canon eos 5d.jpg", "mustang 1967.jpg", "agent 47.jpg", "r2d2 (4) (1).jpg"]
)
def test_the_number_of_a_name_that_stands_alone_is_kept(name: str) -> None:
    assert words(name) == [words_of(name)]


def test_several_photos_of_each_number_are_several_subjects() -> None:
    two = ["agent 47", "agent 47", "agent 48", "agent 48"]
    assert words("agent 47 (1).jpg", "agent 47 (2).jpg", "agent 48 (1).jpg", "agent 48 (2).jpg") == two
    assert words("agent 47_1.jpg", "agent 47_2.jpg", "agent 48_1.jpg", "agent 48_2.jpg") == two
    assert words("user01 (1).jpg", "user01 (2).jpg", "user02 (1).jpg", "user02 (2).jpg")[::2] == ["user01", "user02"]


def test_one_set_in_several_spellings_has_one_prompt() -> None:
    assert words("Rex1.jpg", "rex2.jpg", "rex_3.jpg", "rex-04.jpg", "rex (5).jpg", "rex.jpg") == ["rex"] * 6
    assert words("7up.jpg", "7up 2.jpg") == ["7up", "7up"]
    assert words("rex.jpg", "max2.jpg") == ["rex", "max2"]


NOTHING = """IMG_{:04d}|DSC0{}|DSC_000{}|PXL_2024010{}_120000123.PORTRAIT|IMG-2024010{}-WA0001|IMG_E{}234|img{}|image{}
|000{}|{}|Image ({})|Foto {}|изображение {}|写真{}|Immagine {}|사진 ({})|photo_{}_2024-01-01_12-00-00|FB_IMG_15{}
|Snapchat-12345{}|Screenshot 2024-01-0{} at 12.00.00|Bildschirmfoto 2024-01-0{}|스크린샷 2024-01-0{}
|Captura de pantalla 2024-01-0{}|Capture d’écran 2024-01-0{}|Schermata 2024-01-0{} alle 12.00.00
|Снимок экрана 2024-01-0{} в 12.00.00|スクリーンショット 2024-01-0{} 12.00.00|截屏2024-01-0{}|download ({})|unnamed ({})
|tmp_abc{}|RemovedBg_{}|ComfyUI_0000{}_|0000{}-1234567|IMG_000{}_heic|photo web {}|GOPR000{}|Unbenannt-{}
|WhatsApp Bild 2024-01-0{} um 12.00.00|signal-2024-01-0{}-120000""".replace("\n", "").split("|")


@pytest.mark.parametrize("pattern", NOTHING)
def test_names_of_cameras_programs_and_screens_are_no_prompts_in_any_language(pattern: str) -> None:
    assert words(*(f"{pattern.format(number)}.png" for number in range(1, 7))) == [""] * 6


def test_a_folder_a_subject_gives_its_words_where_the_names_say_nothing() -> None:
    names = ["zib dog/IMG_0001.png", "zob cat/IMG_0001.png", "zob cat/on a sofa.png", "train/10_zib dog/2.png"]
    found = name_photos(names)
    assert [photo.words for photo in found] == ["zib dog", "zob cat", "on a sofa", "zib dog"]
    assert [photo.folder for photo in found] == [True, True, False, True]
    assert repeats_in(names) == {"10_zib dog": 10}
    for folder in ("photos", "train", "DCIM/100APPLE", "New folder (2)", "2024-05-01", "my photos", "512"):
        assert folder_words(f"{folder}/IMG_1.jpg") == "", folder


def test_what_a_pictures_file_is_called_says_the_same_where_its_record_is_lost() -> None:
    names = ["rex1.jpg", "rex2.jpg", "IMG_1.jpg", "zib dog/IMG_1.jpg", "agent 47_1.jpg", "agent 47_2.jpg", "写真1.jpg"]
    for photo in name_photos(names):
        assert words_of(f"{photo.stem}.png") == photo.words


def test_the_notebooks_convention_holds_for_stems_without_endings() -> None:
    taken: set[str] = set()
    named = name_photos(["rex1.png", "rex2.png", "01_rex.png", "agent 47.png"])
    stems = [unique_stem(safe_stem(photo.stem), taken) for photo in named]
    assert len({stem.casefold() for stem in stems}) == 4
    assert [words_of(f"{stem}.png") for stem in stems] == ["rex", "rex", "rex", "agent 47"]


@pytest.mark.parametrize(
    "part", ["a (", " ", "_", "-", "copy", " copy", "1_", "2024-01-01 ", "-crop", "12:", "no.", "("]
)
def test_names_made_of_nothing_but_separators_and_marks_take_no_time(part: str) -> None:
    names = [f"a{part * 60}b{number}.png" for number in (1, 2)]  # would take minutes where a pattern tries all ways
    assert len(name_photos(names)) == 2
