"""A small Gradio page to try one model or one session at once: prompt, seed, steps, size; before and after training.

For families that no web UI here runs, and for a look before a web UI is installed. It listens on this machine alone; a
public link goes through the login gate.
"""

import logging
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fastsd_helpers.downloads import fetch_model
from fastsd_helpers.errors import DependencyMissing, ModelError, ModelNotFound, SessionError, SettingsError
from fastsd_helpers.options import check, option
from fastsd_helpers.registry import spec_of
from fastsd_helpers.runtime import describe_device
from fastsd_helpers.sessions import Session
from fastsd_helpers.tunnels import Tunnel, TunnelConfig, open_tunnel

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Artist", "Page", "PlaygroundConfig", "open_artist", "open_playground"]

logger = logging.getLogger("fastsd_helpers")


@dataclass(frozen=True)
class PlaygroundConfig:
    """Settings of the page."""

    share: Literal["no", "auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab"] = option(
        "no", help="make a public link with a login; auto tries the services in order"
    )
    lora: str = option("", help="LoRA file or Hub id to add to the model")
    port: int = option(0, help="port on this machine; 0: any free one", low=0, high=65535, advanced=True)

    def __post_init__(self) -> None:
        check(self)


class Artist:
    """Draws with a model; for a session also with what it was before.

    Attributes:
        title: what it draws with, in words.
        size: side of its pictures in pixels, the model's own.
        multiple, smallest, largest: which other sides it takes.
        has_before: whether `draw` gives two pictures.
    """

    def __init__(self, title: str, spec: Any, after: Any, before: Any = None) -> None:
        self.title, self._after, self._before = title, after, before
        self.size, self.multiple, self.smallest, self.largest = spec.native_px, spec.multiple, spec.min_px, spec.max_px
        self.has_before = before is not None
        self._turn = threading.Lock()

    def draw(
        self,
        prompt: str,
        *,
        seed: int = 11,
        steps: int = 25,
        size: int | None = None,
        guidance: float = 7.5,
        negative: str = "",
        start: "Image.Image | None" = None,
        strength: float = 0.6,
    ) -> "list[tuple[str, Image.Image]]":
        """Draw one picture, or two of the same noise: before and after the training.

        Args:
            size: side in pixels; the model's own when None.
            start: a picture to begin with instead of noise; `strength` (0 to 1) is how much of it is given up.

        Returns:
            (title, picture) of each.

        Raises:
            SettingsError: a size the model does not take, an empty prompt, or numbers out of range.
        """
        size = size or self.size
        problems = [
            *([] if prompt.strip() else ["there is no prompt"]),
            *([] if 1 <= steps <= 200 else [f"steps is {steps}; it must be 1 to 200"]),
            *([] if 0 < strength <= 1 else [f"strength is {strength}; it must be above 0 and at most 1"]),
            *([] if size % 8 == 0 and self.smallest <= size <= self.largest else [self._bad_size(size)]),
        ]
        if problems:
            raise SettingsError(f"Nothing was drawn: {'; '.join(problems)}.", "Change that and try again.")
        import torch

        options = {"num_inference_steps": int(steps), "guidance_scale": float(guidance)}
        if negative.strip():
            options["negative_prompt"] = negative
        drawn = []
        # One at a time: two at once would need twice the memory.
        with self._turn:
            for title, pipe in (("before", self._before), ("after" if self.has_before else self.title, self._after)):
                if pipe is None:
                    continue
                # On the CPU, so that a seed gives the same picture on every machine.
                options["generator"] = torch.Generator("cpu").manual_seed(int(seed))
                if start is None:
                    picture = pipe(prompt, height=size, width=size, **options).images[0]
                else:
                    begun = start.convert("RGB").resize((size, size))
                    picture = _image_to_image(pipe)(prompt, image=begun, strength=strength, **options).images[0]
                drawn.append((title, picture))
        return drawn

    def _bad_size(self, size: int) -> str:
        return f"size is {size}; it must be {self.smallest} to {self.largest} and a multiple of 8"


def _image_to_image(pipe: Any) -> Any:
    from diffusers import AutoPipelineForImage2Image

    made = AutoPipelineForImage2Image.from_pipe(pipe)
    made.set_progress_bar_config(disable=True)
    return made


def open_artist(ref: str = "", *, lora: str = "", root: Path | None = None) -> Artist:
    """Load a model (key, Hub id or Diffusers folder), or a session with its base model beside it.

    Args:
        ref: the demo model when empty.
        lora: a LoRA to add.
        root: folder of the sessions.

    Raises:
        ModelNotFound, ModelError: there is none, or it does not load. SessionError: the session has no finished model.
    """
    if lora and _session_of(ref, root):
        raise SettingsError("A LoRA is added to a model, and this is a session.", "Name a model, or leave lora empty.")
    session = _session_of(ref, root)
    if session is None:
        folder = fetch_model(ref or "demo")
        pipe = _pipeline(folder)
        if lora:
            _add_lora(pipe, lora)
        return Artist(ref or "the demo model", spec_of(ref or "demo", folder), pipe)
    base = session.record["base_model"].get("ref")
    made = sorted(session.exports.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
    if not base or not made:
        raise SessionError(
            f"The session {session.name} has no finished model yet.",
            f"Train it to the end, or write what it has learned: fastsd dreambooth export {session.name}",
        )
    from fastsd_helpers.checkpoints import convert

    folder = fetch_model(base)
    with tempfile.TemporaryDirectory() as scratch:
        # A finished model is one file; the base lends it the tokenizer and the exact shape.
        learned = Path(scratch) / "learned"
        convert(made[-1], learned, base=folder)
        after = _pipeline(learned)
    return Artist(f"session {session.name}", spec_of(base, folder), after, _pipeline(folder))


def _session_of(ref: str, root: Path | None) -> Session | None:
    if not ref:
        return None
    path = Path(ref).expanduser()
    try:
        if (path / "session.json").is_file():
            return Session.open(path.name, root=path.parent)
        return Session.open(ref, root=root)
    except SessionError:
        return None


def _pipeline(folder: Path) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    device = describe_device()
    dtype = torch.float16 if device.kind == "cuda" else torch.float32
    # What judges pictures is not part of every model, and needs weights of its own.
    without = {"safety_checker": None, "feature_extractor": None} if (folder / "unet").is_dir() else {}
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, local_files_only=True, torch_dtype=dtype, **without)
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise ModelError(
            f"{folder} cannot be loaded: {str(err).splitlines()[0]}", "Download the model again, or choose another one."
        ) from err
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device.kind)


def _add_lora(pipe: Any, ref: str) -> None:
    path = Path(ref).expanduser()
    try:
        if path.is_file():
            pipe.load_lora_weights(str(path.parent), weight_name=path.name)
        else:
            pipe.load_lora_weights(ref)
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise ModelNotFound(
            f"The LoRA {ref} cannot be added to this model: {str(err).splitlines()[0]}",
            "Give a file or Hub id of a LoRA for the same family.",
        ) from err


# ------------------------------------------------------------------------------------------------------- page


class Page:
    """An open playground. `url` is its address on this machine; `tunnel` its public link, when it has one."""

    def __init__(self, blocks: Any, url: str, port: int, title: str) -> None:
        self.url, self.port, self.title = url, port, title
        self.tunnel: Tunnel | None = None
        self._blocks = blocks
        self._closed = threading.Event()

    def block(self) -> str:
        """Where to open it, with user and password when it is shared."""
        return self.tunnel.block() if self.tunnel is not None else f"Link:      {self.url}"

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is closed; False when it is open still after `timeout_s` seconds."""
        return self._closed.wait(timeout_s)

    def close(self) -> None:
        """Close the link and the page; calling it twice is harmless."""
        if self.tunnel is not None:
            self.tunnel.close()
        self._blocks.close(verbose=False)
        self._closed.set()

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()


def open_playground(
    ref: str = "",
    config: PlaygroundConfig | None = None,
    *,
    artist: Artist | None = None,
    tunnel: TunnelConfig | None = None,
) -> Page:
    """Open the page for a model or a session; shared only behind a login.

    Args:
        ref: as for `open_artist`.
        artist: one that is loaded already.
        tunnel: settings of the public link; `config.share` names its kind.

    Raises:
        DependencyMissing: gradio is not installed. And what `open_artist` and `tunnels.open_tunnel` raise.
    """
    config = config or PlaygroundConfig()
    try:
        import gradio
    except ImportError as err:
        raise DependencyMissing(
            "The playground needs gradio, which is not installed.", "Run: pip install gradio"
        ) from err
    artist = artist or open_artist(ref, lora=config.lora)
    blocks = _draw_page(gradio, artist)
    _app, url, _share = blocks.launch(
        prevent_thread_lock=True,
        server_name="127.0.0.1",
        server_port=config.port or None,
        share=False,
        inbrowser=False,
        quiet=True,
    )
    page = Page(blocks, url, blocks.server_port, artist.title)
    if config.share != "no":
        try:
            page.tunnel = open_tunnel(page.port, config.share, config=tunnel)
        except BaseException:
            page.close()
            raise
    logger.info("The playground draws with %s.", artist.title)
    return page


def _draw_page(gradio: Any, artist: Artist) -> Any:
    def draw(
        prompt: str, negative: str, seed: float, steps: float, size: float, guidance: float, start: Any, strength: float
    ) -> list[Any]:
        try:
            drawn = artist.draw(
                prompt,
                negative=negative,
                seed=int(seed),
                steps=int(steps),
                size=int(size),
                guidance=guidance,
                start=start,
                strength=strength,
            )
        except SettingsError as err:
            raise gradio.Error(f"{err.problem} {err.hint}") from err
        return [(picture, title) for title, picture in drawn]

    with gradio.Blocks(title="Playground", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## Playground: {artist.title}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", lines=2)
                negative = gradio.Textbox(label="What must not be in it")
                seed = gradio.Number(label="Seed", value=11, precision=0)
                steps = gradio.Slider(1, 100, value=25, step=1, label="Steps")
                size = gradio.Slider(
                    artist.smallest, artist.largest, value=artist.size, step=artist.multiple, label="Size in pixels"
                )
                guidance = gradio.Slider(0, 20, value=7.5, step=0.5, label="How strongly the prompt steers")
                with gradio.Accordion("Begin with a picture", open=False):
                    start = gradio.Image(label="Picture", type="pil")
                    strength = gradio.Slider(0.05, 1, value=0.6, step=0.05, label="How much of it is given up")
                button = gradio.Button("Draw", variant="primary")
            gallery = gradio.Gallery(label="Before and after" if artist.has_before else "Picture", columns=2)
        inputs = [prompt, negative, seed, steps, size, guidance, start, strength]
        button.click(draw, inputs, gallery, api_name="draw")
        prompt.submit(draw, inputs, gallery, api_name=False)
    return blocks.queue(max_size=16)
