"""Every error a user can meet: what happened, then what to do next.

    FastSDError
    ├── SettingsError            one or more settings are out of range or do not fit together
    ├── SessionError             something is wrong with a session
    │   ├── SessionNotFound
    │   ├── SessionExists
    │   ├── SessionBusy          another run holds its lock
    │   ├── SessionDamaged       session.json or every checkpoint is unreadable
    │   └── SessionUnfinished    it has no finished model yet (a ModelNotFound too)
    ├── DatasetError             the images given cannot be trained on
    ├── DriveError               the folder or mounted Drive cannot be used
    │   ├── DriveReadOnly
    │   └── DiskFull
    ├── ModelError               a base model cannot be used
    │   ├── ModelNotFound
    │   ├── WrongFamily
    │   └── UnsafeModel          it could run code or lead elsewhere (a CheckpointError too)
    ├── CheckpointError          a checkpoint file cannot be read, written or named
    │   └── VerificationFailed   what was written is not what should have been (ours: exit code 1)
    ├── TrainingFailed           the run itself broke down (not a number, out of memory)
    ├── TunnelError              a port could not be given a public link
    │   ├── TunnelToolMissing    the program that makes the link is not here
    │   ├── TunnelTokenRefused   the service does not take this account's token
    │   ├── TunnelLimited        the service asks to wait, or its plan is used up
    │   ├── TunnelServiceDown    the service, or the link it gave, does not answer
    │   └── TunnelTimeout        nothing came in the time allowed
    ├── WebUIError               a web UI cannot be installed, started or given this model
    │   ├── WebUINotInstalled
    │   └── WebUICrashed         its process ended by itself
    ├── DependencyMissing        an optional package is not installed
    ├── DownloadError            a file cannot be fetched, or what arrived is not what was promised
    ├── InstallError             packages cannot be installed; what was there before still is
    └── Interrupted              stopped by the user; everything is saved (exit code 130)

`exit_code` is what the command line ends with: 2 for what a user can fix, 1 for a failure of ours.
"""

import contextlib
from collections.abc import Iterator, Mapping

from fastsd_helpers.wording import for_notebook

__all__ = [
    "CheckpointError",
    "DatasetError",
    "DependencyMissing",
    "DiskFull",
    "DownloadError",
    "DriveError",
    "DriveReadOnly",
    "FastSDError",
    "InstallError",
    "Interrupted",
    "ModelError",
    "ModelNotFound",
    "SessionBusy",
    "SessionDamaged",
    "SessionError",
    "SessionExists",
    "SessionNotFound",
    "SessionUnfinished",
    "SettingsError",
    "TrainingFailed",
    "TunnelError",
    "TunnelLimited",
    "TunnelServiceDown",
    "TunnelTimeout",
    "TunnelTokenRefused",
    "TunnelToolMissing",
    "UnsafeModel",
    "VerificationFailed",
    "WebUICrashed",
    "WebUIError",
    "WebUINotInstalled",
    "WrongFamily",
    "needs_package",
    "proxy_problem",
]


class FastSDError(Exception):
    """A problem a user can act on: `problem` states the fact with its value, `hint` what to do next."""

    exit_code = 2

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.problem}\n{self.hint}" if self.hint else self.problem

    def _render_traceback_(self) -> list[str]:
        # IPython calls this instead of printing a traceback: a notebook shows calm lines, while a
        # Python caller still gets an ordinary exception. The sign is one that fonts without emoji have.
        hint = [f"   → {for_notebook(self.hint)}"] if self.hint else []
        return [f"✗ {for_notebook(self.problem)}", *hint]


class SettingsError(FastSDError):
    """Settings out of range or contradicting each other; `problem` names every one of them.

    Attributes:
        fields: setting's name -> what is wrong with it, so that a form can say it at the field; "" -> what is wrong
            with none of them alone.
    """

    def __init__(self, problem: str, hint: str = "", *, fields: Mapping[str, str] | None = None) -> None:
        super().__init__(problem, hint)
        self.fields = dict(fields or {})


class SessionError(FastSDError):
    """Something is wrong with a session."""


class SessionNotFound(SessionError):
    """No session of that name under the sessions root."""


class SessionExists(SessionError):
    """A session of that name is already there."""


class SessionBusy(SessionError):
    """Another run holds the session's lock."""


class SessionDamaged(SessionError):
    """A session's record or all of its checkpoints cannot be read."""


class DatasetError(FastSDError):
    """The images given cannot be trained on."""


class DriveError(FastSDError):
    """A folder or a mounted Drive cannot be used."""


class DriveReadOnly(DriveError):
    """The sessions folder cannot be written to."""


class DiskFull(DriveError):
    """Not enough room for what has to be written."""


class ModelError(FastSDError):
    """A base model cannot be used."""


class ModelNotFound(ModelError):
    """A base model is neither a key, nor a folder, nor a Hub id that answers."""


class SessionUnfinished(SessionError, ModelNotFound):
    """A session was named where a model is wanted, and it has no finished one yet."""


class WrongFamily(ModelError):
    """A model of a family that this job cannot train."""


class CheckpointError(FastSDError):
    """A checkpoint file cannot be read, written or named."""


class VerificationFailed(CheckpointError):
    """A file that was read back differs from what was meant to be written."""

    exit_code = 1


class UnsafeModel(ModelError, CheckpointError):
    """Something in a model could run code, or lead a library to files that nobody looked at."""


class TrainingFailed(FastSDError):
    """The run broke down; what was saved before is intact."""

    exit_code = 1


class TunnelError(FastSDError):
    """A port could not be given a public link."""


class TunnelToolMissing(TunnelError):
    """The program that makes the link is not on this machine."""


class TunnelTokenRefused(TunnelError):
    """The service does not take the token of this account."""


class TunnelLimited(TunnelError):
    """The service asks to wait, or the account's plan is used up."""


class TunnelServiceDown(TunnelError):
    """The service does not answer, or the link it gave leads elsewhere."""


class TunnelTimeout(TunnelError):
    """The service said nothing in the time allowed."""


class WebUIError(FastSDError):
    """A web UI cannot be installed, started or given this model."""


class WebUINotInstalled(WebUIError):
    """The web UI's environment or code is not on this machine."""


class WebUICrashed(WebUIError):
    """The web UI's process ended by itself."""


class DependencyMissing(FastSDError):
    """An optional package is not installed."""


class DownloadError(FastSDError):
    """A file cannot be fetched, or what arrived is not what was promised."""


class InstallError(FastSDError):
    """Packages cannot be installed; what was there before still is."""


class Interrupted(FastSDError):
    """The user stopped the run; everything up to the last finished step is saved."""

    exit_code = 130


@contextlib.contextmanager
def needs_package(what: str, hint: str) -> Iterator[None]:
    """Import optional packages in the block; one that is not there is named.

    Args:
        what: needs it, at the start of the sentence.
        hint: how to get it, or how to do without.

    Raises:
        DependencyMissing: "{what} needs the package NAME, which is not installed."; or it is installed and fails.
    """
    try:
        yield
    except ImportError as err:
        if (proxy := proxy_problem(err)) is not None:
            raise DependencyMissing(*proxy) from err
        if isinstance(err, ModuleNotFoundError):
            raise DependencyMissing(f"{what} needs the package {err.name}, which is not installed.", hint) from err
        said = str(err).strip()[:300].rstrip(".")
        raise DependencyMissing(f"{what} needs a package that cannot be loaded: {said}.", hint) from err


def proxy_problem(err: Exception) -> tuple[str, str] | None:
    """The sentence and hint for a proxy that the environment names and the HTTP client cannot use; None: another error.

    httpx raises ImportError for a SOCKS proxy without its package, and ValueError for an address that is none.

    Args:
        err: what the client has raised.
    """
    said = str(err).split("\n")[0].split(". ")[0].rstrip(".")
    words = said.lower()
    if not isinstance(err, (ImportError, ValueError)) or not ("socks" in words or "proxy" in words):
        return None
    more = "Run: pip install socksio PySocks; or correct" if "socks" in words else "Correct"
    return (
        f"The proxy that this machine's environment names cannot be used ({said}).",
        f"{more} ALL_PROXY, HTTPS_PROXY and HTTP_PROXY, then run this again.",
    )
