"""The doors by which a model comes in, each as one call; which of them a kind of model can be given to."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastsd_helpers.playground.artist as artist
import fastsd_helpers.playground.loading as loading
import fastsd_helpers.playground.loras as loras
from fastsd_helpers.checkpoints import convert, inspect
from fastsd_helpers.demo import MODEL_FOLDER
from fastsd_helpers.webui.catalog import find_ui
from fastsd_helpers.webui.places import find_places
from fastsd_helpers.webui.placing.models import place_model

__all__ = ["DOORS", "Door"]

Door = Callable[[str, Path], object]


@functools.cache
def _demo_pipeline() -> Any:
    return loading.load_pipeline(MODEL_FOLDER)


def playground(ref: str, _place: Path) -> object:
    return artist.open_artist(ref)


def playground_lora(ref: str, _place: Path) -> object:
    return loras.put_beside(_demo_pipeline(), loras.find_lora(ref), ref)


def playground_controlnet(ref: str, _place: Path) -> object:
    return artist._steering(_demo_pipeline(), ref, "sd15")


def train(ref: str, _place: Path) -> object:
    from fastsd_helpers.dreambooth.training.base_model import BaseModel

    base = BaseModel.fetch(ref)
    return base.load_tokenizers(), base.load_encoders(), base.load("unet"), base.load_sampler()


def read(ref: str, _place: Path) -> object:
    from fastsd_helpers.trocr import Reader

    return Reader(ref)


def finetune(ref: str, place: Path) -> object:
    from fastsd_helpers.trocr.teaching.finetuning import FineTuneConfig, finetune

    lines = MODEL_FOLDER.parent / "reader_samples" / "labels.csv"
    return finetune(FineTuneConfig(), lines, place / "run", model=ref)


def serve(ref: str, _place: Path) -> object:
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading.serve import build_page

    return build_page(Reader(ref))


def captions(ref: str, _place: Path) -> object:
    from fastsd_helpers.captions.prompts import describe_pictures

    return list(describe_pictures([next((MODEL_FOLDER.parent / "reader_samples").glob("*.png"))], model=ref))


def _placed(kind: str) -> Door:
    def place(ref: str, place: Path) -> object:
        ui = find_ui("a1111")
        places = find_places(ui, folder=str(place / "ui"), store=str(place / "store"))
        return place_model(ref, ui, places, kind=kind)

    return place


def converted(ref: str, place: Path) -> object:
    return convert(ref, place / "converted.safetensors")


def inspected(ref: str, _place: Path) -> object:
    return inspect(ref)


place, place_lora, place_vae = _placed("checkpoint"), _placed("lora"), _placed("vae")
place_embedding = _placed("embedding")

# kind of model -> name of the door -> the door; those of LOCAL take what is on this machine alone.
DOORS: dict[str, dict[str, Door]] = {
    "pipeline": {"playground": playground, "train": train, "place": place, "convert": converted},
    "checkpoint": {"playground": playground, "train": train, "place": place, "place as vae": place_vae,
                   "convert": converted, "inspect": inspected},
    "described checkpoint": {"place": place_vae},
    "embedding": {"place": place_embedding, "place as vae": place_vae, "convert": converted, "inspect": inspected},
    "lora": {"playground": playground_lora, "place": place_lora, "convert": converted, "inspect": inspected},
    "controlnet": {"playground": playground_controlnet},
    "reader": {"read": read, "fine-tune": finetune, "serve": serve},
    "captioner": {"captions": captions},
}  # fmt: skip
LOCAL = ("convert", "inspect")
