"""The look at a model's files: what honest models have passes, what could run or lead elsewhere is refused by name."""

import ast
import collections
import contextlib
import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from file_server import FileServer
from hostile_models import archive
from hub_server import HubServer

from fastsd_helpers.downloads import fetch, fetch_repo
from fastsd_helpers.errors import CheckpointError, ModelError, UnsafeModel
from fastsd_helpers.inert import read_config, require_inert
from fastsd_helpers.model_lookup import BASE_MODEL, LORA, find_folder

PACKAGE = Path(__file__).resolve().parents[1] / "fastsd_helpers"

# As the published repositories have them, shortened to what is looked at.
CLIP = {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
KL = {"vae": ["diffusers", "AutoencoderKL"]}
UNET = {"unet": ["diffusers", "UNet2DConditionModel"]}
T5 = {"text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5Tokenizer"]}
PUBLISHED = {
    "Stable Diffusion 1.5": {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        **CLIP, **KL, **UNET,
    },
    "its first form": {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": [None, None],
        "requires_safety_checker": True,
        "scheduler": ["diffusers", "PNDMScheduler"],
        **CLIP, **KL, **UNET,
    },
    "SDXL": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": None,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        **CLIP, **KL, **UNET,
    },
    "Flux": {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        **CLIP, **KL,
    },
    "Stable Diffusion 3": {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        **KL,
    },
    "depth": {
        "_class_name": "StableDiffusionDepth2ImgPipeline",
        "depth_estimator": ["transformers", "DPTForDepthEstimation"],
        "feature_extractor": ["transformers", "DPTFeatureExtractor"],
        "scheduler": ["diffusers", "PNDMScheduler"],
        **CLIP, **KL, **UNET,
    },
    "DeepFloyd IF": {
        "_class_name": "IFPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "safety_checker": ["deepfloyd_if", "IFSafetyChecker"],
        "watermarker": ["deepfloyd_if", "IFWatermarker"],
        "scheduler": ["diffusers", "DDPMScheduler"],
        **T5, **UNET,
    },
    "unCLIP": {
        "_class_name": "StableUnCLIPImg2ImgPipeline",
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "image_normalizer": ["stable_diffusion", "StableUnCLIPImageNormalizer"],
        "image_noising_scheduler": ["diffusers", "DDPMScheduler"],
        **CLIP, **KL, **UNET,
    },
    "video": {
        "_class_name": "StableVideoDiffusionPipeline",
        "unet": ["diffusers", "UNetSpatioTemporalConditionModel"],
        "vae": ["diffusers", "AutoencoderKLTemporalDecoder"],
    },
    "PixArt": {"_class_name": "PixArtSigmaPipeline", "transformer": ["diffusers", "PixArtTransformer2DModel"], **T5},
    "Wan": {
        "_class_name": "WanPipeline",
        "boundary_ratio": 0.9,
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    },
    "Qwen": {
        "_class_name": "QwenImagePipeline",
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "processor": ["transformers", "Qwen2VLProcessor"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    },
    "Sana": {"_class_name": "SanaPipeline", "text_encoder": ["transformers", "Gemma2Model"],
             "tokenizer": ["transformers", "GemmaTokenizerFast"], "vae": ["diffusers", "AutoencoderDC"]},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_published_pipelines_are_made_of_passes(tmp_path: Path, name: str) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps(PUBLISHED[name]))
    require_inert(tmp_path)
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    for value in PUBLISHED[name].values():
        if isinstance(value, list) and value[0] in ("diffusers", "transformers"):
            library = {"diffusers": diffusers, "transformers": transformers}[value[0]]
            former = ("CLIPFeatureExtractor", "DPTFeatureExtractor")
            assert value[1] in former or hasattr(library, value[1]), "a name that is real"


READER = {
    "architectures": ["VisionEncoderDecoderModel"],
    "model_type": "vision-encoder-decoder",
    "decoder": {"model_type": "trocr", "_name_or_path": "", "architectures": None, "tokenizer_class": None,
                "torch_dtype": None, "_attn_implementation_autoset": True, "quantization_config": None},
    "encoder": {"model_type": "deit", "hidden_act": "gelu", "id2label": {"0": "LABEL_0"}},
    "transformers_version": "4.49.0",
}  # fmt: skip
HONEST = {
    "config.json": [
        READER,
        {"model_type": "blip", "text_config": {"model_type": "blip_text_model"},
         "vision_config": {"model_type": "blip_vision_model"}},
        {"_class_name": "UNet2DConditionModel", "_name_or_path": "/home/me/model", "act_fn": "silu"},
        {"_class_name": "ControlNetModel"},
        {"model_type": "dpt", "backbone": None, "use_pretrained_backbone": False,
         "backbone_config": {"model_type": "bit"}},
        {"_class_name": "AutoencoderKL"},
        {"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": "bitsandbytes"}},
    ],
    "scheduler_config.json": [{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}],
    "tokenizer_config.json": [
        {"tokenizer_class": name, "added_tokens_decoder": {"0": {"content": "<s>"}}, "model_max_length": 10**30}
        for name in ("CLIPTokenizer", "RobertaTokenizer", "XLMRobertaTokenizer", "BertTokenizer", "T5TokenizerFast",
                     "PreTrainedTokenizerFast", "TokenizersBackend", "GPT2TokenizerFast")
    ],
    "preprocessor_config.json": [{"image_processor_type": "DeiTImageProcessor", "processor_class": "TrOCRProcessor"}],
    "vocab.json": [{"auto_map": 1, "trust_remote_code": 2, "evil": 3}],  # words, and no settings
    "tokenizer.json": [{"model": {"vocab": {"auto_map": 1}}}],
    "adapter_config.json": [{"peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": "a/b",
                             "megatron_config": None, "megatron_core": "megatron.core"}],
    "model.safetensors.index.json": [{"metadata": {"total_size": 1},
                                      "weight_map": {"a": "model-00001-of-00002.safetensors"}}],
}  # fmt: skip


HONEST["adapter_config.json"] += [
    {"auto_mapping": {"base_model_class": name, "parent_library": library}}
    for name, library in (
        ("VisionEncoderDecoderModel", "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder"),
        ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    )
]


@pytest.mark.parametrize(("name", "content"), [(name, one) for name, all_ in HONEST.items() for one in all_])
def test_honest_descriptions_pass(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    require_inert([tmp_path])
    (tmp_path / name).write_text(json.dumps({"auto_map": {"AutoModel": "evil.Model"}, "more": content}))
    # In a vocabulary it is a word as any other.
    refused = contextlib.nullcontext() if name in ("vocab.json", "tokenizer.json") else pytest.raises(UnsafeModel)
    with refused:
        require_inert([tmp_path])


HOSTILE: list[tuple[str, Any, str]] = [
    *(
        ("config.json", {"a": [{"b": {key: value}}]}, f"its entry 'a.b.{key}'")
        for key, value in (
            ("auto_map", {"AutoConfig": "evil.C"}),
            ("trust_remote_code", True),
            ("trust_remote_code", False),
            ("_attn_implementation", "a/b"),
            ("_attn_implementation_internal", "a/b"),
            ("_attn_implementation_autoset", "a/b"),
            ("attn_implementation", "a/b"),
            ("_experts_implementation", "a/b"),
            ("custom_pipelines", {"x": {"impl": "evil.P"}}),
            ("custom_pipeline", "a/b"),
            ("custom_code", "x"),
            ("code_revision", "main"),
            ("configuration_files", ["config.4/../../x.json"]),
            ("transformers_weights", "../evil.bin"),
            ("auto_mapping", {"parent_library": "evil"}),
            ("auto_mapping", {"parent_library": "transformers", "base_model_class": "a.b"}),
            ("auto_mapping", {"parent_library": "transformers.evil/x", "base_model_class": "a"}),
            ("auto_mapping", {"parent_library": "transformersevil", "base_model_class": "a"}),
            ("megatron_config", {"a": 1}),
            ("use_kernels", True),
        )
    ),
    ("config.json", {"backbone": "evil/network"}, "'backbone'"),
    ("config.json", {"backbone_config": {"use_timm_backbone": True}}, "use_timm_backbone"),
    ("config.json", {"use_pretrained_backbone": True}, "use_pretrained_backbone"),
    ("config.json", {"compression_config": {"quant_method": "sparseml"}}, "quantized by 'sparseml'"),
    ("config.json", {"encoder": {"model_type": "lightglue"}}, "'encoder.model_type' is 'lightglue'"),
    ("config.json", {"backbone_config": {"model_type": "timm_backbone"}}, "timm_backbone"),
    ("config.json", {"model_type": ["vit"]}, "model_type"),
    ("config.json", {"tokenizer_class": "RagTokenizer"}, "an unknown tokenizer"),
    ("tokenizer_config.json", {"tokenizer_class": "AutoTokenizer"}, "an unknown tokenizer"),
    ("tokenizer_config.json", {"tokenizer_class": "pipeline"}, "an unknown tokenizer"),
    ("config.json", {"quantization_config": {"quant_method": "quark"}}, "quantized by 'quark'"),
    ("config.json", {"_class_name": ["evil", "Model"]}, "not a diffusers class"),
    ("config.json", {"_class_name": "DiffusionPipeline"}, "not a diffusers class"),
    ("scheduler_config.json", {"_class_name": "AutoModel"}, "not a diffusers class"),
    ("generation_config.json", {"trust_remote_code": True}, "trust_remote_code"),
    ("model.safetensors.index.json", {"weight_map": {"a": "../x.safetensors"}}, "points outside its own folder"),
    ("model.safetensors.index.json", {"weight_map": {"a": "/etc/x.bin"}}, "points outside its own folder"),
    ("pytorch_model.bin.index.json", {"weight_map": {"a": ".."}}, "points outside its own folder"),
    ("anything.json", {"weight_map": ["x"]}, "is not a table"),
    *(
        ("model_index.json", {"_class_name": "StableDiffusionPipeline", **part}, told)
        for part, told in (
            ({"scheduler": ["evil", "Scheduler"]}, 'part \'scheduler\' is ["evil", "Scheduler"]'),
            ({"scheduler": ["os", "system"]}, "not a known class"),
            ({"unet": ["diffusers", "AutoModel"]}, "not a known class"),
            ({"unet": ["diffusers", "StableDiffusionPipeline"]}, "not a known class"),
            ({"unet": ["diffusers", "OnnxRuntimeModel"]}, "not a known class"),
            ({"unet": ["diffusers", "FlashPackAutoModel"]}, "not a known class"),
            ({"unet": ["diffusers", "models.UNet2DModel"]}, "not a known class"),
            ({"unet": ["diffusers.models", "UNet2DModel"]}, "not a known class"),
            ({"unet": ["diffusers", "UNet2DModel", {"repo": "a/b"}]}, "not a known class"),
            ({"unet": ["stable_diffusion", "Evil"]}, "not a known class"),
            ({"text_encoder": ["transformers", "AutoModel"]}, "not a known class"),
            ({"text_encoder": ["transformers", "LightGlueForKeypointMatching"]}, "not a known class"),
            ({"text_encoder": ["transformers", "RagModel"]}, "not a known class"),
            ({"text_encoder": ["transformers", "pipeline"]}, "not a known class"),
            ({"text_encoder": ["transformers", ["CLIPTextModel"]]}, "not a known class"),
            ({"../unet": ["diffusers", "UNet2DModel"]}, "a part called"),
            ({"unet": {"library": "evil"}}, "not a part of a pipeline"),
            ({"custom_pipeline": "evil"}, "custom_pipeline"),
            ({"_class_name": ["evil", "P"]}, "not a diffusers pipeline"),
            ({"_class_name": "DiffusionPipeline"}, "not a diffusers pipeline"),
            ({"_class_name": "os.system"}, "not a diffusers pipeline"),
            ({"_class_name": 7}, "not a diffusers pipeline"),
        )
    ),
]


@pytest.mark.parametrize(("name", "content", "told"), HOSTILE)
def test_hostile_descriptions_are_refused_by_file_and_entry(tmp_path: Path, name: str, content: Any, told: str) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / name).write_text(json.dumps(content))
    with pytest.raises(UnsafeModel) as caught:
        require_inert(tmp_path)
    assert told in caught.value.problem
    assert name in caught.value.problem
    assert isinstance(caught.value, (ModelError, CheckpointError)), "every caller knows it"


@pytest.mark.parametrize(
    "raw",
    [
        b'{"auto_map": 1, "auto_map": null}',
        b'{"a": {"b": 1, "b": 2}}',
        '{"auto_map": 1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"auto_map": 1}',
        b"[" * 60_000,
        b'{"a": ' * 70 + b"1" + b"}" * 70,
        b'{"a\\u0075to_map": 1, "auto_map": null}',
        b'{"auto\\u005fmap": {"x": "y"}}',
        b'{"a": "' + b"x" * 17_000_000 + b'"}',
    ],
)
def test_a_description_that_readers_see_differently_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(ModelError, match=r"config\.json"):
        require_inert(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["evil.py", "a/b/Evil.PY", "evil.pyc", "a/ops.so", "x.dll", "x.pyd", "x.dylib"])
def test_program_code_in_a_model_is_refused_at_any_depth(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with pytest.raises(UnsafeModel, match="is program code"):
        require_inert(tmp_path)


def test_an_adapter_is_described_in_a_folder_of_its_own_alone(tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    (lora / "adapter_model.safetensors").write_bytes(b"x")
    assert find_folder(lora, LORA) == lora
    (lora / "config.json").write_text("{}")
    with pytest.raises(UnsafeModel, match="transformers would load another model"):
        require_inert(lora)


# --------------------------------------------------------------------------------------------------------- pickles


def saved(tmp_path: Path, value: Any, **how: Any) -> Path:
    torch = pytest.importorskip("torch")
    torch.save(value, tmp_path / "file.pt", **how)
    return tmp_path / "file.pt"


@pytest.mark.parametrize(
    "how", [{}, {"pickle_protocol": 4}, {"pickle_protocol": 5}, {"_use_new_zipfile_serialization": False}]
)
def test_what_torch_saves_passes(tmp_path: Path, how: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).half()
    words = {"*": torch.tensor(265)}
    for value in (
        network.state_dict(),
        {"state_dict": network.state_dict(), "epoch": 3, "loss": 0.5, "more": [None, True, (1, 2, 3, 4), {5}]},
        {name: torch.ones(2).to(getattr(torch, name)) for name in ("bfloat16", "float64", "int64", "bool", "uint8")},
        torch.optim.AdamW(network.parameters()).state_dict(),
        {"string_to_param": {"*": torch.ones(3)}, "string_to_token": words, "name": "style"},
        # In its old format torch puts the source of a class beside it; no embedding was written so.
        *([] if False in how.values() else [torch.nn.ParameterDict({"a": torch.nn.Parameter(torch.ones(3))})]),
    ):
        require_inert(saved(tmp_path, value, **how))


def test_what_a_trainer_leaves_beside_a_model_is_not_in_the_way_and_is_looked_at_when_it_is_opened(
    tmp_path: Path,
) -> None:
    state = tmp_path / "training_args.bin"
    state.write_bytes(pickle.dumps(os.system))
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(os.system))
    require_inert(tmp_path)
    with pytest.raises(UnsafeModel):
        require_inert(tmp_path / "optimizer.pt")


def program(*steps: bytes) -> bytes:
    return b"\x80\x02" + b"".join(steps) + b"."


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (b"cos\nsystem\n", "os.system"),
        (b"ctorch.hub\nload\n", "torch.hub.load"),
        (b"ctorch\nload\n", "torch.load"),
        (b"ctorch.serialization\nload\n", "torch.serialization.load"),
        (b"ctorch.storage\n_load_from_bytes\n", "torch.storage._load_from_bytes"),
        (b"ctorch._tensor\n_rebuild_from_type_v2\n", "_rebuild_from_type_v2"),
        (b"cnumpy\nload\n", "numpy.load"),
        (b"cnumpy.f2py\ncompile\n", "numpy.f2py.compile"),
        (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        (b"c__builtin__\neval\n", "__builtin__.eval"),
        (b"ccollections\nnamedtuple\n", "collections.namedtuple"),
        (b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__"),
        (b"(ios\nsystem\n", "the step INST"),
        (b"\x82\x01", "the step EXT1"),
        (b"}2", "the step DUP"),
        (b"ccollections\nOrderedDict\n)\x81)R", "calls something that it does not name"),
        (b"ccollections\nOrderedDict\n}b", "changes something that it did not create"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)RK\x01K\x02s", "writes into something that is not a dict"),
        (b"]K\x01K\x02s", "writes into something that is not a dict"),
        (b"}K\x01a", "writes into something that is not a list"),
        (b"\x8c\x02os\x8c\x06system\x93", "os.system"),
        (b"\x8c\x02os\x94\x8c\x06system\x940h\x00h\x01\x93", "step POP"),
        (b"\x8c\x02os\x94\x8c\x06system\x94\x86h\x00h\x01\x93\x86", "os.system"),
        (b"NN\x93", "not plain text"),
        (b"K\x01", ""),
    ],
)
def test_a_pickle_is_refused_by_the_step_that_torch_does_not_write(tmp_path: Path, steps: bytes, told: str) -> None:
    path = archive(tmp_path / "x.ckpt", program(steps))
    if not told:
        require_inert(path)
        return
    with pytest.raises(UnsafeModel) as caught:
        require_inert(path)
    assert told in caught.value.problem


def zipped(path: Path, members: dict[str, bytes], **how: Any) -> Path:
    with zipfile.ZipFile(path, "w", **how) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


EMPTY = program(b"}")


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"a/data.pkl": EMPTY, "b/data.pkl": EMPTY}, "2 lists of tensors in 2 folders"),
        ({"a/data.pkl": EMPTY, "a/data/0": b"", "b/version": b""}, "in 2 folders"),
        ({"a/version": b"3"}, "0 lists of tensors"),
        ({"a/data.pkl": EMPTY, "a/code/x.py": b""}, "TorchScript"),
        ({"a/data.pkl": EMPTY, "a/constants.pkl": EMPTY}, "no part of a list of tensors"),
        ({"a/data.pkl": EMPTY, "a/../../x": b""}, "no part of a list of tensors"),
        ({"a/data.pkl": EMPTY, "a/data/x/y": b""}, "no part of a list of tensors"),
        ({"data.pkl": EMPTY}, "no part of a list of tensors"),
        ({"a/data.pkl": EMPTY + b"more"}, "something follows"),
        ({"a/data.pkl": b"cos\nsystem\n."}, "os.system"),
        ({"a/data.pkl": b""}, "cannot be read"),
    ],
)
def test_an_archive_that_torch_does_not_write_is_refused(tmp_path: Path, members: dict[str, bytes], told: str) -> None:
    with pytest.raises(UnsafeModel, match=told):
        require_inert(zipped(tmp_path / "x.pt", members))


def test_an_archive_is_refused_for_compression_a_note_and_bytes_before_or_over_its_members(tmp_path: Path) -> None:
    honest = {"a/data.pkl": EMPTY, "a/version": b"3"}
    require_inert(zipped(tmp_path / "honest.pt", honest))
    with pytest.raises(UnsafeModel, match="compressed"):
        require_inert(zipped(tmp_path / "x.pt", honest, compression=zipfile.ZIP_DEFLATED))
    raw = (tmp_path / "honest.pt").read_bytes()
    for number, other in enumerate(
        [
            raw[:-2] + struct.pack("<H", 30) + raw[-22:-2] + bytes(10),  # a second end in a note
            zipped(tmp_path / "y.pt", {"a/version": b"3"}).read_bytes() + raw,
            raw + raw,
        ]
    ):
        path = tmp_path / f"{number}.pt"
        path.write_bytes(other)
        with pytest.raises(UnsafeModel):
            require_inert(path)
    with zipfile.ZipFile(tmp_path / "over.pt", "w") as file:
        file.writestr("a/data.pkl", EMPTY)
        file.writestr("a/data/0", b"")
        file.infolist()[1].header_offset = 0
    with pytest.raises(UnsafeModel):
        require_inert(tmp_path / "over.pt")


def test_pickles_are_refused_where_torch_is_too_old_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = archive(tmp_path / "x.ckpt", EMPTY)
    for version, safe in (("2.5.1+cu121", False), ("1.13.1", False), ("2.6.0+cu124", True), ("2.10.0a0", True)):
        monkeypatch.setattr("importlib.metadata.version", lambda _name, version=version: version)
        if safe:
            require_inert(path)
        else:
            with pytest.raises(UnsafeModel, match=r"PyTorch .* can be made to run code"):
                require_inert(path)


def test_a_file_that_was_looked_at_is_looked_at_again_when_it_changed(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.ckpt", EMPTY)
    require_inert(path)
    state = path.stat()
    path.write_bytes(path.read_bytes().replace(EMPTY, EMPTY[:2] + b"2."))  # as long, and a step that is not allowed
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(UnsafeModel):
        require_inert(path)


def test_what_is_no_pickle_at_all_is_left_to_its_loader(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"weights, as a test has them")
    require_inert(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    require_inert(tmp_path)
    for raw in (b"(S'x'\nios\nsystem\n.", b"cos\nsystem\n(S'x'\ntR" + b"\xff" * 9, b"I1\n."):
        (tmp_path / "x.bin").write_bytes(raw)
        with pytest.raises(UnsafeModel):
            require_inert(tmp_path)


# ---------------------------------------------------------------------------------- graphs, faces, descriptions


def layer(version: str) -> bytes:
    return f'<?xml version="1.0"?><net><layers><layer id="0" type="A" version="{version}"/></layers></net>'.encode()


def test_graphs_of_openvino_itself_pass_and_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "encoder.bin").write_bytes(b"cos\nsystem\n.")  # bare numbers may look like anything
    (tmp_path / "encoder.xml").write_bytes(layer("opset14"))
    require_inert(tmp_path)
    for raw in (
        layer("extension"),
        layer(""),
        b'<!DOCTYPE net SYSTEM "file:///etc/passwd">' + layer("opset1")[21:],
        b"<?evil x?><net/>",
        b"<a>" * 100 + b"</a>" * 100,
        b"no xml",
    ):
        (tmp_path / "encoder.xml").write_bytes(raw)
        with pytest.raises(UnsafeModel, match=r"encoder\.xml is not used"):
            require_inert(tmp_path)
    (tmp_path / "encoder.xml").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n.")
    (tmp_path / "pytorch_model.xml").write_bytes(layer("opset1"))
    with pytest.raises(UnsafeModel, match=r"pytorch_model\.bin"):
        require_inert(tmp_path / "pytorch_model.bin")


def field(number: int, value: bytes | int) -> bytes:
    if isinstance(value, int):
        return bytes([number << 3, value])
    return bytes([number << 3 | 2, len(value)]) + value


def test_a_face_model_keeps_its_numbers_and_uses_known_operations(tmp_path: Path) -> None:
    path = tmp_path / "face.onnx"
    tensor, outside = field(8, b"w") + field(9, b"\0" * 4), field(8, b"w") + b"\x70\x01"
    kept = b"\x6a" + bytes([len(field(1, b"location"))]) + field(1, b"location")
    node = field(4, b"Conv") + field(5, field(5, tensor))
    path.write_bytes(field(1, 8) + field(7, field(1, node) + field(5, tensor)))
    require_inert(path)
    for graph, told in (
        (field(5, outside), "keeps numbers in other files"),
        (field(5, kept), "keeps numbers in other files"),
        (field(1, field(5, field(5, outside))), "keeps numbers in other files"),
        (field(1, field(4, b"Evil") + field(7, b"evil.ops")), "operations of b'evil.ops'"),
        (b"\x0b\x0c", "groups"),
    ):
        path.write_bytes(field(1, 8) + field(7, graph))
        with pytest.raises(UnsafeModel) as caught:
            require_inert(path)
        assert told in caught.value.problem


V1 = """model:
  base_learning_rate: 1.0e-04
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    first_stage_key: "jpg"
    conditioning_key: crossattn
    scheduler_config: # 10000 warmup steps
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params:
        warm_up_steps: [ 10000 ]
        cycle_lengths: [ 10000000000000 ] # incredibly large number to prevent corner cases
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        attention_resolutions: [ 4, 2, 1 ]
        channel_mult:
        - 1
        - 2
    first_stage_config:
      target: ldm.models.autoencoder.AutoencoderKL
      params:
        lossconfig:
          target: torch.nn.Identity
"""


def test_the_description_of_a_checkpoint_names_networks_of_stable_diffusion_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(V1)
    require_inert(path)
    for line in (
        "target: subprocess.Popen",
        "target:\n    os.system",
        "target : os.system",
        '"target": os.system',
        '"tar\\x67et": os.system',
        "? target",
        "{target: os.system}",
        "a: {target: os.system}",
        "a: &x os.system",
        "a: *x",
        "<<: *x",
        "a: !!python/object:os.system {}",
        "target: !!str os.system",
        "target: ${oc.env:HF_TOKEN}",
        "target: ldm.util.instantiate_from_config",
        "target: torch.hub.load",
        "target: |\n  os.system",
        "ckpt_path: /tmp/evil.ckpt",
        "version: /tmp/evil",
        "\ttarget: os.system",
        "a: 1\u2028target: os.system",
        "a: [\n {target: os.system}]",
    ):
        path.write_text(V1 + line + "\n")
        with pytest.raises(UnsafeModel, match=r"model\.yaml is not used"):
            require_inert(path)


@pytest.mark.parametrize("family", ["sd15", "sd15-inpaint", "sd21"])
def test_the_descriptions_that_are_written_here_pass(tmp_path: Path, family: str) -> None:
    from fastsd_helpers.checkpoints.formats.prediction import Prediction, sidecar
    from fastsd_helpers.checkpoints.names.families import find_family

    text = sidecar(find_family(family), Prediction("v_prediction", "said"), collections.defaultdict(lambda: 320))
    (tmp_path / "model.yaml").write_text(text)
    require_inert(tmp_path / "model.yaml")
    (tmp_path / "model.yaml").write_text(f"{text}\nmore: {{target: os.system}}\n")
    with pytest.raises(UnsafeModel, match=r"model\.yaml is not used"):
        require_inert(tmp_path / "model.yaml")


def safetensors(metadata: dict[str, str], *, twice: bool = False) -> bytes:
    header = json.dumps({"__metadata__": metadata, "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    header = header.replace('"a":', '"a": {}, "a":') if twice else header
    return struct.pack("<Q", len(header)) + header.encode() + bytes(4)


def test_the_header_of_a_safetensors_file_is_looked_at_and_nothing_else_of_it(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    settings = {"unet.r": 4, "unet.megatron_config": None, "unet.megatron_core": "megatron.core"}
    path.write_bytes(
        safetensors({"lora_adapter_metadata": json.dumps(settings), "ss_tag_frequency": '{"auto_map": 1}'})
    )
    require_inert(path)
    path.write_bytes(safetensors({"lora_adapter_metadata": json.dumps({"auto_mapping": {"a": "evil"}})}))
    with pytest.raises(UnsafeModel, match="auto_mapping"):
        require_inert(path)
    path.write_bytes(safetensors({}, twice=True))
    with pytest.raises(UnsafeModel, match="occurs twice"):
        require_inert(path)
    # Nine gigabytes that are not there: what is looked at is the beginning.
    path.write_bytes(safetensors({}))
    os.truncate(path, 9 * 2**30)
    require_inert(path)


def test_a_header_of_a_length_that_looks_like_another_kind_is_a_header(tmp_path: Path) -> None:
    entry = {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    hostile = {"__metadata__": {"lora_adapter_metadata": json.dumps({"auto_mapping": {"a": "evil"}})}}
    for length in (0x0280, 0x0380, 0x4B50):  # as a pickle and as a zip file begin
        written = struct.pack("<Q", length) + json.dumps(entry).encode().ljust(length) + bytes(4)
        (tmp_path / "model.safetensors").write_bytes(written)
        require_inert(tmp_path)
        written = struct.pack("<Q", length) + json.dumps(hostile | entry).encode().ljust(length) + bytes(4)
        (tmp_path / "model.safetensors").write_bytes(written)
        with pytest.raises(UnsafeModel, match="auto_mapping"):
            require_inert(tmp_path)


# ------------------------------------------------------------------------------------------- what a call fetched


def write_pipeline(folder: Path, **index: Any) -> Path:
    for name, content in {
        "model_index.json": {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DModel"], **index},
        "unet/config.json": {},
        "unet/diffusion_pytorch_model.safetensors": "weights",
        "unet/evil.py": "print()",
        "unet/notes.xyz": "x",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_code_in_a_repository_is_not_fetched_and_a_refused_version_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    served = write_pipeline(tmp_path / "served")
    with HubServer({"a/b": served}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        first = find_folder("a/b", BASE_MODEL, cache_dir=tmp_path / "cache")
        assert not [*first.rglob("*.py"), *first.rglob("*.xyz")]
        before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
        write_pipeline(served, scheduler=["evil", "Scheduler"])
        with pytest.raises(UnsafeModel, match=r"^a/b/model_index\.json is not used") as caught:
            fetch_repo("a/b", cache_dir=tmp_path / "cache")
        assert caught.value.hint.startswith("The partial download was deleted.")
        after = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
        assert after == before
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_folder("a/b", BASE_MODEL, cache_dir=tmp_path / "cache") == first


def test_of_a_refused_link_nothing_stays_and_its_source_is_named(tmp_path: Path) -> None:
    evil = archive(tmp_path / "evil.ckpt", program(b"cos\nsystem\n")).read_bytes()
    server = FileServer({"/evil.ckpt": evil, "/lora.safetensors": evil})
    try:
        for name in ("evil.ckpt", "lora.safetensors"):
            with pytest.raises(UnsafeModel) as caught:
                fetch(server.url(f"/{name}"), tmp_path / "models")
            assert caught.value.hint.startswith("The partial download was deleted.")
            assert name in caught.value.problem
            assert ".part" not in caught.value.problem
            assert [path for path in (tmp_path / "models").iterdir() if path.suffix != ".lock"] == []
    finally:
        server.stop()


# ---------------------------------------------------------------------------------------------------- one door


LOADERS = {
    "from_pretrained", "load_file", "safe_open", "open_model", "read_model", "from_single_file", "load_lora_weights",
    "load_textual_inversion", "InferenceSession", "readNet", "readNetFromONNX", "from_file", "from_json_keyval",
}  # fmt: skip
DOORS = {"require_inert", "find_folder", "fetch_model"}
# Modules that load what another one brought through the look, or what no code can be in.
BROUGHT = {
    "bench/dreambooth_loops.py": {"require_inert"},
    "bench/dreambooth_models.py": "the tokenizer and the schedule of the embedded model",
    "bench/dreambooth_sdxl.py": {"require_inert"},
    "dreambooth/families/stable_diffusion.py": "a scheduler's description, which BaseModel.fetch brought",
    "dreambooth/resume/generation.py": "safetensors that this package wrote",
    "dreambooth/training/base_model.py": "a description of the base model, which BaseModel.fetch brought",
    "trocr/language/ngram.py": "counts in a safetensors file, which nothing but safetensors reads",
    "trocr/teaching/checkpoints.py": "load_weights of a checkpoint of this run",
}


def calls(tree: ast.AST) -> list[tuple[str, str, ast.Call]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
            found.append((owner, name, node))
    return found


def loads(owner: str, name: str) -> bool:
    return name in LOADERS or (owner, name) in (("torch", "load"), ("cv2.FaceDetectorYN", "create"), ("pickle", "load"))


def test_every_module_that_loads_a_model_goes_through_the_look() -> None:
    loading, without = set(), []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        made = calls(ast.parse(path.read_text(encoding="utf-8")))
        if not any(loads(owner, called) for owner, called, _node in made):
            continue
        loading.add(name)
        if name not in BROUGHT and not DOORS & {called for _owner, called, _node in made}:
            without.append(name)
    assert without == []
    known = {
        "captions/prompts.py",
        "playground/loading.py",
        "playground/steering.py",
        "trocr/model/checkpoint.py",
        "images/faces.py",
    }
    assert known <= loading, "the search itself finds what loads"


def test_no_code_of_a_model_is_trusted_and_nobody_is_asked() -> None:
    seen = 0
    for path in sorted(PACKAGE.rglob("*.py")):
        for owner, name, node in calls(ast.parse(path.read_text(encoding="utf-8"))):
            given = {word.arg: word.value for word in node.keywords}
            value = given.get("trust_remote_code")
            assert value is None or (isinstance(value, ast.Constant) and value.value is False), path
            if name == "from_pretrained" and owner.rpartition(".")[2].startswith("Auto") and "Autoencoder" not in owner:
                assert value is not None, f"{path}: {owner}.from_pretrained may ask whether to run a model's code"
                seen += 1
            if name == "from_pretrained" and not path.is_relative_to(PACKAGE / "bench"):
                assert given.keys() & {"local_files_only", None} or path.name == "base_model.py", f"{path}: {owner}"
            if (owner, name) == ("torch", "load"):
                only = given.get("weights_only")
                assert getattr(only, "value", None) is True, path
    assert seen >= 3


def test_the_harmless_payload_would_run(tmp_path: Path) -> None:
    from hostile_models import KINDS, write

    path = write("bare pickle", tmp_path / "one", tmp_path / "mark")
    pickle.load(io.BytesIO(path.read_bytes()))
    assert (tmp_path / "mark").exists()
    assert len(KINDS) >= 25
