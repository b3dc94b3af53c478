"""LoRA: what peft trains is what the exported file gives in diffusers, and a stopped run goes on to the same bits."""

import json
import struct
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from closeness import assert_close_to  # noqa: E402
from dreambooth_runs import (  # noqa: E402
    config_for,
    learned,
    same,
    train_in_pieces,
)

from fastsd_helpers.dreambooth import export, plan, train  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig, SampleConfig, sample  # noqa: E402
from fastsd_helpers.dreambooth.training.lora import add_lora, lora_parameters, merge_lora  # noqa: E402
from fastsd_helpers.errors import CheckpointError, SessionError, SettingsError  # noqa: E402
from fastsd_helpers.playground import open_artist  # noqa: E402
from fastsd_helpers.playground.loras import load_lora  # noqa: E402

require_installed("diffusers", "peft")

LORA = {"method": "lora", "lora_rank": 4, "lora_alpha": 6.0, "unet_lr": 1e-2, "text_encoder_lr": 1e-2}


def read_header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


@pytest.mark.numeric
def test_the_file_gives_diffusers_the_model_that_was_trained(small_base, small_session, tmp_path) -> None:
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig

    train(config_for(small_base, **LORA), small_session)
    path = export(
        ExportConfig(format="lora", dtype="fp32", out=str(tmp_path / "robot.safetensors")), small_session
    ).path

    ids = torch.randint(0, 290, (1, 77), generator=torch.Generator().manual_seed(1))
    noisy = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2))

    def outputs(pipe) -> tuple["torch.Tensor", "torch.Tensor"]:
        with torch.no_grad():
            text = pipe.text_encoder(ids)[0]
            return text, pipe.unet(noisy, torch.tensor([500]), text).sample

    def open_pipe():
        pipe = StableDiffusionPipeline.from_pretrained(small_base, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    untouched = outputs(open_pipe())
    trained = open_pipe()  # by peft itself, from the tensors as they were trained
    weights = learned(small_session)
    for part, names in (("unet", ["to_q", "to_k", "to_v", "to_out.0"]), ("text_encoder", None)):
        module = getattr(trained, part)
        names = names or ["q_proj", "k_proj", "v_proj", "out_proj"]
        module.add_adapter(LoraConfig(r=4, lora_alpha=6.0, target_modules=names))
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                plain = name.removeprefix("text_model.").replace(".default.", ".")
                parameter.data.copy_(weights.pop(f"{part}/{plain}"))
    assert not any("lora_" in name and not name.startswith("optimizer/") for name in weights), "all were used"
    loaded = open_pipe()
    load_lora(loaded, str(path.parent), weight_name=path.name)
    for ours, theirs, before in zip(outputs(loaded), outputs(trained), untouched, strict=True):
        # The same sums on the same numbers: nothing was seen to differ, and a LoRA alone moves the outputs by 1e-4.
        assert_close_to(ours, theirs, of_largest=1e-6)
        assert (before - theirs).abs().max() > 1e-4 * theirs.abs().max(), "the training changed it"


def test_the_finished_file_is_small_and_says_rank_and_alpha(small_base, small_session) -> None:
    result = train(config_for(small_base, **LORA), small_session)
    header = read_header(result.path)
    about = header.pop("__metadata__")
    assert (about["ss_network_dim"], about["ss_network_alpha"], about["ss_base_model_version"]) == ("4", "6.0", "sd_v1")
    layers = {name.partition(".")[0] for name in header}
    assert "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_out_0" in layers
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in layers
    assert {name.partition(".")[2] for name in header} == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert result.path.stat().st_size < 400_000
    again = train(config_for(small_base, **LORA), small_session)
    assert (again.path, again.seconds) == (result.path, 0.0)
    with pytest.raises(CheckpointError, match="exists already"):
        export(ExportConfig(format="lora", out=str(result.path)), small_session)


@pytest.mark.numeric
def test_the_whole_model_has_the_lora_merged_in(small_base, small_session, tmp_path) -> None:
    from safetensors.torch import load_file

    train(config_for(small_base, **LORA), small_session)
    path = export(ExportConfig(dtype="fp32", out=str(tmp_path / "whole.safetensors")), small_session).path
    weights, whole = learned(small_session, "unet"), load_file(path)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"
    name = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_v.weight"
    from diffusers import UNet2DConditionModel

    before = UNet2DConditionModel.from_pretrained(small_base, subfolder="unet").get_submodule(layer).weight
    change = weights[f"unet/{layer}.lora_B.weight"] @ weights[f"unet/{layer}.lora_A.weight"] * (6.0 / 4)
    # Four products and a sum, in fp32.
    assert_close_to(whole[name], before + change, of_largest=1e-6)
    assert change.abs().max() > 1e-4


MOMENTS = [("text_encoder", 1), ("text_encoder", 2), ("unet", 1), ("unet", 2)]


@pytest.mark.numeric
def test_a_run_stopped_at_every_step_ends_with_the_same_bits(small_base, small_session) -> None:
    settings = config_for(small_base, **LORA, ema=0.9, gradient_checkpointing=True)
    whole = train(settings, small_session)
    tensors = learned(small_session)
    pieces = train_in_pieces(settings, small_session, MOMENTS, restart=True)
    assert same(learned(small_session), tensors)
    assert pieces.loss_after == whole.loss_after
    assert pieces.loss_after != pieces.loss_before
    assert any(name.startswith("raw/") for name in tensors)


def test_a_full_run_has_no_lora_to_export(small_base, small_session) -> None:
    train(config_for(small_base, unet_steps=1, text_encoder_steps=0), small_session)
    with pytest.raises(SettingsError, match="trained with method full") as caught:
        export(ExportConfig(format="lora"), small_session)
    assert "--method lora" in caught.value.hint


def test_a_checkpoint_takes_the_room_of_the_matrices_alone(small_base, small_session) -> None:
    full, small = plan(config_for(small_base), small_session), plan(config_for(small_base, **LORA), small_session)
    assert small.generation_bytes["unet"] * 5 < full.generation_bytes["unet"]
    assert small.export_bytes < full.export_bytes


# ------------------------------------------------------------------------------------------- trying it


@pytest.mark.numeric
def test_a_session_that_trained_a_lora_is_tried_beside_its_base_as_strongly_as_asked(
    small_base, small_session, tmp_path
) -> None:
    import numpy as np

    from fastsd_helpers.checkpoints import convert

    train(config_for(small_base, **LORA), small_session)
    artist = open_artist(str(small_session.folder))
    assert artist.lora_strength == 1.0

    def draw(strength: float | None, who=artist):
        return [np.asarray(picture, float) for _, picture in who.draw("a robot", steps=2, lora_strength=strength)]

    [plain] = draw(None, open_artist(str(small_base)))
    before, weak = draw(0.0)
    assert (before == plain).all()
    assert (weak == plain).all(), "at 0 the model is what it was"
    before, after = draw(None)
    assert (before == plain).all()
    # The whole model with the LoRA merged in, by another way: written to one file and loaded as a model of its own.
    whole = export(ExportConfig(dtype="fp32", out=str(tmp_path / "whole.safetensors")), small_session)
    convert(whole.path, tmp_path / "merged", base=small_base)
    [merged] = draw(None, open_artist(str(tmp_path / "merged")))
    moved = abs(merged - plain).mean()
    assert moved > 1, "the training is strong enough to be seen"
    assert abs(after - merged).mean() < moved / 10
    assert abs(draw(2.0)[1] - plain).mean() > abs(draw(0.25)[1] - plain).mean()


@pytest.mark.numeric
def test_a_session_lends_its_lora_to_another_model_of_its_family(small_base, small_session) -> None:
    train(config_for(small_base, **LORA), small_session)
    export(ExportConfig(), small_session)  # newer, and a whole model: it is not taken for the LoRA
    root = small_session.folder.parent
    artist = open_artist(str(small_base), lora=small_session.name, lora_strength=0.5, root=root)
    [(title, picture)] = artist.draw("a robot", steps=2)
    [(_, plain)] = artist.draw("a robot", steps=2, lora_strength=0)
    assert title == str(small_base)
    assert picture.tobytes() != plain.tobytes()


def test_a_session_without_a_lora_says_so_when_it_is_asked_for_one(small_base, small_session) -> None:
    train(config_for(small_base, method="full"), small_session)
    with pytest.raises(SessionError, match=r"has a full model, .* and no LoRA") as caught:
        open_artist(str(small_base), lora=str(small_session.folder))
    assert "--format lora" in caught.value.hint


def test_what_a_lora_session_learned_is_drawn_by_sample(small_base, small_session) -> None:
    from PIL import Image

    train(config_for(small_base, **LORA), small_session)
    result = sample(SampleConfig(count=1, sample_steps=2), small_session)
    assert Image.open(result.path).size[0] > 64


def test_the_input_of_half_precision_layers_is_not_copied_for_the_matrices_and_no_bit_changes() -> None:
    def gradients(*, as_peft: bool) -> tuple[list, dict[int, int]]:
        torch.manual_seed(0)
        layers = torch.nn.ModuleDict({name: torch.nn.Linear(32, 32) for name in ("to_q", "to_k", "to_v")})
        layers.to(torch.bfloat16).requires_grad_(False)
        family = SimpleNamespace(takes_lora=lambda _part, name, _targets: bool(name))
        add_lora(family, {"unet": layers}, "unet", rank=4, alpha=6.0, seed=1, targets="attention")
        for layer in layers.values():
            layer.cast_input_dtype_enabled |= as_peft
        with torch.no_grad():
            for _name, matrix in lora_parameters(layers):
                matrix += 0.1 * torch.randn(matrix.shape)
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if len(tensor) == 64:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        values = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
            loss = sum(layer(values).float().square().mean() for layer in layers.values())
        loss.backward()
        return [values.grad, *(matrix.grad for _name, matrix in lora_parameters(layers))], kept

    ours, kept = gradients(as_peft=False)
    pefts, more = gradients(as_peft=True)
    assert all(torch.equal(a, b) for a, b in zip(ours, pefts, strict=True))
    assert sum(more.values()) - sum(kept.values()) == 2 * 64 * 32 * 2, "q, k and v keep one input, not one each"


def test_a_lora_is_merged_one_layer_at_a_time():
    state = {f"{number}.weight": torch.ones(8, 8, dtype=torch.bfloat16) for number in range(3)}
    shapes = {"A": (2, 8), "B": (8, 2)}
    pairs = {f"{layer}.lora_{side}.weight": torch.ones(shapes[side]) for layer in range(3) for side in shapes}
    seen = []
    for _name, merged in merge_lora(state, pairs, alpha=1.0):
        assert all(earlier() is None for earlier in seen[:-1]), "a large model's layers do not fit beside it"
        assert merged.dtype is torch.float32
        assert (merged == 2).all(), "1 + 1 / 2 * 2"
        seen.append(weakref.ref(merged))
        del merged
    assert len(seen) == 3
