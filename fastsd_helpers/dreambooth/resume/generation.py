"""One generation of a run: a folder of weight files under immutable names, described by its manifest.

    checkpoints/000007-unet-000120-9f3a11c2/unet.safetensors
                                           /optimizer.safetensors
                                           /manifest.json      written last; sizes and sha256 of every file needed

A generation is whole when its manifest matches its own hash and every file named in it has the size and the sha256 it
says, whether the file lies in this folder or, carried over unchanged, in an earlier one. Nothing else counts: not the
order of arrival, not the clock, not the presence of the manifest.
"""

import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastsd_helpers.drive import copy_verified
from fastsd_helpers.errors import CheckpointError, DriveError, FastSDError
from fastsd_helpers.files import file_errors, sha256_of
from fastsd_helpers.runtime import fault_point
from fastsd_helpers.sessions.record import GENERATION_NAME, content_hash

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Generation",
    "Job",
    "NotWhole",
    "Snapshot",
    "describe",
    "generation_name",
    "list_generations",
    "load_tensors",
    "make_manifest",
    "parse_name",
    "read_generation",
    "require_name",
    "role_problem",
    "save_tensors",
    "summary_row",
    "verify_files",
]

MANIFEST = "manifest.json"
_SCHEMA = 1
_ROLE = re.compile(r"^[a-z0-9_]+$")
_FILE = re.compile(r"^[A-Za-z0-9_.-]+$")


@dataclass
class Snapshot:
    """The state of a run at one step.

    Attributes:
        stage: lower-case name of the stage, such as `unet`.
        step: steps done in this stage.
        tensors: what changed, by role; each role becomes one file.
        record: anything JSON can hold that the trainer needs to go on.
        carried: roles that have not changed since an earlier generation; they are referenced, not written again.
        keep: never pruned.
        spare_bytes: that must still be free beside it on a Drive with a trash, or it waits: for what must come later.
    """

    stage: str
    step: int
    tensors: "dict[str, dict[str, Tensor]]"
    record: dict[str, Any] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    keep: bool = False
    spare_bytes: int = 0


class NotWhole(Exception):
    """Why a generation cannot be used: the rest of a sentence that begins with its name."""


@dataclass(frozen=True)
class FileEntry:
    """One weight file of a generation."""

    role: str
    path: str  # relative to the checkpoints folder, with `/`
    bytes: int
    sha256: str
    carried: bool  # lies in an earlier generation's folder


class Generation:
    """A whole generation: what was trained so far, and where the run stood.

    Attributes:
        name: folder name; sequence number, stage, step and a random suffix.
        seq: the sequence number; larger is newer, whatever the clock says.
        stage, step: where the run stood.
        record: what the trainer saved with it.
        files: its weight files.
    """

    def __init__(self, name: str, manifest: dict[str, Any], *, folder: Path, scratch: Path | None = None) -> None:
        self.name = name
        self.seq: int = manifest["seq"]
        self.stage: str = manifest["stage"]
        self.step: int = manifest["step"]
        self.record: dict[str, Any] = manifest["record"]
        self.keep: bool = manifest["keep"]
        self.timeline: str = manifest["timeline"]
        self.files = tuple(FileEntry(**entry) for entry in manifest["files"])
        self._folder, self._scratch = folder, scratch

    def __repr__(self) -> str:
        return f"Generation({self.name!r})"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that `load` knows, in the order they were saved."""
        return tuple(entry.role for entry in self.files)

    def find(self, entry: FileEntry) -> Path:
        """Where a file lies: on this machine when it never reached the mount, else on the mount."""
        local = self._scratch / entry.path if self._scratch else None
        return local if local is not None and local.is_file() else self._folder / entry.path

    def load(self, role: str) -> "dict[str, Tensor]":
        """Load one role's tensors to the CPU, bit for bit and in the order in which they were saved.

        The file is first copied to the local scratch folder and its hash checked once more, because a mount that
        goes away under a memory-mapped file kills the process.

        Raises:
            CheckpointError: the generation has no such role.
            DriveError: the file can no longer be read as it was.
            VerificationFailed: the file can no longer be read as it was.
        """
        entry = next((entry for entry in self.files if entry.role == role), None)
        if entry is None:
            raise CheckpointError(
                f"Checkpoint {self.name} holds no {role!r}.", f"It holds: {', '.join(self.roles) or 'nothing'}."
            )
        path = self.find(entry)
        if self._scratch is None or path.is_relative_to(self._scratch):
            return load_tensors(path)
        local = self._scratch / "loaded" / f"{role}-{entry.sha256[:16]}-{secrets.token_hex(4)}.safetensors"
        with file_errors(local.parent, "create"):
            local.parent.mkdir(parents=True, exist_ok=True)
        copy_verified(path, local, sha256=entry.sha256, point=None)
        tensors = load_tensors(local)
        if os.name != "nt":  # Windows cannot remove a file that is mapped; the store clears it at the next start
            with file_errors(local, "remove"):
                local.unlink()
        return tensors


@dataclass
class Job:
    """A generation on its way to the mount, and what went wrong with it last.

    Attributes:
        spare_bytes: room that must be left on a Drive for what comes after it.
    """

    name: str
    files: tuple[FileEntry, ...]
    record: dict[str, Any]
    keep: bool
    problem: FastSDError | None = None
    spare_bytes: int = 0

    def manifest(self, timeline: str, files: tuple[FileEntry, ...]) -> bytes:
        """The manifest's bytes, with its files where they are.

        Raises:
            CheckpointError: the record holds what JSON cannot.
        """
        seq, stage, step = require_name(self.name)
        about = {"seq": seq, "stage": stage, "step": step, "keep": self.keep, "timeline": timeline}
        return make_manifest(**about, record=self.record, files=files)

    def not_written(self, folder: Path, scratch: Path) -> str:
        """Why it is not in the folder, and where it is instead, as a sentence."""
        why = self.problem.problem if self.problem is not None else "It was not tried yet."
        return (
            f"Checkpoint {describe(self.name)} was not written to {folder}: {why} "
            f"Until this machine is gone it is in {scratch}."
        )


def role_problem(role: str) -> str | None:
    """Say why a role cannot name a file, or None when it can."""
    return None if _ROLE.match(role) else f"{role!r} cannot be the name of a checkpoint's file."


def save_tensors(tensors: "dict[str, Tensor]", path: Path) -> None:
    """Write one role's tensors to a local file and fsync it. Fault points: `checkpoint.write`, `checkpoint.fsync`.

    Raises:
        DiskFull: it could not be written.
        DriveError: it could not be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with file_errors(path, "write"):
            save_file(_detached(tensors), path, metadata={"order": json.dumps(list(tensors))})
    except SafetensorError as err:  # its one class for whatever the operating system said
        raise DriveError(f"Could not write {path}: {err}.", "Free some space on this machine's own disk.") from err
    fault_point("checkpoint.write")
    with file_errors(path, "write"), open(path, "rb+") as file:
        os.fsync(file.fileno())
    fault_point("checkpoint.fsync")


def _detached(tensors: "dict[str, Tensor]") -> "dict[str, Tensor]":
    """Tensors as safetensors takes them: on the CPU, contiguous, each with a storage of its own."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().to("cpu").contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        elif storage.data_ptr():
            seen.add(storage.data_ptr())
        ready[name] = plain
    return ready


def load_tensors(path: Path) -> "dict[str, Tensor]":
    """Load a role's file; safetensors sorts the names, so their order is kept in the file's metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with file_errors(path, "read"), safe_open(path, framework="pt", device="cpu") as file:
            order = json.loads((file.metadata() or {}).get("order", "null")) or list(file.keys())
            return {name: file.get_tensor(name) for name in order}
    except SafetensorError as err:
        raise CheckpointError(
            f"{path} is not a readable .safetensors file: {err}.", "Resume from another one."
        ) from err


def generation_name(seq: int, stage: str, step: int) -> str:
    """Make a folder name that no other generation has, not even one of a run whose files were never seen here."""
    name = f"{seq:06d}-{stage}-{step:06d}-{secrets.token_hex(4)}"
    if not GENERATION_NAME.match(name):
        raise CheckpointError(f"{stage!r} at step {step} cannot name a checkpoint.", "Use lower-case letters and _.")
    return name


def parse_name(name: str) -> tuple[int, str, int] | None:
    """Read sequence number, stage and step from a folder name; None for any other folder."""
    found = GENERATION_NAME.match(name)
    return (int(found[1]), found[2], int(found[3])) if found else None


def require_name(name: str) -> tuple[int, str, int]:
    """Sequence number, stage and step of a generation; raises CheckpointError for a folder that is none."""
    parsed = parse_name(name)
    if parsed is None:
        raise CheckpointError(f"{name!r} is not the name of a checkpoint.", "Choose one of those in checkpoints/.")
    return parsed


def describe(name: str) -> str:
    """Name a generation in a sentence: `000007 (unet, step 120)`."""
    parsed = parse_name(name)
    return f"{parsed[0]:06d} ({parsed[1]}, step {parsed[2]})" if parsed else name


def list_generations(folder: Path) -> list[str]:
    """List the generation folders, whole or not, newest first by sequence number.

    Raises:
        DriveError: the folder cannot be read.
    """
    with file_errors(folder, "read"):
        names = [name for name in os.listdir(folder) if parse_name(name)] if folder.is_dir() else []
    return sorted(names, key=lambda name: (int(name.split("-")[0]), name), reverse=True)


def make_manifest(*, files: tuple[FileEntry, ...], **about: Any) -> bytes:
    """A manifest's bytes, with the hash of its own content; `about`: seq, stage, step, keep, timeline, record."""
    body = {"schema": _SCHEMA, **about, "files": [asdict(entry) for entry in files]}
    try:
        return json.dumps({**body, "sha256": content_hash(body)}, indent=1, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as err:
        raise CheckpointError(
            f"The checkpoint's record contains a value that JSON cannot store: {err}.", "Report this."
        ) from err


def read_generation(folder: Path, name: str, *, scratch: Path | None = None) -> Generation:
    """Read a generation's manifest and check it against itself; the weight files are not looked at.

    Args:
        folder: the checkpoints folder.
        name: the generation's folder in it.
        scratch: also look here, for what never reached `folder`.

    Raises:
        NotWhole: the manifest is missing, cut, changed, or of a newer version.
    """
    path = folder / name / MANIFEST
    if scratch is not None and (scratch / name / MANIFEST).is_file():
        path = scratch / name / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        expected = body.pop("sha256")
        matches = expected == content_hash(body)
    except FileNotFoundError:
        raise NotWhole(f"is incomplete: its {MANIFEST} is missing") from None
    except OSError as err:
        raise NotWhole(f"cannot be read: {MANIFEST}: {err.strerror}") from err
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        size = path.stat().st_size if path.exists() else 0
        raise NotWhole(f"is damaged: its {MANIFEST} ({size} bytes) is truncated or unreadable") from None
    if isinstance(body.get("schema"), int) and body["schema"] > _SCHEMA:
        raise NotWhole(f"was written by a newer fastsd_helpers (schema {body['schema']})")
    if not matches:
        raise NotWhole(f"is damaged: its {MANIFEST} does not match its own hash")
    generation = Generation(name, body, folder=folder, scratch=scratch)
    if parse_name(name) != (generation.seq, generation.stage, generation.step):
        raise NotWhole(f"is damaged: its {MANIFEST} belongs to another checkpoint")
    for entry in generation.files:
        # A shared folder may hold anything: a path must not lead out of the checkpoints.
        parent, _, file = entry.path.partition("/")
        if parse_name(parent) is None or not _FILE.match(file):
            raise NotWhole(f"is damaged: it names a file outside of the checkpoints ({entry.path!r})")
    return generation


def verify_files(generation: Generation, *, hashes: bool = True) -> None:
    """Check that every file a generation needs is there: all sizes first, then (slower) all hashes.

    Raises:
        NotWhole: one is not, and which.
    """
    for entry in generation.files:
        file = Path(entry.path).name
        try:
            size = os.stat(generation.find(entry)).st_size
        except FileNotFoundError:
            raise NotWhole(f"is incomplete: {file} is missing") from None
        except OSError as err:
            raise NotWhole(f"cannot be read: {file}: {err.strerror}") from err
        if size != entry.bytes:
            what = "incomplete" if size < entry.bytes else "damaged"
            raise NotWhole(f"is {what}: {file} has {_grouped(size)} of {_grouped(entry.bytes)} bytes")
    for entry in generation.files if hashes else ():
        file = Path(entry.path).name
        try:
            found = sha256_of(generation.find(entry))
        except DriveError as err:
            raise NotWhole(f"cannot be read: {err.problem.rstrip('.')}") from err
        if found != entry.sha256:
            raise NotWhole(f"is damaged: {file} has the right size but a different SHA-256 ({found[:12]}...)")


def _grouped(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def summary_row(name: str, files: tuple[FileEntry, ...], keep: bool, *, state: str) -> dict[str, Any]:
    """One line of the list of generations; see CheckpointStore.generations."""
    seq, stage, step = require_name(name)
    return {
        "name": name,
        "seq": seq,
        "stage": stage,
        "step": step,
        "keep": keep,
        "bytes": sum(entry.bytes for entry in files if not entry.carried),
        "sha256s": {entry.role: entry.sha256 for entry in files},
        "whole": state == "whole",
        "state": state,
    }
