"""What a weights file is: every kind that people have on their disks is called by its name, under each of its names."""

import importlib.resources
import tomllib

import pytest
from table_models import original, values, write

from fastsd_helpers import checkpoints
from fastsd_helpers.checkpoints.formats.safetensors_file import TensorFact
from fastsd_helpers.checkpoints.models.detect import detect
from fastsd_helpers.checkpoints.names.families import FAMILY_KEYS, PART_KEYS
from fastsd_helpers.errors import CheckpointError, FastSDError

UNET = "model.diffusion_model."


@pytest.fixture
def place(tmp_path):
    """An empty folder of the test's own."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def facts(*names, **shapes):
    """Facts of tensors, [4, 4] each, but for those whose shape is given by the end of the name."""
    shape_of = {end.replace("__", "."): shape for end, shape in shapes.items()}
    return {
        name: TensorFact("F16", next((shape for end, shape in shape_of.items() if name.endswith(end)), (4, 4)))
        for name in names
    }


def facts_of(key):
    return {name: fact for name, (fact, _values) in original(key).items()}


# One example of every row of the table, in the table's own words where they are said to nobody else.
EXAMPLES = [
    ("control-lora", ["lora_controlnet", "input_blocks.0.0.down", "input_hint_block.0.weight"]),
    ("ControlNet-LLLite", ["lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight"]),
    ("an IP-Adapter", ["ip_adapter.1.to_k_ip.weight", "image_proj.proj.weight"]),
    ("an IP-Adapter", ["image_proj.latents", "1.to_k_ip.weight"]),
    ("an IP-Adapter", ["down_blocks.2.attentions.1.attn2.processor.to_k_ip.weight"]),
    ("an IP-Adapter", ["ip_adapter.0.to_q_lora.down.weight", "ip_adapter.0.to_q_lora.up.weight"]),
    ("an IP-Adapter for Flux.1 (XLabs)", ["ip_adapter_proj_model.proj.weight", "double_blocks.0.processor.ip.weight"]),
    ("PhotoMaker", ["id_encoder.visual_projection_2.weight", "lora_weights.unet.a.to_q_lora.up.weight"]),
    ("a hypernetwork", ["768.0.linear.0.weight", "768.1.linear.0.weight"]),
    ("layers have numbers for names", ["unet:0:up", "unet:0:down"]),
    ("a list of tensors without names", ["0", "1"]),
    ("GLIGEN", ["position_net.linears.0.weight", "input_blocks.1.1.transformer_blocks.0.fuser.linear.weight"]),
    ("a T2I-Adapter for styles", ["style_embedding", "transformer_layes.0.ln_1.weight"]),
    ("a PuLID adapter", ["id_adapter.id_embedding_mapping.0.weight"]),
    ("Flux.1 Redux", ["redux_up.weight", "redux_down.weight"]),
    ("a T2I-Adapter", ["body.0.block1.weight", "body.0.block2.weight", "conv_in.weight"]),
    ("a T2I-Adapter", ["adapter.body.0.resnets.0.block1.weight"]),
    ("AnimateDiff motion module", ["down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"]),
    ("a ControlNet for Z-Image", ["control_all_x_embedder.2-1.weight"]),
    ("union", ["task_embedding", "controlnet_cond_embedding.conv_in.weight"]),
    ("union", ["task_embedding", "control_model.input_hint_block.0.weight"]),
    ("(union: several tasks in one) for Flux.1", ["controlnet_mode_embedder.weight", "controlnet_blocks.0.weight"]),
    ("a ControlNet for Flux.1", ["controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"]),
    ("a ControlNet for Stable Diffusion 3", ["controlnet_blocks.0.weight", "transformer_blocks.0.attn.to_q.weight"]),
    ("a ControlNet for SDXL", ["controlnet_cond_embedding.conv_in.weight", "add_embedding.linear_1.weight"]),
    ("a ControlNet for SDXL", ["control_model.input_hint_block.0.weight", "control_model.label_emb.0.0.weight"]),
    ("a ControlNet for Stable Diffusion", ["control_model.zero_convs.0.0.bias"]),
    ("a ControlNet for Stable Diffusion", ["input_hint_block.0.weight", "input_blocks.0.0.weight"]),
    ("a ControlNet for Stable Diffusion", ["controlnet_down_blocks.0.weight", "conv_in.weight"]),
    ("Chroma Radiance", ["distilled_guidance_layer.norms.0.scale", "nerf_blocks.0.norm.scale"]),
    ("a Zero123 file", ["cc_projection.weight", f"{UNET}input_blocks.0.0.weight"]),
    ("a Chroma file", [f"{UNET}distilled_guidance_layer.in_proj.bias", f"{UNET}double_blocks.0.img_attn.qkv.weight"]),
    ("a FLUX.3 file", ["early_stream_modulations.image.lin.weight"]),
    ("a FLUX.2 file", ["double_stream_modulation_img.lin.weight", "double_blocks.0.img_attn.qkv.weight"]),
    ("a FLUX.2 file", ["single_stream_modulation.linear.weight", "transformer_blocks.0.attn.to_q.weight"]),
    ("HunyuanVideo 1.5", ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "vision_in.proj.0.weight"]),
    ("HunyuanImage", ["txt_in.individual_token_refiner.blocks.0.norm1.weight", "byt5_in.fc1.weight"]),
    ("a HunyuanVideo file", ["model.model.txt_in.individual_token_refiner.blocks.0.norm1.weight"]),
    ("a Krea 2 file", ["txtfusion.projector.weight"]),
    ("Stable Diffusion 3.5 medium", [f"{UNET}joint_blocks.0.x_block.attn2.qkv.weight"]),
    ("Stable Diffusion 3.5 large", [f"{UNET}joint_blocks.37.x_block.attn.qkv.weight"]),
    ("a Stable Diffusion 3 file", ["joint_blocks.0.context_block.attn.qkv.weight"]),
    ("a Qwen-Image file", ["transformer_blocks.0.img_mod.1.weight", "txt_norm.weight"]),
    ("a Z-Image file", [f"{UNET}layers.0.adaLN_modulation.0.weight", f"{UNET}cap_embedder.0.weight"]),
    ("Lumina Image 2.0", ["cap_embedder.1.weight", "noise_refiner.0.attention.qkv.weight"]),
    ("a Lumina file", ["cap_embedder.0.weight", "layers.0.attention.wq.weight"]),
    ("an OmniGen2 file", ["time_caption_embed.timestep_embedder.linear_1.bias"]),
    ("a HiDream file", ["double_stream_blocks.0.block.adaLN_modulation.1.bias"]),
    ("an AuraFlow file", ["model.double_layers.0.attn.w1q.weight"]),
    ("an AuraFlow file", ["joint_transformer_blocks.0.attn.add_k_proj.weight"]),
    ("a HunyuanDiT file", ["mlp_t5.0.weight", "blocks.0.attn1.q_norm.weight"]),
    ("HunyuanDiT file in Diffusers'", ["blocks.0.attn2.to_q.weight", "text_embedder.x", "time_extra_emb.x"]),
    ("Stable Cascade file (stage C)", ["clip_txt_mapper.weight", "clf.1.weight"]),
    ("Stable Cascade file (stage B)", ["down_blocks.1.0.channelwise.0.weight"]),
    ("Stable Cascade (stage A)", ["vquantizer.codebook.weight", "up_blocks.0.0.weight"]),
    ("a Sana file", ["blocks.0.mlp.inverted_conv.conv.weight", "blocks.0.cross_attn.q_linear.weight"]),
    ("a PixArt file", ["blocks.0.cross_attn.kv_linear.weight", "t_block.1.weight"]),
    ("an LTX-2 file", [f"{UNET}audio_patchify_proj.weight", f"{UNET}patchify_proj.weight"]),
    ("an LTX-Video file", [f"{UNET}patchify_proj.weight", "vae.decoder.conv_in.conv.weight"]),
    ("PixArt file in Diffusers'", ["adaln_single.linear.weight", "pos_embed.proj.weight", "caption_projection.x"]),
    (
        "LTX-Video file in Diffusers'",
        ["scale_shift_table", "transformer_blocks.0.scale_shift_table", "caption_projection.x", "proj_in.weight"],
    ),
    ("a Wan VACE file", ["head.modulation", "vace_blocks.0.after_proj.bias"]),
    ("a Wan file", [f"{UNET}head.modulation", f"{UNET}blocks.0.self_attn.q.weight"]),
    ("a Wan file in Diffusers'", ["condition_embedder.time_embedder.linear_1.weight"]),
    ("a Mochi file", ["blocks.0.attn.qkv_x.weight"]),
    ("an Anima file", ["net.llm_adapter.embed.weight", "net.x_embedder.proj.1.weight"]),
    ("a Cosmos file", ["net.x_embedder.proj.1.weight", "net.blocks.0.self_attn.q_proj.weight"]),
    ("a Kandinsky 5 file", ["visual_embeddings.in_layer.bias"]),
    ("a MiniMax file", ["token_refiner.blocks.0.attn.qkv_proj.weight"]),
    ("Kolors", ["encoder_hid_proj.weight", "down_blocks.0.resnets.0.conv1.weight"]),
    ("Stable Audio", ["model.model.transformer.rotary_pos_emb.inv_freq"]),
    ("ACE-Step", ["genre_embedder.weight"]),
    ("CogVideoX", ["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"]),
    ("Stable Diffusion 3 file in Diffusers'", ["transformer_blocks.0.attn.add_q_proj.weight", "pos_embed.proj.weight"]),
    ("Stable Video Diffusion", [f"{UNET}input_blocks.1.1.time_stack.0.attn1.to_q.weight"]),
    ("the VAE of FLUX.2", ["bn.running_mean", "encoder.mid.attn_1.q.weight", "decoder.mid.attn_1.q.weight"]),
    ("the VAE of Wan", ["decoder.middle.0.residual.0.gamma"]),
    ("the VAE of LTX-Video", ["vae.decoder.last_scale_shift_table"]),
    ("deep-compression VAE", ["decoder.stages.1.op_list.0.main.conv.conv.bias"]),
    ("the VAE of HunyuanVideo", ["decoder.mid.block_1.conv1.conv.weight"]),
    ("TAESD", ["decoder.layers.0.weight", "encoder.layers.0.weight"]),
    ("TAESD", ["taesd_decoder.1.weight", "taesd_encoder.0.weight"]),
    ("TAESD", ["1.weight", "3.conv.0.weight", "3.conv.2.weight", "18.weight"]),
    ("VAE-approx", ["conv1.weight", "conv8.weight"]),
    ("GFPGAN", ["stylegan_decoder.style_mlp.1.weight", "final_body_down.x"]),
    ("CodeFormer", ["quantize.embedding.weight", "position_emb"]),
    ("ESRGAN, old", ["model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"]),
    ("ESRGAN, old", ["conv_first.weight", "RRDB_trunk.0.RDB1.conv1.weight"]),
    ("Real-ESRGAN)", ["conv_first.weight", "body.0.rdb1.conv1.weight"]),
    ("HAT", ["layers.0.residual_group.overlap_attn.qkv.weight", "layers.0.residual_group.blocks.0.attn.qkv.weight"]),
    ("SwinIR", ["layers.0.residual_group.blocks.0.attn.relative_position_bias_table"]),
    ("DAT", ["layers.0.blocks.0.attn.attns.0.pos.pos_proj.weight"]),
    ("ATD", ["layers.0.residual_group.layers.0.attn_atd.scale"]),
    ("OmniSR", ["residual_layer.0.residual_layer.0.layer.0.fn.0.weight"]),
    ("PLKSR", ["feats.0.weight", "feats.1.channe_mixer.0.weight"]),
    ("SPAN", ["block_1.c1_r.sk.weight"]),
    ("compact", ["body.0.weight", "body.1.weight", "body.2.weight"]),
    ("a whole CLIP or SigLIP", ["text_model.encoder.layers.0.x.weight", "vision_model.encoder.layers.0.x.weight"]),
    ("OpenCLIP's names)", ["transformer.resblocks.0.ln_1.weight", "visual.conv1.weight"]),
    ("a CLIP vision model", ["vision_model.embeddings.class_embedding", "visual_projection.weight"]),
    ("language model that sees", ["model.layers.0.self_attn.q_proj.weight", "visual.blocks.0.attn.qkv.weight"]),
    ("a language model, the text", ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"]),
    ("BERT, DINO", ["bert.encoder.layer.0.attention.self.query.weight"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "names"), EXAMPLES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_of_another_kind_is_called_by_its_name_with_what_reads_it(words, names):
    kind = detect(facts(*names))
    assert words in kind.words
    assert kind.hint.endswith(".")
    assert kind.family is None


def test_every_row_of_the_table_has_an_example():
    text = importlib.resources.files("fastsd_helpers").joinpath("foreign_models.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    said = {detect(facts(*names)).words for _words, names in EXAMPLES}
    assert {words for _what, words, _hint, _signs in table["models"]["rows"]} <= said
    assert table["hints"].keys() >= {hint for _what, _words, hint, _signs in table["models"]["rows"]}


@pytest.mark.parametrize(
    ("words", "tensors"),
    [
        ("Stable Diffusion 1.x", {"emb_params": (3, 768)}),
        ("Stable Diffusion 2.x", {"emb_params": (3, 1024)}),
        ("Stable Diffusion 1.x", {"string_to_param.*": (3, 768)}),
        ("Stable Diffusion 1.x", {"<cat-toy>": (768,)}),
        ("SDXL", {"clip_l": (2, 768), "clip_g": (2, 1280)}),
        ("Stable Diffusion 3", {"clip_l": (2, 768), "clip_g": (2, 1280), "t5xxl": (2, 4096)}),
        ("Flux.1", {"clip_l": (2, 768), "t5": (2, 4096)}),
        ("SDXL", {"clip_l": (2, 768), "clip_g": (2, 1280), "clip_l_out": (2, 768), "clip_g_out": (2, 1280)}),
        ("SDXL", {"text_encoders_0": (2, 768), "text_encoders_1": (2, 1280)}),
        ("Stable Diffusion 1.x", {"bundle_emb.a cat.string_to_param.*": (3, 768)}),
        ("Stable Diffusion 1.x", {"sks": (768,)}),
        ("Stable Diffusion 2.x", {"my cat": (4, 1024)}),
    ],
)
def test_textual_inversion_embeddings_of_every_form_are_told_with_their_model(words, tensors, place):
    path = write(place / "in.safetensors", values(tensors))
    found = checkpoints.inspect(path, hashes=False)
    assert (found.kind, found.what) == ("embedding", f"a textual inversion embedding for {words}")
    with pytest.raises(CheckpointError, match=r"textual inversion embedding(.|\n)*embeddings"):
        checkpoints.convert(path, place / "out.safetensors")
    assert [file.name for file in place.iterdir()] == ["in.safetensors"]


def test_pickles_of_embeddings_upscalers_and_trainers_are_told_too(place):
    torch = pytest.importorskip("torch")
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(2, 768)}, "name": "x", "step": 9}
    torch.save(embedding, place / "x.pt")
    assert checkpoints.inspect(place / "x.pt", hashes=False).kind == "embedding"
    weights = {"conv_first.weight": torch.zeros(4, 3, 3, 3), "body.0.rdb1.conv1.weight": torch.zeros(4, 4, 3, 3)}
    torch.save({"params_ema": weights, "params": {}}, place / "RealESRGAN.pth")
    assert checkpoints.inspect(place / "RealESRGAN.pth", hashes=False).kind == "upscaler"
    torch.save({**weights, "epoch": 3, "optimizer": {"lr": 1.0}}, place / "flat.pth")
    assert checkpoints.inspect(place / "flat.pth", hashes=False).tensors == 2


@pytest.mark.parametrize("key", [*FAMILY_KEYS, *PART_KEYS])
def test_models_that_are_converted_are_never_taken_for_another_kind(key):
    kind = detect(facts_of(key))
    assert (kind.family, kind.hint) == (key, "")
    # A stray tensor of an adapter makes no LoRA of a whole model.
    assert detect({**facts_of(key), **facts("lora_unet_x.alpha")}).family == key


@pytest.mark.parametrize(
    ("width", "words"), [(7680, "klein 4B"), (12288, "klein 9B"), (15360, "FLUX.2 dev"), (5, "a FLUX.2 file")]
)
def test_the_sizes_of_flux_2_are_told_by_the_text_they_take(width, words):
    tensors = facts("double_stream_modulation_img.lin.weight", "txt_in.weight", txt_in__weight=(8, width))
    assert words in detect(tensors).words


def flux_with(channels=4, double=19, single=38):
    tensors = facts_of("flux")
    tensors["img_in.weight"] = TensorFact("F16", (16, channels))
    for place in range(double, 19):
        tensors = {name: fact for name, fact in tensors.items() if not name.startswith(f"double_blocks.{place}.")}
    for place in range(single, 38):
        tensors = {name: fact for name, fact in tensors.items() if not name.startswith(f"single_blocks.{place}.")}
    return tensors


def test_the_tasks_of_flux_are_told_and_converted_and_a_shortened_one_is_named():
    assert detect(flux_with(384)).words == "a Flux.1 Fill (inpainting) file"
    assert detect(flux_with(128)).words == "a Flux.1 Canny or Depth file"
    assert {detect(flux_with(channels)).family for channels in (64, 128, 384)} == {"flux"}
    lite = detect(flux_with(64, double=8))
    assert (lite.what, lite.family) == ("foreign", None)
    assert "8 and 38 blocks" in lite.words


def sdxl_with(depths, middle, channels=4):
    """SDXL's names with another number of transformer blocks at its two levels and in the middle."""
    tensors = {}
    for name, fact in facts_of("sdxl").items():
        block, _, rest = name.removeprefix(UNET).partition(".transformer_blocks.")
        if rest:
            wanted = middle if block == "middle_block.1" else depths[block in ("input_blocks.7.1", "input_blocks.8.1")]
            if block.startswith("output") or int(rest.split(".")[0]) < wanted:
                tensors[name] = fact
        elif not (middle == 0 and block.startswith("middle_block.1.")):
            tensors[name] = fact
    tensors[f"{UNET}input_blocks.0.0.weight"] = TensorFact("F16", (8, channels, 3, 3))
    return tensors


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (sdxl_with((2, 4), 0), "SSD-1B"),
        (sdxl_with((1, 2), 0), "Segmind Vega"),
        (sdxl_with((2, 5), 0), "KOALA 700M"),
        (sdxl_with((2, 6), 6), "KOALA 1B"),
        (sdxl_with((1, 3), 3), "another U-Net"),
        (sdxl_with((2, 10), 10, 8), "CosXL Edit"),
        (sdxl_with((2, 10), 10, 13), "13 channels"),
    ],
    ids=["ssd", "vega", "koala-s", "koala-l", "other", "edit", "13"],
)
def test_sdxls_shortened_and_changed_kin_is_named(tensors, words):
    kind = detect(tensors)
    assert (kind.what, kind.family) == ("foreign", None)
    assert words in kind.words


def test_a_shortened_sdxl_is_refused_and_nothing_is_written(place):
    tensors, words = sdxl_with((2, 4), 0), "SSD-1B"
    source = write(place / "in.safetensors", values({name: fact.shape for name, fact in tensors.items()}))
    with pytest.raises(CheckpointError, match=words):
        checkpoints.convert(source, place / "out")
    assert [path.name for path in place.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize(
    ("key", "channels", "words"),
    [
        ("sd21", 5, "depth-to-image"),
        ("sd21", 7, "x4 upscaler"),
        ("sd15", 8, "InstructPix2Pix"),
        ("sd15", 6, "super-res"),
    ],
)
def test_stable_diffusion_with_other_channels_is_named(key, channels, words):
    tensors = facts_of(key)
    tensors[f"{UNET}input_blocks.0.0.weight"] = TensorFact("F16", (8, channels, 3, 3))
    kind = detect(tensors)
    assert words in kind.words
    assert kind.what == "foreign"
    unclip = {**facts_of("sd21"), **facts(f"{UNET}label_emb.0.0.weight")}
    assert "unCLIP" in detect(unclip).words


@pytest.mark.parametrize(
    ("key", "words"), [("sd15", "Stable Diffusion 1.x"), ("sd21", "Stable Diffusion 2.x"), ("sdxl", "SDXL")]
)
def test_a_unet_alone_is_told_with_its_family(key, words):
    alone = {name: fact for name, fact in facts_of(key).items() if name.startswith(UNET)}
    assert detect(alone).words == f"a U-Net of {words} without its text encoder"
    bare = {name.removeprefix(UNET): fact for name, fact in alone.items()}
    assert detect(bare).words == f"a U-Net alone, in the original names, of {words}"


@pytest.mark.parametrize(
    ("start", "words"), [("first_stage_model.", "has no VAE"), ("model.diffusion_model.out", "lacks the tensor")]
)
def test_a_model_without_a_part_is_told_by_the_part(start, words, place):
    tensors = {name: value for name, value in original("sd15", "F16").items() if not name.startswith(start)}
    with pytest.raises(CheckpointError, match=words) as caught:
        checkpoints.convert(write(place / "in.safetensors", tensors), place / "out")
    assert caught.value.hint


def t5_of(layers, *, wide=True, every=False):
    names = ["shared.weight"]
    for place in range(layers):
        names.append(f"encoder.block.{place}.layer.0.SelfAttention.q.weight")
        names.append(f"encoder.block.{place}.layer.1.DenseReluDense.{'wi_0' if wide else 'wi'}.weight")
        if place == 0 or every:
            names.append(f"encoder.block.{place}.layer.0.SelfAttention.relative_attention_bias.weight")
    return facts(*names)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (t5_of(12), "T5 text encoder of 12 layers"),
        (t5_of(24, wide=False), "not the T5-XXL 1.1"),
        (t5_of(24, every=True), "UMT5"),
        ({**t5_of(24), **facts("decoder.block.0.layer.0.SelfAttention.q.weight")}, "encoder and decoder"),
        (facts("text_model.encoder.layers.23.self_attn.q_proj.weight"), "CLIP text encoder of 24 layers"),
        (facts("token_embedding.weight", "transformer.resblocks.0.ln_1.weight"), "OpenCLIP's names"),
    ],
)
def test_text_encoders_of_other_models_are_named(tensors, words):
    kind = detect(tensors)
    assert words in kind.words
    assert (kind.what, kind.family) == ("foreign", None)


@pytest.mark.parametrize(
    ("architecture", "latents", "words"),
    [
        ("stable-diffusion-xl-v1-base/vae", 4, "a VAE of Stable Diffusion XL"),
        ("stable-diffusion-v3-medium/vae", 16, "a VAE of Stable Diffusion 3"),
        ("", 16, "a VAE of Flux.1 (or of SD3)"),
        ("", 32, "a VAE of 32 latent channels, of an unknown model"),
    ],
)
def test_a_vae_says_whose_it_is_where_that_can_be_known(architecture, latents, words):
    tensors = facts(
        "decoder.mid.attn_1.q.weight", "decoder.conv_in.weight", decoder__conv_in__weight=(4, latents, 3, 3)
    )
    assert detect(tensors, {"modelspec.architecture": architecture}).words == words


@pytest.mark.parametrize(
    ("names", "what", "words"),
    [
        (["lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"], "lora", "a LoRA for"),
        (["lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a"], "lycoris", "LoHa"),
        (["diffusion_model.blocks.0.self_attn.q.lora_A.weight"], "lora peft", "a LoRA for Wan"),
        (["lora_unet_nothing_like_it.lora_down.weight"], "lora", "a LoRA"),
    ],
)
def test_lora_is_told_with_its_model_also_where_it_is_not_converted(names, what, words):
    ups = [name.replace("lora_down", "lora_up").replace("lora_A", "lora_B").replace("w1_a", "w1_b") for name in names]
    kind = detect(facts(*names, *ups))
    assert kind.what == what
    assert words in kind.words


def test_inspect_tells_every_example_and_never_fails(place):
    path = place / "in.safetensors"
    for words, names in EXAMPLES[::6]:
        write(path, values(dict.fromkeys(names, (2, 2))))
        found = checkpoints.inspect(path, hashes=False)
        assert words in found.what
        assert found.advice, "what to do with it"
        with pytest.raises(FastSDError) as caught:
            checkpoints.convert(path, place / "out")
        assert words in caught.value.problem
    assert [file.name for file in place.iterdir()] == ["in.safetensors"]
