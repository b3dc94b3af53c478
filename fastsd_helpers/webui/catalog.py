"""The web UIs that can be installed: where their code comes from, which models they run, how they speak."""

from dataclasses import dataclass

from fastsd_helpers.errors import WebUIError
from fastsd_helpers.tunnels.gate.passing import ClosedPath
from fastsd_helpers.webui.closed import A1111_CLOSED, COMFYUI_CLOSED

__all__ = ["Repository", "WebUI", "find_ui", "uis"]


@dataclass(frozen=True)
class Repository:
    """Code at one commit, with the places it can be had from, in order."""

    name: str  # what a mirror setting calls it
    folder: str  # below the UI's own code; "" is the UI itself; "extension/NAME" is one of its extensions
    urls: tuple[str, ...]
    revision: str  # a commit, or a tag where no commit is known here
    variable: str = ""  # by which AUTOMATIC1111 itself can be told another address


@dataclass(frozen=True)
class WebUI:
    """One web UI."""

    key: str
    title: str
    python: str
    lock_set: str  # its set in wheels.lock
    repositories: tuple[Repository, ...]
    families: tuple[str, ...]  # of base models it runs
    entry: str
    port: int
    ready: str  # pattern of the line after which it may be asked over HTTP
    alive_path: str  # answers 200 without a login
    loaded: str = ""  # pattern of the line that says that the model is loaded
    refused: str = ""  # ... or that it is not
    has_login: bool = False
    folders: tuple[tuple[str, str], ...] = ()  # kind of model -> folder below models/
    hides_dotted: bool = False  # it serves no file below a folder whose name begins with a dot (Gradio 3, routes.py)
    closed: tuple[ClosedPath, ...] = ()  # what no visitor of a link may use
    runs_others: bool = False  # it also runs families that nothing here has a table of
    guard: str = ""  # file of guards/ that starts it
    tried: str = ""  # what of this was run, and when


_SD = "https://github.com/"

_A1111 = WebUI(
    key="a1111",
    title="AUTOMATIC1111 v1.10.1",
    python="3.11",
    lock_set="a1111",
    # Commits: modules/launch_utils.py of v1.10.1. Stability AI's own repository was removed in December 2025; the
    # fork of a maintainer holds the same commit.
    repositories=(
        Repository(
            "a1111",
            "",
            (f"{_SD}AUTOMATIC1111/stable-diffusion-webui.git",),
            "82a973c04367123ae98bd9abdf80d9eda9b910e2",
        ),
        Repository(
            "assets",
            "repositories/stable-diffusion-webui-assets",
            (f"{_SD}AUTOMATIC1111/stable-diffusion-webui-assets.git",),
            "6f7db241d2f8ba7457bac5ca9753331f0c266917",
            "ASSETS_REPO",
        ),
        Repository(
            "stable-diffusion",
            "repositories/stable-diffusion-stability-ai",
            (
                f"{_SD}w-e-w/stablediffusion.git",
                f"{_SD}licyk/stablediffusion.git",
                f"{_SD}joypaul162/Stability-AI-stablediffusion.git",
            ),
            "cf1d67a6fd5ea1aa600c4df58e5b47da45f6bdbf",
            "STABLE_DIFFUSION_REPO",
        ),
        Repository(
            "generative-models",
            "repositories/generative-models",
            (f"{_SD}Stability-AI/generative-models.git",),
            "45c443b316737a4ab6e40413d7794a7f5657c19f",
            "STABLE_DIFFUSION_XL_REPO",
        ),
        Repository(
            "k-diffusion",
            "repositories/k-diffusion",
            (f"{_SD}crowsonkb/k-diffusion.git",),
            "ab527a9a6d347f364e3d185ba6d714e22d80cb3c",
            "K_DIFFUSION_REPO",
        ),
        Repository(
            "blip",
            "repositories/BLIP",
            (f"{_SD}salesforce/BLIP.git",),
            "48211a1594f1321b00f14c9f7a5b4813144b2fb9",
            "BLIP_REPO",
        ),
        Repository(
            "controlnet",
            "extension/sd-webui-controlnet",
            (f"{_SD}Mikubill/sd-webui-controlnet.git",),
            "56cec5b2958edf3b1807b7e7b2b1b5186dbd2f81",
        ),
    ),
    families=("sd15", "sd15-inpaint", "sd21", "sd21-inpaint", "sdxl", "sdxl-inpaint", "sdxl-refiner"),
    entry="launch.py",
    port=7860,
    # "Running on local URL" comes before its middleware is in place: a request then ends the process.
    ready=r"Startup time: ",
    alive_path="/internal/ping",
    loaded=r"Model loaded in ",
    refused=r"Stable diffusion model failed to load|No checkpoints found",
    has_login=True,
    hides_dotted=True,
    folders=(
        ("checkpoint", "Stable-diffusion"),
        ("lora", "Lora"),
        ("vae", "VAE"),
        ("embedding", "embeddings"),
        ("controlnet", "ControlNet"),
        ("upscaler", "ESRGAN"),
    ),
    closed=A1111_CLOSED,
    guard="a1111.py",
    tried=(
        "installed, started and used to generate images on a CPU (2026-11, benchmarks/results/a1111_cpu.md); on no GPU "
        "yet"
    ),
)

_FORGE_NEO = WebUI(
    key="forge-neo",
    title="Forge Neo",
    python="3.13",
    lock_set="forge-neo",
    # Its branch `neo`, at the commit whose requirements.txt names the versions of the lock.
    repositories=(
        Repository(
            "forge-neo",
            "",
            (f"{_SD}Haoming02/sd-webui-forge-classic.git",),
            "1e8cfbc1d5982edb8e593cfad948ab4ccae7bfbe",
        ),
    ),
    families=("sd15", "sd15-inpaint", "sdxl", "sdxl-inpaint", "sdxl-refiner", "flux"),
    entry="launch.py",
    port=7860,
    ready=r"Startup time: ",
    alive_path="/internal/ping",
    # It loads a model with the first image, so nothing of that is waited for.
    has_login=True,
    folders=(
        ("checkpoint", "Stable-diffusion"),
        ("diffusion-model", "Stable-diffusion"),  # it tells by the content which of the two a file is
        ("lora", "Lora"),
        ("vae", "VAE"),
        ("text-encoder", "text_encoder"),
        ("embedding", "embeddings"),
        ("controlnet", "ControlNet"),
        ("upscaler", "ESRGAN"),
    ),
    closed=A1111_CLOSED,
    runs_others=True,
    guard="forge_neo.py",
    tried="a fork of it, with this lock: installed, and used to generate images on a CPU, Flux too (2026-11, "
    "benchmarks/results/forge_neo_cpu.md); this exact commit was not run",
)

_COMFYUI = WebUI(
    key="comfyui",
    title="ComfyUI",
    python="3.12",
    lock_set="comfyui",
    # The commit of its release 0.33.0, of August 2026.
    repositories=(
        Repository(
            "comfyui",
            "",
            (f"{_SD}comfyanonymous/ComfyUI.git", f"{_SD}Comfy-Org/ComfyUI.git"),
            "2f35f4a08176d993cded35dac3332be4f7287f41",
        ),
        # GGUF files, in which Flux fits a small GPU, are read by this node pack alone. Its newest commit of 2025-12.
        Repository(
            "gguf",
            "extension/ComfyUI-GGUF",
            (f"{_SD}city96/ComfyUI-GGUF.git",),
            "795e45156ece99afbc3efef911e63fcb46e6a20d",
        ),
    ),
    families=("sd15", "sd15-inpaint", "sd21", "sdxl", "sdxl-inpaint", "sdxl-refiner", "flux"),
    entry="main.py",
    port=8188,
    ready=r"To see the GUI go to: ",
    alive_path="/system_stats",
    has_login=False,
    folders=(
        ("checkpoint", "checkpoints"),
        ("diffusion-model", "diffusion_models"),
        ("lora", "loras"),
        ("vae", "vae"),
        ("text-encoder", "text_encoders"),
        ("embedding", "embeddings"),
        ("controlnet", "controlnet"),
        ("upscaler", "upscale_models"),
    ),
    closed=COMFYUI_CLOSED,
    runs_others=True,
    guard="comfyui.py",
    tried="installed, attacked and used to generate images on a CPU, Flux and GGUF too (2026-11, "
    "benchmarks/results/comfyui_cpu.md); on no GPU yet",
)


def uis() -> list[WebUI]:
    """Every web UI, the default one first."""
    return [_A1111, _FORGE_NEO, _COMFYUI]


def find_ui(key: str) -> WebUI:
    """Look up a web UI; raises WebUIError with the keys there are."""
    for ui in uis():
        if ui.key == key:
            return ui
    raise WebUIError(f"There is no web UI '{key}' here.", f"Choose {', '.join(ui.key for ui in uis())}.")
