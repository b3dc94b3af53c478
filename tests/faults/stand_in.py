"""A few lines in place of the networks: what is learned is eight numbers a stage; the rest is the real thing."""

import hashlib
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastsd_helpers.dreambooth.training.optimizers import lr_factor_in_legs
from fastsd_helpers.dreambooth.training.segments import Leg, legs_of, segments_in
from fastsd_helpers.dreambooth.training.stages import TrainingContext

__all__ = ["position_of", "put_in", "step", "steps_of", "uninterrupted"]

_STAGES = ("text_encoder", "unet")


def _push(*key: object) -> list[float]:
    """Eight numbers of a step, by its key alone; few bits each, so that their sums are exact in any order."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return [(byte - 128) / 256 for byte in digest[:8]]


def _learn(weights: list[float], moments: list[float], push: list[float], lr: float) -> tuple[list[float], list[float]]:
    moments = [moment / 2 + value for moment, value in zip(moments, push, strict=True)]
    # The rate in 1/2^20, so that float32 and Python agree.
    rate = round(lr * 2**20) / 2**20
    return [weight - rate * moment for weight, moment in zip(weights, moments, strict=True)], moments


def _double(values: list[float]) -> Any:
    import torch

    return torch.tensor(values, dtype=torch.float64)


class StandInStudio:
    """In place of the models, their caches and what was trained."""

    held_out_label = "pictures"

    def __init__(self, base: Any, config: Any, _device: Any, *, ranks: Any = None, parts: int = 0) -> None:
        self.base, self.config, self.device = base, config, SimpleNamespace(type="cpu")
        self.ranks, self.parts = ranks, parts
        self.trained: dict[str, Any] = dict.fromkeys(_STAGES)
        self.prompts: list[str] = []
        self.pictures = ""
        self.family, self.tokenizers = base.family, base.load_tokenizers()

    def trained_count_of(self, _part: str) -> int:
        return 8

    resolutions, sort = TrainingContext.resolutions, TrainingContext.sort

    def fill_caches(self, dataset: Any, _class_images: Any = (), *, stopped: Any = None) -> None:
        images = (*dataset.train, *dataset.held_out)
        self.pictures = str([[image.sha256, image.prompt] for image in images])
        self.prompts = sorted({image.prompt for image in images})

    def keep(self, job: Any) -> None:
        self.trained[job.stage] = job.weights()


class StandInJob:
    """In place of a network and its optimizer."""

    def __init__(self, stage: str, context: Any, resumed: Any, *, key: str = "", before: int = 0) -> None:
        self.stage, self._studio, self._key, self._before = stage, context, key or stage, before
        begun = context.trained[stage]
        self._weights = begun["w"].tolist() if begun else [0.0] * 8
        self._moments = [0.0] * 8
        if resumed is not None:
            self._weights = resumed.load(self.stage)["w"].tolist()
            self._moments = resumed.load("optimizer")["m"].tolist()

    def take_step(self, step: int, lr: float) -> float:
        push = _push(self._studio.config.seed, self._key, step - self._before, self._studio.pictures)
        self._weights, self._moments = _learn(self._weights, self._moments, push, lr)
        return abs(self._weights[0])

    def held_out_loss(self) -> float:
        return 1.0 + abs(self._weights[0])

    def weights(self) -> dict[str, Any]:
        return {"w": _double(self._weights)}

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return {self.stage: self.weights(), "optimizer": {"m": _double(self._moments)}}, {}


def put_in() -> None:
    """Put it in place of the networks in this process, and import everything that its forks need."""
    import torch

    torch.set_num_threads(1)
    from fastsd_helpers.dreambooth.families import family_named
    from fastsd_helpers.dreambooth.results import finishing, learned
    from fastsd_helpers.dreambooth.running import engine
    from fastsd_helpers.dreambooth.training.base_model import class_of

    # What counts the networks' values and logs the losses: else every fork would spend seconds on importing it.
    importlib.import_module("torch.utils.tensorboard")
    for part in family_named("sd15").parts:
        class_of(family_named("sd15"), part)

    def write(session: Any, context: Any, dst: Path, **_words: Any) -> Any:
        from fastsd_helpers.checkpoints import CheckpointFile
        from fastsd_helpers.files import sha256_of, write_atomic

        dst.parent.mkdir(exist_ok=True)
        write_atomic(
            dst,
            repr(sorted((stage, value["w"].tolist()) for stage, value in context.trained.items() if value)).encode(),
        )
        return CheckpointFile(dst, sha256_of(dst), dst.stat().st_size, 1)

    def draw(session: Any, *_rest: Any, **_options: Any) -> Path:
        session.samples.mkdir(exist_ok=True)
        path = session.samples / "before-after.png"
        path.write_bytes(b"picture")
        return path

    def plot(_history: Any, _held_out: Any, path: Path, *, label: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"plot")
        return path

    for module in (engine, learned):
        module.TrainingContext = StandInStudio
    engine.open_stage = StandInJob
    engine.plot_losses = finishing.plot_losses = plot
    learned.export_bytes = lambda *_: 2**20
    learned.require_exportable = lambda _base: None
    learned.export_run = learned.export_lora = write
    finishing.draw_before_and_after = draw


def step(root: Path, kind: str, name: str, *rest: Any) -> dict[str, Any]:
    """Do one step of a session's life in this process; a mistake of the user's is an answer."""
    from fastsd_helpers.errors import FastSDError

    try:
        return _steps()[kind](root, name, *rest) or {}
    except FastSDError as err:
        return {"refused" if err.exit_code == 2 else "failed": err.problem}
    except BaseException as err:
        import traceback

        return {"failed": f"{err!r} {traceback.format_exc(limit=-4)}"}


def _steps() -> dict[str, Any]:
    from fastsd_helpers.dreambooth import DreamBoothConfig, PrepareConfig, prepare, train
    from fastsd_helpers.dreambooth.dataset.captioning import set_caption
    from fastsd_helpers.dreambooth.results.learned import ExportConfig, export
    from fastsd_helpers.sessions import Session, delete_session

    more = ("more_steps", "more_text_encoder_steps")

    def train_it(root: Path, name: str, values: dict[str, Any]) -> None:
        settings = {"base_model": "demo"} | {key: value for key, value in values.items() if key not in more}
        extra = {key: values[key] for key in more if key in values}
        train(DreamBoothConfig(**settings), Session.open(name, root=root), report=lambda _progress: None, **extra)

    def export_it(root: Path, name: str) -> None:
        export(ExportConfig(overwrite=True), Session.open(name, root=root))

    return {
        "new": lambda root, name: Session.create(name, root=root) and None,
        "show": lambda root, name: {"id": Session.open(name, root=root).record["id"]},
        "prepare": lambda root, name, images: (
            prepare(PrepareConfig(images=images, size=64, crop="center"), Session.open(name, root=root)) and None
        ),
        "caption": lambda root, name, file, words: set_caption(Session.open(name, root=root), file, words) and None,
        "train": train_it,
        "export": export_it,
        "delete": lambda root, name: delete_session(name, root=root) and None,
    }


# ------------------------------------------------------------------------------------------------ what must come out


def _legs(segments: list[dict[str, Any]]) -> list[Leg]:
    return legs_of(segments_in({"segments": segments}))


def steps_of(segments: list[dict[str, Any]]) -> int:
    """All steps of a run."""
    return sum(leg.steps for leg in _legs(segments))


def position_of(segments: list[dict[str, Any]], segment: int, stage: str, step: int) -> int:
    """How many steps of a run are made at a step of a stage."""
    leg = next(leg for leg in _legs(segments) if (leg.segment, leg.stage) == (segment, stage))
    return leg.offset + step - leg.before


def uninterrupted(segments: list[dict[str, Any]], steps: int) -> dict[str, list[float]]:
    """What a run has learned after a number of steps that were made without a stop: stage -> eight numbers."""
    weights: dict[str, list[float]] = {}
    for leg in _legs(segments):
        settings = segments[leg.segment]["settings"]
        moments = [0.0] * 8
        for own in range(min(leg.steps, max(0, steps - leg.offset))):
            push = _push(settings["seed"], leg.key, own, str(segments[leg.segment]["pictures"]))
            lr = settings[f"{leg.stage}_lr"] * lr_factor_in_legs(settings["lr_scheduler"], own, list(leg.parts))
            begun = weights.get(leg.stage, [0.0] * 8)
            weights[leg.stage], moments = _learn(begun, moments, push, lr)
    return weights
