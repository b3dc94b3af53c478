"""Where this code runs and what is there: Colab, Kaggle, Jupyter or a terminal; versions, secrets, the log.

Nothing here installs, downloads or writes.
"""

import contextlib
import gc
import importlib
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Literal, TextIO

from fastsd_helpers.device import count_cores
from fastsd_helpers.errors import FastSDError, needs_package
from fastsd_helpers.wording import for_notebook

__all__ = [
    "REPOSITORY",
    "REVISION",
    "choose_waiting",
    "colab_link",
    "end_runtime",
    "fault_point",
    "in_notebook",
    "install_command",
    "load_peft",
    "make_cpu_sums_repeatable",
    "quick_imports",
    "redact",
    "remember_secret",
    "secret",
    "show_log",
    "start_log",
    "version_of",
    "versions",
    "where",
]

logger = logging.getLogger("fastsd_helpers")  # of every module

REPOSITORY = "https://github.com/fastsd/fastsd_helpers"
REVISION = "main"  # the branch or tag that is installed from there
# What a bug report needs to name: the packages whose versions change results or file formats.
_PACKAGES = (
    "fastsd_helpers",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "pillow-heif",
    "opencv-python",
    "opencv-python-headless",
    "bitsandbytes",
    "ipywidgets",
)
# Tokens that are recognisable by their shape, so that one typed in by hand is hidden too.
_TOKEN_SHAPES = re.compile(r"\b(hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|ghp_[A-Za-z0-9]{30,})\b")
_IN_ADDRESSES = re.compile(
    r"(//[^/@\s:]*:)[^/@\s]+(?=@)"
    r"|((?<=[?&])(?:access_token|api[_-]?key|auth|key|password|secret|sig|signature|token|x-amz-signature)=)[^&\s\"'<>]+",
    re.IGNORECASE,
)
_HIDDEN = "•••"
_BUSY_SHARE = 0.35  # of the cores; less is what a notebook and a browser do


def where() -> Literal["colab", "kaggle", "jupyter", "terminal"]:
    """The kind of place this process runs in; a command started from a Colab cell is in Colab too."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "jupyter" if in_notebook() else "terminal"


def in_notebook() -> bool:
    """Say whether this very process is a notebook kernel, which can show widgets and images."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return getattr(shell, "kernel", None) is not None


def colab_link(port: int, *, timeout_s: float = 15) -> str | None:
    """Ask Colab for the address under which this notebook's own user, and nobody else, reaches a port of this machine.

    None outside a Colab notebook's kernel. Raises FastSDError when the browser does not answer in time.
    """
    if where() != "colab" or not in_notebook():
        return None
    from google.colab import output

    try:
        return output.eval_js(f"google.colab.kernel.proxyPort({int(port)})", timeout_sec=timeout_s)
    except Exception as err:  # Colab's MessageError and TimeoutError share no base class
        raise FastSDError(
            f"Colab gave no private address for port {port}: {str(err).rstrip('.') or type(err).__name__}.",
            "Keep the notebook open in the browser and run the cell again.",
        ) from err


def end_runtime() -> bool:
    """Give the machine of a Colab notebook back, which ends this kernel; False anywhere else, where nothing happens."""
    if where() != "colab" or not in_notebook():
        return False
    from google.colab import runtime as colab_runtime

    colab_runtime.unassign()
    return True


def install_command(extra: str = "", *, again: bool = False) -> str:
    """The pip command that installs this project, with what an extra of it brings; `again` writes its files anew.

    By its address: the public package index has no project of this name, and would give whatever is put there under it.
    Where Git is not installed it names the archive of the same branch or tag, which pip fetches without it.
    """
    name = f"fastsd_helpers[{extra}]" if extra else "fastsd_helpers"
    tag = "" if REVISION == "main" else f"@{REVISION}"
    place = f"git+{REPOSITORY}{tag}" if shutil.which("git") else f"{REPOSITORY}/archive/{REVISION}.zip"
    return f'pip install {"--force-reinstall " if again else ""}"{name} @ {place}"'


def choose_waiting() -> str:
    """Decide how threads of this process wait for each other on the processor; returns what was chosen, in words.

    A thread that waits for the others of its sum keeps its core busy: quick on a machine that is otherwise idle, and
    several times slower beside another busy program, which the others then wait for. By the load average of the last
    minute against the cores. Only the waiting is chosen: the number of threads decides the bits and stays. PyTorch
    reads this once, when it is loaded. Source: OpenMP 5.2, OMP_WAIT_POLICY; KMP_BLOCKTIME is that of Intel's runtime.

    Returns:
        "" where it is not decided here: the user has, PyTorch is loaded already, or there is a GPU to do the sums.
    """
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    if any(name in os.environ for name in names) or "torch" in sys.modules or os.path.exists("/dev/nvidiactl"):
        return ""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return ""
    cores = count_cores()
    against = f"load {load:.1f} on {cores} core{'s' * (cores > 1)}"
    if load < _BUSY_SHARE * cores:
        return f"Threads wait actively: this machine is idle ({against})."
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    return f"Threads wait passively: other programs are busy on this machine ({against})."


def make_cpu_sums_repeatable() -> None:
    """Ask MKL for sums that do not depend on where in memory a matrix lies: with two threads they otherwise differ.

    MKL reads this once, at its first multiplication in a process; call it before. The branch that a user chose stays,
    and is made strict too where MKL can do that. Another kind of processor or number of threads still gives other sums.
    Source: Intel oneMKL developer guide, "Conditional Numerical Reproducibility".
    """
    chosen = os.environ.get("MKL_CBWR") or "AUTO"
    if chosen.startswith(("AUTO", "AVX2", "AVX512")) and "STRICT" not in chosen:
        chosen += ",STRICT"
    os.environ["MKL_CBWR"] = chosen


def load_peft(what: str, hint: str) -> ModuleType:
    """Import peft, which refuses every LoRA where a torchao is installed that is older than it knows, as on Colab.

    Nothing here is quantized by torchao, so peft then goes on as if it were not installed.

    Args:
        what: needs it, at the start of the sentence.
        hint: how to get it.
    Raises:
        DependencyMissing: peft is not installed.
    """
    with needs_package(what, hint):
        import peft
    try:
        getattr(importlib.import_module("peft.import_utils"), "is_torchao_available", bool)()
    except ImportError:
        # Those that are imported already have the function under their own name.
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "peft" and hasattr(module, "is_torchao_available"):
                vars(module)["is_torchao_available"] = lambda: False
    return peft


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Look for no cycles meanwhile: that is a fifth of the time that importing PyTorch and its kin takes."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if looks:
            gc.enable()


def versions() -> dict[str, str]:
    """Read the versions of Python and of the packages that matter here; absent packages are left out."""
    found = {"python": platform.python_version()}
    return found | {name: version for name in _PACKAGES if (version := version_of(name)) is not None}


def version_of(package: str) -> str | None:
    """The installed version of a package; None when it is not installed."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


# ---------------------------------------------------------------------------------------------- secrets

_handed_out: set[str] = set()


def secret(name: str, *, prompt: Callable[[], str | None] | None = None) -> str | None:
    """Find a secret such as `HF_TOKEN`: environment, then Colab's or Kaggle's secrets, then `prompt()`.

    The value is remembered in memory only, so that `redact` and the log can hide it.

    Args:
        name: name of the environment variable and of the Colab or Kaggle secret.
        prompt: asks the user when it is found nowhere else (a password widget in a notebook).

    Returns:
        The value without surrounding blanks, or None when there is none.
    """
    value = (os.environ.get(name) or _platform_secret(name) or (prompt() if prompt else None) or "").strip()
    if value:
        remember_secret(value)
    return value or None


def remember_secret(value: str) -> None:
    """Hide a value from now on in the log and in whatever goes through `redact`; it is kept in memory only."""
    _handed_out.add(value)
    if not any(isinstance(item, _Redaction) for item in logger.filters):
        logger.addFilter(_Redaction())


def _platform_secret(name: str) -> str | None:
    if not in_notebook():  # both services answer the notebook's own kernel only
        return None
    place = where()
    if place == "colab":
        from google.colab import errors, userdata

        try:
            return userdata.get(name)
        except userdata.SecretNotFoundError:
            return None
        except userdata.NotebookAccessError:
            logger.warning(
                "The Colab secret %s is not switched on for this notebook. "
                "Open the key symbol on the left and allow access.",
                name,
            )
            return None
        except errors.Error as err:
            raise FastSDError(
                f"Colab could not be asked for the secret {name}: {err}.",
                "Run the cell again and answer the question about notebook access.",
            ) from err
    if place == "kaggle":
        with contextlib.suppress(ModuleNotFoundError):  # another Python than Kaggle's own, which alone can ask
            import kaggle_secrets

            try:
                return kaggle_secrets.UserSecretsClient().get_secret(name)
            except (kaggle_secrets.BackendError, kaggle_secrets.CredentialError, ConnectionError):
                logger.debug("Kaggle has no secret %s for this notebook (Add-ons, then Secrets).", name)
    return None


def redact(text: str) -> str:
    """Hide every secret handed out so far, and anything shaped like a token, in a text for log or screen.

    So are the password of an address (//user:password@host), and a token, key or signature in its query.
    """
    for value in sorted(_handed_out, key=len, reverse=True):
        # One too short for any login, such as a slip of the finger, must not black out half of every word.
        pattern = re.escape(value) if len(value) >= 8 else rf"(?<!\w){re.escape(value)}(?!\w)"
        text = re.sub(pattern, _HIDDEN, text)
    text = _IN_ADDRESSES.sub(lambda found: (found[1] or found[2]) + _HIDDEN, text)
    return _TOKEN_SHAPES.sub(_HIDDEN, text)


class _Redaction(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), ()
        if record.exc_info and not record.exc_text:
            # Formatted here, because a handler would format it after this filter and show the secret.
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


def start_log(stream: TextIO | None = None, *, level: int = logging.INFO) -> logging.Handler:
    """The handler that writes what the library says from now on; called again, it moves the log.

    Args:
        stream: None: standard error; in a notebook, where that looks like a failure, standard output.
        level: what is less important is left out.
    """
    for earlier in [item for item in logger.handlers if isinstance(item, _LogHandler)]:
        logger.removeHandler(earlier)
    notebook = in_notebook()
    handler = _LogHandler(stream or (sys.stdout if notebook else sys.stderr))
    handler.setFormatter(_NotebookFormatter("%(message)s") if notebook else logging.Formatter("%(message)s"))
    handler.addFilter(_Redaction())
    logger.addHandler(handler)
    logger.setLevel(level)
    logger.propagate = False  # a root handler, as Colab has one, would say everything twice
    return handler


class _LogHandler(logging.StreamHandler):
    pass


class _NotebookFormatter(logging.Formatter):
    """Below a cell there are fields and cells, and no flags."""

    def format(self, record: logging.LogRecord) -> str:
        return for_notebook(super().format(record))


@contextlib.contextmanager
def show_log(stream: TextIO | None = None, *, level: int = logging.INFO) -> Iterator[logging.Logger]:
    """Write what the library says to `stream` inside a `with` block, then leave the log as it was."""
    level_before, propagate_before, handlers_before = logger.level, logger.propagate, list(logger.handlers)
    start_log(stream, level=level)
    try:
        yield logger
    finally:
        logger.handlers[:] = handlers_before
        logger.setLevel(level_before)
        logger.propagate = propagate_before


# ----------------------------------------------------------------------------------------------- faults

_passings: Counter[str] = Counter()
_passings_lock = threading.Lock()


def fault_point(name: str) -> None:
    """Die here, as a lost machine does, when the environment says `FASTSD_FAULT=name:n` and this is passing n.

    The fault tests use it to kill a run at an exact place; without the variable it does nothing. Of several processes
    that train together the second one's places are called `name@1`, and so on.
    """
    wanted = os.environ.get("FASTSD_FAULT")
    if not wanted:
        return
    name += f"@{rank}" if (rank := os.environ.get("RANK", "0")) != "0" else ""
    with _passings_lock:
        _passings[name] += 1
        if wanted == f"{name}:{_passings[name]}":
            os.kill(os.getpid(), signal.SIGKILL)
