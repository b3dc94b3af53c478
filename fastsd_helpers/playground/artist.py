"""Draws with a model or a session: from noise, from an image, steered by a ControlNet, with a LoRA added."""

import inspect
import secrets
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers import checkpoints
from fastsd_helpers.dreambooth.training.single_files import make_base
from fastsd_helpers.errors import SessionError, SettingsError, needs_package
from fastsd_helpers.model_lookup import fetch_model
from fastsd_helpers.playground.habits import habits_of
from fastsd_helpers.playground.loading import load_pipeline
from fastsd_helpers.playground.loras import find_lora, is_lora, put_beside, set_strength
from fastsd_helpers.playground.steering import Steering, load_controlnet
from fastsd_helpers.registry import spec_of
from fastsd_helpers.sessions import find_session

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Artist", "open_artist"]


class Artist:
    """Draws with a model; for a session also with what it was before.

    Attributes:
        title: what it draws with, in words.
        size: side of its images in pixels, the model's own.
        multiple: which other sides it takes.
        smallest: which other sides it takes.
        largest: which other sides it takes.
        habits: the steps, guidance and scheduler its family was made for, and whether it takes a negative prompt.
        has_before: whether `draw` gives two images.
        lora_strength: how strongly its LoRA works when `draw` is not told; None when it has none.
        steering: its ControlNet, and what that is steered by; None when it has none.
    """

    def __init__(
        self,
        title: str,
        spec: Any,
        after: Any,
        before: Any = None,
        *,
        steering: Steering | None = None,
        lora_strength: float | None = None,
    ) -> None:
        self.title, self._after, self._before = title, after, before
        self.steering = steering
        self.size, self.multiple, self.smallest, self.largest = spec.native_px, spec.multiple, spec.min_px, spec.max_px
        self.has_before, self.lora_strength = before is not None, lora_strength
        self.habits = habits_of(after)
        if before is not None:
            habits_of(before)  # its scheduler is fixed too
        self._turn = threading.Lock()

    def draw(
        self,
        prompt: str,
        *,
        seed: int | None = 11,
        steps: int | None = None,
        size: int | None = None,
        guidance: float | None = None,
        negative: str = "",
        start: "Image.Image | None" = None,
        strength: float = 0.6,
        control: "Image.Image | None" = None,
        control_strength: float = 1.0,
        control_task: str = "",
        edges: bool = False,
        lora_strength: float | None = None,
    ) -> "list[tuple[str, Image.Image]]":
        """The title and image of what is drawn: one, or two of the same noise, before and after the training.

        Args:
            prompt: what to show.
            seed: of the noise, 0 to 2**63 - 1; None or -1: another one every time, which the titles name.
            steps: 1 to 200; what the model was made for when None, and so is `guidance` (0 to 20).
            size: side in pixels; the model's own when None.
            guidance: guidance scale, 0 to 20; what the model was made for when None.
            negative: what must not be in it; only for models that are drawn with guidance.
            start: an image to begin with instead of noise.
            strength: how much of `start` is given up, 0 to 1.
            control: an image for the ControlNet, such as edges or a pose.
            control_strength: weight of `control`, 0 to 2.
            control_task: what `control` shows, for a union ControlNet: one of `steering.tasks`, the first when empty.
            edges: `control` is a photo, whose edges are to be found first.
            lora_strength: of the LoRA, 0 to 2; as it was opened with when None.

        Raises:
            SettingsError: a size the model does not take, an empty prompt, or numbers out of range.
        """
        size, steps = size or self.size, self.habits.steps if steps is None else steps
        guidance = self.habits.guidance if guidance is None else guidance
        seed, weight = None if seed == -1 else seed, self.lora_strength if lora_strength is None else lora_strength
        _require(
            (seed is None or 0 <= seed < 2**63, f"seed is {seed}; it must be 0 to 2**63 - 1, or -1"),
            (prompt.strip(), "there is no prompt"),
            (1 <= steps <= 200, f"steps is {steps}; it must be 1 to 200"),
            (0 < strength <= 1, f"strength is {strength}; it must be above 0 and at most 1"),
            (0 <= control_strength <= 2, f"control_strength is {control_strength}; it must be 0 to 2"),
            (weight is None or 0 <= weight <= 2, f"lora_strength is {weight}; it must be 0 to 2"),
            *self._rules(control, control_task, guidance, negative, size),
        )
        options: dict[str, Any] = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        options |= {"negative_prompt": negative.strip()} if negative.strip() else {}
        if control is not None and self.steering is not None:
            control = _steering_picture(control, size, edges)
            options |= {"controlnet_conditioning_scale": float(control_strength), **self.steering.mode(control_task)}
        begun = {"image": start.convert("RGB").resize((size, size)), "strength": strength} if start is not None else {}
        options |= begun or {"height": size, "width": size}
        number = int(seed) if seed is not None else secrets.randbelow(2**32)
        drawn = self._draw_both(prompt, number, options, weight, control)
        return [(title if seed is not None else f"{title}, seed {number}", picture) for title, picture in drawn]

    def _rules(self, control: Any, task: str, guidance: float, negative: str, size: int) -> list[tuple[object, str]]:
        """What this model and its ControlNet take."""
        tasks, step = self.steering.tasks if self.steering is not None else (), self.habits.multiple
        bounds = f"{self.smallest} to {self.largest} and a multiple of {step}"
        return [
            (control is None or self.steering is not None, "an image was given, but no ControlNet was chosen"),
            (not task or task in tasks, f"control_task is {task!r}; it must be one of {', '.join(tasks)}"),
            (0 <= guidance <= 20, f"guidance is {guidance}; it must be 0 to 20"),
            (self.habits.takes_negative or not negative.strip(), "this model does not support a negative prompt"),
            (size % step == 0 and self.smallest <= size <= self.largest, f"size is {size}; it must be {bounds}"),
        ]

    def _draw_both(
        self, prompt: str, seed: int, options: dict[str, Any], weight: float | None, control: Any
    ) -> "list[tuple[str, Image.Image]]":
        drawn = []
        # One at a time: two at once would need twice the memory.
        with self._turn:
            for title, pipe in (("before", self._before), ("after" if self.has_before else self.title, self._after)):
                if pipe is None:
                    continue
                if self.lora_strength is not None:
                    # With a LoRA, before and after are one model, which takes half the memory.
                    set_strength(pipe, 0.0 if title == "before" else float(weight or 0.0))
                drawn.append((title, self._draw_with(pipe, prompt, seed, options, control)))
        return drawn

    def _draw_with(self, pipe: Any, prompt: str, seed: int, options: dict[str, Any], control: Any) -> "Image.Image":
        import torch

        # On the CPU, so that a seed gives the same image on every machine.
        words = options | {"generator": torch.Generator("cpu").manual_seed(seed)}
        begins = "image" in options
        if control is not None and self.steering is not None:
            pipe = _pipeline_like(pipe, from_picture=begins, controlnet=self.steering.model)
            # Where noise is the start, most of these take the steering image as "image".
            words["control_image" if begins or _takes(pipe, "control_image") else "image"] = control
        elif begins:
            pipe = _pipeline_like(pipe, from_picture=True)
        words |= {name: value for name, value in self.habits.extra if _takes(pipe, name)}
        return pipe(prompt, **words).images[0]


def _require(*rules: tuple[object, str]) -> None:
    """Refuse what breaks rules, all of them in one sentence; each is whether it holds, and what to say where not."""
    problems = [problem for holds, problem in rules if not holds]
    if problems:
        raise SettingsError(f"Nothing was generated: {'; '.join(problems)}.", "Change that and try again.")


def _pipeline_like(pipe: Any, *, from_picture: bool, controlnet: Any = None) -> Any:
    """Another pipeline of the same parts, that begins with an image or is steered by one."""
    from diffusers import AutoPipelineForImage2Image, AutoPipelineForText2Image

    wanted: Any = AutoPipelineForImage2Image if from_picture else AutoPipelineForText2Image
    if type(controlnet).__name__ == "ControlNetUnionModel":  # which the automatic ones take for a plain ControlNet
        import diffusers

        kind = "Img2ImgPipeline" if from_picture else "Pipeline"
        wanted = getattr(diffusers, f"StableDiffusionXLControlNetUnion{kind}")
    made = wanted.from_pipe(pipe, **({"controlnet": controlnet} if controlnet is not None else {}))
    made.set_progress_bar_config(disable=True)
    return made


def _takes(pipe: Any, name: str) -> bool:
    return name in inspect.signature(pipe.__call__).parameters


def _steering_picture(picture: "Image.Image", size: int, edges: bool) -> "Image.Image":
    """The image in this size; with `edges` white edges on black, as canny ControlNets saw (thresholds 100, 200)."""
    picture = picture.convert("RGB").resize((size, size))
    if not edges:
        return picture
    with needs_package("Finding edges", "Run: pip install opencv-python-headless"):
        import cv2
    import numpy as np
    from PIL import Image

    found = cv2.Canny(np.asarray(picture.convert("L")), 100, 200)
    return Image.fromarray(found).convert("RGB")


def open_artist(
    ref: str = "",
    *,
    lora: str = "",
    lora_strength: float = 1.0,
    controlnet: str = "",
    root: Path | None = None,
) -> Artist:
    """Load a model (key, Hub id, Diffusers folder or single file), or a session with its base model beside it.

    Args:
        ref: the demo model when empty.
        lora: a LoRA to add (file, Hub id, link, or the session that trained it), `lora_strength` (0 to 2) strong. A
            session that trained one draws with it beside its base model.
        lora_strength: of `lora`, 0 to 2.
        controlnet: a task or key of the ControlNet table, a file, a Diffusers folder or a Hub id.
        root: folder of the sessions.

    Returns:
        The loaded model, whose `draw` makes images.

    Raises:
        ModelNotFound: there is none, or it does not load.
        ModelError: there is none, or it does not load.
        SessionError: the session has no finished model.
    """
    session = find_session(ref, root=root)
    if lora and session is not None:
        raise SettingsError("A LoRA is added to a model, and this is a session.", "Name a model, or leave lora empty.")
    if session is None:
        folder = fetch_model(ref or "demo", convert=make_base)
        pipe = load_pipeline(folder)
        if lora:
            put_beside(pipe, find_lora(lora, root=root), lora)
        spec = spec_of(ref or "demo", folder)
        strength = lora_strength if lora else None
        steering = _steering(pipe, controlnet, spec.family)
        return Artist(ref or "the demo model", spec, pipe, lora_strength=strength, steering=steering)
    base = session.record["base_model"].get("ref")
    made = session.finished_model()
    if not base:
        raise SessionError(
            f"The session {session.name} does not say which base model it was trained from.",
            "Name its finished model instead: " + str(made),
        )
    folder = fetch_model(base, convert=make_base)
    spec = spec_of(base, folder)
    if is_lora(made):
        pipe = load_pipeline(folder)
        put_beside(pipe, made, made.name)
        steering = _steering(pipe, controlnet, spec.family)
        return Artist(f"session {session.name}", spec, pipe, pipe, lora_strength=lora_strength, steering=steering)
    with tempfile.TemporaryDirectory() as scratch:
        # A finished model is one file; the base lends it the tokenizer and the exact shape.
        learned = Path(scratch) / "learned"
        checkpoints.convert(made, learned, base=folder)
        after = load_pipeline(learned)
    steering = _steering(after, controlnet, spec.family)
    return Artist(f"session {session.name}", spec, after, load_pipeline(folder), steering=steering)


def _steering(pipe: Any, controlnet: str, family: str) -> Steering | None:
    return load_controlnet(pipe, controlnet.strip(), family) if controlnet.strip() else None
