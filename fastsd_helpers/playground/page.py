"""The page itself, in Gradio: it listens on this machine alone; a public link goes through the login gate."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastsd_helpers.errors import DependencyMissing, SettingsError
from fastsd_helpers.images.files import picture_field
from fastsd_helpers.options import Checked, option
from fastsd_helpers.playground.artist import Artist, open_artist
from fastsd_helpers.runtime import logger
from fastsd_helpers.tunnels import LocalPage, TunnelConfig, import_gradio, require_shareable

__all__ = ["Page", "PlaygroundConfig", "open_playground"]


@dataclass(frozen=True)
class PlaygroundConfig(Checked):
    """Settings of the page."""

    share: Literal["no", "auto", "ngrok", "gradio", "cloudflared", "localtunnel", "colab"] = option(
        "no", help="open a tunnel: a public link with a login; auto tries the services in order"
    )
    lora: str = option("", help="LoRA to apply: file, Hub id, or session that trained one")
    lora_strength: float = option(1.0, help="LoRA weight", low=0.0, high=2.0, step=0.1)
    controlnet: str = option(
        "", help="ControlNet, which guides generation by an image: canny, ..., a file, folder or Hub id"
    )
    port: int = option(0, help="local port; 0: any free one", low=0, high=65535, advanced=True)


class Page(LocalPage):
    """An open playground. `tunnel` is its public link, when it has one; `problem` says why a wanted one is missing.

    Attributes:
        title: what it draws with.
    """

    title = ""

    @property
    def url(self) -> str:
        """Its address on this machine."""
        return self.local_url


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
        config: title, port and link; the defaults when None.
        artist: one that is loaded already.
        tunnel: settings of the public link; `config.share` names its kind.

    Returns:
        The page, open on 127.0.0.1 until it is closed.

    Raises:
        DependencyMissing: gradio is not installed.
        FastSDError: what `open_artist` and `tunnels.require_shareable` raise; a link that fails later leaves the page
            open on this machine, and is in `Page.problem`.
    """
    config = config or PlaygroundConfig()
    gradio = import_gradio("The playground", "Run: pip install gradio")
    link = dataclasses.replace(tunnel or TunnelConfig(), kind=config.share) if config.share != "no" else None
    if link is not None:
        require_shareable(link)
    artist = artist or open_artist(
        ref, lora=config.lora, lora_strength=config.lora_strength, controlnet=config.controlnet
    )
    page = Page(_draw_page(gradio, artist), config.port)
    page.title = artist.title
    if link is not None:
        page.share(link)
    logger.info("The playground uses %s.", artist.title)
    return page


def _drawing(gradio: Any, artist: Artist) -> Callable[..., list[Any]]:
    """What the page's button does."""

    def draw(
        prompt: str,
        negative: str,
        seed: float | None,
        steps: float,
        size: float,
        guidance: float,
        start: Any,
        strength: float,
        control: Any,
        control_strength: float,
        control_task: str | None,
        edges: bool,
        lora_strength: float,
    ) -> list[Any]:
        try:
            drawn = artist.draw(
                prompt,
                negative=negative,
                seed=None if seed is None else int(seed),
                steps=int(steps),
                size=int(size),
                guidance=guidance,
                start=start,
                strength=strength,
                control=control,
                control_strength=control_strength,
                control_task=control_task or "",
                edges=edges,
                lora_strength=lora_strength if artist.lora_strength is not None else None,
            )
        except (SettingsError, DependencyMissing) as err:
            raise gradio.Error(f"{err.problem} {err.hint}", print_exception=False) from err
        return [(picture, title) for title, picture in drawn]

    return draw


def _draw_page(gradio: Any, artist: Artist) -> Any:
    with gradio.Blocks(title="Playground", analytics_enabled=False) as blocks:
        gradio.Markdown(f"## Playground: {artist.title}")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", lines=2)
                negative = gradio.Textbox(label="Negative prompt", visible=artist.habits.takes_negative)
                seed = gradio.Number(label="Seed (empty: random)", value=11, precision=0)
                steps = gradio.Slider(1, 100, value=artist.habits.steps, step=1, label="Steps")
                size = gradio.Slider(
                    artist.smallest, artist.largest, value=artist.size, step=artist.multiple, label="Size in pixels"
                )
                guidance = gradio.Slider(
                    0,
                    20,
                    value=artist.habits.guidance,
                    step=0.5,
                    label="Guidance scale (CFG): how closely the image follows the prompt",
                )
                lora_strength = gradio.Slider(
                    0,
                    2,
                    value=1.0 if artist.lora_strength is None else artist.lora_strength,
                    step=0.05,
                    label="LoRA weight",
                    visible=artist.lora_strength is not None,
                )
                with gradio.Accordion("Image to image", open=False):
                    start = picture_field(gradio, "Image")
                    strength = gradio.Slider(0.05, 1, value=0.6, step=0.05, label="Denoising strength")
                tasks = artist.steering.tasks if artist.steering is not None else ()
                with gradio.Accordion(f"ControlNet: {', '.join(tasks)}", visible=bool(tasks)):
                    control = picture_field(gradio, "Image")
                    control_task = gradio.Dropdown(
                        list(tasks), value=tasks[0] if tasks else None, label="Control type", visible=len(tasks) > 1
                    )
                    control_strength = gradio.Slider(0, 2, value=1, step=0.05, label="Control weight")
                    edges = gradio.Checkbox(label="It is a photo: find its edges (Canny)", visible="canny" in tasks)
                button = gradio.Button("Generate", variant="primary")
            gallery = gradio.Gallery(label="Before and after" if artist.has_before else "Image", columns=2)
        inputs = [prompt, negative, seed, steps, size, guidance, start, strength, control, control_strength]
        inputs += [control_task, edges, lora_strength]
        draw = _drawing(gradio, artist)
        button.click(draw, inputs, gallery, api_name="draw")
        prompt.submit(draw, inputs, gallery, api_name=False)
    return blocks.queue(max_size=16)
