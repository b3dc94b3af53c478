"""The owner's extensions at an installation: added, brought back from the store, made ready, switched off by name."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fastsd_helpers.errors import DependencyMissing, DriveError, FastSDError, SettingsError, WebUIError
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.catalog import Repository, WebUI
from fastsd_helpers.webui.extensions.kept import (
    KeptExtension,
    bring_back,
    is_shared,
    keep,
    keep_settings,
    read_kept,
    restore_settings,
    write_kept,
)
from fastsd_helpers.webui.extensions.packages import prepare_extension, put_away, switch_off, switch_on
from fastsd_helpers.webui.extensions.repositories import clone, commit_of, revision_of
from fastsd_helpers.webui.places import Places
from fastsd_helpers.webui.settings import InstallConfig, read_extensions

__all__ = ["OwnExtensions"]

_Step = Callable[[str, Callable[[], Any]], None]


class OwnExtensions:
    """What an installation does with the extensions that its owner has named, now or earlier.

    Attributes:
        kept: those that were named earlier and are brought back.
        switched_off: name -> why it does not run.

    Raises:
        SettingsError: one to be taken out is none of them.
        WebUIError: the list in the store is damaged.
    """

    def __init__(self, ui: WebUI, places: Places, config: InstallConfig) -> None:
        self._ui, self._places, self._wait_s = ui, places, config.extension_wait_s
        self.switched_off: dict[str, str] = {}
        self._asked = {item.name: item for item in read_extensions(config.extensions)}
        self._list = {item.name: item for item in read_kept(places)}
        self._removed = [name for name in (part.strip() for part in config.remove_extensions.split(",")) if name]
        own = {item.folder.removeprefix("extension/") for item in ui.repositories}
        here = {*self._list, *(path.name for path in self._folders() if path.name not in own)}
        for name in self._removed:
            if name not in here or name in self._asked:
                raise SettingsError(
                    f"remove_extensions (--remove-extensions) has {name!r}, which is not one of your extensions.",
                    f"Yours are {', '.join(sorted(here))}." if here else "You have added none.",
                )
        rest = [item for name, item in self._list.items() if name not in self._removed and name not in self._asked]
        shared = is_shared(places.store)
        self.kept = [] if shared else rest
        if shared and rest:
            named = " ".join(f"--extension {item.address}@{item.commit}" for item in rest)
            logger.warning(
                "Other people can write to %s, so the extensions on its list are not installed automatically: %s. "
                "Those you trust: fastsd webui install %s",
                places.store,
                "; ".join(item.line() for item in rest),
                named,
            )

    def bring(self, step: _Step, mirrors: Mapping[str, str]) -> None:
        """Bring the code of every extension to its folder, and put those that were added on the list.

        One whose code cannot be had is left out, or stays at its earlier commit; both are said by name.

        Raises:
            DriveError: one cannot be taken out of the list.
        """
        places = self._places
        if self._removed:
            for name in self._removed:
                put_away(places, name)
            write_kept(places, [item for name, item in self._list.items() if name not in self._removed])
            logger.info("Removed: %s. Their settings stay in %s.", ", ".join(self._removed), places.kept_extensions)
        if self.kept:
            logger.info(
                "Your extensions, programs that run with all your rights: %s. Remove one with "
                "--remove-extensions NAME.",
                "; ".join(item.line() for item in self.kept),
            )
        for name in [*self._asked, *(item.name for item in self.kept)]:
            switch_on(places, name)
        ways: list[tuple[str, Callable[[], bool]]] = [
            *((item.name, partial(self._add, item, mirrors)) for item in self._asked.values()),
            *((kept.name, partial(self._bring_back, kept, mirrors)) for kept in self.kept),
        ]
        for name, bring in ways:
            try:
                step(f"extension {name}", bring)
            except FastSDError as err:
                if self._folder(name).is_dir():  # an earlier commit of it, which runs
                    logger.warning("The extension %s stays as it is here: %s %s", name, err.problem, err.hint)
                else:
                    self._switch_off(name, err)
        self._name_others()

    def _add(self, item: Repository, mirrors: Mapping[str, str]) -> bool:
        known = self._list.get(item.name)
        # "The newest" was found out when it was added; it stays until another commit is asked for.
        same = known is not None and (known.address, known.revision) == (item.urls[0], item.revision)
        folder = self._folder(item.name)
        fresh = not folder.exists()
        if known is not None and same and fresh:
            changed = self._bring_back(known, mirrors)
        else:
            changed = clone(item, folder, mirrors=mirrors)
            if fresh:
                restore_settings(item.name, folder, self._places)
        logger.warning(
            "The extension %s is a program: with every start of %s it runs with all your rights. Add only what you "
            "trust.",
            item.name,
            self._ui.title,
        )
        try:
            keep(item, folder, self._places)
        except DriveError as err:
            logger.warning(
                "The extension %s is here, but could not be kept for the next machine: %s %s",
                item.name,
                err.problem,
                err.hint,
            )
        return changed

    def _bring_back(self, item: KeptExtension, mirrors: Mapping[str, str]) -> bool:
        folder = self._folder(item.name)
        if folder.exists():
            here = commit_of(folder)
            if here != item.commit:
                logger.warning(
                    "The extension %s is at %s here, and kept at %s.%s",
                    item.name,
                    (here or "no commit")[:10],
                    item.commit[:10],
                    f" To keep this one: --extension {item.address}@{here}" if here else "",
                )
            return False
        try:
            there = bring_back(item, folder, self._places)
        except WebUIError as err:
            logger.warning("%s It is downloaded from %s instead.", err.problem, item.address)
            there = False
        if not there:
            clone(item.repository, folder, mirrors=mirrors)
            restore_settings(item.name, folder, self._places)
        return True

    def _name_others(self) -> None:
        """Extensions in the folder that are not on the list: an earlier version's are taken, others named."""
        known = {*self._asked, *(item.name for item in self.kept)}
        known |= {item.folder.removeprefix("extension/") for item in self._ui.repositories}
        for folder in self._folders():
            revision = revision_of(folder)
            if folder.name in known or folder.parent != self._places.extensions:
                continue
            if revision is not None and folder.name not in self._list:
                # Only an installation of ours writes that down.
                address, asked = revision
                keep(Repository(folder.name, f"extension/{folder.name}", (address,), asked), folder, self._places)
                logger.info("The extension %s of an earlier installation is kept from now on.", folder.name)
            elif commit_of(folder) is not None:
                logger.warning(
                    "The extension %s was not added here and is not kept. If it is yours: fastsd webui install "
                    "--extension %s",
                    folder.name,
                    folder,
                )

    def prepare(self, step: _Step) -> None:
        """Install what each extension asks for; one that fails is switched off, and said by name."""
        for name in self.running():
            try:
                step(
                    f"what {name} asks for",
                    partial(prepare_extension, self._ui, self._places, name, wait_s=self._wait_s),
                )
            except DependencyMissing:
                raise
            except FastSDError as err:
                self._switch_off(name, err)
        keep_settings(self._places)

    def _switch_off(self, name: str, err: FastSDError) -> None:
        self.switched_off[name] = err.problem
        known = name in self._list
        if self._folder(name).is_dir():
            switch_off(self._places, name)
            known = True
        logger.warning(
            "The extension %s is %s, and %s runs without it: %s %s To try it again run `fastsd webui install` again%s",
            name,
            "switched off" if known else "not added",
            self._ui.title,
            err.problem,
            err.hint,
            f"; to remove it: --remove-extensions {name}" if known else ".",
        )

    def running(self) -> list[str]:
        """Names of the owner's extensions that the web UI will find."""
        try:
            listed = {item.name for item in read_kept(self._places)}
        except (WebUIError, DriveError):
            listed = set()
        return sorted(name for name in {*listed, *self._asked} if self._folder(name).is_dir())

    def commits(self) -> dict[str, str]:
        """The commit of each that runs."""
        return {name: commit_of(self._folder(name)) or "" for name in self.running()}

    def _folder(self, name: str) -> Path:
        return self._places.extensions / name

    def _folders(self) -> list[Path]:
        places = (self._places.extensions, self._places.switched_off)
        return [path for place in places if place.is_dir() for path in sorted(place.iterdir()) if path.is_dir()]
