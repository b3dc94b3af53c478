"""Tests of fetching base models, with the real huggingface_hub client against a Hub on 127.0.0.1.

Most served models are a few bytes with the right names, because downloading never opens weights; one is a real, tiny
pipeline made and loaded by diffusers.
"""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
from hub_server import Fault, HubServer

from fastsd_helpers.downloads import model_hash, pick_weights, variant_of
from fastsd_helpers.errors import DiskFull, DriveReadOnly, FastSDError, ModelError, ModelNotFound
from fastsd_helpers.model_lookup import fetch_model

TOKEN = "hf_MemberOfTheTests0123456789"
REPO = "somebody/tiny"

PARTS = {
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
NEEDED = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/special_tokens_map.json",
    "tokenizer/tokenizer_config.json",
    "tokenizer/vocab.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
]


def write_files(folder: Path, names: list[str], *, size: int = 2000) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text(json.dumps({"of": name}))
        else:
            path.write_bytes(hashlib.sha256(str(path.relative_to(folder)).encode()).digest() * (size // 32))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", **PARTS}))
    return folder


@pytest.fixture
def model(tmp_path):
    return write_files(tmp_path / "served", NEEDED)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def at_home(tmp_path, monkeypatch):
    """No token, setting or cache of whoever runs the tests reaches the client, and nothing here waits for long."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "default-cache"))
    monkeypatch.setattr("fastsd_helpers.downloads.hub.PAUSES_S", (0.01, 0.01))


@pytest.fixture
def start_hub(at_home, monkeypatch):
    """Start a Hub that HF_ENDPOINT leads to; stopped at the end of the test."""
    running = []

    def start(repos, **options):
        hub = HubServer(repos, **options).__enter__()
        running.append(hub)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        return hub

    yield start
    for hub in running:
        hub.stop()


@pytest.fixture
def hub(start_hub, model):
    return start_hub({REPO: model}, members=[TOKEN])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def told(error: BaseException, caplog: pytest.LogCaptureFixture) -> str:
    """Everything a user could see of a failure: the sentences, the whole traceback, the log."""
    return "".join(traceback.format_exception(error)) + str(error) + caplog.text


# --------------------------------------------------------------------------------- what to fetch (no network at all)


@pytest.mark.parametrize(
    ("expected", "names"),
    [
        (["m.safetensors"], ["m.safetensors", "m.bin", "m.fp16.safetensors"]),
        (["m.bin"], ["m.bin", "m.fp16.safetensors", "m.fp16.bin"]),
        (["m.fp16.safetensors"], ["m.bf16.safetensors", "m.fp16.bin", "m.fp16.safetensors"]),
        (["m.non_ema.safetensors"], ["m.fp16.safetensors", "m.non_ema.safetensors"]),
        (["m.safetensors"], ["m.safetensors", "m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]),
        (
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json"],
            ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors", "m.safetensors.index.json", "m.bin"],
        ),
        (["m.bin"], ["m-00001-of-00002.safetensors", "m.safetensors.index.json", "m.bin"]),  # a shard is missing
        (["m.bin"], ["m-00001-of-00001.safetensors", "m.bin"]),  # the index is missing
        (
            ["m.fp16-00001-of-00001.safetensors", "m.safetensors.index.fp16.json"],
            ["m.fp16-00001-of-00001.safetensors", "m.safetensors.index.fp16.json"],
        ),
        ([], ["m.msgpack", "m.onnx", "m.h5", "other.safetensors", "config.json"]),
    ],
)
def test_full_weights_come_before_variants_and_safetensors_before_bin(expected, names):
    def spell(name: str) -> str:
        return name.replace("m.", "diffusion_pytorch_model.", 1).replace("m-", "diffusion_pytorch_model-", 1)

    assert pick_weights(map(spell, names))[0] == [spell(name) for name in expected]


def test_the_variant_that_has_to_be_asked_for_is_named(tmp_path):
    write_files(tmp_path, [name.replace(".safetensors", ".fp16.safetensors") for name in NEEDED])
    assert variant_of(tmp_path, "unet") == "fp16"
    (tmp_path / "unet/diffusion_pytorch_model.bin").write_bytes(b"full")
    assert variant_of(tmp_path, "unet") is None


def test_a_folder_is_its_own_base_model(model, monkeypatch):
    assert fetch_model(str(model)) == model.resolve()
    assert fetch_model(model) == model.resolve()
    monkeypatch.chdir(model.parent)
    assert fetch_model("./served") == model.resolve()


def test_the_demo_is_the_packaged_folder():
    import fastsd_helpers

    folder = Path(fastsd_helpers.__file__).parent / "demo" / "model"
    if folder.is_dir():
        assert fetch_model("demo") == folder
    else:
        with pytest.raises(ModelNotFound, match="not in this installation") as caught:
            fetch_model("demo")
        assert "Install fastsd_helpers again" in caught.value.hint


@pytest.mark.parametrize("name", ["dream.safetensors", "old.ckpt"])
def test_a_single_file_is_refused_with_what_to_give_instead(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=r"is a single file\.") as caught:
        fetch_model(tmp_path / name)
    assert "fastsd convert" in caught.value.hint


def test_a_single_file_becomes_a_base_model_through_a_converter_once(tmp_path, model, monkeypatch):
    import shutil

    monkeypatch.setenv("FASTSD_MODELS", str(tmp_path / "kept"))
    (tmp_path / "dream.safetensors").write_bytes(b"weights")
    made = []

    def convert(file, folder):
        made.append(file.name)
        shutil.copytree(model, folder)

    folder = fetch_model(tmp_path / "dream.safetensors", convert=convert)
    assert contents(folder) == contents(model)
    assert folder.parent == tmp_path / "kept" / "converted"
    assert fetch_model(tmp_path / "dream.safetensors", convert=convert) == folder
    assert made == ["dream.safetensors"]

    def broken(file, folder):
        folder.mkdir()
        raise ModelError("It cannot be read.", "Choose another.")

    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(ModelError, match="cannot be read"):
        fetch_model(tmp_path / "other.safetensors", convert=broken)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_key_that_is_no_base_model_is_told_what_it_is():
    with pytest.raises(ModelError, match=r"'sdxl-vae' \(SDXL VAE that works in fp16\) is not a base model"):
        fetch_model("sdxl-vae")


@pytest.mark.parametrize(
    "ref", ["./nothing-here", "/no/such/folder", "sd16", "a/b/c", "~nobody/x", "x" * 5000, "a b/c"]
)
def test_what_is_neither_folder_nor_key_nor_hub_id_says_where_was_looked(ref, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelNotFound, match="no folder of that name, it is not a registry key, and it is not a Hub id"
    ) as caught:
        fetch_model(ref)
    assert "sd15-inpaint" in caught.value.hint


def test_an_empty_name_and_a_foreign_link_have_their_own_sentences():
    with pytest.raises(ModelNotFound, match="No base model was named"):
        fetch_model("  ")
    with pytest.raises(ModelError, match="cannot be used as a base model"):
        fetch_model("https://example.org/model.safetensors")


def test_the_fingerprint_follows_the_weights_that_are_loaded_and_nothing_else(model):
    before = model_hash(model)
    (model / "README.md").write_text("hello")
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not loaded")
    assert model_hash(model) == before
    path = model / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    assert model_hash(model) != before


def test_the_fingerprint_reads_a_file_once_per_process(model, monkeypatch):
    first = model_hash(model)
    monkeypatch.setattr("fastsd_helpers.files.sha256_of", lambda path: pytest.fail(f"read {path} again"))
    assert model_hash(model) == first


# --------------------------------------------------------------------------------------------------- from the Hub


def test_a_hub_model_arrives_whole_and_identical(hub, model, cache):
    folder = fetch_model(REPO, cache_dir=cache)
    assert contents(folder) == contents(model)
    assert hub.downloaded() == NEEDED


def test_only_what_training_needs_is_downloaded(start_hub, tmp_path, cache):
    extra = [
        "README.md",
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned.ckpt",
        "safety_checker/model.safetensors",
        "safety_checker/config.json",
        "feature_extractor/preprocessor_config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_flax_model.msgpack",
        "unet/model.onnx",
        "text_encoder/pytorch_model.bin",
        "text_encoder/deep/er.json",
        "vae/diffusion_pytorch_model.safetensors.index.fp16.json",
    ]
    hub = start_hub({REPO: write_files(tmp_path / "served", NEEDED + extra)})
    folder = fetch_model(REPO, cache_dir=cache)
    assert hub.downloaded() == NEEDED
    assert sorted(contents(folder)) == NEEDED


def test_a_repository_with_nothing_but_half_precision_is_taken_as_it_is(start_hub, tmp_path, cache):
    names = [name.replace(".safetensors", ".fp16.safetensors") for name in NEEDED]
    hub = start_hub({REPO: write_files(tmp_path / "served", names)})
    assert variant_of(fetch_model(REPO, cache_dir=cache), "unet") == "fp16"
    assert hub.downloaded() == sorted(names)


def test_a_second_fetch_downloads_nothing(hub, cache):
    first = fetch_model(REPO, cache_dir=cache)
    hub.requests.clear()
    assert fetch_model(REPO, cache_dir=cache) == first
    assert hub.downloaded() == []


def test_a_new_version_on_the_hub_is_fetched_and_an_old_one_can_be_named(hub, model, cache):
    old = hub.commit(REPO)
    first = fetch_model(REPO, cache_dir=cache)
    (model / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"new" * 100)
    hub.requests.clear()
    second = fetch_model(REPO, cache_dir=cache)
    assert (second / "unet/diffusion_pytorch_model.safetensors").read_bytes() == b"new" * 100
    assert hub.downloaded() == ["unet/diffusion_pytorch_model.safetensors"]
    assert fetch_model(f"{REPO}@{old}", cache_dir=cache) == first


def test_the_address_of_a_hub_page_is_understood(hub, cache):
    assert fetch_model(f"https://huggingface.co/{REPO}/tree/main", cache_dir=cache) == fetch_model(
        REPO, cache_dir=cache
    )


def test_without_a_connection_the_copy_downloaded_before_is_used_and_named(hub, cache, caplog):
    first = fetch_model(REPO, cache_dir=cache)
    hub.stop()
    assert fetch_model(REPO, cache_dir=cache) == first
    assert "cannot be reached" in caplog.text
    assert f"The copy downloaded before is used: {first}" in caplog.text


def test_offline_by_setting_asks_nobody(hub, cache, monkeypatch):
    first = fetch_model(REPO, cache_dir=cache)
    hub.requests.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model(REPO, cache_dir=cache) == first
    with pytest.raises(ModelError, match="not on this machine and HF_HUB_OFFLINE is set"):
        fetch_model("somebody/else", cache_dir=cache)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "a bit flipped"),
        ("unet/diffusion_pytorch_model.safetensors", "lost"),
        ("tokenizer/merges.txt", "lost"),
        ("tokenizer/tokenizer_config.json", "lost"),
    ],
)
def test_a_copy_in_the_cache_that_is_not_whole_is_not_used_offline(
    hub, model, cache, monkeypatch, caplog, name, damage
):
    path = fetch_model(REPO, cache_dir=cache) / name
    if damage == "lost":
        path.resolve().unlink()
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[7] ^= 1
        path.resolve().write_bytes(content)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not on this machine"):
        fetch_model(REPO, cache_dir=cache)
    assert "cannot be used" in caplog.text
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert contents(fetch_model(REPO, cache_dir=cache)) == contents(model)  # with the Hub there, it is fixed


def test_a_download_that_was_stopped_is_not_taken_for_whole_offline(hub, cache, monkeypatch, caplog):
    hub_client = pytest.importorskip("huggingface_hub")
    if not hasattr(hub_client, "get_cached_repo_tree"):
        pytest.skip("huggingface_hub 2 or newer is needed, which keeps the list of a repository's files")
    folder = fetch_model(REPO, cache_dir=cache)
    (folder / "tokenizer/special_tokens_map.json").unlink()  # transformers would load without it, and differently
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not on this machine"):
        fetch_model(REPO, cache_dir=cache)
    assert "tokenizer/special_tokens_map.json missing" in caplog.text


def test_no_network_and_no_copy_is_one_sentence_with_a_hint(start_hub, cache, monkeypatch):
    start_hub({})
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"The Hub at http://127.0.0.1:9 cannot be reached") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "Check the network" in caught.value.hint


@pytest.mark.parametrize(
    "err",
    [ImportError("Using SOCKS proxy, but the 'socksio' package is not installed."), ValueError("Unknown proxy x")],
)
def test_a_proxy_that_cannot_be_used_is_named(at_home, cache, monkeypatch, err):
    import huggingface_hub

    def refuse(*_args, **_more):
        raise err  # as httpx does, before anything is sent

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    with pytest.raises(ModelError, match="proxy that this machine's environment names") as caught:
        fetch_model("owner/model")
    assert "ALL_PROXY" in caught.value.hint


def test_a_broken_endpoint_setting_is_named(at_home, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.local")
    with pytest.raises(ModelError, match=r"HF_ENDPOINT is 'hub\.local'"):
        fetch_model(REPO, cache_dir=cache)


# ---------------------------------------------------------------------------------- registry keys and their mirrors


def test_a_key_takes_its_first_mirror_that_answers_and_reports_the_others(start_hub, model, cache, caplog):
    hub = start_hub({"benjamin-paine/stable-diffusion-v1-5": model})
    folder = fetch_model("sd15", cache_dir=cache)
    assert contents(folder) == contents(model)
    assert hub.requests[0].path.startswith("/api/models/stable-diffusion-v1-5/stable-diffusion-v1-5/revision/451f4fe1")
    assert "'sd15' could not be fetched from stable-diffusion-v1-5/stable-diffusion-v1-5: The Hub has no" in caplog.text


def test_a_mirror_without_our_pinned_commit_gives_its_newest_and_says_so(start_hub, model, cache, caplog, monkeypatch):
    start_hub({"stable-diffusion-v1-5/stable-diffusion-v1-5": model})
    folder = fetch_model("sd15", cache_dir=cache)
    assert contents(folder) == contents(model)
    assert (
        "has no revision '451f4fe16113bff5a5d2269ed5ad43b0592e9a14'. Its newest version is used instead" in caplog.text
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch_model("sd15", cache_dir=cache) == folder


def test_a_model_that_moved_is_found_at_its_living_place(start_hub, model, cache, caplog):
    start_hub({"stable-diffusion-v1-5/stable-diffusion-v1-5": model})
    assert contents(fetch_model("runwayml/stable-diffusion-v1-5", cache_dir=cache)) == contents(model)
    assert "is gone from the Hub; a mirror that still exists is used instead (key 'sd15')" in caplog.text


def test_when_every_mirror_fails_all_failures_are_told(start_hub, cache):
    start_hub({})
    with pytest.raises(ModelNotFound, match="None of the 2 sources of 'sd15' worked") as caught:
        fetch_model("sd15", cache_dir=cache)
    assert "'stable-diffusion-v1-5/stable-diffusion-v1-5'" in caught.value.problem
    assert "'benjamin-paine/stable-diffusion-v1-5'" in caught.value.problem


# ---------------------------------------------------------------------------------------------- refusals and tokens


def test_a_missing_repository_says_that_no_folder_and_no_key_has_the_name_either(hub, cache):
    with pytest.raises(ModelNotFound, match="The Hub has no model 'somebody/lost', or it is private") as caught:
        fetch_model("somebody/lost", cache_dir=cache)
    assert "sd15" in caught.value.hint
    assert "HF_TOKEN" in caught.value.hint


def test_a_missing_revision_is_told_from_a_missing_repository(hub, cache):
    with pytest.raises(ModelNotFound, match="has no revision 'v9'") as caught:
        fetch_model(f"{REPO}@v9", cache_dir=cache)
    assert f"{hub.url}/{REPO}/tree/main" in caught.value.hint


@pytest.mark.parametrize(
    ("token", "said"), [(None, "no token with access"), ("hf_stranger", "this token has no access")]
)
def test_a_gated_model_names_the_page_to_accept_and_where_to_make_a_token(
    start_hub, model, cache, monkeypatch, caplog, token, said
):
    hub = start_hub({REPO: model}, gated=[REPO], members=[TOKEN], strangers=["hf_stranger"])
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match=f"{REPO} is gated") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert said in caught.value.problem
    assert f"Open {hub.url}/{REPO}" in caught.value.hint
    assert "settings/tokens" in caught.value.hint
    assert "hf_stranger" not in told(caught.value, caplog)


def test_a_token_with_access_opens_the_gate_and_never_reaches_the_other_host(
    start_hub, model, cache, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    hub = start_hub({REPO: model}, gated=[REPO], private=[REPO], members=[TOKEN])
    monkeypatch.setenv("HF_TOKEN", f"  {TOKEN}\n")  # typed with blanks around it
    assert contents(fetch_model(REPO, cache_dir=cache)) == contents(model)
    assert {request.token for request in hub.requests if request.host == "127.0.0.1"} == {TOKEN}
    at_the_cdn = [request.token for request in hub.requests if request.host == "localhost"]
    assert at_the_cdn == [None] * 3
    assert TOKEN not in caplog.text


def test_a_wrong_token_is_refused_without_being_shown(hub, cache, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_expired_1234567890")
    with pytest.raises(ModelError, match="refused the Hugging Face token") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "hf_expired_1234567890" not in told(caught.value, caplog)


def test_a_token_with_a_blank_inside_is_refused_before_it_is_sent(hub, cache, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", "hf_two words")
    with pytest.raises(ModelError, match="contains a space") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert hub.requests == []
    assert "two words" not in told(caught.value, caplog)


def test_a_forbidden_answer_without_a_token_asks_for_one(hub, cache):
    hub.faults.append(Fault("/api/models", status=403))
    with pytest.raises(ModelError, match=r"refused access to somebody/tiny \(HTTP 403\)") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "HF_TOKEN" in caught.value.hint


# -------------------------------------------------------------------------------------------- a Hub that misbehaves


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(hub, cache, caplog, status):
    hub.faults.append(Fault("/api/models", status=status, times=2))
    fetch_model(REPO, cache_dir=cache)
    assert caplog.text.count(f"The Hub is busy (HTTP {status})") == 2


@pytest.mark.parametrize(("status", "said"), [(429, "too many requests"), (503, "has a problem")])
def test_a_hub_that_stays_busy_is_given_up_with_a_sentence(hub, cache, status, said):
    hub.faults.append(Fault("/api/models", status=status, times=99))
    with pytest.raises(ModelError, match=said) as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "run this again" in caught.value.hint


def test_a_file_that_is_cut_off_is_taken_up_where_it_broke(start_hub, tmp_path, cache):
    model = write_files(tmp_path / "served", NEEDED)
    big = model / "unet/diffusion_pytorch_model.safetensors"
    big.write_bytes(os.urandom(1000) * 25_000)  # 25 MB: the client keeps what arrived in pieces of 10 MB
    hub = start_hub({REPO: model})
    hub.faults.append(Fault("/cdn/.*unet", cut_after=15_000_000))
    folder = fetch_model(REPO, cache_dir=cache)
    assert (folder / "unet/diffusion_pytorch_model.safetensors").read_bytes() == big.read_bytes()
    asked = [request.range for request in hub.requests if "/cdn/" in request.path and "unet" in request.path]
    assert len(asked) == 2
    assert asked[0] is None
    assert 10 * 2**20 <= int(asked[1].removeprefix("bytes=").rstrip("-")) <= 15_000_000


def test_a_bit_flipped_on_the_way_is_noticed_and_fetched_again(hub, model, cache, caplog):
    hub.faults.append(Fault("/cdn/.*unet", flip=True))
    assert contents(fetch_model(REPO, cache_dir=cache)) == contents(model)
    assert "unet/diffusion_pytorch_model.safetensors arrived damaged; fetching it again" in caplog.text


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"])
def test_a_file_that_always_arrives_changed_is_refused_and_not_kept(hub, cache, monkeypatch, name):
    hub.faults.append(Fault(name, flip=True, times=99))
    with pytest.raises(ModelError, match=f"{name} of {REPO} arrived damaged twice"):
        fetch_model(REPO, cache_dir=cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="not on this machine"):
        fetch_model(REPO, cache_dir=cache)


def test_a_login_page_where_a_file_should_be_is_no_model(hub, cache):
    hub.faults.append(Fault("/cdn/.*unet", html=True, times=99))
    with pytest.raises(ModelError, match="could not be fetched"):
        fetch_model(REPO, cache_dir=cache)
    assert not list(cache.rglob("unet/*.safetensors"))


def test_a_login_page_instead_of_the_hub_is_one_sentence(hub, cache, monkeypatch):
    monkeypatch.setattr("hub_server._Handler._send_info", lambda self, repo: self._send(200, b"<!DOCTYPE html>", {}))
    with pytest.raises(ModelError, match="could not be fetched") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("is empty", []),
        ("is a LoRA", ["pytorch_lora_weights.safetensors", "README.md"]),
        ("is a single network (unknown kind)", ["config.json", "diffusion_pytorch_model.safetensors"]),
        ("holds single files (v1-5.ckpt)", ["v1-5.ckpt", "README.md"]),
        ("has no model_index.json", ["README.md"]),
    ],
)
def test_a_repository_that_is_no_diffusers_model_is_told_what_it_is(start_hub, tmp_path, cache, said, names):
    served = write_files(tmp_path / "served", names) if names else tmp_path / "served"
    served.mkdir(exist_ok=True)
    (served / "model_index.json").unlink(missing_ok=True)
    hub = start_hub({REPO: served})
    with pytest.raises(ModelError) as caught:
        fetch_model(REPO, cache_dir=cache)
    assert said in caught.value.problem
    assert not [name for name in hub.downloaded() if name != "config.json"]


def test_a_repository_that_lacks_a_part_is_refused_before_anything_large_is_downloaded(start_hub, tmp_path, cache):
    names = [name for name in NEEDED if not name.startswith("vae/diff")]
    hub = start_hub({REPO: write_files(tmp_path / "served", names)})
    with pytest.raises(ModelError, match="not a complete Diffusers model: the weights in vae/ missing"):
        fetch_model(REPO, cache_dir=cache)
    assert hub.downloaded() == ["model_index.json"]


# ---------------------------------------------------------------------------------------------------- this machine


def test_too_little_room_is_told_before_anything_large_is_downloaded(hub, cache, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 1_000_000)
    with pytest.raises(DiskFull, match=r"has 1\.0 MB left") as caught:
        fetch_model(REPO, cache_dir=cache)
    assert "HF_HOME" in caught.value.hint
    assert hub.downloaded() == ["model_index.json"]


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFull), (errno.EROFS, DriveReadOnly), (errno.EACCES, DriveReadOnly)]
)
def test_a_disk_that_fills_up_or_refuses_is_told_with_the_folder(hub, cache, monkeypatch, code, kind):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(kind) as caught:
        fetch_model(REPO, cache_dir=cache)
    assert str(cache) in caught.value.problem


def test_another_mirror_is_not_tried_when_the_disk_is_full(start_hub, model, cache, monkeypatch):
    hub = start_hub(
        {"stable-diffusion-v1-5/stable-diffusion-v1-5": model, "benjamin-paine/stable-diffusion-v1-5": model}
    )
    monkeypatch.setattr("fastsd_helpers.files.free_bytes", lambda folder: 1000)
    with pytest.raises(DiskFull):
        fetch_model("sd15", cache_dir=cache)
    assert not [request for request in hub.requests if "benjamin-paine" in request.path]


def test_a_mistake_in_our_own_code_is_not_dressed_up_as_a_network_problem(hub, cache, monkeypatch):
    monkeypatch.setattr("fastsd_helpers.downloads.pipeline.wanted_files", lambda names, index: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fetch_model(REPO, cache_dir=cache)


FETCH = "import sys; from fastsd_helpers.model_lookup import fetch_model; print(fetch_model(sys.argv[1]))"


def fetch_in_a_new_process(hub: HubServer, home: Path) -> subprocess.Popen:
    names = ("PATH", "PYTHONPATH", "LANG", "TMPDIR")
    env = {name: os.environ[name] for name in names if name in os.environ}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HOME": str(home)}
    command = [sys.executable, "-c", FETCH, REPO]
    root = Path(__file__).resolve().parents[1]
    return subprocess.Popen(command, env=env, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_after_a_kill_the_next_process_downloads_only_what_is_missing(hub, model, tmp_path):
    hub.faults.append(Fault("/cdn/.*unet", cut_after=500, times=99))
    first = fetch_in_a_new_process(hub, tmp_path / "home")
    try:
        deadline = time.monotonic() + 30
        others = set(NEEDED) - {"unet/diffusion_pytorch_model.safetensors"}
        while time.monotonic() < deadline:
            here = {path.name for path in (tmp_path / "home").rglob("snapshots/*/*/*")}
            if {Path(name).name for name in others if "/" in name} <= here and any(
                "unet" in x for x in hub.downloaded()
            ):
                break
            assert first.poll() is None, first.stderr.read()
            time.sleep(0.05)
        else:
            pytest.fail(f"still missing: {hub.downloaded()}")
    finally:
        first.kill()
        first.communicate()
    hub.faults.clear()
    hub.requests.clear()
    second = fetch_in_a_new_process(hub, tmp_path / "home")
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    folder = Path(out.splitlines()[-1])
    assert contents(folder) == contents(model)
    assert folder.is_relative_to(tmp_path / "home")
    assert [name for name in hub.downloaded() if name.endswith(".safetensors")] == [
        "unet/diffusion_pytorch_model.safetensors"
    ]
    assert TOKEN not in out + err
    assert not list((tmp_path / "home").rglob("snapshots/**/*.incomplete"))


# ------------------------------------------------------------------------------------------------ a real pipeline


@pytest.fixture(scope="module")
def pipeline_folder(tmp_path_factory):
    """A StableDiffusionPipeline of diffusers' own classes with random weights, as small as they go."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a": 2, "a</w>": 3}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPTextConfig(
        vocab_size=8, max_position_embeddings=16, bos_token_id=0, eos_token_id=1, **sizes
    )
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    diffusers.StableDiffusionPipeline(
        unet=unet,
        vae=vae,
        text_encoder=transformers.CLIPTextModel(config),
        tokenizer=transformers.CLIPTokenizer.from_pretrained(folder, model_max_length=16),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")
    return folder / "model"


def test_a_fetched_pipeline_loads_in_diffusers_and_has_the_same_weights(start_hub, pipeline_folder, cache, monkeypatch):
    import torch
    from diffusers import StableDiffusionPipeline

    from fastsd_helpers.registry import detect_family

    start_hub({REPO: pipeline_folder})
    folder = fetch_model(REPO, cache_dir=cache)
    assert detect_family(folder) == "sd15"
    assert model_hash(folder) == model_hash(pipeline_folder)
    fetched = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    served = StableDiffusionPipeline.from_pretrained(pipeline_folder, local_files_only=True)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(fetched, part).state_dict(), getattr(served, part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    image = fetched("a", num_inference_steps=1, height=16, width=16, output_type="np").images
    assert image.shape == (1, 16, 16, 3)


def test_every_failure_is_an_error_a_user_can_act_on():
    assert issubclass(ModelError, FastSDError)
    assert ModelError.exit_code == 2
