"""Small TrOCR checkpoints with random weights: the real classes, the file layouts of the published models.

`base` has learned positions, tied words and a byte-level BPE tokenizer (vocab.json and merges.txt, as RoBERTa);
`stage1` the same with sinusoidal positions, untied words, ReLU and scaled vectors; `small` a sentencepiece-like
Unigram tokenizer (tokenizer.json, as XLM-RoBERTa saves it) and a narrower decoder behind a projection.
"""

import json

import pytest

SIDE_PX = 64
# How far two ways through the decoder may come apart, of the largest score or log-probability. fp32 keeps a sum of 24
# to 64 products to some 1e-6; three layers of six such sums, whose norms stretch small differences, and the keys that
# all later steps read make up to 4e-5 of it, on any processor and with any number of threads. A wrong position, scale
# or order of layers makes more than 1e-2.
STEPS = 4e-4
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "0123456789",
    "A",
    "B",
    "C",
    "D",
    "E",
    "F",
    "G",
    "H",
    ";",
    ".",
    ",",
    "'",
    "-",
    "!",
    "?",
    "Mr.",
    "of",
    "and",
    "to",
    "in",
]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]


def write_tokenizer(folder, kind):
    """Train a tokenizer of about 300 (BPE) or 90 (Unigram) tokens on a handful of words; returns its size."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "cls_token": "<s>"}
    special |= {"sep_token": "</s>", "mask_token": "<mask>"}
    if kind == "bpe":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=[*SPECIAL, "<mask>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(WORDS * 4, trainer)
        tokenizer.model.save(str(folder))
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
        config = {"tokenizer_class": "RobertaTokenizer", **special}
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=[*SPECIAL, "<mask>"], unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(WORDS * 4, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def write_reader(
    folder, kind="base", *, seed=0, use_cache=False, spread=0.25, end=1.0, encoder_changes=None, **decoder_changes
):
    """Write a checkpoint as the published ones are: generation_config.json says use_cache=false and no length.

    spread: deviation of the random weights; transformers' own 0.02 (spread 0), good to learn from, makes every token
    equally likely.
    end: makes the end token's vector longer, so that lines end at many different steps.
    """
    torch = pytest.importorskip("torch")
    import transformers

    words = write_tokenizer(folder, "unigram" if kind == "small" else "bpe")
    encoder = {
        "image_size": SIDE_PX,
        "patch_size": 16,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "qkv_bias": False,
    }
    encoder = transformers.ViTConfig(**(encoder | (encoder_changes or {})))
    decoder = {
        "vocab_size": words,
        "d_model": 32,
        "decoder_layers": 3,
        "decoder_attention_heads": 4,
        "decoder_ffn_dim": 64,
        "cross_attention_hidden_size": 32,
        "max_position_embeddings": 96,
        "is_decoder": True,
        "tie_word_embeddings": True,
    }
    if kind == "stage1":
        decoder |= {
            "use_learned_position_embeddings": False,
            "layernorm_embedding": False,
            "tie_word_embeddings": False,
            "scale_embedding": True,
            "activation_function": "relu",
        }
    elif kind == "small":
        decoder |= {"d_model": 24, "cross_attention_hidden_size": None, "decoder_attention_heads": 2}
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, transformers.TrOCRConfig(**(decoder | decoder_changes))
    )
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 2, 1, 2
    torch.manual_seed(seed)
    model = transformers.VisionEncoderDecoderModel(config=config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and spread:
                # What is seen and where the line is at must count for more than the token before, or all lines loop.
                more = 2 if "encoder_attn" in name or "embed_positions" in name else 1
                weight.normal_(0, spread * more)
        model.decoder.output_projection.weight[2] *= end
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=2, eos_token_id=2, pad_token_id=1, use_cache=use_cache
    )
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "ViTFeatureExtractor",
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
                "resample": 2,
                "size": SIDE_PX,
            }
        )
    )
    return model


def noise_pictures(count, *, seed=0):
    """Images of random pixels of many widths: unlike one another, so that readers write different lines."""
    import numpy as np
    from PIL import Image

    chance = np.random.default_rng(seed)
    sizes = [(int(chance.integers(60, 300)), int(chance.integers(20, 60))) for _ in range(count)]
    return [
        Image.fromarray(chance.integers(0, 256, (h // 8 + 2, w // 8 + 2, 3), dtype=np.uint8)).resize((w, h))
        for w, h in sizes
    ]


def judge_by(reader, pictures):
    """transformers' own forward pass over a whole line, without a cache or a search, for `closeness.assert_same_lines`.

    Called with an image's place and token ids it gives the log-probabilities of every next token,
    [tokens + 1, vocabulary].
    """
    import torch

    model, pixels = reader.checkpoint.model, reader.checkpoint.pixels

    def judge(place, ids):
        batch = pixels.batch([pixels.resize(pictures[place])])
        with torch.inference_mode():
            scores = model(pixel_values=batch, decoder_input_ids=torch.tensor([[2, *ids]]), use_cache=False).logits
        return scores[0].float().log_softmax(-1)

    return judge
