"""The commands about models: `fastsd models` and `fastsd controlnet`."""

import argparse
from pathlib import Path
from typing import Any

from fastsd_helpers import controlnet, downloads, files, model_lookup, registry
from fastsd_helpers.cli.answers import Answer, pairs, plain, table
from fastsd_helpers.cli.flags import command, command_group
from fastsd_helpers.errors import FastSDError, ModelError
from fastsd_helpers.runtime import logger
from fastsd_helpers.webui.placing import bundles
from fastsd_helpers.wording import size_in_words

__all__ = ["add_commands"]

_UNCHECKED = "Sizes and hashes are from published lists; a download that does not match its hash is refused."


def add_commands(commands: Any) -> None:
    """Add the groups `models` and `controlnet` to the parser."""
    models = command_group(commands, "models")
    command(models, "list", list_models)
    command(models, "show", show_model)
    command(models, "get", get_model)
    controls = command_group(commands, "controlnet")
    command(controls, "list", list_controlnets)
    command(controls, "get", get_controlnets)


def list_models(chosen: argparse.Namespace) -> Answer:
    found = registry.models(None if chosen.all else "base")
    rows = []
    for spec in found:
        draw = spec.vram_gb.get("draw")
        rows.append(
            [
                spec.key,
                spec.kind,
                spec.family,
                f"{spec.native_px} px" if spec.prediction_type != "none" else "-",
                size_in_words(spec.bytes) if spec.bytes else "-",
                f"{draw:g} GB" if draw else "-",
                spec.licence + (" (token needed)" if spec.gated else ""),
                spec.checked,
            ]
        )
    head = ["KEY", "KIND", "FAMILY", "RESOLUTION", "SIZE", "GPU", "LICENCE", "CHECKED ONLINE"]
    lines = table(head, rows)
    if all(spec.checked == "never" for spec in found):  # a column of one word is no news
        lines = [*table(head[:-1], [row[:-1] for row in rows]), _UNCHECKED]
    trained = ", ".join(spec.key for spec in found if spec.trainable and spec.kind == "base")
    lines.append(
        f"GPU: memory to generate images; training takes more: fastsd models show KEY. Trained here: {trained}."
    )
    return Answer({"models": found}, lines)


def show_model(chosen: argparse.Namespace) -> Answer:
    spec = registry.find_model(chosen.key)
    data = {**plain(spec), "runs_in": list(bundles.runs_in(spec))}
    return Answer(data, pairs(data))


def get_model(chosen: argparse.Namespace) -> Answer:
    ref, name = chosen.ref, model_lookup.understand(chosen.ref)
    kind = name.spec.kind if name.spec else ""
    if kind == "reader":
        return _folder_answer(model_lookup.find_folder(ref, model_lookup.READER), None)
    if name.what not in ("link", "file") and kind in ("", "base") and not chosen.file:
        folder = model_lookup.fetch_model(ref)
        return _folder_answer(folder, downloads.model_hash(folder))
    path = downloads.fetch(ref, chosen.to, name=chosen.name, sha256=chosen.sha256, overwrite=chosen.overwrite)
    data: dict[str, Any] = {
        "path": path,
        "bytes": path.stat().st_size,
        "sha256": files.sha256_of(path),
        "kind": downloads.describe_content(path),
    }
    facts = {**data, "path": "", "bytes": size_in_words(data["bytes"])}
    lines = [f"Downloaded and verified: {path}", *pairs(facts)[1:]]
    return Answer(data, lines)


def _folder_answer(folder: Path, sha256: str | None) -> Answer:
    count = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    data = {"path": folder, "bytes": count, "sha256": sha256, "kind": "folder"}
    return Answer(data, [f"Downloaded and verified: {folder} ({size_in_words(count)})"])


def list_controlnets(chosen: argparse.Namespace) -> Answer:
    found = controlnet.find_controlnets(chosen.base, ui=chosen.ui, task=chosen.task)
    if not found and chosen.task:  # says what works instead
        controlnet.find_controlnet(chosen.base, chosen.task, ui=chosen.ui or next(iter(controlnet.UIS)))
    if not found:
        others = sorted({controlnet.UIS[ui] for row in controlnet.find_controlnets(chosen.base) for ui in row.uis})
        where = f" in {controlnet.UIS[chosen.ui]}" if chosen.ui else ""
        raise ModelError(
            f"There is no {chosen.task or ''} ControlNet for {chosen.base}{where}.".replace("no  ", "no "),
            f"ControlNets for it run in {', '.join(others)}.",
        )
    rows = [
        [
            row.key + (" *" if row.recommended else ""),
            ", ".join(row.tasks),
            ("" if row.bytes_exact else "~") + size_in_words(row.bytes) if row.bytes else "-",
            row.preprocessor,
            row.save_as,
            ", ".join(row.uis),
        ]
        for row in found
    ]
    unknown = sum(row.bytes == 0 for row in found)
    more = f", and {unknown} of unknown size" if unknown else ""
    lines = table(["KEY", "TASKS", "SIZE", "PREPROCESSOR", "SAVED AS", "RUNS IN"], rows)
    whole = size_in_words(controlnet.total_bytes(found))
    lines.append(f"{len(found)} files, {whole} in all{more}. * is the recommended one for its tasks.")
    return Answer({"controlnets": found, "bytes": controlnet.total_bytes(found), "unknown_sizes": unknown}, lines)


def get_controlnets(chosen: argparse.Namespace) -> Answer:
    if chosen.what == "all":
        wanted = controlnet.find_controlnets(chosen.base, ui=chosen.ui)
    else:
        wanted = [controlnet.find_controlnet(chosen.base, chosen.what, ui=chosen.ui)]
    if not wanted:
        controlnet.find_controlnet(chosen.base, "canny", ui=chosen.ui)
    logger.info("%d files, %s, to %s.", len(wanted), size_in_words(controlnet.total_bytes(wanted)), chosen.to)
    results = downloads.fetch_all([controlnet.controlnet_file(row, chosen.to) for row in wanted])
    failed = [result for result in results if isinstance(result, FastSDError)]
    if len(failed) == len(results):
        raise failed[0]
    made: list[dict[str, Any]] = [
        {"key": row.key, "path": result} if isinstance(result, Path) else {"key": row.key, "error": result.problem}
        for row, result in zip(wanted, results, strict=True)
    ]
    lines = [f"{item['key']}  {item.get('path') or '✋ ' + item['error']}" for item in made]
    return Answer({"path": chosen.to, "controlnets": made, "failed": len(failed)}, lines)
