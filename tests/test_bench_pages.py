"""The benchmark of whole pages: its parts make up the whole, and it is found beside that of lines."""

import json

import pytest
from tiny_readers import write_reader

from fastsd_helpers.cli import main
from fastsd_helpers.errors import SettingsError


def test_the_time_of_a_page_is_divided_among_its_steps(tmp_path, capsys):
    for package in ("rapidocr", "lxml", "pikepdf", "img2pdf"):
        pytest.importorskip(package)
    write_reader(tmp_path / "reader", "base", seed=1)
    words = ["--model", str(tmp_path / "reader"), "--formats", "txt,alto"]
    words += ["--pages", "1", "--lines", "2", "--rounds", "1"]
    assert main(["bench", "trocr", "pages", *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (seconds,) = found["seconds"]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert all(seconds[part] > 0 for part in ("finding", "cutting", "reading", "writing"))
    assert seconds["finding"] + seconds["reading"] > seconds["cutting"] + seconds["writing"]
    used = found["processor_seconds_per_page"]
    assert sum(value for part, value in used.items() if part != "whole") == pytest.approx(used["whole"])
    assert all(used[part] > 0 for part in ("finding", "reading"))
    assert set(found["bytes_per_page"]) == {"scan", "txt", "alto.xml", "notes"}
    assert found["bytes_per_page"]["scan"] > found["bytes_per_page"]["alto.xml"] > found["bytes_per_page"]["txt"] > 0
    assert found["pages_per_minute"] == pytest.approx(60 / seconds["whole"])


def test_the_benchmark_of_lines_keeps_its_name_and_flags(capsys):
    assert main(["bench", "trocr", "--geometry", "huge"]) == 2
    assert "geometry" in capsys.readouterr().err
    assert main(["bench", "trocr", "pages", "--pages", "0"]) == 2
    assert "pages" in capsys.readouterr().err
    from fastsd_helpers.bench.trocr_pages import Settings

    with pytest.raises(SettingsError):
        Settings(lines=0)
