"""Install, start and share AUTOMATIC1111, Forge Neo or ComfyUI, each in an environment of its own."""

from fastsd_helpers.webui.catalog import WebUI, find_ui, uis
from fastsd_helpers.webui.extensions.installation import InstallResult, install_webui
from fastsd_helpers.webui.places import Places, find_places
from fastsd_helpers.webui.placing.controls import ControlNetConfig, place_controlnet, place_controlnets
from fastsd_helpers.webui.placing.models import ModelsConfig, PlacedModel, place, place_model, place_models
from fastsd_helpers.webui.running.attached import AttachedUI, background_link, find_link, find_running, status, stop
from fastsd_helpers.webui.running.disk_usage import Kept, delete_kept, list_kept
from fastsd_helpers.webui.running.launching import RunningUI, launch, plan
from fastsd_helpers.webui.running.sharing import share, share_in_background, share_port
from fastsd_helpers.webui.settings import InstallConfig, LaunchConfig

__all__ = [
    "AttachedUI",
    "ControlNetConfig",
    "InstallConfig",
    "InstallResult",
    "Kept",
    "LaunchConfig",
    "ModelsConfig",
    "PlacedModel",
    "Places",
    "RunningUI",
    "WebUI",
    "background_link",
    "delete_kept",
    "find_link",
    "find_places",
    "find_running",
    "find_ui",
    "install_webui",
    "launch",
    "list_kept",
    "place",
    "place_controlnet",
    "place_controlnets",
    "place_model",
    "place_models",
    "plan",
    "share",
    "share_in_background",
    "share_port",
    "status",
    "stop",
    "uis",
]
