"""Hostile models with a harmless payload, which makes a file: each kind is written as a folder or a file.

Every one is an honest model (the embedded ones, a tiny captioner) in which one thing was changed. `write(kind, place,
mark)` makes it; were anything of it run, the file `mark` would be there.
"""

import io
import json
import pickle
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsd_helpers.demo import MODEL_FOLDER

__all__ = ["FOREIGN", "KINDS", "Kind", "contents", "write", "write_captioner"]

READER_FOLDER = MODEL_FOLDER.parent / "reader_model"
FOREIGN = "hostile_foreign_library"  # a module that the machine has, and that no pipeline may name


@dataclass(frozen=True)
class Kind:
    """One kind of hostile model: what it looks like, and who makes it."""

    name: str
    model: str  # pipeline, reader, captioner, controlnet, lora, checkpoint, embedding
    make: Callable[[Path, str], Path]


KINDS: dict[str, Kind] = {}


def kind(model: str) -> Callable[[Callable[[Path, str], Path]], Callable[[Path, str], Path]]:
    """Enter a maker into the table."""

    def enter(make: Callable[[Path, str], Path]) -> Callable[[Path, str], Path]:
        name = make.__name__.replace("_", " ")
        KINDS[name] = Kind(name, model, make)
        return make

    return enter


def write(name: str, place: Path, mark: Path) -> Path:
    """Make one into a folder of its own; return the folder or file that a user would name."""
    place.mkdir(parents=True)
    return KINDS[name].make(place, f"open({str(mark)!r}, 'a').close()")


def contents(folder: Path) -> dict[str, int]:
    """Every file below a folder, with its size."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*")) if not path.is_dir()}


# ---------------------------------------------------------------------------------------------------- honest models


def copy_model(model: Path, to: Path) -> Path:
    """A copy whose weights are links, as in the Hub's cache."""
    for path in sorted(model.rglob("*")):
        target = to / path.relative_to(model)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        elif path.suffix == ".safetensors":
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path.resolve())
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return to


def write_captioner(folder: Path) -> Path:
    """The smallest BLIP that opens."""
    import torch
    import transformers

    torch.manual_seed(0)
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "dog"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BlipConfig(
        text_config={**text, "vocab_size": len(words), "bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3,
                     "pad_token_id": 0, "projection_dim": 16, "encoder_hidden_size": 16},
        vision_config={**text, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )  # fmt: skip
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 32, "width": 32}}')
    return folder


def change(path: Path, **entries: Any) -> None:
    """Set entries of a .json file."""
    known = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(known | entries))


class Payload:
    """Pickles as a call of what makes the file."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def archive(path: Path, program: bytes, **members: bytes) -> Path:
    """A file as torch writes it, with this program."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for name, content in {"version": b"3\n", **members}.items():
            file.writestr(f"archive/{name}", content)
    return path


def pipeline(place: Path) -> Path:
    return copy_model(MODEL_FOLDER, place / "model")


def reader(place: Path) -> Path:
    return copy_model(READER_FOLDER, place / "reader")


# --------------------------------------------------------------------------------------------------------- pickles


@kind("checkpoint")
def pickle_that_calls(place: Path, code: str) -> Path:
    return archive(place / "model.ckpt", pickle.dumps({"state_dict": Payload(code)}, 2))


@kind("checkpoint")
def pickle_that_asks_torch_for_the_system(place: Path, code: str) -> Path:
    # Every name begins with torch or builtins: getattr(torch.os, "system")(...)
    command = f'{sys.executable} -c "{code}"'.encode()
    program = (
        b"\x80\x02c__builtin__\ngetattr\nctorch\nos\nX\x06\x00\x00\x00system\x86RX"
        + struct.pack("<I", len(command)) + command + b"\x85R."
    )  # fmt: skip
    return archive(place / "model.ckpt", program)


@kind("checkpoint")
def pickle_whose_name_is_put_together(place: Path, code: str) -> Path:
    # The name is on the stack from the memory, and two harmless texts stand before the step that uses it.
    def text(word: str) -> bytes:
        return b"\x8c" + bytes([len(word)]) + word.encode()

    program = b"\x80\x04" + text("builtins") + b"\x940" + text("exec") + b"\x940"
    program += b"h\x00h\x01" + text("collections") + text("OrderedDict") + b"00\x93"
    return archive(place / "model.pt", program + b"X" + struct.pack("<I", len(code)) + code.encode() + b"\x85R.")


@kind("checkpoint")
def torchscript(place: Path, code: str) -> Path:
    return archive(
        place / "model.pt",
        b"\x80\x02c__torch__\nEvil\n)\x81.",
        **{
            "code/__torch__.py": b"class Evil(Module):\n  def forward(self): return 1\n",
            "constants.pkl": b"\x80\x02).",
        },
    )


@kind("checkpoint")
def pickle_with_two_tables(place: Path, code: str) -> Path:
    """Python's zipfile sees harmless members, torch's reader those of the first table."""
    honest, evil = io.BytesIO(), place / "model.ckpt"
    archive(evil, pickle.dumps(Payload(code), 2))
    with zipfile.ZipFile(honest, "w") as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/version", b"3\n")
    evil.write_bytes(evil.read_bytes() + honest.getvalue())
    return evil


@kind("embedding")
def bare_pickle(place: Path, code: str) -> Path:
    path = place / "style.pt"
    path.write_bytes(pickle.dumps({"string_to_param": Payload(code)}, 2))
    return path


@kind("embedding")
def pickle_of_the_oldest_kind(place: Path, code: str) -> Path:
    path = place / "style.bin"
    path.write_bytes(pickle.dumps(Payload(code), 0) + b"\xff and more")
    return path


@kind("embedding")
def pickle_before_a_zip_file(place: Path, code: str) -> Path:
    path = archive(place / "style.pt", b"\x80\x02}.")
    path.write_bytes(pickle.dumps(Payload(code), 2) + path.read_bytes())
    return path


@kind("lora")
def lora_that_is_a_pickle(place: Path, code: str) -> Path:
    return archive(place / "pytorch_lora_weights.bin", pickle.dumps(Payload(code), 2))


@kind("lora")
def pickle_called_safetensors(place: Path, code: str) -> Path:
    path = place / "lora.safetensors"
    path.write_bytes(pickle.dumps(Payload(code), 2) + bytes(100))
    return path


@kind("lora")
def lora_whose_settings_name_a_module(place: Path, code: str) -> Path:
    settings = json.dumps(
        {"unet.r": 4, "unet.megatron_config": {"a": 1}, "megatron_config": {}, "auto_mapping": {"x": FOREIGN}}
    )
    header = {"unet.a.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
              "__metadata__": {"lora_adapter_metadata": settings}}  # fmt: skip
    raw = json.dumps(header).encode()
    path = place / "lora.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    return path


@kind("described checkpoint")
def description_that_calls(place: Path, code: str) -> Path:
    path = place / "model.safetensors"
    raw = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    path.with_suffix(".yaml").write_text(f"model:\n  target: builtins.exec\n  params:\n    source: {code}\n")
    return path


# ------------------------------------------------------------------------------------------------------- pipelines


@kind("pipeline")
def scheduler_of_its_own(place: Path, code: str) -> Path:
    folder = pipeline(place)
    change(folder / "model_index.json", scheduler=["evil", "EvilScheduler"])
    (folder / "scheduler" / "evil.py").write_text(f"{code}\nfrom diffusers import DDIMScheduler as EvilScheduler\n")
    return folder


@kind("pipeline")
def part_of_a_foreign_library(place: Path, code: str) -> Path:
    folder = pipeline(place)
    (place / f"{FOREIGN}.py").write_text(f"{code}\nfrom diffusers import DDIMScheduler\n")
    change(folder / "model_index.json", scheduler=[FOREIGN, "DDIMScheduler"])
    return folder


@kind("pipeline")
def pipeline_of_its_own(place: Path, code: str) -> Path:
    folder = pipeline(place)
    change(folder / "model_index.json", _class_name=["evil", "EvilPipeline"])
    (folder / "evil.py").write_text(f"{code}\nfrom diffusers import StableDiffusionPipeline as EvilPipeline\n")
    return folder


@kind("pipeline")
def pipeline_within_a_pipeline(place: Path, code: str) -> Path:
    folder = pipeline(place)
    change(folder / "model_index.json", unet=["diffusers", "DiffusionPipeline"])
    change(folder / "unet" / "model_index.json", _class_name=["evil", "EvilPipeline"])
    return folder


@kind("pipeline")
def two_entries_of_one_name(place: Path, code: str) -> Path:
    folder = pipeline(place)
    index = folder / "model_index.json"
    index.write_text(index.read_text().rstrip().removesuffix("}") + ', "scheduler": ["evil", "EvilScheduler"]}')
    (folder / "scheduler" / "evil.py").write_text(f"{code}\nfrom diffusers import DDIMScheduler as EvilScheduler\n")
    return folder


@kind("pipeline")
def weights_that_are_a_pickle(place: Path, code: str) -> Path:
    folder = pipeline(place)
    next((folder / "unet").glob("*.safetensors")).unlink()
    archive(folder / "unet" / "diffusion_pytorch_model.bin", pickle.dumps(Payload(code), 2))
    return folder


@kind("pipeline")
def weights_elsewhere(place: Path, code: str) -> Path:
    folder = pipeline(place)
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(folder / "unet" / "diffusion_pytorch_model-00001-of-00001.safetensors")
    evil = archive(place / "evil.bin", pickle.dumps(Payload(code), 2))
    change(
        folder / "unet" / "diffusion_pytorch_model.safetensors.index.json",
        metadata={},
        weight_map={"conv_in.weight": f"../../{evil.name}"},
    )
    return folder


@kind("pipeline")
def adapter_in_place_of_a_part(place: Path, code: str) -> Path:
    folder = pipeline(place)
    change(
        folder / "text_encoder" / "adapter_config.json",
        base_model_name_or_path=str(place / "elsewhere"),
        peft_type="LORA",
    )
    return folder


# --------------------------------------------------------------------------------- readers, captioners, ControlNets


def own_code(folder: Path, code: str) -> Path:
    (folder / "evil.py").write_text(
        f"{code}\nfrom transformers import PretrainedConfig as C, PreTrainedTokenizerFast as T, ViTModel as M\n"
        "C.model_type = 'vision-encoder-decoder'\n"
    )
    return folder


@kind("reader")
def reader_with_code_of_its_own(place: Path, code: str) -> Path:
    folder = own_code(reader(place), code)
    change(folder / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    return folder


@kind("reader")
def reader_that_trusts_a_further_network(place: Path, code: str) -> Path:
    further = place / "further"
    further.mkdir()
    own_code(further, code)
    change(further / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    folder = reader(place)
    detector = {"model_type": "evil", "_name_or_path": str(further)}
    change(
        folder / "config.json",
        encoder={"model_type": "lightglue", "trust_remote_code": True, "keypoint_detector_config": detector},
    )
    return folder


@kind("reader")
def tokenizer_of_its_own(place: Path, code: str) -> Path:
    folder = own_code(reader(place), code)
    change(folder / "tokenizer_config.json", tokenizer_class=None, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    return folder


@kind("reader")
def tokenizer_that_is_a_network(place: Path, code: str) -> Path:
    folder = reader(place)
    change(folder / "tokenizer_config.json", tokenizer_class="LightGlueForKeypointMatching")
    return folder


@kind("reader")
def attention_from_the_hub(place: Path, code: str) -> Path:
    folder = reader(place)
    config = json.loads((folder / "config.json").read_text())
    config["decoder"]["_attn_implementation_internal"] = "evil/kernel"
    change(folder / "config.json", **config)
    return folder


@kind("reader")
def description_in_another_file(place: Path, code: str) -> Path:
    folder = own_code(reader(place), code)
    change(folder / "config.json", configuration_files=["config.4.0.0.json"])
    return folder


@kind("reader")
def reader_whose_weights_are_a_pickle(place: Path, code: str) -> Path:
    folder = reader(place)
    (folder / "model.safetensors").unlink()
    archive(folder / "pytorch_model.bin", pickle.dumps(Payload(code), 2))
    return folder


@kind("reader")
def graph_with_entities(place: Path, code: str) -> Path:
    folder = reader(place)
    (folder / "model.safetensors").unlink()
    (folder / "openvino").mkdir()
    (folder / "openvino" / "about.json").write_text('{"version": 1}')
    for name in ("encoder", "decoder"):
        (folder / "openvino" / f"{name}.bin").write_bytes(bytes(8))
        (folder / "openvino" / f"{name}.xml").write_text(
            '<?xml version="1.0"?><!DOCTYPE net [<!ENTITY e SYSTEM "file:///etc/passwd">]><net name="&e;"/>'
        )
    return folder


@kind("captioner")
def captioner_with_a_tokenizer_of_its_own(place: Path, code: str) -> Path:
    folder = own_code(write_captioner(place / "blip"), code)
    change(folder / "tokenizer_config.json", tokenizer_class=None, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]})
    return folder


@kind("captioner")
def captioner_that_trusts_its_code(place: Path, code: str) -> Path:
    folder = own_code(write_captioner(place / "blip"), code)
    change(folder / "config.json", trust_remote_code=True, auto_map={"AutoConfig": "evil.C"})
    return folder


@kind("controlnet")
def controlnet_with_code_of_its_own(place: Path, code: str) -> Path:
    folder = place / "controlnet"
    folder.mkdir()
    (folder / "evil.py").write_text(code)
    change(folder / "config.json", _class_name="ControlNetModel", auto_map={"AutoModel": "evil.M"})
    shutil.copyfile(next((MODEL_FOLDER / "vae").glob("*.safetensors")), folder / "diffusion_pytorch_model.safetensors")
    return folder


@kind("controlnet")
def controlnet_that_is_a_pickle(place: Path, code: str) -> Path:
    folder = place / "controlnet"
    folder.mkdir()
    change(folder / "config.json", _class_name="ControlNetModel")
    archive(folder / "diffusion_pytorch_model.bin", pickle.dumps(Payload(code), 2))
    return folder
