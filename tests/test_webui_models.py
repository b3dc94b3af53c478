"""Models where web UIs look for them: every way to name one, what is kept, what is refused; files of few bytes."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

import table_models as table  # noqa: E402
from file_server import FileServer  # noqa: E402

from fastsd_helpers.errors import ModelError, ModelNotFound, WebUIError  # noqa: E402
from fastsd_helpers.options import options_of  # noqa: E402
from fastsd_helpers.sessions import Session  # noqa: E402
from fastsd_helpers.webui import find_places, find_ui, place_model  # noqa: E402
from fastsd_helpers.webui.flags import GPUS  # noqa: E402
from fastsd_helpers.webui.places import Places, prepare_places, store_folder  # noqa: E402
from fastsd_helpers.webui.placing import models  # noqa: E402
from fastsd_helpers.webui.placing.controls import ControlNetConfig, place_controlnets  # noqa: E402
from fastsd_helpers.webui.placing.models import ModelsConfig, place_models  # noqa: E402
from fastsd_helpers.webui.placing.needed import Needed, find_needed  # noqa: E402

A1111, FORGE = find_ui("a1111"), find_ui("forge-neo")


@pytest.fixture
def where(tmp_path: Path) -> dict[str, str]:
    return {"folder": str(tmp_path / "programs"), "store": str(tmp_path / "store")}


@pytest.fixture
def places(where: dict[str, str]) -> Places:
    return find_places(A1111, **where)


@pytest.fixture(scope="module")
def one_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A small checkpoint of a family, written when it is first asked for; not to be changed."""
    folder, made = tmp_path_factory.mktemp("families"), {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = table.write(folder / f"{family}.safetensors", table.original(family, "F16"))
        return made[family]

    return get


# ------------------------------------------------------------------------------------------------- settings together


def test_what_most_people_need_is_in_plain_sight_and_the_rest_folded_away() -> None:
    settings = [item for config in (ModelsConfig, ControlNetConfig) for item in options_of(config)]
    assert [(item.name, item.default, item.advanced) for item in settings] == [
        ("model", "auto", False),
        ("lora", "", False),
        ("t5", "auto", True),
        ("vae", "", True),
        ("embedding", "", True),
        ("text_encoder", "", True),
        ("upscaler", "", True),
        ("tasks", "", False),
        ("base", "auto", True),
    ]


def test_every_kind_goes_to_its_own_folder_and_the_base_model_comes_first(
    one_of: Any, places: Places, tmp_path: Path
) -> None:
    files = {}
    for name in ("one.safetensors", "two.safetensors"):
        files[name] = table.write_lora(tmp_path / name)
    files["v.safetensors"] = table.write(tmp_path / "v.safetensors", table.original("vae", "F16"))
    words = table.write(tmp_path / "words.safetensors", table.values({"emb_params": (2, 768)}))
    config = ModelsConfig(
        model=f"  {one_of('sd15')} ",
        lora=f" {files['one.safetensors']} , {files['two.safetensors']},,",
        vae=str(files["v.safetensors"]),
        embedding=str(words),
    )
    placed = place_models(config, A1111, places)
    assert [(model.path.name, model.kind, model.family, model.how) for model in placed] == [
        ("sd15.safetensors", "checkpoint", "sd15", "linked"),
        ("one.safetensors", "lora", "sd15", "linked"),
        ("two.safetensors", "lora", "sd15", "linked"),
        ("v.safetensors", "vae", None, "linked"),
        ("words.safetensors", "embedding", None, "linked"),
    ]
    assert len({model.path.parent for model in placed}) == 4
    assert all(model.path.resolve().is_file() for model in placed)


def test_a_slip_in_the_last_one_is_said_before_anything_is_fetched(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("needed", "controls"):
        name = "fetch" if module == "needed" else "fetch_controlnet"
        monkeypatch.setattr(
            f"fastsd_helpers.webui.placing.{module}.{name}", lambda *_args, **_more: pytest.fail("fetched")
        )
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html><html><title>Log in</title></html>")
    with pytest.raises(ModelError, match="is a web page"):
        place_models(ModelsConfig(model="sd15", lora=str(tmp_path / "page.safetensors")), A1111, places)
    with pytest.raises(ModelNotFound, match="No ControlNet for 'cany'"):
        place_controlnets(ControlNetConfig(tasks="openpose, cany"), A1111, places)


def test_auto_takes_nothing_while_the_store_has_a_base_model_and_says_which(
    one_of: Any, places: Places, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastsd_helpers.webui.places import prepare_places, store_folder

    prepare_places(places, A1111)
    store = store_folder(places, A1111, "checkpoint")
    (store / "deeper").mkdir()
    (store / "folder.safetensors").mkdir()
    (store / "notes.txt").write_text("x")
    asked = []
    monkeypatch.setattr(models, "find_needed", lambda ref, *_more, **_named: asked.append(ref) or Needed(()))
    assert place_models(ModelsConfig(), A1111, places) == []
    assert asked == ["sd15"], "a folder, a text and an empty folder are not models"
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        for name in ("deeper/b.ckpt", *(f"a{number}.safetensors" for number in range(5))):
            (store / name).write_bytes(b"x")
        assert place_models(ModelsConfig(), A1111, places) == []
    assert asked == ["sd15"]
    assert "a0.safetensors, a1.safetensors, a2.safetensors, a3.safetensors, a4.safetensors." in caplog.text
    assert "Base models: 6 in" in caplog.text
    assert place_models(ModelsConfig(model=""), A1111, places) == []


def test_what_is_already_in_the_folder_is_left_as_it_is(one_of: Any, places: Places, tmp_path: Path) -> None:
    other = shutil.copy(one_of("sd15"), tmp_path / "same.safetensors")
    first = place_model(str(other), A1111, places)
    first.path.unlink()
    first.path.write_bytes(b"the user's own")
    again = place_model(str(other), A1111, places)
    assert (again.path, again.how) == (first.path, "there already")
    assert first.path.read_bytes() == b"the user's own"
    first.path.unlink()
    first.path.symlink_to(tmp_path / "gone")
    assert place_model(str(other), A1111, places).how == "linked"
    assert first.path.resolve() == other
    assert [path.name for path in first.path.parent.iterdir() if path.name.startswith(".")] == []


def test_a_file_in_the_store_is_named_by_its_place_there(one_of: Any, places: Places) -> None:
    from fastsd_helpers.webui.places import prepare_places, store_folder

    prepare_places(places, A1111)
    store = store_folder(places, A1111, "checkpoint")
    (store / "mine").mkdir()
    shutil.copy(one_of("sdxl"), store / "mine" / "x.safetensors")
    for ref in ("mine/x.safetensors", str(store / "mine" / "x.safetensors")):
        placed = place_model(ref, A1111, places)
        assert placed.path.resolve() == store / "mine" / "x.safetensors"
        assert placed.path.parts[-3:] == ("store", "mine", "x.safetensors")
        assert placed.family == "sdxl"
        assert not placed.path.is_symlink()
        assert placed.how == ("there already" if ref.startswith("mine") else "linked")


def test_another_store_is_looked_into_and_not_the_one_of_the_last_start(
    one_of: Any, where: dict[str, str], tmp_path: Path
) -> None:
    comfy, file = find_ui("comfyui"), one_of("sd15")
    first, second = (find_places(comfy, folder=where["folder"], store=tmp_path / name) for name in ("first", "second"))
    prepare_places(first, comfy)
    kept = store_folder(second, comfy, "checkpoint") / "mine.safetensors"
    kept.parent.mkdir(parents=True)
    shutil.copy(file, kept)
    assert kept.is_relative_to(tmp_path / "second")
    (found,) = find_needed("mine.safetensors", comfy, second, GPUS["T4"], kind="checkpoint").files
    assert found.source == str(kept)
    with pytest.raises(ModelNotFound):
        find_needed("mine.safetensors", comfy, first, GPUS["T4"], kind="checkpoint")


def test_a_safetensors_file_called_ckpt_is_linked_by_what_it_is(
    one_of: Any, places: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A web UI goes by the ending, and would unpickle it."""
    misnamed = tmp_path / "dog.ckpt"
    shutil.copyfile(one_of("sd15"), misnamed)
    placed = place_model(str(misnamed), A1111, places)
    assert placed.path.name == "dog.safetensors"
    assert placed.path.resolve() == misnamed
    inside = places.store / "models" / "Stable-diffusion" / "cat.ckpt"
    inside.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(one_of("sd15"), inside)
    with caplog.at_level(logging.WARNING, logger="fastsd_helpers"):
        place_model("cat.ckpt", A1111, places)
    assert f"rename {inside} to cat.safetensors" in caplog.text


def test_a_file_is_looked_into_and_not_hashed(
    one_of: Any, places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of several GB on Drive would be read whole before every start."""
    from fastsd_helpers import checkpoints
    from fastsd_helpers.checkpoints import inspector

    asked = []

    def watch(module: Any, name: str) -> None:
        real = getattr(module, name)

        def note(*words: Any, **named: Any) -> Any:
            asked.append(named.get("hashes", True))
            return real(*words, **named)

        monkeypatch.setattr(module, name, note)

    watch(inspector, "inspect")
    watch(checkpoints, "convert")
    assert place_model(str(one_of("sd15")), A1111, places).family == "sd15"
    folder = table.folder(tmp_path / "pipeline", "sd15", "F16")
    assert place_model(str(folder), A1111, places).how == "converted"
    assert len(asked) >= 3
    assert not any(asked)


def test_a_link_is_fetched_into_the_store_once(one_of: Any, places: Places) -> None:
    site = FileServer({"/tiny.safetensors": one_of("sd15").read_bytes()})
    try:
        for _ in range(2):
            placed = place_model(site.url("/tiny.safetensors"), A1111, places)
            assert (placed.how, placed.family) == ("downloaded", "sd15")
            assert placed.path.read_bytes() == one_of("sd15").read_bytes()
            assert placed.path.parent.name == "store"
    finally:
        site.stop()


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(("family", "runs"), [("sd15", True), ("sd21", True), ("sdxl", True), ("flux", False)])
def test_the_family_named_a_file_decides_where_it_runs(one_of: Any, places: Places, family: str, runs: bool) -> None:
    if runs:
        assert find_needed(str(one_of(family)), A1111, places, GPUS["T4"]).family == family
        assert place_model(str(one_of(family)), A1111, places).family == family
    else:
        with pytest.raises(WebUIError, match=f"does not run '.*', which is a {family} model") as caught:
            place_model(str(one_of(family)), A1111, places)
        assert "Forge Neo" in caught.value.hint
        assert "a model of sd15" in caught.value.hint
        assert A1111.title not in caught.value.hint


def test_what_a_reference_is_can_be_told_without_fetching_it(
    one_of: Any, where: dict[str, str], tmp_path: Path
) -> None:
    ui = find_ui("comfyui")
    places = find_places(ui, **where)
    folder = table.folder(tmp_path / "pipeline", "sdxl")
    table.write_gguf(tmp_path / "model.gguf", {"double_blocks.0.img_attn.qkv.weight": (32, 8)})
    expected = {"sd21-768": "sd21", "flux-dev": "flux", str(folder): "sdxl", "somebody/model": None,
                "black-forest-labs/FLUX.1-dev": "flux", str(tmp_path / "model.gguf"): "flux",
                "https://example.com/a.safetensors": None}  # fmt: skip
    assert {ref: find_needed(ref, ui, places, GPUS["T4"]).family for ref in expected} == expected
    for ref in ("", "no-such"):
        with pytest.raises(ModelNotFound):
            find_needed(ref, ui, places, GPUS["T4"])


def test_a_lora_is_no_base_model_but_a_lora(places: Places, tmp_path: Path) -> None:
    lora = table.write_lora(tmp_path / "style.safetensors")
    with pytest.raises(ModelError, match=r"style\.safetensors is .*, not a base model"):
        place_model(str(lora), A1111, places)
    assert place_model(str(lora), A1111, places, kind="lora").kind == "lora"
    with pytest.raises(WebUIError, match="has no folder for models of the kind 'hat'"):
        place_model(str(lora), A1111, places, kind="hat")


@pytest.mark.parametrize(("kind", "noun"), [("lora", "a LoRA"), ("vae", "a VAE"), ("embedding", "an embedding")])
def test_names_of_base_models_mean_nothing_for_other_kinds(places: Places, kind: str, noun: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        place_model("sd15", A1111, places, kind=kind)
    assert caught.value.problem == f"'sd15' (Stable Diffusion 1.5) is a base model, not {noun}."
    assert ("sdxl-vae" in caught.value.hint) == (kind == "vae")


@pytest.mark.parametrize("suffix", [".txt", ".zip", ""])
def test_files_of_other_kinds_are_refused(places: Places, tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"thing{suffix}").write_bytes(b"x")
    with pytest.raises(ModelError, match="is not a model file") as caught:
        place_model(str(tmp_path / f"thing{suffix}"), A1111, places, kind="vae")
    assert ".safetensors, .sft, .ckpt, .pt, .pth, .gguf, .bin" in caught.value.hint


@pytest.mark.parametrize("suffix", [".PT", ".Bin", ".pth", ".ckpt"])
def test_every_kind_of_file_is_taken_in_capitals_too(places: Places, tmp_path: Path, suffix: str) -> None:
    torch = pytest.importorskip("torch")
    shapes = {name: fact.shape for name, (fact, _bytes) in table.original("vae").items()}
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / f"thing{suffix}")
    placed = place_model(str(tmp_path / f"thing{suffix}"), A1111, places, kind="vae")
    assert placed.path.resolve() == tmp_path / f"thing{suffix}"


def test_a_model_of_other_widths_is_linked_and_warned_about(
    one_of: Any, places: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place_model(str(one_of("sd15")), A1111, places)
    assert f"sd15.safetensors has 8 channels where a Stable Diffusion has 320: {A1111.title} will refuse" in caplog.text
    caplog.clear()
    with_yaml = Path(shutil.copy(one_of("sd15"), tmp_path / "own.safetensors"))
    with_yaml.with_suffix(".yaml").write_text("model: x")
    place_model(str(with_yaml), A1111, places)
    assert "channels" not in caplog.text, "a .yaml beside it says how it is built"
    place_model(str(with_yaml), FORGE, find_places(FORGE, folder=str(tmp_path / "forge"), store=str(tmp_path / "kept")))
    assert f"{FORGE.title} will refuse" in caplog.text, "which other web UIs do not read"
    caplog.clear()
    shapes = {**table.original("sd15", "F16")}
    fact = type(next(iter(shapes.values()))[0])
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = fact("F16", (320, 4, 3, 3)), bytes(320 * 4 * 9 * 2)
    place_model(str(table.write(tmp_path / "wide.safetensors", shapes)), A1111, places)
    assert "channels" not in caplog.text


def test_a_model_of_another_architecture_has_no_first_layer_to_compare(
    one_of: Any, where: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert place_model(str(one_of("flux")), FORGE, find_places(FORGE, **where)).family == "flux"
    assert "channels" not in caplog.text


# -------------------------------------------------------------------------------------------- folders and sessions


def test_a_folder_is_converted_under_its_name_and_again_only_when_it_has_changed(
    places: Places, tmp_path: Path
) -> None:
    folder = table.folder(tmp_path / "my_model", "sd15", "F16")
    placed = place_model(str(folder), A1111, places)
    assert (placed.path.name, placed.how, placed.family) == ("my_model.safetensors", "converted", "sd15")
    first = placed.path.stat().st_mtime_ns
    assert place_model(str(folder), A1111, places).path.stat().st_mtime_ns == first
    late = placed.path.stat().st_mtime + 10
    os.utime(folder / "unet" / "config.json", (late, late))
    assert place_model(str(folder), A1111, places).path.stat().st_mtime_ns != first
    flux = tmp_path / "of_flux"
    table.folder(flux, "flux-all-in-one", "F16")
    with pytest.raises(WebUIError, match=r"does not run '.*of_flux', which is a flux model"):
        place_model(str(flux), A1111, places)


def test_a_session_is_named_or_given_as_its_folder(one_of: Any, places: Places, tmp_path: Path) -> None:
    session = Session.create("rex", root=tmp_path / "Fast-Dreambooth" / "Sessions")
    session.exports.mkdir(exist_ok=True)
    with pytest.raises(ModelNotFound, match="The session rex has no finished model yet") as caught:
        place_model(str(session.folder), A1111, places)
    assert "fastsd dreambooth export rex" in caught.value.hint
    (session.exports / "notes.txt").write_text("x")
    for number, name in enumerate(("b", "c", "a")):
        shutil.copy(one_of("sd15"), session.exports / f"{name}.safetensors")
        os.utime(session.exports / f"{name}.safetensors", (1000 + number, 1000 + number))
    for ref in ("rex", str(session.folder)):
        placed = place_model(ref, A1111, places)
        assert (placed.path.resolve(), placed.how) == (session.exports / "a.safetensors", "linked"), "the newest"
    with pytest.raises(ModelNotFound, match="There is no model 'max'"):
        place_model("max", A1111, places)


# ------------------------------------------------------------------------------------------------------ ControlNets


def test_controlnets_are_fetched_for_the_base_that_is_named_else_for_the_family(
    places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fetched = []

    def fetch(row: Any, folder: Path) -> Path:
        fetched.append((row.family, "canny" in row.tasks, "depth" in row.tasks))
        return table.write(
            folder / row.save_as, table.values({"control_model.input_hint_block.0.weight": (4, 3, 3, 3)})
        )

    monkeypatch.setattr("fastsd_helpers.webui.placing.controls.fetch_controlnet", fetch)
    placed = place_controlnets(ControlNetConfig(tasks=" canny , depth,"), A1111, places)
    assert fetched == [("sd15", True, False), ("sd15", False, True)]
    assert [(model.kind, model.family, model.how, model.path.is_file()) for model in placed] == [
        ("controlnet", "sd15", "downloaded", True)
    ] * 2
    fetched.clear()
    place_controlnets(ControlNetConfig(tasks="canny"), A1111, places, family="sdxl")
    place_controlnets(ControlNetConfig(tasks="canny", base=" sdxl "), A1111, places, family="sd15")
    place_controlnets(ControlNetConfig(tasks="canny", base=" "), A1111, places, family="sdxl")
    assert [(family, canny) for family, canny, _depth in fetched] == [("sdxl", True)] * 3
    with caplog.at_level(logging.INFO, "fastsd_helpers"):
        assert place_controlnets(ControlNetConfig(), A1111, places) == []
    assert "No ControlNet was chosen; for sd15 there is" in caplog.text
    assert len(fetched) == 3
