"""The playground: it draws with the embedded model, in the library and through its page, before and after."""

import importlib.util
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.errors import CheckpointError, FastSDError, ModelError, SessionError, SettingsError
from fastsd_helpers.playground import Artist, open_artist, open_playground
from fastsd_helpers.registry import find_model
from fastsd_helpers.sessions import Session


class Painter:
    """A pipeline that is asked the way diffusers' own are; it paints the seed. The real one is in the slow tests."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(self, prompt: str, **options: Any) -> Any:
        from PIL import Image

        self.asked.append({"prompt": prompt, **options})
        picture = Image.new(
            "RGB", (options["width"], options["height"]), (options["generator"].initial_seed() % 256, 0, 0)
        )
        return type("Drawn", (), {"images": [picture]})


@pytest.fixture
def artist() -> Artist:
    pytest.importorskip("torch")
    return Artist("a painter", find_model("demo"), Painter(), Painter())


def test_the_same_noise_before_and_after(artist: Artist) -> None:
    drawn = artist.draw("a red fish", seed=5, steps=3, negative="blue")
    assert [title for title, _ in drawn] == ["before", "after"]
    assert [picture.size for _, picture in drawn] == [(128, 128)] * 2
    for painter in (artist._before, artist._after):
        assert painter.asked[0]["generator"].initial_seed() == 5
        assert painter.asked[0]["negative_prompt"] == "blue"


@pytest.mark.parametrize("seed", [None, -1])
def test_without_a_seed_the_noise_is_another_every_time_and_is_named(artist: Artist, seed: int | None) -> None:
    titles = [[title for title, _ in artist.draw("a red fish", seed=seed, steps=3)] for _ in range(3)]
    seeds = [asked["generator"].initial_seed() for asked in artist._before.asked]
    assert seeds == [asked["generator"].initial_seed() for asked in artist._after.asked], "before and after the same"
    assert len(set(seeds)) == 3
    assert titles == [[f"before, seed {one}", f"after, seed {one}"] for one in seeds]
    artist.draw("a red fish", seed=seeds[0], steps=3)
    assert artist._after.asked[-1]["generator"].initial_seed() == seeds[0], "it can be asked for again"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 100}, "size is 100; it must be 64 to 256 and a multiple of 8"),
        ({"size": 512}, "size is 512"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": 2**63}, f"seed is {2**63}; it must be 0 to 2**63 - 1, or -1"),
        ({"seed": -2}, "seed is -2"),
        ({"strength": 0}, "strength is 0"),
        ({"control_strength": 3}, "control_strength is 3; it must be 0 to 2"),
        ({"control": "an image"}, "an image was given, but no ControlNet was chosen"),
    ],
)
def test_what_the_model_cannot_draw_is_said_so(artist: Artist, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        artist.draw("a fish", **options)
    assert said in caught.value.problem
    with pytest.raises(SettingsError, match="there is no prompt"):
        artist.draw("  ")


def test_a_session_without_a_finished_model_says_what_to_do(tmp_path: Path) -> None:
    Session.create("rex", root=tmp_path)
    with pytest.raises(SessionError) as caught:
        open_artist("rex", root=tmp_path)
    assert "fastsd dreambooth export rex" in caught.value.hint


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")])
def test_of_several_finished_models_of_a_session_the_newest_is_drawn_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]
) -> None:
    """The conversion of the file that was chosen is where this ends: loading it is in a slow test."""
    pytest.importorskip("torch")
    session = Session.create("rex", root=tmp_path)
    session.save(base_model={"ref": "demo"})
    session.exports.mkdir(exist_ok=True)
    for age, name in enumerate(order):
        path = session.exports / f"{name}.safetensors"
        path.write_bytes(b"no model at all, which is said of the file that was taken")
        os.utime(path, (1e9 + 60 * age, 1e9 + 60 * age))
        with pytest.raises(CheckpointError, match=rf"{name}\.safetensors"):
            open_artist("rex", root=tmp_path)


def test_a_model_that_does_not_exist_is_said_so() -> None:
    with pytest.raises(FastSDError):
        open_artist("no-such-model")


def test_the_page_draws_and_closes(artist: Artist) -> None:
    if importlib.util.find_spec("gradio") is None:
        pytest.skip("gradio is not installed (pip install gradio)")
    import urllib.error
    import urllib.request

    with open_playground(artist=artist) as page:
        assert page.url.startswith("http://127.0.0.1:")
        assert page.block() == f"Link:      {page.url}"
        words = ["a fish", "", 7, 2, 128, 7.5, None, 0.6, None, 1, None, False, 1]
        request = urllib.request.Request(
            f"{page.url}gradio_api/call/draw",
            data=json.dumps({"data": words}).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{page.url}gradio_api/call/draw/{event}", timeout=60) as answer:
            text = answer.read().decode()
        assert "event: complete" in text
        assert [item["caption"] for item in json.loads(text.split("data: ", 1)[1])[0]] == ["before", "after"]
        assert not page.wait(0)
    assert page.wait(0)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(page.url, timeout=2)


@pytest.mark.numeric
@pytest.mark.slow
def test_the_embedded_model_draws_and_starts_from_a_picture() -> None:
    pytest.importorskip("diffusers")
    artist = open_artist()
    [(title, picture)] = artist.draw("a red fish", steps=3)
    assert title == "the demo model"
    assert picture.size == (128, 128)
    assert len(set(picture.getdata())) > 100
    [(_, again)] = artist.draw("a red fish", steps=3)
    assert again.tobytes() == picture.tobytes(), "a seed is an image"
    [(_, other)] = artist.draw("a blue house", steps=4, start=picture, strength=0.5)
    assert other.tobytes() != picture.tobytes()


@pytest.mark.numeric
@pytest.mark.slow
def test_a_session_draws_with_its_base_and_with_what_it_learned(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fastsd_helpers.checkpoints import convert
    from fastsd_helpers.model_lookup import fetch_model

    session = Session.create("rex", root=tmp_path)
    session.save(base_model={"ref": "demo"})
    session.exports.mkdir(exist_ok=True)
    convert(fetch_model("demo"), session.exports / "rex.safetensors")
    artist = open_artist(str(session.folder))
    before, after = (picture for _, picture in artist.draw("a fish", steps=2, seed=3))
    # Nothing was learned here: both must be the same picture, or the way through the file has changed the weights.
    assert before.tobytes() == after.tobytes()


def test_a_lora_is_for_a_model_not_for_a_session(tmp_path: Path) -> None:
    Session.create("rex", root=tmp_path)
    with pytest.raises(SettingsError, match="this is a session"):
        open_artist("rex", lora="x.safetensors", root=tmp_path)


def test_two_visitors_draw_one_after_the_other(artist: Artist) -> None:
    working, most = [], []

    class Slow(Painter):
        def __call__(self, prompt: str, **options: Any) -> Any:
            working.append(1)
            most.append(len(working))
            threading.Event().wait(0.05)
            working.pop()
            return super().__call__(prompt, **options)

    artist._after = artist._before = Slow()
    threads = [threading.Thread(target=artist.draw, args=("a fish",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1


@pytest.mark.slow
def test_a_damaged_folder_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fastsd_helpers.model_lookup import fetch_model

    folder = tmp_path / "model"
    shutil.copytree(fetch_model("demo"), folder)
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ModelError):
        open_artist(str(folder))


# ------------------------------------------------------------------------------------------- LoRA and ControlNet


@pytest.fixture(scope="module")
def demo_pipe() -> Any:
    pytest.importorskip("diffusers")
    from fastsd_helpers.playground.loading import load_pipeline

    return load_pipeline(find_demo())


def find_demo() -> Path:
    from fastsd_helpers.model_lookup import fetch_model

    return fetch_model("demo")


def a_controlnet(pipe: Any) -> Any:
    """One of the demo's shape, whose outputs are not the zeros that training begins with."""
    import torch
    from diffusers import ControlNetModel

    made = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96, 256))
    torch.manual_seed(1)
    for name, value in made.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(value, std=0.02)
    return made


@pytest.mark.numeric
@pytest.mark.slow
def test_a_controlnet_steers_with_and_without_a_picture_to_begin_with(demo_pipe: Any, tmp_path: Path) -> None:
    from PIL import Image, ImageDraw

    a_controlnet(demo_pipe).save_pretrained(tmp_path / "net")
    artist = open_artist(controlnet=str(tmp_path / "net"))
    assert artist.steering.tasks == ("net",)
    photo = Image.new("RGB", (200, 200), "white")
    ImageDraw.Draw(photo).rectangle((50, 50, 150, 150), fill="black")
    drawn = {}
    for name, more in {
        "plain": {},
        "steered": {"control": photo},
        "weakly": {"control": photo, "control_strength": 0.0},
        "by edges": {"control": photo, "edges": True},
        "from an image": {"start": photo},
        "both": {"start": photo, "control": photo},
    }.items():
        [(_, picture)] = artist.draw("a red fish", steps=2, **more)
        drawn[name] = picture.tobytes()
    assert drawn["weakly"] == drawn["plain"], "a strength of 0 steers nothing"
    assert len(set(drawn.values())) == 5, "everything else is another image"


@pytest.mark.slow
def test_a_controlnet_of_another_shape_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from diffusers import ControlNetModel

    other = ControlNetModel(
        block_out_channels=(32, 32, 32, 32), cross_attention_dim=16, attention_head_dim=2, layers_per_block=1
    )
    other.save_pretrained(tmp_path / "net")
    with pytest.raises(ModelError, match="it expects text embeddings of width 16, and this model has 96") as caught:
        open_artist(controlnet=str(tmp_path / "net"))
    assert "fastsd controlnet list" in caught.value.hint
    (tmp_path / "net.safetensors").write_bytes((tmp_path / "net" / "diffusion_pytorch_model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="does not fit this model"):
        open_artist(controlnet=str(tmp_path / "net.safetensors"))
    with pytest.raises(FastSDError, match="No ControlNet for 'cany'") as caught:
        open_artist(controlnet="cany")
    assert "Did you mean 'canny'?" in caught.value.hint


@pytest.mark.numeric
@pytest.mark.slow
def test_a_lora_changes_the_picture_as_strongly_as_it_is_asked_to(demo_pipe: Any, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    import torch
    from safetensors.torch import save_file

    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    width_out, width_in = demo_pipe.unet.get_submodule(layer).weight.shape
    torch.manual_seed(2)
    tensors = {
        f"unet.{layer}.lora_A.weight": torch.randn(4, width_in),
        f"unet.{layer}.lora_B.weight": torch.randn(width_out, 4),
    }
    save_file(tensors, tmp_path / "new.safetensors")
    pictures = [
        open_artist(lora=str(tmp_path / "new.safetensors"), lora_strength=strength).draw("a red fish", steps=2)[0][1]
        for strength in (0.0, 1.0)
    ]
    [(_, plain)] = open_artist().draw("a red fish", steps=2)
    assert pictures[0].tobytes() == plain.tobytes()
    assert pictures[1].tobytes() != plain.tobytes()


def test_a_tokenizer_that_an_old_sentencepiece_would_read_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.metadata
    import shutil

    shutil.copytree(find_demo(), tmp_path / "model")
    (tmp_path / "model" / "tokenizer_2").mkdir()
    (tmp_path / "model" / "tokenizer_2" / "spiece.model").write_bytes(b"made up")
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.2.0" if name == "sentencepiece" else real(name))
    with pytest.raises(ModelError, match=r"spiece\.model .* is read by sentencepiece 0\.2\.0"):
        open_artist(str(tmp_path / "model"))
