"""The commands `fastsd webui`, `fastsd tunnel` and `fastsd playground`."""

import argparse
import json
import sys
from typing import Any

from fastsd_helpers import playground, tunnels, webui
from fastsd_helpers.cli.answers import Answer, pairs, plain
from fastsd_helpers.cli.flags import command, command_group, given_values
from fastsd_helpers.cli.sharing import link_settings, show, show_link
from fastsd_helpers.errors import FastSDError, SettingsError, TunnelError
from fastsd_helpers.playground import PlaygroundConfig
from fastsd_helpers.processes import LogTail
from fastsd_helpers.tunnels import TunnelConfig
from fastsd_helpers.webui import ControlNetConfig
from fastsd_helpers.webui.flags import GPUS
from fastsd_helpers.webui.placing.bundles import T5_SIZES
from fastsd_helpers.webui.placing.model_files import KINDS
from fastsd_helpers.webui.running import circumstances, process
from fastsd_helpers.webui.settings import InstallConfig, LaunchConfig

__all__ = ["add_commands"]


def add_commands(commands: Any) -> None:
    """Add `webui`, `tunnel` and `playground` to the parser; help and limits come from the settings classes."""
    group = command_group(commands, "webui")
    command(group, "install", install, InstallConfig)
    command(group, "launch", launch, LaunchConfig, choices={"--gpu": sorted(GPUS)})
    known = {"--gpu": sorted(GPUS), "--kind": ("auto", *KINDS), "--t5": T5_SIZES}
    command(group, "place", place_models, choices=known)
    command(group, "status", status)
    command(group, "log", show_log)
    command(group, "stop", stop)
    command(commands, "tunnel", tunnel, TunnelConfig)
    command(commands, "playground", play, PlaygroundConfig)


def install(chosen: argparse.Namespace) -> Answer:
    values = given_values(chosen, InstallConfig)
    if chosen.extension:
        values["extensions"] = ",".join([*filter(None, [values.get("extensions", "")]), *chosen.extension])
    result = webui.install_webui(InstallConfig(**values))
    lines = [f"Installed: {result.path}"]
    lines += [f"Extensions: {', '.join(result.extensions)}"] if result.extensions else []
    lines += [f"Switched off: {name}: {why}" for name, why in result.switched_off.items()]
    return Answer(plain(result), [*lines, f"Next: fastsd webui launch --ui {result.ui}"])


def launch(chosen: argparse.Namespace) -> Answer:
    config = LaunchConfig(**given_values(chosen, LaunchConfig))
    ignored = [flag for flag in ("gpu", "family") if getattr(chosen, flag) and not chosen.dry_run]
    if ignored:
        raise SettingsError(f"--{ignored[0]} has an effect only with --dry-run.", "Add --dry-run, or leave it out.")
    # What is wrong with a link is said before anything starts.
    link = link_settings(chosen, getattr(chosen, "share", None), user=config.user, password=config.password)
    machine = GPUS.get(chosen.gpu)
    if chosen.dry_run:
        planned = webui.plan(config, machine=machine, family=chosen.family, root=chosen.root)
        files = [file.about() for file in planned.files]
        said = {"lines": planned.lines(), "path": planned.cwd, "port": planned.port, "files": files}
        return Answer(said, [*planned.lines(), "Nothing was started."])
    if link is not None:
        tunnels.require_shareable(link)
    running = webui.launch(config, show=lambda line: print(line, file=sys.stderr, flush=True), root=chosen.root)
    data: dict[str, Any] = {"url": running.url, "port": running.port, "log": running.log}
    data["model_loaded"] = running.model_loaded
    try:
        if link is not None:
            data |= _link_or_sentence(running, link, chosen)
        elif running.ui.has_login:
            show(_local_block(running))
        if not chosen.background:
            code = running.wait()
            problem = running.problem()
            if problem is not None and code != 0:
                raise problem
    except BaseException:
        running.stop()
        raise
    if not chosen.background:
        return Answer(data, [f"{running.ui.title} ended."])
    if data.get("problem"):
        raise TunnelError(f"{running.ui.title} runs, but it is not shared: {data['problem']}", data["hint"])
    return Answer(data, [f"{running.ui.title} runs. Stop it with: fastsd webui stop --ui {running.ui.key}"])


def _link_or_sentence(running: Any, link: Any, chosen: argparse.Namespace) -> dict[str, Any]:
    """Show the link; one that fails now leaves the web UI running, with its own address and login."""
    try:
        if chosen.background:
            held = webui.share_in_background(running, link)
            return show_link(held, chosen.json, ends="It ends with the web UI.")
        return show_link(webui.share(running, link, on_change=lambda new: show_link(new, chosen.json)), chosen.json)
    except FastSDError as err:
        login = running.login if running.ui.has_login else None
        told = {"url": running.url, "kind": None, "problem": err.problem, "hint": err.hint}
        shown = told | ({"user": login.user, "password": login.password} if login else {})
        words = f"It is not shared, and keeps running. {err.problem} {err.hint}"
        show(json.dumps(shown) if chosen.json else f"{_local_block(running)}\n{words}")
        return told


def _local_block(running: Any) -> str:
    return "\n".join([f"Link:      {running.url}", *(running.login.lines() if running.ui.has_login else [])])


def place_models(chosen: argparse.Namespace) -> Answer:
    ui = webui.find_ui(chosen.ui)
    places = webui.find_places(ui, folder=chosen.folder, store=chosen.store)
    if chosen.kind == "controlnet" and chosen.model == "all" and chosen.base:
        placed = webui.place_controlnets(ControlNetConfig(tasks="all", base=chosen.base), ui, places)
    elif chosen.kind == "controlnet":
        placed = [webui.place_controlnet(chosen.base, chosen.model, ui, places)]
    else:
        machine = GPUS.get(chosen.gpu)
        placed = webui.place(
            chosen.model, ui, places, kind=chosen.kind, machine=machine, t5=chosen.t5, root=chosen.root
        )
    lines = [f"{ui.title} can load it now ({model.kind}, {model.how}): {model.path}" for model in placed]
    return Answer({**plain(placed[0]), "placed": [plain(model) for model in placed]}, lines)


def status(chosen: argparse.Namespace) -> Answer:
    state, runs = webui.status(chosen.ui, folder=chosen.folder, store=chosen.store)
    if state is None:
        return Answer({"running": False}, ["It was not started here."])
    data = {"running": runs, "ui": state.ui, "pid": state.pid, "port": state.port, "log": state.log}
    link = webui.background_link(chosen.ui, folder=chosen.folder, store=chosen.store)
    data |= {"link": link.url} if link is not None else {}
    lines = [f"{state.title} {'runs' if runs else 'does not run'}.", *pairs(data)]
    places = webui.find_places(webui.find_ui(chosen.ui), folder=chosen.folder, store=chosen.store)
    trouble = circumstances.find_store_trouble(state.title, places) if runs else process.find_end(places)
    if trouble is not None:
        data |= {"problem": trouble.problem, "hint": trouble.hint}
        lines += [trouble.problem, trouble.hint]
    return Answer(data, lines)


def show_log(chosen: argparse.Namespace) -> Answer:
    state, _runs = webui.status(chosen.ui, folder=chosen.folder, store=chosen.store)
    if state is None:
        return Answer({"log": None, "lines": []}, ["It was not started here, so there is no log."])
    tail = LogTail(state.log)
    tail.read()
    return Answer({"log": state.log, "lines": list(tail.last)}, [*tail.last, f"Full log: {state.log}"])


def stop(chosen: argparse.Namespace) -> Answer:
    stopped = webui.stop(chosen.ui, folder=chosen.folder, store=chosen.store)
    return Answer({"stopped": stopped}, ["Stopped." if stopped else "It does not run."])


def tunnel(chosen: argparse.Namespace) -> Answer:
    config = TunnelConfig(**given_values(chosen, TunnelConfig))
    with webui.share_port(chosen.number, config, on_change=lambda link: show_link(link, chosen.json)) as link:
        data = show_link(link, chosen.json)
        link.wait()
    return Answer(data | {"closed": True}, ["The link is closed."])


def play(chosen: argparse.Namespace) -> Answer:
    config = PlaygroundConfig(**given_values(chosen, PlaygroundConfig))
    link = link_settings(chosen, config.share)
    with playground.open_playground(chosen.model, config, tunnel=link) as page:
        show(json.dumps(page.about()) if chosen.json else page.block())
        page.wait()
    return Answer({"url": page.url, "closed": True}, ["The playground is closed."])
