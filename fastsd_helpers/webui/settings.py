"""Settings of installing and launching a web UI; the extensions that they name."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastsd_helpers.errors import SettingsError
from fastsd_helpers.options import check, option
from fastsd_helpers.webui.arguments import REFUSED, refused_arguments
from fastsd_helpers.webui.catalog import Repository

__all__ = ["InstallConfig", "LaunchConfig", "read_extensions"]

_FORM = "Use an https address of a git repository or a folder of this machine, with an optional @COMMIT after it."


@dataclass(frozen=True)
class InstallConfig:
    """What to install, and where."""

    ui: Literal["a1111", "forge-neo", "comfyui"] = option("a1111", help="web UI to install; a1111 does not run Flux")
    store: str = option(
        "", help="data directory for models, images and settings; empty: sd/stable-diffusion-webui on Drive"
    )
    folder: str = option(
        "", help="folder on this machine's disk for the web UI's code; empty: chosen automatically", advanced=True
    )
    controlnet: bool = option(True, help="install the ControlNet extension (AUTOMATIC1111; the others have their own)")
    extensions: str = option(
        "",
        help="extensions to add: https git addresses or folders, separated by commas, each with an optional @COMMIT; "
        "an extension is a program and runs with all your rights; it is kept and installed again on the next machine",
        advanced=True,
    )
    remove_extensions: str = option(
        "",
        help="names of extensions to remove, separated by commas; their settings stay in the data directory",
        advanced=True,
    )
    extension_wait_s: int = option(
        600, help="timeout in seconds for one extension's requirements and installer", low=10, high=7200, advanced=True
    )
    mirrors: str = option("", help="mirrors of the code repositories: NAME=URL-OR-FOLDER, NAME=...", advanced=True)
    skip_packages: str = option(
        "",
        help="packages to leave out, which you install into its environment yourself: torch, torchvision, ...",
        advanced=True,
    )

    def __post_init__(self) -> None:
        read_extensions(self.extensions)
        check(self)


@dataclass(frozen=True)
class LaunchConfig:
    """How to start a web UI that is installed."""

    ui: Literal["a1111", "forge-neo", "comfyui"] = option("a1111", help="the web UI")
    model: str = option(
        "",
        help="checkpoint to load at start: key, file, link, Hub id or session; empty: what is there",
        known="webui_start_models",
    )
    t5: Literal["auto", "fp8", "fp16"] = option(
        "auto", help="T5 precision: dtype of Flux's large text encoder", advanced=True
    )
    vram: Literal["auto", "full", "medium", "low"] = option(
        "auto", help="VRAM use: how much of the model stays on the GPU"
    )
    precision: Literal["auto", "fp16", "fp32"] = option("auto", help="precision: compute dtype")
    attention: Literal["sdp", "sdp-repeatable", "split"] = option(
        "sdp", help="attention implementation; sdp-repeatable: the same image for the same seed"
    )
    theme: Literal["dark", "light", "auto"] = option("auto", help="colour theme of the page")
    api: bool = option(True, help="enable the API for programs (AUTOMATIC1111 and Forge), behind the same login")
    user: str = option("fastsd", help="user name of its login")
    password: str | None = option(None, help="password of its login; empty: a strong one is generated", secret=True)
    port: int = option(0, help="local port; 0: the web UI's usual one", low=0, high=65535, advanced=True)
    restart: bool = option(False, help="restart it if it ends by itself, three times at most", advanced=True)
    wait_s: int = option(600, help="timeout for the start in seconds", low=10, high=3600, advanced=True)
    extra_args: str = option("", help="further command-line arguments of the web UI", advanced=True)
    pass_env: str = option(
        "",
        help="names of environment variables to pass on to it; tokens and everything it does not need are withheld",
        advanced=True,
    )
    allow_admin: bool = option(
        False,
        help="for this start only: whoever has the password may install programs, read every file that this notebook "
        "can read (a mounted Drive too), train and overwrite models",
        advanced=True,
    )
    store: str = option(
        "", help="data directory for models, images and settings; the one given at installation", advanced=True
    )
    folder: str = option("", help="folder of the web UI's code; the one given at installation", advanced=True)

    def __post_init__(self) -> None:
        problems = []
        try:
            words = shlex.split(self.extra_args)
        except ValueError as err:
            problems.append(f"extra_args (--extra-args) cannot be read: {err}")
        else:
            taken, closed = (
                refused_arguments(self.ui, words, allow_admin=self.allow_admin) if self.ui in REFUSED else ([], [])
            )
            if taken:
                problems.append(f"extra_args (--extra-args) has {', '.join(taken)}, which is set elsewhere here")
            if closed:
                problems.append(
                    f"extra_args (--extra-args) has {', '.join(closed)}, which gives administrator rights to "
                    "whoever has the password; only with allow_admin (--allow-admin)"
                )
        for name in self.pass_env.split():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                # Not shown: who takes this for a list of NAME=VALUE has typed a value.
                problems.append("pass_env (--pass-env) takes only names, separated by spaces, such as 'HF_TOKEN'")
                break
        check(self, problems)


def read_extensions(text: str) -> list[Repository]:
    """Read "ADDRESS[@COMMIT], ADDRESS, ...": https addresses of git repositories, or folders that are one.

    Without a commit it is the newest one; once there, it stays until another commit is asked for.

    Raises:
        SettingsError: no https, a login in the address, no repository, or a name twice.
    """
    found: dict[str, Repository] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        address, mark, revision = part.rpartition("@")
        if not mark or "/" in revision:
            address, revision = part, "HEAD"
        if not re.fullmatch(r"[0-9A-Za-z][\w.-]*", revision):
            raise SettingsError(f"extensions (--extension) has {part!r}: {revision!r} is not a commit.", _FORM)
        name = address.rstrip("/").rpartition("/")[2].removesuffix(".git")
        if address.startswith("https://"):
            if not re.fullmatch(r"https://[\w.-]+(:\d+)?/[\w./~+-]+", address):
                raise SettingsError(
                    f"extensions (--extension) has {re.sub('//[^/@]*@', '//', part)!r}, which is not a plain address.",
                    _FORM,
                )
        else:
            folder = Path(address).expanduser().absolute()
            if "://" in address or ":" in address or not folder.exists():
                raise SettingsError(f"extensions (--extension) has {part!r}: neither https nor a folder here.", _FORM)
            if not (folder / ".git").exists() and not (folder / "HEAD").exists():
                raise SettingsError(
                    f"{folder} is not a git repository.", f"Run there: git init, git add, git commit. {_FORM}"
                )
            address, name = str(folder), folder.name.removesuffix(".git")
        if not re.fullmatch(r"\w[\w.-]*", name) or name in found:
            problem = "is there twice" if name in found else "is not a name for a folder"
            raise SettingsError(f"extensions (--extension) has {part!r}: {name!r} {problem}.", _FORM)
        found[name] = Repository(name, f"extension/{name}", (address,), revision)
    return list(found.values())
