"""One optimizer step of a stage against the same step written out plainly, and what of it is kept and put back."""

from pathlib import Path

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

from test_stages import open_studio, pictures  # noqa: E402

from fastsd_helpers.dreambooth.dataset.prepared import Dataset  # noqa: E402
from fastsd_helpers.dreambooth.resume import CheckpointStore, Snapshot  # noqa: E402
from fastsd_helpers.dreambooth.training.base_model import plain_names, suit_cpu, suits_cpu  # noqa: E402
from fastsd_helpers.dreambooth.training.lora import trained_count_of  # noqa: E402
from fastsd_helpers.dreambooth.training.loss import training_loss  # noqa: E402
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES  # noqa: E402
from fastsd_helpers.dreambooth.training.stages import open_stage  # noqa: E402

require_installed("diffusers")

TEXT_ENCODER, UNET = STAGE_NAMES
PRIOR = {"class_prompt": "a robot", "class_images": 1, "prior_weight": 0.5}


def studio_for(base: Path, folder: Path, **values):
    context = open_studio(base, **values)
    others = pictures(folder, "class", "a robot") if "class_prompt" in values else ()
    context.fill_caches(Dataset(pictures(folder, "train", "b", "a"), pictures(folder, "held-out", "c")), others)
    return context


def plain_step(job, step, lr):
    """The step written out: the mean of the parts' losses, gradients cut at a norm of 1, plain AdamW."""
    context, config = job.context, job.context.config
    losses = []
    for part in range(config.accumulation):
        batch = context.draw_batch(job.stage, step, part)
        losses.append(
            training_loss(
                job.predict,
                context.objective,
                batch.latents,
                batch.noise,
                batch.timesteps,
                job.text_for(batch.prompts),
                batch.pictures,
                min_snr=config.min_snr,
                class_rows=batch.class_rows,
                prior_weight=config.prior_weight,
            )
        )
    loss = sum(losses) / config.accumulation
    gradients = torch.autograd.grad(loss, job.parameters, allow_unused=True)
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in gradients if gradient is not None))
    scale = min(1.0, 1.0 / (norm.item() + 1e-6))
    return loss.item(), [None if gradient is None else gradient * scale for gradient in gradients], norm.item()


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize(
    "values",
    [
        {"accumulation": 3},
        {"batch_size": 2, "min_snr": 5.0, **PRIOR},
        {"method": "lora", "lora_rank": 2, "offset_noise": 0.1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda values: next(iter(values)),
)
def test_a_step_is_that_of_the_mean_loss_with_its_gradient_cut(small_base, tmp_path, stage, values):
    context = studio_for(small_base, tmp_path, optimizer="adamw", **values)
    job = open_stage(stage, context, None)
    before = [parameter.detach().clone() for parameter in job.parameters]
    loss, gradients, _norm = plain_step(job, 4, 1e-3)
    group = job.stepper.optimizer.param_groups[0]
    beta1, beta2, eps, decay = *group["betas"], group["eps"], group["weight_decay"]
    found = job.take_step(4, 1e-3)
    assert found == pytest.approx(loss, rel=1e-4)
    moved = 0
    for parameter, old, gradient in zip(job.parameters, before, gradients, strict=True):
        assert parameter.grad is None, "nothing of it is left for the next step"
        if gradient is None:
            continue
        mean, square = (1 - beta1) * gradient / (1 - beta1), (1 - beta2) * gradient**2 / (1 - beta2)
        expected = old * (1 - 1e-3 * decay) - 1e-3 * mean / (square.sqrt() + eps)
        sure = gradient.abs() > 1e-5  # where it is next to nothing its sign alone decides
        assert torch.allclose(parameter.detach()[sure], expected[sure], atol=2e-5)
        moved += int(sure.sum())
    assert moved > 50
    assert {name: group["lr"] for name, group in enumerate(job.stepper.optimizer.param_groups)} == {0: 1e-3}


def test_a_large_gradient_is_cut_before_the_optimizer_sees_it(small_base, tmp_path):
    context = studio_for(small_base, tmp_path, optimizer="adamw", batch_size=2, **{**PRIOR, "prior_weight": 10.0})
    job = open_stage(UNET, context, None)
    seen = []

    def look(optimizer, *_):
        held = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        seen.append(torch.sqrt(sum((gradient**2).sum() for gradient in held)).item())

    job.stepper.optimizer.register_step_pre_hook(look)
    _loss, _gradients, norm = plain_step(job, 0, 1e-3)
    assert norm > 1.5, "choose another weight: nothing is cut"
    job.take_step(0, 1e-3)
    assert seen == [pytest.approx(1.0, rel=1e-3)]


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_stage_trains_its_own_network_and_no_other(small_base, tmp_path, stage, method):
    context = studio_for(small_base, tmp_path, method=method, lora_rank=2)
    job = open_stage(stage, context, None)
    others = {name: tensor.clone() for name, tensor in job.unet.state_dict().items()}
    frozen = {name: p.detach().clone() for name, p in job.module.named_parameters() if not p.requires_grad}
    before = {name: tensor.clone() for name, tensor in job.weights().items()}
    for step in range(2):
        job.take_step(step, 1e-2)
    after = job.weights()
    assert after.keys() == before.keys()
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert bool(frozen) is (method == "lora")
    own = dict(job.module.named_parameters())
    assert all(torch.equal(own[name], tensor) for name, tensor in frozen.items())
    if stage is TEXT_ENCODER:
        assert all(torch.equal(tensor, others[name]) for name, tensor in job.unet.state_dict().items())
    assert context.trained == {"text_encoder": None, "unet": None}
    context.keep(job)
    assert context.trained[stage].keys() == after.keys()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_the_first_stage_learned_is_what_the_second_and_the_file_use(small_base, tmp_path, method):
    context = studio_for(small_base, tmp_path, method=method, lora_rank=2)
    base = context.whole_parts()
    assert base == {part: context.base.folder / part for part in ("text_encoder", "unet", "vae")}
    untouched = context.load_encoders()["text_encoder"].state_dict()
    empty = context.empty_text().sequence
    job = open_stage(TEXT_ENCODER, context, None)
    for step in range(3):
        job.take_step(step, 1e-2)
    learned = job.text_for([0, 1]).sequence.detach()
    context.keep(job)
    second = open_stage(UNET, context, None)
    assert torch.allclose(second.text_for([0, 1]).sequence, learned, atol=1e-5)
    assert not second.text_for([0]).sequence.requires_grad
    assert not torch.allclose(context.empty_text().sequence, empty)
    whole = context.whole_parts()
    assert whole["unet"] == context.base.folder / "unet"
    made = plain_names(context.load_encoders()["text_encoder"].state_dict())
    assert {name for name in whole["text_encoder"]} <= set(made)
    for name, tensor in whole["text_encoder"].items():
        assert torch.allclose(tensor, made[name], atol=1e-6), name
    plain = {name.removeprefix("text_model."): tensor for name, tensor in untouched.items()}
    assert any(not torch.equal(tensor, plain[name]) for name, tensor in whole["text_encoder"].items())


# --------------------------------------------------------------------------------------------- stopped and resumed


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize("values", [{}, {"ema": 0.9}, {"method": "lora", "lora_rank": 2, "ema": 0.5}], ids=str)
def test_a_stage_put_back_takes_the_same_next_step(small_base, tmp_path, stage, values):
    context = studio_for(small_base, tmp_path, **values)
    job = open_stage(stage, context, None)
    for step in range(2):
        job.take_step(step, 1e-2)
    tensors, record = job.state()
    assert set(tensors) == {stage, "optimizer", *(["raw"] if "ema" in values else [])}
    with CheckpointStore(tmp_path / "checkpoints", scratch=tmp_path / "scratch", report=print) as store:
        store.save(Snapshot(stage, 2, tensors, record))
        assert store.flush() == []
        generation = store.newest()[0]
    again = open_stage(stage, context, generation)
    assert again.held_out_loss() == pytest.approx(job.held_out_loss(), rel=1e-6)
    for one in (job, again):
        one.loss = one.take_step(2, 1e-2)
    assert again.loss == job.loss
    for name, tensor in job.weights().items():
        assert torch.equal(tensor, again.weights()[name])
    (first, rest), (second, _) = job.state(), again.state()
    assert all(torch.equal(tensor, second[role][name]) for role in first for name, tensor in first[role].items())
    assert rest["scaler"] == {}


def test_the_average_is_shown_judged_and_saved_and_training_goes_on_with_the_weights_themselves(small_base, tmp_path):
    plain, averaged = (open_stage(UNET, studio_for(small_base, tmp_path, ema=ema), None) for ema in (0.0, 0.5))
    for step in range(3):
        assert plain.take_step(step, 1e-2) == averaged.take_step(step, 1e-2)
    raw = averaged.state()[0]["raw"]
    assert "raw" not in plain.state()[0]
    assert all(torch.equal(tensor, raw[name]) for name, tensor in plain.weights().items())
    assert any(not torch.equal(tensor, raw[name]) for name, tensor in averaged.weights().items())
    assert plain.held_out_loss() != averaged.held_out_loss()
    with averaged.shown():
        assert averaged.held_out_loss() == pytest.approx(averaged.held_out_loss(), rel=1e-6)
    assert all(
        torch.equal(tensor, plain.module.state_dict()[name]) for name, tensor in averaged.module.state_dict().items()
    )


# -------------------------------------------------------------------------------------------------- sizes and forms


def test_the_counts_are_those_of_the_networks(small_base):
    full, lora = open_studio(small_base), open_studio(small_base, method="lora", lora_rank=2)
    for part in ("unet", "text_encoder"):
        count = sum(parameter.numel() for parameter in full.base.load(part).parameters())
        assert trained_count_of(full.base, full.config, part) == count
        assert 0 < trained_count_of(lora.base, lora.config, part) < count
        assert all(parameter.is_meta for parameter in full.base.build_empty(part).parameters())


@pytest.mark.parametrize(
    ("precision", "resolution", "suits"),
    [("bf16", 64, True), ("bf16", 512, True), ("fp32", 64, False)],
)
def test_the_forms_for_cpus_are_chosen_for_half_precision(small_base, precision, resolution, suits):
    context = open_studio(small_base, precision=precision, resolution=resolution)
    assert suits_cpu(context.config, "cpu") is suits
    with context.autocast():
        assert torch.is_autocast_enabled("cpu") is (precision == "bf16")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    groups = [part for part in context.load_denoiser().modules() if isinstance(part, torch.nn.GroupNorm)]
    assert groups
    assert all(("forward" in vars(part)) is suits for part in groups)


def test_the_form_for_cpus_computes_the_same(small_base):
    context = open_studio(small_base)
    unet, text_encoder = context.load_denoiser(), context.load_encoders()["text_encoder"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    ids = context.family.tokenize(context.tokenizers, ["a b", "c"])["text_encoder"]
    text = text_encoder(ids).last_hidden_state
    before = unet(noise, torch.tensor([3, 700]), text).sample
    suit_cpu(unet)
    suit_cpu(text_encoder)
    assert torch.allclose(text_encoder(ids).last_hidden_state, text, atol=1e-5)
    assert torch.allclose(unet(noise, torch.tensor([3, 700]), text).sample, before, atol=1e-5)
    assert text_encoder.config._attn_implementation == "eager"


@pytest.mark.parametrize(("side", "plain"), [(31, True), (32, False)])
def test_on_a_cpu_attention_is_plain_where_it_looks_at_few_tokens(small_base, monkeypatch, side, plain):
    unet = open_studio(small_base).load_denoiser()
    suit_cpu(unet)
    fused, attend = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, *rest, **more: fused.append(key.shape[2]) or attend(query, key, *rest, **more),
    )
    attention = next(part for part in unet.modules() if type(part).__name__ == "Attention")
    attention(torch.zeros(1, side * side, attention.query_dim))
    assert fused == ([] if plain else [side * side])
    attention = next(part for part in unet.modules() if getattr(part, "is_cross_attention", False))
    attention(torch.zeros(1, 2048, attention.query_dim), torch.zeros(1, 77, attention.cross_attention_dim))
    assert len(fused) == (not plain), "a prompt has few tokens, whatever the image's size"


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_few_values_are_kept_when_asked_and_never_else(small_base, tmp_path, stage):
    for asked in (True, False):
        job = open_stage(stage, studio_for(small_base, tmp_path, gradient_checkpointing=asked), None)
        found = [
            any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
            for module in {id(job.module): job.module, id(job.unet): job.unet}.values()
        ]
        assert found == [asked] * len(found)
        assert job.module.training is asked


@pytest.mark.parametrize("asked", [True, False])
def test_only_who_asks_for_it_gets_deterministic_algorithms(small_base, monkeypatch, asked):
    wanted = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", wanted.append)
    open_studio(small_base, deterministic=asked)
    assert wanted == ([True] if asked else [])
