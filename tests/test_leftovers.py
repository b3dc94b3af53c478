"""What training leaves in a weights file is taken off with a note, and the tensors are the same bytes."""

import json

import pytest
from table_models import folder, original, read, values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.formats.sources import BytesSource
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.models.leftovers import tidy
from fastsd_helpers.checkpoints.models.single_file import averaged_names
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.errors import CheckpointError


@pytest.fixture
def place(tmp_path):
    """An empty folder of the test's own."""
    made = tmp_path / "place"
    made.mkdir()
    return made


def tidied(names):
    """(names afterwards, notes) of a file with tensors of these names."""
    found = tidy(BytesSource(values(dict.fromkeys(names, (2, 2)))))
    return set(found.tensors), found.notes


UNET = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (f"_orig_mod.{UNET}", UNET),
        (f"module.{UNET}", UNET),
        (f"module._orig_mod.{UNET}", UNET),
        ("model.diffusion_model._orig_mod.input_blocks.0.0.weight", UNET),
        (f"model.{UNET}", UNET),
        (f"state_dict.{UNET}", UNET),
        (f"net.module.{UNET}", UNET),
        (f"ema_model.{UNET}", UNET),
        ("model.first_stage_model.encoder.conv_in.weight", "first_stage_model.encoder.conv_in.weight"),
        ("module.double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_attn.qkv.weight"),
        ("model.text_model.encoder.layers.0.x.weight", "text_model.encoder.layers.0.x.weight"),
        ("_orig_mod.down_blocks.0.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv1.weight"),
        ("encoder.mid.attn_1.to_out.0.bias", "encoder.mid.attn_1.proj_out.bias"),
        ("first_stage_model.decoder.mid.attn_1.query.bias", "first_stage_model.decoder.mid.attn_1.q.bias"),
    ],
)
def test_a_wrapper_around_names_is_taken_off_and_told(given, wanted):
    names, notes = tidied([given])
    assert names == {wanted}
    assert len(notes) >= 1
    assert given in " ".join(notes) or "had the prefix" in notes[0]


@pytest.mark.parametrize(
    "name",
    [UNET, "model.layers.0.self_attn.q_proj.weight", "model.1.sub.0.RDB1.conv1.0.weight", "encoder.layers.0.weight",
     "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight", "step", "model_ema.decay", "something"],
)  # fmt: skip
def test_names_that_are_no_wrappers_stay(name):
    assert tidied([name]) == ({name}, ())


def test_the_state_of_a_training_is_left_out_and_a_second_averaged_copy_too():
    state = ["optimizer_states.0.state.1.exp_avg", "lr_schedulers.0", "global_step", "n_averaged", "callbacks.x"]
    names, notes = tidied([UNET, *state, f"ema_model.{UNET}"])
    assert names == {UNET}
    assert [len(notes), "5 training state tensors" in notes[0], "1 weights of a second" in notes[1]] == [2, True, True]


@pytest.mark.parametrize("twin", [f"_orig_mod.{UNET}", f"module.{UNET}", f"model.{UNET}"])
def test_a_name_that_is_there_twice_is_refused_and_inspected(twin, place):
    tensors = original("sd15", "F16")
    source = write(place / "in.safetensors", {**tensors, twin: tensors[UNET]})
    assert any("two naming schemes" in problem.what for problem in checkpoints.inspect(source, hashes=False).problems)
    with pytest.raises(CheckpointError, match="two naming schemes") as caught:
        checkpoints.convert(source, place / "out.safetensors")
    assert caught.value.hint
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("key", "wrapper"), [("sd15", "_orig_mod."), ("vae", "module."), ("flux-ae", "model."), ("clip-l", "module.")]
)
def test_a_wrapped_file_is_recognised_and_becomes_the_plain_one(key, wrapper, place):
    tensors = original(key, "F16")
    plain = checkpoints.convert(write(place / "plain.safetensors", tensors), place / "a.safetensors")
    wrapped = {f"{wrapper}{name}": value for name, value in tensors.items()}
    source = write(place / "wrapped.safetensors", wrapped)
    found = checkpoints.inspect(source, hashes=False)
    assert (found.family, found.missing, found.unexpected) == (key, (), ())
    written = checkpoints.convert(source, place / "b.safetensors", verify=True)
    assert read(written.path) == read(plain.path)
    assert any(wrapper in note for note in written.notes)


@pytest.mark.parametrize(
    ("key", "prefix"),
    [
        ("clip-l", "cond_stage_model.transformer."),
        ("clip-l", "text_encoders.clip_l.transformer."),
        ("clip-h", "clip_h.transformer."),
        ("clip-g", "text_encoder_2."),
        ("t5", "text_encoders.t5xxl.transformer."),
        ("flux", "diffusion_model."),
        ("flux", "transformer."),
        ("vae", "vae."),
        ("flux-ae", "first_stage_model."),
    ],
)
def test_a_part_that_was_cut_out_of_a_model_is_the_part_under_whatever_was_in_front(key, prefix, place):
    tensors = original(key, "F16")
    plain = checkpoints.convert(write(place / "plain.safetensors", tensors), place / "a.safetensors")
    cut = write(place / "cut.safetensors", {f"{prefix}{name}": value for name, value in tensors.items()})
    found = checkpoints.inspect(cut, hashes=False)
    assert (found.family, found.missing, found.unexpected, found.problems) == (key, (), (), ())
    written = checkpoints.convert(cut, place / "b.safetensors", verify=True)
    assert read(written.path) == read(plain.path)


def test_an_encoder_of_images_and_a_lora_keep_what_is_in_front_of_their_names():
    vision = {f"vision_model.encoder.layers.{place}.self_attn.q_proj.weight" for place in range(12)}
    lora = {f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight" for side in "AB"}
    for names in (vision, lora):
        assert tidied(names) == (names, ())


@pytest.mark.parametrize(("key", "start"), [("t5", ""), ("flux-all-in-one", "text_encoders.t5xxl.transformer.")])
def test_t5s_table_of_words_is_read_under_its_second_name_where_that_alone_is_there(key, start, place):
    tensors = original(key, "F16")
    plain = checkpoints.convert(write(place / "plain.safetensors", tensors), place / "a.safetensors")
    second = f"{start}encoder.embed_tokens.weight"
    renamed = {second if name == f"{start}shared.weight" else name: value for name, value in tensors.items()}
    written = checkpoints.convert(write(place / "in.safetensors", renamed), place / "b.safetensors", verify=True)
    assert read(written.path) == read(plain.path)
    both = {**tensors, second: tensors[f"{start}shared.weight"]}
    assert read(checkpoints.convert(write(place / "2.safetensors", both), place / "c.safetensors").path) == read(
        plain.path
    )


def test_a_file_with_averages_in_the_place_of_its_unet_is_the_model_of_them(place):
    tensors = original("sd15", "F16")
    averages = {original: name for name, original in averaged_names(find_family("sd15")).items()}
    alone = {averages.get(name, name): value for name, value in tensors.items()}
    source = write(place / "in.safetensors", alone)
    found = checkpoints.inspect(source, hashes=False)
    assert (found.kind, found.family, found.missing) == ("checkpoint", "sd15", ())
    assert [problem.what for problem in found.problems] == ["686 U-Net tensors are there as averages (EMA) alone"]
    plain = checkpoints.convert(write(place / "plain.safetensors", tensors), place / "a.safetensors")
    assert read(checkpoints.convert(source, place / "b.safetensors").path) == read(plain.path)
    with pytest.raises(CheckpointError, match="has no U-Net"):
        checkpoints.convert(source, place / "c.safetensors", ema=False)


def test_a_part_of_a_folder_that_was_compiled_is_taken_as_it_is(place):
    source = folder(place / "model", "sd15", "F16")
    plain = checkpoints.convert(source, place / "a.safetensors")
    weights = source / "unet" / "diffusion_pytorch_model.safetensors"
    compiled = {f"_orig_mod.{name}": (TensorFact(d, s), c) for name, (d, s, c) in read(weights).items()}
    write(weights, compiled)
    written = checkpoints.convert(source, place / "b.safetensors", verify=True)
    assert read(written.path) == read(plain.path)
    assert any("_orig_mod." in note for note in written.notes)


@pytest.mark.parametrize(
    ("key", "extra"),
    [
        ("sd15", {"cond_stage_model.logit_scale": (), "cond_stage_model.text_projection": (24, 24)}),
        ("sd15", {"cond_stage_model.transformer.text_projection.weight": (24, 24)}),
        ("sdxl", {"conditioner.embedders.0.logit_scale": (), "conditioner.embedders.0.text_projection": (24, 24)}),
        ("sdxl", {"conditioner.embedders.0.transformer.text_projection.weight": (24, 24)}),
    ],
)
def test_what_clip_brought_along_is_left_out_with_a_note(key, extra, place):
    source = write(place / "in.safetensors", {**original(key, "F16"), **values(extra)})
    assert checkpoints.inspect(source, hashes=False).problems == ()
    written = checkpoints.convert(source, place / "out.safetensors", verify=True)
    assert written.tensors == len(original(key))
    assert any(min(extra) in note for note in written.notes)


def test_sdxls_second_projection_is_no_leftover(place):
    tensors = original("sdxl", "F16")
    del tensors["conditioner.embedders.1.model.text_projection"]
    extra = values({"conditioner.embedders.1.model.text_projection.weight": (24, 24)})
    with pytest.raises(CheckpointError, match=r"text_projection"):
        checkpoints.convert(write(place / "in.safetensors", {**tensors, **extra}), place / "out.safetensors")


def test_a_text_encoder_alone_keeps_its_projection_in_a_file_and_says_that_a_folder_has_none(place):
    projection = values({"text_projection.weight": (24, 24)})
    source = write(place / "in.safetensors", {**original("clip-l", "F16"), **projection})
    assert checkpoints.inspect(source, hashes=False).unexpected == ()
    written = checkpoints.convert(source, place / "out.safetensors", dtype="fp32", verify=True)
    assert read(written.path)["text_projection.weight"][2] == projection["text_projection.weight"][1]
    (note,) = checkpoints.convert(source, place / "folder").notes
    assert note.startswith("text_projection.weight: left out")
    # A folder of the class with a projection, as SD3's are, becomes the same file.
    weights = place / "folder" / "model.safetensors"
    held = {name: (TensorFact(d, s), c) for name, (d, s, c) in read(weights).items()}
    write(weights, {**held, **projection})
    config = json.loads((place / "folder" / "config.json").read_text())
    config["architectures"] = ["CLIPTextModelWithProjection"]
    (place / "folder" / "config.json").write_text(json.dumps(config))
    again = checkpoints.convert(place / "folder", place / "again.safetensors", verify=True)
    assert read(again.path)["text_projection.weight"][2] == projection["text_projection.weight"][1]
    assert again.tensors == written.tensors


@pytest.mark.parametrize("names", [("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")])
def test_a_vaes_attention_in_another_spelling_becomes_the_originals_convolution(names, place):
    tensors = original("sd15", "F16")
    plain = checkpoints.convert(write(place / "plain.safetensors", tensors), place / "a.safetensors")
    respelled = {}
    for name, (fact, content) in tensors.items():
        for ours, theirs in zip(("q", "k", "v", "proj_out"), names, strict=True):
            if f".mid.attn_1.{ours}." in name:
                name = name.replace(f".attn_1.{ours}.", f".attn_1.{theirs}.")
                fact = TensorFact(fact.dtype, fact.shape[:2] or fact.shape)
                break
        respelled[name] = fact, content
    source = write(place / "in.safetensors", respelled)
    written = checkpoints.convert(source, place / "b.safetensors", verify=True)
    assert read(written.path) == read(plain.path)
    assert any("attention" in note for note in written.notes)


def test_inspect_says_that_averaged_weights_are_taken(place):
    tensors = original("sd15", "F16")
    averaged = {
        "model_ema." + name.removeprefix("model.").replace(".", ""): value
        for name, value in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    source = write(place / "in.safetensors", {**tensors, **averaged})
    (advice,) = [line for line in checkpoints.inspect(source, hashes=False).advice if "EMA" in line]
    assert "convert uses them" in advice
    assert "--no-ema" in advice
    assert any("were used" in note for note in checkpoints.convert(source, place / "out.safetensors").notes)


def test_a_file_that_was_recognised_with_leftovers_is_recognised_in_any_order():
    names = [f"model.{name}" for name in original("sd15")] + ["model.global_step", "optimizer_states.0"]
    facts = {name: TensorFact("F32", (4, 4, 3, 3)) for name in reversed(names)}
    assert detect(facts).family == "sd15"
