"""Install a set of wheels.lock: the difference only, with uv (or pip), hash-checked, then proved by importing it."""

import contextlib
import hashlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import FastSDError, InstallError
from fastsd_helpers.files import check_room
from fastsd_helpers.processes import LockHeld, file_lock
from fastsd_helpers.runtime import install_command, logger
from fastsd_helpers.wheels.cache import WheelCache
from fastsd_helpers.wheels.difference import Change, Plan, has_all, make_plan, matches, names_to_ask
from fastsd_helpers.wheels.environment import Environment, read_environment
from fastsd_helpers.wheels.lockfile import Lock, read_lock
from fastsd_helpers.wheels.proof import prove
from fastsd_helpers.wheels.tools import run_from_cache, run_plan
from fastsd_helpers.wheels.unproved import Unproved, read_unproved, write_unproved

__all__ = ["InstallReport", "imported_versions", "install", "one_at_a_time"]

_UNPACKED = 4  # a wheel's room once it is unpacked, as a multiple of its size; the download itself is within
_WAIT_S = 600.0  # for another installation into the same Python


@dataclass(frozen=True)
class InstallReport:
    """What an installation did, or would do."""

    name: str
    python: str  # version
    path: Path  # its interpreter
    changes: tuple[Change, ...]
    kept: int
    bytes: int
    seconds: float
    tool: str  # uv, pip, or none when nothing was missing
    restart: tuple[str, ...] = ()  # packages this process has imported at another version: restart it
    modules: tuple[str, ...] = ()  # imported in a fresh interpreter as proof
    dry_run: bool = False
    unproved: tuple[str, ...] = ()  # installed earlier and not yet seen to import: the next real run looks again
    left: tuple[str, ...] = ()  # yours, newer than what was tried here, and left as it is

    def lines(self) -> list[str]:
        """The report for people."""
        if not self.changes:
            lines = [
                f"Everything '{self.name}' needs is here already: {self.kept} packages checked in {self.seconds:.1f} s."
            ]
            if self.modules:
                lines.append(f"Import check passed now: {', '.join(self.modules)}.")
            if self.unproved:
                listed = ", ".join(self.unproved)
                lines.append(f"Import check not passed yet: {listed}. `fastsd install {self.name}` tries again.")
            return [*lines, *self._left_lines()]
        verb = "Would install" if self.dry_run else "Installed"
        size = f"{self.bytes / 1e6:.1f} MB"
        lines = [f"{verb} {len(self.changes)} of {len(self.changes) + self.kept} packages ({size}) for '{self.name}':"]
        for change in self.changes:
            arrow = f"{change.before} -> {change.after}" if change.before else change.after
            lines.append(f"  {change.name} {arrow}  ({change.bytes / 1e6:.1f} MB; {change.reason})")
        if not self.dry_run:
            proved = f"; {len(self.modules)} modules pass the import check in a fresh Python" if self.modules else ""
            lines.append(f"Done in {self.seconds:.1f} s with {self.tool}{proved}.")
        if self.restart:
            lines.append(
                f"Restart the runtime now: {', '.join(self.restart)} was imported here before and "
                "has another version now (Colab: Runtime > Restart session)."
            )
        return [*lines, *self._left_lines()]

    def _left_lines(self) -> list[str]:
        return [f"Newer than the tested version, and not changed: {', '.join(self.left)}."] if self.left else []


def install(
    name: str,
    *,
    python: Path | str | None = None,
    wheel_folder: Path | None = None,
    cache: Path | None = None,
    offline: bool | None = None,
    skip: Iterable[str] = (),
    lock: Path | None = None,
    dry_run: bool = False,
    check_imports: bool = True,
    timeout_s: float = 1800,
) -> InstallReport:
    """Install what a set asks for and a Python lacks; with nothing missing it returns at once.

    Everything is downloaded and its sha256 compared before the first file is changed. Two installations into one Python
    wait for each other.

    Args:
        name: a set of wheels.lock: `dreambooth`, `webui`, `trocr`, `trocr-int8`, or a web UI's such as `a1111`.
        python: the interpreter or the folder of the environment to install into; this very Python when None. The set
            of a web UI is never installed into this one: see `make_environment`.
        wheel_folder: a folder of wheels and archives to install from, by their names in the lock.
        cache: a folder, such as one on Drive, that keeps the wheels of this set in one archive: what is in it, and is
            what the lock names, is not downloaded again; what had to be is put into it.
        offline: ask no network; default: only with a `wheel_folder`. False with one: the rest comes from the index.
        skip: names or patterns (`torch`, `nvidia-*`) that the caller installs otherwise.
        lock: another lock file.
        dry_run: only show what would be installed.
        check_imports: import every new module in a fresh Python afterwards.
        timeout_s: how long uv or pip may take.

    Returns:
        What was or would be installed, what stays, bytes and seconds; `lines()` is the report for people.

    Raises:
        InstallError: it failed; nothing was changed unless the sentence says so.
        DependencyMissing: neither uv nor pip.
        DiskFull: not enough room.
    """
    started, found, skip = time.monotonic(), read_lock(lock), tuple(skip)
    plan, waiting = _look(found, name, python, skip, check_imports)
    if dry_run or not (plan.changes or waiting):
        return _report(plan, started, "none", dry_run=dry_run, unproved=tuple(sorted(waiting)))
    environment, tool, imported = plan.environment, "none", {}
    if plan.changes:
        _check_place(plan)
    modules: tuple[str, ...] = ()
    with one_at_a_time(environment.prefix):
        plan, waiting = _look(found, name, python, skip, check_imports)  # another one may have done it meanwhile
        if plan.changes:
            imported = imported_versions(plan) if environment.is_this else {}
            tool = _change(plan, python, wheel_folder, cache, offline, timeout_s)
            # What had been uninstalled, and was imported before that, has a name again only now.
            imported = (imported_versions(plan, uninstalled=True) if environment.is_this else {}) | imported
        names = list(dict.fromkeys([*(row.name for row in plan.rows), *waiting]))
        if names and check_imports:
            modules = _prove(environment, names, plan.left)
        _forget(environment.site, names)
    return _report(plan, started, tool, restart=_to_restart(plan, imported), modules=modules)


def _look(
    lock: Lock, name: str, python: Path | str | None, skip: tuple[str, ...], check_imports: bool
) -> tuple[Plan, dict[str, Unproved]]:
    plan = _plan(lock, name, python, skip)
    return plan, _waiting_for_proof(plan, skip) if check_imports else {}


def _to_restart(plan: Plan, imported: dict[str, str]) -> tuple[str, ...]:
    now = {row.name: row.version for row in plan.rows}
    return tuple(sorted(package for package, version in imported.items() if now.get(package) != version))


def _waiting_for_proof(plan: Plan, skip: tuple[str, ...]) -> dict[str, Unproved]:
    """Packages of the set that an earlier run installed and did not see work, as long as they are what it installed."""
    installed = plan.environment.installed
    return {
        name: note
        for name, note in read_unproved(plan.environment.site).items()
        if plan.lock_set.row(name) and installed.get(name) == note.version and not matches(name, skip)
    }


def _change(
    plan: Plan,
    python: Path | str | None,
    wheel_folder: Path | None,
    cache: Path | None,
    offline: bool | None,
    timeout_s: float,
) -> str:
    """Install the plan's rows, with a note of them until each is proved; returns the tool's name."""
    environment, count = plan.environment, len(plan.changes)
    told = "Installing %d package%s (%.0f MB) for '%s' into %s."
    logger.info(told, count, "s"[: count != 1], plan.bytes / 1e6, plan.lock_set.name, environment.prefix)
    site, names = environment.site, [row.name for row in plan.rows]
    earlier = read_unproved(site)
    # Written first: whatever ends this process, the next one knows which packages may be there in part.
    write_unproved(site, earlier | {row.name: Unproved(row.version, whole=False) for row in plan.rows})
    try:
        if cache is not None and wheel_folder is None:
            tool = run_from_cache(plan, WheelCache(cache, plan.lock_set), bool(offline), timeout_s)
        else:
            tool = run_plan(plan, wheel_folder, wheel_folder is not None if offline is None else offline, timeout_s)
    except FastSDError:
        after = read_environment(python, names).installed
        before = environment.installed
        kept = {name: note for name, note in read_unproved(site).items() if before.get(name) != after.get(name)}
        write_unproved(site, earlier | kept)
        raise
    after = read_environment(python, names).installed
    wrong = [row.name for row in plan.rows if after.get(row.name, "").partition("+")[0] != row.version]
    if wrong:
        raise InstallError(
            f"{tool} reported success, but {', '.join(wrong)} is not installed as locked.",
            "Run this again; if the problem persists, restart the runtime first.",
        )
    write_unproved(site, earlier | {name: Unproved(after[name], whole=True) for name in names})
    return tool


def _prove(environment: Environment, names: list[str], left: tuple[str, ...]) -> tuple[str, ...]:
    """Import the packages in a fresh interpreter; what does not work stays noted. Returns the modules."""
    modules, problems = prove(environment, names)
    if problems:
        bad = {problem.partition(":")[0] for problem in problems}
        _forget(environment.site, [name for name in names if name not in bad])
        more = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        hint = "Restart the runtime and run this again."
        if left:
            hint += f" The cause may be packages newer than the tested version: {', '.join(left)}."
        raise InstallError(
            f"The packages were installed, but one does not work: {problems[0]}{more}",
            f"{hint} If the problem persists, report it with `fastsd doctor`.",
        )
    return tuple(modules)


def _forget(site: Path, names: Iterable[str]) -> None:
    notes = read_unproved(site)
    if notes:
        write_unproved(site, {name: note for name, note in notes.items() if name not in set(names)})


def _plan(lock: Lock, name: str, python: Path | str | None, skip: tuple[str, ...]) -> Plan:
    candidates = [item for item in lock.sets if item.name == name]
    names = set().union(*(names_to_ask(item) for item in candidates))
    environment = read_environment(python, names)
    spare = next((item for item in candidates if has_all(item, environment, skip=skip)), None)
    here = environment.minor, environment.platform
    if spare is not None and not any((item.python, item.platform) == here for item in candidates):
        # Installed by hand, where no set fits: there is nothing to do, and nothing to complain about.
        return Plan(spare, environment, changes=(), rows=(), kept=len(spare.wanted))
    lock_set = lock.find(name, environment.minor)
    if lock_set.own_environment and environment.is_this:
        raise InstallError(
            f"'{name}' needs an environment of its own: its old packages would break this Python.",
            f"Use `fastsd webui install --ui {name}`, or give the interpreter of a new environment.",
        )
    if lock_set.platform != environment.platform:
        raise InstallError(
            f"wheels.lock was made for {lock_set.platform}, and this is {environment.platform}.",
            f"Install without the lock: {install_command(name)}",
        )
    # What an earlier run was cut short with may be there in part only: it counts as missing, and is written anew.
    cut_short = {
        name
        for name, note in read_unproved(environment.site).items()
        if not note.whole and lock_set.row(name) and environment.installed.get(name) == note.version
    }
    if cut_short:
        rest = {name: version for name, version in environment.installed.items() if name not in cut_short}
        environment = replace(environment, installed=rest)
    plan = make_plan(lock_set, environment, skip=skip)
    return replace(plan, in_part=tuple(row.name for row in plan.rows if row.name in cut_short))


def _report(plan: Plan, started: float, tool: str, **more: Any) -> InstallReport:
    return InstallReport(
        name=plan.lock_set.name,
        python=plan.environment.version,
        path=plan.environment.python,
        changes=plan.changes,
        kept=plan.kept,
        bytes=plan.bytes,
        seconds=time.monotonic() - started,
        tool=tool,
        left=plan.left,
        **more,
    )


def imported_versions(plan: Plan, *, uninstalled: bool = False) -> dict[str, str]:
    """The packages of the plan that this process has imported, with the version it has in memory.

    With `uninstalled` only those whose module says its version: nothing else is left of what was there.
    """
    import importlib.metadata

    changed = {row.name for row in plan.rows}
    found = {}
    for module, packages in importlib.metadata.packages_distributions().items():
        for package in packages:
            name = re.sub(r"[-_.]+", "-", package).lower()
            if name in changed and module in sys.modules:
                version = getattr(sys.modules[module], "__version__", None)
                if version or not uninstalled:
                    found[name] = str(version or plan.environment.installed.get(name))
    return found


def _check_place(plan: Plan) -> None:
    environment = plan.environment
    if environment.managed:
        raise InstallError(
            f"The Python {environment.python} belongs to the operating system, which allows no packages in it.",
            "Make an environment (python3 -m venv .venv) and run this with its Python.",
        )
    try:
        with tempfile.TemporaryFile(dir=environment.site):
            pass
    except OSError as err:
        raise InstallError(
            f"Packages cannot be written to {environment.site}: {err.strerror}.",
            "Make an environment (python3 -m venv .venv) and run this with its Python.",
        ) from err
    what, hint = f"'{plan.lock_set.name}'", "Free some space on this machine (not on Drive), then run this again."
    check_room(environment.site, plan.bytes * _UNPACKED, what, hint=hint)


@contextlib.contextmanager
def one_at_a_time(prefix: Path) -> Iterator[None]:
    """Hold a lock for one Python, which goes with this process however that ends."""
    name = hashlib.sha256(str(prefix.resolve()).encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"fastsd-install-{os.getuid()}-{name}.lock"

    def waiting() -> None:
        logger.info("Another installation into %s is running; waiting for it.", prefix)

    with contextlib.ExitStack() as held:
        try:
            held.enter_context(file_lock(path, wait_s=_WAIT_S, waiting=waiting, mode=0o600))
        except LockHeld as err:
            raise InstallError(
                f"Another installation into {prefix} has been running for {_WAIT_S / 60:.0f} minutes.",
                "Wait for it, or stop it, then run this again.",
            ) from err
        except OSError as err:
            raise InstallError(
                f"The file {path}, the installation lock, cannot be opened: {err.strerror}.",
                "Delete it, or set TMPDIR to a folder of your own, then run this again.",
            ) from err
        yield
