"""Which way a conversion takes, decided by what the source is and how the destination is named; table models only."""

import json
import os
import shutil

import pytest

pytest.importorskip("numpy")
from table_models import folder, original, read, values, widths_of, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import SafetensorsFile, TensorFact
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import expected_shapes
from fastsd_helpers.errors import CheckpointError, FastSDError


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder of a family, made when it is first asked for; not to be changed."""
    place, made = tmp_path_factory.mktemp("models"), {}

    def get(key):
        if key not in made:
            made[key] = folder(place / key, key)
        return made[key]

    return get


@pytest.fixture
def place(tmp_path):
    made = tmp_path / "place"
    made.mkdir()
    return made


def names(place):
    return sorted(path.name for path in place.iterdir())


def metadata(path):
    with SafetensorsFile(path) as file:
        return file.metadata


PARTS = [
    ("sd15", "vae", "vae"),
    ("sd15", "text_encoder", "clip-l"),
    ("sd21", "text_encoder", "clip-h"),
    ("sdxl", "text_encoder_2", "clip-g"),
    ("flux-all-in-one", "vae", "flux-ae"),
    ("flux-all-in-one", "text_encoder_2", "t5"),
    ("flux-all-in-one", "transformer", "flux"),
]


@pytest.mark.parametrize(("family", "part", "key"), PARTS)
def test_a_part_alone_becomes_a_file_of_its_own_kind_and_a_folder_again(family, part, key, models, place):
    source = models(family) / part
    written = checkpoints.convert(source, place / "part.safetensors", verify=True)
    assert (written.family, written.path, written.beside) == (key, place / "part.safetensors", ())
    assert checkpoints.convert(source, place / "same.safetensors", family=key).family == key
    other = "vae" if key != "vae" else "clip-l"
    with pytest.raises(CheckpointError, match=f"not {other}"):
        checkpoints.convert(source, place / "no.safetensors", family=other)
    with pytest.raises(CheckpointError, match="is a folder already"):
        checkpoints.convert(source, place / "no")
    back = checkpoints.convert(written.path, place / "back", verify=True)
    assert back.family == key
    assert "config.json" in names(place / "back")
    again = checkpoints.convert(place / "back", place / "again.safetensors")
    assert read(again.path) == read(written.path)
    assert names(place) == ["again.safetensors", "back", "part.safetensors", "same.safetensors"]


@pytest.mark.parametrize(
    ("part", "change"),
    [("text_encoder", {"num_hidden_layers": 11}), ("text_encoder", {"num_hidden_layers": 32}), ("text_encoder", {})],
)
def test_a_text_encoder_of_other_depth_or_in_the_wrong_place_is_refused(part, change, models, place):
    shutil.copytree(models("sdxl") / part, place / "part")
    config = json.loads((place / "part" / "config.json").read_text())
    config = {**config, **change} if change else {k: v for k, v in config.items() if k != "num_hidden_layers"}
    (place / "part" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"is a text encoder of (11|12|23|32|None) layers, which no model"):
        checkpoints.convert(place / "part", place / "out.safetensors")
    assert names(place) == ["part"]


def test_a_folder_is_a_part_by_the_class_in_its_config_and_never_beside_an_index(models, place):
    shutil.copytree(models("sd15") / "vae", place / "part")
    config = json.loads((place / "part" / "config.json").read_text())
    for change in ({"_class_name": "Strange"}, {"_class_name": None, "architectures": []}):
        (place / "part" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FastSDError):
            checkpoints.convert(place / "part", place / "out.safetensors")
    named = {key: value for key, value in config.items() if key != "_class_name"} | {"architectures": ["AutoencoderKL"]}
    (place / "part" / "config.json").write_text(json.dumps(named))
    assert checkpoints.convert(place / "part", place / "out.safetensors").family == "vae"
    (place / "part" / "model_index.json").write_text("{}")
    with pytest.raises(FastSDError):
        checkpoints.convert(place / "part", place / "other.safetensors")


def test_a_weights_file_of_diffusers_names_becomes_a_file_of_the_original_ones(models, place):
    weights = models("sd15") / "vae" / "diffusion_pytorch_model.safetensors"
    written = checkpoints.convert(weights, place / "vae.safetensors")
    assert written.family == "vae"
    assert read(written.path) == read(checkpoints.convert(models("sd15") / "vae", place / "other.safetensors").path)
    with pytest.raises(CheckpointError, match="already"):
        checkpoints.convert(weights, place / "folder")


# ------------------------------------------------------------------------------------------------ names and places


@pytest.mark.parametrize(
    ("source", "destination", "said"),
    [
        ("nothing", "out.safetensors", "does not exist"),
        ("pipe", "out.safetensors", "is neither a file nor a folder"),
        ("model", "out.pt", "models are not written as .pt"),
        ("model", "out.GGUF", "models are not written as .GGUF"),
        ("model", "x" * 300, "cannot be a name"),
        ("model", "model", "is both source and destination"),
        ("file.safetensors", "file.safetensors", "is both source and destination"),
        ("file.safetensors", "old.txt", "is a file; a folder would be written there"),
        ("model", "old.safetensors", "exists"),
        ("file.safetensors", "old", "exists"),
    ],
)
def test_what_cannot_be_read_or_written_is_refused_first(source, destination, said, models, place):
    shutil.copytree(models("sd15"), place / "model")
    write(place / "file.safetensors", original("sd15"))
    os.mkfifo(place / "pipe")
    (place / "old.txt").write_text("x")
    (place / "old.safetensors").write_text("precious")
    (place / "old").mkdir()
    (place / "old" / "x").write_text("precious")
    before = names(place)
    with pytest.raises(FastSDError, match=said.replace(".", r"\.")):
        checkpoints.convert(place / source, place / destination)
    assert names(place) == before
    assert (place / "old.safetensors").read_text() == "precious"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp8"}, "no dtype 'fp8'"),
        ({"family": "sd99"}, "sd99"),
        ({"family": "sdxl"}, "is a sd15 model, not sdxl"),
        ({"base": "nowhere"}, "There is no base model at"),
    ],
)
def test_wishes_that_cannot_be_are_refused_before_anything_is_written(options, said, models, place):
    options = {**options, **({"base": place / "nowhere"} if "base" in options else {})}
    with pytest.raises(FastSDError, match=said):
        checkpoints.convert(models("sd15"), place / "out.safetensors", **options)
    assert names(place) == []


def test_home_is_understood_and_overwriting_is_asked_for(models, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    written = checkpoints.convert(str(models("sd15")), "~/deep/out.safetensors")
    assert written.path == place / "deep" / "out.safetensors"
    with pytest.raises(CheckpointError, match="exists"):
        checkpoints.convert(models("sd15"), written.path)
    assert checkpoints.convert(models("sd15"), written.path, overwrite=True, dtype="fp16").dtype == "fp16"
    assert {dtype for dtype, _shape, _data in read(written.path).values()} == {"F16"}
    file = checkpoints.convert(written.path, "~/folder")
    with pytest.raises(CheckpointError, match="exists"):
        checkpoints.convert(written.path, file.path)
    assert checkpoints.convert(written.path, file.path, overwrite=True).path == place / "folder"


def test_a_folder_in_its_own_format_is_not_written_again_but_in_another_it_is(models, place):
    with pytest.raises(CheckpointError, match="is a Diffusers folder already"):
        checkpoints.convert(models("sd21"), place / "out")
    made = checkpoints.convert(models("sd21"), place / "out", dtype="fp16", verify=True)
    assert (made.family, made.dtype) == ("sd21", "fp16")
    with pytest.raises(FastSDError):
        checkpoints.convert(models("sd21"), models("sd21"), dtype="fp16", overwrite=True)


# ------------------------------------------------------------------------------------------------------- Flux


def test_a_flux_folder_becomes_two_files_or_one(models, place):
    source = models("flux-all-in-one")
    two = checkpoints.convert(source, place / "flux.safetensors", verify=True)
    assert (two.family, two.beside) == ("flux", (place / "ae.safetensors",))
    assert "also need the text encoders clip_l and t5xxl" in two.notes[-1]
    assert read(place / "ae.safetensors") == read(checkpoints.convert(source / "vae", place / "v.safetensors").path)
    one = checkpoints.convert(source, place / "all.safetensors", all_in_one=True)
    assert (one.family, one.beside) == ("flux-all-in-one", ())
    assert len(read(one.path)) > len(read(two.path)) + len(read(place / "ae.safetensors"))
    with pytest.raises(CheckpointError, match="is the name of the VAE"):
        checkpoints.convert(source, place / "ae.safetensors", overwrite=True)


def test_the_second_file_is_looked_at_before_the_first_is_written(models, place):
    (place / "ae.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="exists"):
        checkpoints.convert(models("flux-all-in-one"), place / "flux.safetensors")
    assert names(place) == ["ae.safetensors"]
    assert (place / "ae.safetensors").read_text() == "precious"
    made = checkpoints.convert(models("flux-all-in-one"), place / "flux.safetensors", overwrite=True)
    assert made.beside == (place / "ae.safetensors",)
    shutil.copytree(models("flux-all-in-one"), place / "model")
    (place / "model" / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        checkpoints.convert(place / "model", place / "other" / "flux.safetensors")
    assert not (place / "other" / "flux.safetensors").exists()


# ------------------------------------------------------------------------------------ prediction, base, averages


def v_prediction(models, place, key):
    made = place / "v" / key
    shutil.copytree(models(key), made)
    path = made / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "v_prediction"}))
    return made


def test_a_model_that_predicts_velocity_says_so_beside_itself_or_inside(models, place):
    written = checkpoints.convert(v_prediction(models, place, "sd21"), place / "a.safetensors")
    assert written.beside == (place / "a.yaml",)
    assert "Keep a.yaml next to it" in written.notes[-1]
    assert metadata(written.path)["modelspec.prediction_type"] == "v"
    (place / "b.yaml").write_text("mine")
    written = checkpoints.convert(place / "v" / "sd21", place / "b.safetensors")
    assert (written.beside, (place / "b.yaml").read_text()) == ((), "mine")
    assert "b.yaml exists already and was not changed" in written.notes[-1]
    written = checkpoints.convert(place / "v" / "sd21", place / "b.safetensors", overwrite=True)
    assert written.beside == (place / "b.yaml",)
    assert (place / "b.yaml").read_text() == (place / "a.yaml").read_text()
    (place / "b.safetensors").unlink()
    assert checkpoints.convert(place / "v" / "sd21", place / "b.safetensors").beside == (place / "b.yaml",), "the same"
    inside = checkpoints.convert(v_prediction(models, place, "sdxl"), place / "x.safetensors")
    assert inside.beside == ()
    assert "v_pred" in read(inside.path)
    again = checkpoints.convert(inside.path, place / "y.safetensors", dtype="fp16")
    assert "v_pred" in read(again.path)
    assert checkpoints.convert(written.path, place / "c.safetensors", dtype="fp16").beside == (place / "c.yaml",)
    plain = checkpoints.convert(models("sdxl"), place / "z.safetensors")
    assert "v_pred" not in read(plain.path)
    assert not (place / "z.yaml").exists()


def test_a_file_that_does_not_say_what_it_predicts_becomes_a_folder_with_a_warning(place):
    bare = write(place / "bare.safetensors", original("sd21"))
    made = checkpoints.convert(bare, place / "folder")
    assert "Diffusers takes epsilon" in made.notes[-1]
    known = checkpoints.convert(write(place / "known.safetensors", original("sd15")), place / "other")
    assert not any("Diffusers takes" in note for note in known.notes)


def test_what_the_folder_of_sd21_lacks_is_said_in_the_file_unless_a_base_lends_it(models, place):
    bare = checkpoints.convert(models("sd21"), place / "bare.safetensors")
    assert "fastsd.left_out" in metadata(bare.path)
    assert any("24th layer" in note for note in bare.notes)
    family = find_family("sd21")
    extra = next(name for name in ("cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale")
                 if family.is_extra(name))  # fmt: skip
    whole = {**original("sd21"), extra: (TensorFact("F32", (2,)), bytes(8))}
    base = write(place / "base.safetensors", whole)
    lent = checkpoints.convert(models("sd21"), place / "lent.safetensors", base=base, dtype="fp16")
    assert read(lent.path)[extra] == ("F16", (2,), bytes(4))
    assert "fastsd.left_out" not in metadata(lent.path)
    assert any(note.startswith("1 tensors that Diffusers folders lack") for note in lent.notes)
    with pytest.raises(CheckpointError, match=r"not a .* file"):
        checkpoints.convert(
            models("sd21"), place / "no.safetensors", base=write(place / "o.safetensors", original("sd15"))
        )
    sd15 = checkpoints.convert(models("sd15"), place / "sd15.safetensors", base=base)
    assert sd15.notes == (), "SD 1.5 needs nothing of a base"
    assert "fastsd.left_out" not in metadata(sd15.path)
    folder_base = checkpoints.convert(models("sd21"), place / "f.safetensors", base=models("sd21"))
    assert any("24th layer" in note for note in folder_base.notes)


def test_a_base_of_another_family_lends_a_folder_nothing(models, place):
    file = write(place / "one.safetensors", original("sd15"))
    with pytest.raises(CheckpointError, match="is of another family"):
        checkpoints.convert(file, place / "out", base=models("sdxl"))
    assert checkpoints.convert(file, place / "out", base=models("sd15")).family == "sd15"
    everything = write(place / "flux.safetensors", original("flux-all-in-one"))
    assert checkpoints.convert(everything, place / "flux", base=models("flux-all-in-one")).family == "flux-all-in-one"


def test_the_resolution_of_a_folder_is_said_in_its_file(models, place):
    made = place / "model"
    shutil.copytree(models("sd15"), made)
    config = json.loads((made / "unet" / "config.json").read_text())
    (made / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": 96}))
    assert metadata(checkpoints.convert(made, place / "a.safetensors").path)["modelspec.resolution"] == "768x768"
    for size in ([96, 64], None, "96"):
        (made / "unet" / "config.json").write_text(json.dumps({**config, "sample_size": size}))
        said = metadata(checkpoints.convert(made, place / "a.safetensors", overwrite=True).path)
        assert said.get("modelspec.resolution") != "768x768"


def test_a_rewritten_file_keeps_what_it_says_of_itself_but_for_what_is_no_longer_true(place):
    said = {"modelspec.title": "mine", "modelspec.hash_sha256": "0x1", "format": "pt", "own": "words"}
    source = write(place / "a.safetensors", original("sd15"), said)
    written = checkpoints.convert(source, place / "b.safetensors", dtype="bf16")
    found = metadata(written.path)
    assert (found["modelspec.title"], found["own"]) == ("mine", "words")
    assert found.get("modelspec.hash_sha256") != "0x1"
    assert written.dtype == "bf16"
    assert {dtype for dtype, *_rest in read(written.path).values()} == {"BF16"}


def test_hashes_can_be_left_out_and_are_computed_when_it_is_verified(models, place):
    assert checkpoints.convert(models("sd15"), place / "a.safetensors", hashes=False).sha256 in (None, "")
    for options in ({}, {"hashes": False, "verify": True}):
        written = checkpoints.convert(models("sd15"), place / "a.safetensors", overwrite=True, **options)
        import hashlib

        assert written.sha256 == hashlib.sha256(written.path.read_bytes()).hexdigest()
        assert written.bytes == written.path.stat().st_size
        assert written.tensors == len(read(written.path))


def test_a_lora_given_as_a_model_and_a_model_given_as_a_lora_are_told_apart(place):
    shapes = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 8, 1, 1),
              "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (8, 2, 1, 1)}  # fmt: skip
    lora = write(place / "lora.safetensors", values(shapes))
    with pytest.raises(CheckpointError, match="not a model of the family 'sd15'"):
        checkpoints.convert(lora, place / "out.safetensors", family="sd15")
    assert checkpoints.convert(lora, place / "out.safetensors").family == "sd15-lora"
    model = write(place / "model.safetensors", values(expected_shapes(find_family("sd15"), widths_of("sd15"))))
    assert checkpoints.convert(model, place / "copy.safetensors", family="sd15", dtype="fp16").family == "sd15"
    with pytest.raises(FastSDError):
        checkpoints.convert(model, place / "no.safetensors", family="sdxl")


def test_a_source_is_never_inside_what_is_replaced(models, place):
    made = checkpoints.convert(write(place / "a.safetensors", original("sd15")), place / "out")
    inside = made.path / "a.safetensors"
    shutil.copy(place / "a.safetensors", inside)
    before = read(inside)
    with pytest.raises(CheckpointError, match="holds the model that is read"):
        checkpoints.convert(inside, made.path, overwrite=True)
    assert read(inside) == before
    with pytest.raises(CheckpointError):
        checkpoints.convert(made.path, made.path / "vae" / "diffusion_pytorch_model.safetensors", overwrite=True)
    assert (made.path / "model_index.json").is_file()


def test_what_is_not_asked_for_is_the_careful_choice():
    from fastsd_helpers.checkpoints.converter import ConvertConfig
    from fastsd_helpers.options import options_of

    assert {item.name: (item.default, item.advanced) for item in options_of(ConvertConfig)} == {
        "dtype": ("keep", False),
        "verify": (False, False),
        "overwrite": (False, False),
        "base": ("", False),
        "family": ("", True),
        "ema": (True, True),
        "hashes": (False, False),
        "all_in_one": (False, False),
    }
