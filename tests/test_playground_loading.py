"""How a model is loaded for drawing, and drawn with: dtype, place, steps, guidance, zero SNR, unions."""

import dataclasses
import types
from pathlib import Path
from typing import Any

import pytest

from fastsd_helpers.device import Device
from fastsd_helpers.errors import ModelError, SettingsError
from fastsd_helpers.playground import Artist, loading
from fastsd_helpers.playground.habits import habits_of
from fastsd_helpers.playground.steering import load_controlnet
from fastsd_helpers.registry import find_model

GB = 10**9


@pytest.fixture
def diffusers() -> Any:
    return pytest.importorskip("diffusers")


def a_pipe(scheduler: Any, **parts: Any) -> Any:
    """What habits are told from: a pipeline's parts, with real schedulers."""
    unet = types.SimpleNamespace(config={})
    return types.SimpleNamespace(**{"unet": unet, "scheduler": scheduler, **parts})


# --------------------------------------------------------------------------------------------------- habits


def test_each_kind_of_model_is_drawn_with_the_steps_and_guidance_it_was_made_for(diffusers: Any) -> None:
    two = {"text_encoder_2": object()}
    whole = types.SimpleNamespace(config={"time_cond_proj_dim": 256})
    euler = diffusers.EulerDiscreteScheduler
    ancestral = diffusers.EulerAncestralDiscreteScheduler
    told = {
        "sd15": habits_of(a_pipe(diffusers.PNDMScheduler())),
        "sdxl": habits_of(a_pipe(euler(), **two)),
        "sdxl turbo": habits_of(a_pipe(ancestral(timestep_spacing="trailing"), **two)),
        "lcm": habits_of(a_pipe(diffusers.LCMScheduler(), unet=whole)),
        "with lcm's lora": habits_of(a_pipe(diffusers.LCMScheduler())),
        "playground 2.5": habits_of(a_pipe(diffusers.EDMDPMSolverMultistepScheduler(), **two)),
    }
    assert {name: (one.steps, one.guidance, one.takes_negative) for name, one in told.items()} == {
        "sd15": (25, 7.5, True),
        "sdxl": (30, 5.0, True),
        "sdxl turbo": (2, 0.0, False),
        "lcm": (4, 8.0, False),
        "with lcm's lora": (6, 1.0, False),
        "playground 2.5": (30, 3.0, True),
    }


@pytest.mark.parametrize(("guided", "steps", "guidance"), [(True, 28, 3.5), (False, 4, 0.0)])
def test_flux_dev_and_schnell_are_told_apart_by_their_transformer(guided: bool, steps: int, guidance: float) -> None:
    pipe = types.SimpleNamespace(transformer=types.SimpleNamespace(config={"guidance_embeds": guided}))
    habits = habits_of(pipe)
    assert (habits.steps, habits.guidance, habits.multiple) == (steps, guidance, 16)
    assert dict(habits.extra) == ({} if guided else {"max_sequence_length": 256})


@pytest.mark.parametrize(
    "kind", ["PNDMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_a_model_of_zero_terminal_snr_begins_from_pure_noise_whatever_its_scheduler_was(
    diffusers: Any, tmp_path: Path, kind: str
) -> None:
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    getattr(diffusers, kind)(**settings, prediction_type="v_prediction").save_pretrained(tmp_path)
    import json

    path = tmp_path / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescale_betas_zero_snr": True}))
    pipe = a_pipe(getattr(diffusers, kind).from_pretrained(tmp_path))
    habits = habits_of(pipe)
    assert dict(habits.extra) == {"guidance_rescale": 0.7}
    pipe.scheduler.set_timesteps(10)
    assert int(pipe.scheduler.timesteps[0]) == 999
    assert float(pipe.scheduler.alphas_cumprod[-1]) < 1e-7, "no signal is left at the last step"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler.config.timestep_spacing == "trailing"


def test_words_that_a_pipeline_does_not_take_are_not_said_to_it(diffusers: Any) -> None:
    from PIL import Image

    class Rescales:
        unet = types.SimpleNamespace(config={})
        asked: dict[str, Any]

        def __init__(self) -> None:
            self.scheduler = diffusers.EulerDiscreteScheduler(rescale_betas_zero_snr=True)

        def __call__(self, prompt: str, guidance_rescale: float = 0.0, **options: Any) -> Any:
            self.asked = {"guidance_rescale": guidance_rescale, **options}
            return types.SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    class Plain(Rescales):
        def __call__(self, prompt: str, num_inference_steps: int, guidance_scale: float, **options: Any) -> Any:
            assert "guidance_rescale" not in options
            return types.SimpleNamespace(images=[Image.new("RGB", (8, 8))])

    rescales = Rescales()
    Artist("one", find_model("demo"), rescales).draw("a fish")
    assert rescales.asked["guidance_rescale"] == 0.7
    assert rescales.asked["num_inference_steps"] == 25
    Artist("another", find_model("demo"), Plain()).draw("a fish")


def test_a_negative_prompt_where_none_counts_and_a_size_between_patches_are_refused() -> None:
    pipe = types.SimpleNamespace(transformer=types.SimpleNamespace(config={"guidance_embeds": True}))
    artist = Artist("Flux", find_model("demo"), pipe)
    with pytest.raises(SettingsError) as caught:
        artist.draw("a fish", negative="blur", size=136, guidance=30)
    for words in ("does not support a negative prompt", "a multiple of 16", "guidance is 30; it must be 0 to 20"):
        assert words in caught.value.problem


# --------------------------------------------------------------------------------------------------- loading


def a_gpu(name: str, *, bf16: bool) -> Device:
    return Device("cuda", name, 16 * GB, bf16, (8, 9) if bf16 else (7, 5))


@pytest.mark.parametrize(
    ("part", "bf16", "said"),
    [
        ("unet", True, "float16"),
        ("unet", False, "float16"),
        ("transformer", True, "bfloat16"),
        ("transformer", False, "float16"),
    ],
)
def test_a_transformer_computes_in_bf16_where_the_gpu_can(part: str, bf16: bool, said: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    (tmp_path / part).mkdir()
    assert loading.choose_dtype(a_gpu("a GPU", bf16=bf16), tmp_path) is getattr(torch, said)
    assert loading.choose_dtype(Device("cpu", "a CPU", GB, True), tmp_path) is torch.float32


class Placed:
    """A pipeline that says where it was put."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.vae = types.SimpleNamespace(enable_tiling=lambda: self.said.append("tiles"))

    def to(self, kind: str) -> "Placed":
        self.said.append(kind)
        return self

    def enable_model_cpu_offload(self) -> None:
        self.said.append("parts in turns")

    def enable_sequential_cpu_offload(self) -> None:
        self.said.append("layers in turns")


@pytest.mark.parametrize(
    ("free", "said"),
    [
        (80, ["cuda"]),
        (11, ["tiles", "cuda"]),
        (8, ["tiles", "parts in turns"]),
        (4, ["tiles", "layers in turns"]),
    ],
)
def test_what_is_free_on_the_gpu_decides_and_not_its_size(
    free: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * GB, 80 * GB))
    sizes = {"unet": 5 * GB, "text_encoder": 2 * GB}
    assert loading.place_pipeline(Placed(), a_gpu("a GPU", bf16=True), sizes).said == said


def test_parts_are_counted_in_the_format_they_will_have_and_variants_once(tmp_path: Path) -> None:
    from table_models import values, write

    for name, count in {"unet/a-00001-of-00002": 100, "unet/a-00002-of-00002": 50, "unet/a.fp16": 150}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / f"{name}.safetensors", values({"weight": (count,)}))
    assert loading.part_sizes(tmp_path, 2) == {"unet": 300}


def test_a_model_larger_than_the_free_memory_is_refused_before_it_ends_the_program(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("diffusers")
    from fastsd_helpers.model_lookup import fetch_model

    demo = fetch_model("demo")
    monkeypatch.setattr(loading, "find_memory_left", lambda: 10**6)
    with pytest.raises(ModelError, match=r"takes 0\.0 GB of memory to load, and 0\.0 GB are free") as caught:
        loading.load_pipeline(demo)
    assert "fastsd webui launch" in caught.value.hint


# --------------------------------------------------------------------------------------------------- unions


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Any:
    diffusers = pytest.importorskip("diffusers")
    import torch
    from tiny_families import VOCAB, build_parts
    from tiny_models import make_tokenizer

    torch.manual_seed(0)
    words = make_tokenizer(tmp_path_factory.mktemp("words"), VOCAB)
    pipe = diffusers.StableDiffusionXLPipeline(
        **build_parts("sdxl"),
        tokenizer=words,
        tokenizer_2=words,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_a_union_controlnet_of_sdxl_steers_by_the_condition_that_is_chosen(sdxl: Any, tmp_path: Path) -> None:
    import diffusers
    import torch
    from PIL import Image, ImageDraw

    torch.manual_seed(1)
    # Its class takes the widths of what tells conditions apart for granted.
    shape = dict(diffusers.ControlNetUnionModel.from_unet(sdxl.unet).config)
    small = {"num_trans_channel": 32, "num_trans_head": 4, "num_proj_channel": 32}
    shape = {name: value for name, value in shape.items() if not name.startswith("_")}
    union = diffusers.ControlNetUnionModel(**shape | small)
    for name, value in union.named_parameters():
        if name.startswith(("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")):
            torch.nn.init.normal_(value, std=0.05)
        elif name.startswith(("control_type_embedding", "task_embedding")):
            torch.nn.init.normal_(value, std=1.0)
    union.save_pretrained(tmp_path / "union")
    steering = load_controlnet(sdxl, str(tmp_path / "union"), "sdxl")
    assert steering.modes["canny"] == 3
    assert "tile" not in steering.tasks, "this one has six control types"
    spec = dataclasses.replace(find_model("demo"), native_px=64)
    artist = Artist("SDXL", spec, sdxl, steering=steering)
    assert artist.habits.guidance == 5.0
    photo = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(photo).rectangle((16, 16, 48, 48), fill="black")
    drawn = {"plain": artist.draw("a fish", steps=2)[0][1].tobytes()}
    for task in ("depth", "canny", "normal"):
        drawn[task] = artist.draw("a fish", steps=2, control=photo, control_task=task)[0][1].tobytes()
    drawn["begun"] = artist.draw("a fish", steps=2, control=photo, control_task="canny", start=photo)[0][1].tobytes()
    assert len(set(drawn.values())) == 5
    with pytest.raises(SettingsError, match="control_task is 'tile'; it must be one of openpose, depth, softedge"):
        artist.draw("a fish", control=photo, control_task="tile")


def test_a_union_controlnet_of_flux_has_as_many_tasks_as_its_configuration_says() -> None:
    diffusers = pytest.importorskip("diffusers")
    import torch

    from fastsd_helpers.playground.steering import Steering, modes_of

    with torch.device("meta"):
        shape = {"num_layers": 1, "num_single_layers": 0, "attention_head_dim": 16, "num_attention_heads": 2}
        shape |= {"joint_attention_dim": 8, "pooled_projection_dim": 8, "axes_dims_rope": (4, 6, 6)}
        seven, plain = (diffusers.FluxControlNetModel(**shape, num_mode=count) for count in (10, None))
    assert modes_of(seven) == {"canny": 0, "tile": 1, "depth": 2, "blur": 3, "openpose": 4, "gray": 5, "lq": 6}
    assert Steering(seven, "depth", modes_of(seven)).tasks[0] == "depth", "the one that was asked for comes first"
    assert Steering(plain, "canny", modes_of(plain)).tasks == ("canny",)
