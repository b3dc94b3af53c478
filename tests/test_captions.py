"""Captions: words of file names, the order in which a prompt is chosen, and .txt files of any origin."""

from pathlib import Path

import pytest

from fastsd_helpers.captions import decode_caption, read_caption, resolve_prompt, words_of, write_caption
from fastsd_helpers.errors import DatasetError, DriveError


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sks_dog (3).jpg", "sks dog"),
        ("user01 (1).jpg", "user01"),
        ("tok-(1).jpg", "tok"),
        ("photos/sub/sks dog.PNG", "sks dog"),
        ("C:\\photos\\sks dog.png", "sks dog"),
        ("agent 47 (2).jpg", "agent 47"),
        ("r2d2 (4) (1).png", "r2d2"),
        ("sks dog - Copy.jpg", "sks dog"),
        ("photo of a sks dog.jpg", "photo of a sks dog"),
        ("mr. dog.jpg", "mr. dog"),
        ("sam (1).jpg", "sam"),
        ("été_chat (1).jpg", "été chat"),
        ("猫 (2).jpg", "猫"),
        ("deadbeef.jpg", "deadbeef"),
        ("my cat IMG_1234.jpg", "my cat IMG 1234"),
    ],
)
def test_words_come_from_the_file_name_with_digits_kept(name: str, words: str) -> None:
    assert words_of(name) == words


@pytest.mark.parametrize(
    "name",
    """IMG_1234.HEIC|IMG_1234 (2).jpg|IMG_E1234.JPG|IMG-20200101-WA0001.jpg|DSC0001.JPG|_DSC1234.jpg|DSC_0001.jpg
    |P1010001.JPG|PXL_20240101_120000123.MP.jpg|20240101_120000.jpg|2024-01-01 12.00.00.jpg|00.jpg|7.png|image0.jpeg
    |image (1).png|WhatsApp Image 2024-01-01 at 12.00.00.jpeg|Screenshot 2024-05-05 at 10.00.00 AM.png
    |FB_IMG_1588888.jpg|SAM_0001.JPG|GOPR0123.JPG|DJI_0001.JPG|550e8400-e29b-41d4-a716-446655440000.png
    |d41d8cd98f00b204e9800998ecf8427e.jpg|3f2a9b1c.jpg|photo-1543466835-00a7907e9de1.jpg|alvan-nee-brFsZ-unsplash.jpg
    |IMG_1234 - Copy.jpg|untitled.png""".replace("\n", "")
    .replace("    ", "")
    .split("|"),
)
def test_names_given_by_cameras_and_programs_have_no_words(name: str) -> None:
    assert words_of(name) == ""


def test_a_prompt_is_caption_then_instance_prompt_then_file_name_then_session() -> None:
    chosen = {"instance_prompt": "photo of sks dog", "session_name": "my_dog"}
    assert resolve_prompt("tok (1).png", " a dog\n on grass ", **chosen) == "a dog on grass"
    assert resolve_prompt("tok (1).png", None, **chosen) == "photo of sks dog"
    assert resolve_prompt("tok (1).png", "", **chosen | {"instance_prompt": None}) == "tok"
    assert resolve_prompt("tok (1).png", "", **chosen | {"instance_prompt": "  "}) == "tok"
    assert resolve_prompt("IMG_1.png", None, **chosen | {"instance_prompt": None}) == "my dog"
    assert resolve_prompt("IMG_1.png", None, instance_prompt=None, session_name="007") == "007"


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("un café".encode(), "un café"),
        (b"\xef\xbb\xbfa dog\r\n", "a dog"),
        ("un café".encode("latin-1"), "un café"),
        ("un café".encode("utf-16"), "un café"),
        (b" \r\n\t", None),
        (b"", None),
    ],
)
def test_captions_are_read_in_the_encodings_editors_write(data: bytes, text: str | None) -> None:
    assert decode_caption(data) == text


@pytest.mark.parametrize("data", [b"\x89PNG\0\0\0", b"a" * 70_000])
def test_a_file_that_is_no_caption_is_refused_with_its_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "dog.txt").write_bytes(data)
    with pytest.raises(DatasetError, match=r"dog\.txt is no caption"):
        read_caption(tmp_path / "dog.txt")


def test_a_caption_is_written_whole_read_back_and_removed_when_empty(tmp_path: Path) -> None:
    path = tmp_path / "dog.txt"
    assert read_caption(path) is None
    write_caption(path, "a  dög ")
    assert path.read_bytes() == "a dög\n".encode()
    assert read_caption(path) == "a dög"
    write_caption(path, "")
    assert not list(tmp_path.glob("*.txt"))
    write_caption(path, None)  # removing what is not there is no mistake


def test_a_caption_for_a_folder_that_is_gone_is_a_drive_error(tmp_path: Path) -> None:
    with pytest.raises(DriveError, match="gone"):
        write_caption(tmp_path / "gone" / "dog.txt", "a dog")
