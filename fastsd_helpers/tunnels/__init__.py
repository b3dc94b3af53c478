"""A public link to a port of this machine, behind a login."""

from fastsd_helpers.tunnels.gate.login import Login, choose_login, make_login
from fastsd_helpers.tunnels.gate.server import Gate, open_gate
from fastsd_helpers.tunnels.local_page import LocalPage, import_gradio
from fastsd_helpers.tunnels.settings import KINDS, TunnelConfig
from fastsd_helpers.tunnels.shareable import require_shareable
from fastsd_helpers.tunnels.tunnel import Tunnel, open_tunnel

__all__ = [
    "KINDS",
    "Gate",
    "LocalPage",
    "Login",
    "Tunnel",
    "TunnelConfig",
    "choose_login",
    "import_gradio",
    "make_login",
    "open_gate",
    "open_tunnel",
    "require_shareable",
]
