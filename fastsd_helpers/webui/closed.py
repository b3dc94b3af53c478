"""Paths of each web UI that are closed on a link: it is for use, not for administration.

Open stays what makes and shows images: generation, its progress and interruption, uploads, lists of models, a new look
for models, workflows. Closed is what fetches addresses, trains, writes models, changes settings, installs, restarts,
or shows how the machine is set up. What goes through Gradio's own functions has no path of its own and is closed in
the web UI's process.
"""

from fastsd_helpers.tunnels.closed import GRADIO_CLOSED, UNKNOWN_CLOSED
from fastsd_helpers.tunnels.gate.passing import ClosedPath

__all__ = ["A1111_CLOSED", "COMFYUI_CLOSED"]

_CHANGES = ("POST", "PUT", "PATCH", "DELETE")
_SHOWS = "shows how the machine is set up"

# Source: modules/api/api.py, ui.py, progress.py, ui_extra_networks.py of AUTOMATIC1111 v1.10.1 and of Forge; the APIs
# of Lora and ControlNet (all of which stay open).
A1111_CLOSED: tuple[ClosedPath, ...] = (
    *GRADIO_CLOSED,
    ClosedPath(r"/(docs(/.*)?|redoc|openapi\.json)", "lists functions for the owner"),
    ClosedPath(r"/internal/(sysinfo.*|profile-startup)", _SHOWS),
    ClosedPath(r"/sdapi/v1/(cmd-flags|extensions)", _SHOWS),
    ClosedPath(r"/sdapi/v1/options", "changes settings", _CHANGES),
    ClosedPath(r"/sdapi/v1/(train|create)(/.*)?", "trains or writes models"),
    ClosedPath(r"/sdapi/v1/server-.*", "stops or restarts the web UI"),
    ClosedPath(r"/sdapi/v1/(unload|reload)-checkpoint", "unloads the model for everybody"),
)

_MANAGER = r"(v2/)?(manager|customnode|snapshot|externalmodel|comfyui_manager)"

# Source: server.py, app/user_manager.py and internal_routes.py of ComfyUI; comfyui_manager of ComfyUI-Manager 4.3, and
# the paths of its version 3, without v2/.
COMFYUI_CLOSED: tuple[ClosedPath, ...] = (
    *UNKNOWN_CLOSED,
    ClosedPath(r"/internal(/.*)?", _SHOWS),
    ClosedPath(rf"/{_MANAGER}(/.*)?", "installs and changes extensions"),
    ClosedPath(r"/users", "adds users", _CHANGES),
    # Its style sheet is part of everybody's page.
    ClosedPath(r"/userdata/(.*/)?user\.css(/.*)?", "changes everybody's page", _CHANGES),
)
