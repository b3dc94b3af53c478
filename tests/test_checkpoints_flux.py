"""Flux.1: dev and schnell, the transformer alone, and the file formats that are read but not written."""

import json
import types

import pytest
from fakes import broken_reads
from table_models import folder, original, read, values, widths_of, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import expected_shapes
from fastsd_helpers.errors import CheckpointError


@pytest.fixture
def transformer(tmp_path):
    return write(tmp_path / "flux.safetensors", original("flux"))


def settings(path):
    return json.loads(path.read_text())


def test_the_transformer_alone_becomes_a_folder_that_becomes_the_same_file(transformer, tmp_path):
    made = checkpoints.convert(transformer, tmp_path / "folder", verify=True)
    assert sorted(path.name for path in made.path.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert settings(made.path / "config.json")["_class_name"] == "FluxTransformer2DModel"
    assert any("takes the place of `transformer`" in note for note in made.notes)
    again = checkpoints.convert(made.path, tmp_path / "again.safetensors", verify=True)
    assert again.family == "flux"
    assert read(again.path) == read(transformer)


def test_a_base_lends_the_transformers_configuration_or_is_refused(transformer, tmp_path):
    base = folder(tmp_path / "base", "flux-all-in-one")
    own = {**settings(base / "transformer" / "config.json"), "axes_dims_rope": [1, 2, 3]}
    (base / "transformer" / "config.json").write_text(json.dumps(own))
    for place in (base, base / "transformer"):
        made = checkpoints.convert(transformer, tmp_path / "folder", base=place, overwrite=True)
        assert settings(made.path / "config.json") == own
    with pytest.raises(CheckpointError, match="has no configuration for the transformer"):
        checkpoints.convert(transformer, tmp_path / "other", base=folder(tmp_path / "sd15", "sd15"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("guided", [1, 0])
def test_schnells_folder_has_its_own_schedule(guided, tmp_path):
    family = find_family("flux-all-in-one")
    tensors = values(expected_shapes(family, {**widths_of(family.key), "guided": guided}))
    made = checkpoints.convert(write(tmp_path / "flux.safetensors", tensors), tmp_path / "folder")
    schedule = settings(made.path / "scheduler" / "scheduler_config.json")
    assert (schedule["shift"], schedule["use_dynamic_shifting"]) == ((3.0, True) if guided else (1.0, False))
    assert settings(made.path / "transformer" / "config.json")["guidance_embeds"] is bool(guided)


def test_flux_is_not_written_as_ckpt_by_any_way(transformer, tmp_path):
    whole = folder(tmp_path / "whole", "flux-all-in-one")
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, options in (
        (transformer, {}),
        (whole, {}),
        (whole, {"all_in_one": True}),
        (whole / "transformer", {}),
        (whole / "vae", {}),
    ):
        with pytest.raises(CheckpointError, match=r"not written as \.ckpt") as caught:
            checkpoints.convert(source, tmp_path / "out.ckpt", **options)
        assert caught.value.hint == "Give a name that ends in .safetensors."
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("failing", ["transformer", "vae"])
def test_of_two_files_neither_stays_when_one_of_them_fails_and_the_reason_is_told(failing, tmp_path):
    source = folder(tmp_path / "source", "flux-all-in-one")
    (tmp_path / "out").mkdir()
    weights = source / failing / "diffusion_pytorch_model.safetensors"
    with broken_reads(weights), pytest.raises(CheckpointError, match=r"read at the tensor '.+': Input/output"):
        checkpoints.convert(source, tmp_path / "out" / "flux.safetensors", dtype="fp16")
    assert list((tmp_path / "out").iterdir()) == []
    made = checkpoints.convert(source, tmp_path / "out" / "flux.safetensors", dtype="fp16")
    assert sorted(path.name for path in made.path.parent.iterdir()) == ["ae.safetensors", "flux.safetensors"]
    assert [path.name for path in made.beside] == ["ae.safetensors"]


@pytest.mark.parametrize("key", ["flux", "flux-all-in-one"])
def test_a_ckpt_of_flux_is_read(key, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(fact.shape)
        for name, (fact, data) in original(key).items()
    }
    torch.save({"state_dict": tensors}, tmp_path / "flux.ckpt")
    made = checkpoints.convert(tmp_path / "flux.ckpt", tmp_path / "flux.safetensors", verify=True)
    assert made.family == key
    assert read(made.path) == {name: (fact.dtype, fact.shape, data) for name, (fact, data) in original(key).items()}


@pytest.mark.slow
@pytest.mark.parametrize("guided", [1, 0])
def test_diffusers_own_loader_gives_the_folder_back_once_its_width_is_patched(guided, tmp_path):
    """The function has 3072 written into it, the inner width of the published models; nothing else of it is changed."""
    pytest.importorskip("diffusers")
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as theirs
    from safetensors.torch import load_file

    family, widths = find_family("flux"), {**widths_of("flux"), "guided": guided}
    file = write(tmp_path / "flux.safetensors", values(expected_shapes(family, widths)))
    made = checkpoints.convert(file, tmp_path / "folder")
    again = checkpoints.convert(made.path, tmp_path / "again.safetensors")
    code = theirs.__code__
    assert 3072 in code.co_consts
    narrow = tuple(widths["d"] if value == 3072 else value for value in code.co_consts)
    patched = types.FunctionType(code.replace(co_consts=narrow), theirs.__globals__)
    found, wanted = patched(load_file(again.path)), load_file(made.path / "diffusion_pytorch_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(wanted[name]) for name in wanted)
