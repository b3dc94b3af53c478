"""Arguments of a web UI's own that a start does not take: set elsewhere here, or opening what the guard closes."""

import re
from collections.abc import Sequence

__all__ = ["REFUSED", "TAKEN_WHOLE", "refused_arguments"]

# Read in the parsers: modules/cmd_args.py of v1.10.1 and of Forge, comfy/cli_args.py.
_SD_OURS = (
    "--share --listen --ngrok --ngrok-region --ngrok-options --gradio-auth --gradio-auth-path --api-auth --port "
    "--server-name --data-dir --models-dir --model-ref --ui-settings-file --ui-config-file --styles-file --tls-keyfile "
    "--tls-certfile --disable-tls-verify --subpath --nowebui --test-server --dump-sysinfo --hide-ui-dir-config "
    "--freeze-specific-settings"
)
_SD_OPEN = (
    "--enable-insecure-extension-access --disable-safe-unpickle --allow-code --api-server-stop --add-stop-route "
    "--cors-allow-origins --cors-allow-origins-regex --gradio-allowed-path --update-all-extensions --update-check "
    "--reinstall-torch --reinstall-xformers --administrator --gradio-debug --ui-debug-mode --api-log"
)
_COMFY_OURS = (
    "--listen --port --base-directory --output-directory --input-directory --user-directory --database-url "
    "--auto-launch --tls-keyfile --tls-certfile --windows-standalone-build"
)
_COMFY_OPEN = (
    "--enable-cors-header --front-end-root --front-end-version --extra-model-paths-config --multi-user "
    "--comfy-api-base --enable-manager --enable-manager-legacy-ui"
)
REFUSED = {
    "a1111": (tuple(_SD_OURS.split()), tuple(_SD_OPEN.split())),
    "forge-neo": (tuple(_SD_OURS.split()), tuple(_SD_OPEN.split())),
    "comfyui": (tuple(_COMFY_OURS.split()), tuple(_COMFY_OPEN.split())),
}
# Whole arguments that begin like a refused one: argparse prefers the exact name.
TAKEN_WHOLE = ("--api", "--disable-auto-launch")
# What a later version or an extension may call such a thing.
_MEANS = re.compile(
    r"insecure|unsafe|unpickle|allow-code|arbitrary|allow\w*-path|(^|-)(listen|share|ngrok|tunnel|cors|auth|tls|ssl|kill|"
    r"remote|public|host|bind|origins?)(-|$)|server-(name|stop|restart|kill)"
)


def refused_arguments(ui: str, words: Sequence[str], *, allow_admin: bool = False) -> tuple[list[str], list[str]]:
    """Which words of further arguments are refused, however they are abbreviated.

    Args:
        ui: key of the web UI.
        words: as a shell splits them.
        allow_admin: those that only open something for visitors are taken.

    Returns:
        Those that are set elsewhere here, and those that want allow_admin.
    """
    ours, opening = REFUSED[ui]
    taken, closed = [], []
    for word in words:
        name = word.partition("=")[0].strip()
        if not name.startswith("--") or name == "--" or name in TAKEN_WHOLE:
            continue
        if name in ours:
            taken.append(name)
        elif name in opening:
            closed.append(name)
        # argparse takes every beginning of a name for it.
        elif any(row.startswith(name) for row in ours):
            taken.append(name)
        elif any(row.startswith(name) for row in opening) or _MEANS.search(name.removeprefix("--").replace("_", "-")):
            closed.append(name)
    return taken, [] if allow_admin else closed
