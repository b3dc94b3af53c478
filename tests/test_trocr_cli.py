"""`fastsd trocr ...` from the command line: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from PIL import Image
from tiny_readers import noise_pictures, write_reader

from fastsd_helpers.bench.trocr import Settings, measure
from fastsd_helpers.cli import main
from fastsd_helpers.errors import SettingsError
from fastsd_helpers.trocr.reading.serve import ServeConfig

pytest.importorskip("transformers")


@pytest.fixture
def world(tmp_path):
    write_reader(tmp_path / "reader", seed=1, end=4.0)
    (tmp_path / "lines").mkdir()
    rows = ["file_name,text"]
    for place, picture in enumerate(noise_pictures(3)):
        picture.save(tmp_path / "lines" / f"{place}.png")
        rows.append(f"{place}.png,fox")
    (tmp_path / "lines" / "labels.csv").write_text("\n".join(rows))
    return tmp_path


def run(capsys, *words):
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


def test_read_evaluate_and_embed(world, capsys):
    common = ("--model", world / "reader")
    limits = ("--max-new-tokens", 5, "--precision", "fp32")
    code, data = run(capsys, "trocr", "read", world / "lines", *common, *limits)
    assert code == 0
    assert [line["name"] for line in data["lines"]] == ["0.png", "1.png", "2.png"]
    code, data = run(capsys, "trocr", "read", world / "lines", "--out", world / "out.csv", *common, *limits)
    assert (code, data["path"]) == (0, str(world / "out.csv"))
    assert (world / "out.csv").read_text(encoding="utf-8").startswith("\ufeffname,text,confidence")
    code, data = run(capsys, "trocr", "read", world / "lines", "--out", world / "many", *common, *limits)
    assert (code, data["pictures"], data["read_now"]) == (0, 3, 3)
    assert len((world / "many" / "lines.jsonl").read_text().splitlines()) == 3
    code, data = run(capsys, "trocr", "read", world / "lines", "--attention", world / "looked", *common, *limits)
    assert code == 0
    assert [Path(path).name for path in data["attention"]] == ["0001-0.png", "0002-1.png", "0003-2.png"]
    with Image.open(data["attention"][0]) as sheet:
        assert sheet.width == 600
    code, data = run(capsys, "trocr", "read", world / "lines", "--attention", world / "x", "--pages", *common, *limits)
    assert (code, data["error"]) == (2, "--attention is for images of single lines.")
    code, data = run(capsys, "trocr", "evaluate", world / "lines", *common, *limits)
    assert code == 0
    assert data["scores"]["lines"] == 3
    assert data["scores"]["cer"]["symbols"] == 9
    code, data = run(
        capsys, "trocr", "embed", world / "lines", "--out", world / "vectors", "--pool", "columns", *common
    )
    assert (code, data["shape"]) == (0, [3, 4, 32])
    from safetensors.numpy import load_file

    assert load_file(data["path"])["embeddings"].shape == (3, 4, 32)
    assert (world / "vectors" / "index.csv").read_text().splitlines() == ["row,name", "0,0.png", "1,1.png", "2,2.png"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["read", "nowhere.png"], "no file or folder"),
        (["read", "lines/0.png", "nowhere.png"], "no file or folder"),
        (["read", "lines/0.png", "lines/1.png", "--out", "lines"], "lines is a folder"),
        (["read", "lines", "--out", "there", "--format", "alto,docx"], "--format has docx"),
        (["read", "lines", "--least-confidence", "50"], "--least-confidence is 50"),
        (["read", "lines", "--device", "mps"], "no mps device here"),
        (["read", "lines", "--min-new-tokens", "400"], "min_new_tokens is 400, and this model writes"),
        (["read", "lines", "--beams", "0"], "beams"),
        (["read", "lines", "--out", "x.docx"], "ends in .docx"),
        (["read", "lines", "--shard", "9/3"], "--shard is"),
        (["evaluate", "nowhere"], "no file or folder"),
        (["finetune", "lines", "--out", "run", "--epochs", "0"], "epochs"),
        (["serve", "--share", "--no-login"], "a public page needs one"),
    ],
)
def test_mistakes_end_with_two_and_a_sentence(world, capsys, monkeypatch, words, told):
    monkeypatch.chdir(world)
    code, data = run(capsys, "trocr", *words, "--model", "reader")
    assert code == 2
    assert told in data["error"]


def test_a_page_without_login_cannot_be_shared():
    with pytest.raises(SettingsError, match="a public page needs one"):
        ServeConfig(share=True, login=False)
    assert ServeConfig().login


@pytest.mark.slow
def test_the_shared_page_asks_who_is_there(world):
    gradio_client = pytest.importorskip("gradio_client")
    from fastsd_helpers.trocr import Reader
    from fastsd_helpers.trocr.reading.serve import serve

    served = serve(Reader(world / "reader", precision="fp32", max_new_tokens=4), ServeConfig(port=0))
    try:
        with pytest.raises(Exception, match=r"(?i)auth|login|401"):
            gradio_client.Client(served.url, verbose=False).predict(None, False, api_name="/read")
        client = gradio_client.Client(served.url, auth=(served.user, served.password), verbose=False)
        text, rows = client.predict(gradio_client.handle_file(world / "lines" / "0.png"), False, api_name="/read")
        assert len(rows["data"]) == 1
        assert isinstance(text, str)
    finally:
        served.app.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_benchmark_runs_on_a_tiny_model():
    pytest.importorskip("nncf")
    report = measure(Settings(geometry="tiny", lines=2, tokens=3, rounds=1, batch=2, threads=1))
    assert set(report.data["times_a"]) >= {"(a) transformers as documented", "(c) ours, fp32"}
    assert all(rate > 0 for rate in report.data["lines_per_second"].values())
    assert all(peak > 50e6 for peak in report.data["peak_memory_bytes"].values())
    assert set(report.data["peak_memory_bytes"]) == set(report.data["times_b"]) == set(report.data["times_a"])
