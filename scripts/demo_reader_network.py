"""The embedded demo reader before training: a small TrOCR-shaped network and a tokenizer of single bytes."""

import json
from pathlib import Path
from typing import Any

__all__ = ["HEIGHT_PX", "WIDTH_PX", "build_reader", "write_processor"]

HEIGHT_PX, WIDTH_PX = 48, 480
_PATCH = (24, 8)
_WIDTH = 192
_START, _PAD, _END = 0, 1, 2
_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")


def build_reader(vocabulary: int = 260) -> Any:
    """A VisionEncoderDecoderModel of 3.6 million parameters: ViT encoder, TrOCR decoder, random weights.

    Lines are squashed to 48 x 480 px instead of 384 x 384: 121 places instead of 577, so a CPU can train it.
    """
    import transformers

    encoder = transformers.ViTConfig(
        image_size=(HEIGHT_PX, WIDTH_PX),
        patch_size=_PATCH,
        hidden_size=_WIDTH,
        num_hidden_layers=5,
        num_attention_heads=6,
        intermediate_size=4 * _WIDTH,
        qkv_bias=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    decoder = transformers.TrOCRConfig(
        vocab_size=vocabulary,
        d_model=_WIDTH,
        decoder_layers=2,
        decoder_attention_heads=6,
        decoder_ffn_dim=4 * _WIDTH,
        cross_attention_hidden_size=_WIDTH,
        max_position_embeddings=96,
        dropout=0.05,
        is_decoder=True,
        tie_word_embeddings=True,
        bos_token_id=_START,
        pad_token_id=_PAD,
        eos_token_id=_END,
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = _END, _PAD, _END
    model = transformers.VisionEncoderDecoderModel(
        encoder=transformers.ViTModel(encoder, add_pooling_layer=False),
        decoder=transformers.TrOCRForCausalLM(decoder),
        config=config,
    )
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=_END, eos_token_id=_END, pad_token_id=_PAD, max_new_tokens=64, use_cache=True
    )
    return model


def write_processor(folder: Path) -> None:
    """Write the tokenizer (256 bytes and 4 marks: any text can be written) and the picture settings."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    folder.mkdir(parents=True, exist_ok=True)
    words = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", _START), ("</s>", _END)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    special |= {"cls_token": "<s>", "sep_token": "</s>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 96, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    pictures = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": HEIGHT_PX, "width": WIDTH_PX},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(pictures, indent=1) + "\n")
