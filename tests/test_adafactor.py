"""All weights of a model trained by Adafactor: fused with the backward pass, in bfloat16, and the same after a cut."""

import json
import shutil
from types import SimpleNamespace

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from dreambooth_runs import (  # noqa: E402
    build_base,
    config_for,
    draw_quickly,
    learned,
    make_session,
    same,
)
from test_sdxl import CPU, open_base, open_studio  # noqa: E402

from fastsd_helpers.checkpoints import convert  # noqa: E402
from fastsd_helpers.dreambooth import export, plan, train  # noqa: E402
from fastsd_helpers.dreambooth.results.learned import ExportConfig  # noqa: E402
from fastsd_helpers.dreambooth.resume.generation import load_tensors, save_tensors  # noqa: E402
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings  # noqa: E402
from fastsd_helpers.dreambooth.training.adafactor import round_stochastically  # noqa: E402
from fastsd_helpers.dreambooth.training.cache import Latents, SortedLatents  # noqa: E402
from fastsd_helpers.dreambooth.training.randomness import generator_for  # noqa: E402
from fastsd_helpers.dreambooth.training.stages import open_stage  # noqa: E402
from fastsd_helpers.errors import SettingsError  # noqa: E402

require_installed("diffusers")

FULL = {"method": "full", "unet_lr": 1e-3, "text_encoder_lr": 1e-3}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    return {key: build_base(folder / key, key) for key in ("sdxl-v", "sdxl-short")}


# ------------------------------------------------------------------------------------------------ the rounding


def neighbours(values):
    """The bfloat16 values next to each, toward zero and away from it."""
    below = (values.view(torch.int32) & -(2**16)).view(torch.float32)
    return below, (below.view(torch.int32) + 2**16).view(torch.float32)


def test_a_rounded_value_is_one_of_its_two_neighbours_and_one_that_fits_is_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    scales = 10.0 ** torch.randint(-38, 38, (100_000,), generator=generator)  # down to numbers that have no exponent
    values = torch.randn(100_000, generator=generator) * scales
    rounded = round_stochastically(values.clone(), generator).float()
    near, far = neighbours(values)
    assert ((rounded == near) | (rounded == far)).all()
    assert (rounded == near).any()
    assert (rounded == far).any()
    fitting = values.bfloat16()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan")]).bfloat16()
    for exact in (fitting, special):
        again = round_stochastically(exact.float(), generator)
        assert again.dtype == torch.bfloat16
        assert torch.equal(again.view(torch.int16), exact.view(torch.int16))


def test_the_mean_of_many_roundings_is_the_value() -> None:
    draws, generator = 20_000, torch.Generator().manual_seed(2)
    values = torch.randn(50, generator=generator)
    near, far = neighbours(values)
    rounded = round_stochastically(values.repeat(draws, 1), generator).double()
    place = (far - near).abs().double()
    share = ((values - near) / (far - near)).double()
    deviation = place * (share * (1 - share) / draws).sqrt()  # of a mean of so many draws of two values
    assert ((rounded.mean(0) - values).abs() <= 5 * deviation + 1e-12).all()
    # To the nearest, most are off by far more than that.
    assert ((values.bfloat16().double() - values).abs() > 5 * deviation).float().mean() > 0.9


def test_rounding_is_drawn_with_seed_stage_step_and_parameter() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    keys = [(5, "unet", 0, "a"), (6, "unet", 0, "a"), (5, "unet+1", 0, "a"), (5, "unet", 1, "a"), (5, "unet", 0, "b")]
    rounded = [round_stochastically(values.clone(), generator_for(*key, device="cpu")) for key in (keys[0], *keys)]
    assert torch.equal(rounded[0], rounded[1])
    assert all(not torch.equal(rounded[0], other) for other in rounded[2:])


# ---------------------------------------------------------------------------------------------------- the step


@pytest.mark.numeric
def test_fused_steps_in_float32_are_torchs_adafactor_bit_for_bit(bases) -> None:
    """Tolerance: none. Reference: torch.optim.Adafactor over copies, kernels as matrices, stepped after the pass."""
    context = open_studio(bases["sdxl-short"], precision="fp32", **FULL)
    job, plain = open_stage("unet", context, None), open_stage("unet", context, None)
    own = [torch.nn.Parameter(each.data.flatten(1) if each.dim() > 1 else each.data) for each in plain.parameters]
    optimizer = torch.optim.Adafactor(own, lr=1e-3, eps=(1e-18, 1.0))
    for hooked in plain.parameters:  # its gradients are kept
        hooked._post_accumulate_grad_hooks.clear()
    for step in range(3):
        loss = plain.loss_of(context.draw_batch("unet", step, 0))
        loss.backward()
        for mine, parameter in zip(own, plain.parameters, strict=True):
            mine.grad, parameter.grad = parameter.grad.view(mine.shape), None
        optimizer.step()
        assert job.take_step(step, 1e-3) == loss.item()
        different = [
            name
            for name, a, b in zip(job.names, job.parameters, plain.parameters, strict=True)
            if not torch.equal(a, b)
        ]
        assert different == [], f"after step {step}"


def test_a_gradient_is_gone_before_the_next_one_comes(bases) -> None:
    for accumulation, fused in ((1, True), (2, False)):
        job = open_stage("unet", open_studio(bases["sdxl-short"], accumulation=accumulation, **FULL), None)
        held = []
        for parameter in job.parameters:
            parameter.register_post_accumulate_grad_hook(
                lambda _, job=job, held=held: held.append(sum(each.grad is not None for each in job.parameters))
            )
        job.take_step(0, 1e-3)
        assert (max(held) == 0) is fused
        assert max(held) in (0, len(job.parameters))
        assert all(parameter.grad is None for parameter in job.parameters)


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["unet", "text_encoder"])
def test_fused_or_after_the_pass_and_computed_again_or_not_the_weights_are_the_same(bases, stage) -> None:
    ends = []
    for hooks, again in ((True, False), (False, False), (True, True)):
        values = {"precision": "bf16", "gradient_checkpointing": again, "min_snr": 5.0, **FULL}
        job = open_stage(stage, open_studio(bases["sdxl-short"], **values), None)
        if not hooks:
            for parameter in job.parameters:
                parameter._post_accumulate_grad_hooks.clear()
        begun = {name: tensor.clone() for name, tensor in job.weights().items()}
        for step in range(2):
            job.take_step(step, 1e-3)
        ends.append(job.weights())
        assert {tensor.dtype for tensor in ends[-1].values()} == {torch.bfloat16}
        assert {tensor.dtype for tensor in job.stepper.state()[0].values()} == {torch.float32}
        changed = sum(not torch.equal(tensor, begun[name]) for name, tensor in ends[-1].items())
        assert changed > 0.8 * len(begun)
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_weights_that_two_passes_of_one_loss_use_are_stepped_once(bases) -> None:
    """Class images of another size take a pass of their own."""
    context = open_studio(bases["sdxl-short"], class_prompt="a dog", class_images=2, prior_weight=1.0, **FULL)
    generator = torch.Generator().manual_seed(4)
    mean, numbers = torch.randn((2, 4, 16, 8), generator=generator), torch.tensor([[64.0, 128, 0, 0, 64, 128]] * 2)
    context.class_latents, context.class_prompt_of = SortedLatents.one(Latents(mean, mean / 10, None, numbers)), [2, 2]
    fused, plain = open_stage("unet", context, None), open_stage("unet", context, None)
    for parameter in plain.parameters:
        parameter._post_accumulate_grad_hooks.clear()
    assert context.draw_batch("unet", 0, 0).apart is not None
    assert fused.take_step(0, 1e-3) == plain.take_step(0, 1e-3)
    assert same(fused.weights(), plain.weights())
    assert {float(value) for name, value in fused.stepper.state()[0].items() if name.startswith("step/")} == {1.0}


# ------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTSD_SCRATCH", str(tmp_path / "scratch"))
    draw_quickly(monkeypatch)
    return make_session(tmp_path)


@pytest.mark.numeric
@pytest.mark.parametrize("stage", ["unet", "text_encoder"])
def test_a_stage_that_is_gone_on_with_ends_with_the_same_bits(bases, tmp_path, stage) -> None:
    context = open_studio(bases["sdxl-short"], **FULL, precision="bf16")
    whole = open_stage(stage, context, None)
    for step in range(3):
        whole.take_step(step, 1e-3)
    cut = open_stage(stage, context, None)
    cut.take_step(0, 1e-3)
    tensors, record = cut.state()
    for role, values in tensors.items():
        save_tensors(values, tmp_path / role)
    record = json.loads(json.dumps(record))
    saved = SimpleNamespace(load=lambda role: load_tensors(tmp_path / role), record=record)
    again = open_stage(stage, context, saved)
    for step in (1, 2):
        again.take_step(step, 1e-3)
    for mine, theirs in zip(again.state()[0].values(), whole.state()[0].values(), strict=True):
        assert same(mine, theirs)


@pytest.mark.numeric
def test_a_run_takes_the_room_that_was_planned_and_its_file_is_the_weights_that_diffusers_loads(
    bases, session, tmp_path
) -> None:
    from diffusers import UNet2DConditionModel

    values = {**FULL, "precision": "bf16", "min_snr": 5.0, "unet_steps": 1, "text_encoder_steps": 0}
    settings = config_for(bases["sdxl-v"], **values)
    planned = plan(settings, session).generation_bytes["unet"]
    done = train(settings, session)
    assert done.path.name == "robot.safetensors"
    tensors = learned(session, "unet")
    assert planned == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    path = export(ExportConfig(dtype="fp32", out=str(tmp_path / "whole.safetensors")), session).path
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert {"v_pred", "ztsnr", "first_stage_model.decoder.conv_in.weight"} <= header.keys()
    folder = convert(path, tmp_path / "folder").path
    # Of a small model the file does not tell all: its configuration is the base's.
    shutil.copy(bases["sdxl-v"] / "unet" / "config.json", folder / "unet" / "config.json")
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    before = open_base(bases["sdxl-v"]).load("unet").state_dict()
    assert {f"unet/{name}" for name in theirs} == tensors.keys()
    assert all(torch.equal(theirs[name], tensors[f"unet/{name}"].float()) for name in theirs)
    assert sum(not torch.equal(before[name], theirs[name]) for name in theirs) > 0.8 * len(theirs)


# --------------------------------------------------------------------------------------------------- settings


def test_what_is_left_alone_is_adafactor_at_a_tenth_of_a_loras_rate_with_the_text_encoders_as_they_are(bases) -> None:
    spec = open_base(bases["sdxl-v"]).spec
    config, reasons = resolve_settings(DreamBoothConfig(base_model="x", method="full"), spec, CPU)
    assert (config.optimizer, config.precision, config.text_encoder_steps) == ("adafactor", "fp32", 0)
    assert config.unet_lr == pytest.approx(1e-5)
    assert "each tensor is stepped within the backward pass" in " ".join(reasons)
    half = DreamBoothConfig(base_model="x", method="full", precision="bf16", accumulation=2)
    reasons = resolve_settings(half, spec, CPU)[1]
    assert "kept in bf16 and rounded stochastically" in " ".join(reasons)
    assert "their gradients are summed before it, which takes 2 bytes a weight more" in " ".join(reasons)
    other = DreamBoothConfig(base_model="x", method="full", optimizer="adamw", precision="bf16", ema=0.9)
    assert resolve_settings(other, spec, CPU)[0].optimizer == "adamw"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "lora", "optimizer": "adafactor"}, "method is lora"),
        ({"method": "full", "precision": "fp16"}, r"precision \(--precision\) is fp16"),
        ({"method": "full", "precision": "bf16", "ema": 0.9}, "its small steps would be lost"),
    ],
)
def test_what_adafactor_cannot_be_combined_with_is_refused_with_a_way_out(bases, values, said) -> None:
    spec = open_base(bases["sdxl-v"]).spec
    with pytest.raises(SettingsError, match=said) as caught:
        resolve_settings(DreamBoothConfig(base_model="x", **values), spec, CPU)
    assert "hoose" in caught.value.hint
