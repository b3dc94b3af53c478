"""Captions: words of file names, the order in which a prompt is chosen, and .txt files of any origin."""

import os
from pathlib import Path

import pytest

from fastsd_helpers.captions import prompts
from fastsd_helpers.captions.prompts import decode_caption, read_caption, resolve_prompt, words_of, write_caption
from fastsd_helpers.errors import DatasetError, DriveError, ModelNotFound, WrongFamily


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
        ("zib – the café’s “best”".encode("cp1252"), "zib – the café’s “best”"),
        (b" \r\n\t", None),
        (b"", None),
    ],
)
def test_captions_are_read_in_the_encodings_editors_write(data: bytes, text: str | None) -> None:
    assert decode_caption(data) == text


@pytest.mark.parametrize("data", [b"\x89PNG\0\0\0", b"a" * 70_000])
def test_a_file_that_is_no_caption_is_refused_with_its_name(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "dog.txt").write_bytes(data)
    with pytest.raises(DatasetError, match=r"dog\.txt is not a caption"):
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


# ------------------------------------------------------------------------------------------------ automatic


def make_captioner(folder: Path) -> Path:
    """The real BLIP classes at small widths with random weights, saved as the published model is."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog", "cat", "on", "the", "couch"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={
            **text,
            "vocab_size": len(words),
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
            "projection_dim": 16,
            "encoder_hidden_size": 16,
        },
        vision_config={**text, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    images = getattr(transformers, "BlipImageProcessorPil", None) or transformers.BlipImageProcessor
    images(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_pictures_are_described_by_a_real_blip_model(tmp_path: Path) -> None:
    from PIL import Image

    model = make_captioner(tmp_path / "blip")
    paths = []
    for name, mode in (("a.png", "RGB"), ("b.png", "L")):
        paths.append(tmp_path / name)
        Image.new(mode, (40, 30), 120).save(paths[-1])
    first = list(prompts.describe_pictures(paths, model=str(model)))
    assert first == list(prompts.describe_pictures(paths, model=str(model)))
    assert len(first) == 2
    known = {"[UNK]", "[MASK]", "[ENC]", "a", "dog", "cat", "on", "the", "couch"}
    assert all(set(words.split()) <= known for words in first), first


def test_a_model_that_is_no_captioner_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.CLIPTextConfig().save_pretrained(tmp_path / "clip")
    with pytest.raises(WrongFamily, match="clip_text_model model, not a BLIP"):
        list(prompts.describe_pictures([], model=str(tmp_path / "clip")))
    with pytest.raises(ModelNotFound, match=r"No captioning model .*: there is no folder of that name") as caught:
        list(prompts.describe_pictures([], model=str(tmp_path / "nothing")))
    assert prompts.DEFAULT_CAPTIONER in caught.value.hint


@pytest.mark.parametrize(
    ("description", "subject", "caption"),
    [
        ("a brown dog on a couch", "zib dog", "a brown zib dog on a couch"),
        ("two dogs and a Dog", "zib dog", "two dogs and a zib dog"),
        ("a couch", "zib dog", "zib dog, a couch"),
        ("", "zib dog", "zib dog"),
        ("a c++ book", "my c++", "my c++, a c++ book"),
        ("a couch", "", "a couch"),
    ],
)
def test_the_subjects_name_takes_the_place_of_its_kind(description: str, subject: str, caption: str) -> None:
    assert prompts.name_subject(description, subject) == caption


def test_only_pictures_without_a_caption_are_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numpy")
    from dreambooth_runs import make_session

    from fastsd_helpers.dreambooth.dataset import captioning
    from fastsd_helpers.dreambooth.dataset.prepared import prompt_table

    session = make_session(tmp_path, photos=2, held_out=0)
    names = [row.image for row in prompt_table(session)]
    prompts.write_caption(session.captions / f"{Path(names[0]).stem}.txt", "my own words")
    model = make_captioner(tmp_path / "blip")
    written = captioning.caption_pictures(session, model=str(model))
    assert [path.stem for path in written] == [Path(names[1]).stem]
    first, second = prompt_table(session)
    assert first.prompt == "my own words"
    assert "zib robot" in second.prompt
    assert captioning.caption_pictures(session, model="no/model-is-opened-when-there-is-nothing-to-do") == []


def test_a_pipe_in_a_captions_place_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "dog.txt")
    with pytest.raises(DatasetError, match="is not a caption: it is not an ordinary file"):
        read_caption(tmp_path / "dog.txt")
