"""Which ControlNet belongs to which base model and which web UI: controlnets.toml as rows, and refusals that help."""

import difflib
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fastsd_helpers.downloads import HubFile, Wanted, fetch
from fastsd_helpers.downloads.table import read_table
from fastsd_helpers.errors import ModelError, ModelNotFound
from fastsd_helpers.registry import find_model

__all__ = [
    "UIS",
    "ControlNet",
    "controlnet_file",
    "controlnets",
    "family_of_base",
    "fetch_controlnet",
    "find_controlnet",
    "find_controlnets",
    "tasks",
    "total_bytes",
]

# Everything here that can run a ControlNet, and what it is called.
UIS = {
    "a1111": "AUTOMATIC1111",
    "forge-neo": "Forge Neo",
    "comfyui": "ComfyUI",
    "playground": "the playground",
}


@dataclass(frozen=True)
class ControlNet:
    """One ControlNet, T2I adapter or control LoRA."""

    key: str
    title: str
    family: str  # of base models it works with: sd15, sd21, sdxl, flux
    tasks: tuple[str, ...]  # canny, depth, ...; a union model has many
    preprocessor: str  # of the ControlNet extension and Forge, for the first task
    repo: str
    file: str
    save_as: str  # the name by which the extension tells base family and control type
    bytes: int  # 0: not known
    bytes_exact: bool  # False: rounded, from a published listing
    uis: tuple[str, ...]
    licence: str
    kind: str = "controlnet"  # controlnet, t2i-adapter, control-lora
    sha256: str | None = None
    revision: str | None = None
    recommended: bool = False  # the first choice for its tasks
    gated: bool = False
    checked: str = "never"  # date of the last comparison with the Hub
    note: str = ""


@functools.cache
def controlnets() -> tuple[ControlNet, ...]:
    """Every row of controlnets.toml, in its order."""
    table = dict(read_table("controlnets.toml"))
    groups = table.pop("groups")
    rows = []
    for key, row in table.items():
        values = groups[row["group"]] | row
        about, size = values.pop("about_bytes", 0), values.pop("bytes", None)
        values |= {name: tuple(values[name]) for name in ("tasks", "uis")}
        values.setdefault("save_as", values["file"].rsplit("/", 1)[-1])
        del values["group"]
        rows.append(ControlNet(key, bytes=size or about, bytes_exact="bytes" in row, **values))
    return tuple(rows)


def family_of_base(base: str) -> str:
    """The family that ControlNets go by, for a registry key (`sd21-768`) or a family name (`sd21`).

    Args:
        base: a registry key or a family name.

    Raises:
        ModelNotFound: neither.
        ModelError: there are no ControlNets for it.
    """
    families = {row.family for row in controlnets()}
    if base in families:
        return base
    spec = find_model(base)
    family = spec.family.removesuffix("-inpaint").removesuffix("-refiner")
    # The built-in model has a shape of its own, which no published ControlNet has.
    if family not in families or spec.folder:
        raise ModelError(
            f"'{base}' is not a base model for ControlNets.", f"There are some for {', '.join(sorted(families))}."
        )
    return family


def tasks(base: str, *, ui: str | None = None) -> list[str]:
    """The tasks there is a ControlNet for, in the order of the table: what a dropdown offers.

    Args:
        base: a registry key or a family name.
        ui: a web UI's key; None: whatever runs there.
    """
    return list(dict.fromkeys(task for row in find_controlnets(base, ui=ui) for task in row.tasks))


def find_controlnets(base: str, *, ui: str | None = None, task: str | None = None) -> list[ControlNet]:
    """Every ControlNet that works with a base model, in a web UI and for a task when those are named.

    Args:
        base: a registry key such as `sdxl`, or a family.
        ui: a key of UIS; a wrong one raises ModelError with the right ones.
        task: such as `canny`; nothing for it gives an empty list.
    """
    family = family_of_base(base)
    if ui is not None:
        _require_ui(ui)
    return [
        row
        for row in controlnets()
        if row.family == family and (ui is None or ui in row.uis) and (task is None or task in row.tasks)
    ]


def find_controlnet(base: str, task: str, *, ui: str) -> ControlNet:
    """The ControlNet to take for a base model, a task (`canny`) or a row's key, in a web UI.

    Args:
        base: a registry key or a family name.
        task: `canny`, `openpose` ..., or a row's key.
        ui: a web UI's key.

    Raises:
        ModelNotFound: no such task or key.
        ModelError: it exists, but not for this base model or this UI; the hint says what works instead.
    """
    family, wanted = family_of_base(base), task.strip().lower()
    _require_ui(ui)
    named = next((row for row in controlnets() if row.key == wanted), None)
    if named is not None and named.family == family and ui in named.uis:
        return named
    if named is not None:
        wanted = named.tasks[0]
        if named.family != family:
            raise _impossible(f"{named.title} is for {named.family}, and {base} is {family}.", family, wanted, ui)
        raise _impossible(f"{UIS[ui]} cannot run {named.title}.", family, wanted, ui)
    here = find_controlnets(family, ui=ui, task=wanted)
    if here:
        return next((row for row in here if row.recommended), here[0])
    elsewhere = find_controlnets(family, task=wanted)
    if elsewhere:
        raise _impossible(f"{UIS[ui]} runs no {wanted} ControlNet for {base}.", family, wanted, ui)
    if any(wanted in row.tasks for row in controlnets()):
        raise _impossible(f"There is no {wanted} ControlNet for {base}.", family, wanted, ui)
    there = find_controlnets(family, ui=ui)
    fitting = list(dict.fromkeys(name for row in there for name in row.tasks))
    # Another family's is guessed only where this one has nothing like it.
    close = difflib.get_close_matches(wanted, [*fitting, *(row.key for row in there)], n=1)
    close = close or difflib.get_close_matches(wanted, [row.key for row in controlnets()], n=1)
    guess = f"Did you mean '{close[0]}'? " if close else ""
    raise ModelNotFound(
        f"No ControlNet for '{task}'.", f"{guess}For {base} in {UIS[ui]}: {', '.join(fitting) or 'none'}."
    )


def _require_ui(ui: str) -> None:
    if ui not in UIS:
        raise ModelError(f"'{ui}' is not a web UI known here.", f"Choose one of {', '.join(UIS)}.")


def _impossible(problem: str, family: str, task: str, ui: str) -> ModelError:
    """A refusal with what would work: the same task in this UI, else in another one, else other tasks in this one."""
    here = find_controlnets(family, ui=ui, task=task)
    if here:
        best = next((row for row in here if row.recommended), here[0])
        return ModelError(problem, f"Use '{best.key}' ({best.title}) instead.")
    others = list(dict.fromkeys(UIS[name] for row in find_controlnets(family, task=task) for name in row.uis))
    if others:
        what = f"{task} works with {family} in {_listed(others)}"
        more = tasks(family, ui=ui)
        return ModelError(problem, f"{what}; {UIS[ui]} has {', '.join(more)}." if more else f"{what}.")
    there = tasks(family, ui=ui)
    if there:
        return ModelError(problem, f"For {family} there are: {', '.join(there)}.")
    uis = list(dict.fromkeys(UIS[name] for row in find_controlnets(family) for name in row.uis))
    return ModelError(problem, f"ControlNets for {family} run in {_listed(uis)}.")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def total_bytes(rows: Iterable[ControlNet]) -> int:
    """What fetching these takes on disk; a row whose size is not known counts as 0.

    Args:
        rows: ControlNets of the table.
    """
    return sum(row.bytes for row in rows)


def fetch_controlnet(row: ControlNet, folder: Path) -> Path:
    """Download a ControlNet into a folder, under the name by which a web UI recognises it; a whole copy there is kept.

    Args:
        row: the ControlNet, as `find_controlnet` gives it.
        folder: where it goes; made when it is absent.

    Returns:
        The file.

    Raises:
        DownloadError: see `downloads.fetch`.
        DiskFull: see `downloads.fetch`.
        DriveError: see `downloads.fetch`.
    """
    wanted = controlnet_file(row, folder)
    return fetch(wanted.source, folder, name=wanted.name, size=wanted.size, sha256=wanted.sha256)


def controlnet_file(row: ControlNet, folder: Path) -> Wanted:
    """What to ask `downloads.fetch_all` for to get a ControlNet into a folder.

    Args:
        row: the ControlNet, as `find_controlnet` gives it.
        folder: where it goes.
    """
    return Wanted(
        HubFile(row.repo, row.file, row.revision),
        folder,
        name=row.save_as,
        size=row.bytes if row.bytes_exact else None,
        sha256=row.sha256,
    )
