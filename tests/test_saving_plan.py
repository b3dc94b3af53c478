"""How often a run can afford to save, what is lost at worst, and what is said where there is no room."""

import gzip
import json
import math
import sys
from pathlib import Path

import pytest

import fastsd_helpers.dreambooth.running.forecast  # noqa: F401 - the package's own name `plan` is a function
from fastsd_helpers.device import describe_device
from fastsd_helpers.dreambooth.families import family_named
from fastsd_helpers.dreambooth.running import saving_outlook as outlook
from fastsd_helpers.dreambooth.running.forecast import Plan, Standing, plan_run
from fastsd_helpers.dreambooth.running.saving_outlook import count_values, saving_outlook
from fastsd_helpers.dreambooth.settings import DreamBoothConfig, resolve_settings
from fastsd_helpers.errors import DiskFull
from fastsd_helpers.options import to_values
from fastsd_helpers.registry import find_model
from fastsd_helpers.sessions import Session

planning = sys.modules["fastsd_helpers.dreambooth.running.forecast"]
SD15 = family_named("sd15").published["attention"]
STEPS = {"text_encoder": 350, "unet": 1500}
GB = 10**9
MARGIN = 256 * 2**20


def plan_for(
    monkeypatch: pytest.MonkeyPatch,
    free: float,
    *,
    place: str = "drive",
    stages: dict[str, int] | None = None,
    standing: Standing | None = None,
    **settings,
) -> Plan:
    monkeypatch.setattr(planning, "free_bytes", lambda _folder: int(free * GB))
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda _folder: int(free * GB))
    monkeypatch.setattr(planning, "keeps_trash", lambda _folder: place == "drive")
    monkeypatch.setattr(planning, "delivers_late", lambda _folder: place != "disk")
    config = DreamBoothConfig(**{"optimizer": "adamw8bit", **settings})
    stages = STEPS if stages is None else stages
    kind = config.method, config.lora_rank
    export = SD15.export_bytes(*kind, stages)
    return plan_run(config, stages, SD15.trained(*kind), export, Path("x"), standing=standing)


@pytest.mark.parametrize(
    ("free", "gives_back", "save_every", "keep_last"),
    [(8, None, 0, 1), (8, True, 0, 1), (8, False, 0, 2),
     (13, None, 300, 1), (13, True, 300, 1), (13, False, 1500, 2),
     (15, None, 300, 1), (15, True, 300, 1), (15, False, 750, 2),
     (20, None, 300, 2), (100, None, 300, 2), (100, True, 300, 2), (100, False, 300, 2)],
)  # fmt: skip
def test_a_full_training_saves_as_often_as_the_drive_has_room(monkeypatch, free, gives_back, save_every, keep_last):
    made = plan_for(monkeypatch, free, standing=Standing(gives_back=gives_back))
    assert (made.config.save_every, made.config.keep_last) == (save_every, keep_last)


@pytest.mark.parametrize("free", [1, 8, 13, 15, 100])
@pytest.mark.parametrize("gives_back", [None, True, False])
def test_a_lora_always_has_room(monkeypatch, free, gives_back):
    made = plan_for(monkeypatch, free, method="lora", standing=Standing(gives_back=gives_back))
    assert (made.config.save_every, made.config.keep_last) == (300, 2)
    assert made.peak_bytes < GB / 4


@pytest.mark.parametrize("free", [8, 9, 11, 12, 13, 14, 15, 17, 19, 25, 40])
@pytest.mark.parametrize("gives_back", [None, True, False])
@pytest.mark.parametrize("stages", [STEPS, {"unet": 1500}, {"text_encoder": 350}, {"unet": 7}])
def test_what_is_planned_never_takes_more_than_there_is(monkeypatch, free, gives_back, stages):
    made = plan_for(monkeypatch, free, stages=stages, standing=Standing(gives_back=gives_back))
    if made.room_for_one:
        assert made.peak_bytes <= free * GB - MARGIN or made.peak_bytes + MARGIN <= free * GB
    # Live them through: what is not known to come back counts.
    room, gone, sizes, kept = free * GB, 0, made.generation_bytes, []
    for stage, steps in stages.items():
        for step in range(1, steps + 1):
            last = step == steps
            if not last and not (made.config.save_every and step % made.config.save_every == 0):
                continue
            spare = made.spare_bytes(stage, last=last, gives_back=gives_back)
            if sizes[stage] + spare <= room - gone - sum(kept):
                kept.append(sizes[stage])
                if len(kept) > made.config.keep_last:
                    gone += 0 if gives_back else kept[0]
                    kept.pop(0)
            assert gone + sum(kept) <= room
    while gives_back and len(kept) > 1:
        kept.pop(0)
    assert gone + sum(kept) + made.export_bytes <= room, "the finished file has room in the end"


def test_resumed_with_its_checkpoints_there_it_saves_as_often_as_before(monkeypatch):
    fresh = plan_for(monkeypatch, 15)
    held = fresh.generation_bytes["unet"] + 4 * SD15.text_encoder
    so_far = Standing(done={"text_encoder": 350, "unet": 600}, held_bytes=held, gives_back=True)
    resumed = plan_for(monkeypatch, 15 - held / GB, standing=so_far)
    assert resumed.config.save_every == fresh.config.save_every == 300
    assert resumed.written_bytes < fresh.written_bytes
    assert set(resumed.lost_steps) == {"unet"}


def test_before_anything_was_emptied_nothing_is_planned_that_would_have_to_wait_for_it(monkeypatch):
    unet = {"unet": 1500}
    made = plan_for(monkeypatch, 13, stages=unet)
    assert made.config.save_every == 750
    assert any("until it is known that emptied ones free their space" in line for line in made.lines())
    assert plan_for(monkeypatch, 13, stages=unet, standing=Standing(gives_back=True)).config.save_every == 300


def test_other_mounts_count_all_that_was_ever_written_and_disks_what_is_there(monkeypatch):
    assert plan_for(monkeypatch, 15, place="mount").config.save_every == 750
    assert plan_for(monkeypatch, 13, place="mount").config.save_every == 1500
    assert plan_for(monkeypatch, 13.3, place="disk").config.save_every == 300
    assert plan_for(monkeypatch, 11, place="disk").config.save_every == 0


@pytest.mark.parametrize("place", ["drive", "mount", "disk"])
@pytest.mark.parametrize("given", [{}, {"save_every": 100}, {"keep_last": 2}])
def test_no_room_for_one_checkpoint_is_said_with_what_is_lost_and_how_much_to_free(monkeypatch, place, given):
    lines = plan_for(monkeypatch, 6, place=place, **given).lines()
    (said,) = [line for line in lines if "There is no space for a checkpoint of the unet stage" in line]
    assert "it takes 5.16 GB, and in addition to the finished file 3.60 GB are free" in said
    assert "all training of that stage is lost" in said
    assert "GB more there is one at the end of each stage" in said
    assert "--method lora" in said
    assert not any("Only one checkpoint is kept" in line for line in lines)


@pytest.mark.parametrize("place", ["drive", "mount", "disk"])
@pytest.mark.parametrize("more", [0.0, 0.001])
def test_what_it_says_to_free_is_enough_and_no_more(monkeypatch, place, more):
    import re

    (said,) = [line for line in plan_for(monkeypatch, 6, place=place).lines() if "no space for a checkpoint" in line]
    one, many = (float(number) for number in re.findall(r"[Ww]ith ([\d.]+) GB more", said))
    assert not plan_for(monkeypatch, 6 + one - 0.011, place=place).room_for_one
    assert plan_for(monkeypatch, 6 + one + 0.006 + more, place=place).room_for_one
    if place == "disk":
        assert plan_for(monkeypatch, 6 + many + 0.006, place=place).config.save_every == 300
        assert plan_for(monkeypatch, 6 + many - 0.011, place=place).config.save_every == 0


def test_only_one_checkpoint_is_said_where_one_is_kept(monkeypatch):
    assert any("Only one checkpoint is kept" in line for line in plan_for(monkeypatch, 15).lines())
    assert not any("Only one checkpoint is kept" in line for line in plan_for(monkeypatch, 100).lines())


def test_what_is_lost_at_worst_is_in_minutes_once_a_step_was_timed(monkeypatch):
    lines = plan_for(monkeypatch, 100).saving_lines()
    assert lines[0] == (
        "If the machine is lost, at most 300 steps of the text encoder stage or 300 steps of the unet stage of "
        "training must be repeated."
    )
    timed = plan_for(monkeypatch, 100, standing=Standing(seconds_per_step={"unet": 0.5, "text_encoder": 0.1}))
    assert "300 steps of the unet stage (about 2 minutes)" in timed.saving_lines()[0]
    assert "300 steps of the text encoder stage (about 30 seconds)" in timed.saving_lines()[0]
    quick = plan_for(monkeypatch, 100, standing=Standing(seconds_per_step={"unet": 0.004, "text_encoder": 0.0001}))
    assert quick.saving_lines()[0].count("(about 1 second)") == 2


def test_what_a_lora_would_cost_is_said_of_a_full_training_alone(monkeypatch):
    standing = Standing(lora=SD15.lora(16))
    lines = plan_for(monkeypatch, 15, standing=standing).saving_lines()
    assert lines[1] == ("A LoRA instead (--method lora): 19.1 MB a checkpoint, one every 300 steps, a file of 8.7 MB.")
    assert len(plan_for(monkeypatch, 15, method="lora", standing=standing).saving_lines()) == 1


# ------------------------------------------------------------------------------------- before a model is loaded


def test_the_published_models_are_counted_right_by_their_configurations_and_by_their_files():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from fastsd_helpers.dreambooth.training.lora import count_lora

    made = {
        "sd15": ({"cross_attention_dim": 768}, {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                 "num_attention_heads": 12}),
        "sd21": ({"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True},
                 {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}),
    }  # fmt: skip
    for family, (unet_config, text_config) in made.items():
        kind = family_named(family)
        counts = kind.published["attention"]
        with torch.device("meta"):
            unet = diffusers.UNet2DConditionModel(**unet_config)
            text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**text_config))
        assert counts.unet == sum(parameter.numel() for parameter in unet.parameters())
        assert counts.text_encoder == sum(parameter.numel() for parameter in text.parameters())
        for targets, known in kind.published.items():
            assert (known.lora_unet, known.lora_text_encoder) == (
                count_lora(kind, unet, "unet", rank=1, targets=targets),
                count_lora(kind, text, "text_encoder", rank=1, targets=targets),
            )
        names = json.loads(gzip.decompress((Path(__file__).parent / "data" / f"{family}.json.gz").read_bytes()))
        names = names.get("tensors", names)
        shapes = {name: fact if isinstance(fact, list) else fact["shape"] for name, fact in names.items()}
        shapes = {name: shape[-1] if shape and isinstance(shape[-1], list) else shape for name, shape in shapes.items()}
        for prefix, count in (("model.diffusion_model.", counts.unet), ("first_stage_model.", counts.vae)):
            assert sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix)) == count


def test_a_model_that_is_here_is_counted_by_its_files():
    torch = pytest.importorskip("torch")
    import demo_networks as networks

    from fastsd_helpers.dreambooth.training.lora import count_lora

    kind, folder = family_named("sd15"), Path(outlook.__file__).parents[2] / "demo" / "model"
    counts = count_values(kind, folder, targets="attention")
    with torch.device("meta"):
        unet = networks.build_unet()
    assert counts.unet == sum(parameter.numel() for parameter in unet.parameters())
    for targets in ("attention", "all linears"):
        found = count_values(kind, folder, targets=targets)
        assert found.lora_unet == count_lora(kind, unet, "unet", rank=1, targets=targets)
    assert count_values(kind, Path(__file__).parent, targets="attention") is None


def prepared(tmp_path: Path) -> Session:
    session = Session.create("rex", root=tmp_path)
    session.save(dataset={"items": []})
    return session


def test_the_outlook_of_a_session_needs_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr(outlook, "recorded_images", lambda _session: [{"held_out": False}] * 5)
    session = prepared(tmp_path)
    lines = saving_outlook(DreamBoothConfig(base_model="sd15"), session)
    assert any("A checkpoint every 300 steps" in line or "no room" in line or "only at" in line for line in lines)
    assert any("If the machine is lost" in line for line in lines)
    assert any("A LoRA instead" in line for line in lines)
    assert not any(
        "LoRA instead" in line for line in saving_outlook(DreamBoothConfig(base_model="sd15", method="lora"), session)
    )
    assert any("every 40 steps" in line for line in saving_outlook(DreamBoothConfig(base_model="demo"), session))


def test_the_outlook_knows_what_a_run_has_made_and_learned_of_its_drive(tmp_path, monkeypatch):
    monkeypatch.setattr(outlook, "recorded_images", lambda _session: [{"held_out": False}] * 5)
    session = prepared(tmp_path)
    config = DreamBoothConfig(base_model="demo")
    before = " ".join(saving_outlook(config, session))
    assert "text encoder stage" in before
    progress, seconds = {"stage": "unet", "step": 80, "steps": 200}, {"unet": 3.0}
    settings = to_values(resolve_settings(config, find_model("demo"), describe_device())[0])
    session.save(progress=progress, run=1, seconds_per_step=seconds, settings=settings)
    after = " ".join(saving_outlook(config, session))
    assert "40 steps of the unet stage (about 2 minutes)" in after
    assert "text encoder stage" not in after.split("If the machine")[1].split("A LoRA")[0]
    session.save(progress={"stage": "unet", "step": 200, "steps": 200})
    assert saving_outlook(config, session) == []


@pytest.mark.parametrize("base", ["somebody/some-model", "flux-dev", "/nowhere/at/all"])
def test_nothing_is_said_where_nothing_is_known(tmp_path, monkeypatch, base):
    monkeypatch.setattr(outlook, "recorded_images", lambda _session: [])
    assert saving_outlook(DreamBoothConfig(base_model=base), prepared(tmp_path)) == []


def test_no_room_for_the_finished_file_is_an_outlook_too(tmp_path, monkeypatch):
    monkeypatch.setattr(outlook, "recorded_images", lambda _session: [])

    def refuse(*_words, **_named):
        raise DiskFull("No room.", "Make some.")

    monkeypatch.setattr(outlook, "plan_run", refuse)
    assert saving_outlook(DreamBoothConfig(base_model="demo"), prepared(tmp_path)) == ["No room. Make some."]


def test_the_settings_form_says_what_a_cut_would_cost_and_follows_what_is_typed(tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets")
    from fastsd_helpers.forms import show_form

    session = Session.create("rex", root=tmp_path)
    form = show_form(DreamBoothConfig, restore=session)
    form.update(base_model="sd15", method="lora", unet_steps=1000)
    form._on_change("unet_steps")
    assert "A checkpoint every 200 steps" in form._outlook.value
    assert "at most" in form._outlook.value
    form.update(unet_steps="many")
    form._on_change("unet_steps")
    assert form._outlook.value == "", "what is wrong is said at the field alone"
