"""A workflow for ComfyUI with the chosen files in it: for its page, and as the same graph for its API."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import WebUI
from fastsd_helpers.webui.places import Places, model_folder
from fastsd_helpers.webui.placing.model_files import BASE_KINDS, PlacedModel, base_family

__all__ = ["make_workflow", "write_workflow"]

_PROMPT = "a photo of a lighthouse at dusk, warm light in its windows"
_SIDE = {"sd15": 512, "sd21": 768}  # px; every other family draws at 1024
# px on the page: a node's title stands above its place.
_IN_A_COLUMN, _TOP, _BETWEEN = 3, 60, 60


def _node(kind: str) -> dict[str, Any]:
    return read_table("webui/placing/nodes.toml")[kind]


def _height(kind: str) -> int:
    """What a node takes on the page: a row for each connection and setting, and room for text and for the image."""
    node = _node(kind)
    settings = node["settings"]
    rows = 20 * max(len(node["inputs"]), len(node["outputs"])) + 26 * (len(settings) + ("seed" in settings))
    return {"CLIPTextEncode": 160, "SaveImage": 340}.get(kind, max(80, 20 + rows))


@dataclass
class _Graph:
    """Nodes in the order they are added: type, what is set, and where each input comes from (node, output)."""

    nodes: list[tuple[str, dict[str, Any], dict[str, tuple[int, int]]]] = field(default_factory=list)

    def add(self, kind: str, links: dict[str, tuple[int, int]] | None = None, **values: Any) -> int:
        """Add a node; its number."""
        self.nodes.append((kind, values, links or {}))
        return len(self.nodes)

    def for_api(self) -> dict[str, Any]:
        """As `POST /prompt` takes it under `prompt`."""
        return {
            str(number): {
                "class_type": kind,
                "inputs": {**values, **{name: [str(node), slot] for name, (node, slot) in links.items()}},
            }
            for number, (kind, values, links) in enumerate(self.nodes, 1)
        }

    def for_page(self) -> dict[str, Any]:
        """As the page opens it."""
        wires: list[list[Any]] = []
        nodes: list[dict[str, Any]] = []
        below = 0
        for number, (kind, values, links) in enumerate(self.nodes, 1):
            below = below if (number - 1) % _IN_A_COLUMN else _TOP
            top, height = below, _height(kind)
            below += height + _BETWEEN
            node_type = _node(kind)
            settings, slots = node_type["settings"], []
            for place, (name, what) in enumerate(node_type["inputs"]):
                node, slot = links[name]
                wires.append([len(wires) + 1, node, slot, number, place, what])
                slots.append({"name": name, "type": what, "link": len(wires)})
            set_here = [values[name] for name in settings]
            if "seed" in settings:
                set_here.insert(1, "randomize")  # what the page does with the seed after each image
            nodes.append(
                {
                    "id": number,
                    "type": kind,
                    "pos": [40 + 340 * ((number - 1) // _IN_A_COLUMN), top],
                    "size": [300, height],
                    "flags": {},
                    "order": number - 1,
                    "mode": 0,
                    "inputs": slots,
                    "outputs": [
                        {"name": what, "type": what, "links": [], "slot_index": n}
                        for n, what in enumerate(node_type["outputs"])
                    ],
                    "properties": {"Node name for S&R": kind},
                    "widgets_values": set_here,
                }
            )
        for wire, node, slot, *_rest in wires:
            nodes[node - 1]["outputs"][slot]["links"].append(wire)
        last = {"last_node_id": len(nodes), "last_link_id": len(wires)}
        return {**last, "nodes": nodes, "links": wires, "groups": [], "config": {}, "extra": {}, "version": 0.4}


def make_workflow(placed: Sequence[PlacedModel], ui: WebUI, places: Places) -> _Graph | None:
    """The graph that draws an image with a base model, the files beside it and the LoRAs; None without a base model.

    A model that lacks text encoders and VAE wants them among `placed`.
    """
    base = next((model for model in placed if model.kind in BASE_KINDS), None)
    if base is None:
        return None
    names = {
        kind: [_name(model, ui, places) for model in placed if model.kind == kind]
        for kind in ("text-encoder", "vae", "lora")
    }
    family = base_family(base.family) or "sd15"
    graph = _Graph()
    file = _name(base, ui, places)
    if base.kind == "checkpoint":
        loader = graph.add("CheckpointLoaderSimple", ckpt_name=file)
        model, clip, vae = (loader, 0), (loader, 1), (loader, 2)
    elif family == "flux" and len(names["text-encoder"]) >= 2 and names["vae"]:
        loads = "UnetLoaderGGUF" if file.lower().endswith(".gguf") else "UNETLoader"
        more: dict[str, Any] = {} if loads == "UnetLoaderGGUF" else {"weight_dtype": "default"}
        model = (graph.add(loads, unet_name=file, **more), 0)
        first, second = names["text-encoder"][:2]
        packed = f"{first} {second}".lower().find(".gguf") >= 0
        kind, more = ("DualCLIPLoaderGGUF", {}) if packed else ("DualCLIPLoader", {"device": "default"})
        clip = (graph.add(kind, clip_name1=first, clip_name2=second, type="flux", **more), 0)
        vae = (graph.add("VAELoader", vae_name=names["vae"][0]), 0)
    else:
        return None
    if base.kind == "checkpoint" and names["vae"]:
        vae = (graph.add("VAELoader", vae_name=names["vae"][0]), 0)
    for lora in names["lora"]:
        node = graph.add(
            "LoraLoader", {"model": model, "clip": clip}, lora_name=lora, strength_model=1.0, strength_clip=1.0
        )
        model, clip = (node, 0), (node, 1)
    _add_sampling(graph, family, file, model, clip, vae)
    return graph


def _add_sampling(
    graph: _Graph, family: str, file: str, model: tuple[int, int], clip: tuple[int, int], vae: tuple[int, int]
) -> None:
    flux, few = family == "flux", "schnell" in file.lower()
    positive = (graph.add("CLIPTextEncode", {"clip": clip}, text=_PROMPT), 0)
    negative = (graph.add("CLIPTextEncode", {"clip": clip}, text=""), 0)
    if flux and not few:
        positive = (graph.add("FluxGuidance", {"conditioning": positive}, guidance=3.5), 0)
    side = _SIDE.get(family, 1024)
    latents = graph.add("EmptySD3LatentImage" if flux else "EmptyLatentImage", width=side, height=side, batch_size=1)
    sampler = graph.add(
        "KSampler",
        {"model": model, "positive": positive, "negative": negative, "latent_image": (latents, 0)},
        seed=1,
        steps=4 if few else 20,
        cfg=1.0 if flux else 7.0,
        sampler_name="euler",
        scheduler="simple" if flux else "normal",
        denoise=1.0,
    )
    picture = graph.add("VAEDecode", {"samples": (sampler, 0), "vae": vae})
    graph.add("SaveImage", {"images": (picture, 0)}, filename_prefix="fastsd")


def _name(model: PlacedModel, ui: WebUI, places: Places) -> str:
    return model.path.relative_to(model_folder(places, ui, model.kind)).as_posix()


def write_workflow(placed: Sequence[PlacedModel], ui: WebUI, places: Places, *, keep: bool = False) -> Path | None:
    """Write the workflow of a base model where ComfyUI's page lists it, and the one for its API beside its settings.

    One that was changed on the page stays as it is: the new one gets a number. One of ours that has this base model,
    and LoRAs where now there are none, stays too.

    Args:
        keep: leave one of ours that has this base model, with whatever else was chosen for it.

    Returns:
        The page's file; None where the base model's files do not make a workflow.

    Raises:
        DriveError: it cannot be written.
    """
    graph = make_workflow(placed, ui, places)
    if graph is None:
        return None
    packed = any(model.path.suffix.lower() == ".gguf" for model in placed)
    if packed and places.installed.exists() and not any((places.data / "custom_nodes").glob("*[gG][gG][uU][fF]*")):
        logger.warning(
            "GGUF files are read by the node pack ComfyUI-GGUF, which this installation lacks. Run again: fastsd webui "
            "install --ui comfyui"
        )
    base = next(model for model in placed if model.kind in BASE_KINDS)
    name = f"fastsd-{base_family(base.family) or 'model'}"
    folder, api = (places.store / "comfyui" / part for part in ("user/default/workflows", "api-workflows"))
    page = graph.for_page()
    page["extra"] = {"fastsd": _digest(page)}
    with file_errors(folder, "write to"):
        folder.mkdir(parents=True, exist_ok=True)
        api.mkdir(parents=True, exist_ok=True)
        target = next(
            path
            for number in range(1, 1000)
            if _is_ours(path := folder / (f"{name}.json" if number == 1 else f"{name}-{number}.json"))
        )
        lora = any(model.kind == "lora" for model in placed)
        text = target.read_text(encoding="utf-8") if target.exists() else ""
        same = json.dumps(_name(base, ui, places)) in text
        if not lora and same and (keep or '"LoraLoader"' in text):
            return target
        write_atomic(target, json.dumps(page, indent=1).encode())
        write_atomic(api / f"{name}.json", json.dumps(graph.for_api(), indent=1).encode())
    return target


def _digest(page: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps({**page, "extra": {}}, sort_keys=True).encode()).hexdigest()[:16]


def _is_ours(path: Path) -> bool:
    """Whether nothing of a user's is lost when the file is replaced."""
    if not path.exists():
        return True
    try:
        page = json.loads(path.read_bytes())
        return page["extra"]["fastsd"] == _digest(page)
    except (ValueError, KeyError, TypeError):
        return False
