"""What is said before a training begins, and class images of a user's own."""

import hashlib
import io
import random
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
from installed import require_installed

pytest.importorskip("torch")

from dreambooth_runs import config_for, learned, same, stop_at
from PIL import Image

from fastsd_helpers.dreambooth import prepare, train
from fastsd_helpers.dreambooth.dataset.advice import least_tokens, long_prompts_line
from fastsd_helpers.dreambooth.dataset.prepared import recorded_images
from fastsd_helpers.dreambooth.dataset.preparing import PrepareConfig
from fastsd_helpers.dreambooth.prior.own_class_images import OwnClassPictures
from fastsd_helpers.dreambooth.running import engine
from fastsd_helpers.errors import DatasetError, Interrupted, SettingsError
from fastsd_helpers.sessions import Session

require_installed("diffusers")

LONG = "zib robot, " + ", ".join(f"detail number {number} of the scene" for number in range(40))


def first_lines(config: Any, session: Session) -> list[str]:
    """What `train` says before it loads anything: a plan says the same, and trains nothing."""
    said: list[str] = []
    report = engine.log_progress
    engine.log_progress = lambda progress: said.append(progress.message)
    try:
        engine.plan(config, session)
    finally:
        engine.log_progress = report
    return said


@pytest.mark.parametrize(
    ("prompt", "least"),
    [("a dog", 4), ("zib dog's ball, 42!", 10), ("", 2), ("犬 собака", 4), ("a_b (c:1.3)", 12)],
)
def test_tokens_are_counted_at_the_least_without_a_tokenizer(prompt: str, least: int) -> None:
    assert least_tokens(prompt) == least


def test_the_count_is_never_above_that_of_the_real_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")
    from fastsd_helpers import demo

    tokenizer = transformers.CLIPTokenizer.from_pretrained(demo.MODEL_FOLDER, subfolder="tokenizer")
    for prompt in (LONG, "Zoë's 3 dogs & a cat_no.7 — on «the» beach", "zib zib zib 100%", "!!! ??? ..."):
        assert least_tokens(prompt) <= len(tokenizer(prompt, truncation=False)["input_ids"]), prompt


def test_prompts_that_are_cut_are_named() -> None:
    assert long_prompts_line({"a.png": "a dog", "b.png": "word " * 75}) is None
    line = long_prompts_line({"a.png": "a dog", "b.png": "word " * 76})
    assert line is not None
    assert line.startswith("1 of 2 prompts are longer than the 77 tokens")
    assert "(b.png)" in line


def test_train_says_first_what_would_not_be_used_as_it_was_meant(small_base: Path, small_session: Session) -> None:
    name = Path(recorded_images(small_session)[0]["file"]).stem
    (small_session.captions / f"{name}.txt").write_text(LONG)
    said = " ".join(
        first_lines(config_for(small_base, resolution=128, instance_prompt="a photo of zib robot"), small_session)
    )
    assert (
        f"1 of 4 prompts are longer than the 77 tokens the model reads: their ends are truncated ({name}.png)" in said
    )
    assert "prepared at 64 px and are enlarged to 128 px" in said
    assert "not used for 1 of 4 images: they have captions of their own" in said
    quiet = " ".join(first_lines(config_for(small_base), Session.open("robot", root=small_session.folder.parent)))
    assert "enlarged" not in quiet
    assert "not used" not in quiet


def test_prepare_says_it_where_it_can_be_known(small_session: Session, tmp_path: Path) -> None:
    small_session.save(settings={"resolution": 768}, base_model={"ref": "sd21-768", "sha256": None})
    folder = Path(small_session.record["dataset"]["settings"]["images"])
    (next(folder.glob("*.png")).with_suffix(".txt")).write_text(LONG)
    Image.open(next(folder.glob("*.png"))).resize((90, 60)).save(folder / "wide.png")
    notes = " ".join(prepare(PrepareConfig(images=str(folder), size=64, crop="none"), small_session).notes)
    assert "This session is trained at 768 px, and these are 64 px" in notes
    assert "prompts are longer than the 77 tokens" in notes
    assert "1 of 4 images are not square" in notes


def test_a_plan_says_which_image_is_trained_at_which_size_and_what_of_it_is_cut_off(
    small_base: Path, small_session: Session, tmp_path: Path
) -> None:
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, (name, size) in enumerate({"tall": (60, 150), "wide": (250, 60), "square": (90, 90)}.items()):
        noise = random.Random(number).randbytes(size[0] * size[1] * 3)
        Image.frombytes("RGB", size, noise).save(folder / f"zib {name}.png")
    prepare(PrepareConfig(images=str(folder), size=64, crop="none"), small_session)
    asked = config_for(small_base, resolutions="64,128", batch_size=2)
    said = first_lines(asked, small_session)
    assert "Aspect-ratio buckets: 4, and each batch is of one of them." in said
    (tall,) = [line for line in said if line.startswith("64 x 192 px, 1 image: zib tall.png (cut off: ")]
    assert sum(map(int, re.findall(r"(\d+)%", tall))) in (16, 17, 18), "60:150 has become 1:3"
    assert "128 x 128 px, 1 image: zib square.png." in said
    assert any(line.startswith("The images were prepared at 64 px and are enlarged to 128 px") for line in said)
    assert any("Fewer images than the batch size of 2 are in" in line for line in said)
    found = {(each["width"], each["height"]): each["images"] for each in engine.plan(asked, small_session).buckets}
    assert [image["image"] for image in found[64, 64]] == ["zib square.png", "zib tall.png", "zib wide.png"]
    assert [image["image"] for image in found[256, 64]] == ["zib wide.png"]
    assert found[64, 64][0]["cut"] == {}
    assert sum(found[64, 64][2]["cut"].values()) == pytest.approx(1 - 60 / 250, abs=0.02)


@pytest.mark.parametrize("sides", ["64,100", "32", "64,4096"])
def test_a_resolution_among_several_that_the_model_cannot_take_is_named(
    small_base: Path, small_session: Session, sides: str
) -> None:
    with pytest.raises(SettingsError, match=r"resolutions \(--resolutions\)"):
        engine.plan(config_for(small_base, resolutions=sides), small_session)


# ---------------------------------------------------------------------------------------- own class pictures


def dogs(folder: Path, count: int = 5, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        Image.frombytes("RGB", (90, 70), random.Random(number).randbytes(90 * 70 * 3)).save(
            folder / f"IMG_{number}.png"
        )
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("as_zip", [False, True])
def test_own_class_pictures_are_counted_and_trained_on_and_never_touched(
    small_base: Path, small_session: Session, tmp_path: Path, as_zip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = dogs(tmp_path / "dogs")
    if as_zip:
        place = Path(shutil.make_archive(str(tmp_path / "dogs"), "zip", place))
    before = content(tmp_path / "dogs")
    from fastsd_helpers.dreambooth.prior.class_images import ClassDrawing

    monkeypatch.setattr(ClassDrawing, "fill", lambda *_, **__: pytest.fail("class images were drawn"))
    settings = config_for(small_base, text_encoder_steps=0, class_prompt="a dog", class_folder=str(place))
    said: list[str] = []
    train(settings, small_session, report=lambda progress: said.append(progress.message))
    assert "5 of your own class images." in said
    assert "prior preservation, because there is a class prompt: prior_weight 1.0" in said
    assert f"class images: your own, 5 in {place}" in said
    assert content(tmp_path / "dogs") == before
    sizes = {Image.open(path).size for path in small_session.class_images.rglob("*.png")}
    assert sizes == {(64, 64)}
    weights = learned(small_session)
    # Gone on with on a machine where their folder is not: the copies are what is trained on.
    with pytest.raises(Interrupted):
        train(settings, small_session, restart=True, report=stop_at("unet", 1))
    shutil.rmtree(tmp_path / "dogs")
    (tmp_path / "dogs.zip").unlink(missing_ok=True)
    train(settings, small_session)
    assert same(learned(small_session), weights)


def test_a_photo_of_the_subject_and_what_is_no_picture_are_left_out_and_said(
    small_session: Session, tmp_path: Path
) -> None:
    place = dogs(tmp_path / "dogs")
    (place / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    photo = next(Path(small_session.record["dataset"]["settings"]["images"]).glob("*.png"))
    shutil.copy(photo, place / "me.png")
    own = OwnClassPictures(small_session, str(place), ("a dog",), size=64)
    assert own.check() == f"class images: your own, 7 in {place}"
    pictures, said = own.fill()
    assert len(pictures) == 5
    assert "Skipped the class image me.png: is one of the photos of the subject." in said
    assert any("broken.png" in line for line in said)
    assert own.check() == "class images: your own, 5 copied before"


def test_copies_that_a_mount_lost_are_made_again(small_session: Session, tmp_path: Path) -> None:
    own = OwnClassPictures(small_session, str(dogs(tmp_path / "dogs")), ("a dog",), size=64)
    first = [(image.path.name, image.prompt) for image in own.fill()[0]]
    next(own.folder.glob("*.png")).unlink()
    assert [(image.path.name, image.prompt) for image in own.fill()[0]] == first


def test_with_several_classes_the_folders_say_which_is_which(small_session: Session, tmp_path: Path) -> None:
    dogs(tmp_path / "both" / "dog", 2)
    dogs(tmp_path / "both" / "10_cat", 3, first=50)
    own = OwnClassPictures(small_session, str(tmp_path / "both"), ("a photo of a dog", "a photo of a cat"), size=64)
    prompts = sorted(image.prompt for image in own.fill()[0])
    assert prompts == ["a photo of a cat"] * 3 + ["a photo of a dog"] * 2
    dogs(tmp_path / "both", 1, first=90)
    other = OwnClassPictures(small_session, str(tmp_path / "both"), ("a photo of a dog", "a cat"), size=64)
    with pytest.raises(DatasetError, match="Which class does IMG_90"):
        other.check()


@pytest.mark.parametrize("kind", ["nowhere", "empty", "no image", "empty zip"])
def test_a_place_without_class_pictures_is_a_sentence_before_anything_is_loaded(
    small_base: Path, small_session: Session, tmp_path: Path, kind: str
) -> None:
    place = tmp_path / "place"
    if kind == "empty zip":
        place = tmp_path / "place.zip"
        data = io.BytesIO()
        zipfile.ZipFile(data, "w").close()
        place.write_bytes(data.getvalue())
    elif kind != "nowhere":
        place.mkdir()
        if kind == "no image":
            (place / "clip.mp4").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"no class images|no folder or zip"):
        first_lines(config_for(small_base, class_prompt="a dog", class_folder=str(place)), small_session)
    assert "run" not in small_session.record


def test_class_pictures_without_a_class_are_refused() -> None:
    from fastsd_helpers.dreambooth import DreamBoothConfig

    with pytest.raises(SettingsError, match=r"class_folder .* needs a class_prompt"):
        DreamBoothConfig(class_folder="dogs")


def test_what_to_put_back_is_said(small_base: Path, small_session: Session) -> None:
    with pytest.raises(Interrupted):
        train(config_for(small_base), small_session, report=stop_at("text_encoder", 1))
    name = Path(recorded_images(small_session)[0]["file"]).stem
    (small_session.captions / f"{name}.txt").write_text("other words")
    with pytest.raises(SettingsError, match=r"captions changed .*: the prompt of .* was 'zib robot' and is now 'other"):
        train(config_for(small_base), small_session)
    (small_session.captions / f"{name}.txt").unlink()
    assert train(config_for(small_base), small_session).first_step == 1
