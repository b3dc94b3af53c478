"""The types that a model's description may name: those of diffusers and transformers that load nothing else.

Left out on purpose: every Auto class and whole pipelines as parts (they read a description again, and trust it), and
networks that load a further one by its name (LightGlue, RAG, timm wrappers, encoder-decoders inside a pipeline).
"""

import re
from typing import Any

__all__ = ["is_diffusers_class", "is_known_part", "is_pipeline_class", "is_tokenizer_class", "is_transformers_type"]

_PIPELINE = re.compile(r"(?!Auto|Flash|Flax|Onnx|Modular|DiffusionPipeline$)[A-Z][A-Za-z0-9_]*Pipeline")
_DIFFUSERS = re.compile(
    r"(?!Auto(?!encoder)|Flash|Flax|Onnx)[A-Z][A-Za-z0-9_]*"
    r"(Model|UNet|VAE|Scheduler|Adapter|Prior|Encoder|Autoencoder\w*|Guidance|Connectors?|Vocoder)"
    r"|(Asymmetric)?Autoencoder[A-Za-z0-9]+"
)
_FAMILIES = [
    "Albert", "AltCLIP", "Bart", "Bert", "Bit", "Blip", "Camembert", "Canine", "ChineseCLIP", "CLIP", "Clap", "CodeGen",
    "DPT", "Deberta", "DebertaV2", "DeiT", "Dinov2", "DistilBert", "Electra", "Gemma", "Gemma2", "Gemma3", "GPT2",
    "GPTNeoX", "Glm", "Glm4", "Llama", "Llama4", "M2M100", "MBart", "MBart50", "Mistral", "Mistral3", "MPNet", "MT5",
    "Nllb", "Pegasus", "Phi3", "Pixtral", "PreTrained", "Qwen2", "Qwen2_5_VL", "Qwen2VL", "Qwen3", "Qwen3VL", "Roberta",
    "SmolLM3", "Segformer", "Siglip", "Siglip2", "SpeechT5", "T5", "T5Gemma", "UMT5", "ViT", "Whisper", "XGLM", "XLM",
    "XLMRoberta", "XLNet", "BigBird", "ByT5", "LayoutLMv3", "TrOCR", "DonutSwin", "Donut"
]  # fmt: skip
_FAMILY = "(?:" + "|".join(sorted(_FAMILIES, key=len, reverse=True)) + ")"
_TOKENIZER = re.compile(rf"{_FAMILY}Tokenizer(Fast)?|(Tokenizers|SentencePiece|Python)Backend")
_TRANSFORMERS = re.compile(
    rf"{_FAMILY}(Text|Vision|Encoder|Audio)?"
    r"(Model(WithProjection)?|ForCausalLM|ForConditionalGeneration|ForDepthEstimation|HifiGan|ImageProcessor(Fast|Pil)?"
    r"|FeatureExtractor|VLProcessor|Processor|VideoProcessor)"
)
# Parts that diffusers keeps beside a pipeline of its own, under the name of the pipeline's folder.
_BESIDE_PIPELINES = {
    "alt_diffusion": ("RobertaSeriesModelWithTransformation",),
    "audioldm2": ("AudioLDM2ProjectionModel", "AudioLDM2UNet2DConditionModel"),
    "blip_diffusion": ("Blip2QFormerModel", "ContextCLIPTextModel", "BlipImageProcessor"),
    "deepfloyd_if": ("IFSafetyChecker", "IFWatermarker"),
    "flux": ("ReduxImageEncoder",),
    "kandinsky": ("MultilingualCLIP",),
    "kolors": ("ChatGLMModel", "ChatGLMTokenizer"),
    "latent_diffusion": ("LDMBertModel",),
    "ltx": ("LTXLatentUpsamplerModel",),
    "ltx2": ("LTX2LatentUpsamplerModel", "LTX2TextConnectors", "LTX2Vocoder", "LTX2VocoderWithBWE"),
    "paint_by_example": ("PaintByExampleImageEncoder",),
    "shap_e": ("ShapERenderer",),
    "stable_audio": ("StableAudioProjectionModel",),
    "stable_diffusion": ("StableDiffusionSafetyChecker", "StableUnCLIPImageNormalizer", "CLIPImageProjection"),
    "stable_diffusion_safe": ("SafeStableDiffusionSafetyChecker",),
    "unclip": ("UnCLIPTextProjModel",),
    "unidiffuser": ("UniDiffuserModel", "UniDiffuserTextDecoder"),
    "versatile_diffusion": ("UNetFlatConditionModel",),
    "vq_diffusion": ("LearnedClassifierFreeSamplingEmbeddings",),
    "wuerstchen": ("PaellaVQModel", "WuerstchenDiffNeXt", "WuerstchenPrior"),
}
_OTHER_CLASSES = frozenset(name for names in _BESIDE_PIPELINES.values() for name in names)
_TYPES = frozenset(
    [
        "albert", "altclip", "bart", "beit", "bert", "bit", "blip", "blip_text_model", "blip_vision_model", "camembert",
        "chinese_clip", "clap", "clip", "clip_text_model", "clip_vision_model", "codegen", "convnext", "convnextv2",
        "data2vec-vision", "deberta", "deberta-v2", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit",
        "distilbert", "donut-swin", "dpt", "electra", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "glm4", "gpt2",
        "ijepa", "kolors", "layoutlmv3", "llama", "llama4", "llama4_text", "M-CLIP", "m2m_100", "mbart", "mistral",
        "mistral3", "mpnet", "mt5", "nystromformer", "pegasus", "phi3", "pixtral", "pvt", "pvt_v2", "qwen2",
        "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl", "qwen2_vl_text", "qwen3", "qwen3_vl", "qwen3_vl_text", "resnet",
        "roberta", "segformer", "siglip", "siglip2", "siglip2_text_model", "siglip2_vision_model", "siglip_text_model",
        "siglip_vision_model", "smollm3", "speecht5", "swin", "swinv2", "t5", "t5gemma", "trocr", "umt5",
        "vision-encoder-decoder", "vit", "vit_hybrid", "vit_mae", "vit_msn", "vitdet", "xlm-roberta", "xlnet"
    ]
)  # fmt: skip


def is_pipeline_class(name: Any) -> bool:
    """Whether this can be the name of a pipeline of diffusers; whether it is one, only diffusers itself knows."""
    return isinstance(name, str) and _PIPELINE.fullmatch(name) is not None


def is_diffusers_class(name: Any) -> bool:
    """Whether this is the name of a network, scheduler or other part of diffusers."""
    return isinstance(name, str) and (_DIFFUSERS.fullmatch(name) is not None or name in _OTHER_CLASSES)


def is_known_part(library: str, name: str) -> bool:
    """Whether a pipeline may have a part of this library and type."""
    if library == "diffusers":
        return is_diffusers_class(name)
    if library == "transformers":
        return _TRANSFORMERS.fullmatch(name) is not None or is_tokenizer_class(name)
    return name in _BESIDE_PIPELINES.get(library, ())


def is_tokenizer_class(name: str) -> bool:
    """Whether this is a tokenizer of transformers that is made of its vocabulary alone."""
    return _TOKENIZER.fullmatch(name) is not None


def is_transformers_type(name: str) -> bool:
    """Whether a description of transformers may name this type, at any depth."""
    return name in _TYPES
