"""An evaluation as one HTML file: the rates, the tables, and the worst lines with their images."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastsd_helpers.files import write_atomic
from fastsd_helpers.trocr.pages.inputs import gather
from fastsd_helpers.trocr.reading.dataset import LineSet
from fastsd_helpers.trocr.teaching.evaluation import Evaluation

__all__ = ["write_report"]

_WIDEST_PX = 900
_STYLE = (
    "body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{border:1px solid #bbb;padding:.2em .6em;text-align:left}img{max-width:100%;border:1px solid #bbb}"
    "code{white-space:pre-wrap}"
)


def write_report(path: Path, result: Evaluation, lines: LineSet, *, title: str) -> Path:
    """Write the report; everything is in the one file, which needs no network and runs no script.

    Args:
        result: of `lines`.
        title: what was read, and with what.
    """
    cer, wer = result.scores.cer, result.scores.wer
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1><p>CER {_percent(cer.rate)} ({_percent(cer.low)} to {_percent(cer.high)}), "
        f"WER {_percent(wer.rate)}, {result.scores.lines} lines, {len(result.left_out)} messages about lines left "
        "out.</p>",
        "<h2>Lines with the most errors</h2>",
        *_worst(result, lines),
        "<h2>Confusions</h2>",
        _table(("truth", "read", "count"), result.confusions),
        "<h2>Characters left out most often</h2>",
        _table(("letter", "count", "of"), result.missing_letters),
        "<h2>Pages</h2>",
        _table(("name", "lines", "characters", "cer", "wer"), result.per_page),
        "<h2>Groups</h2>",
        _table(("name", "lines", "characters", "cer", "wer"), result.per_group),
        "<h2>Left out</h2><ul>",
        *(f"<li>{html.escape(told)}</li>" for told in result.left_out),
        "</ul></html>\n",
    ]
    write_atomic(path, "\n".join(parts).encode())
    return path


def _worst(result: Evaluation, lines: LineSet) -> Iterable[str]:
    pictures = {line.name: line.picture for line in lines.lines}
    for row in result.worst:
        (item, *_rest) = gather([pictures[row["name"]]])
        picture = ""
        if item.picture is not None:
            item.picture.thumbnail((_WIDEST_PX, _WIDEST_PX))
            data = io.BytesIO()
            item.picture.save(data, "PNG")
            source = base64.b64encode(data.getvalue()).decode()
            picture = f'<img alt="the line" src="data:image/png;base64,{source}">'
        yield (
            f"<h3>{html.escape(row['name'])}</h3>{picture}<p>truth: <code>{html.escape(row['text'])}</code><br>"
            f"read: <code>{html.escape(row['read'])}</code> (confidence {row['confidence']:.2f})</p>"
        )


def _table(columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> str:
    head = "".join(f"<th>{column}</th>" for column in columns)
    body = "".join("<tr>" + "".join(f"<td>{_cell(row[column])}</td>" for column in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>" if body else "<p>None.</p>"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _percent(value)
    # A blank would not be seen, and nothing is another thing.
    return html.escape(
        {"": "(nothing)", " ": "(blank)"}.get(value, str(value)) if isinstance(value, str) else str(value)
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.2f} %"
