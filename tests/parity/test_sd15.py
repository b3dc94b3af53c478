"""SD 1.5 exports against references that are not ours: see README.md beside this file."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_families
import tiny_models
from installed import require_installed
from tiny_models import FULL, PARTS, TINY, build_parts, load_file, reference, same_bits

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.names.families import find_family
from fastsd_helpers.checkpoints.names.layout import expected_shapes, match_names, measure

require_installed("diffusers")

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

SCRIPT = Path(__file__).parents[2] / "scripts" / "parity_ldm.py"
ORIGINAL_CODE = os.environ.get("FASTSD_LDM")


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return tiny_models.build_pipeline(TINY, tmp_path_factory.mktemp("words"), seed=7)


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipe.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tensors(pipe):
    return {part: getattr(pipe, part).state_dict() for part in PARTS}


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """The fp32 export of the folder."""
    return checkpoints.convert(folder, tmp_path_factory.mktemp("export") / "tiny.safetensors", verify=True)


def shapes_of(parts):
    """What the single file of these models would hold: name -> shape."""
    family = find_family("sd15")
    shapes = {}
    for part, model in parts.items():
        given = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        shapes[part] = {ours: given[theirs] for ours, theirs in match_names(family, part, given).items()}
    return expected_shapes(family, measure(family, shapes))


def test_an_export_has_exactly_the_recorded_keys_and_shapes_of_the_original(exported):
    found = {name: tuple(tensor.shape) for name, tensor in load_file(exported.path).items()}
    assert found == reference("sd15.tiny")
    assert exported.tensors == len(found) == 1130


def test_the_table_at_full_width_is_the_recorded_list_of_sd15():
    with torch.device("meta"):
        parts = build_parts(FULL)
    assert shapes_of(parts) == reference("sd15")


# ------------------------------------------------------------------------------ diffusers as the other side


def test_diffusers_own_inverse_gives_back_every_bit(exported, tensors, folder):
    from diffusers.loaders import single_file_utils as theirs

    stored = load_file(exported.path)
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in PARTS}
    back = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(stored), configs["unet"]),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(stored), configs["vae"]),
        "text_encoder": theirs.convert_ldm_clip_checkpoint(dict(stored), remove_prefix="cond_stage_model.transformer."),
    }
    for part in PARTS:
        read = {name.removeprefix("text_model."): tensor for name, tensor in back[part].items()}
        given = {name.removeprefix("text_model."): tensor for name, tensor in tensors[part].items()}
        assert read.keys() == given.keys()
        for name, tensor in given.items():
            assert same_bits(read[name], tensor), f"{part} {name}"


@pytest.mark.numeric
def test_the_single_file_draws_the_same_picture_as_the_folder_bit_for_bit(exported, folder):
    import diffusers
    import numpy as np

    pictures = []
    from_folder = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    from_file = diffusers.StableDiffusionPipeline.from_single_file(
        str(exported.path), config=str(folder), local_files_only=True, safety_checker=None
    )
    for pipe in (from_folder, from_file):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        result = pipe("a red cube", num_inference_steps=2, generator=generator, output_type="np", height=64, width=64)
        pictures.append(result.images)
    for part in PARTS:
        one, other = (getattr(pipe, part).state_dict() for pipe in (from_folder, from_file))
        assert one.keys() == other.keys()
        assert all(same_bits(one[name], other[name]) for name in one)
    assert pictures[0].std() > 0.01
    assert np.array_equal(*pictures)


def compared(export, folder):
    """The figures of scripts/parity_ldm.py."""
    command = [sys.executable, SCRIPT, export.path, folder, "--ldm", ORIGINAL_CODE]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["agree"]
    return [figure["keys"] for figure in result["figures"]]


needs_original = pytest.mark.skipif(
    not ORIGINAL_CODE, reason="FASTSD_LDM names no checkout of the original code (see README.md)"
)


@pytest.mark.numeric
@needs_original
def test_the_original_code_loads_the_file_strictly_and_computes_the_same(exported, folder):
    assert compared(exported, folder) == [686, 248, 248, 196] * 2


@pytest.mark.numeric
@needs_original
def test_the_original_code_computes_the_same_for_an_inpainting_model(tmp_path):
    tiny_families.make_folder(tmp_path / "model", "sd15-inpaint", seed=11)
    export = checkpoints.convert(tmp_path / "model", tmp_path / "export.safetensors", verify=True)
    assert compared(export, tmp_path / "model") == [686, 248, 248, 196] * 2


def test_the_demo_model_has_exactly_the_tensors_of_sd15():
    import demo_networks as networks

    with torch.device("meta"):
        parts = {
            "unet": networks.build_unet(),
            "vae": networks.build_vae(),
            "text_encoder": networks.build_text_encoder(1000),
        }
    assert shapes_of(parts).keys() == reference("sd15").keys()
