"""What a stage works on: which images are learned, which are judged, what a forward pass gets, what is put back."""

from pathlib import Path

import pytest
from installed import require_installed

torch = pytest.importorskip("torch")

import numpy as np  # noqa: E402
from dreambooth_runs import config_for  # noqa: E402
from PIL import Image  # noqa: E402

from fastsd_helpers.device import Device  # noqa: E402
from fastsd_helpers.dreambooth.dataset.prepared import Dataset, PreparedImage  # noqa: E402
from fastsd_helpers.dreambooth.resume import CheckpointStore, Generation, Snapshot  # noqa: E402
from fastsd_helpers.dreambooth.settings import resolve_settings  # noqa: E402
from fastsd_helpers.dreambooth.training.base_model import BaseModel  # noqa: E402
from fastsd_helpers.dreambooth.training.cache import encode_images  # noqa: E402
from fastsd_helpers.dreambooth.training.randomness import draw_offset, draw_step  # noqa: E402
from fastsd_helpers.dreambooth.training.segments import STAGE_NAMES  # noqa: E402
from fastsd_helpers.dreambooth.training.stages import TrainingContext, open_stage  # noqa: E402
from fastsd_helpers.errors import CheckpointError, Interrupted  # noqa: E402

require_installed("diffusers")

CPU = Device(kind="cpu", name="test", memory_bytes=2**33, has_bf16=False)
LORA_A = [0.185367, -0.194415, -0.038644, 0.157072]


def pictures(folder: Path, kind: str, *prompts: str) -> tuple[PreparedImage, ...]:
    """One image of random pixels for each prompt."""
    made = []
    for place, prompt in enumerate(prompts):
        path = folder / f"{kind}-{place}.png"
        seed = sum(path.name.encode())
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        made.append(PreparedImage(path, "", prompt))
    return tuple(made)


def open_studio(base: Path, **values) -> TrainingContext:
    model = BaseModel.fetch(str(base))
    config, _ = resolve_settings(config_for(base, **values), model.spec, CPU)
    return TrainingContext(model, config, CPU)


# -------------------------------------------------------------------------------------- learned and judged pictures


@pytest.mark.parametrize("before", [0, 2, 5])
def test_a_stop_is_heard_before_each_image_that_is_encoded(small_base, tmp_path, before):
    context, asked = open_studio(small_base, flip=True), iter(range(9))
    data = Dataset(pictures(tmp_path, "train", "a", "b", "c"), pictures(tmp_path, "held-out", "z"))
    with pytest.raises(Interrupted, match="Stopped while the images were encoded"):
        context.fill_caches(data, stopped=lambda: next(asked) >= before)
    assert not hasattr(context, "held_out")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("held_out", [(), ("z",), ("b", "z", "b")])
def test_the_pictures_that_are_judged_are_those_held_out_and_the_label_says_which(small_base, tmp_path, held_out, flip):
    context = open_studio(small_base, flip=flip)
    train, kept = pictures(tmp_path, "train", "b", "a", "b", "c"), pictures(tmp_path, "held-out", *held_out)
    context.fill_caches(Dataset(train, kept))
    vae = context.base.load("vae")

    def encode(images):
        return encode_images(context.family, vae, images, (64, 64), device="cpu")

    assert torch.equal(context.latents.buckets[0].mean, encode(train).mean)
    assert [context.prompts[place] for place in context.prompt_of] == ["b", "a", "b", "c"]
    assert (context.latents.buckets[0].mirrored is not None) == flip

    judged = kept or train
    (held,) = context.held_out
    rows = len(held.timesteps)
    each = rows // len(judged)
    assert rows == each * len(judged)
    own = encode(judged).mean
    for row in range(rows):
        assert torch.equal(held.latents[row], own[row // each]), "mirrored, or another image"
        assert context.prompts[held.prompts[row]] == judged[row // each].prompt
    said = "held-out images" if held_out else "training images, reserved noise"
    assert context.held_out_label == held.label == said
    trained = {latent.flatten()[0].item() for latent in context.latents.buckets[0].mean}
    assert trained.isdisjoint(latent.flatten()[0].item() for latent in held.latents) == bool(held_out)


# ------------------------------------------------------------------------------------------------ a forward pass


@pytest.mark.parametrize("stage", ["unet", "text_encoder"])
@pytest.mark.parametrize("offset_noise", [0.0, 0.1])
@pytest.mark.parametrize("classes", [False, True])
def test_a_forward_pass_is_the_pictures_that_were_drawn_with_their_prompts(
    small_base, tmp_path, stage, offset_noise, classes
):
    prior = {"class_prompt": "a robot | a dog", "class_images": 2, "prior_weight": 0.5} if classes else {}
    context = open_studio(
        small_base, batch_size=3, accumulation=2, flip=True, offset_noise=offset_noise, seed=7, **prior
    )
    others = pictures(tmp_path, "class", "a dog", "a robot") if classes else ()
    context.fill_caches(Dataset(pictures(tmp_path, "train", "b", "a", "b", "c"), ()), others)
    found = [(step, part, context.draw_batch(stage, step, part)) for step in range(3) for part in range(2)]
    for step, part, batch in found:
        assert batch.class_rows == (3 if classes else 0)
        assert len(batch.prompts) == len(batch.latents) == len(batch.timesteps) == (6 if classes else 3)
        halves = [(stage, context.latents, ["b", "a", "b", "c"], slice(0, 3), True)]
        if classes:
            halves.append((f"{stage}/class", context.class_latents, ["a dog", "a robot"], slice(3, 6), False))
        for key, latents, prompts, rows, flip in halves:
            draw = draw_step(
                7, key, step, part, parts=2, batch_size=3, images=[len(prompts)], latent_shapes=[(4, 8, 8)], flip=flip
            )
            assert [context.texts[place] for place in batch.prompts[rows]] == [prompts[image] for image in draw.images]
            expected = latents.buckets[0].draw(draw.images, draw.flips, draw.posterior_noise)
            assert torch.equal(batch.latents[rows], expected)
            assert torch.equal(batch.timesteps[rows], draw.timesteps)
            offset = draw_offset(7, key, step, part, batch_size=3, channels=4)
            assert torch.allclose(batch.noise[rows], draw.noise + offset_noise * offset, rtol=1e-6)
    assert len({batch.noise.flatten()[0].item() for _, _, batch in found}) == len(found)


# ------------------------------------------------------------------------------------------------- a checkpoint


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_lora_of_other_layers_is_refused_and_not_put_in_in_part(small_base, tmp_path, stage):
    context = open_studio(small_base, method="lora", lora_rank=2)
    context.fill_caches(Dataset(pictures(tmp_path, "train", "a"), ()))
    job = open_stage(stage, context, None)
    before = {name: tensor.clone() for name, tensor in job.weights().items()}
    state, record = job.state()
    learned = {name: tensor + 1 for name, tensor in state[stage].items()}
    first = next(iter(learned))

    def saved(number: int, tensors: "dict[str, torch.Tensor]") -> Generation:
        scratch = tmp_path / f"scratch-{number}"
        with CheckpointStore(tmp_path / f"checkpoints-{number}", scratch=scratch, report=print) as store:
            store.save(Snapshot(stage, 1, {**state, stage: tensors}, record))
            assert store.flush() == []
            return store.newest()[0]

    others = (
        {name: tensor for name, tensor in learned.items() if name != first},
        {**learned, f"more.{first}": learned[first]},
        {name if name != first else f"other.{name}": tensor for name, tensor in learned.items()},
        {},
    )
    for number, other in enumerate(others):
        generation = saved(number, other)
        with pytest.raises(CheckpointError, match="LoRA has other layers than this model") as caught:
            job.restore(generation)
        assert "--restart" in caught.value.hint
        assert all(torch.equal(tensor, before[name]) for name, tensor in job.weights().items())

    job.restore(saved(len(others), learned))
    assert all(torch.equal(tensor, learned[name]) for name, tensor in job.weights().items())


def test_a_lora_begins_with_the_matrices_that_were_recorded(small_base, tmp_path):
    """A run that is begun anew, and one that an earlier version began, start from the same ones."""
    context = open_studio(small_base, method="lora", lora_rank=2)
    context.fill_caches(Dataset(pictures(tmp_path, "train", "a"), ()))
    weights = open_stage(STAGE_NAMES[0], context, None).weights()
    name = "encoder.layers.3.self_attn.q_proj.lora_A.weight"
    assert weights[name][1, :4].tolist() == pytest.approx(LORA_A, abs=1e-6)
    assert all(not tensor.any() for name, tensor in weights.items() if ".lora_B." in name)
    firsts = {tensor.flatten()[0].item() for name, tensor in weights.items() if ".lora_A." in name}
    assert len(firsts) == len(weights) // 2, "each from its own key"


@pytest.mark.parametrize("segments", [["unet"], ["text_encoder", "unet"], ["text_encoder", "unet", "unet 2"]])
def test_the_plot_says_which_pictures_the_held_out_loss_is_of(tmp_path, monkeypatch, segments) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    from fastsd_helpers.dreambooth.results.curves import plot_losses

    drawn = []
    real = figure.Figure
    monkeypatch.setattr(figure, "Figure", lambda **options: drawn.append(real(**options)) or drawn[-1])
    history = {name: torch.rand(5) for name in segments}
    plot_losses(history, [[0, 0.5], [5, 0.4]], tmp_path / "loss.png", label="training images, reserved noise")
    legend = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert legend[-1] == "held-out loss (training images, reserved noise)"
    assert len(legend) == 1 + len({name.partition(" ")[0] for name in segments})
