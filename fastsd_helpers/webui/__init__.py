"""Install, start and share AUTOMATIC1111, Forge Neo or ComfyUI, each in an environment of its own."""

from fastsd_helpers.webui.catalog import WebUI, find_ui, uis
from fastsd_helpers.webui.install import InstallResult, install_webui
from fastsd_helpers.webui.launch import RunningUI, launch, plan, share, status, stop
from fastsd_helpers.webui.models import PlacedModel, place_controlnet, place_model
from fastsd_helpers.webui.places import Places, find_places
from fastsd_helpers.webui.settings import InstallConfig, LaunchConfig

__all__ = [
    "InstallConfig",
    "InstallResult",
    "LaunchConfig",
    "PlacedModel",
    "Places",
    "RunningUI",
    "WebUI",
    "find_places",
    "find_ui",
    "install_webui",
    "launch",
    "place_controlnet",
    "place_model",
    "plan",
    "share",
    "status",
    "stop",
    "uis",
]
