"""session.json: read, migrated, written crash-safely, repaired from its twins or rebuilt from the folder.

Every save first writes a twin under a new name (`.record/000012-1f2e3d4c.json`) and then replaces session.json. Both
carry a sequence number and a hash over their content, so that a file cut short, empty, or half old and half new is
noticed, and the newest whole one wins whatever the clock says.
"""

import copy
import datetime
import hashlib
import json
import re
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import SessionError
from fastsd_helpers.files import file_errors, write_atomic
from fastsd_helpers.processes.notes import read_object
from fastsd_helpers.runtime import install_command, logger
from fastsd_helpers.wording import natural_order

__all__ = [
    "GENERATION_NAME",
    "RECORD",
    "SCHEMA",
    "TWINS",
    "ReadResult",
    "content_hash",
    "new_record",
    "read_record",
    "write_record",
]

SCHEMA = 1
RECORD = "session.json"
TWINS = ".record"
_KEEP_TWINS = 3
# A mounted Drive delivers minutes late but deletes at once: a copy goes only when three newer ones are this old.
_SETTLE_S = 120.0
_TWIN_NAME = re.compile(r"^(\d{6,})-[0-9a-f]{8}\.json$")
# A checkpoint's folder: sequence number, stage, step, and a random end.
GENERATION_NAME = re.compile(r"^(\d{6,})-([a-z0-9_]+)-(\d{6,})-[0-9a-f]{8}$")
# Source: PNG (Portable Network Graphics) Specification, 5.2 and 11.2.5: the signature, and the chunk that ends a file.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# What a checkpoint may say about its run; enough to go on from when session.json is lost.
_REBUILT_FROM_CHECKPOINT = ("base_model", "settings", "prompts", "seed", "dataset", "versions")


@dataclass
class ReadResult:
    """A record and what had to be done to get it."""

    record: dict[str, Any]
    notices: list[str] = field(default_factory=list)  # sentences for the user
    damaged: bool = False  # session.json itself is unreadable or missing


def new_record(name: str) -> dict[str, Any]:
    """Make the record of a session that has just been created."""
    return {
        "schema": SCHEMA,
        "sequence": 0,
        "name": name,
        "id": uuid.uuid4().hex,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "base_model": {"ref": None, "sha256": None},
        "settings": {},
        "prompts": {},
        "seed": None,
        "dataset": {},
        "progress": {"stage": None, "step": 0, "steps": 0},
        "checkpoints": [],
        "versions": {},
    }


# ------------------------------------------------------------------------------------------------- write


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Write the twin, then session.json; `record["sequence"]` must be new. Fault points: `session.*`.

    Raises:
        DiskFull: session.json is as it was.
        DriveReadOnly: session.json is as it was.
        DriveError: session.json is as it was.
        SessionError: a value that JSON cannot hold.
    """
    data = _to_bytes(record)
    twins = folder / TWINS
    with file_errors(twins, "create"):
        twins.mkdir(exist_ok=True)
    write_atomic(twins / f"{record['sequence']:06d}-{secrets.token_hex(4)}.json", data)
    _set_damaged_aside(folder)
    write_atomic(folder / RECORD, data, point="session")
    _prune_twins(twins)


def _to_bytes(record: dict[str, Any]) -> bytes:
    try:
        body = {**record, "sha256": content_hash(record)}
        return json.dumps(body, indent=2, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except (TypeError, ValueError) as err:
        raise SessionError(
            f"The session's record contains a value that JSON cannot store: {err}.", "Report this."
        ) from err


def content_hash(record: dict[str, Any]) -> str:
    """The SHA-256 of what a record says, whatever the order of its keys."""
    plain = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(plain.encode()).hexdigest()


def _set_damaged_aside(folder: Path) -> None:
    path = folder / RECORD
    if not path.exists():
        return
    with file_errors(path, "read"):
        if _parse(path.read_bytes())[0] is None:
            aside = path.with_name(f"session.damaged-{secrets.token_hex(4)}.json")
            path.rename(aside)
            logger.info("The damaged session.json is kept as %s.", aside.name)


def _prune_twins(twins: Path) -> None:
    try:
        found = sorted((path for path in twins.iterdir() if _TWIN_NAME.match(path.name)), key=_twin_sequence)
        # Measured against the newest copy, so that only the mount's own clock counts.
        written = {path: path.stat().st_mtime for path in found}
        settled = [path for path in found if written[path] <= written[found[-1]] - _SETTLE_S]
        for path in settled[:-_KEEP_TWINS]:
            path.unlink(missing_ok=True)
    except OSError as err:  # the save itself is done; the next one tidies up
        logger.debug("Old copies of session.json in %s could not be removed: %s.", twins, err)


def _twin_sequence(path: Path) -> int:
    found = _TWIN_NAME.match(path.name)
    return int(found[1]) if found else 0


# -------------------------------------------------------------------------------------------------- read


def read_record(folder: Path) -> ReadResult:
    """Read the newest whole record of a session's folder; nothing is written.

    Raises:
        SessionError: it was written by a newer version of this library.
        DriveError: the folder itself cannot be read.
    """
    path = folder / RECORD
    own, problem = _read(path)
    if own is not None and own["schema"] > SCHEMA:
        raise _too_new(path, own["schema"])
    twins = [record for twin in _twin_paths(folder) if (record := _read(twin)[0]) is not None]
    for twin in twins:
        if twin["schema"] > SCHEMA:
            raise _too_new(folder / TWINS, twin["schema"])
    best = max(twins, key=lambda record: record["sequence"], default=None)
    if own is not None:
        if best is not None and best["sequence"] > own["sequence"]:
            # A save that was cut between its two writes, or a mount that delivered only the first of them.
            logger.info("session.json of %s is older than its copy; the copy is used.", folder.name)
            own = best
        return ReadResult(_migrate(own))
    if best is not None:
        notice = f"session.json of {folder.name!r} {problem}; it was repaired from the copy of save {best['sequence']}."
        return ReadResult(_migrate(best), [notice], damaged=True)
    record, found = _rebuild(folder)
    notice = f"session.json of {folder.name!r} {problem} and no copy is readable; it was rebuilt from {found}."
    return ReadResult(record, [notice, "Check the settings before you train: some may be lost."], damaged=True)


def _too_new(path: Path, schema: int) -> SessionError:
    return SessionError(
        f"{path} was written by a newer fastsd_helpers (schema {schema}; this one knows {SCHEMA}).",
        f"Update fastsd_helpers, then open the session again: {install_command(again=True)}",
    )


def _twin_paths(folder: Path) -> list[Path]:
    twins = folder / TWINS
    with file_errors(twins, "read"):
        return sorted(path for path in twins.iterdir() if _TWIN_NAME.match(path.name)) if twins.is_dir() else []


def _read(path: Path) -> tuple[dict[str, Any] | None, str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None, "is missing"
    except OSError as err:
        return None, f"cannot be read ({err.strerror})"
    return _parse(data)


def _parse(data: bytes) -> tuple[dict[str, Any] | None, str]:
    """The record without its hash, or None and the rest of a sentence on why not."""
    if not data.strip(b"\0 \r\n\t"):
        return None, "is empty"
    try:
        body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError too
        return None, f"is truncated or damaged ({len(data)} bytes)"
    if not isinstance(body, dict):
        return None, "holds no record"
    schema = body.get("schema", body.get("version"))
    if not isinstance(schema, int) or isinstance(schema, bool):
        return None, "names no schema version"
    if schema > SCHEMA:  # refused by the caller; how such a version hashes is not known here
        return {"schema": schema, "sequence": 0}, ""
    if schema == 0:  # had neither hash nor sequence
        return {**body, "schema": 0, "sequence": 0}, ""
    expected = body.pop("sha256", None)
    if not isinstance(body.get("sequence"), int) or expected != content_hash(body):
        return None, "does not match its own hash (half written, or edited by hand)"
    return body, ""


def _refuse_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are not JSON, and are never written here


# ----------------------------------------------------------------------------------------------- migrate


def _migrate_0(record: dict[str, Any]) -> dict[str, Any]:
    """Schema 0 (before the first release): flat, with `session`, `model`, `stage`, `step` and no hash."""
    migrated = new_record(str(record.get("session", "")))
    migrated["base_model"]["ref"] = record.get("model")
    migrated["progress"].update(stage=record.get("stage"), step=record.get("step", 0), steps=record.get("steps", 0))
    if record.get("prompt"):
        migrated["prompts"] = {"instance_prompt": record["prompt"]}
    for key in ("created", "settings", "seed", "dataset"):
        if key in record:
            migrated[key] = record[key]
    return migrated


_MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {0: _migrate_0}


def _migrate(record: dict[str, Any]) -> dict[str, Any]:
    record = copy.deepcopy(record)
    while record["schema"] < SCHEMA:
        sequence = record["sequence"]
        record = _MIGRATIONS[record["schema"]](record)
        record["sequence"] = sequence
    return record


# ----------------------------------------------------------------------------------------------- rebuild


def _rebuild(folder: Path) -> tuple[dict[str, Any], str]:
    record = new_record(folder.name)
    # Even unreadable twins tell how far the numbers went.
    record["sequence"] = max((_twin_sequence(path) for path in _twin_paths(folder)), default=0)
    images = _list_images(folder)
    if images:
        record["dataset"] = {"images": images}
    manifests = _read_manifests(folder / "checkpoints")
    if manifests:
        newest = manifests[-1]
        record["progress"].update(stage=newest.get("stage"), step=newest.get("step", 0))
        record["checkpoints"] = [
            {"name": manifest["name"], "stage": manifest.get("stage"), "step": manifest.get("step")}
            for manifest in manifests
        ]
        noted = newest.get("record")
        said = noted if isinstance(noted, dict) else {}
        record.update({key: said[key] for key in _REBUILT_FROM_CHECKPOINT if key in said})
        if isinstance(said.get("steps"), int):
            record["progress"]["steps"] = said["steps"]
    return record, f"{len(images)} images and {len(manifests)} checkpoints"


def _list_images(folder: Path) -> list[dict[str, Any]]:
    """What prepare would have recorded of each whole image that is there; a PNG that was cut short is left out."""
    found = []
    for name, held_out in (("instance_images", False), ("held_out_images", True)):
        try:
            paths = [path for path in (folder / name).iterdir() if path.suffix.lower() == ".png"]
            for path in sorted(paths, key=lambda path: natural_order(path.stem)):
                data = path.read_bytes()
                if data.startswith(_PNG_START) and data.endswith(_PNG_END):
                    sha256 = hashlib.sha256(data).hexdigest()
                    found.append({"file": f"{name}/{path.name}", "sha256": sha256, "held_out": held_out})
        except OSError as err:
            logger.debug("%s could not be read: %s.", folder / name, err)
    return found


def _read_manifests(folder: Path) -> list[dict[str, Any]]:
    found = []
    try:
        names = sorted(
            (path.name for path in folder.iterdir() if GENERATION_NAME.match(path.name)),
            key=lambda name: (int(name.split("-")[0]), name),
        )
    except OSError as err:
        logger.debug("%s could not be listed: %s.", folder, err)
        return []
    for name in names:
        if manifest := read_object(folder / name / "manifest.json"):
            found.append({**manifest, "name": name})
    return found
