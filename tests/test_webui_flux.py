"""Flux by its key: sizes for GPU and RAM, the files of each web UI, ComfyUI's workflow, Forge Neo's settings."""

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

np = pytest.importorskip("numpy")

import table_models as table  # noqa: E402
from table_models import write_gguf, write_lora  # noqa: E402

from fastsd_helpers.cli.entry import main  # noqa: E402
from fastsd_helpers.controlnet import find_controlnets, total_bytes  # noqa: E402
from fastsd_helpers.errors import CheckpointError, ModelError, ModelNotFound, WebUIError  # noqa: E402
from fastsd_helpers.forms.widgets.known import known_values  # noqa: E402
from fastsd_helpers.registry import find_model, models  # noqa: E402
from fastsd_helpers.sessions import Session  # noqa: E402
from fastsd_helpers.webui import LaunchConfig, find_places, find_ui, list_kept, place, plan, uis  # noqa: E402
from fastsd_helpers.webui.flags import GPUS, Machine  # noqa: E402
from fastsd_helpers.webui.places import Places, prepare_places, store_folder  # noqa: E402
from fastsd_helpers.webui.placing.bundles import choose_bundle, runs_in  # noqa: E402
from fastsd_helpers.webui.placing.controls import ControlNetConfig, place_controlnets  # noqa: E402
from fastsd_helpers.webui.placing.forge_settings import choose_in_settings  # noqa: E402
from fastsd_helpers.webui.placing.gguf import read_gguf  # noqa: E402
from fastsd_helpers.webui.placing.model_files import look_at  # noqa: E402
from fastsd_helpers.webui.placing.models import ModelsConfig, place_models  # noqa: E402
from fastsd_helpers.webui.placing.needed import find_needed  # noqa: E402
from fastsd_helpers.webui.placing.workflows import make_workflow, write_workflow  # noqa: E402

A1111, FORGE, COMFY = (find_ui(key) for key in ("a1111", "forge-neo", "comfyui"))
FLUX = {"double_blocks.0.img_attn.qkv.weight": (96, 32)}


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)


@pytest.fixture
def where(tmp_path: Path) -> dict[str, str]:
    return {"folder": str(tmp_path / "programs"), "store": str(tmp_path / "store")}


@pytest.fixture
def comfy(where: dict[str, str]) -> Places:
    return find_places(COMFY, **where)


# ------------------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("key", ["flux-dev", "flux-schnell"])
@pytest.mark.parametrize("ui", [FORGE, COMFY])
def test_what_is_chosen_fits_the_gpu_and_the_ram_of_every_machine(ui: Any, key: str) -> None:
    for machine in GPUS.values():
        for token in (False, True):
            specs = choose_bundle(find_model(key), ui, machine).specs
            model, *beside = [spec.bytes or 0 for spec in specs]
            assert model + 2.5e9 <= machine.gpu_gib * 2**30, (machine.name, token)
            assert max(model, sum(beside)) + 3e9 <= machine.host_gib * 2**30, (machine.name, token)
            assert sorted(spec.kind for spec in specs[1:]) == ["text-encoder", "text-encoder", "vae"]
            assert not any(spec.gated for spec in specs)


def test_the_gated_file_is_taken_with_a_token_and_its_open_copy_without(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = choose_bundle(find_model("flux-dev"), COMFY, GPUS["A100"])
    assert bundle.specs[0].key == "flux-dev-fp8-transformer"
    assert "accept the licence at https://huggingface.co/black-forest-labs/FLUX.1-dev" in bundle.reasons[0]
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    bundle = choose_bundle(find_model("flux-dev"), COMFY, GPUS["A100"])
    assert (bundle.specs[0].key, bundle.smaller) == ("flux-dev", ("flux-dev-fp8-transformer", "flux-dev-gguf-q4"))
    assert choose_bundle(find_model("flux-dev"), COMFY, GPUS["L4"]).specs[0].key == "flux-dev-fp8-transformer"


@pytest.mark.parametrize(
    ("machine", "t5", "expected"),
    [
        (GPUS["T4"], "auto", "flux-t5-fp8"),
        (GPUS["T4"], "fp16", "flux-t5-fp16"),
        (GPUS["L4"], "auto", "flux-t5-fp16"),
        (GPUS["L4"], "fp8", "flux-t5-fp8"),
        (Machine("a desktop", 23.6, 24), "auto", "flux-t5-fp8"),  # all of it together just fits, with nothing to spare
    ],
)
def test_the_size_of_t5_follows_the_ram_unless_it_is_chosen(machine: Machine, t5: str, expected: str) -> None:
    bundle = choose_bundle(find_model("flux-schnell"), FORGE, machine, t5=t5)
    assert bundle.specs[1].key == expected
    assert any(line.startswith("T5: ") for line in bundle.reasons)


def test_a_machine_that_is_too_small_gets_the_smallest_size_and_is_told_so() -> None:
    bundle = choose_bundle(find_model("flux-dev"), COMFY, Machine("small", 3.9, 8))
    assert bundle.specs[0].key == "flux-dev-gguf-q4"
    assert "is too large" in " ".join(bundle.reasons)
    assert "sdxl or sd15" in " ".join(bundle.reasons)
    (said, _of_t5) = choose_bundle(find_model("flux-schnell"), COMFY, GPUS["T4"]).reasons
    assert "has 11.9 GB, too much for its RAM" in said, "a T4's GPU would hold it"


def test_a_size_that_is_named_is_taken_and_a_whole_file_needs_nothing_beside() -> None:
    assert choose_bundle(find_model("flux-dev-gguf-q8"), FORGE, GPUS["T4"]).specs[0].key == "flux-dev-gguf-q8"
    assert [spec.key for spec in choose_bundle(find_model("flux-dev-fp8"), FORGE, GPUS["T4"]).specs] == ["flux-dev-fp8"]
    with pytest.raises(WebUIError) as caught:
        choose_bundle(find_model("flux-dev"), A1111, GPUS["A100"])
    assert caught.value.hint.startswith("Choose Forge Neo or ComfyUI, or a model of sd15")
    (said,) = choose_bundle(find_model("flux-dev-fp8"), COMFY, GPUS["T4"]).reasons
    assert "needs about 19 GiB of RAM, and T4 has 12.7" in said
    assert said.endswith("flux-dev has a size that fits.")
    assert choose_bundle(find_model("flux-dev-fp8"), COMFY, GPUS["L4"]).reasons == ()


def test_every_row_of_the_table_can_be_placed_in_some_web_ui_and_says_where(where: dict[str, str]) -> None:
    for spec in models(None):
        if spec.kind == "reader" or spec.folder:
            assert runs_in(spec) == ()
            continue
        assert runs_in(spec), spec.key
        for ui in uis():
            places = find_places(ui, **where)
            if ui.key in runs_in(spec):
                files = find_needed(spec.key, ui, places, GPUS["A100"]).files
                assert all(file.name and file.source and file.folder in dict(ui.folders).values() for file in files)
            else:
                with pytest.raises((WebUIError, ModelError)):
                    find_needed(spec.key, ui, places, GPUS["A100"])


# ------------------------------------------------------------------------------------------------------ dry run


def test_a_dry_run_lists_every_file_with_its_folder_and_source_and_touches_nothing(
    where: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["webui", "launch", "--dry-run", "--json", "--gpu", "T4", "--model", "flux-dev"]
    words += ["--folder", where["folder"], "--store", where["store"]]
    for ui, folders in (
        ("comfyui", ["diffusion_models", "text_encoders", "text_encoders", "vae"]),
        ("forge-neo", ["Stable-diffusion", "text_encoder", "text_encoder", "VAE"]),
    ):
        assert main([*words, "--ui", ui]) == 0
        files = json.loads(capsys.readouterr().out.splitlines()[-1])["files"]
        assert [file["folder"] for file in files] == folders
        assert all(set(file) == {"kind", "folder", "name", "bytes", "source"} for file in files)
        assert files[0]["name"].endswith(".gguf")
        assert files[-1]["name"] == "ae.safetensors"
        assert sum(file["bytes"] for file in files) < GPUS["T4"].host_gib * 2**30
    assert main([*words, "--ui", "a1111"]) == 2
    assert "does not run 'flux-dev'" in capsys.readouterr().err
    assert not Path(where["folder"]).exists()
    assert not Path(where["store"]).exists()


def test_a_dry_run_names_the_file_that_the_start_would_be_given(where: dict[str, str]) -> None:
    made = plan(LaunchConfig(model="sdxl", **where), machine=GPUS["T4"])
    assert made.command[made.command.index("--ckpt") + 1].endswith("/Stable-diffusion/store/sd_xl_base_1.0.safetensors")
    assert any("sd_xl_base_1.0.safetensors  6.94 GB  from https://" in line for line in made.lines())


# ---------------------------------------------------------------------------------- files beside the transformer


def place_flux(ui: Any, places: Places, folder: Path, name: str = "flux1-dev-Q4_K_S.gguf") -> list[Any]:
    """A bundle of small files, as a key brings it: in the store, under the names of the table."""
    prepare_places(places, ui)
    write_gguf(store_folder(places, ui, "diffusion-model") / name, FLUX)
    for family, kind, file in (
        ("t5", "text-encoder", "t5xxl_fp8_e4m3fn.safetensors"),
        ("clip-l", "text-encoder", "clip_l.safetensors"),
        ("flux-ae", "vae", "ae.safetensors"),
    ):
        table.write(store_folder(places, ui, kind) / file, table.original(family, "F16"))
    return place(name, ui, places)


def test_a_transformer_of_the_store_is_started_with_what_lies_there_for_it(comfy: Places, tmp_path: Path) -> None:
    placed = place_flux(COMFY, comfy, tmp_path)
    assert [(model.kind, model.family, model.path.name) for model in placed] == [
        ("diffusion-model", "flux", "flux1-dev-Q4_K_S.gguf"),
        ("text-encoder", "flux", "t5xxl_fp8_e4m3fn.safetensors"),
        ("text-encoder", None, "clip_l.safetensors"),
        ("vae", "flux", "ae.safetensors"),
    ]
    assert all(model.path.is_file() for model in placed)


def test_a_transformer_alone_says_what_it_lacks(
    comfy: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed = place(str(write_gguf(tmp_path / "mine.gguf", FLUX)), COMFY, comfy)
    assert [model.kind for model in placed] == ["diffusion-model"]
    assert placed[0].path.parent.name == "diffusion_models"
    for key in ("flux-t5-fp8", "flux-clip-l", "flux-vae"):
        assert f"fastsd webui place {key} --ui comfyui" in caplog.text


@pytest.mark.parametrize("ui", [FORGE, COMFY])
def test_what_was_placed_from_elsewhere_under_other_names_is_found_beside_a_transformer(
    ui: Any, where: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places, own = find_places(ui, **where), tmp_path / "downloads"
    table.write(own / "vae-ft-mse.safetensors", table.original("vae", "F16"))
    place(str(own / "vae-ft-mse.safetensors"), ui, places)
    model = write_gguf(own / "mine.gguf", FLUX)
    assert [one.kind for one in place(str(model), ui, places)] == ["diffusion-model"], "a VAE of another family is none"
    for family, name in (("t5", "my_T5-large.safetensors"), ("clip-l", "Clip_L2.safetensors"), ("flux-ae", "AE2.sft")):
        place(str(table.write(own / name, table.original(family, "F16"))), ui, places)
    caplog.clear()
    placed = place(str(model), ui, places)
    assert [one.path.resolve().name for one in placed] == [
        *("mine.gguf", "my_T5-large.safetensors", "Clip_L2.safetensors", "AE2.sft")
    ]
    assert "not there yet" not in caplog.text
    assert all(one.path.is_file() and one.path.is_symlink() for one in placed)
    (own / "AE2.sft").unlink()
    assert [one.kind for one in place(str(model), ui, places)].count("vae") == 0, "its owner took it away"
    assert "fastsd webui place flux-vae" in caplog.text


def test_the_workflow_has_the_chosen_files_as_comfyui_lists_them(comfy: Places, tmp_path: Path) -> None:
    placed = place_flux(COMFY, comfy, tmp_path)
    lora = write_lora(tmp_path / "style.safetensors")
    both = [*placed, *place(str(lora), COMFY, comfy)]
    graph = make_workflow(both, COMFY, comfy)
    written = write_workflow(both, COMFY, comfy)
    assert "LoraLoader" in write_workflow(placed, COMFY, comfy).read_text(), "a start without it takes nothing away"
    assert write_workflow(placed[:1], COMFY, comfy, keep=True) is None, "a transformer alone draws nothing"
    assert written.name == "fastsd-flux.json"
    set_in = {node["class_type"]: node["inputs"] for node in graph.for_api().values()}
    assert set_in["UnetLoaderGGUF"]["unet_name"] == "store/flux1-dev-Q4_K_S.gguf"
    assert set_in["DualCLIPLoader"]["clip_name1"] == "store/t5xxl_fp8_e4m3fn.safetensors"
    assert set_in["VAELoader"]["vae_name"] == "store/ae.safetensors"
    assert set_in["LoraLoader"]["lora_name"] == "style.safetensors"
    assert (set_in["FluxGuidance"]["guidance"], set_in["KSampler"]["cfg"], set_in["KSampler"]["steps"]) == (
        3.5,
        1.0,
        20,
    )
    assert (comfy.models / "diffusion_models" / set_in["UnetLoaderGGUF"]["unet_name"]).is_file()
    page = graph.for_page()
    for wire, node, slot, to, place_in, kind in page["links"]:
        assert page["nodes"][node - 1]["outputs"][slot] | {"type": kind} == page["nodes"][node - 1]["outputs"][slot]
        assert page["nodes"][to - 1]["inputs"][place_in]["link"] == wire
    assert {node["type"] for node in page["nodes"]} == set(set_in)
    for one, next_one in itertools.pairwise(page["nodes"]):
        if one["pos"][0] == next_one["pos"][0]:  # with the title of the next between them
            assert next_one["pos"][1] >= one["pos"][1] + one["size"][1] + 40, "nodes do not lie on each other"


def test_an_installation_without_the_node_pack_for_gguf_is_told(
    comfy: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed = place_flux(COMFY, comfy, tmp_path)
    comfy.installed.write_text("{}")
    write_workflow(placed, COMFY, comfy)
    assert "Run again: fastsd webui install --ui comfyui" in caplog.text
    caplog.clear()
    (comfy.data / "custom_nodes" / "ComfyUI-GGUF").mkdir()
    write_workflow(placed, COMFY, comfy)
    assert not caplog.text


def test_schnell_draws_in_four_steps_without_guidance(comfy: Places, tmp_path: Path) -> None:
    graph = make_workflow(place_flux(COMFY, comfy, tmp_path, "flux1-schnell-Q4_K_S.gguf"), COMFY, comfy)
    kinds = {node["class_type"]: node["inputs"] for node in graph.for_api().values()}
    assert kinds["KSampler"]["steps"] == 4
    assert "FluxGuidance" not in kinds


@pytest.mark.parametrize(("family", "side"), [("sd15", 512), ("sd21", 768), ("sdxl", 1024)])
def test_every_family_has_a_workflow(comfy: Places, tmp_path: Path, family: str, side: int) -> None:
    file = table.write(tmp_path / f"{family}.safetensors", table.original(family, "F16"))
    placed = place(str(file), COMFY, comfy)
    page = write_workflow(placed, COMFY, comfy)
    assert page.name == f"fastsd-{family}.json"
    graph = json.loads((comfy.store / "comfyui" / "api-workflows" / page.name).read_text())
    kinds = {node["class_type"]: node["inputs"] for node in graph.values()}
    assert kinds["CheckpointLoaderSimple"]["ckpt_name"] == file.name
    assert kinds["EmptyLatentImage"]["width"] == side


def test_a_workflow_that_was_changed_on_the_page_is_kept(comfy: Places, tmp_path: Path) -> None:
    placed = place_flux(COMFY, comfy, tmp_path)
    first = write_workflow(placed, COMFY, comfy)
    assert write_workflow(placed, COMFY, comfy) == first, "one of ours is written anew"
    changed = json.loads(first.read_text())
    changed["nodes"][0]["pos"] = [1, 2]
    first.write_text(json.dumps(changed))
    second = write_workflow(placed, COMFY, comfy)
    assert second.name == "fastsd-flux-2.json"
    assert json.loads(first.read_text()) == changed
    first.write_text("no json")
    assert write_workflow(placed, COMFY, comfy) == second


def test_a_four_bit_transformer_is_told_in_one_line_each_and_not_tensor_by_tensor(
    comfy: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    facts: dict[str, Any] = {}
    for name, (fact, _bytes) in table.original("flux", "F16").items():
        packed = len(fact.shape) == 2 and "blocks" in name
        facts[name] = ("U8", (fact.count // 2, 1)) if packed else ("F16", fact.shape)
        if packed:
            facts |= {f"{name}.absmax": ("F32", (4,)), f"{name}.quant_map": ("F32", (16,))}
            facts[f"{name}.quant_state.bitsandbytes__nf4"] = ("U8", (80,))
    tensors: dict[str, Any] = {}
    for dtype in ("U8", "F16", "F32"):
        tensors |= table.values({name: shape for name, (own, shape) in facts.items() if own == dtype}, dtype)
    placed = place(str(table.write(tmp_path / "flux1-dev-nf4.safetensors", tensors)), COMFY, comfy)
    assert [(model.kind, model.family) for model in placed] == [("diffusion-model", "flux")]
    assert "4-bit weights of bitsandbytes" in caplog.text
    assert len(caplog.records) < 6, caplog.text


def test_forge_neo_starts_with_the_model_and_what_lies_beside_it(where: dict[str, str], tmp_path: Path) -> None:
    places = find_places(FORGE, **where)
    placed = place_flux(FORGE, places, tmp_path)
    (places.store / "config.json").write_text(json.dumps({"samples_format": "webp", "forge_additional_modules": ["x"]}))
    choose_in_settings(placed, FORGE, places)
    settings = json.loads((places.store / "config.json").read_text())
    assert settings["samples_format"] == "webp", "every other setting stays"
    assert (settings["forge_preset"], settings["sd_model_checkpoint"]) == ("flux", "store/flux1-dev-Q4_K_S.gguf")
    assert [Path(path).name for path in settings["forge_additional_modules"]] == [
        "ae.safetensors",
        "clip_l.safetensors",
        "t5xxl_fp8_e4m3fn.safetensors",
    ]
    checkpoint = table.write(tmp_path / "sdxl.safetensors", table.original("sdxl", "F16"))
    choose_in_settings(place(str(checkpoint), FORGE, places), FORGE, places)
    settings = json.loads((places.store / "config.json").read_text())
    assert (settings["forge_preset"], settings["forge_additional_modules"]) == ("xl", []), "none of another family"
    assert len(settings["forge_additional_modules_flux"]) == 3
    words = plan(LaunchConfig(ui="forge-neo", **where), machine=GPUS["T4"]).command
    for flag, folder in (("--vae-dirs", "VAE"), ("--text-encoder-dirs", "text_encoder")):
        given = [words[number + 1] for number, word in enumerate(words) if word == flag]
        assert [Path(path).parts[-1] for path in given] == [folder, "store"], "it follows no link to a folder there"


def test_a_settings_file_that_is_none_is_left_alone(
    where: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    places = find_places(FORGE, **where)
    placed = place_flux(FORGE, places, tmp_path)
    (places.store / "config.json").write_text("{broken")
    choose_in_settings(placed, FORGE, places)
    assert (places.store / "config.json").read_text() == "{broken"
    assert "chosen on the page" in caplog.text


@pytest.mark.parametrize("before", [None, "", "{}", '{"samples_format": "webp"}', '{"VERSION_UID": "PY311"}'])
@pytest.mark.parametrize("chosen", [False, True])
def test_forge_neo_never_meets_settings_that_it_would_ask_about_on_a_terminal(
    where: dict[str, str], tmp_path: Path, before: str | None, chosen: bool
) -> None:
    places = find_places(FORGE, **where)
    checkpoint = table.write(tmp_path / "sdxl.safetensors", table.original("sdxl", "F16"))
    placed = place(str(checkpoint), FORGE, places) if chosen else []
    file, code = places.store / "config.json", places.code / "modules" / "launch_utils.py"
    code.parent.mkdir(parents=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    if before is not None:
        file.write_text(before)
    choose_in_settings(placed, FORGE, places)
    assert "VERSION_UID" not in (file.read_text() if file.exists() and before != '{"VERSION_UID": "PY311"}' else "")
    code.write_text('import os\n\nVERSION_UID: Final[str] = "PY313"\n')
    choose_in_settings(placed, FORGE, places)
    if before is None and not chosen:
        assert not file.exists(), "it makes its own"
        return
    settings = json.loads(file.read_text())
    assert settings["VERSION_UID"] == "PY313"
    assert settings.get("samples_format") == json.loads(before or "{}").get("samples_format")
    assert settings.get("sd_model_checkpoint") == ("sdxl.safetensors" if chosen else None)


# ------------------------------------------------------------------------------------------------- looked at


@pytest.mark.parametrize(
    "kind", ["auto", "checkpoint", "lora", "vae", "text-encoder", "embedding", "controlnet", "upscaler"]
)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
        ("a.safetensors", b"", "is an empty file"),
        ("a.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n", "Git LFS pointer"),
        ("a.pt", b"only words", "is plain text"),
        ("a.ckpt", b"\x89PNG\r\n\x1a\n" + bytes(50), "is an image"),
        ("a.gguf", b"GGUF\x03", "truncated or damaged GGUF"),
    ],
)
def test_what_is_no_model_is_refused_as_every_kind(
    comfy: Places, tmp_path: Path, kind: str, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        place(str(tmp_path / name), COMFY, comfy, kind=kind)
    assert not list(comfy.models.rglob(name))


def test_a_truncated_file_is_refused_as_every_kind(comfy: Places, tmp_path: Path) -> None:
    whole = write_lora(tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-8])
    write_gguf(tmp_path / "cut.gguf", FLUX, cut=40)
    for kind in ("auto", "lora", "checkpoint"):
        for name in ("cut.safetensors", "cut.gguf"):
            with pytest.raises(ModelError, match="truncated or damaged"):
                place(str(tmp_path / name), COMFY, comfy, kind=kind)


def test_the_kind_of_a_file_is_told_by_its_content_and_another_kind_is_refused(comfy: Places, tmp_path: Path) -> None:
    made = {
        "lora": write_lora(tmp_path / "l.safetensors"),
        "vae": table.write(tmp_path / "v.safetensors", table.original("vae", "F16")),
        "text-encoder": table.write(tmp_path / "t.safetensors", table.original("t5", "F16")),
        "checkpoint": table.write(tmp_path / "c.safetensors", table.original("sd15", "F16")),
        "diffusion-model": table.write(tmp_path / "d.safetensors", table.original("flux", "F16")),
        "embedding": table.write(tmp_path / "e.safetensors", table.values({"emb_params": (2, 768)})),
        "controlnet": table.write(
            tmp_path / "n.safetensors", table.values({"control_model.zero_convs.0.0.weight": (4, 4)})
        ),
    }
    folders = dict(COMFY.folders)
    for kind, file in made.items():
        placed = place(str(file), COMFY, comfy)
        assert placed[0].kind == kind
        assert placed[0].path.parent.name == folders[kind]
        for wrong in made:
            if wrong != kind and {wrong, kind} != {"checkpoint", "diffusion-model"}:
                with pytest.raises(ModelError, match="not a"):
                    place(str(file), COMFY, comfy, kind=wrong)


def test_a_model_of_a_family_without_a_table_is_placed_where_one_says_what_it_is(
    where: dict[str, str], comfy: Places, tmp_path: Path
) -> None:
    # The transformer of Qwen-Image by its names, which ComfyUI and Forge Neo run.
    shapes = {"txt_norm.weight": (8,), "img_in.weight": (8, 8), "transformer_blocks.0.attn.add_q_proj.weight": (8, 8)}
    file = table.write(tmp_path / "other.safetensors", table.values(shapes))
    assert look_at(file).foreign
    assert place(str(file), COMFY, comfy, kind="diffusion-model")[0].kind == "diffusion-model"
    with pytest.raises(ModelError):
        place(str(file), COMFY, comfy)
    with pytest.raises(WebUIError, match=r"other\.safetensors is") as caught:
        place(str(file), A1111, find_places(A1111, **where), kind="checkpoint")
    assert "sd15" in str(caught.value.hint)


def test_what_goes_with_another_family_is_refused_by_a_web_ui_without_it_and_said_beside_another_model(
    where: dict[str, str], comfy: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (2, 8),
              "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (8, 2)}  # fmt: skip
    lora = table.write(tmp_path / "flux_style.safetensors", table.values(shapes))
    with pytest.raises(ModelError, match="for flux models, which AUTOMATIC1111") as caught:
        place(str(lora), A1111, find_places(A1111, **where), kind="lora")
    assert "Forge Neo or ComfyUI" in caught.value.hint
    vae = table.write(tmp_path / "ae.safetensors", table.original("flux-ae", "F16"))
    with pytest.raises(ModelError, match="for flux models"):
        place(str(vae), A1111, find_places(A1111, **where), kind="vae")
    base = table.write(tmp_path / "c.safetensors", table.original("sd15", "F16"))
    place_models(ModelsConfig(model=str(base), lora=str(lora)), COMFY, comfy)
    assert (
        "flux_style.safetensors is a LoRA for flux models, and the base model c.safetensors is of sd15" in caplog.text
    )


# -------------------------------------------------------------------------------------------------- sessions


def make_session(root: Path, name: str, base: str, *files: Path) -> Session:
    session = Session.create(name, root=root)
    session.save(base_model={"ref": base, "sha256": None})
    for file in files:
        file.rename(session.exports / file.name)
    return session


def test_a_session_that_trained_a_lora_brings_it_and_its_base_model(comfy: Places, tmp_path: Path) -> None:
    base = table.write(tmp_path / "base.safetensors", table.original("sd15", "F16"))
    make_session(tmp_path / "mine", "rex", str(base), write_lora(tmp_path / "rex.safetensors"))
    placed = place("rex", COMFY, comfy, root=tmp_path / "mine")
    assert [(model.kind, model.path.name) for model in placed] == [
        ("lora", "rex.safetensors"),
        ("checkpoint", "base.safetensors"),
    ]
    with pytest.raises(ModelNotFound, match="There is no model 'rex'"):
        place("rex", COMFY, comfy, root=tmp_path / "others")


def test_a_base_that_no_web_ui_loads_is_said_and_the_lora_placed_all_the_same(
    comfy: Places, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, base, said in (
        ("one", "demo", "has an architecture that no web UI loads"),
        ("two", str(tmp_path / "gone"), "There is no model"),
        ("three", "", "has no base model"),
    ):
        make_session(tmp_path / "mine", name, base, write_lora(tmp_path / f"{name}.safetensors"))
        caplog.clear()
        placed = place(name, COMFY, comfy, root=tmp_path / "mine")
        assert [model.kind for model in placed] == ["lora"]
        assert f"The LoRA of {name} is placed without its base model" in caplog.text
        assert said in caplog.text


def test_a_session_gives_its_whole_model_or_its_lora_as_it_is_asked(comfy: Places, tmp_path: Path) -> None:
    whole = table.write(tmp_path / "rex.safetensors", table.original("sd15", "F16"))
    session = make_session(tmp_path / "mine", "rex", "sd15", whole, write_lora(tmp_path / "rex-lora.safetensors"))
    assert place(str(session.folder), COMFY, comfy, kind="checkpoint")[0].path.name == "rex.safetensors"
    (session.exports / "rex-lora.safetensors").unlink()
    with pytest.raises(ModelNotFound, match="has no LoRA"):
        place(str(session.folder), COMFY, comfy, kind="lora")


def test_the_command_places_a_session_by_name_and_root(
    where: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = table.write(tmp_path / "rex.safetensors", table.original("sd15", "F16"))
    make_session(tmp_path / "mine", "rex", "sd15", whole)
    words = ["webui", "place", "rex", "--json", "--root", str(tmp_path / "mine")]
    assert main([*words, "--folder", where["folder"], "--store", where["store"]]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (said["kind"], said["family"], said["how"]) == ("checkpoint", "sd15", "linked")
    assert [Path(one["path"]).name for one in said["placed"]] == ["rex.safetensors"]
    assert main([*words[:4], "--root", str(tmp_path), "--folder", where["folder"], "--store", where["store"]]) == 2


# ------------------------------------------------------------------------------------------------------ GGUF


def test_a_gguf_header_is_read_and_what_is_none_is_named(tmp_path: Path) -> None:
    header = read_gguf(write_gguf(tmp_path / "a.gguf", {"x.weight": (3, 5), "y": (4,)}, "t5encoder"))
    assert (header.architecture, header.tensors) == ("t5encoder", {"x.weight": (3, 5), "y": (4,)})
    for content, said in (
        (b"NOPE" + bytes(40), "not a GGUF file"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(16), "version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + b"\xff" * 16, "millions of entries"),
    ):
        (tmp_path / "b.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=said):
            read_gguf(tmp_path / "b.gguf")
    whole = (tmp_path / "a.gguf").read_bytes()
    for cut in range(0, len(whole) - 16, 7):  # the last 16 bytes only fill up
        (tmp_path / "b.gguf").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            read_gguf(tmp_path / "b.gguf")


def test_reasons_are_shown_before_anything_is_fetched(
    comfy: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fastsd_helpers")
    monkeypatch.setattr("fastsd_helpers.webui.placing.models.check_room", lambda *_words, **_named: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        place("flux-dev", COMFY, comfy, machine=GPUS["T4"])
    assert "flux1-dev-Q4_K_S.gguf (6.8 GB) is the largest that fits" in caplog.text


def test_a_folder_that_two_kinds_share_is_listed_once(where: dict[str, str], tmp_path: Path) -> None:
    places = find_places(FORGE, **where)
    place_flux(FORGE, places, tmp_path)
    names = [item.name for item in list_kept(places, FORGE) if item.kind != "program"]
    assert sorted(names) == [
        "ae.safetensors",
        "clip_l.safetensors",
        "flux1-dev-Q4_K_S.gguf",
        "t5xxl_fp8_e4m3fn.safetensors",
    ]


def test_the_form_offers_what_the_web_ui_runs(where: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Chosen:
        ui, places, family = FORGE, find_places(FORGE, **where), "flux"

    offered = {value for _label, value in known_values("webui_models", Chosen())}
    assert {"flux-dev", "flux-schnell", "flux-dev-fp8", "flux-dev-gguf-q4", "sdxl"} <= offered
    assert not {"sd21-512", "demo"} & offered, "neither runs there"
    assert {value for _label, value in known_values("webui_text_encoders", Chosen())} == {
        "",
        "flux-clip-l",
        "flux-t5-fp16",
        "flux-t5-fp8",
    }
    assert "flux-vae" in {value for _label, value in known_values("webui_vaes", Chosen())}
    Chosen.ui = COMFY
    assert ("all" in {value for _label, value in known_values("controlnets", Chosen())}) is True
    Chosen.ui = FORGE
    assert known_values("controlnets", Chosen()) == [("none", "")], "no Flux ControlNets there"


def test_all_controlnets_that_fit_are_one_choice_whose_room_is_looked_at_first(
    comfy: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = []

    def fetch(row: Any, folder: Path) -> Path:
        fetched.append(row.key)
        return table.write(folder / row.save_as, table.values({"control_model.zero_convs.0.0": (4, 4)}))

    monkeypatch.setattr("fastsd_helpers.webui.placing.controls.fetch_controlnet", fetch)
    check = "fastsd_helpers.webui.placing.controls.check_room"
    monkeypatch.setattr(check, lambda _folder, needed, *_words, **_named: fetched.append(needed))
    placed = place_controlnets(ControlNetConfig(tasks="all", base="sd21-768"), COMFY, comfy)
    rows = find_controlnets("sd21", ui="comfyui")
    assert fetched == [total_bytes(rows), *(row.key for row in rows)]
    assert {model.path.parent.parent.name for model in placed} == {"controlnet"}


def test_a_folder_with_one_model_file_is_that_file_and_others_say_what_they_hold(comfy: Places, tmp_path: Path) -> None:
    for name, files in {"none": (), "two": ("a.safetensors", "b.safetensors"), "one": ("a.safetensors",)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "README.md").write_text("x")
        for file in files:
            table.write(tmp_path / name / file, table.original("vae", "F16"))
    assert [model.kind for model in place(str(tmp_path / "one"), COMFY, comfy)] == ["vae"]
    with pytest.raises(ModelError, match="holds no model file"):
        place(str(tmp_path / "none"), COMFY, comfy)
    with pytest.raises(ModelError, match=r"holds 2 model files \(a.safetensors, b.safetensors\)"):
        place(str(tmp_path / "two"), COMFY, comfy)


def test_a_gguf_of_another_architecture_is_taken_as_what_it_is_said_to_be(comfy: Places, tmp_path: Path) -> None:
    file = str(write_gguf(tmp_path / "wan.gguf", {"blocks.0.x.weight": (4, 4)}, "wan"))
    with pytest.raises(ModelError, match="of the architecture 'wan'") as caught:
        place(file, COMFY, comfy)
    assert "diffusion-model" in caught.value.hint
    assert place(file, COMFY, comfy, kind="diffusion-model")[0].path.parent.name == "diffusion_models"


def test_a_gated_file_without_access_gives_way_to_its_open_copy(
    comfy: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    asked = []

    def fetch(source: Any, folder: Path, *, name: str | None = None, **_more: Any) -> Path:
        asked.append(source.repo)
        if source.repo == "black-forest-labs/FLUX.1-dev":
            raise ModelError("FLUX.1-dev is gated and this token has no access to it.", "Accept the licence.")
        family = {"t5": "t5", "clip": "clip-l", "ae": "flux-ae"}.get((name or source.file)[:4].rstrip("xl._s"), "flux")
        return table.write(folder / (name or source.file), table.original(family, "F16"))

    monkeypatch.setattr("fastsd_helpers.webui.placing.needed.fetch", fetch)
    monkeypatch.setattr("fastsd_helpers.webui.placing.models.check_room", lambda *_words, **_named: None)
    placed = place("flux-dev", COMFY, comfy, machine=GPUS["A100"])
    assert placed[0].path.name == "flux1-dev-fp8-transformer.safetensors"
    assert "Accept the licence. Its copy 'flux-dev-fp8-transformer' is used instead" in caplog.text
    assert asked[:2] == ["black-forest-labs/FLUX.1-dev", "Kijai/flux-fp8"]
    assert sorted(model.kind for model in placed[1:]) == ["text-encoder", "text-encoder", "vae"]
